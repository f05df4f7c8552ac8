"""The native checkpoint: a folder with config.json and model-<12 hex of its sha256>.safetensors.

config.json is {"format": 1, "network": {"type", ...}, "diffusion": {...}, "dtype", "name", "provenance",
"weights": {"file", "sha256", "bytes"}}. It names its weights and is replaced last; old weights are removed only after
that: a kill at any moment leaves one whole checkpoint, the new one or the one before.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from fastdiff.atomic import locked, made, replace, sweep
from fastdiff.diffusion_model import DiffusionModel
from fastdiff.placement import DTYPES, resolve_device
from fastdiff.schedule import SCHEDULES, Schedule

__all__ = ["BUNDLED", "CheckpointError", "atomic_write", "fresh", "info", "kind_of", "load", "save"]

BUNDLED = {"digits": Path(__file__).parent / "assets" / "digits"}

_FORMAT = 1
_CONFIG = "config.json"
_CONFIG_BYTES = 2**20
_WEIGHTS = re.compile(r"model-[0-9a-f]{12}\.safetensors")
_FILE_AND_SHA256 = re.compile(r"model-([0-9a-f]{12})\.safetensors \1[0-9a-f]{52}")
_MAX_TIMESTEPS = 2**20
_MODEL_KEYS = ("network", "diffusion", "dtype", "name")
_DIFFUSION_KEYS = ("schedule", "prediction", "variance", "num_classes", "null_label", "image_shape", "clip_x0")

Tensors = dict[str, torch.Tensor]


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written; the sentence begins with its path."""


def load(
    src: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    allow_nonfinite: bool = False,
) -> DiffusionModel:
    """The model of a checkpoint, checked in full: config, sha256, every key and shape, finite weights.

    src: a bundled name ("digits"; write "./digits" or a Path for a folder of that name) or a folder.
    device: where the parameters go; None is the CPU.
    dtype: what they become, and the recorded compute dtype of the model returned; None is the dtype that the checkpoint
        records, or that of its stored weights where it records none.
    The network is in eval mode and channels_last. torch's random generators are left as they were.

    Raises CheckpointError naming the path; ValueError or TypeError for device and dtype.
    """
    folder = _folder(src)
    target = torch.device("cpu") if device is None else resolve_device(device)
    if dtype is not None:
        _check_dtype("dtype", dtype)
    recipe, tensors = _read(folder)
    dtype = dtype or recipe.model_options["dtype"]
    with _blaming(folder / recipe.file):
        network = _empty_network(recipe, tensors)
        tensors = {name: tensor.to(dtype or tensor.dtype) for name, tensor in tensors.items()}
        bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
        if bad and not allow_nonfinite:
            raise ValueError(f"NaN or infinite weights in {_some(bad)}; allow_nonfinite=True loads them all the same")
        network.load_state_dict(tensors, assign=True)
    # PyTorch's stubs forget memory_format
    network.eval().to(device=target, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return DiffusionModel(network, **{**recipe.model_options, "dtype": dtype})


def save(
    model: DiffusionModel,
    folder: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    storage_dtype: torch.dtype | None = None,
) -> Path:
    """Writes a checkpoint that load() accepts, atomically, and returns its folder, which is made if need be.

    overwrite: replace the checkpoint that is there; other files of the folder are left alone either way.
    storage_dtype: float dtype of the stored weights (float16 halves the file); None stores them as they are.

    Raises TypeError for a network of another kind, ValueError for a null_model and for a storage_dtype that cannot hold
    the weights, and CheckpointError naming the path for all else; then the checkpoint before is untouched and nothing
    else is left.
    """
    if not isinstance(folder, str | os.PathLike):
        raise TypeError(f"folder must be a path, got {folder!r}")
    if not os.fspath(folder):
        raise ValueError("folder must name a folder, got ''; '.' is this one")
    folder = Path(folder)
    kind = kind_of(model)
    if model.null_model is not None:
        raise ValueError("model must have null_model=None, a checkpoint holds one network; save the two apart")
    tensors = _stored(model.network.state_dict(), storage_dtype)  # type: ignore[attr-defined]
    with _blaming(folder):
        weights = safetensors.torch.save(tensors)
        config = _config(model, kind, weights)
        recipe = _parse(config)
        _empty_network(recipe, tensors)
        with made(folder), locked(folder):
            if os.path.lexists(folder / _CONFIG) and not overwrite:
                raise ValueError("a checkpoint is there already; overwrite=True replaces it")
            _commit(folder, recipe.file, weights, config)
    return folder


def kind_of(model: DiffusionModel) -> str:
    """The network's type in config.json. TypeError for one that cannot be saved."""
    if not isinstance(model, DiffusionModel):
        raise TypeError(f"model must be a DiffusionModel, got {type(model).__name__}")
    for kind, (_, network) in _networks().items():
        if type(model.network) is network:
            return kind
    raise TypeError(
        f"model.network must be one of {[network.__name__ for _, network in _networks().values()]} to be saved, "
        f"got {type(model.network).__name__}; unwrap it, or keep its weights yourself"
    )


def fresh(sections: Mapping[str, Any], *, seed: int = 0, device: torch.device | str | None = None) -> DiffusionModel:
    """An untrained model with the sections "network", "diffusion", "dtype" and "name" of a config.json.

    seed: fixes the initial weights, float32, drawn on the CPU whatever the device.
    device: None is the CPU. torch's random generators are left as they were.
    Raises ValueError or TypeError naming what is wrong, as strict as load.
    """
    target = torch.device("cpu") if device is None else resolve_device(device)
    kind, network, options = _parse_model(sections)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        return DiffusionModel(_networks()[kind][1](network).to(target), **options)


def info(src: str | os.PathLike[str]) -> dict[str, Any]:
    """Facts of a checkpoint, its hash verified and no network built: path, parameters, bytes, sha256, storage, config.

    storage lists the dtypes of the stored tensors; config is config.json. Raises CheckpointError like load.
    """
    folder = _folder(src)
    recipe, tensors = _read(folder)
    return {
        "path": str(folder),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "bytes": recipe.bytes,
        "sha256": recipe.sha256,
        "storage": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}),
        "config": recipe.config,
    }


