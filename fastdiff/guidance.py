"""Guidance: labels, the null label, the one definition of w (2207.12598), and a classifier's gradient (2105.05233).

    eps = (1 + w) * eps_cond - w * eps_null                                                    (2207.12598 equation 6)

w = 0 is the conditional model, w = -1 the unconditional one. Other stacks' guidance_scale is 1 + w.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

__all__ = [
    "GuidancePlan",
    "Interval",
    "Labels",
    "Weight",
    "classifier_gradient",
    "guided_rows",
    "plan_guidance",
    "resolve_labels",
    "resolve_w",
]

Labels = int | Sequence[int] | torch.Tensor | npt.NDArray[np.integer] | None
Weight = float | Sequence[float] | torch.Tensor | npt.NDArray[np.floating]
Interval = tuple[float, float] | None


def resolve_labels(labels: Labels, num_classes: int | None, null_label: int | None) -> torch.Tensor | None:
    """labels as an int64 tensor on the CPU, 0-d for one label and (N,) for many; None stays None.

    Raises TypeError for anything but integers, ValueError for labels outside [0, num_classes) or the null label.
    """
    if labels is None:
        if num_classes is not None and null_label is None:
            raise ValueError("labels=None needs a null label, and this model has none; give labels")
        return None
    array = _array(labels, "labels")
    if array.size == 0:
        array = array.astype(np.int64)
    if array.dtype.kind not in "iu" and not all(type(value) is int for value in array.flat):  # past 64 bits
        raise TypeError(f"labels must be integers, got {_kind(labels, array)}")
    if array.ndim > 1:
        raise ValueError(f"labels must be an integer or a vector (N,), got shape {array.shape}")
    if num_classes is None:
        raise ValueError("labels must be None: the model is unconditional")
    bad = array[(array < 0) | (array >= num_classes)]
    if bad.size:
        raise ValueError(f"labels must be in [0, {num_classes}), got {bad.flat[0]}; the null label is added for you")
    if null_label is not None and (array == null_label).any():
        raise ValueError(f"labels must not hold the null label {null_label}; it is added for you, labels=None means it")
    return torch.from_numpy(array.astype(np.int64))


def resolve_w(w: Weight, argument: str = "w") -> torch.Tensor:
    """w as a float64 tensor on the CPU, 0-d or (N,). Raises TypeError for non-numbers, ValueError unless finite.

    argument: its name in errors, where it is another weight.
    """
    array = _array(w, argument)
    if array.size == 0:
        array = array.astype(np.float64)
    if array.dtype.kind not in "iuf":
        raise TypeError(f"{argument} must be a number or a vector of numbers, got {_kind(w, array)}")
    if array.ndim > 1:
        raise ValueError(f"{argument} must be a number or a vector (N,), got shape {array.shape}")
    values = array.astype(np.float64)
    finite = np.abs(values) <= np.finfo(np.float32).max
    if not finite.all():
        raise ValueError(f"{argument} must be finite, got {values[~finite].flat[0]}")
    return torch.from_numpy(values)


def _array(value: object, argument: str) -> npt.NDArray[Any]:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = (value.double() if value.is_floating_point() else value).numpy()
    # numpy would make numbers of [True, 2]
    truths = isinstance(value, Sequence) and any(isinstance(v, bool | np.bool_) for v in value)
    try:
        return np.array(value, dtype=bool if truths else None)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{argument} must be a number or a flat sequence of numbers, got {value!r}") from None


def _kind(value: object, array: npt.NDArray[Any]) -> str:
    return type(value).__name__ if array.ndim == 0 and array.dtype.kind in "OUS" else str(array.dtype)


@dataclass(frozen=True)
class GuidancePlan:
    """How a batch of N images is laid out: guided images first, so that null row j belongs to image j < M.

    order (N,) is the caller's index of each row, y (N,) int64 its label or None for an unconditional model, w (N,)
    float64 its weight. classes (N,) int64 is what a classifier is asked for, classifier_scale (N,) float64 the factor
    of its gradient; both None where no image has one.
    """

    order: torch.Tensor
    y: torch.Tensor | None
    w: torch.Tensor
    classes: torch.Tensor | None = None
    classifier_scale: torch.Tensor | None = None

    @property
    def N(self) -> int:
        return len(self.w)

    @property
    def M(self) -> int:
        return int((self.w != 0).sum())

    @property
    def inverse(self) -> torch.Tensor:
        """The row of each of the caller's images."""
        return torch.argsort(self.order)


