"""What a call of the sampler asks for: its table, its classifier, its images in batches, the caller's own tensors"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any, NamedTuple

import numpy as np
import torch

from fastdiff.classifier import Classifier
from fastdiff.diffusion_model import DiffusionModel
from fastdiff.guidance import GuidancePlan, Labels, Weight, plan_guidance, resolve_labels, resolve_w
from fastdiff.noise import Seed, resolve_seeds
from fastdiff.schedule import Steps
from fastdiff.solvers import SOLVERS, Solver, StepTable
from fastdiff.step import Randomness

__all__ = ["Batch", "Noise", "Request", "build_table", "check_extra", "resolve_classifier", "resolve_request"]

Noise = torch.Tensor | Callable[[int], torch.Tensor] | None
# what a network is called with beside extra
RESERVED = ("x", "t", "y", "mod")


class Batch(NamedTuple):
    """Images of a call: which of its own, their layout, and what is the caller's"""

    part: slice
    plan: GuidancePlan
    randomness: Randomness
    extra: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Request:
    """Everything that a call asks for, once it is sure to be right

    shape: (N, C, H, W). size: images of a full batch.
    """

    shape: tuple[int, ...]
    size: int
    batches: list[Batch]
    has_noise: bool
    wants_x0: bool

    def trial(self, size: int) -> Batch:
        """A batch of so many images, as large in memory as any of the call's could be

        Any images that have a null row, or a classifier's gradient, may meet in a batch.
        """
        order = torch.arange(size, device="cpu")
        plans = [batch.plan for batch in self.batches]
        labelled = any(plan.y is not None for plan in plans)
        classified = any(plan.classifier_scale is not None for plan in plans)
        plan = GuidancePlan(
            order,
            torch.zeros_like(order) if labelled else None,
            (order < sum(plan.M for plan in plans)).double(),
            torch.zeros_like(order) if classified else None,
            torch.ones_like(order).double() if classified else None,
        )
        extra = {name: values[:size] for name, values in self.batches[0].extra.items()}
        return Batch(slice(0, size), plan, Randomness(torch.zeros_like(order), None, None), extra)


def resolve_request(
    model: DiffusionModel,
    classifier: Classifier | None,
    rows: int,
    batch_size: int | None,
    *,
    labels: Labels,
    w: Weight,
    num_images: int | None,
    seed: Seed,
    x_T: torch.Tensor | None,
    noise: Noise,
    classifier_scale: Weight,
    extra: Mapping[str, torch.Tensor] | None,
    callback: object,
) -> Request:
    """The arguments of a call, checked, and cut into batches. Raises ValueError or TypeError naming the argument."""
    num_classes = model.num_classes
    if num_classes is None and labels is not None and classifier is not None:
        num_classes = classifier.num_classes
    y = resolve_labels(labels, num_classes, model.null_label)
    weights = resolve_w(w)
    scale = resolve_w(classifier_scale, "classifier_scale")
    if classifier is None and (scale.ndim or scale != 1):
        raise ValueError(f"classifier_scale needs a classifier, got {classifier_scale!r} and classifier=None")
    extra = check_extra(model, extra)
    n = count_images(
        num_images,
        seed,
        x_T,
        {"labels": y, "w": weights, "classifier_scale": scale} | {f"extra[{k!r}]": v for k, v in extra.items()},
    )
    seeds = resolve_seeds(seed, n)
    shape = (n, *model.image_shape)
    if x_T is not None:
        check_images("x_T", x_T, shape)
    if isinstance(noise, torch.Tensor):
        check_images("noise", noise, (rows, *shape))
    elif noise is not None and not callable(noise):
        raise TypeError(f"noise must be a tensor, a function of the row or None, got {type(noise).__name__}")
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be a function or None, got {type(callback).__name__}")
    size = min(batch_size or n, n)
    batches = []
    for start in range(0, n, size or 1):
        part = slice(start, min(start + size, n))
        plan = plan_guidance(
            y if y is None or y.ndim == 0 else y[part],
            weights if weights.ndim == 0 else weights[part],
            part.stop - part.start,
            num_classes=model.num_classes,
            null_label=model.null_label,
            has_null_model=model.null_model is not None,
            all_channels=model.guided_channels is None,
            classifier_scale=None if classifier is None else scale if scale.ndim == 0 else scale[part],
        )
        randomness = Randomness(
            seeds=seeds[part],
            x_T=None if x_T is None else x_T[part],
            noise=None if noise is None else functools.partial(noise_row, noise, shape, part),
        )
        batches.append(Batch(part, plan, randomness, {name: values[part] for name, values in extra.items()}))
    return Request(shape, size, batches, noise is not None, callback is not None)


