"""The real images that generated ones are measured against, and what real images themselves score."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import torch

from fastdiff.evaluation.figures import (
    Judge,
    features,
    frechet_distance,
    mean_std,
    nearest_distance,
    real_split_distance,
    spread,
)

__all__ = ["Labelled", "Real"]

Labelled = tuple[torch.Tensor, torch.Tensor]


class Real:
    """Real training images, the comparison, and held-out ones, from which alone the judge learns.

    train, heldout: (images float (N, C, H, W), labels int (N,)) with every class at least twice. shape is (C, H, W).
    Raises ValueError or TypeError naming real_train or real_heldout.
    """

    def __init__(self, train: Labelled, heldout: Labelled, num_classes: int, shape: tuple[int, int, int]) -> None:
        self.train, self.train_labels = _checked("real_train", train, num_classes, shape)
        self.heldout, self.heldout_labels = _checked("real_heldout", heldout, num_classes, shape)
        self.judge = Judge(self.heldout, self.heldout_labels)
        self._features = features(self.train)
        self._spread = spread(self._features, self.train_labels)
        nearest = nearest_distance(self.heldout, self.train)
        self._near, self._median = float(np.percentile(nearest, 1)), float(np.median(nearest))

    def digest(self) -> str:
        """12 hex digits that change with any pixel, label or order."""
        sha = hashlib.sha256()
        for array in (self.train.numpy(), self.train_labels, self.heldout.numpy(), self.heldout_labels):
            sha.update(f"{array.shape}{array.dtype}".encode() + array.tobytes())
        return sha.hexdigest()[:12]

    def measure(self, images: torch.Tensor, labels: np.ndarray) -> dict[str, float]:
        """The figures of generated images (N, C, H, W) that were asked to show labels (N,).

        accuracy of the judge; spread_ratio and frechet against the training images; near_copies, the share of images
        nearer to a training image than 99 % of held-out ones are; nearest_ratio, the median of those distances over
        that of held-out images.
        """
        x, nearest = features(images), nearest_distance(images, self.train)
        return {
            "accuracy": self.judge.accuracy(images, labels),
            "spread_ratio": spread(x, labels) / self._spread,
            "frechet": frechet_distance(x, self._features),
            "near_copies": float(np.mean(nearest < self._near)),
            "nearest_ratio": float(np.median(nearest) / self._median),
        }

    def figures(self) -> dict[str, Any]:
        """What real images score: the accuracy, and the distances between real samples of stated sizes."""
        accuracy = self.judge.accuracy(self.train, self.train_labels)
        heldout = features(self.heldout)
        halves = real_split_distance(np.concatenate([self._features, heldout]))
        n = len(self.train) + len(self.heldout)
        return {
            "train_images": len(self.train),
            "heldout_images": len(self.heldout),
            # the binomial error of a share
            "accuracy": {"mean": accuracy, "std": math.sqrt(accuracy * (1 - accuracy) / len(self.train))},
            "spread": self._spread,
            "heldout_spread_ratio": spread(heldout, self.heldout_labels) / self._spread,
            "frechet_halves": {**mean_std(halves), "sizes": [n // 2, n - n // 2], "splits": len(halves)},
            "frechet_heldout": frechet_distance(heldout, self._features),
            "nearest": {"percentile_1": self._near, "median": self._median},
        }


def _checked(
    name: str, real: Labelled, num_classes: int, shape: tuple[int, int, int]
) -> tuple[torch.Tensor, np.ndarray]:
    if not (isinstance(real, tuple) and len(real) == 2 and all(isinstance(part, torch.Tensor) for part in real)):
        raise TypeError(f"{name} must be a pair of tensors (images, labels), got {type(real).__name__}")
    images, labels = real[0].detach().cpu(), real[1].detach().cpu()
    if tuple(images.shape[1:]) != shape or not images.is_floating_point():
        expected, got = ", ".join(map(str, shape)), f"{images.dtype} {tuple(images.shape)}"
        raise ValueError(f"{name}: images must be floating (N, {expected}) like the model's, got {got}")
    if labels.shape != images.shape[:1] or labels.is_floating_point():
        raise ValueError(f"{name}: labels must be {len(images)} integers, got {labels.dtype} {tuple(labels.shape)}")
    if not torch.equal(labels.unique(), torch.arange(num_classes)) or int(torch.bincount(labels).min()) < 2:
        raise ValueError(f"{name}: labels must hold every class of 0 to {num_classes - 1} at least twice, and no other")
    return images.contiguous(), labels.long().numpy()
