"""Recipes: JSON files that say all that `fastdiff train` does."""

from __future__ import annotations

import dataclasses
import json
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from fastdiff.placement import resolve_dtype
from fastdiff.training.config import TrainConfig

__all__ = ["Recipe", "read_recipe"]

KINDS = ("diffusion", "classifier")
KEYS = ("name", "data", "network", "dtype", "storage_dtype", "training")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a recipe says

    sections: of a checkpoint's config.json: "network", "diffusion" or "classifier", "dtype", "name".
    data: a name, or the path of an .npz.
    storage_dtype: of the weights in the finished checkpoint; None is float32.
    """

    sections: dict[str, Any]
    data: str
    config: TrainConfig
    storage_dtype: torch.dtype | None


def read_recipe(path: str | PathLike[str], iterations: int | None = None) -> Recipe:
    """The recipe in a file; ValueError or TypeError names the file and what cannot be.

    iterations: in place of the recipe's. A data set's path is relative to the recipe's folder.
    """
    path = Path(path)
    try:
        recipe = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"recipe {path}: {getattr(error, 'strerror', None) or error}") from None
    keys = set(recipe) if isinstance(recipe, dict) else set()
    if not any(keys == {*KEYS, kind} for kind in KINDS):
        got = sorted(keys) if isinstance(recipe, dict) else type(recipe).__name__
        raise ValueError(
            f"recipe {path} must be an object with the keys {list(KEYS)} and {' or '.join(KINDS)}, got {got}"
        )
    data = recipe["data"]
    if not isinstance(data, str):
        raise TypeError(f"recipe {path}: data must be a string, got {data!r}")
    try:
        storage_dtype = resolve_dtype(recipe["storage_dtype"])
    except (ValueError, TypeError) as error:
        raise type(error)(f"recipe {path}: storage_{error}") from None
    return Recipe(
        sections={key: recipe[key] for key in ("name", "network", *KINDS, "dtype") if key in recipe},
        data=str(path.parent / data) if data.endswith(".npz") else data,
        config=_config(recipe["training"], iterations, path),
        storage_dtype=storage_dtype,
    )


def _config(fields: Any, iterations: int | None, path: Path) -> TrainConfig:
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    given = dict(fields) if isinstance(fields, dict) else {"training": fields}
    if iterations is not None:
        given["iterations"] = iterations
    if (unknown := sorted(given.keys() - known)) or "iterations" not in given:
        raise ValueError(
            f"recipe {path}: training must have iterations and may have {sorted(known)}, got unknown {unknown}"
        )
    try:
        return TrainConfig(**given)
    except (ValueError, TypeError) as error:
        raise type(error)(f"recipe {path}: training.{error}") from None
