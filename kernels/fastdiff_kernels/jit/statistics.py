"""Statistics of chunks of pixels, and their merge into the moments of groups"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._plan import Plan
from .._tuning import channel_block, num_chunks, power_of_two, settings
from .tile import address, addresses, flat, merge, pixel_offset, tile_statistics, vector

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
def _load_part(
    stats_ptr, n, B, k, count, CHUNKS, c, mask_c, C: tl.constexpr,
):  # fmt: skip
    """Mean, M2 and number of pixels (K, G, L) of chunks k (K,) of channels c (G, L); zeros where there are none"""
    mask = (count > 0)[:, None, None] & mask_c[None, :, :]
    mean = tl.load(stats_ptr + ((n * CHUNKS + k) * C)[:, None, None] + c[None, :, :], mask, 0.0)
    m2 = tl.load(stats_ptr + (((n + B) * CHUNKS + k) * C)[:, None, None] + c[None, :, :], mask, 0.0)
    return mean, m2, tl.where(mask, count[:, None, None], 0.0)


@triton.jit
def _chunk_sizes(k, HW, CHUNKS):
    P = tl.cdiv(HW, CHUNKS)
    return tl.maximum(tl.minimum(HW - k * P, P), 0).to(tl.float32)


@triton.jit
def _over_group(v):
    """(G,) of (K, G, L)"""
    return tl.sum(tl.sum(v, 0), 1)


@triton.jit
def merged_moments(
    stats_ptr, CHUNKS, stats2_ptr, CHUNKS2, x_bias_ptr, n, B, n2, B2, HW, eps, first, end,
    C1: tl.constexpr, C2: tl.constexpr, CPG: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / sqrt(var + eps) (G,) of x + x_bias, of groups first + (0, ..., G - 1) that begin before channel end

    Layout:    stats (2, B, CHUNKS, C1) fp32, stats2 (2, B2, CHUNKS2, C2) of a second tensor, whose row n2 belongs to n
    Precision: fp32; a tile by two passes over registers so that a large mean loses nothing, tiles by Chan's formula
    Traffic:   the statistics of these groups once
    Reference: reference.group_moments
    """
    group = first + tl.arange(0, BLOCK_G)
    size = tl.zeros((BLOCK_G,), tl.float32)
    mean = tl.zeros((BLOCK_G,), tl.float32)
    m2 = tl.zeros((BLOCK_G,), tl.float32)
    chunks = CHUNKS
    if C2 > 0:
        chunks = tl.maximum(CHUNKS, CHUNKS2)
    for first_lane in range(0, CPG, BLOCK_L):
        lane = first_lane + tl.arange(0, BLOCK_L)
        c = group[:, None] * CPG + lane[None, :]
        mask_c = (lane < CPG)[None, :] & (group * CPG < end)[:, None]
        if x_bias_ptr is not None:
            x_bias = tl.load(x_bias_ptr + c, mask_c, 0.0).to(tl.float32)
        for start in range(0, chunks, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            part, part_m2, count = _load_part(
                stats_ptr, n, B, k, _chunk_sizes(k, HW, CHUNKS), CHUNKS, c, mask_c & (c < C1), C1
            )
            if C2 > 0:
                # zeros where the other is
                part_2, m2_2, count_2 = _load_part(
                    stats2_ptr, n2, B2, k, _chunk_sizes(k, HW, CHUNKS2), CHUNKS2, c - C1, mask_c & (c >= C1), C2
                )
                part, part_m2, count = part + part_2, part_m2 + m2_2, count + count_2
            if x_bias_ptr is not None:
                part += x_bias[None, :, :]
            # a tile can have no chunk of a group: 1 stands for no pixels
            size_t = _over_group(count)
            whole = tl.maximum(size_t, 1.0)
            part = tl.where(count > 0, part, 0.0)
            mean_t = _over_group(count * part) / whole
            deviation = tl.where(count > 0, part - mean_t[None, :, None], 0.0)
            # the sum of the deviations is what rounding left of a large mean
            rest = _over_group(count * deviation) / whole
            deviation = tl.where(count > 0, deviation - rest[None, :, None], 0.0)
            m2_t = _over_group(part_m2 + count * deviation * deviation)
            share = size_t / tl.maximum(size + size_t, 1.0)
            delta = mean_t + rest - mean
            mean += delta * share
            m2 += m2_t + delta * (delta * (size * share))
            size += size_t
    return mean, 1.0 / tl.sqrt_rn(m2 / tl.maximum(size, 1.0) + eps)


def new_statistics(x: Tensor) -> Tensor:
    b, c, height, width = x.shape
    return torch.empty((2, b, num_chunks(height * width), c), dtype=torch.float32, device=x.device)


def plan_statistics(x: Tensor, stats: Tensor) -> Plan:
    """stats (2, B, CHUNKS, C) fp32 of x, any number of chunks"""
    b, c, height, width = x.shape
    vec, chunks = vector(x), stats.shape[2]
    block_c = channel_block(c, chunks)
    block_p = min(power_of_two(triton.cdiv(height * width, chunks)), 4096 // block_c)
    # 16 bytes for each of 64 threads
    rule = {"BLOCK_P": block_p, "BLOCK_C": block_c, "num_warps": max(1, min(8, block_p * block_c // 512))}
    s = settings("statistics", x.device, b, c, height * width, x.dtype, **rule)
    return Plan(
        kernel=_statistics_kernel,
        grid=(b * chunks * triton.cdiv(c, s["BLOCK_C"]),),
        args={**address("x", x, vec), "stats_ptr": stats, "B": b, "HW": height * width, "W": width, "CHUNKS": chunks},
        constexprs={"C": c, "FLAT": flat(x), "VEC": vec, "BLOCK_P": s["BLOCK_P"], "BLOCK_C": s["BLOCK_C"]},
        num_warps=s["num_warps"],
    )


def fold_block(chunks: int, per_group: int) -> dict[str, int]:
    """Chunks and channels of a tile of at most 1,024 partial sums"""
    block_c = min(1024, power_of_two(per_group))
    return {"BLOCK_K": max(1, min(power_of_two(chunks), 1024 // block_c)), "BLOCK_C": block_c}


def merge_block(chunks: int, per_group: int, groups: int, num_warps: int) -> dict[str, int]:
    """Groups, chunks and channels of a tile of merged_moments: 8 means a thread, so that nothing spills"""
    elements, block_g = 256 * num_warps, power_of_two(groups)
    block_l = min(power_of_two(per_group), max(1, elements // block_g))
    block_k = max(1, min(power_of_two(chunks), elements // (block_g * block_l)))
    return {"BLOCK_G": block_g, "BLOCK_K": block_k, "BLOCK_L": block_l}