def atomic_write(path: str | os.PathLike[str], data: bytes) -> None:
    """Replaces path by data, durably: a kill at any moment leaves the old bytes or the new ones.

    The folder must exist. Raises CheckpointError naming the path; then the old file is untouched, no temporary is left.
    """
    path = Path(path)
    with _blaming(path), locked(path.parent):
        replace(path, data)
        sweep(path.parent, lambda name: name == path.name)


@dataclass(frozen=True)
class _Recipe:
    """config.json, understood."""

    config: dict[str, Any]
    network: Any
    kind: str
    model_options: dict[str, Any]
    file: str
    sha256: str
    bytes: int


def _networks() -> dict[str, tuple[type[Any], type[torch.nn.Module]]]:
    from fastdiff.model import UNet, UNetConfig

    return {"unet": (UNetConfig, UNet)}


def _folder(src: str | os.PathLike[str]) -> Path:
    if src == "":
        raise ValueError(f"src must be a bundled name {sorted(BUNDLED)} or a folder, got ''; '.' is this one")
    if not isinstance(src, str | os.PathLike):
        raise TypeError(f"src must be a bundled name {sorted(BUNDLED)} or a folder, got {src!r}")
    folder = BUNDLED[src] if isinstance(src, str) and src in BUNDLED else Path(src)
    with _blaming(folder):
        if folder.is_dir():
            if not os.path.lexists(folder / _CONFIG):
                raise ValueError(f"no checkpoint here: the folder has no {_CONFIG}")
        elif os.path.lexists(folder):
            raise ValueError("a checkpoint is a folder, this is a file")
        else:
            raise ValueError(f"no such folder; bundled models are {sorted(BUNDLED)}")
    return folder


