"""The networks that a sampler runs: a model's own, the one that guidance leads away from, a classifier"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator
from dataclasses import dataclass

import torch

from fastdiff.classifier import Classifier, ClassifierNetwork
from fastdiff.diffusion_model import DiffusionModel, Network
from fastdiff.placement import Placed, addresses, dtype_of, preferred_dtype

__all__ = ["Networks", "PlacedNetworks"]


@dataclass(frozen=True)
class Networks:
    """What a step evaluates: a network, whose output guidance leads away from, where that is another's, a classifier

    image_shape: (C, H, W). null_label: of the network, where null rows are its own; null_unlabelled: whether the other
    takes y=None. dtype, null_dtype, classifier_dtype: of the networks' inputs; state_dtype: float32 or float64.
    num_classes: of the classifier. guided_channels: of the C, how many guidance combines.
    """

    network: Network
    null_network: Network | None
    image_shape: tuple[int, int, int]
    has_labels: bool
    null_label: int | None
    null_unlabelled: bool
    device: torch.device
    dtype: torch.dtype
    null_dtype: torch.dtype | None
    state_dtype: torch.dtype
    classifier: ClassifierNetwork | None = None
    num_classes: int = 0
    classifier_dtype: torch.dtype | None = None
    guided_channels: int | None = None

    def addresses(self) -> Hashable:
        """What graphs hold of them; where it changes, they would go on reading memory that others own by now"""
        networks = (self.network, self.null_network, self.classifier)
        return self.dtype, *(None if network is None else addresses(network) for network in networks)


class PlacedNetworks:
    """A model's networks and a classifier's on one device, each in place where it fits, otherwise through a copy

    dtype: to convert them to; None is what each of them prefers, or its own. ValueError for float64 on a GPU.
    """

    def __init__(
        self, model: DiffusionModel, classifier: Classifier | None, device: torch.device, dtype: torch.dtype | None
    ) -> None:
        self.model, self.classifier, self.device = model, classifier, device
        owners = (model, model.null_model, classifier)
        to = [dtype or (None if owner is None else preferred_dtype(owner, device)) for owner in owners]
        self._placed = [Placed(device, each) for each in to]
        self._check()

    @property
    def dtype(self) -> torch.dtype:
        """Of the network's input and, where it is float64, of the state; a foreign network has its owner's"""
        return self._placed[0].dtype or dtype_of(self.model)

    @property
    def state_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def _check(self) -> None:
        if self.dtype == torch.float64 and self.device.type != "cpu":
            raise ValueError(f"dtype=torch.float64 runs on the CPU only, got device {self.device}")

    @contextlib.contextmanager
    def current(self) -> Iterator[Networks]:
        """With the weights that they have now, in eval mode; copies are brought up to date"""
        model, other, classifier = self.model, self.model.null_model, self.classifier
        with contextlib.ExitStack() as stack:
            network, null_network, classifier_network = (
                None if owner is None else stack.enter_context(place.current(owner.network))
                for place, owner in zip(self._placed, (model, other, classifier), strict=True)
            )
            assert network is not None
            self._check()
            yield Networks(
                network=network,
                null_network=null_network,
                image_shape=model.image_shape,
                has_labels=model.num_classes is not None,
                null_label=model.null_label,
                null_unlabelled=other is not None and other.num_classes is None,
                device=self.device,
                dtype=self.dtype,
                null_dtype=None if other is None else self._dtype_beside(1, other),
                state_dtype=self.state_dtype,
                classifier=classifier_network,
                num_classes=0 if classifier is None else classifier.num_classes,
                classifier_dtype=None if classifier is None else self._dtype_beside(2, classifier) or self.dtype,
                guided_channels=model.guided_channels,
            )

    def _dtype_beside(self, which: int, other: DiffusionModel | Classifier) -> torch.dtype | None:
        """Of another network's input; None for a function without a dtype, which takes what the first one takes"""
        if isinstance(other.network, torch.nn.Module):
            return self._placed[which].dtype or dtype_of(other)
        return self._placed[which].dtype
