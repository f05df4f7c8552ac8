"""Folders of diffusers, both ways: a pipeline's (model_index.json, unet/, scheduler/), or a UNet2DModel's alone

Every key and shape is checked, nothing outside the folder is opened save what a link of its own leads to, as the Hub's
cache has them, and no pickle but one asked for by name.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from fastdiff.atomic import locked, made, replace_all, sweep
from fastdiff.checkpoint import blaming
from fastdiff.convert.diffusers import unet_from_diffusers, unet_to_diffusers
from fastdiff.convert.diffusers_config import DEFAULTS, UNET2D, config_from_diffusers
from fastdiff.convert.schedulers import SchedulerFacts, scheduler_from_diffusers, scheduler_to_diffusers
from fastdiff.convert.state_files import SUFFIXES, read_state
from fastdiff.diffusion_model import DiffusionModel
from fastdiff.manifest import CONFIG_BYTES, listed, strict_json
from fastdiff.model import UNet
from fastdiff.placement import DTYPES, resolve_device, runnable_dtype

__all__ = ["load_folder", "network_class", "save_folder"]

Tensors = dict[str, torch.Tensor]

_MODEL_INDEX, _CONFIG, _SCHEDULER_CONFIG = "model_index.json", "config.json", "scheduler_config.json"
_WEIGHTS = "diffusion_pytorch_model"
_PIPELINES = {"DDPMScheduler": "DDPMPipeline", "DDIMScheduler": "DDIMPipeline"}
# names, never paths
_FILE, _SHARD = re.compile(r"\w[\w.-]*"), re.compile(r"\w[\w.-]*\.safetensors")
_VARIANT = re.compile(r"[\w-]+")
_INDEX_BYTES = 2**24
# beside what diffusers reads in model_index.json: which row of the class embedding means none
_LABELS = "_fastdiff"


@dataclass(frozen=True)
class _Found:
    """What a folder holds: its network, the scheduler's config and class, the labels recorded; None: no such thing"""

    unet: Path
    scheduler: Path | None
    scheduler_class: str | None
    labels: Mapping[str, Any] | None


def load_folder(
    folder: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    allow_nonfinite: bool = False,
    scheduler: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    image_size: int | None = None,
    variant: str | None = None,
    weights_file: str | None = None,
) -> DiffusionModel:
    """The model of a folder that diffusers saved, whose own solver gives the images that the pipeline gives.

    folder: a pipeline's with unet/ and scheduler/, or a UNet2DModel's own, which needs `scheduler`.
    device, dtype, allow_nonfinite: as for fastdiff.load.
    scheduler: the config of a DDPMScheduler or DDIMScheduler, or a path to its folder; in place of the pipeline's.
    num_classes: a class embedding does not tell whether its last row is a null label. None: every row is a class and
        there is no null label; one less than rows: the last row is the null label.
    image_size: side of the images, for a config whose sample_size is None.
    variant: of the weights, such as "fp16" for diffusion_pytorch_model.fp16.safetensors.
    weights_file: name of another file of weights beside config.json; .bin and .pt are read with weights_only=True.

    A variance is learned where the network returns twice the channels of an image.
    Raises CheckpointError naming the path; ValueError or TypeError for device, dtype and variant.
    """
    folder = Path(folder)
    target = torch.device("cpu") if device is None else resolve_device(device)
    if dtype is not None and dtype not in DTYPES.values():
        raise ValueError(f"dtype must be one of {list(DTYPES.values())} or None, got {dtype!r}")
    if variant is not None and (not isinstance(variant, str) or not _VARIANT.fullmatch(variant)):
        raise ValueError(f"variant must be a word such as 'fp16', got {variant!r}")
    found = _look(folder)
    facts = _scheduler(folder, found, scheduler)
    config_path = found.unet / _CONFIG
    with blaming(config_path):
        config = _json(config_path)
        _check_class(config.get("_class_name"))
        sides = config_from_diffusers(config, image_size).image_size
        shape = _image_shape(config, sides)
        variance = _variance(config, facts)
        labels = _labels(config.get("num_class_embeds"), num_classes, found.labels)
    path, tensors, digests = _weights(found.unet, variant, weights_file)
    with blaming(path):
        network = unet_from_diffusers(config, tensors, image_size=image_size)
        bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
        if bad and not allow_nonfinite:
            raise ValueError(f"NaN or infinite weights in {listed(bad)}; allow_nonfinite=True loads them all the same")
    del tensors
    network.to(target, None if dtype is None else runnable_dtype(dtype, target))
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with blaming(folder):
        return DiffusionModel(
            network,
            facts.schedule,
            facts.prediction,
            variance,
            *labels,
            shape,
            clip_x0=facts.clip_x0,
            dtype=dtype,
            name=folder.resolve().name,
            provenance={"format": "diffusers", "sha256": digests},
            solver=facts.solver,
        )