def _read(folder: Path) -> tuple[_Recipe, Tensors]:
    attempts = 20
    while True:
        with _blaming(folder / _CONFIG):
            recipe = _parse(_regular_file(folder / _CONFIG, _CONFIG_BYTES))
        with _blaming(folder / recipe.file):
            try:
                data = _regular_file(folder / recipe.file, recipe.bytes)
            except FileNotFoundError:
                # Someone who saves meanwhile removes these weights, but only after replacing the config
                attempts -= 1
                if attempts:
                    continue
                raise
            return recipe, _tensors(data, recipe)


def _regular_file(path: Path, most: int) -> bytes:
    status = os.lstat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("must be a regular file, not a link, folder or device")
    if status.st_size > most:
        raise ValueError(f"has {status.st_size} bytes, at most {most} were expected")
    return path.read_bytes()


def _tensors(data: bytes, recipe: _Recipe) -> Tensors:
    if len(data) != recipe.bytes:
        raise ValueError(f"has {len(data)} bytes, {recipe.bytes} were expected: cut short, or of another checkpoint")
    if (digest := hashlib.sha256(data).hexdigest()) != recipe.sha256:
        raise ValueError(f"is damaged: its sha256 is {digest}, {_CONFIG} says {recipe.sha256}")
    try:
        return safetensors.torch.load(data)
    # The library raises its own error, and KeyError, AssertionError and others where the header lies
    except Exception as error:
        raise ValueError(f"is not a valid safetensors file: {error}") from error


def _parse(text: bytes) -> _Recipe:
    """The recipe in config.json; ValueError or TypeError for whatever is not exactly as save() writes it."""
    if len(text) > _CONFIG_BYTES:
        raise ValueError(f"the config has {len(text)} bytes, at most {_CONFIG_BYTES} are allowed; shorten provenance")
    config = json.loads(text.decode(), object_pairs_hook=_unique, parse_float=_finite, parse_constant=_finite)
    if not isinstance(config, dict) or type(version := config.get("format")) is not int:
        raise ValueError("is not the config of a fastdiff checkpoint: it has no format number")
    if version != _FORMAT:
        raise ValueError(f"format must be {_FORMAT}, got {version}; a newer fastdiff may read it")
    _check_keys("config", config, ("format", *_MODEL_KEYS, "provenance", "weights"))
    weights = config["weights"]
    _check_keys("weights", weights, ("file", "sha256", "bytes"))
    _check_type("provenance", config["provenance"], dict)
    _check_type("weights.bytes", weights["bytes"], int)
    if not _FILE_AND_SHA256.fullmatch(f"{weights['file']} {weights['sha256']}"):
        raise ValueError(
            "weights.file must be model-<first 12 hex digits of weights.sha256>.safetensors, "
            f"got {weights['file']!r} and {weights['sha256']!r}"
        )
    kind, network, options = _parse_model({key: config[key] for key in _MODEL_KEYS})
    options["provenance"] = config["provenance"]
    return _Recipe(config, network, kind, options, weights["file"], weights["sha256"], weights["bytes"])


def _parse_model(sections: Mapping[str, Any]) -> tuple[str, Any, dict[str, Any]]:
    """(kind, network config, DiffusionModel's other arguments) of the sections that describe a model."""
    _check_keys("model", sections, _MODEL_KEYS)
    diffusion = sections["diffusion"]
    _check_keys("diffusion", diffusion, _DIFFUSION_KEYS)
    _check_type("name", sections["name"], str | None)
    _check_type("network", sections["network"], dict)
    _check_type("clip_x0", diffusion["clip_x0"], bool)
    dtype = sections["dtype"]
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {list(DTYPES)} or null, got {dtype!r}")
    fields = dict(sections["network"])
    kind = fields.pop("type", None)
    if not isinstance(kind, str) or kind not in _networks():
        raise ValueError(f"network.type must be one of {sorted(_networks())}, got {kind!r}")
    network = _networks()[kind][0].from_dict(fields)
    options = {
        **diffusion,
        "schedule": _schedule(diffusion["schedule"]),
        "dtype": None if dtype is None else DTYPES[dtype],
        "name": sections["name"],
    }
    _check_fit(DiffusionModel(lambda x, t, y: x, **options), network)
    return kind, network, options


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(keys := dict(pairs)) != len(pairs):
        raise ValueError(f"a key occurs twice among {_some(key for key, _ in pairs)}")
    return keys


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is not a finite number")
    return number


