"""Seeds: which 64 bits each image draws its noise from.

One integer stands for a batch through a 64-bit mix, so that runs with seeds 0 and 1 share no image; a sequence is used
as it is, so that any image can be drawn again alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["SEED_LIMIT", "Seed", "image_seeds", "resolve_seeds"]

Seed = int | Sequence[int] | torch.Tensor | npt.NDArray[np.integer] | None

SEED_LIMIT = 2**63  # seeds are non-negative int64


def _mix(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014): a bijection of 64 bits."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _check(seed: object, what: str = "seed") -> int:
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer):
        raise TypeError(f"{what} must be an integer, got {type(seed).__name__}")
    if not 0 <= seed < SEED_LIMIT:
        raise ValueError(f"{what} must be in [0, 2**63), got {seed}")
    return int(seed)


def image_seeds(seed: int, n: int, *, start: int = 0) -> list[int]:
    """The n image seeds, each in [0, 2**63), that an int seed in [0, 2**63) stands for, counted from start.

    A longer list begins with the shorter one: image_seeds(s, 8)[:3] == image_seeds(s, 3). Raises TypeError, ValueError.
    """
    return seed_array(seed, n, start=start).tolist()


def seed_array(seed: int, n: int, *, start: int = 0) -> npt.NDArray[np.int64]:
    """image_seeds as an int64 vector."""
    if isinstance(n, bool) or not isinstance(n, int | np.integer):
        raise TypeError(f"n must be an integer, got {type(n).__name__}")
    if n < 0:
        raise ValueError(f"n must be at least 0, got {n}")
    with np.errstate(over="ignore"):
        # the stream of one run: a mixed origin, then odd golden-ratio steps, mixed again
        origin = _mix(np.array([_check(seed)], dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15))
        counters = np.arange(start, start + n, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        return (_mix(origin + counters) >> np.uint64(1)).astype(np.int64)


def resolve_seeds(seed: Seed, n: int) -> torch.Tensor:
    """The seeds of n images as int64 (n,) on the CPU; None draws a run seed from torch's default generator.

    Raises TypeError for anything but integers, ValueError for a wrong length or range.
    """
    if seed is None:
        seed = int(torch.randint(0, SEED_LIMIT - 1, (), device="cpu"))
    if isinstance(seed, int | np.integer):
        return torch.from_numpy(seed_array(int(_check(seed)), n))
    values = _integers(seed)
    if len(values) != n:
        raise ValueError(f"seed must be one integer or one an image: expected {n}, got {len(values)}")
    return torch.tensor(
        [_check(value, f"seed[{i}]") for i, value in enumerate(values)], dtype=torch.int64, device="cpu"
    )


def _integers(seed: object) -> list[object]:
    if isinstance(seed, torch.Tensor | np.ndarray):
        if seed.ndim != 1:
            raise ValueError(f"seed must be an integer or a vector, got shape {tuple(seed.shape)}")
        return seed.tolist()
    if isinstance(seed, Sequence) and not isinstance(seed, str | bytes):
        return list(seed)
    raise TypeError(f"seed must be an integer, a sequence of integers or None, got {type(seed).__name__}")
