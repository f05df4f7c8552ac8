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
    if value.layout is not torch.strided:
        raise ValueError(f"{name} must be dense, got layout {value.layout}; use {name}.to_dense()")


def check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")


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
    if tensor.is_neg():
        raise ValueError(f"{name} is written in place and must not be negated by a flag; use {name}.resolve_neg()")
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(f"{name} is written in place, and an inference tensor: call inside torch.inference_mode()")
    span = 1
    for stride, size in sorted(dims):
        if size > 1 and stride < span:
            raise ValueError(f"{name} is written in place and must not overlap itself, got strides {tensor.stride()}")
        span += stride * max(size - 1, 0)


def check_apart(**written: Tensor | None) -> None:
    """Refuses two buffers that begin at the same address"""
    if torch.compiler.is_compiling():
        return
    first: dict[int, str] = {}
    for name, tensor in written.items():
        if type(tensor) is Tensor and not tensor.is_meta and tensor.numel():
            other = first.setdefault(tensor.data_ptr(), name)
            if other != name:
                raise ValueError(f"{name} must not overlap {other}: both are written")


def check_pixels(name: str, images: Tensor) -> None:
    height, width = images.shape[2:]
    if height * width >= MAX_PIXELS:
        raise ValueError(f"{name} must have fewer than 2^30 pixels an image, got {height} x {width}")


def check_resample(resample: object) -> None:
    if resample not in RESAMPLES:
        raise ValueError(f"resample must be one of {', '.join(map(repr, RESAMPLES))}, got {resample!r}")
