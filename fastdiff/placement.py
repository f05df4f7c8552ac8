"""Where a network runs and in which dtype: an explicit choice is met or refused, never replaced."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Iterator

import torch

from fastdiff.diffusion_model import DiffusionModel, Network, is_conditioned_apart

__all__ = [
    "DTYPES",
    "device_of",
    "dtype_of",
    "eval_mode",
    "placed",
    "preferred_dtype",
    "resolve_device",
    "resolve_dtype",
]

DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The torch device meant; None is a GPU if there is one. ValueError for one that is unknown or absent."""
    if str(device) in ("cpu", "cpu:0"):
        return torch.device("cpu")  # without waking a driver
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device is None and not gpus:
        return torch.device("cpu")
    device = "cuda" if device is None else device
    choices = ["cpu", *(["cuda"] if gpus else []), *(f"cuda:{i}" for i in range(gpus))]
    if str(device) not in choices:
        why = "" if gpus else ", torch sees no GPU"
        raise ValueError(f"device must be one of {choices} here{why}; got {str(device)!r}")
    # with its index, as tensors report it
    return torch.device("cuda", torch.cuda.current_device()) if str(device) == "cuda" else torch.device(device)


def device_of(model: DiffusionModel) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def resolve_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or (isinstance(dtype, torch.dtype) and dtype in DTYPES.values()):
        return dtype
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {sorted(DTYPES)}, got {dtype!r}")
    return DTYPES[name]


def preferred_dtype(model: DiffusionModel, device: torch.device) -> torch.dtype | None:
    """The recorded dtype; for a network of our protocol what suits the hardware; None for others, which stay."""
    if model.dtype is not None:
        return model.dtype
    if is_conditioned_apart(model.network):
        fast = device.type == "cuda" or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if fast else torch.float32
    return None


def dtype_of(model: DiffusionModel) -> torch.dtype:
    """Of the network's first floating-point parameter or buffer; float32 for functions."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def placed(network: Network, device: torch.device, dtype: torch.dtype | None, reuse: Network | None = None) -> Network:
    """The network itself where it fits device and dtype already, else a converted copy; functions are left alone.

    dtype: None leaves every parameter's own. reuse: an earlier copy, into whose memory the weights of today go.
    """
    if not isinstance(network, torch.nn.Module):
        return network
    tensors = [*network.parameters(), *network.buffers()]
    if all(p.device == device and (dtype in (None, p.dtype) or not p.is_floating_point()) for p in tensors):
        return network
    if isinstance(reuse, torch.nn.Module):
        old = [*reuse.parameters(), *reuse.buffers()]
        if [p.shape for p in old] == [p.shape for p in tensors]:
            for mine, now in zip(old, tensors, strict=True):
                mine.copy_(now)
            return reuse
    return copy.deepcopy(network).to(device, dtype)


# how many are sampling each module right now, and the mode it goes back to after the last of them
_sampled: dict[torch.nn.Module, tuple[int, bool]] = {}
_sampled_lock = threading.Lock()


@contextlib.contextmanager
def eval_mode(network: object) -> Iterator[None]:
    """Dropout off while anybody samples the network; every submodule gets its own mode back after the last of them."""
    modules = list(network.modules()) if isinstance(network, torch.nn.Module) else []
    with _sampled_lock:
        for module in modules:
            users, mode = _sampled.get(module, (0, module.training))
            _sampled[module] = users + 1, mode
            module.training = False
    try:
        yield
    finally:
        with _sampled_lock:
            for module in modules:
                users, mode = _sampled.pop(module)
                if users > 1:
                    _sampled[module] = users - 1, mode
                else:
                    module.training = mode
