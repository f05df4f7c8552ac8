"""DiffusionModel: a network with all that sampling must know about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import EllipsisType
from typing import Any

import numpy as np
import torch

from fastdiff.prediction import named_prediction
from fastdiff.schedule import Schedule

__all__ = ["VARIANCES", "DiffusionModel", "Network", "is_conditioned_apart"]

Network = Callable[..., torch.Tensor]

VARIANCES = ("fixed_small", "fixed_large", "learned_range")


def is_conditioned_apart(network: object) -> bool:
    """Whether a network follows fastdiff's optional protocol, as its UNet does.

    What it computes from time and label alone is apart from its image path: `embedding(t, y)` (B, E), `modulation` of
    that (B, R), and `body(x, mod, **extra)` with x and extra of N rows and mod of N + M: row N + j of the result is
    image j under a modulation of its own. It runs in any floating dtype that it is converted to, and tells its
    embedding's rows in `num_labels`, None for no labels. The sampler then computes all rows' modulations at once, and
    what both rows of an image share once. It may also have `packed()`, the network as it runs best on a CPU with the
    weights of today.
    """
    return all(callable(getattr(network, part, None)) for part in ("embedding", "modulation", "body"))


class DiffusionModel:
    """A network with its schedule, prediction, variance, classes and image shape.

    network: any callable network(x, t, y, **extra) -> (B, C, H, W), or (B, 2C, H, W) with a variance in the second
        half. x is (B, C, H, W) in the compute dtype, t float (B,) in [0, T), y int64 (B,), or None where num_classes is
        None; extra are the caller's further inputs by name, (B, ...) each, such as low_res; it must not write to them.
        Where it has `extra_shapes`, {name: shape of one image's}, these inputs are asked for, and no others.
    schedule: a Schedule, or its name for T = 1000: "linear", "cosine".
    prediction: "eps", "v" or "x0".
    variance: of DDPM's reverse step: "fixed_small" (beta tilde), "fixed_large" (beta) or "learned_range" (Improved DDPM
        equation 15; needs the 2C outputs).
    num_classes: labels are in [0, num_classes); None for an unconditional model.
    null_label: the label that means none; left out, it is num_classes, the row after the last class. None where the
        network has none: no guidance then.
    image_shape: (C, H, W).
    clip_x0: whether the data lie in [-1, 1], so that predictions are clipped there (pixels yes, latents no).
    dtype: the recorded compute dtype, or None.
    name, provenance: free text and JSON-able facts, kept by checkpoints and shown by `fastdiff info`.
    null_model: a second DiffusionModel whose output guidance leads away from, in place of this one's null rows: an
        unconditional one (num_classes=None) for a network without a null label, or a weaker one that takes the same
        labels (autoguidance, 2406.02507). Same schedule, prediction and image_shape; a learned variance stays this
        one's. A checkpoint does not hold it.
    solver: how it is sampled where nobody says: {"name": a key of SOLVERS, "spacing": what an int `steps` stands for,
        such as "leading:N"; the rest: that solver's own options}. None: {"name": "ddim"}, N at a fractional stride.
    guided_channels: how many of the C channels guidance combines, the first ones; the others are those of the
        conditional row, with w = -1 too (DiT guides 3 of 4). None: all.
    decode: what makes images (N, ...) of sampled latents (N, C, H, W), such as a VAE's decoder. None: x is the image.
        A checkpoint does not hold it.

    Raises ValueError or TypeError naming the argument.
    """

    def __init__(
        self,
        network: Network,
        schedule: Schedule | str,
        prediction: str = "eps",
        variance: str = "fixed_small",
        num_classes: int | None = 10,
        null_label: int | EllipsisType | None = ...,
        image_shape: tuple[int, int, int] = (1, 16, 16),
        *,
        clip_x0: bool = True,
        dtype: torch.dtype | None = None,
        name: str | None = None,
        provenance: Mapping[str, Any] | None = None,
        null_model: DiffusionModel | None = None,
        solver: Mapping[str, Any] | None = None,
        guided_channels: int | None = None,
        decode: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        if not callable(network):
            raise TypeError(f"network must be a callable network(x, t, y), got {type(network).__name__}")
        if isinstance(schedule, str):
            schedule = Schedule.named(schedule)
        if not isinstance(schedule, Schedule):
            raise TypeError(f"schedule must be a Schedule or a name, got {type(schedule).__name__}")
        named_prediction(prediction)
        if variance not in VARIANCES:
            raise ValueError(f"variance must be one of {list(VARIANCES)}, got {variance!r}")
        null_label = num_classes if isinstance(null_label, EllipsisType) else null_label
        if num_classes is None and null_label is not None:
            raise ValueError(f"null_label must be None for an unconditional model (num_classes=None), got {null_label}")
        for argument, value, least in (("num_classes", num_classes, 1), ("null_label", null_label, 0)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ValueError(f"{argument} must be an integer of at least {least} or None, got {value!r}")
        # a label without a row in the embedding would fail only while sampling
        rows = getattr(network, "num_labels", None) if is_conditioned_apart(network) else None
        needed = max(num_classes or 0, (null_label or 0) + 1)
        if rows is not None and num_classes is not None and needed > rows:
            raise ValueError(
                f"num_classes={num_classes} and null_label={null_label} need {needed} labels, the network has {rows}"
            )
        shape = tuple(image_shape) if isinstance(image_shape, Sequence) else ()
        if len(shape) != 3 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in shape):
            raise ValueError(f"image_shape must be three positive integers (C, H, W), got {image_shape!r}")
        if dtype not in (None, torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise TypeError(f"dtype must be a floating torch.dtype of 16 to 64 bits or None, got {dtype!r}")
        if not isinstance(clip_x0, bool):
            raise TypeError(f"clip_x0 must be True or False, got {clip_x0!r}")
        if provenance is not None and not isinstance(provenance, Mapping):
            raise TypeError(f"provenance must be a mapping or None, got {type(provenance).__name__}")
        self.network = network
        self.schedule = schedule
        self.prediction = prediction
        self.variance = variance
        self.num_classes = num_classes
        self.null_label = null_label
        self.image_shape: tuple[int, int, int] = shape
        self.clip_x0 = clip_x0
        self.dtype = dtype
        self.name = name
        self.provenance = dict(provenance or {})
        self.solver = None if solver is None else _checked_solver(solver)
        if guided_channels is not None and (
            isinstance(guided_channels, bool)
            or not isinstance(guided_channels, int)
            or not 1 <= guided_channels <= shape[0]
        ):
            raise ValueError(f"guided_channels must be an integer in [1, {shape[0]}] or None, got {guided_channels!r}")
        self.guided_channels = None if guided_channels == shape[0] else guided_channels
        if decode is not None and not callable(decode):
            raise TypeError(f"decode must be a function of latents or None, got {type(decode).__name__}")
        self.decode = decode
        self.null_model = null_model

    @property
    def null_model(self) -> DiffusionModel | None:
        return self._null_model

    @null_model.setter
    def null_model(self, other: DiffusionModel | None) -> None:
        if other is not None:
            self._check_null_model(other)
        self._null_model = other

    def _check_null_model(self, other: DiffusionModel) -> None:
        if not isinstance(other, DiffusionModel):
            raise TypeError(f"null_model must be a DiffusionModel or None, got {type(other).__name__}")
        if other.null_model is not None:
            raise ValueError("null_model must not have a null_model of its own")
        for name in ("image_shape", "prediction"):
            if getattr(other, name) != getattr(self, name):
                raise ValueError(
                    f"null_model must have {name}={getattr(self, name)!r} as the model, got {getattr(other, name)!r}"
                )
        if not np.array_equal(other.schedule.alphas_cumprod, self.schedule.alphas_cumprod):
            raise ValueError("null_model must have the model's schedule: the same alphas_cumprod")
        if other.num_classes is not None and other.num_classes != self.num_classes:
            raise ValueError(
                f"null_model must have num_classes={self.num_classes} as the model, or None, got {other.num_classes}"
            )

    def __repr__(self) -> str:
        C, H, W = self.image_shape
        return (
            f"DiffusionModel({self.name or type(self.network).__name__}, {C}x{H}x{W}, classes={self.num_classes}, "
            f"prediction={self.prediction}, variance={self.variance}, T={self.schedule.num_train_timesteps})"
        )

    @property
    def out_channels(self) -> int:
        """Channels that the network returns where the variance is learned or not: C or 2C."""
        return self.image_shape[0] * (2 if self.variance == "learned_range" else 1)

    def parameters(self) -> list[torch.Tensor]:
        """Parameters and buffers of the network, empty for a plain function."""
        if not isinstance(self.network, torch.nn.Module):
            return []
        return [*self.network.parameters(), *self.network.buffers()]


def _checked_solver(solver: object) -> dict[str, Any]:
    """Its form; which names and options there are, solvers.py knows"""
    if not isinstance(solver, Mapping) or not all(isinstance(key, str) for key in solver):
        raise TypeError(f"solver must be a mapping of names to values or None, got {solver!r}")
    if not isinstance(solver.get("name"), str):
        raise ValueError(f"solver must have the 'name' of one of fastdiff.SOLVERS, got {dict(solver)!r}")
    spacing = solver.get("spacing", "N")
    if not isinstance(spacing, str) or spacing.count("N") != 1:
        raise ValueError(f"solver's 'spacing' must be a string with one N in the number's place, got {spacing!r}")
    for key, value in solver.items():
        if not isinstance(value, bool | int | float | str):
            raise TypeError(f"solver's {key!r} must be a number, a string, True or False, got {value!r}")
    return dict(solver)
