"""What `fastdiff doctor` looks at: the software, the hardware, and a sample drawn on it."""

from __future__ import annotations

import importlib
import platform
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import fastdiff

__all__ = ["Finding", "examine"]


@dataclass(frozen=True)
class Finding:
    """One line of the report; ok is False where sampling would fail."""

    name: str
    text: str
    ok: bool = True


def examine(model: str = "digits", device: str | None = None) -> Iterator[Finding]:
    """The findings one by one, the cheap ones first. Whatever is broken becomes a finding, never an exception."""
    yield Finding("fastdiff", fastdiff.__version__)
    yield Finding("python", f"{platform.python_version()} on {platform.platform()}")
    looks: list[tuple[str, Callable[[], str], bool]] = [
        ("torch", lambda: _version("torch"), True),
        ("numpy", lambda: _version("numpy"), True),
        ("triton", _triton, False),
        ("cpu", _cpu, True),
        ("gpu", _gpu, False),
        ("kernels", _kernels, True),
        ("device", lambda: _device(device), True),
        ("model", lambda: _model(model), True),
        ("dtype", lambda: _dtype(model, device), True),
        ("sample", lambda: _sample(model, device), True),
    ]
    said: set[str] = set()
    for name, look, needed in looks:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                text, ok = look(), True
            # a broken installation fails in ways of its own
            except Exception as error:
                text, ok = f"{type(error).__name__}: {error}", not needed
        fresh = sorted({str(warning.message) for warning in caught} - said)
        said.update(fresh)
        yield Finding(name, " ".join("; warning: ".join([text, *fresh]).split()), ok)


def _version(module: str) -> str:
    return str(importlib.import_module(module).__version__)


def _triton() -> str:
    try:
        return _version("triton")
    except ImportError:
        return "absent; a GPU runs the slower reference kernels"


def _cpu() -> str:
    import torch

    features = [
        name
        for name, found in (
            ("AMX", torch.cpu._is_amx_tile_supported()),
            ("avx512_bf16", torch.cpu._is_avx512_bf16_supported()),
        )
        if found
    ]
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{capability}, {' and '.join(features) or 'no AMX or avx512_bf16'}, {torch.get_num_threads()} threads"


def _gpu() -> str:
    import torch

    if torch.cuda.is_available():
        found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        return "; ".join(f"cuda:{i} {p.name}, {p.total_memory / 2**30:.0f} GiB" for i, p in enumerate(found))
    if torch.version.cuda or torch.version.hip:
        return "none that torch can use"
    return "none: this torch is built for the CPU only"


def _kernels() -> str:
    import fastdiff_kernels
    from fastdiff_kernels._impl import HAS_TRITON

    on_gpu = "Triton on a GPU, reference (PyTorch) elsewhere" if HAS_TRITON else "reference (PyTorch): no Triton"
    return f"fastdiff_kernels {fastdiff_kernels.__version__}, {on_gpu}"


def _device(device: str | None) -> str:
    from fastdiff.placement import resolve_device

    return f"{resolve_device(device)} ({'chosen by hand' if device else 'chosen by itself'})"


def _model(model: str) -> str:
    from fastdiff.checkpoint import info

    facts = info(model)
    name = facts["config"]["name"] or model
    return f"{name}: {facts['parameters']:,} parameters, sha256 {facts['sha256'][:12]} verified"


def _dtype(model: str, device: str | None) -> str:
    import torch

    from fastdiff.placement import dtype_of, preferred_dtype, resolve_device

    loaded, place = fastdiff.load(model), resolve_device(device)
    dtype = preferred_dtype(loaded, place) or dtype_of(loaded)
    if loaded.dtype is not None:
        why = "the model records it"
    elif dtype == torch.bfloat16:
        why = "the GPU is made for it" if place.type == "cuda" else "this CPU has AMX"
    else:
        why = "this CPU has no AMX for bfloat16"
    return f"{str(dtype).removeprefix('torch.')}: {why}"


def _sample(model: str, device: str | None) -> str:
    import torch

    sampler = fastdiff.Sampler(model, steps=1, device=device, check_finite=True)
    shapes = getattr(sampler.model.network, "extra_shapes", {})
    extra = {name: torch.zeros(1, *shape) for name, shape in shapes.items()}
    image = sampler(None if sampler.model.num_classes is None else 0, seed=0, extra=extra or None)
    return f"one step gave a finite image of {'x'.join(map(str, image.shape[1:]))}"
