"""What a call of the sampler asks for: its table, its number of images, the caller's own tensors, all checked"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

import numpy as np
import torch

from fastdiff.diffusion_model import DiffusionModel
from fastdiff.noise import Seed
from fastdiff.schedule import Steps
from fastdiff.solvers import SOLVERS, Solver, StepTable

__all__ = ["build_table", "check_images", "count_images", "noise_row"]


def build_table(
    model: DiffusionModel, solver: str | Solver, steps: Steps, eta: float | None, clip_x0: bool | None
) -> StepTable:
    if isinstance(solver, str) and solver not in SOLVERS:
        raise ValueError(f"solver must be one of {sorted(SOLVERS)} or a function, got {solver!r}")
    build = SOLVERS[solver] if isinstance(solver, str) else solver
    if not callable(build):
        raise TypeError(f"solver must be a name or a function that returns a StepTable, got {type(solver).__name__}")
    takes = inspect.signature(build).parameters
    options = {
        "prediction": model.prediction,
        "clip_x0": model.clip_x0 if clip_x0 is None else clip_x0,
        "variance": model.variance,
    }
    # what a functools.partial has fixed already stays as it is
    fixed = build.keywords if isinstance(build, functools.partial) else {}
    if eta is not None:
        if "eta" not in takes or "eta" in fixed:
            why = "has none" if "eta" not in takes else "has fixed it already"
            raise ValueError(f"eta: solver {solver!r} {why}; leave it out, or use solver='ddim'")
        options["eta"] = eta
    table = build(model.schedule, steps, **{k: v for k, v in options.items() if k in takes and k not in fixed})
    if not isinstance(table, StepTable):
        raise TypeError(f"solver must return a StepTable, got {type(table).__name__}")
    if table.prediction != model.prediction:
        raise ValueError(
            f"solver must build its table for prediction={model.prediction!r}, got {table.prediction!r}; "
            "a function must take prediction as an argument and pass it on"
        )
    return table


def count_images(
    num_images: int | None, labels: torch.Tensor | None, w: torch.Tensor, seed: Seed, x_T: torch.Tensor | None
) -> int:
    """N, from whatever says it; all that say it must agree; 1 if none does."""
    said: dict[str, int] = {}
    if num_images is not None:
        if isinstance(num_images, bool) or not isinstance(num_images, int | np.integer):
            raise TypeError(f"num_images must be an integer, got {num_images!r}")
        if num_images < 0:
            raise ValueError(f"num_images must be at least 0, got {num_images}")
        said["num_images"] = int(num_images)
    if labels is not None and labels.ndim:
        said["labels"] = len(labels)
    if w.ndim:
        said["w"] = len(w)
    if seed is not None and not isinstance(seed, int | np.integer | str) and hasattr(seed, "__len__"):
        if getattr(seed, "ndim", 1) != 1:
            raise ValueError(f"seed must be an integer or a vector, got shape {tuple(seed.shape)}")  # type: ignore[union-attr]
        said["seed"] = len(seed)
    if x_T is not None:
        if not isinstance(x_T, torch.Tensor) or x_T.ndim != 4:
            raise ValueError(f"x_T must be a tensor (N, C, H, W), got {getattr(x_T, 'shape', type(x_T).__name__)}")
        said["x_T"] = len(x_T)
    if len(set(said.values())) > 1:
        raise ValueError(
            "these must agree on the number of images: " + ", ".join(f"{k} has {v}" for k, v in said.items())
        )
    return next(iter(said.values()), 1)


def check_images(argument: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{argument} must have shape {shape}, got {tuple(tensor.shape)}")
    if not tensor.is_floating_point():
        raise TypeError(f"{argument} must be floating point, got {tensor.dtype}")


def noise_row(
    noise: torch.Tensor | Callable[[int], torch.Tensor], shape: tuple[int, ...], part: slice, row: int
) -> torch.Tensor:
    """The caller's noise for one row of one batch; a function is asked for all N images and cut."""
    if isinstance(noise, torch.Tensor):
        return noise[row, part]
    values = noise(row)
    if not isinstance(values, torch.Tensor):
        raise TypeError(f"noise({row}) must return a tensor, got {type(values).__name__}")
    check_images(f"noise({row})", values, shape)
    return values[part]
