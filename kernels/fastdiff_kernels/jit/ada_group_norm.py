"""ada_group_norm forward: one launch where a slab of whole groups fits on chip, else statistics, fold and apply"""

import triton
import triton.language as tl
from torch import Tensor

from .._plan import Plan
from .._tuning import PROGRAMS, power_of_two, settings
from .norm import Norm, affine, channels_of, load_slab, masked, moments_at, over_groups, slab_channels, slab_fits
from .statistics import new_statistics, plan_fold, plan_statistics
from .tile import address, addresses, flat, grid_offset, pixel_offset, silu, vector, wide

# elements that one program holds in registers, as fp32: 32 a thread at 16 warps
SLAB_ELEMENTS = 16384


@triton.jit
def _apply_kernel(
    x_ptr, x_stride_b, x_stride_h, x_stride_w, x_stride_c,
    x2_ptr, x2_stride_b, x2_stride_h, x2_stride_w, x2_stride_c,
    y_ptr, y_stride_b, y_stride_h, y_stride_w, y_stride_c,
    moments_ptr, x_bias_ptr, weight_ptr, bias_ptr,
    scale_ptr, scale_stride_b, scale_stride_c, shift_ptr, shift_stride_b, shift_stride_c,
    B, ROWS, H, W,
    C1: tl.constexpr, C2: tl.constexpr, CPG: tl.constexpr, REPEATS: tl.constexpr,
    SILU: tl.constexpr, RESAMPLE: tl.constexpr,
    FLAT: tl.constexpr, VEC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = resample(silu((x + x_bias - mean) * rstd * gain + offset)), the moments given

    Layout:    x (B, C1, H, W), x2 (B, C2, H, W) behind it, y (ROWS, C1 + C2, H', W'), strides in vectors; row b of y
               comes from row b of x, or b - B from row B on; moments (2, B, GROUPS); others as in the reference.
    Program:   (b, BLOCK_P pixels of x, or of y where it is smaller, channel block of one of x and x2)
    Precision: any float in; affine and mean of 4 pixels in fp32; one rounding at the store
    Traffic:   1 read of x (with "down" one for each row of y that it makes), 1 write of y
    Reference: reference.ada_group_norm
    """
    BLOCKS_C: tl.constexpr = tl.cdiv(C1, BLOCK_C) + tl.cdiv(C2, BLOCK_C)
    DOWN: tl.constexpr = RESAMPLE == "down"
    W_TILE = W // 2 if DOWN else W
    pixels = (H // 2) * (W // 2) if DOWN else H * W
    blocks_p = tl.cdiv(pixels, BLOCK_P)
    pid = tl.program_id(0)
    p = (pid // BLOCKS_C) % blocks_p * BLOCK_P + tl.arange(0, BLOCK_P)
    n = (pid // BLOCKS_C // blocks_p).to(tl.int64)
    second, c_in, c, mask_c = channels_of(pid % BLOCKS_C, C1, C2, BLOCK_C)
    mask = (p < pixels)[:, None] & mask_c[None, :]
    h = p // W_TILE
    w = p % W_TILE

    mean, rstd = moments_at(moments_ptr, x_bias_ptr, n, B, c, mask_c, (C1 + C2) // CPG, CPG)
    x_ptr += n * x_stride_b * VEC
    if C2 > 0:
        x2_ptr += n * x2_stride_b * VEC
    if not DOWN:
        if C2 > 0 and second:
            offset = pixel_offset(p, W, x2_stride_h, x2_stride_w, FLAT, VEC)
            x = tl.load(addresses(x2_ptr, offset, c_in, x2_stride_c), mask, 0.0).to(tl.float32)
        else:
            offset = pixel_offset(p, W, x_stride_h, x_stride_w, FLAT, VEC)
            x = tl.load(addresses(x_ptr, offset, c_in, x_stride_c), mask, 0.0).to(tl.float32)
    for repeat in tl.static_range(REPEATS):
        row = n + repeat * B
        if row < ROWS:
            gain, shifted = affine(
                weight_ptr, bias_ptr, scale_ptr, scale_stride_b, scale_stride_c,
                shift_ptr, shift_stride_b, shift_stride_c, row, c, mask_c,
            )  # fmt: skip
            slope = (rstd * gain)[None, :]
            centre = mean[None, :]
            shifted = shifted[None, :]
            out_ptr = y_ptr + row * y_stride_b * VEC
            if DOWN:
                y = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
                for q in tl.static_range(4):
                    if C2 > 0 and second:
                        at = grid_offset(2 * h + q // 2, 2 * w + q % 2, x2_stride_h, x2_stride_w, VEC)
                        x = tl.load(addresses(x2_ptr, at, c_in, x2_stride_c), mask, 0.0).to(tl.float32)
                    else:
                        at = grid_offset(2 * h + q // 2, 2 * w + q % 2, x_stride_h, x_stride_w, VEC)
                        x = tl.load(addresses(x_ptr, at, c_in, x_stride_c), mask, 0.0).to(tl.float32)
                    u = (x - centre) * slope + shifted
                    y += silu(u) if SILU else u
                y = y * 0.25
            else:
                u = (x - centre) * slope + shifted
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
    B, ROWS, H, W, eps,
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
        x_bias_ptr, n, h, w, c, mask_p, mask_c, C1, C2, VEC,
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
    norm: Norm, y: Tensor, moments: Tensor, eps: float, stats: Tensor | None = None, stats2: Tensor | None = None
) -> list[Plan]:
    """The launches in order; y (ROWS, C, H', W') and moments (2, B, groups) fp32 are written"""
    x, x2, x_bias = norm.x, norm.x2, norm.x_bias
    elements = SLAB_ELEMENTS if wide(vector(x, x2, y), x, x2, y) else SLAB_ELEMENTS // 4
    if slab_fits(norm.channels, norm.channels // moments.shape[2], norm.pixels, elements):
        return [_plan_slab(norm, y, moments, eps)]
    plans = []
    if stats is None:
        stats = new_statistics(x)
        plans.append(plan_statistics(x, stats))
    if x2 is not None and stats2 is None:
        stats2 = new_statistics(x2)
        plans.append(plan_statistics(x2, stats2))
    return [*plans, plan_fold(stats, stats2, x_bias, moments, norm.pixels, eps), _plan_apply(norm, y, moments)]


def _plan_apply(norm: Norm, y: Tensor, moments: Tensor) -> Plan:
    vec = vector(norm.x, norm.x2, y)
    pixels = norm.pixels // (4 if norm.resample == "down" else 1)
    # every program reads the small vectors: larger ones where there are enough
    rule = {"BLOCK_P": 64, "BLOCK_C": norm.block_c, "num_warps": 4}
    if not wide(vec, norm.x, norm.x2, y):
        rule |= {"BLOCK_P": 16, "num_warps": 8}
    elif pixels <= 16 * 16:
        rule["BLOCK_P"] = 32
    elif pixels >= 64 * 64:
        rule |= {"BLOCK_P": 128, "num_warps": 8}
    blocks_c, least = norm.blocks_c(norm.block_c), max(16, 1024 // norm.block_c)
    while rule["BLOCK_P"] > least and 2 * triton.cdiv(pixels, rule["BLOCK_P"]) * blocks_c < PROGRAMS:
        rule["BLOCK_P"] //= 2
        # 16 bytes for each of 64 threads
        rule["num_warps"] = min(rule["num_warps"], rule["BLOCK_P"] * norm.block_c // 512)
    s = settings("apply", norm.x.device, norm.b, norm.channels, pixels, norm.x.dtype, **rule)
    return Plan(
        kernel=_apply_kernel,
        grid=(norm.b * triton.cdiv(pixels, s["BLOCK_P"]) * norm.blocks_c(s["BLOCK_C"]),),
        args={**norm.arguments(vec), **address("y", y, vec), "moments_ptr": moments},
        constexprs={
            **norm.constexprs(moments.shape[2]),
            **{"FLAT": flat(norm.x, norm.x2, y), "VEC": vec},
            **{"BLOCK_P": s["BLOCK_P"], "BLOCK_C": s["BLOCK_C"]},
        },
        num_warps=s["num_warps"],
    )


def _plan_slab(norm: Norm, y: Tensor, moments: Tensor, eps: float) -> Plan:
    vec = vector(norm.x, norm.x2, y)
    slab = slab_channels(norm.channels, norm.channels // moments.shape[2])
    # a cell of four pixels, where there is none of one
    block_p, block_c = max(4, power_of_two(norm.pixels)), power_of_two(slab)
    held = 1024 if wide(vec, norm.x, norm.x2, y) else 256
    if masked(norm.channels, norm.channels // moments.shape[2]):
        held = min(held, 512)
    warps = max(1, min(16, block_p * block_c // held))
    s = settings("slab", norm.x.device, norm.b, norm.channels, norm.pixels, norm.x.dtype, num_warps=warps)
    return Plan(
        kernel=_slab_kernel,
        grid=(norm.b * triton.cdiv(norm.channels, slab),),
        args={**norm.arguments(vec), **address("y", y, vec), "moments_ptr": moments, "eps": eps},
        constexprs={
            **norm.constexprs(moments.shape[2]),
            **{"VEC": vec, "SLAB": slab, "BLOCK_P": block_p, "BLOCK_C": block_c},
        },
        num_warps=s["num_warps"],
    )