def network_class(folder: str | os.PathLike[str]) -> str:
    """Class of the network in a folder of diffusers, such as "UNet2DModel"; CheckpointError where it tells none."""
    folder = Path(folder)
    path = folder / _MODEL_INDEX
    if not os.path.lexists(path):
        path = folder / _CONFIG
    with blaming(path):
        facts = _json(path)
        if path.name == _CONFIG:
            name = facts.get("_class_name")
        else:
            name = next((_component(facts, part)[1] for part in ("unet", "transformer") if part in facts), None)
        if not isinstance(name, str):
            raise ValueError("tells no network: it must have a 'unet', a 'transformer' or a '_class_name'")
        return name


def save_folder(model: DiffusionModel, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Writes a pipeline that diffusers loads and that samples what fastdiff samples; returns its folder.

    A DDIMPipeline or DDPMPipeline around a UNet2DModel, as model.solver says: see scheduler_to_diffusers. Theirs pass
    no labels; a class-conditional network is for a loop that does.
    folder: made if need be. overwrite: replace the pipeline that is there; other files are left alone either way.
    What is written is complete or, after a kill, lacks model_index.json.

    Raises TypeError for a network of another kind, ValueError for what diffusers cannot hold, and CheckpointError
    naming the path for all else; then nothing is changed.
    """
    folder = Path(folder)
    if not isinstance(model, DiffusionModel) or type(model.network) is not UNet:
        got = type(model.network if isinstance(model, DiffusionModel) else model).__name__
        raise TypeError(f"model must be a DiffusionModel with a UNet, got {got}: UNet2DModel holds no other")
    for name in ("null_model", "decode", "guided_channels"):
        if getattr(model, name) is not None:
            raise ValueError(f"model must have {name}=None, a pipeline's folder has no place for it")
    scheduler = scheduler_to_diffusers(model)
    kind = scheduler["_class_name"]
    if kind == "DDIMScheduler" and model.variance == "learned_range":
        raise ValueError(
            "model.variance must not be 'learned_range' where its solver is 'ddim': DDIMScheduler takes no network "
            "that learned one; give the model a solver named 'ddpm'"
        )
    config, state = unet_to_diffusers(model.network)
    C, H, W = model.image_shape
    config |= {"_class_name": UNET2D, "sample_size": H if H == W else (H, W)}
    index = {
        "_class_name": _PIPELINES[kind],
        "scheduler": ["diffusers", kind],
        "unet": ["diffusers", UNET2D],
        _LABELS: {"num_classes": model.num_classes, "null_label": model.null_label},
    }
    files = {
        folder / "unet" / f"{_WEIGHTS}.safetensors": safetensors.torch.save(
            {key: tensor.cpu() for key, tensor in state.items()}, {"format": "pt"}
        ),
        folder / "unet" / _CONFIG: _text(config),
        folder / "scheduler" / _SCHEDULER_CONFIG: _text(scheduler),
        folder / _MODEL_INDEX: _text(index),
    }
    with blaming(folder), ExitStack() as stack:
        for path in (folder, folder / "unet", folder / "scheduler"):
            stack.enter_context(made(path))
        stack.enter_context(locked(folder))
        if os.path.lexists(folder / _CONFIG):
            raise ValueError(f"must not hold a checkpoint of another kind, it has a {_CONFIG}; choose another folder")
        # diffusers would read an index of shards before our file
        others = [path for path in (folder / "unet").glob(f"{_WEIGHTS}*") if not path.is_dir()]
        if (others or any(map(os.path.lexists, files))) and not overwrite:
            raise ValueError("a pipeline is there already; overwrite=True replaces it")
        replace_all(files, remove=[path for path in others if path not in files])
        for path in files:
            sweep(path.parent, {path.name}.__contains__)
    return folder


def _text(facts: Mapping[str, Any]) -> bytes:
    return (json.dumps(facts, indent=2, allow_nan=False) + "\n").encode()


def _json(path: Path, most: int = CONFIG_BYTES) -> dict[str, Any]:
    # of the file that a link leads to
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("must be a file, not a folder or device")
    if status.st_size > most:
        raise ValueError(f"has {status.st_size} bytes, at most {most} were expected")
    facts = strict_json(path.read_bytes())
    if not isinstance(facts, dict):
        raise ValueError(f"must hold an object, got {type(facts).__name__}")
    return facts


def _look(folder: Path) -> _Found:
    with blaming(folder):
        if not folder.is_dir():
            raise ValueError("a folder of diffusers was expected, this is no folder")
        if not any(os.path.lexists(folder / name) for name in (_MODEL_INDEX, _CONFIG)):
            raise ValueError(f"the folder has neither {_MODEL_INDEX} nor {_CONFIG}")
    path = folder / _MODEL_INDEX
    if not os.path.lexists(path):
        return _Found(folder, None, None, None)
    with blaming(path):
        index = _json(path)
        part = "transformer" if "transformer" in index and "unet" not in index else "unet"
        _check_class(_component(index, part)[1])
        kind = _component(index, "scheduler")[1]
        # its constructor makes one of any other
        kind = "DDIMScheduler" if index.get("_class_name") == "DDIMPipeline" else kind
        return _Found(folder / "unet", folder / "scheduler" / _SCHEDULER_CONFIG, kind, _recorded_labels(index))


def _component(index: Mapping[str, Any], part: str) -> tuple[str, str]:
    entry = index.get(part)
    if not isinstance(entry, list) or len(entry) != 2 or not all(isinstance(name, str) for name in entry):
        raise ValueError(f"{part} must be a library's and a class's name, got {json.dumps(entry)[:80]}")
    return entry[0], entry[1]


def _check_class(name: object) -> None:
    if name in ("DiTTransformer2DModel", "Transformer2DModel"):
        raise ValueError(
            f"holds a {name}: fastdiff.integrations.diffusers.dit_model reads it, with diffusers installed"
        )
    if name != UNET2D:
        raise ValueError(f"must hold a {UNET2D}, got {str(name)[:80]!r}")


def _recorded_labels(index: Mapping[str, Any]) -> Mapping[str, Any] | None:
    labels = index.get(_LABELS)
    if labels is not None and (not isinstance(labels, dict) or labels.keys() != {"num_classes", "null_label"}):
        raise ValueError(f"{_LABELS} must have num_classes and null_label, got {json.dumps(labels)[:80]}")
    return labels


def _scheduler(folder: Path, found: _Found, given: Mapping[str, Any] | str | os.PathLike[str] | None) -> SchedulerFacts:
    if isinstance(given, Mapping):
        return scheduler_from_diffusers(given)
    path, kind = found.scheduler, found.scheduler_class
    if given is not None:
        path, kind = Path(given), None
        path = path / _SCHEDULER_CONFIG if path.is_dir() else path
    if path is None:
        with blaming(folder):
            raise ValueError(
                "has a network but no scheduler, which holds its noise schedule and prediction; give scheduler=, a "
                f"folder with {_SCHEDULER_CONFIG}, or its contents"
            )
    with blaming(path):
        config = _json(path)
        return scheduler_from_diffusers(config if kind is None else {**config, "_class_name": kind})


def _image_shape(config: Mapping[str, Any], side: int) -> tuple[int, int, int]:
    size = config.get("sample_size")
    H, W = size if isinstance(size, list) else (side, side)
    return config.get("in_channels", DEFAULTS["in_channels"]), H, W


def _variance(config: Mapping[str, Any], facts: SchedulerFacts) -> str:
    C, out = (config.get(key, DEFAULTS[key]) for key in ("in_channels", "out_channels"))
    if out == 2 * C and (facts.variance == "learned_range" or facts.solver["name"] == "ddim"):
        return "learned_range"
    if out == C and facts.variance != "learned_range":
        return facts.variance
    raise ValueError(
        f"out_channels must be in_channels={C}, or {2 * C} where the scheduler's variance_type is 'learned_range', got "
        f"{out} and {facts.variance!r}"
    )


def _labels(
    rows: int | None, num_classes: int | None, recorded: Mapping[str, Any] | None
) -> tuple[int | None, int | None]:
    """num_classes and null_label of a class embedding"""
    if num_classes is None and recorded is None:
        return rows, None
    if num_classes is None and recorded is not None:
        if (recorded["num_classes"] is None) != (rows is None):
            raise ValueError(f"num_class_embeds={rows} does not go with {_LABELS}={recorded} of {_MODEL_INDEX}")
        return recorded["num_classes"], recorded["null_label"]
    if rows is None or isinstance(num_classes, bool) or num_classes not in (rows, rows - 1):
        expected = f"{rows}, or {rows - 1} with a null label" if rows else "None, the network has no class embedding"
        raise ValueError(f"num_classes must be {expected}, got {num_classes!r}")
    return num_classes, None if num_classes == rows else num_classes


def _weights(unet: Path, variant: str | None, weights_file: str | None) -> tuple[Path, Tensors, dict[str, str]]:
    """The file that stands for them in errors, the tensors, and each file's sha256"""
    suffix = "" if variant is None else f".{variant}"
    path, index = unet / f"{_WEIGHTS}{suffix}.safetensors", unet / f"{_WEIGHTS}.safetensors.index{suffix}.json"
    if weights_file is not None:
        with blaming(unet):
            if not isinstance(weights_file, str) or not _FILE.fullmatch(weights_file):
                raise ValueError(f"weights_file must be the name of a file here, got {weights_file!r}")
            if variant is not None:
                raise ValueError("variant and weights_file must not both be given")
        path = unet / weights_file
    elif os.path.lexists(index):
        return _shards(index)
    elif not os.path.lexists(path):
        with blaming(unet):
            there = [entry.name for entry in unet.iterdir() if entry.suffix in (*SUFFIXES, ".json")]
            raise ValueError(
                f"has no {path.name}, only [{listed(there)}]; variant= names another kind of it, weights_file= any "
                "other file; a pickle (.bin) is read only if it is named"
            )
    tensors, digest = read_state(path)
    return path, tensors, {path.name: digest}


def _shards(index: Path) -> tuple[Path, Tensors, dict[str, str]]:
    with blaming(index):
        files = _json(index, _INDEX_BYTES).get("weight_map")
        if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
            raise ValueError("weight_map must name a file for every tensor")
        if wrong := [name for name in files.values() if not _SHARD.fullmatch(name)]:
            raise ValueError(f"weight_map must name safetensors files of this folder, got {wrong[0][:80]!r}")
    tensors: Tensors = {}
    digests = {}
    for name in sorted(set(files.values())):
        path = index.with_name(name)
        part, digests[name] = read_state(path)
        with blaming(path):
            expected = {key for key, file in files.items() if file == name}
            if part.keys() != expected:
                raise ValueError(
                    f"lacks keys [{listed(expected - part.keys())}] and has unexpected keys "
                    f"[{listed(part.keys() - expected)}] for {index.name}"
                )
        tensors |= part
    return index, tensors, digests
