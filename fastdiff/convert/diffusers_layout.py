"""Where diffusers keeps what: the parts of a pipeline's folder, its configs, its weights in one file or in shards

Nothing outside the folder is opened save what a link of its own leads to, as the Hub's cache has them; no pickle but
one asked for by name. Every fault is a CheckpointError that names the path.
"""

from __future__ import annotations

import json
import os
import re
import reprlib
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastdiff.checkpoint import blaming
from fastdiff.convert.schedulers import SchedulerFacts, scheduler_from_diffusers
from fastdiff.convert.state_files import SUFFIXES, read_state, sha256_of
from fastdiff.manifest import CONFIG_BYTES, listed, strict_json

__all__ = [
    "CONFIG",
    "LABELS",
    "MODEL_INDEX",
    "SCHEDULER_CONFIG",
    "WEIGHTS",
    "Found",
    "check_recorded",
    "given_scheduler",
    "hash_weights",
    "look",
    "read_json",
    "read_weights",
    "scheduler_facts",
    "variance_of",
]

Tensors = dict[str, torch.Tensor]
# the last: one of diffusers' own, whose `config` is a mapping
Scheduler = Mapping[str, Any] | str | os.PathLike[str] | Any | None

MODEL_INDEX, CONFIG, SCHEDULER_CONFIG = "model_index.json", "config.json", "scheduler_config.json"
# of a file of weights, before what tells its kind
WEIGHTS = "diffusion_pytorch_model"
# fastdiff's own key of model_index.json, which diffusers passes over: which row of the class embedding means none, and
# the sha256 of the network's one file of weights
LABELS = "_fastdiff"

# names, never paths
_FILE, _SHARD = re.compile(r"\w[\w.-]*"), re.compile(r"\w[\w.-]*\.safetensors")
_VARIANT = re.compile(r"[\w-]+")
_INDEX_BYTES = 2**24
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Found:
    """What a folder holds; None: no such thing

    network, network_class: the folder of the unet or transformer, and its class in diffusers. vae, vae_class: likewise.
    scheduler, scheduler_class: its config's path, and the class that the pipeline makes of it, whatever it says itself.
    labels: num_classes and null_label, where fastdiff recorded them. sha256: of the weights, likewise.
    """

    network: Path
    network_class: str
    vae: Path | None = None
    vae_class: str | None = None
    scheduler: Path | None = None
    scheduler_class: str | None = None
    labels: Mapping[str, Any] | None = None
    sha256: str | None = None


def look(folder: Path) -> Found:
    """The parts of a pipeline's folder, or of a network's own."""
    with blaming(folder):
        if not folder.is_dir():
            raise ValueError("a folder of diffusers was expected, this is no folder")
        if not any(os.path.lexists(folder / name) for name in (MODEL_INDEX, CONFIG)):
            raise ValueError(f"the folder has neither {MODEL_INDEX} nor {CONFIG}")
    if not os.path.lexists(folder / MODEL_INDEX):
        with blaming(folder / CONFIG):
            name = read_json(folder / CONFIG).get("_class_name")
            if not isinstance(name, str):
                raise ValueError(f"_class_name must be the name of a network's class, got {json.dumps(name)[:80]}")
            return Found(folder, name)
    with blaming(folder / MODEL_INDEX):
        index = read_json(folder / MODEL_INDEX)
        part = "transformer" if "transformer" in index and "unet" not in index else "unet"
        kind = _class_of(index, "scheduler")
        labels, sha256 = _recorded(index)
        vae_class = _class_of(index, "vae") if "vae" in index else None
        return Found(
            network=_place(folder, part, CONFIG),
            network_class=_class_of(index, part),
            vae=None if vae_class is None else _place(folder, "vae", CONFIG),
            vae_class=vae_class,
            scheduler=_place(folder, "scheduler", SCHEDULER_CONFIG) / SCHEDULER_CONFIG,
            # its constructor makes one of any other
            scheduler_class="DDIMScheduler" if index.get("_class_name") == "DDIMPipeline" else kind,
            labels=labels,
            sha256=sha256,
        )


