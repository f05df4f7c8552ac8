"""One row of a solver's table: guidance, prediction, next state, history and the network's next input in one launch"""

import functools
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .._plan import Plan
from .._tuning import power_of_two, settings
from ..philox import STREAM_STEP
from .philox import element_normals, normals

MAX_INTERLEAVED = 32  # channels of a tile; more, which images do not have, would leave it few pixels
MAX_TILE = 1 << 16  # how far beyond the last element a masked lane may point
IMAGES = ("x", "out", "x_net", "x0", "hist", "grad", "noise")
Sizes = tuple[int, ...]


@triton.jit
def _add(total, coef, value):
    """total + coef * value, and total for coef 0 even where value is NaN"""
    return tl.where(coef != 0, total + coef * value, total)


@triton.jit
def _at(p, c, tile, stride_c, stride_h, stride_w, W):
    """Offset of pixel p, channel c in an image; None: stride_h where rows have no gaps, stride_w where the tile lies in
    memory's order, stride_c where its channels do, too"""
    if stride_c is None:
        return tile
    elif stride_w is None:
        return tile + c * stride_c
    elif stride_h is None:
        return p * stride_w + c * stride_c
    else:
        return p // W * stride_h + p % W * stride_w + c * stride_c


@triton.jit
def _guided_step_kernel(
    x_ptr, x_n, x_c, x_h, x_w,
    out_ptr, out_n, out_c, out_h, out_w, out_null, out_v,
    x_net_ptr, x_net_n, x_net_c, x_net_h, x_net_w, x_net_null,
    x0_ptr, x0_n, x0_c, x0_h, x0_w,
    hist_ptr, hist_n, hist_c, hist_h, hist_w,
    grad_ptr, grad_n, grad_c, grad_h, grad_w,
    noise_ptr, noise_n, noise_c, noise_h, noise_w,
    coefs_ptr, coefs_k, w_ptr, w_n, seeds_ptr, seeds_n, draw_ptr,
    M, M_NEXT, HW, W,
    C: tl.constexpr, INTERLEAVED: tl.constexpr, WHOLE: tl.constexpr, WIDE: tl.constexpr,
    LEARNED: tl.constexpr, STREAM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x, hist, x0 and x_net of one table row, by the formulas of reference.guided_step

    Layout:    x, x0, hist, grad, noise (N, C, H, W), out (N + M, C, H, W), its null rows at out_null and v at out_v,
               x_net (N + M_NEXT, C, H, W), its null rows at x_net_null; any strides, as _at takes them.
               A missing tensor is None with its strides; so is w where M = 0.
               Images that lie densely and alike in every tensor come as C = 1, whatever their layout.
    Program:   BLOCK times four elements in memory's order, each four one access where the layout allows.
               INTERLEAVED (channels innermost): (n, BLOCK // C quads of 4 consecutive pixels), all channels;
               else (n, c, BLOCK quads). A quad and channel own one Philox counter if WHOLE: HW % 4 == 0.
    Precision: fp32; x, hist and x0 are fp32, x_net is rounded once
    Traffic:   each tensor once; none whose coefficients are zero, and no null row of an image with w = 0
    Reference: reference.guided_step
    """
    CT: tl.constexpr = C if INTERLEAVED else 1
    QUADS: tl.constexpr = BLOCK // CT
    quads = tl.cdiv(HW, 4)
    blocks = tl.cdiv(quads, QUADS)
    pid = tl.program_id(0)
    first = pid % blocks * QUADS
    image = pid // blocks
    if WIDE:
        first = first.to(tl.int64)
    e = tl.arange(0, BLOCK * 4)
    # spelt by fours, so that Triton gives a thread four neighbours of every tensor: with eight of a 16-bit one and four
    # of an fp32 one it would exchange them through shared memory
    tile = first * (4 * CT) + (e // 4 * 4 + e % 4 if WHOLE else e)
    if INTERLEAVED:
        four = e // 4
        quad = four // C
        j = (four - quad * C) * 4 + e % 4
        # j // C, which is 0 to 3
        pixel = (j >= C).to(tl.int32) + (j >= 2 * C).to(tl.int32) + (j >= 3 * C).to(tl.int32)
        c = j - pixel * C
        p = (first + quad) * 4 + pixel
    else:
        c = image % C
        image = image // C
        p = first * 4 + e
    if WIDE:
        c = c.to(tl.int64)
    # index < end are the elements of the image; by fours, Triton sees that four neighbours share their mask
    index = e // 4 if WHOLE else e
    end = tl.minimum(QUADS, quads - first) * CT if WHOLE else tl.minimum(QUADS * 4, HW - first * 4) * CT
    n = image.to(tl.int64)

    k_x = tl.load(coefs_ptr)
    k_out = tl.load(coefs_ptr + coefs_k)
    x0_max = tl.load(coefs_ptr + coefs_k * 3)
    c_x = tl.load(coefs_ptr + coefs_k * 4)
    c_x0 = tl.load(coefs_ptr + coefs_k * 5)
    c_out = tl.load(coefs_ptr + coefs_k * 6)
    reads_x = (k_x != 0) | (c_x != 0)
    reads_out = (k_out != 0) | (c_out != 0)
    reads_v = tl.full((), 0, tl.int1)
    if hist_ptr is not None:
        c_hist = tl.load(coefs_ptr + coefs_k * 7)
        h_x = tl.load(coefs_ptr + coefs_k * 10)
        h_x0 = tl.load(coefs_ptr + coefs_k * 11)
        reads_x |= h_x != 0
    if grad_ptr is not None:
        k_grad = tl.load(coefs_ptr + coefs_k * 2)
        c_grad = tl.load(coefs_ptr + coefs_k * 8)
        reads_v |= c_grad != 0
    if noise_ptr is not None or seeds_ptr is not None:
        c_noise = tl.load(coefs_ptr + coefs_k * 9)
        reads_v |= c_noise != 0

    x_ptrs = x_ptr + n * x_n + _at(p, c, tile, x_c, x_h, x_w, W)
    x = tl.load(x_ptrs, mask=index < tl.where(reads_x, end, 0), other=0.0)
    out_ptrs = out_ptr + n * out_n + _at(p, c, tile, out_c, out_h, out_w, W)
    g = tl.load(out_ptrs, mask=index < tl.where(reads_out, end, 0), other=0.0).to(tl.float32)
    if w_ptr is not None:
        weight = tl.load(w_ptr + n * w_n, mask=n < M, other=0.0)
        null_end = tl.where(reads_out & (weight != 0), end, 0)
        null = tl.load(out_ptrs + out_null, mask=index < null_end, other=0.0).to(tl.float32)
        # weight 0 leaves g as it is
        g = (1.0 + weight) * g - weight * null
    if hist_ptr is not None:
        hist_ptrs = hist_ptr + n * hist_n + _at(p, c, tile, hist_c, hist_h, hist_w, W)
        hist = tl.load(hist_ptrs, mask=index < tl.where(c_hist != 0, end, 0), other=0.0)
    if grad_ptr is not None:
        grad_ptrs = grad_ptr + n * grad_n + _at(p, c, tile, grad_c, grad_h, grad_w, W)
        grad = tl.load(grad_ptrs, mask=index < tl.where((k_grad != 0) | (c_grad != 0), end, 0), other=0.0)
    if LEARNED:
        v = tl.load(out_ptrs + out_v, mask=index < tl.where(reads_v, end, 0), other=0.0).to(tl.float32)
        log_beta = tl.load(coefs_ptr + coefs_k * 12)
        log_beta_tilde = tl.load(coefs_ptr + coefs_k * 13)

    if noise_ptr is not None:
        noise_ptrs = noise_ptr + n * noise_n + _at(p, c, tile, noise_c, noise_h, noise_w, W)
        z = tl.load(noise_ptrs, mask=index < tl.where(c_noise != 0, end, 0), other=0.0)
    elif seeds_ptr is not None:
        z = tl.zeros(e.shape, tl.float32)
        if c_noise != 0:
            t = tl.arange(0, BLOCK)
            draw = tl.load(draw_ptr)
            if WHOLE or C == 1:
                # as a tensor, whose layout Triton then keeps up to the gather; a scalar costs three more exchanges
                seed = tl.load(seeds_ptr + n * seeds_n + t * 0)
                counter = first + t // CT + (t % CT if INTERLEAVED else c) * quads
                z = normals(counter.to(tl.uint32), draw, STREAM, seed).reshape(BLOCK * 4)
                if INTERLEAVED:
                    # from (quad, channel, pixel) to memory's (quad, pixel, channel); elements past end wrap
                    z = tl.gather(z, ((quad * C + c) * 4 + pixel) & (BLOCK * 4 - 1), 0)
            else:
                seed = tl.load(seeds_ptr + n * seeds_n)
                z = element_normals((p + c * HW).to(tl.int64), draw, STREAM, seed)

    x0 = _add(_add(0.0, k_x, x), k_out, g)
    x0 = tl.maximum(tl.minimum(x0, x0_max, tl.PropagateNan.ALL), -x0_max, tl.PropagateNan.ALL)
    if grad_ptr is not None:
        x0 = _add(x0, k_grad, grad)
    x_next = _add(_add(_add(0.0, c_x, x), c_x0, x0), c_out, g)
    if hist_ptr is not None:
        x_next += c_hist * hist
        hist_next = _add(_add(0.0, h_x, x), h_x0, x0)
    if LEARNED:
        f = (v + 1.0) * 0.5
        var = tl.exp(f * log_beta + (1.0 - f) * log_beta_tilde)
        if grad_ptr is not None:
            grad *= var
        if noise_ptr is not None or seeds_ptr is not None:
            z *= tl.sqrt(var)
    if grad_ptr is not None:
        x_next = _add(x_next, c_grad, grad)
    if noise_ptr is not None or seeds_ptr is not None:
        x_next = _add(x_next, c_noise, z)

    if hist_ptr is not None:
        # hist' does not depend on hist, which another thread may yet have to load
        tl.debug_barrier()
        tl.store(hist_ptrs, hist_next, mask=index < end)
    tl.store(x_ptrs, x_next, mask=index < end)
    if x0_ptr is not None:
        tl.store(x0_ptr + n * x0_n + _at(p, c, tile, x0_c, x0_h, x0_w, W), x0, mask=index < end)
    if x_net_ptr is not None:
        x_net_ptrs = x_net_ptr + n * x_net_n + _at(p, c, tile, x_net_c, x_net_h, x_net_w, W)
        x_net = x_next.to(x_net_ptr.dtype.element_ty)
        tl.store(x_net_ptrs, x_net, mask=index < end)
        tl.store(x_net_ptrs + x_net_null, x_net, mask=index < tl.where(n < M_NEXT, end, 0))


def _dense(sizes: Sizes, strides: Sizes) -> bool:
    expected = 1
    for stride, size in sorted(zip(strides, sizes, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


# plans of an eager loop repeat, and this is most of their cost
@functools.lru_cache(maxsize=1024)
def _geometry(sizes: Sizes, strides: tuple[Sizes | None, ...], drawn: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """(strides as _at takes them, HW and W by parameter name; constexprs) of images (C, H, W); strides by IMAGES

    drawn: the noise is Philox's, which counts elements in (C, H, W) order and so ties a quad to four pixels.
    """
    c, h, w = sizes

    def meaningful(stride: Sizes) -> Sizes:
        return tuple(s if size > 1 else 0 for s, size in zip(stride, sizes, strict=True))

    inner = {name: meaningful(stride[1:]) for name, stride in zip(IMAGES, strides, strict=True) if stride is not None}
    x, width = inner["x"], w
    spans = (sum(s * (size - 1) for s, size in zip(stride, sizes, strict=True)) for stride in inner.values())
    wide = max(c * h * w, *spans) >= 2**31 - MAX_TILE
    if set(inner.values()) == {x} and _dense(sizes, x) and (not drawn or x == meaningful((h * w, w, 1))):
        c, h, w = 1, 1, c * h * w
        inner = dict.fromkeys(inner, (0, 0, 1))
        x = inner["x"]
    interleaved = 1 < c <= MAX_INTERLEAVED and x[0] < x[2 if w > 1 else 1]

    def merged(stride_c: int, stride_h: int, stride_w: int) -> tuple[int | None, ...]:
        if h > 1 and w > 1 and stride_h != w * stride_w:
            return stride_c, stride_h, stride_w
        stride_w = stride_w if w > 1 else stride_h
        if (interleaved and (stride_c, stride_w) == (1, c)) or (c == 1 and stride_w == 1):
            return None, None, None
        return stride_c, None, None if stride_w == 1 and not interleaved else stride_w

    args: dict[str, Any] = {"HW": h * w, "W": None}
    for name, stride in zip(IMAGES, strides, strict=True):
        args[f"{name}_n"] = None if stride is None else stride[0]
        in_image = (None,) * 3 if stride is None else merged(*inner[name])
        args |= zip((f"{name}_c", f"{name}_h", f"{name}_w"), in_image, strict=True)
        if in_image[1] is not None:
            args["W"] = width
    return args, {"C": c, "INTERLEAVED": interleaved, "WHOLE": h * w % 4 == 0, "WIDE": wide}


def plan_guided_step(
    x: Tensor,
    out: Tensor,
    coefs: Tensor,
    w: Tensor | None = None,
    *,
    x_net: Tensor | None = None,
    x0: Tensor | None = None,
    hist: Tensor | None = None,
    grad: Tensor | None = None,
    noise: Tensor | None = None,
    seeds: Tensor | None = None,
    draw: Tensor | None = None,
    learned: bool = False,
) -> Plan:
    """x float32, everything else as guided_step has checked it"""
    n, channels, height, width = x.shape
    m = out.shape[0] - n
    strides = tuple(None if t is None else t.stride() for t in (x, out, x_net, x0, hist, grad, noise))
    args, constexprs = _geometry((channels, height, width), strides, seeds is not None)
    # 1024 elements a program, 8 a thread; fewer where that would leave multiprocessors idle, or where a plane is small
    planes, per_quad = (1, constexprs["C"]) if constexprs["INTERLEAVED"] else (constexprs["C"], 1)
    quads = triton.cdiv(args["HW"], 4)
    block = min(256 if x.numel() >= 1 << 19 else 128, power_of_two(quads * per_quad))
    warps = max(1, min(4, block // 32))
    tuned = settings("guided_step", x.device, n, channels, height * width, out.dtype, BLOCK=block, num_warps=warps)
    block = max(tuned["BLOCK"], power_of_two(per_quad))
    return Plan(
        kernel=_guided_step_kernel,
        grid=(n * planes * triton.cdiv(quads, block // per_quad),),
        args={
            **args,
            "x_ptr": x,
            "out_ptr": out,
            "out_null": n * out.stride(0) if m else None,
            "out_v": channels * out.stride(1) if learned else None,
            "x_net_ptr": x_net,
            "x_net_null": None if x_net is None else n * x_net.stride(0),
            "x0_ptr": x0,
            "hist_ptr": hist,
            "grad_ptr": grad,
            "noise_ptr": noise,
            "coefs_ptr": coefs,
            "coefs_k": coefs.stride(0),
            "w_ptr": w if m else None,
            "w_n": w.stride(0) if m and w is not None else None,
            "seeds_ptr": seeds,
            "seeds_n": None if seeds is None else seeds.stride(0),
            "draw_ptr": draw,
            "M": m,
            "M_NEXT": 0 if x_net is None else x_net.shape[0] - n,
        },
        constexprs={**constexprs, "LEARNED": learned, "STREAM": STREAM_STEP, "BLOCK": block},
        num_warps=tuned["num_warps"],
    )