def check_extra(model: DiffusionModel, extra: Mapping[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
    """extra, checked against what the model's networks say in `extra_shapes`, where they do; not against N"""
    if not isinstance(extra, Mapping | None):
        raise TypeError(f"extra must be a mapping of names to tensors or None, got {type(extra).__name__}")
    extra = dict(extra or {})
    for name, values in extra.items():
        if not isinstance(name, str) or not isinstance(values, torch.Tensor):
            raise TypeError(f"extra must hold tensors by name, got {name!r}: {type(values).__name__}")
        if name in RESERVED:
            raise ValueError(f"extra must not hold {name!r}, which is an argument of every network")
        if values.ndim == 0:
            raise ValueError(f"extra[{name!r}] must have shape (N, ...), one row an image, got a single number")
    for network in (model.network, *([] if model.null_model is None else [model.null_model.network])):
        shapes: Mapping[str, tuple[int, ...]] | None = getattr(network, "extra_shapes", None)
        if shapes is None:
            continue
        told = ", ".join(f"{name} {('N', *shape)}".replace("'", "") for name, shape in shapes.items()) or "nothing"
        if extra.keys() != shapes.keys():
            raise ValueError(f"extra must have {told}, as the network takes, got {sorted(extra) or 'nothing'}")
        for name, shape in shapes.items():
            if tuple(extra[name].shape[1:]) != tuple(shape):
                raise ValueError(f"extra must have {told}, got {name} of shape {tuple(extra[name].shape)}")
    return extra


def resolve_classifier(classifier: Any, model: DiffusionModel, dtype: torch.dtype | None) -> Classifier | None:
    """The classifier meant, which fits the model. dtype: of one that is loaded by name or folder."""
    if classifier is None:
        return None
    if isinstance(classifier, str | PathLike):
        from fastdiff.loading import load_classifier

        # the caller may be in inference mode, whose tensors take no part in a gradient
        with torch.inference_mode(False):
            classifier = load_classifier(classifier, dtype=dtype)
    if not isinstance(classifier, Classifier):
        raise TypeError(f"classifier must be a Classifier, a name, a folder or None, got {type(classifier).__name__}")
    if any(tensor.is_inference() for tensor in classifier.parameters()):
        raise ValueError(
            "classifier must have weights that gradients go through, got some made under torch.inference_mode(); "
            "make or load it outside"
        )
    if classifier.image_shape != model.image_shape:
        raise ValueError(
            f"classifier must have image_shape={model.image_shape} as the model, got {classifier.image_shape}"
        )
    if not np.array_equal(classifier.schedule.alphas_cumprod, model.schedule.alphas_cumprod):
        raise ValueError("classifier must have the model's schedule: the same alphas_cumprod")
    if model.num_classes is not None and classifier.num_classes != model.num_classes:
        raise ValueError(
            f"classifier must have num_classes={model.num_classes} as the model, got {classifier.num_classes}"
        )
    return classifier


def build_table(
    model: DiffusionModel, solver: str | Solver | None, steps: Steps, eta: float | None, clip_x0: bool | None
) -> StepTable:
    """The table of a call; solver None is the model's own, which says what an int `steps` stands for, too"""
    if solver is None:
        solver, steps = _own_solver(model, steps)
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


def _own_solver(model: DiffusionModel, steps: Steps) -> tuple[str | Solver, Steps]:
    recorded = dict(model.solver or {"name": "ddim"})
    name, spacing = recorded.pop("name"), recorded.pop("spacing", None)
    if name not in SOLVERS:
        raise ValueError(f"model.solver's name must be one of {sorted(SOLVERS)}, got {name!r}")
    known = inspect.signature(SOLVERS[name]).parameters
    if unknown := sorted(recorded.keys() - {key for key, p in known.items() if p.kind is p.KEYWORD_ONLY}):
        raise ValueError(f"model.solver has options {unknown}, which {name!r} does not take; give a solver")
    if spacing is not None and isinstance(steps, int | np.integer) and not isinstance(steps, bool):
        steps = spacing.replace("N", str(steps))
    return functools.partial(SOLVERS[name], **recorded) if recorded else name, steps


def count_images(
    num_images: int | None, seed: Seed, x_T: torch.Tensor | None, others: Mapping[str, torch.Tensor | None]
) -> int:
    """N, from whatever says it; all that say it must agree; 1 if none does. others: 0-d or (N, ...)."""
    said: dict[str, int] = {}
    if num_images is not None:
        if isinstance(num_images, bool) or not isinstance(num_images, int | np.integer):
            raise TypeError(f"num_images must be an integer, got {num_images!r}")
        if num_images < 0:
            raise ValueError(f"num_images must be at least 0, got {num_images}")
        said["num_images"] = int(num_images)
    said |= {name: len(values) for name, values in others.items() if values is not None and values.ndim}
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
