"""The end of a residual block whose skip goes through a 1 x 1 convolution, and the statistics of it, in one pass"""

import triton
import triton.language as tl
from torch import Tensor

from .._plan import Plan
from .._tuning import PROGRAMS, num_chunks, power_of_two, settings
from .residual import fed_by
from .tile import address, addresses, flat, merge, pixel_offset, tile_statistics, vector, wide


@triton.jit
def _add_product(
    product, x_ptr, x_stride_h, x_stride_w, x_stride_c, p, mask_p, weight_ptr, c, W, K,
    C: tl.constexpr, COLUMNS: tl.constexpr, OUT: tl.constexpr,
    FLAT: tl.constexpr, VEC: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """product + x @ weight^T for pixels p, output channels c and the C channels of x, fp32 (P, BLOCK_C)"""
    at = pixel_offset(p, W, x_stride_h, x_stride_w, FLAT, VEC)
    # K is C: a bound known to the compiler would make it unroll the loop until registers spill
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x_mask = mask_p[:, None]
        if C % BLOCK_K != 0:
            x_mask = x_mask & (k < C)[None, :]
        x = tl.load(addresses(x_ptr, at, k, x_stride_c), x_mask, 0.0)
        weight_at = weight_ptr + (c.to(tl.int64) * COLUMNS)[None, :] + k[:, None]
        if C % BLOCK_K == 0 and OUT % BLOCK_C == 0:
            weight = tl.load(weight_at)
        else:
            weight = tl.load(weight_at, (k < C)[:, None] & (c < OUT)[None, :], 0.0)
        # Triton's default for fp32 operands is tf32, with 11 bits
        product = tl.dot(x, weight, product, input_precision="ieee")
    return product


@triton.jit
def _projection_kernel(
    h_ptr, h_stride_b, h_stride_h, h_stride_w, h_stride_c,
    skip_ptr, skip_stride_b, skip_stride_h, skip_stride_w, skip_stride_c,
    skip2_ptr, skip2_stride_b, skip2_stride_h, skip2_stride_w, skip2_stride_c,
    y_ptr, y_stride_b, y_stride_h, y_stride_w, y_stride_c,
    weight_ptr, bias_ptr, bias_stride, weight_bias_ptr, stats_ptr, B, SKIP_ROWS, SKIP2_ROWS, K1, K2, HW, W, P, CHUNKS,
    C: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr,
    FLAT: tl.constexpr, VEC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y = h + bias[c] + weight @ [skip, skip2] + weight_bias[c]; stats[0], stats[1] = mean and M2 of the stored y, per
    channel and chunk

    Layout:    h, y (B, C, H, W), skip (SKIP_ROWS, C1, H, W), skip2 (SKIP2_ROWS, C2, H, W) or None, strides in vectors;
               row b of y takes row b of skip, or b - SKIP_ROWS from there on, and so of skip2; weight (C, C1 + C2)
               contiguous in their dtype, bias and weight_bias (C,); stats (2, B, CHUNKS, C) fp32 contiguous, chunk k
               the row-major pixels [k P, min((k + 1) P, HW)). bias, weight_bias and stats may be None.
    Program:   (b, chunk, channel block), channel blocks fastest, so that those that read one chunk run together;
               BLOCK_P pixels at a time, BLOCK_K channels of skip and then of skip2 at a time
    Precision: products of fp16, bf16 or fp32 (no tf32) summed in fp32, then + bias + h, one rounding at the store;
               statistics in fp32 by two passes over a tile in registers, tiles merged by Chan's formula
    Traffic:   h + y, skip and skip2 once for each channel block, all of weight once for each BLOCK_P pixels
    Reference: reference.residual
    """
    BLOCKS_C: tl.constexpr = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    chunk = (pid // BLOCKS_C) % CHUNKS
    n = (pid // BLOCKS_C // CHUNKS).to(tl.int64)
    c = (pid % BLOCKS_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = c < C
    h_ptr += n * h_stride_b * VEC
    y_ptr += n * y_stride_b * VEC
    skip_ptr += fed_by(n, SKIP_ROWS) * skip_stride_b * VEC
    if skip2_ptr is not None:
        skip2_ptr += fed_by(n, SKIP2_ROWS) * skip2_stride_b * VEC
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + c.to(tl.int64) * bias_stride, mask_c, 0.0).to(tl.float32)[None, :]
    if weight_bias_ptr is not None:
        weight_bias = tl.load(weight_bias_ptr + c, mask_c, 0.0).to(tl.float32)[None, :]
    if stats_ptr is not None:
        count = tl.zeros((), tl.float32)
        mean = tl.zeros((BLOCK_C,), tl.float32)
        m2 = tl.zeros((BLOCK_C,), tl.float32)
    end = tl.minimum((chunk + 1) * P, HW)
    for start in range(chunk * P, end, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        mask_p = p < end
        mask = mask_p[:, None] & mask_c[None, :]
        product = _add_product(
            *(tl.zeros((BLOCK_P, BLOCK_C), tl.float32), skip_ptr, skip_stride_h, skip_stride_w, skip_stride_c),
            *(p, mask_p, weight_ptr, c, W, K1, C1, C1 + C2, C, FLAT, VEC, BLOCK_K, BLOCK_C),
        )
        if skip2_ptr is not None:
            product = _add_product(
                *(product, skip2_ptr, skip2_stride_h, skip2_stride_w, skip2_stride_c),
                *(p, mask_p, weight_ptr + C1, c, W, K2, C2, C1 + C2, C, FLAT, VEC, BLOCK_K, BLOCK_C),
            )
        if bias_ptr is not None:
            product += bias
        if weight_bias_ptr is not None:
            product += weight_bias
        at = pixel_offset(p, W, h_stride_h, h_stride_w, FLAT, VEC)
        y = tl.load(addresses(h_ptr, at, c, h_stride_c), mask, 0.0).to(tl.float32) + product
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


def _rule(c: int, c1: int, c2: int, per_chunk: int, chunks: int, half: bool, full: bool, rows: bool) -> dict[str, int]:
    """What no target spills and what fits its shared memory, of an image's shape alone; tl.dot takes tiles from 16

    full: accesses are 16 bytes, where not, their addresses take registers; rows: so does where a row of pixels begins
    """
    block_p = max(16, min(128 if half and full and not rows else 64, power_of_two(per_chunk)))
    block_c = max(16, min(64, power_of_two(c)))
    if not half:
        # without tensor cores a thread holds 16 channels of both sides, and with them no loads of later stages
        block_c = block_c if full else 16
        warps = max(1, block_p * block_c // 1024) if full else 4 if block_p == 64 else 8
        return {"BLOCK_P": block_p, "BLOCK_C": block_c, "BLOCK_K": 16, "num_warps": warps, "num_stages": 1}
    if block_c == 16 and not full:
        block_p = min(block_p, 32)
    # more programs than 32 channels make would read skip more often than they gain from more of the GPU
    if block_c == 64 and (c % 64 or not full or 3 * chunks * -(-c // 64) < PROGRAMS):
        block_c = 32
    # 16 bytes of h a thread with the 64 threads of an AMD wave; where no access is as wide, fewer addresses
    held = 512 if full else 128
    block_k = 64 if full and c1 % 64 == c2 % 64 == 0 else 32
    return {
        "BLOCK_P": block_p,
        "BLOCK_C": block_c,
        "BLOCK_K": max(16, min(block_k, power_of_two(max(c1, c2)))),
        "num_warps": max(1, min(8, block_p * block_c // held)),
        # narrow loads cannot be asynchronous
        "num_stages": (4 if block_p <= 64 else 3) if full else 1,
    }


def plan_projection(
    h: Tensor,
    bias: Tensor | None,
    skip: Tensor,
    skip2: Tensor | None,
    weight: Tensor,
    weight_bias: Tensor | None,
    y: Tensor,
    stats: Tensor | None,
) -> Plan:
    """Writes y, and stats (2, B, CHUNKS, C) fp32 contiguous where it is given

    weight (C, C1 + C2) and weight_bias (C,) are contiguous.
    """
    b, c, height, width = h.shape
    c1, c2 = skip.shape[1], 0 if skip2 is None else skip2.shape[1]
    pixels, vec = height * width, vector(h, skip, skip2, y)
    chunks = num_chunks(pixels) if stats is None else stats.shape[2]
    per_chunk = triton.cdiv(pixels, chunks)
    half, full, rows = h.element_size() == 2, wide(vec, h, skip, skip2, y), not flat(h, y, skip, skip2)
    rule = _rule(c, c1, c2, per_chunk, chunks, half, full, rows)
    s = settings("projection", h.device, b, c, pixels, h.dtype, **rule)
    return Plan(
        kernel=_projection_kernel,
        grid=(b * chunks * triton.cdiv(c, s["BLOCK_C"]),),
        args={
            **address("h", h, vec),
            **address("skip", skip, vec),
            **address("skip2", skip2, vec),
            **address("y", y, vec),
            **{"weight_ptr": weight, "bias_ptr": bias, "bias_stride": None if bias is None else bias.stride(0)},
            **{
                "weight_bias_ptr": weight_bias,
                "stats_ptr": stats,
                "B": b,
                "SKIP_ROWS": len(skip),
                "SKIP2_ROWS": 0 if skip2 is None else len(skip2),
            },
            **{"K1": c1, "K2": c2, "HW": pixels, "W": width, "P": per_chunk, "CHUNKS": chunks},
        },
        constexprs={
            **{"C": c, "C1": c1, "C2": c2, "FLAT": not rows, "VEC": vec},
            **{name: s[name] for name in ("BLOCK_P", "BLOCK_C", "BLOCK_K")},
        },
        num_warps=s["num_warps"],
        num_stages=s["num_stages"],
    )
