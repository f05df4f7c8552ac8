"""The weights, inputs and noise with which the recorded numbers were drawn: NumPy's frozen RandomState, a seed each"""

from collections.abc import Mapping, Sequence
from math import prod

import numpy as np
import torch


def weights(shapes: Mapping[str, Sequence[int]], seed: int) -> dict[str, torch.Tensor]:
    """A float32 state dict in the order of shapes; drawn in sorted order of the keys from one RandomState(seed)

    Normals, over the root of the fan-in (numbers a row) in two dimensions and more, 0.2 times in a vector, and 1 more
    than that in a vector named weight, which is a norm's.
    """
    random, drawn = np.random.RandomState(seed), {}
    for key in sorted(shapes):
        values = random.standard_normal(tuple(shapes[key]))
        if values.ndim > 1:
            values /= prod(values.shape[1:]) ** 0.5
        else:
            values = 0.2 * values + key.endswith(".weight")
        drawn[key] = torch.from_numpy(values.astype(np.float32))
    return {key: drawn[key] for key in shapes}


def inputs(
    seed: int,
    *,
    x: Sequence[int],
    num_timesteps: int,
    num_classes: int | None = None,
    low_res: Sequence[int] | None = None,
) -> dict[str, torch.Tensor]:
    """What a network is called with, from RandomState(seed + 1), in this order

    x: of that shape, float32 normals. t: int64 (N,) in [0, num_timesteps). y: int64 (N,) in [0, num_classes), where
    there are classes. low_res: of that shape, float32 normals, where there is one.
    """
    random = np.random.RandomState(seed + 1)
    drawn = {"x": random.standard_normal(tuple(x)).astype(np.float32)}
    drawn["t"] = random.randint(0, num_timesteps, x[0])
    if num_classes is not None:
        drawn["y"] = random.randint(0, num_classes, x[0])
    if low_res is not None:
        drawn["low_res"] = random.standard_normal(tuple(low_res)).astype(np.float32)
    return {name: torch.from_numpy(values) for name, values in drawn.items()}


def noise(seed: int, rows: int, shape: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """x_T (N, C, H, W) and the noise of every row (rows, N, C, H, W), float32, from RandomState(seed) in one draw"""
    values = np.random.RandomState(seed).standard_normal((rows + 1, *shape)).astype(np.float32)
    return torch.from_numpy(values[0]), torch.from_numpy(values[1:])


def spread(size: int) -> list[int]:
    """The flat indices of the numbers that are recorded of size: 64 from the first to the last, or all there are"""
    return [round(i * (size - 1) / 63) for i in range(64)] if size > 64 else list(range(size))
