"""Shape, dtype and device checks shared by the public ops; none of them reads device data"""

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
RESAMPLES = (None, "down", "up")
MAX_PIXELS = 1 << 30  # kernels count the pixels of an image in 32 bits


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def check_shape(name: str, tensor: Tensor, shape: Sequence[int | str], why: str = "") -> None:
    """Integers must match; a string names a free size"""
    check_tensor(name, tensor)
    same = tensor.dim() == len(shape) and all(
        isinstance(want, str) or want == got for want, got in zip(shape, tensor.shape, strict=True)
    )
    if not same:
        wanted = ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "")
        raise ValueError(f"{name} must have shape ({wanted}), got {tuple(tensor.shape)}{why and '; ' + why}")


def check_dtype(name: str, tensor: Tensor, allowed: Sequence[torch.dtype], why: str = "") -> None:
    check_tensor(name, tensor)
    if tensor.dtype not in allowed:
        wanted = " or ".join(str(dtype) for dtype in dict.fromkeys(allowed))
        raise TypeError(f"{name} must be {wanted}, got {tensor.dtype}; {why or f'convert it with {name}.to(dtype)'}")


def check_device(name: str, tensor: Tensor, device: torch.device, like: str = "x") -> None:
    check_tensor(name, tensor)
    if tensor.device != device:
        raise ValueError(
            f"{name} must be on the device of {like}, {device}, got {tensor.device}; use {name}.to(device)"
        )


def check_int(name: str, value: object, low: int, high: int | None = None) -> None:
    """low <= value < high"""
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < low or (high is not None and value >= high):
        wanted = f"at least {low}" if high is None else f"in [{low}, {high})"
        raise ValueError(f"{name} must be {wanted}, got {value}")


def check_writable(name: str, tensor: Tensor) -> None:
    """Refuses a view whose elements share memory: what is written there would depend on the order"""
    dims = list(zip(tensor.stride(), tensor.shape, strict=True))
    if any(stride == 0 and size > 1 for stride, size in dims):
        raise ValueError(f"{name} is written in place and must not be expanded, got strides {tensor.stride()}")
    if torch.compiler.is_compiling():  # sizes that are free cannot be sorted
        return
    span = 1
    for stride, size in sorted(dims):
        if size > 1 and stride < span:
            raise ValueError(f"{name} is written in place and must not overlap itself, got strides {tensor.stride()}")
        span += stride * max(size - 1, 0)


def check_pixels(name: str, images: Tensor) -> None:
    height, width = images.shape[2:]
    if height * width >= MAX_PIXELS:
        raise ValueError(f"{name} must have fewer than 2^30 pixels an image, got {height} x {width}")


def check_resample(resample: object) -> None:
    if resample not in RESAMPLES:
        raise ValueError(f"resample must be one of {', '.join(map(repr, RESAMPLES))}, got {resample!r}")
