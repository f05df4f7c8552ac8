"""The native checkpoint: a folder with config.json and model-<12 hex of its sha256>.safetensors.

config.json, which manifest.py describes, names its weights and is replaced last; old weights are removed only after
that: a kill at any moment leaves one whole checkpoint, the new one or the one before.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from fastdiff.atomic import locked, made, replace, sweep
from fastdiff.classifier import Classifier
from fastdiff.diffusion_model import DiffusionModel
from fastdiff.manifest import CONFIG_BYTES, Blueprint, Manifest, listed, networks
from fastdiff.placement import DTYPES, resolve_device, runnable_dtype

__all__ = [
    "BUNDLED",
    "BUNDLED_CLASSIFIERS",
    "CheckpointError",
    "atomic_write",
    "blaming",
    "fresh",
    "info",
    "kind_of",
    "load",
    "load_classifier",
    "save",
]

_ASSETS = Path(__file__).parent / "assets"
BUNDLED = {"digits": _ASSETS / "digits"}
BUNDLED_CLASSIFIERS = {"digits": _ASSETS / "digits-classifier"}

_CONFIG = "config.json"
_WEIGHTS = re.compile(r"model-[0-9a-f]{12}\.safetensors")
# for who reads the one as the other
_MISTAKEN = {
    "diffusion": "is a diffusion model's, not a classifier's; fastdiff.load reads it",
    "classifier": "is a classifier's, not a diffusion model's; fastdiff.load_classifier reads it",
}

# of a sentence about what is wrong, in letters
_LONGEST = 2000

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
    """The model of a checkpoint of fastdiff's, checked in full; arguments and errors as for `loading.load`.

    src: a bundled name ("digits"; write "./digits" or a Path for a folder of that name) or a folder.
    """
    return _load(src, "diffusion", device, dtype, allow_nonfinite)


def load_classifier(
    src: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    allow_nonfinite: bool = False,
) -> Classifier:
    """The noisy-image classifier of a checkpoint; arguments, checks, state and errors as for load.

    src: the name of a bundled classifier ("digits") or a folder.
    """
    return _load(src, "classifier", device, dtype, allow_nonfinite)


def save(
    model: DiffusionModel | Classifier,
    folder: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    storage_dtype: torch.dtype | None = None,
) -> Path:
    """Writes a checkpoint that load() or load_classifier() accepts, atomically, and returns its folder.

    folder: made if need be.
    overwrite: replace the checkpoint that is there; other files of the folder are left alone either way.
    storage_dtype: float dtype of the stored weights (float16 halves the file); None stores them as they are.

    Raises TypeError for a network of another kind, ValueError for a null_model, a decode and a storage_dtype that
    cannot hold the weights, and CheckpointError naming the path for all else; then the checkpoint before is untouched
    and nothing else is left.
    """
    if not isinstance(folder, str | os.PathLike):
        raise TypeError(f"folder must be a path, got {folder!r}")
    if not os.fspath(folder):
        raise ValueError("folder must name a folder, got ''; '.' is this one")
    folder = Path(folder)
    kind = kind_of(model)
    if isinstance(model, DiffusionModel) and model.null_model is not None:
        raise ValueError("model must have null_model=None, a checkpoint holds one network; save the two apart")
    if isinstance(model, DiffusionModel) and model.decode is not None:
        raise ValueError("model must have decode=None, a checkpoint holds no code; set model.decode after loading")
    tensors = _stored(model.network.state_dict(), storage_dtype)  # type: ignore[attr-defined]
    with blaming(folder):
        weights = safetensors.torch.save(tensors)
        config = Manifest.written(model, kind, weights)
        manifest = Manifest.parse(config)
        _empty_network(manifest.blueprint, tensors)
        with made(folder), locked(folder):
            if os.path.lexists(folder / _CONFIG) and not overwrite:
                raise ValueError("a checkpoint is there already; overwrite=True replaces it")
            _commit(folder, manifest.file, weights, config)
    return folder


def kind_of(model: DiffusionModel | Classifier) -> str:
    """The network's type in config.json. TypeError for one that cannot be saved."""
    if not isinstance(model, DiffusionModel | Classifier):
        raise TypeError(f"model must be a DiffusionModel or a Classifier, got {type(model).__name__}")
    section = "classifier" if isinstance(model, Classifier) else "diffusion"
    known = {kind: found.network for kind, found in networks().items() if found.section == section}
    for kind, network in known.items():
        if type(model.network) is network:
            return kind
    raise TypeError(
        f"model.network must be one of {[network.__name__ for network in known.values()]} to be saved, "
        f"got {type(model.network).__name__}; unwrap it, or keep its weights yourself"
    )


def fresh(
    sections: Mapping[str, Any], *, seed: int = 0, device: torch.device | str | None = None
) -> DiffusionModel | Classifier:
    """An untrained model with the sections of a config.json that describe one.

    sections: "network", "dtype", "name", and "diffusion" or "classifier", which says what is returned.
    seed: fixes the initial weights, float32, drawn on the CPU whatever the device.
    device: None is the CPU. torch's random generators are left as they were.
    Raises ValueError or TypeError naming what is wrong, as strict as load.
    """
    target = torch.device("cpu") if device is None else resolve_device(device)
    blueprint = Blueprint.parse(sections)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        return blueprint.model(blueprint.new_network().to(target))


def info(src: str | os.PathLike[str]) -> dict[str, Any]:
    """Facts of a checkpoint, its hash verified and no network built: path, parameters, bytes, sha256, storage, config.

    src: as for load, or a classifier's folder.
    storage lists the dtypes of the stored tensors; config is config.json. Raises CheckpointError like load.
    """
    folder = _folder(src, BUNDLED)
    manifest, tensors = _read(folder)
    return {
        "path": str(folder),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "bytes": manifest.size,
        "sha256": manifest.sha256,
        "storage": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}),
        "config": manifest.config,
    }


