"""The end of a residual block in one pass: convolution + bias + skip, and the statistics that the next norm merges"""

import triton
import triton.language as tl
from torch import Tensor

from .._plan import ALIGNMENT, Plan
from .._tuning import channel_block, num_chunks, power_of_two, settings
from .tile import address, addresses, flat, grid_offset, merge, pixel_offset, tile_statistics, vector


@triton.jit
def fed_by(n, ROWS):
    """The row, of ROWS, that feeds row n of up to twice as many"""
    return tl.where(n < ROWS, n, n - ROWS)


@triton.jit
def _residual_kernel(
    h_ptr, h_stride_b, h_stride_h, h_stride_w, h_stride_c,
    skip_ptr, skip_stride_b, skip_stride_h, skip_stride_w, skip_stride_c,
    y_ptr, y_stride_b, y_stride_h, y_stride_w, y_stride_c,
    bias_ptr, bias_stride, stats_ptr, B, SKIP_ROWS, HW, W, P, CHUNKS,
    C: tl.constexpr, RESAMPLE: tl.constexpr,
    FLAT: tl.constexpr, VEC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = h + bias[c] + resample(skip); stats[0], stats[1] = mean and M2 of the stored y, per channel and chunk

    Layout:    h, y (B, C, H, W), skip (SKIP_ROWS, C, H, W), (.., 2H, 2W) for "down" or (.., H/2, W/2) for "up",
               strides in vectors; row b of y takes row b of skip, or b - SKIP_ROWS from there on; bias (C,); stats
               (2, B, CHUNKS, C) fp32 contiguous, chunk k the row-major pixels [k P, min((k + 1) P, HW)). bias,
               skip and stats may be None.
    Program:   (b, chunk, channel block), channel blocks fastest; BLOCK_P pixels at a time
    Precision: any float in; fp32, one rounding at the store; statistics in fp32 by two passes over a tile in
               registers, tiles merged by Chan's formula
    Traffic:   2 reads + 1 write; the skip's read is 4 times as long for "down" and a quarter for "up"
    Reference: reference.residual
    """
    BLOCKS_C: tl.constexpr = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    chunk = (pid // BLOCKS_C) % CHUNKS
    n = (pid // BLOCKS_C // CHUNKS).to(tl.int64)
    c = (pid % BLOCKS_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = c < C
    h_ptr += n * h_stride_b * VEC
    if skip_ptr is not None:
        skip_ptr += fed_by(n, SKIP_ROWS) * skip_stride_b * VEC
    y_ptr += n * y_stride_b * VEC
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + c.to(tl.int64) * bias_stride, mask_c, 0.0).to(tl.float32)[None, :]
    if stats_ptr is not None:
        count = tl.zeros((), tl.float32)
        mean = tl.zeros((BLOCK_C,), tl.float32)
        m2 = tl.zeros((BLOCK_C,), tl.float32)
    end = tl.minimum((chunk + 1) * P, HW)
    for start in range(chunk * P, end, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        mask_p = p < end
        mask = mask_p[:, None] & mask_c[None, :]
        at = pixel_offset(p, W, h_stride_h, h_stride_w, FLAT, VEC)
        y = tl.load(addresses(h_ptr, at, c, h_stride_c), mask, 0.0).to(tl.float32)
        if bias_ptr is not None:
            y += bias
        if skip_ptr is None:
            pass
        elif RESAMPLE == "down":
            pooled = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
            for q in tl.static_range(4):
                at = grid_offset(p // W * 2 + q // 2, p % W * 2 + q % 2, skip_stride_h, skip_stride_w, VEC)
                pooled += tl.load(addresses(skip_ptr, at, c, skip_stride_c), mask, 0.0).to(tl.float32)
            y += pooled * 0.25
        else:
            if RESAMPLE == "up":
                at = grid_offset(p // W // 2, p % W // 2, skip_stride_h, skip_stride_w, VEC)
            else:
                at = pixel_offset(p, W, skip_stride_h, skip_stride_w, FLAT, VEC)
            y += tl.load(addresses(skip_ptr, at, c, skip_stride_c), mask, 0.0).to(tl.float32)
        stored = y.to(y_ptr.dtype.element_ty)
        at = pixel_offset(p, W, y_stride_h, y_stride_w, FLAT, VEC)
        tl.store(addresses(y_ptr, at, c, y_stride_c), stored, mask)
        if stats_ptr is not None:
            count_t = tl.minimum(end - start, BLOCK_P).to(tl.float32)
            mean_t, m2_t = tile_statistics(stored.to(tl.float32), mask_p, count_t)
            count, mean, m2 = merge(count, mean, m2, count_t, mean_t, m2_t)
    if stats_ptr is not None:
        tl.store(stats_ptr + (n * CHUNKS + chunk) * C + c, mean, mask_c)
        tl.store(stats_ptr + ((n + B) * CHUNKS + chunk) * C + c, m2, mask_c)


def plan_residual(
    h: Tensor, bias: Tensor | None, skip: Tensor | None, y: Tensor, stats: Tensor | None, resample: str | None
) -> Plan:
    """Writes y, and stats (2, B, CHUNKS, C) fp32 contiguous where it is given, any number of chunks"""
    b, c, height, width = h.shape
    pixels, vec = height * width, vector(h, skip, y)
    chunks = num_chunks(pixels) if stats is None else stats.shape[2]
    per_chunk, block_c = triton.cdiv(pixels, chunks), channel_block(c, chunks)
    # elements of a program, and of a thread: what no target spills, a narrow access taking registers for its address
    tile, held = (256, 2) if resample == "down" else (1024, 4)
    if all(t.storage_offset() * t.element_size() % ALIGNMENT == 0 for t in (h, skip, y) if t is not None):
        if vec * h.element_size() == ALIGNMENT:
            tile, held = (2048, 16) if resample == "down" else (4096, 4 * vec)
        elif h.stride(3) == 1 and h.stride(1) * h.element_size() % ALIGNMENT == 0 and resample is None:
            tile, held = 2048, 16
    block_p = min(power_of_two(per_chunk), tile // block_c)
    s = settings(
        *("residual", h.device, b, c, pixels, h.dtype),
        BLOCK_P=block_p,
        BLOCK_C=block_c,
        num_warps=max(1, block_p * block_c // (32 * held)),
    )
    return Plan(
        kernel=_residual_kernel,
        grid=(b * chunks * triton.cdiv(c, s["BLOCK_C"]),),
        args={
            **address("h", h, vec),
            **address("skip", skip, vec),
            **address("y", y, vec),
            **{"bias_ptr": bias, "bias_stride": None if bias is None else bias.stride(0), "stats_ptr": stats},
            **{
                "B": b,
                "SKIP_ROWS": 0 if skip is None else len(skip),
                "HW": pixels,
                "W": width,
                "P": per_chunk,
                "CHUNKS": chunks,
            },
        },
        constexprs={
            **{"C": c, "RESAMPLE": resample, "FLAT": flat(h, y, skip if resample is None else None), "VEC": vec},
            **{"BLOCK_P": s["BLOCK_P"], "BLOCK_C": s["BLOCK_C"]},
        },
        num_warps=s["num_warps"],
    )
