"""Classifier: a network that tells the class of a noisy image, with all that guidance must know about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fastdiff.schedule import Schedule

__all__ = ["Classifier", "ClassifierNetwork"]

ClassifierNetwork = Callable[..., torch.Tensor]


class Classifier:
    """p(y | x_t) of noisy images, as classifier guidance (2105.05233, section 4) needs it.

    network: any callable network(x, t) -> logits (B, num_classes), differentiable in x. x is (B, C, H, W), t float (B,)
        in [0, T), the times of the whole chain even where a sampler skips most of them.
    schedule: a Schedule, or its name for T = 1000: that of the diffusion models it is to guide.
    num_classes: labels are in [0, num_classes).
    image_shape: (C, H, W).
    dtype: the recorded compute dtype, in which the network gets x; None: what suits the device for a network of
        fastdiff, that of its parameters for another module, and the diffusion model's for a function.
    name, provenance: free text and JSON-able facts, kept by checkpoints and shown by `fastdiff info`.

    Raises ValueError or TypeError naming the argument.
    """

    def __init__(
        self,
        network: ClassifierNetwork,
        schedule: Schedule | str,
        num_classes: int = 10,
        image_shape: tuple[int, int, int] = (1, 16, 16),
        *,
        dtype: torch.dtype | None = None,
        name: str | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        if not callable(network):
            raise TypeError(f"network must be a callable network(x, t), got {type(network).__name__}")
        if isinstance(schedule, str):
            schedule = Schedule.named(schedule)
        if not isinstance(schedule, Schedule):
            raise TypeError(f"schedule must be a Schedule or a name, got {type(schedule).__name__}")
        if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 2:
            raise ValueError(f"num_classes must be an integer of at least 2, got {num_classes!r}")
        shape = tuple(image_shape) if isinstance(image_shape, Sequence) else ()
        if len(shape) != 3 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in shape):
            raise ValueError(f"image_shape must be three positive integers (C, H, W), got {image_shape!r}")
        if dtype not in (None, torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise TypeError(f"dtype must be a floating torch.dtype of 16 to 64 bits or None, got {dtype!r}")
        if provenance is not None and not isinstance(provenance, Mapping):
            raise TypeError(f"provenance must be a mapping or None, got {type(provenance).__name__}")
        self.network = network
        self.schedule = schedule
        self.num_classes = num_classes
        self.image_shape: tuple[int, int, int] = shape
        self.dtype = dtype
        self.name = name
        self.provenance = dict(provenance or {})

    def __repr__(self) -> str:
        C, H, W = self.image_shape
        return (
            f"Classifier({self.name or type(self.network).__name__}, {C}x{H}x{W}, classes={self.num_classes}, "
            f"T={self.schedule.num_train_timesteps})"
        )

    def parameters(self) -> list[torch.Tensor]:
        """Parameters and buffers of the network, empty for a plain function."""
        if not isinstance(self.network, torch.nn.Module):
            return []
        return [*self.network.parameters(), *self.network.buffers()]
