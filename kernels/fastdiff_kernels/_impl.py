"""Which implementation runs: Triton kernels or the reference; and whether a call must go through torch.library"""

import importlib.util
import os
import warnings

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from . import _plan

IMPLS = ("auto", "triton", "reference")
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# found, not imported
HAS_TRITON = importlib.util.find_spec("triton") is not None
# Triton's interpreter runs kernels on tensors of the CPU; triton reads the variable once, too
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def check_impl(impl: str, x: Tensor, name: str = "x", dtypes: tuple[torch.dtype, ...] = TRITON_DTYPES) -> None:
    """ValueError for an impl that is unknown, or asked for and impossible: what was chosen never falls back"""
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(map(repr, IMPLS))}, got {impl!r}")
    if impl != "triton":
        return
    if not HAS_TRITON:
        raise ValueError("impl='triton' needs the triton package, which is not installed; use impl='reference'")
    if x.dtype not in dtypes:
        raise ValueError(
            f"impl='triton' needs {name} to be {' or '.join(map(str, dtypes))}, got {x.dtype}; use impl='reference'"
        )
    if not (x.is_cuda or INTERPRETED):
        raise ValueError(f"impl='triton' needs {name} on a CUDA device, got {x.device}; use impl='reference'")


def uses_triton(impl: str, x: Tensor, dtypes: tuple[torch.dtype, ...] = TRITON_DTYPES) -> bool:
    """Decides for an impl that check_impl let pass

    On the meta device "auto" is what it would be on a GPU while somebody observes plans, who then sees every launch.
    """
    if impl != "auto":
        return impl == "triton"
    if x.is_meta:
        return bool(_plan.observers) and x.dtype in dtypes and HAS_TRITON
    return x.is_cuda and x.dtype in dtypes and _triton_or_warn()


def _triton_or_warn() -> bool:
    if not HAS_TRITON:
        warnings.warn("triton is not installed: fastdiff_kernels runs its slower reference on the GPU", stacklevel=4)
    return HAS_TRITON


def plain(*tensors: Tensor | None) -> bool:
    """True where the launcher can be called directly: nothing traces, no derivative is asked for, memory is as it looks

    An op called through torch.library costs tens of microseconds more.
    """
    if torch.compiler.is_compiling():
        return False
    given = [tensor for tensor in tensors if tensor is not None]
    # a launch, and an op of torch.library, would drop tangents without a word
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in given):
        raise NotImplementedError("there is no forward-mode derivative; the functions in reference.py have one")
    # z.conj().imag is negative by a flag alone, which torch.library resolves
    if any(tensor.is_neg() for tensor in given):
        return False
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        return False
    return all(type(tensor) in (Tensor, Parameter) for tensor in given)