def _check_keys(where: str, value: object, expected: tuple[str, ...]) -> None:
    if not isinstance(value, dict):
        raise TypeError(f"{where} must be an object with keys {list(expected)}, got {type(value).__name__}")
    if value.keys() != set(expected):
        unknown, missing = _some(value.keys() - set(expected)), _some(set(expected) - value.keys())
        raise ValueError(f"{where} must have keys {list(expected)}, got unknown [{unknown}] and lacks [{missing}]")


def _check_type(key: str, value: object, expected: Any) -> None:
    if not isinstance(value, expected):
        raise TypeError(f"{key} must be {getattr(expected, '__name__', expected)}, got {value!r}")


def _schedule(fields: Any) -> Schedule:
    if isinstance(fields, dict) and fields.keys() == {"betas"} and isinstance(fields["betas"], list):
        if wrong := [beta for beta in fields["betas"] if isinstance(beta, bool) or not isinstance(beta, int | float)]:
            raise TypeError(f"schedule.betas must be numbers, got {wrong[0]!r}")
        return Schedule(np.array(fields["betas"], dtype=np.float64))
    _check_keys("schedule", fields, ("name", "num_train_timesteps"))
    T = fields["num_train_timesteps"]
    if isinstance(T, int) and T > _MAX_TIMESTEPS:
        raise ValueError(f"schedule.num_train_timesteps must be at most {_MAX_TIMESTEPS}, got {T}")
    return Schedule.named(fields["name"], T)


def _check_fit(model: DiffusionModel, network: Any) -> None:
    """Refuses a label without a row in the embedding, or other channels: they would fail only while sampling."""
    C = model.image_shape[0]
    if (network.in_channels, network.out_channels) != (C, model.out_channels):
        raise ValueError(
            f"image_shape={model.image_shape} and variance={model.variance!r} need in_channels={C} and "
            f"out_channels={model.out_channels} of the network, got {network.in_channels} and {network.out_channels}"
        )
    labels = None if model.num_classes is None else max(model.num_classes, (model.null_label or 0) + 1)
    if (labels is None) != (network.num_labels is None) or (labels or 0) > (network.num_labels or 0):
        raise ValueError(
            f"num_classes={model.num_classes} and null_label={model.null_label} need num_labels={labels} of the "
            f"network, got {network.num_labels}"
        )


def _empty_network(recipe: _Recipe, tensors: Tensors) -> torch.nn.Module:
    """The network without memory, once tensors are known to be its own: every key, every shape, float, and no more."""
    # A lying config must not grow the network for ever: each block has tensors of its own
    if recipe.network.num_blocks * len(recipe.network.channel_mult) > len(tensors):
        raise ValueError(f"{len(tensors)} tensors are too few for num_blocks={recipe.network.num_blocks}")
    with torch.device("meta"):
        network = _networks()[recipe.kind][1](recipe.network)
    expected = network.state_dict()
    shared = expected.keys() & tensors.keys()
    faults = {
        "missing keys": expected.keys() - tensors.keys(),
        "unknown keys": tensors.keys() - expected.keys(),
        "wrong shapes": [
            f"{key} {list(tensors[key].shape)} instead of {list(expected[key].shape)}"
            for key in shared
            if tensors[key].shape != expected[key].shape
        ],
        "wrong dtypes": [f"{key} {tensors[key].dtype}" for key in shared if tensors[key].dtype not in DTYPES.values()],
    }
    if found := [f"{fault}: {_some(keys)}" for fault, keys in faults.items() if keys]:
        raise ValueError("; ".join(found))
    return network


