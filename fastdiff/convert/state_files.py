"""Files of other people's weights: a state dict in safetensors, or in a pickle that may hold nothing but tensors"""

from __future__ import annotations

import hashlib
import io
import os
import stat
import zipfile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from fastdiff.atomic import locked, made, replace
from fastdiff.checkpoint import blaming
from fastdiff.classifier import Classifier
from fastdiff.convert.guided_diffusion import model_from_guided_diffusion, state_to_guided_diffusion
from fastdiff.diffusion_model import DiffusionModel
from fastdiff.manifest import listed
from fastdiff.placement import DTYPES, resolve_device, runnable_dtype

__all__ = ["PICKLES", "SUFFIXES", "load_file", "read_model", "read_state", "save_file", "sha256_of"]

Tensors = dict[str, torch.Tensor]

# the record at the end of a zip archive, without its comment
_ARCHIVE_END, _ARCHIVE_END_BYTES = b"PK\x05\x06", 22
# what torch.save writes, whatever people call it
PICKLES = (".pt", ".pth", ".ckpt", ".bin")
SUFFIXES = (*PICKLES, ".safetensors")


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Of a file's bytes, as read_state gives it. Raises CheckpointError naming the path."""
    with blaming(Path(path)), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_state(path: str | os.PathLike[str]) -> tuple[Tensors, str]:
    """The state dict of a file, dense tensors on the CPU by name, and the file's sha256

    path: .safetensors; or .pt, .pth, .ckpt, .bin as torch.save writes them, read with weights_only=True: anything but
    tensors in plain containers is refused and not executed.
    Raises CheckpointError naming the path.
    """
    path = Path(path)
    with blaming(path):
        if path.suffix not in SUFFIXES:
            raise ValueError(f"must end in one of {list(SUFFIXES)} to be read as a state dict")
        # of the file that a link leads to
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("must be a file, not a folder or device")
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        state = _safetensors(data) if path.suffix == ".safetensors" else _pickled(data)
        _check_tensors(state, len(data))
        return state, digest


def read_model(
    path: str | os.PathLike[str], *, allow_nonfinite: bool = False, **flags: Any
) -> DiffusionModel | Classifier:
    """The model of a guided-diffusion or improved-diffusion checkpoint, its weights on the CPU as they are in the file

    flags: see guided_diffusion.Flags. allow_nonfinite: as for fastdiff.load.
    Raises CheckpointError naming the path for whatever the file and its flags fail to be.
    """
    path = Path(path)
    state, digest = read_state(path)
    with blaming(path):
        model = model_from_guided_diffusion(state, **flags)
        network = model.network
        assert isinstance(network, torch.nn.Module)
        bad = [name for name, tensor in network.named_parameters() if not torch.isfinite(tensor).all()]
        if bad and not allow_nonfinite:
            raise ValueError(f"NaN or infinite weights in {listed(bad)}; allow_nonfinite=True loads them all the same")
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.name = path.stem if model.name is None else model.name
    model.provenance |= {"file": path.name, "sha256": digest}
    return model


def load_file(
    path: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    allow_nonfinite: bool = False,
    **flags: Any,
) -> DiffusionModel | Classifier:
    """read_model, placed: device, dtype and allow_nonfinite as for fastdiff.load

    dtype is asked for unless the network is a published one, whose own it is then.
    """
    target = torch.device("cpu") if device is None else resolve_device(device)
    if dtype is not None and dtype not in DTYPES.values():
        raise ValueError(f"dtype must be one of {list(DTYPES.values())} or None, got {dtype!r}")
    model = read_model(path, allow_nonfinite=allow_nonfinite, dtype=dtype, **flags)
    assert isinstance(model.network, torch.nn.Module)
    assert model.dtype is not None
    model.network.to(target, dtype or runnable_dtype(model.dtype, target))
    return model