def plan_guidance(
    labels: torch.Tensor | None,
    w: torch.Tensor,
    n: int,
    *,
    num_classes: int | None,
    null_label: int | None,
    has_null_model: bool = False,
    classifier_scale: torch.Tensor | None = None,
    all_channels: bool = True,
) -> GuidancePlan:
    """The layout of n images from resolved labels, w and a classifier's scale, each 0-d or (n,).

    w = -1 becomes (null label, w = 0), one evaluation an image; its label remains the classifier's. Raises ValueError
    where w asks for a null label that the model lacks, or images are guided that have no label. has_null_model: another
    network takes the null rows. classifier_scale: None without a classifier, which alone takes labels where num_classes
    is None. all_channels: whether guidance combines them all; where it does not, w = -1 has both rows, for the others
    are the conditional one's.
    """
    weights = w.expand(n).clone()
    unconditional = weights == -1
    classes = scales = None
    if classifier_scale is not None and (classifier_scale != 0).any():
        if labels is None:
            raise ValueError("labels must be given: they are what the classifier is asked for; or classifier_scale=0")
        classes, scales = labels.expand(n), classifier_scale.expand(n)
    if num_classes is None and labels is not None:
        labels = None
        if not has_null_model and (wrong := weights[(weights != 0) & ~unconditional]).numel():
            raise ValueError(
                f"w must be 0 or -1: the model is unconditional, labels are the classifier's; got {wrong[0].item():g}"
            )
    if labels is None and not (has_null_model and num_classes is None):
        wrong = weights[(weights != 0) & ~unconditional]
        if len(wrong):
            raise ValueError(f"w must be 0 or -1 where labels=None (nothing to guide towards), got {wrong[0].item():g}")
    elif has_null_model and null_label is None and unconditional.any():
        raise ValueError("w must not be -1: this model has null_label=None; sample its null_model by itself")
    elif null_label is None and not has_null_model and (weights != 0).any():
        got = weights[weights != 0][0].item()
        raise ValueError(f"w must be 0: guidance needs a null label, and this model has null_label=None; got {got:g}")
    if labels is not None and not all_channels:
        unconditional = torch.zeros_like(unconditional)
    weights[unconditional] = 0.0
    y = None
    if num_classes is not None:
        null = torch.tensor(-1 if null_label is None else null_label, device="cpu")
        y = torch.where(unconditional, null, null if labels is None else labels).expand(n)
    order = torch.argsort((weights == 0).to(torch.int8), stable=True)
    y, classes, scales = (None if values is None else values[order] for values in (y, classes, scales))
    return GuidancePlan(order, y, weights[order], classes, scales)


def guided_rows(sigma_edm: npt.NDArray[np.float64], interval: Interval) -> npt.NDArray[np.bool_]:
    """Which rows are guided: those with lo < sigma_edm <= hi (2404.07724); all of them without an interval."""
    if interval is None:
        return np.ones(len(sigma_edm), dtype=bool)
    try:
        lo, hi = (float(bound) for bound in interval)
        if isinstance(interval, str):
            raise TypeError
    except (TypeError, ValueError):
        raise TypeError(f"guidance_interval must be a pair (lo, hi) of sigma_edm or None, got {interval!r}") from None
    if not 0 <= lo < hi or math.isinf(lo):
        raise ValueError(
            f"guidance_interval must satisfy 0 <= lo < hi in sigma_edm = sigma / alpha, got ({lo:g}, {hi:g})"
        )
    return (lo < sigma_edm) & (sigma_edm <= hi)


def classifier_gradient(
    network: Callable[..., torch.Tensor],
    x: torch.Tensor,
    t: torch.Tensor,
    labels: torch.Tensor,
    scale: torch.Tensor,
    *,
    num_classes: int,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """scale * d log p(labels | x) / dx (2105.05233 section 4.1), (N, C, H, W) in the dtype of x; zero where scale is

    network(x, t) -> logits (N, num_classes), of x (N, C, H, W) cast to dtype and t (N,). labels int64 (N,), scale (N,)
    in the dtype of x. log_softmax is taken in float32 at least. No parameter's grad is touched, no data are read on the
    host, and images do not mix: NaN stays in its own. Raises TypeError or ValueError for logits that are none.
    """
    with torch.enable_grad():
        leaf = x.detach().to(dtype or x.dtype, copy=True).requires_grad_()
        logits = network(leaf, t)
        if not isinstance(logits, torch.Tensor) or not logits.is_floating_point():
            got = logits.dtype if isinstance(logits, torch.Tensor) else type(logits).__name__
            raise TypeError(f"classifier's network(x, t) must return a floating-point tensor, got {got}")
        if logits.shape != (len(x), num_classes):
            raise ValueError(
                f"classifier's network(x, t) must return logits of shape {(len(x), num_classes)}, "
                f"got {tuple(logits.shape)}"
            )
        wide = torch.promote_types(logits.dtype, torch.float32)
        log_p = torch.log_softmax(logits.to(wide), dim=1).gather(1, labels[:, None])
        grad = None
        if log_p.requires_grad:
            (grad,) = torch.autograd.grad(log_p.sum(), leaf, allow_unused=True)
    if grad is None:
        raise ValueError("classifier's network(x, t) must be differentiable in x, got logits that do not depend on it")
    factor = scale[:, None, None, None]
    return torch.where(factor != 0, factor * grad.to(x.dtype), 0)
