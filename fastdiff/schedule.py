"""Noise schedules and timestep spacings, in float64.

A schedule is the curve alphas_cumprod over t in [0, T - 1]; a spacing chooses the times at which a solver visits it.
Sources: DDPM (2006.11239) section 4, Improved DDPM (2102.09672) sections 3.2 and 4, DDIM (2010.02502) section 4.2.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["SCHEDULES", "Schedule", "Steps", "cosine_betas", "linear_betas", "timesteps"]

Array = npt.NDArray[np.float64]
Steps = int | str | Sequence[float]

# beyond which T is a mistake
MOST_TIMESTEPS = 2**20


def linear_betas(num_train_timesteps: int) -> Array:
    """Linear betas of DDPM section 4, scaled so that every T destroys the same amount of signal; float64 (T,).

    Raises ValueError where a short chain would need a beta of 1 or more (T of 20 and less).
    """
    scale = 1000 / num_train_timesteps
    if scale * 0.02 >= 1:
        raise ValueError(f"the linear schedule needs num_train_timesteps of at least 21, got {num_train_timesteps}")
    return np.linspace(scale * 1e-4, scale * 2e-2, num_train_timesteps, dtype=np.float64)


def cosine_betas(num_train_timesteps: int, max_beta: float = 0.999) -> Array:
    """Cosine betas of Improved DDPM equation 17; float64 (T,)."""
    u = np.arange(num_train_timesteps + 1, dtype=np.float64) / num_train_timesteps
    alpha_bar = np.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    betas: Array = np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], max_beta)
    return betas


SCHEDULES: dict[str, Callable[[int], Array]] = {"linear": linear_betas, "cosine": cosine_betas}


@dataclass(frozen=True, eq=False)
class Schedule:
    """Betas of the training chain and what follows from them, all float64 of shape (T,).

    betas must be finite and in (0, 1]; a beta of 1 (zero terminal signal) is allowed at the end only. name is
    kept for checkpoints; None for betas of one's own.
    """

    betas: Array
    name: str | None = None

    def __post_init__(self) -> None:
        betas = np.array(self.betas, dtype=np.float64)
        if betas.ndim != 1 or len(betas) == 0:
            raise ValueError(f"betas must be a non-empty vector, got shape {betas.shape}")
        if not (np.isfinite(betas).all() and (betas > 0).all() and (betas <= 1).all() and (betas[:-1] < 1).all()):
            raise ValueError("betas must be finite and in (0, 1), the last may be 1")
        betas.flags.writeable = False
        object.__setattr__(self, "betas", betas)

    @classmethod
    def named(cls, name: str, num_train_timesteps: int = 1000) -> Schedule:
        """The schedule SCHEDULES[name] of length T. ValueError lists the names."""
        if not isinstance(name, str) or name not in SCHEDULES:
            raise ValueError(f"schedule must be one of {sorted(SCHEDULES)}, got {name!r}")
        T = num_train_timesteps
        if isinstance(T, bool) or not isinstance(T, int) or not 1 <= T <= MOST_TIMESTEPS:
            raise ValueError(f"num_train_timesteps must be an integer in [1, {MOST_TIMESTEPS}], got {T!r}")
        return cls(SCHEDULES[name](T), name)

    @property
    def num_train_timesteps(self) -> int:
        return len(self.betas)

    @cached_property
    def alphas_cumprod(self) -> Array:
        values = np.cumprod(1 - self.betas, dtype=np.float64)
        values.flags.writeable = False
        return values

    def abar(self, t: npt.ArrayLike) -> Array:
        """alphas_cumprod at times t in [0, T - 1]; fractional times interpolate the log-SNR linearly, in float64."""
        t = np.asarray(t, dtype=np.float64)
        floor = np.floor(t).astype(np.int64)
        low = self.alphas_cumprod[floor]
        high = self.alphas_cumprod[np.minimum(floor + 1, self.num_train_timesteps - 1)]
        fraction = t - floor
        with np.errstate(divide="ignore", invalid="ignore"):
            log_snr = (1 - fraction) * np.log(low / (1 - low)) + fraction * np.log(high / (1 - high))
        return np.where(fraction == 0, low, 1 / (1 + np.exp(-log_snr)))

    def alpha_sigma(self, t: npt.ArrayLike) -> tuple[Array, Array]:
        """alpha = sqrt(abar) and sigma = sqrt(1 - abar) at times t in [0, T - 1], fractional ones included."""
        abar = self.abar(t)
        return np.sqrt(abar), np.sqrt(1 - abar)


def _fractional(count: int, start: int, size: int) -> list[float]:
    """count integers from start to start + size - 1, the stride accumulated in float64 and rounded half to even."""
    stride = (size - 1) / (count - 1) if count > 1 else 1.0
    position, chosen = 0.0, []
    for _ in range(count):
        chosen.append(float(start + round(position)))
        position += stride
    return chosen


def _sections(counts: Sequence[int], T: int) -> list[float]:
    """Improved DDPM's sections: T split evenly, each part visited counts[i] times at a fractional stride."""
    if len(counts) > T:
        raise ValueError(f"steps: {len(counts)} sections do not fit into {T} timesteps; the most is {T}")
    size, extra = divmod(T, len(counts))
    start, chosen = 0, []
    for i, count in enumerate(counts):
        length = size + (i < extra)
        if not 1 <= count <= length:
            nearest = min(max(count, 1), length)
            raise ValueError(
                f"steps: section {i + 1} of {len(counts)} has {length} timesteps, got {count}; the nearest is {nearest}"
            )
        chosen += _fractional(count, start, length)
        start += length
    return chosen[::-1]


