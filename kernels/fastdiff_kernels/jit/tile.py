"""What the kernels over (pixels, channels) tiles share: addresses, masks, statistics; and their plans' arguments"""

import math

import triton
import triton.language as tl
from torch import Tensor

from .._plan import ALIGNMENT, address_of


@triton.jit
def pixel_offset(p, W, stride_h, stride_w, FLAT: tl.constexpr, VEC: tl.constexpr):
    """int64 offset in elements of row-major pixels p; FLAT: rows follow one another without a gap"""
    if FLAT:
        return p.to(tl.int64) * stride_w * VEC
    return ((p // W).to(tl.int64) * stride_h + (p % W).to(tl.int64) * stride_w) * VEC


@triton.jit
def grid_offset(h, w, stride_h, stride_w, VEC: tl.constexpr):
    return (h.to(tl.int64) * stride_h + w.to(tl.int64) * stride_w) * VEC


@triton.jit
def addresses(ptr, pixels, c, stride_c):
    """(P, C) addresses of pixel offsets (P,) and channels (C,)"""
    return ptr + pixels[:, None] + (c.to(tl.int64) * stride_c)[None, :]


@triton.jit
def merge(count, mean, m2, count_2, mean_2, m2_2):
    """Chan, Golub & LeVeque 1979: count, mean and M2 of two parts together; count_2 must not be 0"""
    total = count + count_2
    delta = mean_2 - mean
    share = count_2 / total
    # from the right: delta^2 alone overflows from 1e19 on, and the first part's count is 0
    return total, mean + delta * share, m2 + m2_2 + delta * (delta * (count * share))


@triton.jit
def tile_statistics(x, mask_p, count):
    """Mean and M2 of each column over the rows that mask_p (P,) lets through, by two passes over registers"""
    mean = tl.sum(tl.where(mask_p[:, None], x, 0.0), 0) / count
    # masked before the square: a lane outside would add mean^2
    d = tl.where(mask_p[:, None], x - mean[None, :], 0.0)
    # the mean of the deviations is what rounding left of a large one
    rest = tl.sum(d, 0) / count
    d = tl.where(mask_p[:, None], d - rest[None, :], 0.0)
    return mean + rest, tl.sum(d * d, 0)


@triton.jit
def silu(u):
    return u / (1.0 + tl.exp(-u))


def vector(*tensors: Tensor | None) -> int:
    """Elements of the widest access, at most 16 bytes, that every stride of these tensors keeps aligned

    Kernels take strides in units of it: so Triton knows the alignment from the multiplication.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    vec = min(ALIGNMENT // tensor.element_size() for tensor in given)
    return math.gcd(vec, *(tensor.stride(dim) for tensor in given for dim in (0, 2, 3)))


def wide(vec: int, *tensors: Tensor | None) -> bool:
    """Whether accesses along channels can be 16 bytes; where not, a thread holds an address for every few elements"""
    return all(
        t is None or (t.stride(1) == 1 and vec * t.element_size() >= ALIGNMENT and address_of(t) % ALIGNMENT == 0)
        for t in tensors
    )


def flat(*tensors: Tensor | None) -> bool:
    """Whether the pixels of each image lie at one stride"""
    return all(t is None or t.shape[2] <= 1 or t.stride(2) == t.shape[3] * t.stride(3) for t in tensors)


def address(name: str, tensor: Tensor | None, vec: int) -> dict[str, Tensor | int | None]:
    """Kernel arguments <name>_ptr and <name>_stride_b, _h, _w in units of vec, _c in elements"""
    strides = (None,) * 4 if tensor is None else tensor.stride()
    in_vec = {dim: s if s is None else s // vec for dim, s in zip("bchw", strides, strict=True) if dim != "c"}
    return {
        f"{name}_ptr": tensor,
        **{f"{name}_stride_{dim}": in_vec[dim] for dim in "bhw"},
        f"{name}_stride_c": strides[1],
    }
