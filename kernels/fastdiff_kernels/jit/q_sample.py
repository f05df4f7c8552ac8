"""The forward process and its training target, the noise drawn in the same pass"""

import triton
import triton.language as tl
from torch import Tensor

from .._plan import Plan
from .._tuning import channel_block, settings
from .philox import element_normals, normals
from .tile import address, addresses, flat, pixel_offset, vector

WARPS = 4


@triton.jit
def _q_sample_kernel(
    x0_ptr, x0_stride_b, x0_stride_h, x0_stride_w, x0_stride_c,
    noise_ptr, noise_stride_b, noise_stride_h, noise_stride_w, noise_stride_c,
    x_t_ptr, x_t_stride_b, x_t_stride_h, x_t_stride_w, x_t_stride_c,
    target_ptr, target_stride_b, target_stride_h, target_stride_w, target_stride_c,
    alpha_ptr, alpha_stride, sigma_ptr, sigma_stride, seeds_ptr, seeds_stride, draw_ptr, draw_value, HW, W,
    C: tl.constexpr, PREDICTION: tl.constexpr, STREAM: tl.constexpr, QUADS: tl.constexpr,
    FLAT: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """x_t = alpha[b] * x0 + sigma[b] * eps; target = eps, alpha[b] * eps - sigma[b] * x0, or x0

    Layout:    x0, noise, x_t, target (B, C, H, W), strides in vectors; images that are dense in one order come as
               (B, 1, 1, C H W). alpha, sigma (B,). Without noise eps is normal element % 4 of counter
               (element // 4, draw, STREAM, 0) under seeds[b], element = c * HW + p; draw int64 (1,) or draw_value.
    Program:   (b, BLOCK quads of 4 consecutive pixels, channel block), channel blocks fastest: a quad of a channel is
               a whole counter. QUADS is False where HW % 4 != 0 or noise is given; then each normal is drawn alone.
    Precision: any float in; fp32, one rounding at the store
    Traffic:   1 read + 2 writes, and the read of noise; what only a zero coefficient multiplies is not read
    Reference: reference.q_sample
    """
    BLOCK_P: tl.constexpr = 4 * BLOCK
    BLOCKS_C: tl.constexpr = tl.cdiv(C, BLOCK_C)
    blocks_p = tl.cdiv(HW, BLOCK_P)
    pid = tl.program_id(0)
    first = (pid // BLOCKS_C % blocks_p).to(tl.int64) * BLOCK_P
    n = (pid // BLOCKS_C // blocks_p).to(tl.int64)
    c = (pid % BLOCKS_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = first + tl.arange(0, BLOCK_P)
    mask_c = (c < C)[None, :]
    mask = (p < HW)[:, None] & mask_c

    alpha = tl.load(alpha_ptr + n * alpha_stride)
    sigma = tl.load(sigma_ptr + n * sigma_stride)
    # pixels of which x0 and noise are read
    x0_end = HW
    noise_end = HW
    if PREDICTION == "v":
        x0_end = tl.where((alpha != 0) | (sigma != 0), HW, 0)
        noise_end = x0_end
    elif PREDICTION == "eps":
        x0_end = tl.where(alpha != 0, HW, 0)
    else:
        noise_end = tl.where(sigma != 0, HW, 0)
    at = pixel_offset(p, W, x0_stride_h, x0_stride_w, FLAT, VEC) + n * x0_stride_b * VEC
    x0 = tl.load(addresses(x0_ptr, at, c, x0_stride_c), (p < x0_end)[:, None] & mask_c, 0.0).to(tl.float32)
    if noise_ptr is not None:
        at = pixel_offset(p, W, noise_stride_h, noise_stride_w, FLAT, VEC) + n * noise_stride_b * VEC
        noise_mask = (p < noise_end)[:, None] & mask_c
        eps = tl.load(addresses(noise_ptr, at, c, noise_stride_c), noise_mask, 0.0).to(tl.float32)
    else:
        seed = tl.load(seeds_ptr + n * seeds_stride)
        draw = tl.load(draw_ptr) if draw_ptr is not None else tl.zeros((), tl.int64) + draw_value
        if QUADS:
            quad = first // 4 + tl.arange(0, BLOCK)
            index = quad[:, None] + (c.to(tl.int64) * (HW // 4))[None, :]
            drawn = normals(index.to(tl.uint32), draw, STREAM, seed)
            eps = drawn.permute(0, 2, 1).reshape(BLOCK_P, BLOCK_C)
        else:
            eps = element_normals(p[:, None] + (c.to(tl.int64) * HW)[None, :], draw, STREAM, seed)

    alpha_x0 = tl.where(alpha != 0, alpha * x0, 0.0)
    sigma_eps = tl.where(sigma != 0, sigma * eps, 0.0)
    if PREDICTION == "eps":
        target = eps
    elif PREDICTION == "x0":
        target = x0
    else:
        target = tl.where(alpha != 0, alpha * eps, 0.0) - tl.where(sigma != 0, sigma * x0, 0.0)
    at = pixel_offset(p, W, x_t_stride_h, x_t_stride_w, FLAT, VEC) + n * x_t_stride_b * VEC
    tl.store(addresses(x_t_ptr, at, c, x_t_stride_c), (alpha_x0 + sigma_eps).to(x_t_ptr.dtype.element_ty), mask)
    at = pixel_offset(p, W, target_stride_h, target_stride_w, FLAT, VEC) + n * target_stride_b * VEC
    tl.store(addresses(target_ptr, at, c, target_stride_c), target.to(target_ptr.dtype.element_ty), mask)


def _dense_alike(first: Tensor, *others: Tensor) -> bool:
    """Whether every image of these tensors fills its memory without gaps, all in one order of elements"""
    sizes = first.shape[1:]
    steps = [tuple(s for s, size in zip(t.stride()[1:], sizes, strict=True) if size > 1) for t in (first, *others)]
    size = 1
    for step, length in sorted(zip(steps[0], (size for size in sizes if size > 1), strict=True)):
        if step != size:
            return False
        size *= length
    return all(other == steps[0] for other in steps)


def _row_major(x: Tensor) -> bool:
    return len(x) == 0 or x[0].is_contiguous()


def _as_row(x: Tensor) -> Tensor:
    """(B, 1, 1, C H W), each image in the order of memory"""
    count = x.shape[1:].numel()
    return x.as_strided((len(x), 1, 1, count), (x.stride(0), count, count, 1))


def plan_q_sample(
    x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    noise: Tensor | None,
    seeds: Tensor | None,
    draw: Tensor | int,
    stream: int,
    x_t: Tensor,
    target: Tensor,
    prediction: str,
) -> Plan:
    """Writes x_t and target, any strides; noise or seeds is None, and draw is read with seeds"""
    if _dense_alike(x0, x_t, target, *(() if noise is None else (noise,))) and (noise is not None or _row_major(x0)):
        x0, x_t, target = _as_row(x0), _as_row(x_t), _as_row(target)
        noise = None if noise is None else _as_row(noise)
    b, c, height, width = x0.shape
    pixels, vec, block_c = height * width, vector(x0, noise, x_t, target), channel_block(c)
    # elements of each operand that a thread holds; a narrow access takes registers for its own address
    held = 16 if vec > 1 or x0.stride(3) == 1 else 4
    s = settings(
        *("q_sample", x0.device, b, c, pixels, x0.dtype),
        BLOCK=32 * WARPS * held // (4 * block_c),
        BLOCK_C=block_c,
        num_warps=WARPS,
    )
    by_value = seeds is not None and not isinstance(draw, Tensor)
    return Plan(
        kernel=_q_sample_kernel,
        grid=(b * triton.cdiv(pixels, 4 * s["BLOCK"]) * triton.cdiv(c, s["BLOCK_C"]),),
        args={
            **address("x0", x0, vec),
            **address("noise", noise, vec),
            **address("x_t", x_t, vec),
            **address("target", target, vec),
            **{"alpha_ptr": alpha, "alpha_stride": alpha.stride(0)},
            **{"sigma_ptr": sigma, "sigma_stride": sigma.stride(0)},
            **{"seeds_ptr": seeds, "seeds_stride": None if seeds is None else seeds.stride(0)},
            **{"draw_ptr": draw if isinstance(draw, Tensor) else None, "draw_value": draw if by_value else None},
            **{"HW": pixels, "W": width},
        },
        constexprs={
            **{"C": c, "PREDICTION": prediction, "STREAM": stream},
            **{"QUADS": seeds is not None and (pixels % 4 == 0 or c == 1)},
            **{"FLAT": flat(x0, noise, x_t, target), "VEC": vec, "BLOCK": s["BLOCK"], "BLOCK_C": s["BLOCK_C"]},
        },
        num_warps=s["num_warps"],
    )
