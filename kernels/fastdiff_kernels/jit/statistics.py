"""Statistics of chunks of pixels, and their fold into the moments of each group"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._plan import Plan
from .._tuning import channel_block, num_chunks, power_of_two, settings
from .tile import address, addresses, flat, merge, pixel_offset, tile_statistics, vector, wide

# 16 a thread: with 8 ptxas settles on so few registers that it spills
FOLD_PER_WARP = 512


@triton.jit
def _statistics_kernel(
    x_ptr, x_stride_b, x_stride_h, x_stride_w, x_stride_c,
    stats_ptr, B, HW, W, CHUNKS,
    C: tl.constexpr, FLAT: tl.constexpr, VEC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """stats[0], stats[1] = mean and M2 of each channel over each chunk of pixels

    Layout:    x (B, C, H, W), strides in vectors; stats (2, B, CHUNKS, C) fp32; chunk k is the row-major pixels
               [k P, min((k + 1) P, HW)), P = ceil(HW / CHUNKS).
    Program:   (b, chunk, channel block), channel blocks fastest
    Precision: fp32, two passes over a tile in registers, tiles merged by Chan's formula
    Traffic:   1 read
    Reference: reference.chunk_statistics
    """
    BLOCKS_C: tl.constexpr = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    chunk = (pid // BLOCKS_C) % CHUNKS
    n = (pid // BLOCKS_C // CHUNKS).to(tl.int64)
    c = (pid % BLOCKS_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    P = tl.cdiv(HW, CHUNKS)
    end = tl.minimum((chunk + 1) * P, HW)
    x_ptr += n * x_stride_b * VEC
    count = tl.zeros((), tl.float32)
    mean = tl.zeros((BLOCK_C,), tl.float32)
    m2 = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(chunk * P, end, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        mask_p = p < end
        offset = pixel_offset(p, W, x_stride_h, x_stride_w, FLAT, VEC)
        x = tl.load(addresses(x_ptr, offset, c, x_stride_c), mask_p[:, None] & (c < C)[None, :], 0.0).to(tl.float32)
        count_t = tl.minimum(end - start, BLOCK_P).to(tl.float32)
        mean_t, m2_t = tile_statistics(x, mask_p, count_t)
        count, mean, m2 = merge(count, mean, m2, count_t, mean_t, m2_t)
    tl.store(stats_ptr + (n * CHUNKS + chunk) * C + c, mean, c < C)
    tl.store(stats_ptr + ((n + B) * CHUNKS + chunk) * C + c, m2, c < C)


@triton.jit
def _partial_sum(
    stats_ptr, x_bias_ptr, n, B, HW, CHUNKS, group, pivot,
    C: tl.constexpr, C_START: tl.constexpr, CPG: tl.constexpr, M2: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Over one tensor's chunks and its channels in a group: sum of count * (mean - pivot), or of M2 about the pivot"""
    P = tl.cdiv(HW, CHUNKS)
    total = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    for first in range(0, CPG, BLOCK_C):
        lane = first + tl.arange(0, BLOCK_C)
        c = group * CPG + lane
        mask_c = (lane < CPG) & (c >= C_START) & (c < C_START + C)
        x_bias = tl.zeros((BLOCK_C,), tl.float32)
        if x_bias_ptr is not None:
            x_bias = tl.load(x_bias_ptr + c, mask_c, 0.0).to(tl.float32)
        for start in range(0, CHUNKS, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            count = tl.maximum(tl.minimum(HW - k * P, P), 0).to(tl.float32)
            mask = (count > 0)[:, None] & mask_c[None, :]
            at = ((n * CHUNKS + k) * C)[:, None] + (c - C_START)[None, :]
            delta = tl.where(mask, tl.load(stats_ptr + at, mask, 0.0) + x_bias[None, :] - pivot, 0.0)
            if M2:
                at = (((n + B) * CHUNKS + k) * C)[:, None] + (c - C_START)[None, :]
                total += tl.load(stats_ptr + at, mask, 0.0) + count[:, None] * delta * delta
            else:
                total += count[:, None] * delta
    return tl.sum(tl.sum(total, 1), 0)


@triton.jit
def _fold_kernel(
    stats_ptr, CHUNKS, stats2_ptr, CHUNKS2, x_bias_ptr, moments_ptr, B, HW, eps,
    C1: tl.constexpr, C2: tl.constexpr, CPG: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """moments[0], moments[1] = mean and 1 / sqrt(var + eps) of each group of x + x_bias

    Layout:    stats (2, B, CHUNKS, C1), stats2 (2, B, CHUNKS2, C2) of a second tensor; moments (2, B, GROUPS) fp32.
    Program:   (b, group)
    Precision: fp32; Chan's formula for all parts at once, about a pivot so that a large mean loses nothing
    Traffic:   the statistics, twice, the second time from the cache
    Reference: reference.group_moments
    """
    GROUPS: tl.constexpr = (C1 + C2) // CPG
    group = tl.program_id(0) % GROUPS
    n = (tl.program_id(0) // GROUPS).to(tl.int64)
    first = group * CPG
    pivot = tl.load(stats_ptr + n * CHUNKS * C1 + tl.minimum(first, C1 - 1))
    if C2 > 0 and first >= C1:
        pivot = tl.load(stats2_ptr + n * CHUNKS2 * C2 + first - C1)
    if x_bias_ptr is not None:
        pivot += tl.load(x_bias_ptr + first).to(tl.float32)
    size = HW * (CPG * 1.0)
    total = _partial_sum(stats_ptr, x_bias_ptr, n, B, HW, CHUNKS, group, pivot, C1, 0, CPG, False, BLOCK_K, BLOCK_C)
    if C2 > 0:
        total += _partial_sum(
            stats2_ptr, x_bias_ptr, n, B, HW, CHUNKS2, group, pivot, C2, C1, CPG, False, BLOCK_K, BLOCK_C
        )
    mean = pivot + total / size
    m2 = _partial_sum(stats_ptr, x_bias_ptr, n, B, HW, CHUNKS, group, mean, C1, 0, CPG, True, BLOCK_K, BLOCK_C)
    if C2 > 0:
        m2 += _partial_sum(stats2_ptr, x_bias_ptr, n, B, HW, CHUNKS2, group, mean, C2, C1, CPG, True, BLOCK_K, BLOCK_C)
    tl.store(moments_ptr + n * GROUPS + group, mean)
    tl.store(moments_ptr + (n + B) * GROUPS + group, 1.0 / tl.sqrt_rn(m2 / size + eps))


def new_statistics(x: Tensor) -> Tensor:
    b, c, height, width = x.shape
    return torch.empty((2, b, num_chunks(height * width), c), dtype=torch.float32, device=x.device)


def plan_statistics(x: Tensor, stats: Tensor) -> Plan:
    """stats (2, B, CHUNKS, C) fp32 of x, any number of chunks"""
    b, c, height, width = x.shape
    vec, chunks = vector(x), stats.shape[2]
    rule = {"BLOCK_P": 64, "BLOCK_C": channel_block(c, chunks), "num_warps": 4 if wide(vec, x) else 8}
    s = settings("statistics", x.device, b, c, height * width, x.dtype, **rule)
    return Plan(
        kernel=_statistics_kernel,
        grid=(b * chunks * triton.cdiv(c, s["BLOCK_C"]),),
        args={**address("x", x, vec), "stats_ptr": stats, "B": b, "HW": height * width, "W": width, "CHUNKS": chunks},
        constexprs={"C": c, "FLAT": flat(x), "VEC": vec, "BLOCK_P": s["BLOCK_P"], "BLOCK_C": s["BLOCK_C"]},
        num_warps=s["num_warps"],
    )


def fold_block(chunks: int, per_group: int) -> dict[str, int]:
    """Chunks and channels of a tile of at most 1,024 partial statistics"""
    block_c = min(1024, power_of_two(per_group))
    return {"BLOCK_K": max(1, min(power_of_two(chunks), 1024 // block_c)), "BLOCK_C": block_c}


def plan_fold(
    stats: Tensor, stats2: Tensor | None, x_bias: Tensor | None, moments: Tensor, pixels: int, eps: float
) -> Plan:
    """moments (2, B, groups) fp32 from the statistics of one or two tensors"""
    b, groups = moments.shape[1:]
    c1, c2 = stats.shape[3], 0 if stats2 is None else stats2.shape[3]
    per_group = (c1 + c2) // groups
    tile = fold_block(stats.shape[2] if stats2 is None else max(stats.shape[2], stats2.shape[2]), per_group)
    return Plan(
        kernel=_fold_kernel,
        grid=(b * groups,),
        args={
            **{"stats_ptr": stats, "CHUNKS": stats.shape[2]},
            **{"stats2_ptr": stats2, "CHUNKS2": None if stats2 is None else stats2.shape[2]},
            **{"x_bias_ptr": x_bias, "moments_ptr": moments, "B": b, "HW": pixels, "eps": eps},
        },
        constexprs={
            **{"C1": c1, "C2": c2, "CPG": per_group},
            **tile,
        },
        num_warps=max(1, tile["BLOCK_K"] * tile["BLOCK_C"] // FOLD_PER_WARP),
    )
