"""ada_group_norm backward: one launch where a slab of whole groups fits on chip, else sums, fold and apply

With u = xhat * gain + offset, g = dL/du (the upstream gradient through resample and SiLU) and E the mean over a group:
    sums = sum over pixels of (g, g * xhat), from which every gradient of a parameter follows
    dx   = rstd * (gain * g - E[gain * g] - xhat * E[gain * g * xhat])
x is read again and u computed again: nothing but x and the moments is kept from the forward pass. Where one row of x
fed two rows of y, gain * g stands for the sum over both.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._plan import Plan
from .._tuning import num_chunks, power_of_two, settings
from .norm import Norm, affine, block_of_both, channels_of, load_slab, moments_at, over_groups, slab_channels, slab_fits
from .statistics import FOLD_PER_WARP, fold_block
from .tile import address, addresses, flat, grid_offset, pixel_offset, vector, wide

# two slabs, x and the gradient, share the registers
SLAB_ELEMENTS = 8192


@triton.jit
def _upstream(
    g_ptr, g_stride_b, g_stride_h, g_stride_w, g_stride_c, row, p, h, w, c, mask,
    RESAMPLE: tl.constexpr, FLAT: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """dL/d(activation) at pixels of x: the transpose of resample, fp32 (P, C)"""
    g_ptr += row * g_stride_b * VEC
    if RESAMPLE == "up":
        g = tl.zeros(mask.shape, tl.float32)
        for q in tl.static_range(4):
            at = grid_offset(2 * h + q // 2, 2 * w + q % 2, g_stride_h, g_stride_w, VEC)
            g += tl.load(addresses(g_ptr, at, c, g_stride_c), mask, 0.0).to(tl.float32)
    elif RESAMPLE == "down":
        at = grid_offset(h // 2, w // 2, g_stride_h, g_stride_w, VEC)
        g = 0.25 * tl.load(addresses(g_ptr, at, c, g_stride_c), mask, 0.0).to(tl.float32)
    elif FLAT:
        at = pixel_offset(p, 1, g_stride_h, g_stride_w, FLAT, VEC)
        g = tl.load(addresses(g_ptr, at, c, g_stride_c), mask, 0.0).to(tl.float32)
    else:
        at = grid_offset(h, w, g_stride_h, g_stride_w, VEC)
        g = tl.load(addresses(g_ptr, at, c, g_stride_c), mask, 0.0).to(tl.float32)
    return g


@triton.jit
def _through_silu(g, u):
    s = 1.0 / (1.0 + tl.exp(-u))
    return g * s * (1.0 + u * (1.0 - s))


@triton.jit
def _load_x(
    x_ptr, x_stride_b, x_stride_h, x_stride_w, x_stride_c,
    x2_ptr, x2_stride_b, x2_stride_h, x2_stride_w, x2_stride_c,
    n, p, W, c_in, second, mask, C2: tl.constexpr, FLAT: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    if C2 > 0 and second:
        at = pixel_offset(p, W, x2_stride_h, x2_stride_w, FLAT, VEC)
        x = tl.load(addresses(x2_ptr + n * x2_stride_b * VEC, at, c_in, x2_stride_c), mask, 0.0).to(tl.float32)
    else:
        at = pixel_offset(p, W, x_stride_h, x_stride_w, FLAT, VEC)
        x = tl.load(addresses(x_ptr + n * x_stride_b * VEC, at, c_in, x_stride_c), mask, 0.0).to(tl.float32)
    return x


@triton.jit
def _sums_kernel(
    x_ptr, x_stride_b, x_stride_h, x_stride_w, x_stride_c,
    x2_ptr, x2_stride_b, x2_stride_h, x2_stride_w, x2_stride_c,
    g_ptr, g_stride_b, g_stride_h, g_stride_w, g_stride_c,
    moments_ptr, x_bias_ptr, weight_ptr, bias_ptr,
    scale_ptr, scale_stride_b, scale_stride_c, shift_ptr, shift_stride_b, shift_stride_c,
    parts_ptr, B, ROWS, H, W, CHUNKS,
    C1: tl.constexpr, C2: tl.constexpr, CPG: tl.constexpr, REPEATS: tl.constexpr,
    SILU: tl.constexpr, RESAMPLE: tl.constexpr,
    FLAT: tl.constexpr, VEC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """parts[0], parts[1] = sums of g and of g * xhat over each chunk of pixels

    Layout:    x, x2 as in the forward pass; g (ROWS, C1 + C2, H', W'); parts (2, ROWS, CHUNKS, C1 + C2) fp32.
    Program:   (b, chunk, channel block of one of x and x2)
    Precision: fp32
    Traffic:   1 read of g, and 1 of x for each row of y that it made
    Reference: the gradient of reference.ada_group_norm
    """
    C: tl.constexpr = C1 + C2
    BLOCKS_C: tl.constexpr = tl.cdiv(C1, BLOCK_C) + tl.cdiv(C2, BLOCK_C)
    pid = tl.program_id(0)
    chunk = (pid // BLOCKS_C) % CHUNKS
    n = (pid // BLOCKS_C // CHUNKS).to(tl.int64)
    second, c_in, c, mask_c = channels_of(pid % BLOCKS_C, C1, C2, BLOCK_C)
    P = tl.cdiv(H * W, CHUNKS)
    end = tl.minimum((chunk + 1) * P, H * W)
    mean, rstd = moments_at(moments_ptr, x_bias_ptr, n, B, c, mask_c, C // CPG, CPG)
    for repeat in tl.static_range(REPEATS):
        row = n + repeat * B
        if row < ROWS:
            gain, offset = affine(
                weight_ptr, bias_ptr, scale_ptr, scale_stride_b, scale_stride_c,
                shift_ptr, shift_stride_b, shift_stride_c, row, c, mask_c,
            )  # fmt: skip
            sum_g = tl.zeros((BLOCK_C,), tl.float32)
            sum_gx = tl.zeros((BLOCK_C,), tl.float32)
            for start in range(chunk * P, end, BLOCK_P):
                p = start + tl.arange(0, BLOCK_P)
                mask = (p < end)[:, None] & mask_c[None, :]
                x = _load_x(
                    x_ptr, x_stride_b, x_stride_h, x_stride_w, x_stride_c,
                    x2_ptr, x2_stride_b, x2_stride_h, x2_stride_w, x2_stride_c,
                    n, p, W, c_in, second, mask, C2, FLAT, VEC,
                )  # fmt: skip
                g = _upstream(
                    g_ptr, g_stride_b, g_stride_h, g_stride_w, g_stride_c,
                    row, p, p // W, p % W, c, mask, RESAMPLE, FLAT, VEC,
                )  # fmt: skip
                xhat = (x - mean[None, :]) * rstd[None, :]
                if SILU:
                    g = _through_silu(g, xhat * gain[None, :] + offset[None, :])
                # outside the mask xhat can be infinite
                sum_g += tl.sum(tl.where(mask, g, 0.0), 0)
                sum_gx += tl.sum(tl.where(mask, g * xhat, 0.0), 0)
            tl.store(parts_ptr + (row * CHUNKS + chunk) * C + c, sum_g, mask_c)
            tl.store(parts_ptr + ((row + ROWS) * CHUNKS + chunk) * C + c, sum_gx, mask_c)


@triton.jit
def _fold_sums_kernel(
    parts_ptr, weight_ptr, scale_ptr, scale_stride_b, scale_stride_c, sums_ptr, means_ptr, B, ROWS, HW, CHUNKS,
    C: tl.constexpr, CPG: tl.constexpr, REPEATS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """sums (2, ROWS, C) of parts over the chunks; means (2, B, GROUPS) of gain * g and gain * g * xhat over a group

    Program:   (b, group)
    Traffic:   1 read of parts
    """
    GROUPS: tl.constexpr = C // CPG
    group = tl.program_id(0) % GROUPS
    n = (tl.program_id(0) // GROUPS).to(tl.int64)
    size = HW * (CPG * 1.0)
    for part in tl.static_range(2):
        mean = tl.zeros((), tl.float32)
        for first in range(0, CPG, BLOCK_C):
            lane = first + tl.arange(0, BLOCK_C)
            c = group * CPG + lane
            mask_c = lane < CPG
            weight = tl.load(weight_ptr + c, mask_c, 0.0).to(tl.float32)
            for repeat in tl.static_range(REPEATS):
                row = n + repeat * B
                if row < ROWS:
                    total = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
                    for start in range(0, CHUNKS, BLOCK_K):
                        k = start + tl.arange(0, BLOCK_K)
                        at = (((row + part * ROWS) * CHUNKS + k) * C)[:, None] + c[None, :]
                        total += tl.load(parts_ptr + at, (k < CHUNKS)[:, None] & mask_c[None, :], 0.0)
                    total = tl.sum(total, 0)
                    tl.store(sums_ptr + (row + part * ROWS) * C + c, total, mask_c)
                    gain = weight
                    if scale_ptr is not None:
                        at_scale = scale_ptr + row * scale_stride_b + c.to(tl.int64) * scale_stride_c
                        gain = gain * (1.0 + tl.load(at_scale, mask_c, 0.0).to(tl.float32))
                    mean += tl.sum(gain * total, 0) / size
        tl.store(means_ptr + (n + part * B) * GROUPS + group, mean)


@triton.jit
def _dx_kernel(
    x_ptr, x_stride_b, x_stride_h, x_stride_w, x_stride_c,
    x2_ptr, x2_stride_b, x2_stride_h, x2_stride_w, x2_stride_c,
    g_ptr, g_stride_b, g_stride_h, g_stride_w, g_stride_c,
    dx_ptr, dx_stride_b, dx_stride_h, dx_stride_w, dx_stride_c,
    dx2_ptr, dx2_stride_b, dx2_stride_h, dx2_stride_w, dx2_stride_c,
    moments_ptr, means_ptr, x_bias_ptr, weight_ptr, bias_ptr,
    scale_ptr, scale_stride_b, scale_stride_c, shift_ptr, shift_stride_b, shift_stride_c,
    dx_sums_ptr, B, ROWS, H, W,
    C1: tl.constexpr, C2: tl.constexpr, CPG: tl.constexpr, REPEATS: tl.constexpr,
    SILU: tl.constexpr, RESAMPLE: tl.constexpr,
    FLAT: tl.constexpr, VEC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx = rstd * (gain * g - means[0] - xhat * means[1]), and the sums of dx that are x_bias's gradient

    Layout:    as _sums_kernel; dx, dx2 like x, x2; dx_sums (B, ceil(HW / BLOCK_P), C) fp32 or None
    Program:   (b, BLOCK_P pixels, channel block of one of x and x2)
    Precision: fp32, one rounding at the store
    Traffic:   1 read of x, 1 of g, 1 write of dx
    Reference: the gradient of reference.ada_group_norm
    """
    C: tl.constexpr = C1 + C2
    BLOCKS_C: tl.constexpr = tl.cdiv(C1, BLOCK_C) + tl.cdiv(C2, BLOCK_C)
    blocks_p = tl.cdiv(H * W, BLOCK_P)
    pid = tl.program_id(0)
    p = (pid // BLOCKS_C) % blocks_p * BLOCK_P + tl.arange(0, BLOCK_P)
    n = (pid // BLOCKS_C // blocks_p).to(tl.int64)
    second, c_in, c, mask_c = channels_of(pid % BLOCKS_C, C1, C2, BLOCK_C)
    mask = (p < H * W)[:, None] & mask_c[None, :]
    mean, rstd = moments_at(moments_ptr, x_bias_ptr, n, B, c, mask_c, C // CPG, CPG)
    mean_g = tl.load(means_ptr + n * (C // CPG) + c // CPG, mask_c, 0.0)
    mean_gx = tl.load(means_ptr + (n + B) * (C // CPG) + c // CPG, mask_c, 0.0)
    x = _load_x(
        x_ptr, x_stride_b, x_stride_h, x_stride_w, x_stride_c,
        x2_ptr, x2_stride_b, x2_stride_h, x2_stride_w, x2_stride_c,
        n, p, W, c_in, second, mask, C2, FLAT, VEC,
    )  # fmt: skip
    xhat = (x - mean[None, :]) * rstd[None, :]
    dx = -mean_g[None, :] - xhat * mean_gx[None, :]
    for repeat in tl.static_range(REPEATS):
        row = n + repeat * B
        if row < ROWS:
            gain, offset = affine(
                weight_ptr, bias_ptr, scale_ptr, scale_stride_b, scale_stride_c,
                shift_ptr, shift_stride_b, shift_stride_c, row, c, mask_c,
            )  # fmt: skip
            g = _upstream(
                g_ptr, g_stride_b, g_stride_h, g_stride_w, g_stride_c,
                row, p, p // W, p % W, c, mask, RESAMPLE, FLAT, VEC,
            )  # fmt: skip
            if SILU:
                g = _through_silu(g, xhat * gain[None, :] + offset[None, :])
            dx += gain[None, :] * g
    dx = dx * rstd[None, :]
    if dx_sums_ptr is not None:
        part = n * blocks_p + (pid // BLOCKS_C) % blocks_p
        tl.store(dx_sums_ptr + part * C + c, tl.sum(tl.where(mask, dx, 0.0), 0), mask_c)
    dx = dx.to(dx_ptr.dtype.element_ty)
    if C2 > 0 and second:
        at = pixel_offset(p, W, dx2_stride_h, dx2_stride_w, FLAT, VEC)
        tl.store(addresses(dx2_ptr + n * dx2_stride_b * VEC, at, c_in, dx2_stride_c), dx, mask)
    else:
        at = pixel_offset(p, W, dx_stride_h, dx_stride_w, FLAT, VEC)
        tl.store(addresses(dx_ptr + n * dx_stride_b * VEC, at, c_in, dx_stride_c), dx, mask)


@triton.jit
def _slab_backward_kernel(
    x_ptr, x_stride_b, x_stride_h, x_stride_w, x_stride_c,
    x2_ptr, x2_stride_b, x2_stride_h, x2_stride_w, x2_stride_c,
    g_ptr, g_stride_b, g_stride_h, g_stride_w, g_stride_c,
    dx_ptr, dx_stride_b, dx_stride_h, dx_stride_w, dx_stride_c,
    dx2_ptr, dx2_stride_b, dx2_stride_h, dx2_stride_w, dx2_stride_c,
    moments_ptr, x_bias_ptr, weight_ptr, bias_ptr,
    scale_ptr, scale_stride_b, scale_stride_c, shift_ptr, shift_stride_b, shift_stride_c,
    sums_ptr, dx_sums_ptr, B, ROWS, H, W,
    C1: tl.constexpr, C2: tl.constexpr, CPG: tl.constexpr, REPEATS: tl.constexpr,
    SILU: tl.constexpr, RESAMPLE: tl.constexpr, FLAT: tl.constexpr, VEC: tl.constexpr,
    SLAB: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx, dx2, dx_sums and sums (2, ROWS, C) in one launch; without dx_ptr the sums alone

    Layout:    as _sums_kernel; dx_sums (B, 1, C) fp32 or None
    Program:   (b, SLAB channels), whole groups with all their pixels in registers
    Precision: fp32, one rounding at the store
    Traffic:   1 read of x, 1 of g, 1 write of dx: the floor
    Reference: the gradient of reference.ada_group_norm
    """
    C: tl.constexpr = C1 + C2
    SLABS: tl.constexpr = tl.cdiv(C, SLAB)
    n = (tl.program_id(0) // SLABS).to(tl.int64)
    lane = tl.arange(0, BLOCK_C)
    c = (tl.program_id(0) % SLABS) * SLAB + lane
    mask_c = (lane < SLAB) & (c < C)
    p = tl.arange(0, BLOCK_P)
    mask_p = p < H * W
    mask = mask_p[:, None] & mask_c[None, :]
    h = p // W
    w = p % W
    x = load_slab(
        x_ptr, x_stride_b, x_stride_h, x_stride_w, x_stride_c,
        x2_ptr, x2_stride_b, x2_stride_h, x2_stride_w, x2_stride_c,
        None, n, n, h, w, c, mask_p, mask_c, C1, C2, VEC,
    )  # fmt: skip
    mean, rstd = moments_at(moments_ptr, x_bias_ptr, n, B, c, mask_c, C // CPG, CPG)
    xhat = (x - mean[None, :]) * rstd[None, :]
    dx = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    total_g = tl.zeros((BLOCK_C,), tl.float32)
    total_gx = tl.zeros((BLOCK_C,), tl.float32)
    for repeat in tl.static_range(REPEATS):
        row = n + repeat * B
        if row < ROWS:
            gain, offset = affine(
                weight_ptr, bias_ptr, scale_ptr, scale_stride_b, scale_stride_c,
                shift_ptr, shift_stride_b, shift_stride_c, row, c, mask_c,
            )  # fmt: skip
            g = _upstream(
                g_ptr, g_stride_b, g_stride_h, g_stride_w, g_stride_c,
                row, p, h, w, c, mask, RESAMPLE, FLAT, VEC,
            )  # fmt: skip
            if SILU:
                g = _through_silu(g, xhat * gain[None, :] + offset[None, :])
            # outside the mask xhat can be infinite
            sum_g = tl.sum(tl.where(mask, g, 0.0), 0)
            sum_gx = tl.sum(tl.where(mask, g * xhat, 0.0), 0)
            tl.store(sums_ptr + row * C + c, sum_g, mask_c)
            tl.store(sums_ptr + (row + ROWS) * C + c, sum_gx, mask_c)
            dx += gain[None, :] * g
            total_g += gain * sum_g
            total_gx += gain * sum_gx
    if dx_ptr is not None:
        size = H * W * (CPG * 1.0)
        mean_g = over_groups(total_g, lane, SLAB, CPG) / size
        mean_gx = over_groups(total_gx, lane, SLAB, CPG) / size
        dx = (dx - mean_g[None, :] - xhat * mean_gx[None, :]) * rstd[None, :]
        if dx_sums_ptr is not None:
            tl.store(dx_sums_ptr + n * C + c, tl.sum(tl.where(mask, dx, 0.0), 0), mask_c)
        dx = dx.to(dx_ptr.dtype.element_ty)
        at = grid_offset(h, w, dx_stride_h, dx_stride_w, VEC) + n * dx_stride_b * VEC
        tl.store(addresses(dx_ptr, at, c, dx_stride_c), dx, mask & (c < C1)[None, :])
        if C2 > 0:
            at = grid_offset(h, w, dx2_stride_h, dx2_stride_w, VEC) + n * dx2_stride_b * VEC
            tl.store(addresses(dx2_ptr, at, c - C1, dx2_stride_c), dx, mask & (c >= C1)[None, :])


def plan_ada_group_norm_backward(
    norm: Norm,
    g: Tensor,
    moments: Tensor,
    sums: Tensor,
    dx: Tensor | None,
    dx2: Tensor | None,
    dx_sums: Tensor | None,
) -> list[Plan]:
    """The launches in order; they write sums (2, ROWS, C) fp32, and dx, dx2 and dx_sums (B, dx_blocks, C) if given"""
    x, x2, groups = norm.x, norm.x2, moments.shape[2]
    vec = vector(x, x2, g, dx, dx2)
    reads = {**norm.arguments(vec), **address("g", g, vec), "moments_ptr": moments}
    writes = {**address("dx", dx, vec), **address("dx2", dx2, vec), "dx_sums_ptr": dx_sums}
    fixed = {**norm.constexprs(groups), "FLAT": flat(x, x2, g, dx, dx2), "VEC": vec}
    shape = (x.device, norm.b, norm.channels, norm.pixels, x.dtype)
    if slab_fits(norm.channels, norm.channels // groups, norm.pixels, _slab_elements(norm)):
        slab = slab_channels(norm.channels, norm.channels // groups)
        block_p, block_c = power_of_two(norm.pixels), power_of_two(slab)
        held = 256 if _crowded(norm) else 512
        s = settings("slab_backward", *shape, num_warps=max(1, min(16, block_p * block_c // held)))
        return [
            Plan(
                kernel=_slab_backward_kernel,
                grid=(norm.b * triton.cdiv(norm.channels, slab),),
                args={**reads, **writes, "sums_ptr": sums},
                constexprs={**fixed, "SLAB": slab, "BLOCK_P": block_p, "BLOCK_C": block_c},
                num_warps=s["num_warps"],
            )
        ]
    chunks = num_chunks(norm.pixels)
    parts = torch.empty((2, norm.rows, chunks, norm.channels), dtype=torch.float32, device=x.device)
    means = torch.empty((2, norm.b, groups), dtype=torch.float32, device=x.device)
    # four loads of the gradient a pixel, two rows of it, two tensors, or many addresses need registers
    narrow = not wide(vec, x, x2, g)
    crowded = norm.resample == "up" or norm.rows > norm.b or x2 is not None or narrow
    block_p = 32 if crowded else 64
    # 16 bytes for each of 64 threads
    warps = 8 if narrow else max(1, min(4, block_p * norm.block_c // 512))
    rule = {"BLOCK_P": block_p, "BLOCK_C": norm.block_c, "num_warps": warps}
    s = settings("sums", *shape, **rule)
    plans = [
        Plan(
            kernel=_sums_kernel,
            grid=(norm.b * chunks * norm.blocks_c(s["BLOCK_C"]),),
            args={**reads, "parts_ptr": parts, "CHUNKS": chunks},
            constexprs={**fixed, "BLOCK_P": s["BLOCK_P"], "BLOCK_C": s["BLOCK_C"]},
            num_warps=s["num_warps"],
        ),
        _plan_fold_sums(norm, parts, sums, means),
    ]
    if dx is not None:
        s = _dx_settings(x, x2)
        plans.append(
            Plan(
                kernel=_dx_kernel,
                grid=(norm.b * triton.cdiv(norm.pixels, s["BLOCK_P"]) * norm.blocks_c(s["BLOCK_C"]),),
                args={**reads, **writes, "means_ptr": means},
                constexprs={**fixed, "BLOCK_P": s["BLOCK_P"], "BLOCK_C": s["BLOCK_C"]},
                num_warps=s["num_warps"],
            )
        )
    return plans


def _plan_fold_sums(norm: Norm, parts: Tensor, sums: Tensor, means: Tensor) -> Plan:
    groups, chunks = means.shape[2], parts.shape[2]
    per_group = norm.channels // groups
    tile = fold_block(chunks, per_group)
    scale_stride_b, scale_stride_c = (None, None) if norm.scale is None else norm.scale.stride()
    return Plan(
        kernel=_fold_sums_kernel,
        grid=(norm.b * groups,),
        args={
            **{"parts_ptr": parts, "weight_ptr": norm.weight, "sums_ptr": sums, "means_ptr": means},
            **{"scale_ptr": norm.scale, "scale_stride_b": scale_stride_b, "scale_stride_c": scale_stride_c},
            **{"B": norm.b, "ROWS": norm.rows, "HW": norm.pixels, "CHUNKS": chunks},
        },
        constexprs={
            **{"C": norm.channels, "CPG": per_group, "REPEATS": 1 + (norm.rows > norm.b)},
            **tile,
        },
        num_warps=max(1, tile["BLOCK_K"] * tile["BLOCK_C"] // FOLD_PER_WARP),
    )


def dx_blocks(norm: Norm, groups: int) -> int:
    """Parts of dx_sums an image: it is (B, dx_blocks, C)"""
    if slab_fits(norm.channels, norm.channels // groups, norm.pixels, _slab_elements(norm)):
        return 1
    return triton.cdiv(norm.pixels, _dx_settings(norm.x, norm.x2)["BLOCK_P"])


def _crowded(norm: Norm) -> bool:
    """Two tensors, two rows of gradients, or their resampling take registers"""
    return norm.x2 is not None or norm.rows > norm.b or norm.resample is not None


def _slab_elements(norm: Norm) -> int:
    most = SLAB_ELEMENTS if wide(vector(norm.x, norm.x2), norm.x, norm.x2) else SLAB_ELEMENTS // 4
    return most // 2 if _crowded(norm) else most


def _dx_settings(x: Tensor, x2: Tensor | None) -> dict[str, int]:
    c1, c2 = x.shape[1], 0 if x2 is None else x2.shape[1]
    crowded = x.element_size() > 2 or not wide(vector(x, x2), x, x2)
    rule = {"BLOCK_P": 32 if crowded else 64, "BLOCK_C": block_of_both(c1, c2), "num_warps": 4}
    return settings("dx", x.device, x.shape[0], c1 + c2, x.shape[2] * x.shape[3], x.dtype, **rule)
