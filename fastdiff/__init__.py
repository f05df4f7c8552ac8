"""fastdiff: class-conditional diffusion models, sampled fast and checked against the papers.

>>> import fastdiff
>>> images = fastdiff.sample("digits", labels=[3, 1, 4], w=1.5, seed=0)  # (3, 1, 16, 16) in [-1, 1]

Importing it loads no CUDA context and none of the heavy modules: names are resolved on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdiff.checkpoint import CheckpointError, save
    from fastdiff.classifier import Classifier
    from fastdiff.diffusion_model import DiffusionModel
    from fastdiff.images import to_uint8
    from fastdiff.loading import load, load_classifier
    from fastdiff.noise import image_seeds
    from fastdiff.placement import OutOfMemoryError
    from fastdiff.sampler import Cancelled, Sampler, sample
    from fastdiff.schedule import Schedule
    from fastdiff.solvers import SOLVERS, StepTable

__version__ = "0.1.0"

__all__ = [
    "SOLVERS",
    "Cancelled",
    "CheckpointError",
    "Classifier",
    "DiffusionModel",
    "OutOfMemoryError",
    "Sampler",
    "Schedule",
    "StepTable",
    "image_seeds",
    "load",
    "load_classifier",
    "sample",
    "save",
    "to_uint8",
]

_HOMES = {
    "SOLVERS": "solvers",
    "Cancelled": "sampler",
    "CheckpointError": "checkpoint",
    "Classifier": "classifier",
    "DiffusionModel": "diffusion_model",
    "OutOfMemoryError": "placement",
    "Sampler": "sampler",
    "Schedule": "schedule",
    "StepTable": "solvers",
    "image_seeds": "noise",
    "load": "loading",
    "load_classifier": "loading",
    "sample": "sampler",
    "save": "checkpoint",
    "to_uint8": "images",
}
# What diffusers looks for here, and only where it asks: a pipeline that was saved with a scheduler of ours inside names
# this package, and SchedulerMixin must be found beside its class
_FOR_DIFFUSERS = dict.fromkeys(
    ("FusedDDIMScheduler", "FusedDDPMScheduler", "SchedulerMixin"), "integrations.diffusers.schedulers"
)


def __getattr__(name: str) -> Any:
    homes = _HOMES | _FOR_DIFFUSERS
    if name not in homes:
        raise AttributeError(f"module 'fastdiff' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"fastdiff.{homes[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