def save_file(
    model: DiffusionModel | Classifier,
    path: str | os.PathLike[str],
    *,
    attention_order: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes the state dict that guided-diffusion's network takes, atomically, and returns its path

    path: ends in .safetensors, or in .pt, .pth, .ckpt or .bin for torch.save.
    attention_order: "legacy" or "new"; None is that of the file the model came from.
    Raises CheckpointError naming the path, TypeError or ValueError for a model that cannot be told so.
    """
    path = Path(path)
    if not isinstance(model, DiffusionModel | Classifier):
        raise TypeError(f"model must be a DiffusionModel or a Classifier, got {type(model).__name__}")
    order = model.provenance.get("attention_order") if attention_order is None else attention_order
    if order is None:
        raise ValueError(
            "attention_order must be 'legacy' or 'new', as the code that will read the file has it: the model did not "
            "come from guided-diffusion"
        )
    network = model.network
    if not isinstance(network, torch.nn.Module):
        raise TypeError(f"model.network must be a module, got {type(network).__name__}")
    state = {key: value.cpu() for key, value in state_to_guided_diffusion(network, order).items()}
    with blaming(path):
        if path.suffix not in SUFFIXES:
            raise ValueError(f"must end in one of {list(SUFFIXES)}")
        if os.path.lexists(path) and not overwrite:
            raise ValueError("is there already; overwrite=True replaces it")
        if path.suffix == ".safetensors":
            data = safetensors.torch.save(state)
        else:
            buffer = io.BytesIO()
            torch.save(state, buffer)
            data = buffer.getvalue()
        with made(path.parent), locked(path.parent):
            replace(path, data)
    return path


def _safetensors(data: bytes) -> Any:
    try:
        return safetensors.torch.load(data)
    # the library raises its own error, and KeyError, AssertionError and others where the header lies
    except Exception as error:
        raise ValueError(f"is not a valid safetensors file: {error}") from error


def _pickled(data: bytes) -> Any:
    buffer = io.BytesIO(data)
    archived = zipfile.is_zipfile(buffer)
    if archived:
        _check_archive(data)
    buffer.seek(0)
    try:
        state = torch.load(buffer, map_location="cpu", weights_only=True)
    # damaged archives and pickles end in almost any error
    except Exception as error:
        why = str(error).split("\n")[0] or type(error).__name__
        raise ValueError(f"is not a file of torch.save that holds tensors only; nothing was executed: {why}") from error
    # before archives, files were read from the beginning to the end
    if not archived and (end := buffer.tell()) != len(data):
        raise ValueError(f"has {len(data)} bytes, {end} were expected: something follows the weights")
    return state


def _check_archive(data: bytes) -> None:
    """torch reads archives without a look at their checksums"""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            total = sum(entry.file_size for entry in archive.infolist())
            # torch.save compresses nothing, a small file that grows without bound does
            if total > len(data):
                raise ValueError(f"it says that {len(data)} bytes hold {total}, and torch.save compresses nothing")
            end = data.rfind(_ARCHIVE_END) + _ARCHIVE_END_BYTES + len(archive.comment)
            if end != len(data):
                raise ValueError(f"it has {len(data)} bytes, {end} were expected: something follows its end")
            if damaged := archive.testzip():
                raise ValueError(
                    f"the checksum of {damaged} is another's; a file that was saved without checksums "
                    "(set_crc32_options) must be saved again with them"
                )
    # a damaged directory ends in almost any error
    except Exception as error:
        raise ValueError(f"is a damaged archive: {error}") from error


def _check_tensors(state: Any, size: int) -> None:
    if not isinstance(state, dict) or not state:
        raise ValueError(f"must hold a state dict, tensors by name, got {type(state).__name__}")
    others = [str(key) for key, value in state.items() if not isinstance(value, torch.Tensor)]
    if others or not all(isinstance(key, str) for key in state):
        raise ValueError(
            f"must hold a bare state dict, tensors by name; not tensors are {listed(others)}; take out the one that "
            "holds the weights and save it alone"
        )
    odd = [key for key, value in state.items() if value.layout != torch.strided or value.is_meta or value.is_quantized]
    # an expanded tensor could be of any size
    odd += [
        key
        for key, value in state.items()
        if key not in odd and value.numel() * value.element_size() > min(size, value.untyped_storage().nbytes())
    ]
    if odd:
        raise ValueError(f"must hold dense tensors with memory of their own, unlike {listed(odd)}")
