"""TrainConfig: every number that decides a training run."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from fastdiff.training.timesteps import TIMESTEP_SAMPLERS

__all__ = ["DECAYS", "LOSSES", "PRECISIONS", "TrainConfig"]

DECAYS = ("cosine", "linear", "constant")
LOSSES = ("simple", "hybrid", "vlb", "kl")
PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class TrainConfig:
    """One training run; ValueError or TypeError names the field that cannot be.

    iterations: optimiser steps; an epoch boundary may fall inside a batch.
    batch_size: images a step; accumulate: in so many parts, whose gradients are added, so memory holds one part.
    loss: of a diffusion model. L_t is the bound's term of the sampled t in bits per dimension (2102.09672, equation 4):
        "simple": mean squared error of the prediction (2006.11239, equation 14); trains no variance.
        "hybrid": that + vlb_weight * T * L_t, the mean detached in L_t (2102.09672, equation 16); improved-diffusion's
            rescaled MSE. Its unscaled MSE is vlb_weight = 1 / T.
        "vlb": T * L_t, mean and variance (its rescaled KL). "kl": L_t (its KL).
        None: "hybrid" where the variance is learned, else "simple". A classifier's is the cross entropy.
    min_snr_gamma: weighs the squared error of x0 by min(SNR, gamma) (2303.09556); None: each prediction's own weight.
    timesteps: "uniform", or "loss_second_moment": each t as often as the root of the mean square of its last ten losses
        says, its loss divided by that (2102.09672, equation 18).
    lr, warmup, decay, final_lr: AdamW's rate rises linearly over `warmup` steps, then stays ("constant") or falls to
        the fraction final_lr of lr at the last step, along half a cosine ("cosine") or a line ("linear").
    grad_clip: largest norm of the gradient over all parameters.
    p_uncond: probability of the null label (classifier-free guidance, 2207.12598, algorithm 1); unconditional models
        and classifiers ignore it.
    ema_decay: of the averaged weights, which the first update copies; later, after n updates, min(ema_decay, (1 + n) /
        (10 + n)). Several rates are averaged side by side; the first is the model's.
    max_skipped: a loss or gradient that is not finite skips the update and the averages; one more than so many stops
        the run.
    seed: in [0, 2^63); fixes the order of the data, times, dropped labels, noise and dropout.
    precision: "float32", or "bfloat16": the network runs under autocast; weights, moments and loss stay float32.
    compile: run the network through torch.compile.
    log_every, save_every, sample_every: steps between lines of the log, checkpoints, and calls of the callback; 0: at
        the end only. sample_every=None: with every checkpoint.
    tensorboard: write the log's lines for TensorBoard too.
    """

    iterations: int
    batch_size: int = 128
    accumulate: int = 1
    loss: str | None = None
    vlb_weight: float = 0.001
    min_snr_gamma: float | None = None
    timesteps: str = "uniform"
    lr: float = 4e-4
    warmup: int = 200
    decay: str = "cosine"
    final_lr: float = 0.01
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.99)
    grad_clip: float = 1.0
    p_uncond: float = 0.1
    ema_decay: float | tuple[float, ...] = 0.999
    max_skipped: int = 10
    seed: int = 0
    precision: str = "float32"
    compile: bool = False
    log_every: int = 50
    save_every: int = 1000
    sample_every: int | None = None
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for name in ("iterations", "batch_size", "accumulate"):
            self._check_int(name, 1)
        for name in ("warmup", "seed", "max_skipped", "log_every", "save_every"):
            self._check_int(name, 0)
        if self.sample_every is not None:
            self._check_int("sample_every", 0)
        if self.seed >= 2**63:
            raise ValueError(f"seed must be in [0, 2^63), got {self.seed}")
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate must divide batch_size={self.batch_size}, got {self.accumulate}")
        object.__setattr__(self, "betas", self._pair(self.betas))
        if isinstance(self.ema_decay, tuple | list):
            rates = (float(each) if isinstance(each, float) else each for each in self.ema_decay)  # NumPy's are floats
            object.__setattr__(self, "ema_decay", tuple(rates))
            if not self.ema_decay or any(self.ema_decays.count(decay) > 1 for decay in self.ema_decays):
                raise ValueError(f"ema_decay must be a number or several different ones, got {self.ema_decay}")
        for name, value, low, high, closed in (
            ("lr", self.lr, 0.0, math.inf, False),
            ("grad_clip", self.grad_clip, 0.0, math.inf, False),
            ("weight_decay", self.weight_decay, 0.0, math.inf, True),
            ("final_lr", self.final_lr, 0.0, 1.0, True),
            ("p_uncond", self.p_uncond, 0.0, 1.0, True),
            *(("ema_decay", decay, 0.0, 1.0, True) for decay in self.ema_decays),
            ("vlb_weight", self.vlb_weight, 0.0, math.inf, False),
            *([] if self.min_snr_gamma is None else [("min_snr_gamma", self.min_snr_gamma, 0.0, math.inf, False)]),
            ("betas", self.betas[0], 0.0, 1.0, True),
            ("betas", self.betas[1], 0.0, 1.0, True),
        ):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name} must be a number, got {value!r}")
            if isinstance(value, int) and abs(value) >= 2**1023:
                raise ValueError(f"{name} must be a number of 64 bits, got {value}")
            open_above = name in ("ema_decay", "betas") or high == math.inf
            if not (low <= value <= high) or (value == low and not closed) or (value == high and open_above):
                bounds = f"{'[' if closed else '('}{low:g}, {high:g}{')' if open_above else ']'}"
                raise ValueError(f"{name} must be in {bounds}, got {value}")
        losses = (*LOSSES, None)
        for name, choices in (
            ("decay", DECAYS), ("precision", PRECISIONS), ("loss", losses), ("timesteps", tuple(TIMESTEP_SAMPLERS))
        ):  # fmt: skip
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {list(choices)}, got {getattr(self, name)!r}")
        for name in ("compile", "tensorboard"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.min_snr_gamma is not None and self.loss in ("vlb", "kl"):
            raise ValueError(f"min_snr_gamma must be None with loss={self.loss!r}, which has no squared error to weigh")

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
        left = 1 - progress if self.decay == "linear" else (1 + math.cos(math.pi * progress)) / 2
        return self.lr * (self.final_lr + (1 - self.final_lr) * left)

    @property
    def ema_decays(self) -> tuple[float, ...]:
        """Every rate of averaging, the model's first."""
        return self.ema_decay if isinstance(self.ema_decay, tuple) else (self.ema_decay,)

    def ema_decay_at(self, updates: int, which: int = 0) -> float:
        """The decay of an average after so many updates, warmed up so that early weights are soon forgotten."""
        return min(self.ema_decays[which], (1 + updates) / (10 + updates))

    def to_dict(self) -> dict[str, Any]:
        """Every field as JSON's own types."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
