"""Philox4x32-10 and Box-Muller, and the launches of philox_uint32 and philox_normal"""

import math

import triton
import triton.language as tl
from torch import Tensor

from .._plan import Plan

HALF_PI = tl.constexpr(math.pi / 2)


@triton.jit
def philox_words(index, draw, stream, seed):
    """Four uint32 words of counter (index, draw, stream, 0): index uint32 tensor; draw, seed int64; stream int

    Every counter word is 32 bits wide: an int64 one would silently select Philox4x64.
    Reference: reference.philox4x32
    """
    zero = index * 0
    return tl.philox(seed, index, zero + draw.to(tl.uint32), (zero + stream).to(tl.uint32), zero)


@triton.jit
def _radius(word):
    """sqrt(-2 ln u), u = (m + 0.5) * 2^-24, m the upper 24 bits of word"""
    m = word >> 8
    # m + 0.5 is exact in fp32 below 2^23 only; above, v = 1 - u is
    upper = m >= 0x800000
    v = (tl.where(upper, 0xFFFFFF - m, m).to(tl.float32) + 0.5) * (2.0**-24)
    # -ln(1 - v) = 2 artanh(s): eight terms reach fp32 for s <= 1/3, and keep the digits as v nears 0
    s = v / (2.0 - v)
    s2 = s * s
    tail = 1 / 7 + s2 * (1 / 9 + s2 * (1 / 11 + s2 * (1 / 13 + s2 * (1 / 15))))
    near_one = 2.0 * s * (1.0 + s2 * (1 / 3 + s2 * (1 / 5 + s2 * tail)))
    return tl.sqrt(2.0 * tl.where(upper, near_one, -tl.log(v)))


@triton.jit
def _cos_sin(word):
    """cos and sin of u turns, u = (m + 0.5) * 2^-24: the nearest quarter turn and a polynomial

    tl.cos and tl.sin lower to a slow path that spills. Reference: reference._cos_sin
    """
    m = (word >> 8).to(tl.int32)
    q = (m + 0x200000) >> 22
    a = ((m - (q << 22)).to(tl.float32) + 0.5) * (2.0**-22) * HALF_PI
    s = a * a
    sin = a * (1.0 + s * (-1 / 6 + s * (1 / 120 + s * (-1 / 5040 + s * (1 / 362880)))))
    cos = 1.0 + s * (-1 / 2 + s * (1 / 24 + s * (-1 / 720 + s * (1 / 40320 + s * (-1 / 3628800)))))
    odd = (q & 1) == 1
    flip_cos = ((q + 1) & 2) != 0
    flip_sin = (q & 2) != 0
    c = tl.where(odd, sin, cos)
    s = tl.where(odd, cos, sin)
    return tl.where(flip_cos, -c, c), tl.where(flip_sin, -s, s)


@triton.jit
def quad(a, b, c, d):
    """(..., 4) of four tensors (...): what word 0, 1, 2, 3 of a counter became"""
    pairs = tl.join(tl.join(a, c), tl.join(b, d))
    return pairs.reshape(a.shape + [4])


@triton.jit
def normals(index, draw, stream, seed):
    """fp32 (..., 4) of standard normals for counters index (...)"""
    w0, w1, w2, w3 = philox_words(index, draw, stream, seed)
    cos_1, sin_1 = _cos_sin(w1)
    cos_3, sin_3 = _cos_sin(w3)
    r_0 = _radius(w0)
    r_2 = _radius(w2)
    return quad(r_0 * cos_1, r_0 * sin_1, r_2 * cos_3, r_2 * sin_3)


@triton.jit
def element_normals(element, draw, stream, seed):
    """fp32 normals of int64 elements (...), each drawn alone: for tiles that own no whole counters, 4 calls for 1"""
    w0, w1, w2, w3 = philox_words((element >> 2).to(tl.uint32), draw, stream, seed)
    late = (element & 2) != 0
    cos, sin = _cos_sin(tl.where(late, w3, w1))
    return _radius(tl.where(late, w2, w0)) * tl.where((element & 1) != 0, sin, cos)


@triton.jit
def _philox_kernel(
    seeds_ptr, seeds_stride, draw_ptr, draw_value, out_ptr, stream_id, count,
    NORMAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[n, 4 i + j] = word j of counter (i, draw, stream_id, 0) under seeds[n], or the normal it gives

    Layout:    seeds int64 (N,); draw int64 (1,) or draw_value; out (N, count) row-major, int64 or a float.
    Program:   (n, BLOCK counters), 4 * BLOCK elements
    Precision: fp32, one rounding at the store
    Traffic:   1 write
    Reference: reference.philox_uint32, reference.philox_normal
    """
    blocks = tl.cdiv(count, 4 * BLOCK)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    start = (tl.program_id(0) % blocks) * BLOCK
    seed = tl.load(seeds_ptr + n * seeds_stride)
    if draw_ptr is not None:
        draw = tl.load(draw_ptr)
    else:
        draw = tl.zeros((), tl.int64) + draw_value
    index = (start + tl.arange(0, BLOCK)).to(tl.uint32)
    if NORMAL:
        values = normals(index, draw, stream_id, seed)
    else:
        w0, w1, w2, w3 = philox_words(index, draw, stream_id, seed)
        values = quad(w0, w1, w2, w3)
    element = start.to(tl.int64) * 4 + tl.arange(0, 4 * BLOCK)
    values = values.reshape(4 * BLOCK).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + n * count + element, values, mask=element < count)


def plan_philox(seeds: Tensor, draw: Tensor | int, stream: int, out: Tensor) -> Plan:
    """out (N, ...) row-major: int64 for words, a float for normals"""
    count = out[0].numel() if len(out) else 0
    # 16 bytes a thread of 4 warps, whatever a thread's element
    block = 256 if out.element_size() >= 4 else 512
    return Plan(
        kernel=_philox_kernel,
        grid=(len(seeds) * triton.cdiv(count, 4 * block),),
        args={
            "seeds_ptr": seeds,
            "seeds_stride": seeds.stride(0),
            "draw_ptr": draw if isinstance(draw, Tensor) else None,
            "draw_value": None if isinstance(draw, Tensor) else draw,
            "out_ptr": out,
            # a launch takes a parameter named stream for an option of its own
            "stream_id": stream,
            "count": count,
        },
        constexprs={"NORMAL": out.is_floating_point(), "BLOCK": block},
    )
