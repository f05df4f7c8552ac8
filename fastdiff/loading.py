"""fastdiff.load: one door for every kind of checkpoint, which looks at what is there and hands it to its reader"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdiff import checkpoint
from fastdiff.checkpoint import CheckpointError
from fastdiff.classifier import Classifier
from fastdiff.diffusion_model import DiffusionModel
from fastdiff.hub import local_path

if TYPE_CHECKING:
    import torch

__all__ = ["kind_of_source", "load", "load_classifier"]


def load(
    src: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    allow_nonfinite: bool = False,
    **flags: Any,
) -> DiffusionModel:
    """The model of a checkpoint, checked in full: every key and shape, finite weights, sha256 where one is recorded.

    src: a bundled name ("digits"; write "./digits" or a Path for a folder of that name);
        a folder of fastdiff, or of diffusers (a pipeline's, or its unet's or transformer's);
        a file with a state dict of guided-diffusion or improved-diffusion (.pt, .pth, .ckpt, .bin, .safetensors);
        "org/name" of the Hugging Face Hub, where no such path exists: safetensors only, but "org/name:file.pt" is that
        file, and "org/name@revision" that revision.
    device: where the parameters go; None is the CPU.
    dtype: what they become, and the recorded compute dtype of the model returned; None is the dtype that the checkpoint
        records (for float16 on a CPU float32), or that of its stored weights where it records none.
    allow_nonfinite: load NaN and infinite weights all the same.
    flags: what a foreign checkpoint does not tell; errors name what is missing. guided-diffusion's are those of
        fastdiff.convert.guided_diffusion.Flags, diffusers' those of fastdiff.convert.diffusers_folder.load_folder.
    The network is in eval mode and channels_last. torch's random generators are left as they were.

    Raises CheckpointError naming the path; ValueError or TypeError for the other arguments.
    """
    options: dict[str, Any] = {"device": device, "dtype": dtype, "allow_nonfinite": allow_nonfinite, **flags}
    model = _read(src, checkpoint.BUNDLED, checkpoint.load, options)
    if isinstance(model, Classifier):
        raise CheckpointError(f"{os.fspath(src)}: is a classifier's; fastdiff.load_classifier reads it")
    return model


def load_classifier(
    src: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    allow_nonfinite: bool = False,
    **flags: Any,
) -> Classifier:
    """The noisy-image classifier of a checkpoint; arguments, checks, state and errors as for load.

    src: the name of a bundled classifier ("digits"), a folder of fastdiff, a file of guided-diffusion, or "org/name".
    """
    options: dict[str, Any] = {"device": device, "dtype": dtype, "allow_nonfinite": allow_nonfinite, **flags}
    model = _read(src, checkpoint.BUNDLED_CLASSIFIERS, checkpoint.load_classifier, options)
    if isinstance(model, DiffusionModel):
        raise CheckpointError(f"{os.fspath(src)}: is a diffusion model's; fastdiff.load reads it")
    return model


def kind_of_source(path: Path) -> str:
    """What lies at a path: "fastdiff" (also where nothing does), "diffusers" or "guided-diffusion"."""
    if path.is_file():
        return "guided-diffusion"
    if path.is_dir() and ((path / "model_index.json").is_file() or _is_diffusers(path / "config.json")):
        return "diffusers"
    return "fastdiff"


def _is_diffusers(config: Path) -> bool:
    """Whether a config is one that diffusers saved, however damaged: fastdiff's have no such key"""
    try:
        with open(config, "rb") as file:
            return b'"_class_name"' in file.read(checkpoint.CONFIG_BYTES)
    except OSError:
        return False


def _read(src: Any, bundled: Mapping[str, Path], own: Callable[..., Any], options: dict[str, Any]) -> Any:
    """own: reads fastdiff's checkpoints; whose name is bundled, and what is no path at all, is for it to tell"""
    if isinstance(src, str | os.PathLike) and src != "" and not (isinstance(src, str) and src in bundled):
        # a path, so that it cannot be taken for a bundled name
        src = local_path(src, variant=options.get("variant"), weights_file=options.get("weights_file"))
        kind = kind_of_source(src)
        if kind == "guided-diffusion":
            from fastdiff.convert.state_files import load_file

            return load_file(src, **options)
        if kind == "diffusers":
            read = _reader_of(src)
            if unknown := sorted(options.keys() - inspect.signature(read).parameters.keys()):
                flag = unknown[0]
                raise ValueError(f"{flag} must be left out: a folder of diffusers tells it, got {options[flag]!r}")
            return read(src, **options)
    for flag in sorted(options.keys() - {"device", "dtype", "allow_nonfinite"}):
        if (value := options.pop(flag)) is not None:
            raise ValueError(f"{flag} must be left out: a checkpoint of fastdiff tells all, got {value!r}")
    return own(src, **options)


def _reader_of(folder: Path) -> Callable[..., DiffusionModel]:
    """A UNet2DModel becomes ours; a DiT stays diffusers' own, which must be installed for it"""
    from fastdiff.convert.diffusers_folder import DIT_CLASSES, load_folder, network_class

    if network_class(folder) not in DIT_CLASSES:
        return load_folder
    try:
        from fastdiff.integrations.diffusers import dit_model
    except ImportError as error:
        raise CheckpointError(f"{folder}: holds a DiT, which needs diffusers; pip install diffusers") from error
    return dit_model