def _some(keys: Iterable[str], most: int = 8) -> str:
    names = sorted(map(str, keys))
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _check_dtype(argument: str, dtype: object) -> None:
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{argument} must be a torch.dtype or None, got {dtype!r}")
    if dtype not in DTYPES.values():
        raise ValueError(f"{argument} must be one of {list(DTYPES.values())} or None, got {dtype}")


@contextmanager
def _blaming(path: Path) -> Iterator[None]:
    """Whatever goes wrong inside is a CheckpointError that names the path."""
    try:
        yield
    except CheckpointError:
        raise
    except (OSError, ValueError, TypeError, RuntimeError, OverflowError, MemoryError) as error:
        raise CheckpointError(f"{path}: {error or type(error).__name__}") from error


def _stored(state: Tensors, storage_dtype: torch.dtype | None) -> Tensors:
    """Contiguous CPU tensors of storage_dtype; ValueError where a finite weight would become infinite."""
    if storage_dtype is not None:
        _check_dtype("storage_dtype", storage_dtype)
    stored = {}
    for name, tensor in state.items():
        given = tensor.detach().cpu().contiguous()
        stored[name] = given.to(storage_dtype or given.dtype)
        if (torch.isfinite(given) & ~torch.isfinite(stored[name])).any():
            raise ValueError(f"storage_dtype={storage_dtype} cannot hold {name}: it overflows; use bfloat16 or float32")
    return stored


def _config(model: DiffusionModel, kind: str, weights: bytes) -> bytes:
    schedule, digest = model.schedule, hashlib.sha256(weights).hexdigest()
    stored_schedule: dict[str, Any] = {"betas": schedule.betas.tolist()}
    if schedule.name in SCHEDULES:
        with suppress(ValueError):
            named = Schedule.named(schedule.name, schedule.num_train_timesteps)
            if (named.betas == schedule.betas).all():
                stored_schedule = {"name": schedule.name, "num_train_timesteps": schedule.num_train_timesteps}
    config = {
        "format": _FORMAT,
        "network": {"type": kind, **model.network.config.to_dict()},  # type: ignore[attr-defined]
        "diffusion": {
            "schedule": stored_schedule,
            "prediction": model.prediction,
            "variance": model.variance,
            "num_classes": model.num_classes,
            "null_label": model.null_label,
            "image_shape": list(model.image_shape),
            "clip_x0": model.clip_x0,
        },
        "dtype": None if model.dtype is None else str(model.dtype).removeprefix("torch."),
        "name": model.name,
        "provenance": model.provenance,
        "weights": {"file": f"model-{digest[:12]}.safetensors", "sha256": digest, "bytes": len(weights)},
    }
    try:
        return (json.dumps(config, indent=2, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"name and provenance must be JSON's own types: {error}") from error


def _commit(folder: Path, file: str, weights: bytes, config: bytes) -> None:
    fresh = not os.path.lexists(folder / file)
    try:
        replace(folder / file, weights)
        replace(folder / _CONFIG, config)
    except BaseException:
        with suppress(OSError):
            # An error after the config was replaced must not take away the weights that it names
            if fresh and not ((folder / _CONFIG).is_file() and (folder / _CONFIG).read_bytes() == config):
                (folder / file).unlink(missing_ok=True)
        raise
    sweep(folder, lambda name: name == _CONFIG or _WEIGHTS.fullmatch(name) is not None)
    for old in folder.iterdir():
        if _WEIGHTS.fullmatch(old.name) and old.name != file:
            with suppress(OSError):
                old.unlink()