def _place(folder: Path, part: str, config: str) -> Path:
    """Where a part lies: in a folder of its own, or, as diffusers has it too, in the pipeline's"""
    own = folder / part
    return folder if not own.is_dir() and os.path.lexists(folder / config) else own


def _recorded(index: Mapping[str, Any]) -> tuple[dict[str, Any] | None, str | None]:
    """What fastdiff wrote beside diffusers' own: labels, and the weights' sha256"""
    facts = index.get(LABELS)
    if LABELS not in index:
        return None, None
    if not isinstance(facts, dict) or facts.keys() - {"sha256"} != {"num_classes", "null_label"}:
        raise ValueError(f"{LABELS} must have num_classes and null_label, got {json.dumps(facts)[:80]}")
    labels = dict(facts)
    sha256 = labels.pop("sha256", None)
    if "sha256" in facts and (not isinstance(sha256, str) or not _SHA256.fullmatch(sha256)):
        raise ValueError(f"{LABELS}.sha256 must be 64 hexadecimal digits, got {json.dumps(sha256)[:80]}")
    return labels, sha256


def _class_of(index: Mapping[str, Any], part: str) -> str:
    entry = index.get(part)
    if not isinstance(entry, list) or len(entry) != 2 or not all(isinstance(name, str) for name in entry):
        raise ValueError(f"{part} must be a library's and a class's name, got {json.dumps(entry)[:80]}")
    return str(entry[1])


def read_json(path: Path, most: int = CONFIG_BYTES) -> dict[str, Any]:
    """The object in a file of at most so many bytes; ValueError, which the caller lets name the path."""
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


def scheduler_facts(folder: Path, found: Found, given: Scheduler) -> SchedulerFacts:
    """Of the scheduler given, see given_scheduler; None: of the one found."""
    if given is not None:
        return given_scheduler(given)
    if found.scheduler is None:
        with blaming(folder):
            raise ValueError(
                "has a network but no scheduler, which holds its noise schedule and prediction; give scheduler=, a "
                f"folder with {SCHEDULER_CONFIG}, or its contents"
            )
    return _facts_at(found.scheduler, found.scheduler_class)


def given_scheduler(given: object) -> SchedulerFacts:
    """Of a scheduler of diffusers, its config, or a path to that, to its folder, or to a pipeline's."""
    if isinstance(given, str | os.PathLike):
        path = Path(given)
        if os.path.lexists(path / MODEL_INDEX):
            found = look(path)
            assert found.scheduler is not None
            return _facts_at(found.scheduler, found.scheduler_class)
        return _facts_at(path / SCHEDULER_CONFIG if os.path.isdir(path) else path, None)
    if not isinstance(given, Mapping):
        config = getattr(given, "config", None)
        if not isinstance(config, Mapping):
            raise TypeError(
                f"scheduler must be a DDPMScheduler or DDIMScheduler, its config or a path, got {reprlib.repr(given)}"
            )
        given = {**config, "_class_name": type(given).__name__}
    try:
        return scheduler_from_diffusers(given)
    except (ValueError, TypeError) as error:
        raise (TypeError if isinstance(error, TypeError) else ValueError)(f"scheduler's {error}") from error


def _facts_at(path: Path, kind: str | None) -> SchedulerFacts:
    """kind: the class that is made of the config, where that is known"""
    with blaming(path):
        config = read_json(path)
        return scheduler_from_diffusers(config if kind is None else {**config, "_class_name": kind})


