"""ada_group_norm forward: one launch where a slab of whole groups fits on chip, else statistics and apply"""

import triton
import triton.language as tl
from torch import Tensor

from .._plan import Plan
from .._tuning import PROGRAMS, power_of_two, settings
from .norm import (
    Norm,
    affine,
    channels_of,
    channels_within,
    load_slab,
    masked,
    over_groups,
    row_of_second,
    slab_channels,
    slab_fits,
)
from .statistics import merge_block, merged_moments, new_statistics, plan_statistics
from .tile import address, addresses, flat, grid_offset, pixel_offset, silu, vector, wide

# elements that one program holds in registers, as fp32: 32 a thread at 16 warps
SLAB_ELEMENTS = 16384


@triton.jit
def _load_x(
    x_ptr, x_stride_h, x_stride_w, x_stride_c, x2_ptr, x2_stride_h, x2_stride_w, x2_stride_c,
    p, h, w, W, c_in, second, mask, C2: tl.constexpr, FLAT: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """x or x2 in fp32 at row-major pixels p that are (h, w), FLAT where these have one stride"""
    if C2 > 0 and second:
        if FLAT:
            at = pixel_offset(p, W, x2_stride_h, x2_stride_w, FLAT, VEC)
        else:
            at = grid_offset(h, w, x2_stride_h, x2_stride_w, VEC)
        x = tl.load(addresses(x2_ptr, at, c_in, x2_stride_c), mask, 0.0).to(tl.float32)
    else:
        if FLAT:
            at = pixel_offset(p, W, x_stride_h, x_stride_w, FLAT, VEC)
        else:
            at = grid_offset(h, w, x_stride_h, x_stride_w, VEC)
        x = tl.load(addresses(x_ptr, at, c_in, x_stride_c), mask, 0.0).to(tl.float32)
    return x


@triton.jit
def _apply_kernel(
    x_ptr, x_stride_b, x_stride_h, x_stride_w, x_stride_c,
    x2_ptr, x2_stride_b, x2_stride_h, x2_stride_w, x2_stride_c,
    y_ptr, y_stride_b, y_stride_h, y_stride_w, y_stride_c,
    stats_ptr, CHUNKS, stats2_ptr, CHUNKS2, moments_ptr, x_bias_ptr, weight_ptr, bias_ptr,
    scale_ptr, scale_stride_b, scale_stride_c, shift_ptr, shift_stride_b, shift_stride_c,
    B, B2, ROWS, H, W, eps,
    C1: tl.constexpr, C2: tl.constexpr, CPG: tl.constexpr, REPEATS: tl.constexpr,
    SILU: tl.constexpr, RESAMPLE: tl.constexpr,
    FLAT: tl.constexpr, VEC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, TILES: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """y = resample(silu((x + x_bias - mean) * rstd * gain + offset)), the statistics given

    Layout:    x (B, C1, H, W), x2 (B2, C2, H, W) behind it, y (ROWS, C1 + C2, H', W'), strides in vectors; row b of y
               comes from row b of x, or b - B from row B on, row b of x goes with row b of x2, or b - B2; stats
               (2, B, CHUNKS, C1), stats2 (2, B2, CHUNKS2, C2), moments (2, B, GROUPS) or None; others as in the
               reference.
    Program:   (b, TILES * BLOCK_P pixels of x, or of y where it is smaller, channel block of one of x and x2). Each
               merges the statistics of its groups itself; those of the first pixels write the moments.
    Precision: any float in; merge, affine and mean of 4 pixels in fp32; one rounding at the store
    Traffic:   1 read of x (with "down" one for each row of y that it makes), 1 write of y; for each BLOCK_P * TILES
               pixels the statistics
    Reference: reference.ada_group_norm
    """
    BLOCKS_C: tl.constexpr = tl.cdiv(C1, BLOCK_C) + tl.cdiv(C2, BLOCK_C)
    GROUPS: tl.constexpr = (C1 + C2) // CPG
    DOWN: tl.constexpr = RESAMPLE == "down"
    W_TILE = W // 2 if DOWN else W
    pixels = (H // 2) * (W // 2) if DOWN else H * W
    blocks_p = tl.cdiv(pixels, BLOCK_P * TILES)
    pid = tl.program_id(0)
    block_p = (pid // BLOCKS_C) % blocks_p
    n = (pid // BLOCKS_C // blocks_p).to(tl.int64)
    n2 = row_of_second(n, B2, C2)
    second, c_in, c, mask_c = channels_of(pid % BLOCKS_C, C1, C2, BLOCK_C)

    start, end = channels_within(pid % BLOCKS_C, C1, C2, BLOCK_C)
    first = start // CPG
    group_mean, group_rstd = merged_moments(
        stats_ptr, CHUNKS, stats2_ptr, CHUNKS2, x_bias_ptr, n, B, n2, B2, H * W, eps, first, end,
        C1, C2, CPG, BLOCK_G, BLOCK_K, BLOCK_L,
    )  # fmt: skip
    group = first + tl.arange(0, BLOCK_G)
    if moments_ptr is not None:
        mine = (group * CPG >= start) & (group * CPG < end) & (block_p == 0)
        tl.store(moments_ptr + n * GROUPS + group, group_mean, mine)
        tl.store(moments_ptr + (n + B) * GROUPS + group, group_rstd, mine)
    its = (c // CPG)[None, :] == group[:, None]
    mean = tl.sum(tl.where(its, group_mean[:, None], 0.0), 0)
    rstd = tl.sum(tl.where(its, group_rstd[:, None], 0.0), 0)
    if x_bias_ptr is not None:
        mean -= tl.load(x_bias_ptr + c, mask_c, 0.0).to(tl.float32)

    x_ptr += n * x_stride_b * VEC
    if C2 > 0:
        x2_ptr += n2 * x2_stride_b * VEC
    gain, offset = affine(
        weight_ptr, bias_ptr, scale_ptr, scale_stride_b, scale_stride_c,
        shift_ptr, shift_stride_b, shift_stride_c, n, c, mask_c,
    )  # fmt: skip
    for tile in range(TILES):
        p = (block_p * TILES + tile) * BLOCK_P + tl.arange(0, BLOCK_P)
        mask = (p < pixels)[:, None] & mask_c[None, :]
        h = p // W_TILE
        w = p % W_TILE
        if not DOWN:
            x = _load_x(
                x_ptr, x_stride_h, x_stride_w, x_stride_c, x2_ptr, x2_stride_h, x2_stride_w, x2_stride_c,
                p, h, w, W, c_in, second, mask, C2, FLAT, VEC,
            )  # fmt: skip
        for repeat in tl.static_range(REPEATS):
            row = n + repeat * B
            if row < ROWS:
                if repeat == 0:
                    scaled, shifted = gain, offset
                else:
                    scaled, shifted = affine(
                        weight_ptr, bias_ptr, scale_ptr, scale_stride_b, scale_stride_c,
                        shift_ptr, shift_stride_b, shift_stride_c, row, c, mask_c,
                    )  # fmt: skip
                slope = (rstd * scaled)[None, :]
                out_ptr = y_ptr + row * y_stride_b * VEC
                if DOWN:
                    y = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
                    for q in tl.static_range(4):
                        x = _load_x(
                            x_ptr, x_stride_h, x_stride_w, x_stride_c, x2_ptr, x2_stride_h, x2_stride_w, x2_stride_c,
                            p, 2 * h + q // 2, 2 * w + q % 2, W, c_in, second, mask, C2, False, VEC,
                        )  # fmt: skip
                        u = (x - mean[None, :]) * slope + shifted[None, :]
                        y += silu(u) if SILU else u
                    y = y * 0.25
                else:
                    u = (x - mean[None, :]) * slope + shifted[None, :]
                    y = silu(u) if SILU else u
                y = y.to(y_ptr.dtype.element_ty)
                if RESAMPLE == "up":
                    for q in tl.static_range(4):
                        at = grid_offset(2 * h + q // 2, 2 * w + q % 2, y_stride_h, y_stride_w, VEC)
                        tl.store(addresses(out_ptr, at, c, y_stride_c), y, mask)
                else:
                    at = pixel_offset(p, W_TILE, y_stride_h, y_stride_w, FLAT, VEC)
                    tl.store(addresses(out_ptr, at, c, y_stride_c), y, mask)


@triton.jit
def _slab_kernel(
    x_ptr, x_stride_b, x_stride_h, x_stride_w, x_stride_c,
    x2_ptr, x2_stride_b, x2_stride_h, x2_stride_w, x2_stride_c,
    y_ptr, y_stride_b, y_stride_h, y_stride_w, y_stride_c,
    moments_ptr, x_bias_ptr, weight_ptr, bias_ptr,
    scale_ptr, scale_stride_b, scale_stride_c, shift_ptr, shift_stride_b, shift_stride_c,
    B, B2, ROWS, H, W, eps,
    C1: tl.constexpr, C2: tl.constexpr, CPG: tl.constexpr, REPEATS: tl.constexpr,
    SILU: tl.constexpr, RESAMPLE: tl.constexpr, VEC: tl.constexpr,
    SLAB: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = ada_group_norm(x), and the moments of each group for a backward pass, in one launch

    Layout:    as _apply_kernel
    Program:   (b, SLAB channels), whole groups with all their pixels in registers; a multiple of 8 channels where the
               network has one, so that accesses are 16 bytes wide at any group width. With RESAMPLE == "down" the four
               pixels of a cell follow one another.
    Precision: any float in; two passes over registers, affine and mean of 4 pixels in fp32; one rounding at the store
    Traffic:   1 read of x, 1 write of y: the floor
    Reference: reference.ada_group_norm
    """
    C: tl.constexpr = C1 + C2
    SLABS: tl.constexpr = tl.cdiv(C, SLAB)
    GROUPS: tl.constexpr = C // CPG
    n = (tl.program_id(0) // SLABS).to(tl.int64)
    lane = tl.arange(0, BLOCK_C)
    c = (tl.program_id(0) % SLABS) * SLAB + lane
    mask_c = (lane < SLAB) & (c < C)
    p = tl.arange(0, BLOCK_P)
    mask_p = p < H * W
    if RESAMPLE == "down":
        h = p // 4 // (W // 2) * 2 + p % 4 // 2
        w = p // 4 % (W // 2) * 2 + p % 2
    else:
        h = p // W
        w = p % W
    x = load_slab(
        x_ptr, x_stride_b, x_stride_h, x_stride_w, x_stride_c,
        x2_ptr, x2_stride_b, x2_stride_h, x2_stride_w, x2_stride_c,
        x_bias_ptr, n, row_of_second(n, B2, C2), h, w, c, mask_p, mask_c, C1, C2, VEC,
    )  # fmt: skip
    size = H * W * (CPG * 1.0)
    # where lanes outside hold x_bias, they must not count
    inside = mask_p[:, None] & mask_c[None, :]
    mean = over_groups(tl.sum(tl.where(inside, x, 0.0), 0), lane, SLAB, CPG) / size
    x = tl.where(inside, x - mean[None, :], 0.0)
    var = over_groups(tl.sum(x * x, 0), lane, SLAB, CPG) / size
    rstd = 1.0 / tl.sqrt_rn(var + eps)
    if moments_ptr is not None:
        heads = mask_c & (c % CPG == 0)
        tl.store(moments_ptr + n * GROUPS + c // CPG, mean, heads)
        tl.store(moments_ptr + (n + B) * GROUPS + c // CPG, rstd, heads)
    for repeat in tl.static_range(REPEATS):
        row = n + repeat * B
        if row < ROWS:
            gain, offset = affine(
                weight_ptr, bias_ptr, scale_ptr, scale_stride_b, scale_stride_c,
                shift_ptr, shift_stride_b, shift_stride_c, row, c, mask_c,
            )  # fmt: skip
            y = x * (rstd * gain)[None, :] + offset[None, :]
            if SILU:
                y = silu(y)
            out_ptr = y_ptr + row * y_stride_b * VEC
            if RESAMPLE == "down":
                y = tl.sum(tl.reshape(y, (BLOCK_P // 4, 4, BLOCK_C)), 1) * 0.25
                cell = tl.arange(0, BLOCK_P // 4)
                at = grid_offset(cell // (W // 2), cell % (W // 2), y_stride_h, y_stride_w, VEC)
                inside_y = (cell < H * W // 4)[:, None] & mask_c[None, :]
                tl.store(addresses(out_ptr, at, c, y_stride_c), y.to(y_ptr.dtype.element_ty), inside_y)
            elif RESAMPLE == "up":
                for q in tl.static_range(4):
                    at = grid_offset(2 * h + q // 2, 2 * w + q % 2, y_stride_h, y_stride_w, VEC)
                    tl.store(addresses(out_ptr, at, c, y_stride_c), y.to(y_ptr.dtype.element_ty), inside)
            else:
                at = grid_offset(h, w, y_stride_h, y_stride_w, VEC)
                tl.store(addresses(out_ptr, at, c, y_stride_c), y.to(y_ptr.dtype.element_ty), inside)


def plan_ada_group_norm(
    norm: Norm,
    y: Tensor,
    moments: Tensor | None,
    groups: int,
    eps: float,
    stats: Tensor | None = None,
    stats2: Tensor | None = None,
) -> list[Plan]:
    """The launches in order; y (ROWS, C, H', W') and, if given, moments (2, B, groups) fp32 are written"""
    x, x2 = norm.x, norm.x2
    elements = SLAB_ELEMENTS if wide(vector(x, x2, y), x, x2, y) else SLAB_ELEMENTS // 4
    if slab_fits(norm.channels, norm.channels // groups, norm.pixels, elements):
        return [_plan_slab(norm, y, moments, groups, eps)]
    plans = []
    if stats is None:
        stats = new_statistics(x)
        plans.append(plan_statistics(x, stats))
    if x2 is not None and stats2 is None:
        stats2 = new_statistics(x2)
        plans.append(plan_statistics(x2, stats2))
    return [*plans, _plan_apply(norm, y, moments, groups, eps, stats, stats2)]


def _plan_apply(
    norm: Norm, y: Tensor, moments: Tensor | None, groups: int, eps: float, stats: Tensor, stats2: Tensor | None
) -> Plan:
    vec = vector(norm.x, norm.x2, y)
    pixels = norm.pixels // (4 if norm.resample == "down" else 1)
    rule = _apply_rule(norm, pixels, wide(vec, norm.x, norm.x2, y))
    s = settings("apply", norm.x.device, norm.b, norm.channels, pixels, norm.x.dtype, **rule)
    chunks = (stats.shape[2], None if stats2 is None else stats2.shape[2])
    per_group = norm.channels // groups
    most = max(block[-1] // per_group - block[0] // per_group + 1 for block in norm.channel_blocks(s["BLOCK_C"]))
    return Plan(
        kernel=_apply_kernel,
        grid=(norm.b * triton.cdiv(pixels, s["BLOCK_P"] * s["TILES"]) * norm.blocks_c(s["BLOCK_C"]),),
        args={
            **norm.arguments(vec),
            **address("y", y, vec),
            **{"stats_ptr": stats, "CHUNKS": chunks[0], "stats2_ptr": stats2, "CHUNKS2": chunks[1]},
            **{"B2": norm.b2, "moments_ptr": moments, "eps": eps},
        },
        constexprs={
            **norm.constexprs(groups),
            **{"FLAT": flat(norm.x, norm.x2, y), "VEC": vec},
            **{"BLOCK_P": s["BLOCK_P"], "BLOCK_C": s["BLOCK_C"], "TILES": s["TILES"]},
            **merge_block(max(chunks[0], chunks[1] or 0), per_group, most, s["num_warps"]),
        },
        num_warps=s["num_warps"],
    )


def _apply_rule(norm: Norm, pixels: int, is_wide: bool) -> dict[str, int]:
    """Every program reads statistics: as many pixels of few channels as leave two images enough programs"""
    block_c = min(32, norm.block_c)
    each = min(2048, power_of_two(pixels))
    while each > 32 and 2 * triton.cdiv(pixels, each) * norm.blocks_c(block_c) < PROGRAMS:
        each //= 2
    if is_wide:
        # bytes, not elements, are what spills; with 8 warps ptxas leaves too few registers where rows have gaps
        gaps = not flat(norm.x, norm.x2)
        held = 128 if norm.resample == "down" else 256 if gaps else 512
        block_p = min(each, held // norm.x.element_size())
        # 16 bytes for each of 64 threads
        warps = max(1, min(4 if gaps else 8, block_p * block_c // 512))
    else:
        # an address for every element
        block_p, warps = min(each, 1024 // block_c), 8
    return {"BLOCK_P": block_p, "BLOCK_C": block_c, "TILES": each // block_p, "num_warps": warps}


def _plan_slab(norm: Norm, y: Tensor, moments: Tensor | None, groups: int, eps: float) -> Plan:
    vec = vector(norm.x, norm.x2, y)
    slab = slab_channels(norm.channels, norm.channels // groups)
    # a cell of four pixels, where there is none of one
    block_p, block_c = max(4, power_of_two(norm.pixels)), power_of_two(slab)
    held = 1024 if wide(vec, norm.x, norm.x2, y) else 128
    if norm.x2 is not None or masked(norm.channels, norm.channels // groups):
        held = min(held, 512)
    warps = max(1, min(16, block_p * block_c // held))
    s = settings("slab", norm.x.device, norm.b, norm.channels, norm.pixels, norm.x.dtype, num_warps=warps)
    return Plan(
        kernel=_slab_kernel,
        grid=(norm.b * triton.cdiv(norm.channels, slab),),
        args={
            **norm.arguments(vec),
            **address("y", y, vec),
            **{"B2": norm.b2, "moments_ptr": moments, "eps": eps},
        },
        constexprs={
            **norm.constexprs(groups),
            **{"VEC": vec, "SLAB": slab, "BLOCK_P": block_p, "BLOCK_C": block_c},
        },
        num_warps=s["num_warps"],
    )
