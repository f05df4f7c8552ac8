"""What the words of a command line stand for: options, labels, steps, files; torch is imported where needed."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

if TYPE_CHECKING:
    import torch

    from fastdiff.diffusion_model import DiffusionModel
    from fastdiff.training import Dataset

__all__ = [
    *("DEFAULT_W", "Device", "Dtype", "ModelName", "Quiet"),
    *("check_png", "classifier_facts", "first_labels", "free_name", "low_res_facts"),
    *("low_res_images", "opened", "option", "parse_labels", "parse_steps"),
]

DEFAULT_OUT = "samples.png"
MAX_LABELS = 10**6
DEFAULT_W = 1.5


def option(metavar: str, default: str | None = None, *aliases: str) -> Any:
    """Of a field: what stands for its value in the help, what it is when left out, other names."""
    hint = None if default is None else f"(default: {default})"
    return arg(metavar=metavar, help_behavior_hint=hint, aliases=aliases)


ModelName = Annotated[Positional[str], option("[MODEL]")]
Device = Annotated[str | None, option("DEVICE", "a GPU if there is one")]
Dtype = Annotated[str | None, option("DTYPE", "the model's, or what suits the device")]
Quiet = Annotated[bool, arg(aliases=["-q"])]


def parse_labels(text: str) -> list[int] | None:
    """The labels that 0-9, 3,1,4 or 0-3,7 stand for, None for "none". Raises ValueError for anything else."""
    if text.strip().lower() == "none":
        return None
    labels: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})(?:-(\d{1,9}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            raise ValueError(f"--labels must be such as 0-9, 3,1,4 or 0-3,7, or none, got {text!r}")
        if len(labels) + last - first >= MAX_LABELS:
            raise ValueError(f"--labels must name at most {MAX_LABELS} labels, got {text!r}")
        labels += range(first, last + 1)
    return labels


def parse_steps(text: str) -> int | str:
    """N as a number, everything else as it is."""
    return int(text) if re.fullmatch(r"\d+", text) else text


def first_labels(num_classes: int | None) -> list[int] | None:
    """The labels that pictures show when nobody says which."""
    return None if num_classes is None else list(range(min(num_classes, 10)))


def free_name(force: bool) -> str:
    """samples.png, or unless force the first of samples-2.png, ... that is free."""
    stem, number, name = Path(DEFAULT_OUT).stem, 1, DEFAULT_OUT
    while not force and Path(name).exists():
        number += 1
        name = f"{stem}-{number}.png"
    return name


def check_png(name: str, path: str, force: bool) -> None:
    """ValueError where the argument of this name is no .png that can be written."""
    from fastdiff import images

    if not path.lower().endswith(".png"):
        raise ValueError(f"{name} must end in .png, got {path}")
    images.check_out(path, force)


def opened(model: str) -> tuple[str | DiffusionModel, dict[str, Any]]:
    """What a sampler takes of a model's name, folder or file, and its facts: name, sha256, and config.json's diffusion

    fastdiff's own are not loaded here. Raises CheckpointError for what is none, and for a classifier.
    """
    from fastdiff import checkpoint, hub, loading
    from fastdiff.checkpoint import CheckpointError

    path = checkpoint.BUNDLED.get(model) or hub.local_path(model)
    if loading.kind_of_source(path) != "fastdiff":
        try:
            loaded = loading.load(path)
        except CheckpointError as error:
            remedy = "; fastdiff convert takes what is missing, --image-size and so on, and writes what can be sampled"
            raise CheckpointError(f"{error}{remedy if '; give ' in str(error) else ''}") from error
        told = ("num_classes", "null_label", "image_shape")
        diffusion = {name: getattr(loaded, name) for name in told}
        return loaded, {"name": loaded.name, "sha256": loaded.provenance.get("sha256"), "diffusion": diffusion}
    facts = checkpoint.info(path)
    config = facts["config"]
    if "diffusion" not in config:
        raise ValueError(f"model {model}: is a classifier, which draws no images; give a diffusion model")
    own = model if path == checkpoint.BUNDLED.get(model) else str(path)
    return own, {"name": config["name"], "sha256": facts["sha256"], "diffusion": config["diffusion"]}


def classifier_facts(classifier: str | None, scale: float | None) -> dict[str, Any]:
    """What metadata tell of a classifier, its name or folder, and of its scale; empty without one.

    Raises ValueError for a scale without a classifier, CheckpointError for one that cannot be read.
    """
    from fastdiff import checkpoint, hub, loading

    if classifier is None:
        if scale is not None:
            raise ValueError(f"--classifier-scale {scale:g} needs a --classifier")
        return {}
    path = checkpoint.BUNDLED_CLASSIFIERS.get(classifier) or hub.local_path(classifier)
    if loading.kind_of_source(path) == "guided-diffusion":
        from fastdiff.convert.state_files import sha256_of

        name, sha256 = path.stem, sha256_of(path)
    else:
        facts = checkpoint.info(path)
        name, sha256 = facts["config"]["name"], facts["sha256"]
    return {
        "classifier": name,
        "classifier_sha256": sha256,
        "classifier_scale": 1.0 if scale is None else scale,
    }


def low_res_images(
    path: str | None, pictures: Dataset | None, model: str, network: object, n: int
) -> dict[str, torch.Tensor] | None:
    """extra of a super-resolution network for n images: the pictures at path; None where neither is there.

    Raises ValueError for pictures of another number or size, and where only one of network and pictures is for
    enlarging.
    """
    shape: tuple[int, ...] | None = getattr(network, "extra_shapes", {}).get("low_res")
    if shape is None and pictures is None:
        return None
    if shape is None:
        raise ValueError(f"model {model} enlarges no pictures; leave --low-res out")
    if pictures is None:
        raise ValueError(f"model {model} enlarges pictures: give {n} of {shape[1]}x{shape[2]} by --low-res FILE.npz")
    if len(pictures) != n:
        raise ValueError(f"--low-res {path} must hold {n} pictures, one an image drawn, got {len(pictures)}")
    if (got := tuple(pictures.images.shape[1:])) != shape:
        raise ValueError(f"--low-res {path} must hold pictures (channels, height, width) of {shape}, got {got}")
    return {"low_res": pictures.images}


def low_res_facts(path: str | None) -> dict[str, str]:
    """What metadata tell of the pictures that were enlarged; empty without any."""
    if path is None:
        return {}
    with open(path, "rb") as file:
        return {"low_res": path, "low_res_sha256": hashlib.file_digest(file, "sha256").hexdigest()}
