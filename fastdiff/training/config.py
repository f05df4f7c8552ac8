"""TrainConfig: every number that decides a training run."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["DECAYS", "PRECISIONS", "TrainConfig"]

DECAYS = ("cosine", "constant")
PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class TrainConfig:
    """One training run; ValueError or TypeError names the field that cannot be.

    iterations: optimiser steps; an epoch boundary may fall inside a batch.
    lr, warmup, decay, final_lr: AdamW's rate rises linearly over `warmup` steps, then stays ("constant") or falls along
        half a cosine to the fraction final_lr of lr at the last step ("cosine").
    grad_clip: largest norm of the gradient over all parameters.
    p_uncond: probability of the null label (classifier-free guidance, 2207.12598, algorithm 1); unconditional models
        ignore it.
    ema_decay: of the averaged weights; after n updates min(ema_decay, (1 + n) / (10 + n)).
    seed: in [0, 2^63); fixes the order of the data, times, dropped labels, noise and dropout.
    precision: "float32", or "bfloat16": the network runs under autocast; weights, moments and loss stay float32.
    log_every, save_every: steps between lines of the log, and between checkpoints; 0: at the end only.
    """

    iterations: int
    batch_size: int = 128
    lr: float = 4e-4
    warmup: int = 200
    decay: str = "cosine"
    final_lr: float = 0.01
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.99)
    grad_clip: float = 1.0
    p_uncond: float = 0.1
    ema_decay: float = 0.999
    seed: int = 0
    precision: str = "float32"
    log_every: int = 50
    save_every: int = 1000

    def __post_init__(self) -> None:
        for name, least in (("iterations", 1), ("batch_size", 1), ("warmup", 0), ("seed", 0), ("log_every", 0)):
            self._check_int(name, least)
        self._check_int("save_every", 0)
        if self.seed >= 2**63:
            raise ValueError(f"seed must be in [0, 2^63), got {self.seed}")
        object.__setattr__(self, "betas", self._pair(self.betas))
        for name, value, low, high, closed in (
            ("lr", self.lr, 0.0, math.inf, False),
            ("grad_clip", self.grad_clip, 0.0, math.inf, False),
            ("weight_decay", self.weight_decay, 0.0, math.inf, True),
            ("final_lr", self.final_lr, 0.0, 1.0, True),
            ("p_uncond", self.p_uncond, 0.0, 1.0, True),
            ("ema_decay", self.ema_decay, 0.0, 1.0, True),
            ("betas", self.betas[0], 0.0, 1.0, True),
            ("betas", self.betas[1], 0.0, 1.0, True),
        ):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name} must be a number, got {value!r}")
            open_above = name in ("ema_decay", "betas") or high == math.inf
            if not (low <= value <= high) or (value == low and not closed) or (value == high and open_above):
                bounds = f"{'[' if closed else '('}{low:g}, {high:g}{')' if open_above else ']'}"
                raise ValueError(f"{name} must be in {bounds}, got {value}")
        for name, choices in (("decay", DECAYS), ("precision", PRECISIONS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {list(choices)}, got {getattr(self, name)!r}")

    def _check_int(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {value!r}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")

    @staticmethod
    def _pair(betas: Any) -> tuple[float, float]:
        if not isinstance(betas, tuple | list) or len(betas) != 2:
            raise TypeError(f"betas must be a pair of numbers, got {betas!r}")
        return betas[0], betas[1]

    def lr_at(self, step: int) -> float:
        """The learning rate of step in [0, iterations)."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if self.decay == "constant":
            return self.lr
        progress = (step - self.warmup) / max(self.iterations - 1 - self.warmup, 1)
        return self.lr * (self.final_lr + (1 - self.final_lr) * (1 + math.cos(math.pi * progress)) / 2)

    def ema_decay_at(self, updates: int) -> float:
        """The decay of the average after so many updates, warmed up so that early weights are soon forgotten."""
        return min(self.ema_decay, (1 + updates) / (10 + updates))

    def to_dict(self) -> dict[str, Any]:
        """Every field as JSON's own types."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
