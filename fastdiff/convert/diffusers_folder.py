"""Folders of diffusers, both ways: a pipeline's (model_index.json, unet/, scheduler/), or a UNet2DModel's alone"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from fastdiff.atomic import locked, made, replace_all, sweep
from fastdiff.checkpoint import blaming
from fastdiff.convert.diffusers import unet_from_diffusers, unet_to_diffusers
from fastdiff.convert.diffusers_config import DEFAULTS, UNET2D, config_from_diffusers
from fastdiff.convert.diffusers_layout import (
    CONFIG,
    LABELS,
    MODEL_INDEX,
    SCHEDULER_CONFIG,
    WEIGHTS,
    Scheduler,
    check_recorded,
    look,
    read_json,
    read_weights,
    scheduler_facts,
    variance_of,
)
from fastdiff.convert.schedulers import scheduler_to_diffusers
from fastdiff.diffusion_model import DiffusionModel
from fastdiff.manifest import listed
from fastdiff.model import UNet
from fastdiff.placement import DTYPES, resolve_device, runnable_dtype

__all__ = ["DIT_CLASSES", "load_folder", "network_class", "row_labels", "save_folder"]

# DiTTransformer2DModel, and what it was called when the published ones were saved
DIT_CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")

_PIPELINES = {"DDPMScheduler": "DDPMPipeline", "DDIMScheduler": "DDIMPipeline"}


def load_folder(
    folder: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    allow_nonfinite: bool = False,
    scheduler: Scheduler = None,
    num_classes: int | None = None,
    image_size: int | None = None,
    variant: str | None = None,
    weights_file: str | None = None,
) -> DiffusionModel:
    """The model of a folder that diffusers saved, whose own solver gives the images that the pipeline gives.

    folder: a pipeline's with unet/ and scheduler/, or a UNet2DModel's own, which needs `scheduler`.
    device, dtype, allow_nonfinite: as for fastdiff.load. dtype None is the stored weights', which diffusers computes in
        too; on a CPU the parameters are float32 for float16.
    scheduler: a DDPMScheduler or DDIMScheduler of diffusers, its config, or a path to that, to its folder or to a
        pipeline's; in place of the pipeline's.
    num_classes: a class embedding does not tell whether its last row is a null label. None: every row is a class and
        there is no null label; one less than rows: the last row is the null label.
    image_size: side of the images, for a config whose sample_size is None.
    variant: of the weights, such as "fp16" for diffusion_pytorch_model.fp16.safetensors.
    weights_file: name of another file of weights beside config.json; .bin and .pt are read with weights_only=True.

    A variance is learned where the network returns twice the channels of an image. What save_folder wrote has the
    weights' sha256, which is checked.
    Raises CheckpointError naming the path; ValueError or TypeError for device, dtype, variant and scheduler.
    """
    folder = Path(folder)
    target = torch.device("cpu") if device is None else resolve_device(device)
    if dtype is not None and dtype not in DTYPES.values():
        raise ValueError(f"dtype must be one of {list(DTYPES.values())} or None, got {dtype!r}")
    found = look(folder)
    with blaming(folder):
        _check_class(found.network_class)
    facts = scheduler_facts(folder, found, scheduler)
    with blaming(found.network / CONFIG):
        config = read_json(found.network / CONFIG)
        _check_class(config.get("_class_name"))
        try:
            side = config_from_diffusers(config, image_size).image_size
        except ValueError as error:
            remedy = "with diffusers installed fastdiff.integrations.diffusers.unet_model runs any UNet2DModel"
            raise ValueError(f"{error}; {remedy}") from error
        size, C, out = (config.get(key, DEFAULTS[key]) for key in ("sample_size", "in_channels", "out_channels"))
        shape = (C, *(size if isinstance(size, list) else (side, side)))
        variance = variance_of(C, out, facts)
        num_classes, null_label = row_labels(config.get("num_class_embeds"), num_classes, found.labels)
    path, tensors, digests = read_weights(found.network, variant, weights_file)
    check_recorded(found, digests, another=variant is not None or weights_file is not None)
    with blaming(path):
        network = unet_from_diffusers(config, tensors, image_size=image_size)
        bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
        if bad and not allow_nonfinite:
            raise ValueError(f"NaN or infinite weights in {listed(bad)}; allow_nonfinite=True loads them all the same")
    stored = next(iter(tensors.values())).dtype
    del tensors
    network.to(target, dtype or runnable_dtype(stored, target))
    dtype = dtype or stored
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with blaming(folder):
        return DiffusionModel(
            network,
            facts.schedule,
            facts.prediction,
            variance,
            num_classes,
            null_label,
            shape,
            clip_x0=facts.clip_x0,
            dtype=dtype,
            name=folder.resolve().name,
            provenance={"format": "diffusers", "sha256": digests},
            solver=facts.solver,
        )


def network_class(folder: str | os.PathLike[str]) -> str:
    """Class of the network in a folder of diffusers: "UNet2DModel", one of DIT_CLASSES, ...; else CheckpointError."""
    return look(Path(folder)).network_class


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
    files = _files(model, folder)
    unet = folder / "unet"
    with blaming(folder), ExitStack() as stack:
        for path in (folder, unet, folder / "scheduler"):
            stack.enter_context(made(path))
        stack.enter_context(locked(folder))
        if os.path.lexists(folder / CONFIG):
            raise ValueError(f"must not hold a checkpoint of another kind, it has a {CONFIG}; choose another folder")
        # diffusers would read an index of shards before our file
        others = [path for path in unet.glob(f"{WEIGHTS}*") if not path.is_dir()]
        if (others or any(map(os.path.lexists, files))) and not overwrite:
            raise ValueError("a pipeline is there already; overwrite=True replaces it")
        replace_all(files, remove=[path for path in others if path not in files])
        for path in files:
            sweep(path.parent, {path.name}.__contains__)
    return folder


def row_labels(
    rows: int | None, num_classes: int | None, recorded: Mapping[str, Any] | None = None
) -> tuple[int | None, int | None]:
    """num_classes and null_label of a class embedding; ValueError for those that it cannot have."""
    if num_classes is None and recorded is None:
        return rows, None
    if num_classes is None and recorded is not None:
        if (recorded["num_classes"] is None) != (rows is None):
            raise ValueError(f"num_class_embeds={rows} does not go with {LABELS}={recorded} of {MODEL_INDEX}")
        return recorded["num_classes"], recorded["null_label"]
    if rows is None or isinstance(num_classes, bool) or num_classes not in (rows, rows - 1):
        expected = f"{rows}, or {rows - 1} with a null label" if rows else "None, the network has no class embedding"
        raise ValueError(f"num_classes must be {expected}, got {num_classes!r}")
    return num_classes, None if num_classes == rows else num_classes


def _check_class(name: object) -> None:
    if name in DIT_CLASSES:
        raise ValueError(
            f"holds a {name}, which fastdiff.integrations.diffusers.dit_model reads, with diffusers installed"
        )
    if name != UNET2D:
        raise ValueError(f"must hold a {UNET2D}, got {str(name)[:80]!r}")


def _files(model: DiffusionModel, folder: Path) -> dict[Path, bytes]:
    """The pipeline's files and what is in them, model_index.json last"""
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
    H, W = model.image_shape[1:]
    config |= {"_class_name": UNET2D, "sample_size": H if H == W else (H, W)}
    weights = safetensors.torch.save({key: tensor.cpu() for key, tensor in state.items()}, {"format": "pt"})
    labels = {"num_classes": model.num_classes, "null_label": model.null_label}
    index = {
        "_class_name": _PIPELINES[kind],
        "scheduler": ["diffusers", kind],
        "unet": ["diffusers", UNET2D],
        LABELS: {**labels, "sha256": hashlib.sha256(weights).hexdigest()},
    }
    return {
        folder / "unet" / f"{WEIGHTS}.safetensors": weights,
        folder / "unet" / CONFIG: _text(config),
        folder / "scheduler" / SCHEDULER_CONFIG: _text(scheduler),
        folder / MODEL_INDEX: _text(index),
    }


def _text(facts: Mapping[str, Any]) -> bytes:
    return (json.dumps(facts, indent=2, allow_nan=False) + "\n").encode()