def _ddim(count: int, T: int) -> list[float]:
    """DDIM's integer stride from t = 0: exactly count timesteps, or a ValueError with the nearest counts."""
    strides = {-(-T // stride): stride for stride in range(max(T - 1, 1), 0, -1)}
    if count not in strides:
        nearest = sorted(sorted(strides, key=lambda other: abs(other - count))[:2])
        names = " and ".join(f"'ddim{n}'" for n in nearest)
        raise ValueError(f"steps='ddim{count}': no integer stride visits {count} of {T} timesteps; nearest: {names}")
    return [float(t) for t in range(0, T, strides[count])][::-1]


def _leading(count: int, T: int, offset: int = 0) -> list[float]:
    if (count - 1) * (T // count) + offset > T - 1:
        most = T - 1 - (count - 1) * (T // count)
        raise ValueError(f"steps='leading:{count}+{offset}' begins beyond t = {T - 1}; the largest offset is {most}")
    return [float(i * (T // count) + offset) for i in range(count)][::-1]


def _linspace(count: int, T: int) -> list[float]:
    return np.linspace(0, T - 1, count).round()[::-1].tolist() if count > 1 else [float(T - 1)]


def _trailing(count: int, T: int) -> list[float]:
    return (np.arange(T, 0, -T / count)[:count].round() - 1).tolist()


_NAMED_SPACINGS: dict[str, Callable[[int, int], list[float]]] = {
    "leading": _leading,
    "linspace": _linspace,
    "trailing": _trailing,
}
_FORMS = (
    "an int, 'ddimN', 'N', '10,15,20', 'leading:N', 'leading:N+K', 'linspace:N', 'trailing:N' or descending timesteps"
)


def _count(count: int, T: int, given: object) -> int:
    if not 1 <= count <= T:
        raise ValueError(f"steps must be in [1, {T}], got {given!r}; the nearest is {min(max(count, 1), T)}")
    return count


def _explicit(values: Sequence[float], T: int) -> list[float]:
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"steps must be {_FORMS}, got {values!r}") from None
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"steps as timesteps must be a non-empty vector, got shape {array.shape}")
    if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= T - 1):
        raise ValueError(f"steps as timesteps must be in [0, {T - 1}], got {array.min()} to {array.max()}")
    if (np.diff(array) >= 0).any():
        raise ValueError("steps as timesteps must be strictly descending: sampling goes from noise (T - 1) to 0")
    return array.tolist()


def timesteps(steps: Steps, num_train_timesteps: int) -> Array:
    """The times a solver visits: float64 (rows,), strictly descending, in [0, T - 1].

    steps is an int N or "N" (fractional stride from T - 1 to 0; 1 is T - 1), "ddimN" (integer stride from 0),
    "10,15,20" (sections, least noise first), "leading:N", "linspace:N", "trailing:N" (diffusers' spacings;
    "leading:N+1" where steps_offset is 1), or the times themselves.

    Raises ValueError naming the nearest that can be met, TypeError for anything else. Source: the respacing of Improved
    DDPM section 4.
    """
    T = num_train_timesteps
    if isinstance(steps, bool):
        raise TypeError(f"steps must be {_FORMS}, got {steps!r}")
    if isinstance(steps, int | np.integer):
        count = _count(int(steps), T, steps)
        return np.array([T - 1.0] if count == 1 else _fractional(count, 0, T)[::-1])
    if not isinstance(steps, str):
        if isinstance(steps, float):
            raise ValueError(f"steps must be a whole number, got {steps}; the nearest is {_nearest_count(steps, T)}")
        return np.array(_explicit(steps, T))
    if re.fullmatch(r"-?\d{1,9}", steps):
        return timesteps(int(steps), T)
    if match := re.fullmatch(r"ddim(-?\d{1,9})", steps):
        return np.array(_ddim(_count(int(match[1]), T, steps), T))
    if match := re.fullmatch(r"leading:(\d{1,9})\+(\d{1,9})", steps):
        return np.array(_leading(_count(int(match[1]), T, steps), T, int(match[2])))
    if match := re.fullmatch(r"(leading|linspace|trailing):(-?\d{1,9})", steps):
        return np.array(_NAMED_SPACINGS[match[1]](_count(int(match[2]), T, steps), T))
    if re.fullmatch(r"-?\d{1,9}(,-?\d{1,9})+", steps):
        return np.array(_sections([int(part) for part in steps.split(",")], T))
    raise ValueError(f"steps must be {_FORMS}, got {steps!r}")


def _nearest_count(steps: float, T: int) -> Any:
    return min(max(round(steps), 1), T) if math.isfinite(steps) else f"1 or {T}"
