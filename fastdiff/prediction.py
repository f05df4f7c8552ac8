"""What a network predicts: eps, v or x0; how that becomes x0, and what training aims at.

With x = alpha * x0 + sigma * eps, every prediction is linear: g = g_x0 * x0 + g_eps * eps, x0 = k_x * x + k_out * g.
v is Progressive Distillation's (2202.00512, appendix D): v = alpha * eps - sigma * x0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["PREDICTIONS", "Prediction", "named_prediction"]

Array = npt.NDArray[np.float64]
Pair = tuple[Array, Array]


@dataclass(frozen=True)
class Prediction:
    """One parametrisation; each function maps float64 alpha, sigma (rows,) to a pair of coefficients (rows,)."""

    name: str
    to_x0: Callable[[Array, Array], Pair]  # (k_x, k_out): x0 = k_x * x + k_out * g
    to_eps: Callable[[Array, Array], Pair]  # eps = first * x + second * g
    target: Callable[[Array, Array], Pair]  # (g_x0, g_eps): g = g_x0 * x0 + g_eps * eps

    def training_target(
        self, x0: torch.Tensor, eps: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor
    ) -> torch.Tensor:
        """What the network should say for x0 and eps (B, ...) at alpha, sigma (B,); shape and dtype of x0."""
        if self.name == "eps":
            return eps
        if self.name == "x0":
            return x0
        broadcast = (-1,) + (1,) * (x0.ndim - 1)
        return alpha.view(broadcast) * eps - sigma.view(broadcast) * x0


def _zeros_ones(a: Array, s: Array) -> Pair:
    return np.zeros_like(a), np.ones_like(a)


def _x0_from_eps(a: Array, s: Array) -> Pair:
    if (a == 0).any():
        raise ValueError(
            "prediction='eps' says nothing about x0 where alpha = 0; use 'v' or 'x0', or skip that timestep"
        )
    return 1 / a, -s / a


PREDICTIONS: dict[str, Prediction] = {
    "eps": Prediction("eps", to_x0=_x0_from_eps, to_eps=_zeros_ones, target=_zeros_ones),
    "v": Prediction("v", to_x0=lambda a, s: (a, -s), to_eps=lambda a, s: (s, a), target=lambda a, s: (-s, a)),
    "x0": Prediction(
        "x0",
        to_x0=_zeros_ones,
        to_eps=lambda a, s: (1 / s, -a / s),
        target=lambda a, s: (np.ones_like(a), np.zeros_like(a)),
    ),
}


def named_prediction(name: str) -> Prediction:
    """PREDICTIONS[name], or a ValueError that lists the names."""
    if not isinstance(name, str) or name not in PREDICTIONS:
        raise ValueError(f"prediction must be one of {sorted(PREDICTIONS)}, got {name!r}")
    return PREDICTIONS[name]