def variance_of(in_channels: int, out_channels: int, facts: SchedulerFacts) -> str:
    """The variance of a network's model: learned where it returns twice the channels; ValueError where that misfits."""
    learned = facts.variance == "learned_range"
    if out_channels == 2 * in_channels and (learned or facts.solver["name"] == "ddim"):
        return "learned_range"
    if out_channels == in_channels and not learned:
        return facts.variance
    raise ValueError(
        f"out_channels must be in_channels={in_channels}, or {2 * in_channels} where the scheduler's variance_type is "
        f"'learned_range', got {out_channels} and {facts.variance!r}"
    )


def read_weights(folder: Path, variant: str | None, weights_file: str | None) -> tuple[Path, Tensors, dict[str, str]]:
    """The file that stands for the weights in errors, the tensors, and each file's sha256."""
    named, files = _files_of(folder, variant, weights_file)
    tensors: Tensors = {}
    digests = {}
    for path, expected in files.items():
        part, digests[path.name] = read_state(path)
        with blaming(path):
            if expected is not None and part.keys() != expected:
                raise ValueError(
                    f"lacks keys [{listed(expected - part.keys())}] and has unexpected keys "
                    f"[{listed(part.keys() - expected)}] for {named.name}"
                )
        tensors |= part
    return named, tensors, digests


def hash_weights(folder: Path, variant: str | None) -> dict[str, str]:
    """Each file's sha256, as read_weights gives it, and unread."""
    return {path.name: sha256_of(path) for path in _files_of(folder, variant, None)[1]}


def check_recorded(found: Found, digests: Mapping[str, str], *, another: bool) -> None:
    """CheckpointError where fastdiff wrote the weights and these are others; another: the caller asked for others."""
    file = f"{WEIGHTS}.safetensors"
    if found.sha256 is None or digests.get(file) == found.sha256 or (another and file not in digests):
        return
    with blaming(found.network / file):
        raise ValueError(
            f"its sha256 must be {found.sha256}, as {LABELS} of {MODEL_INDEX} has it, got {listed(digests.values())}; "
            "it is damaged or not what was saved: save it again, or take the sha256 away to trust it"
        )


def _files_of(folder: Path, variant: str | None, weights_file: str | None) -> tuple[Path, dict[Path, set[str] | None]]:
    """What stands for the weights, a file or an index, and the keys that it says each file has"""
    if variant is not None and (not isinstance(variant, str) or not _VARIANT.fullmatch(variant)):
        raise ValueError(f"variant must be a word such as 'fp16', got {variant!r}")
    suffix = "" if variant is None else f".{variant}"
    path, index = folder / f"{WEIGHTS}{suffix}.safetensors", folder / f"{WEIGHTS}.safetensors.index{suffix}.json"
    if weights_file is not None:
        with blaming(folder):
            if not isinstance(weights_file, str) or not _FILE.fullmatch(weights_file):
                raise ValueError(f"weights_file must be the name of a file here, got {weights_file!r}")
            if variant is not None:
                raise ValueError("variant and weights_file must not both be given")
        path = folder / weights_file
    # diffusers, too, looks for it first
    elif os.path.lexists(index):
        return index, _shards(index)
    elif not os.path.lexists(path):
        with blaming(folder):
            there = [entry.name for entry in folder.iterdir() if entry.suffix in (*SUFFIXES, ".json")]
            raise ValueError(
                f"has no {path.name}, only [{listed(there)}]; variant= names another kind of it, weights_file= any "
                "other file; a pickle (.bin) is read only if it is named"
            )
    return path, {path: None}


def _shards(index: Path) -> dict[Path, set[str] | None]:
    with blaming(index):
        files = read_json(index, _INDEX_BYTES).get("weight_map")
        if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
            raise ValueError("weight_map must name a file for every tensor")
        if wrong := [name for name in files.values() if not _SHARD.fullmatch(name)]:
            raise ValueError(f"weight_map must name safetensors files of this folder, got {wrong[0][:80]!r}")
    return {
        index.with_name(name): {key for key, file in files.items() if file == name}
        for name in sorted(set(files.values()))
    }