def atomic_write(path: str | os.PathLike[str], data: bytes) -> None:
    """Replaces path by data, durably: a kill at any moment leaves the old bytes or the new ones.

    The folder must exist. Raises CheckpointError naming the path; then the old file is untouched, no temporary is left.
    """
    path = Path(path)
    with blaming(path), locked(path.parent):
        replace(path, data)
        sweep(path.parent, lambda name: name == path.name)


def _load(
    src: str | os.PathLike[str],
    section: str,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    allow_nonfinite: bool,
) -> Any:
    folder = _folder(src, BUNDLED_CLASSIFIERS if section == "classifier" else BUNDLED)
    target = torch.device("cpu") if device is None else resolve_device(device)
    if dtype is not None:
        _check_dtype("dtype", dtype)
    manifest, tensors = _read(folder, section)
    blueprint = manifest.blueprint
    recorded = dtype or blueprint.options["dtype"]
    dtype = dtype or (recorded and runnable_dtype(recorded, target))
    with blaming(folder / manifest.file):
        network = _empty_network(blueprint, tensors)
        tensors = {name: tensor.to(dtype or tensor.dtype) for name, tensor in tensors.items()}
        bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
        if bad and not allow_nonfinite:
            raise ValueError(f"NaN or infinite weights in {listed(bad)}; allow_nonfinite=True loads them all the same")
        network.load_state_dict(tensors, assign=True)
    # PyTorch's stubs forget memory_format
    network.eval().to(device=target, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return blueprint.model(network, dtype=recorded)


def _folder(src: str | os.PathLike[str], bundled: Mapping[str, Path]) -> Path:
    if src == "":
        raise ValueError(f"src must be a bundled name {sorted(bundled)} or a folder, got ''; '.' is this one")
    if not isinstance(src, str | os.PathLike):
        raise TypeError(f"src must be a bundled name {sorted(bundled)} or a folder, got {src!r}")
    folder = bundled[src] if isinstance(src, str) and src in bundled else Path(src)
    with blaming(folder):
        if folder.is_dir():
            if not os.path.lexists(folder / _CONFIG):
                raise ValueError(f"no checkpoint here: the folder has no {_CONFIG}")
        elif os.path.lexists(folder):
            raise ValueError("a checkpoint is a folder, this is a file; fastdiff convert makes one of other people's")
        else:
            raise ValueError(f"no such file or folder; bundled names are {sorted(bundled)}")
    return folder


def _read(folder: Path, section: str | None = None) -> tuple[Manifest, Tensors]:
    """section: which a caller can use, None for either"""
    attempts = 20
    while True:
        with blaming(folder / _CONFIG):
            manifest = Manifest.parse(_regular_file(folder / _CONFIG, CONFIG_BYTES))
            if section not in (None, manifest.blueprint.section):
                raise ValueError(_MISTAKEN[manifest.blueprint.section])
        with blaming(folder / manifest.file):
            try:
                data = _regular_file(folder / manifest.file, manifest.size)
            except FileNotFoundError:
                # Someone who saves meanwhile removes these weights, but only after replacing the config
                attempts -= 1
                if attempts:
                    continue
                raise
            return manifest, _tensors(data, manifest)


def _regular_file(path: Path, most: int) -> bytes:
    # the Hub's cache holds links to its blobs
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("must be a regular file or a link to one, not a folder or device")
    if status.st_size > most:
        raise ValueError(f"has {status.st_size} bytes, at most {most} were expected")
    return path.read_bytes()


def _tensors(data: bytes, manifest: Manifest) -> Tensors:
    if len(data) != manifest.size:
        raise ValueError(f"has {len(data)} bytes, {manifest.size} were expected: cut short, or of another checkpoint")
    if (digest := hashlib.sha256(data).hexdigest()) != manifest.sha256:
        raise ValueError(f"is damaged: its sha256 is {digest}, {_CONFIG} says {manifest.sha256}")
    try:
        return safetensors.torch.load(data)
    # The library raises its own error, and KeyError, AssertionError and others where the header lies
    except Exception as error:
        raise ValueError(f"is not a valid safetensors file: {error}") from error


def _empty_network(blueprint: Blueprint, tensors: Tensors) -> torch.nn.Module:
    """The network without memory, once tensors are known to be its own: every key, every shape, float, and no more."""
    config = blueprint.network
    # A lying config must not grow the network for ever: each block has tensors of its own
    if config.num_blocks * len(config.channel_mult) > len(tensors):
        raise ValueError(f"{len(tensors)} tensors are too few for num_blocks={config.num_blocks}")
    with torch.device("meta"):
        network = blueprint.new_network()
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
    if found := [f"{fault}: {listed(keys)}" for fault, keys in faults.items() if keys]:
        raise ValueError("; ".join(found))
    return network


def _check_dtype(argument: str, dtype: object) -> None:
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{argument} must be a torch.dtype or None, got {dtype!r}")
    if dtype not in DTYPES.values():
        raise ValueError(f"{argument} must be one of {list(DTYPES.values())} or None, got {dtype}")


@contextmanager
def blaming(path: Path) -> Iterator[None]:
    """Whatever goes wrong inside is a CheckpointError that names the path."""
    try:
        yield
    except CheckpointError:
        raise
    except (OSError, ValueError, TypeError, RuntimeError, OverflowError, MemoryError) as error:
        reason = str(error) or type(error).__name__
        # a damaged file can make a sentence as long as itself
        raise CheckpointError(f"{path}: {reason[:_LONGEST]}{'...' if len(reason) > _LONGEST else ''}") from error


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
