"""Inputs in files, and what they say to a reader that shares nothing with fastdiff's"""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from fastdiff import checkpoint

from .. import checkpoints

Files = dict[str, bytes]
State = dict[str, torch.Tensor]

# a name of safetensors, and torch's
_DTYPES = {
    **{
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "C64": torch.complex64,
    },
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    **{"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "BOOL": torch.bool, "C64": torch.complex64},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}


@functools.cache
def scratch() -> Path:
    """A folder in memory where there is one, gone at the end"""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    owner = os.getpid()
    atexit.register(lambda: shutil.rmtree(folder, ignore_errors=True) if os.getpid() == owner else None)
    return folder


def placed(files: Files) -> Path:
    """The files, alone in a folder"""
    folder = scratch() / "case"
    shutil.rmtree(folder, ignore_errors=True)
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def exact(tree: Any) -> str:
    """Equal for trees whose keys, values and types of values are: 1, 1.0 and True are three"""
    return json.dumps(tree, sort_keys=True)


def header_told(data: bytes) -> tuple[dict[str, Any], bytes]:
    """What safetensors say of each tensor, read without the library, and the bytes that follow"""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        assert len(dict(pairs)) == len(pairs), "a key occurs twice"
        return dict(pairs)

    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size], object_pairs_hook=unique)
    header.pop("__metadata__", None)
    return header, data[8 + size :]


def told(data: bytes) -> State:
    """The tensors that safetensors say, read without the library"""
    header, body = header_told(data)
    state = {}
    for key, fields in header.items():
        begin, end = fields["data_offsets"]
        dtype = _DTYPES[fields["dtype"]]
        flat = torch.frombuffer(bytearray(body[begin:end]), dtype=dtype) if end > begin else torch.empty(0, dtype=dtype)
        state[key] = flat.reshape(fields["shape"])
    return state


def assert_same_state(found: State, expected: State) -> None:
    assert found.keys() == expected.keys(), f"keys {sorted(found.keys() ^ expected.keys())[:5]}"
    for key, value in expected.items():
        assert found[key].shape == value.shape, f"{key} is {tuple(found[key].shape)} and not {tuple(value.shape)}"
        # by bits where it may: NaN is NaN
        same = found[key].to(value.dtype)
        assert torch.equal(same, value) or torch.allclose(same, value, rtol=0, atol=0, equal_nan=True), f"{key} differs"


def files_of(model: Any) -> Files:
    folder = scratch() / "saved"
    shutil.rmtree(folder, ignore_errors=True)
    return checkpoints.files(checkpoint.save(model, folder))


def weights_in(files: Files) -> str:
    return next(name for name in files if name.endswith(".safetensors"))
