"""GroupNorm with adaptive scale and shift, then SiLU and resampling: forward and backward, in one pass where it fits"""

from typing import Any

import torch
from torch import Tensor

from . import reference
from ._checks import FLOATS, check_bool, check_device, check_dtype, check_int, check_pixels, check_resample, check_shape
from ._host_norm import HostNorm, in_statistics_dtype
from ._impl import check_impl, plain, uses_triton


def _forward(
    x: Tensor,
    x2: Tensor | None,
    x_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    stats: Tensor | None,
    stats2: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
    resample: str | None,
    need_moments: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """y, and (2, B, groups) of each group's mean and 1 / sqrt(var + eps) for a backward pass, or no elements"""
    if uses_triton(impl, x):
        from .jit.ada_group_norm import plan_ada_group_norm
        from .jit.norm import Norm

        y, moments = _outputs(x, x2, scale, groups, resample, need_moments)
        weight, bias, x_bias, stats, stats2 = _dense(weight, bias, x_bias, stats, stats2)
        norm = Norm(x, x2, x_bias, weight, bias, scale, shift, silu, resample)
        for plan in plan_ada_group_norm(norm, y, moments if need_moments else None, groups, eps, stats, stats2):
            plan.launch()
        return y, moments
    on_host = HostNorm(x, x2, x_bias, weight, bias, scale, shift, groups, eps, silu, resample)
    if stats is None and stats2 is None and on_host.exceeds_cache():
        y, moments = _outputs(x, x2, scale, groups, resample, need_moments=True)
        on_host.through_cache(y, moments)
    else:
        y, moments = on_host.at_once(stats, stats2)
        y = _in_layout(y, _empty_y(x, y.shape, "meta"))
    return y, moments if need_moments else moments.new_empty(0)


def _dense(*operands: Tensor | None) -> list[Any]:
    """The small operands whose strides the kernels do not take; a copy only where one is a view with gaps"""
    return [None if operand is None else operand.contiguous() for operand in operands]


def _empty_y(x: Tensor, shape: torch.Size | tuple[int, ...], device: str | None = None) -> Tensor:
    """Uninitialised, in the layout of x: its own where the shape is, else channels_last or contiguous"""
    if tuple(shape) == tuple(x.shape):
        return torch.empty_like(x, device=device or x.device)
    channels_last = x.stride(1) == 1 and not x.is_contiguous()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=x.dtype, device=device or x.device, memory_format=layout)


def _in_layout(value: Tensor, like: Tensor) -> Tensor:
    """value in the dtype and strides of like, copied only where they differ"""
    if value.stride() == like.stride():
        return value.to(like.dtype)
    return torch.empty_like(like, device=value.device).copy_(value)


def _outputs(
    x: Tensor, x2: Tensor | None, scale: Tensor | None, groups: int, resample: str | None, need_moments: bool
) -> tuple[Tensor, Tensor]:
    b, c1, height, width = x.shape
    if resample == "up":
        height, width = 2 * height, 2 * width
    elif resample == "down":
        height, width = height // 2, width // 2
    shape = (b if scale is None else scale.shape[0], c1 + (0 if x2 is None else x2.shape[1]), height, width)
    dtype = torch.promote_types(x.dtype, torch.float32)
    moments = (2, b, groups) if need_moments else (0,)
    return _empty_y(x, shape), torch.empty(moments, dtype=dtype, device=x.device)


def _backward(
    g: Tensor,
    x: Tensor,
    x2: Tensor | None,
    x_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    moments: Tensor,
    silu: bool,
    resample: str | None,
    need_dx: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dx2, sums over pixels of dx for x_bias (C,), and of (g, g * xhat) for the others (2, ROWS, C); what is not
    wanted has no elements

    With u = xhat * gain + offset, g = dL/du, E the mean over a group:
    dx = rstd * (gain * g - E[gain * g] - xhat * E[gain * g * xhat])
    """
    c = x.shape[1] + (0 if x2 is None else x2.shape[1])
    if uses_triton(impl, x):
        from .jit.ada_group_norm_backward import dx_blocks, plan_ada_group_norm_backward
        from .jit.norm import Norm

        weight, bias, x_bias = _dense(weight, bias, x_bias)
        norm = Norm(x, x2, x_bias, weight, bias, scale, shift, silu, resample)
        sums = moments.new_empty((2, len(g), c))
        dx = torch.empty_like(x) if need_dx else None
        dx2 = torch.empty_like(x2) if need_dx and x2 is not None else None
        dx_sums = None
        if need_dx and x_bias is not None:
            dx_sums = moments.new_empty((len(x), dx_blocks(norm, moments.shape[2]), c))
        for plan in plan_ada_group_norm_backward(norm, g, moments, sums, dx, dx2, dx_sums):
            plan.launch()
        dx_bias = moments.new_empty(0) if dx_sums is None else dx_sums.sum((0, 1))
        return x.new_empty(0) if dx is None else dx, x.new_empty(0) if dx2 is None else dx2, dx_bias, sums
    whole = in_statistics_dtype(x, x2, x_bias)
    b, rows, groups = len(x), len(g), moments.shape[2]
    mean, rstd = (reference.spread(moment, whole) for moment in moments)
    gain, offset = reference.modulated_affine(weight, bias, scale, shift, whole.dtype)
    centred, slope = whole - mean, reference.repeat_rows(rstd, rows) * gain
    repeated = reference.repeat_rows(centred, rows)
    grad = g.to(whole.dtype)
    if resample == "up":
        grad = reference.sum_2x2(grad)
    elif resample == "down":
        grad = reference.nearest_2x(grad) * 0.25
    if silu:
        grad = torch.ops.aten.silu_backward(grad, (repeated * slope).add_(offset))
    sum_g = grad.sum((2, 3))
    sum_gx = (grad * repeated).sum((2, 3)) * reference.repeat_rows(rstd, rows)[..., 0, 0]
    sums = torch.stack((sum_g, sum_gx))
    if not need_dx:
        return x.new_empty(0), x.new_empty(0), moments.new_empty(0), sums
    both = sums * gain[..., 0, 0]
    both[:, : rows - b] += both[:, b:]
    size = max(x.shape[2] * x.shape[3], 1) * (c // groups)
    mean_g, mean_gx = both[:, :b].unflatten(2, (groups, -1)).sum(3) / size
    total = centred.mul_(reference.spread(mean_gx, whole) * -(rstd**2)).sub_(reference.spread(mean_g, whole) * rstd)
    total.addcmul_(grad[:b], slope[:b])
    total[: rows - b].addcmul_(grad[b:], slope[b:])
    dx_bias = moments.new_empty(0) if x_bias is None else total.sum((0, 2, 3))
    if x2 is None:
        return _in_layout(total, torch.empty_like(x, device="meta")), x.new_empty(0), dx_bias, sums
    dx, dx2 = total.split((x.shape[1], x2.shape[1]), 1)
    return torch.empty_like(x).copy_(dx), torch.empty_like(x2).copy_(dx2), dx_bias, sums


_op = torch.library.custom_op("fastdiff_kernels::ada_group_norm", _forward, mutates_args=())
_backward_op = torch.library.custom_op("fastdiff_kernels::ada_group_norm_backward", _backward, mutates_args=())


@_op.register_fake
def _(
    x: Tensor, x2: Tensor | None, x_bias: Tensor | None, weight: Tensor, bias: Tensor, scale: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    groups, _eps, _silu, resample, need_moments, _impl = rest[-6:]
    return _outputs(x, x2, scale, groups, resample, need_moments)


@_backward_op.register_fake
def _(
    g: Tensor, x: Tensor, x2: Tensor | None, x_bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    moments, _silu, _resample, need_dx, _impl = rest[-5:]
    c = x.shape[1] + (0 if x2 is None else x2.shape[1])
    dx = torch.empty_like(x) if need_dx else x.new_empty(0)
    dx2 = torch.empty_like(x2) if need_dx and x2 is not None else x.new_empty(0)
    dx_bias = moments.new_empty(c if need_dx and x_bias is not None else 0)
    return dx, dx2, dx_bias, moments.new_empty((2, g.shape[0], c))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, x2, x_bias, weight, bias, scale, shift, *_, ctx.silu, ctx.resample, _, ctx.impl = inputs
    ctx.save_for_backward(x, x2, x_bias, weight, bias, scale, shift, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, g: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if g is None:
        return (None,) * 15
    x, x2, x_bias, weight, bias, scale, shift, moments = ctx.saved_tensors
    wanted = dict(zip(("x", "x2", "x_bias", "weight", "bias", "scale", "shift"), ctx.needs_input_grad[:7], strict=True))
    need_dx = wanted["x"] or wanted["x2"] or wanted["x_bias"]
    repeated = None if x2 is None else reference.repeat_rows(x2, x.shape[0])
    dx, dx2, dx_bias, (sum_g, sum_gx) = _backward_op(
        g, x, repeated, x_bias, weight, bias, scale, shift, moments, ctx.silu, ctx.resample, need_dx, ctx.impl
    )
    if wanted["x2"] and x2.shape[0] != x.shape[0]:
        dx2 = _in_layout(_summed_rows(dx2, x2.shape[0]), torch.empty_like(x2, device="meta"))
    grads: dict[str, Tensor] = {"x": dx, "x2": dx2}
    if wanted["x_bias"]:
        grads["x_bias"] = dx_bias.to(x_bias.dtype)
    if scale is not None:
        if wanted["scale"]:
            grads["scale"] = (sum_gx * weight + sum_g * bias).to(scale.dtype)
        if wanted["shift"]:
            grads["shift"] = sum_g.to(shift.dtype)
        modulation = 1 + scale.to(sum_g.dtype)
        sum_g, sum_gx = sum_g * modulation, sum_gx * modulation
    if wanted["weight"]:
        grads["weight"] = sum_gx.sum(0).to(weight.dtype)
    if wanted["bias"]:
        grads["bias"] = sum_g.sum(0).to(bias.dtype)
    return *(grads.get(name) if need else None for name, need in wanted.items()), *(None,) * 8


def _summed_rows(dx: Tensor, rows: int) -> Tensor:
    """Row b is the sum of row b and, where there is one, of row b + rows, in the dtype of the statistics"""
    total = dx[:rows].to(torch.promote_types(dx.dtype, torch.float32), copy=True)
    total[: dx.shape[0] - rows] += dx[rows:]
    return total


_op.register_autograd(_differentiate, setup_context=_setup_context)


def ada_group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    groups: int,
    eps: float = 1e-5,
    silu: bool = True,
    x2: Tensor | None = None,
    x_bias: Tensor | None = None,
    resample: str | None = None,
    stats: Tensor | None = None,
    stats2: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """y = resample(silu((GroupNorm([x, x2] + x_bias) * weight + bias) * (1 + scale[b, c]) + shift[b, c]))

    silu=False leaves the SiLU out; without scale and shift it is a plain GroupNorm. The options remove whole passes:
    x2:        a second tensor behind x's channels; their concatenation is never made. Of B2 <= B <= 2 B2 rows: row b of
               x goes with row b of x2, or b - B2 from row B2 on; scale then has B rows.
    scale, shift of up to 2B rows: row b of y comes from row b of x, or b - B from row B on.
    x_bias:    the bias of the convolution that made x, added before the norm.
    resample:  "down", the mean of 2 x 2 pixels, or "up", each pixel 2 x 2 times, on the way out.
    stats, stats2: chunk statistics of x and x2 that their producer computed, as `residual` returns them; they must be
               those of the tensors, and gradients are as if they had been computed here. Not read where one launch
               computes its own.

    Layout:    x (B, C1, H, W), x2 (B2, C2, H, W); weight, bias, x_bias (C1 + C2,); scale, shift (ROWS, C1 + C2),
               both or neither, ROWS in [B, 2B]; stats (2, B, CHUNKS, C1) and stats2 (2, B2, CHUNKS2, C2),
               see reference.chunk_statistics; any strides. y (ROWS, C1 + C2, H', W') in the layout of x, any layout
               being right and channels_last fast.
    Program:   up to 256 pixels, where a slab of whole groups fits on chip, (b, slab), one launch; else parts of the
               pixels and blocks of channels: statistics (left out where given), then apply, which merges them. The
               choice and the order of sums depend on the shape of one image only: deterministic, and the same for
               every batch size.
    Precision: x float16, bfloat16, float32 or float64; the others x.dtype or float32. Statistics by two passes and
               affine in fp32 (fp64 for fp64 x), one rounding at the end.
    Traffic:   1 read and 1 write in one launch or where statistics are given, else 2 reads and 1 write. No activation
               but x is kept for the backward pass, which is 2 reads and 1 write, or 4 reads and 1 write; once
               differentiable.
    Reference: reference.ada_group_norm

    impl: "auto" (Triton on a GPU where triton is installed), "triton" or "reference".
    Raises ValueError for a shape, device or option that does not fit, TypeError for a dtype: nothing is cast.
    """
    check_bool("silu", silu)
    check_shape("x", x, ("B", "C", "H", "W"))
    check_dtype("x", x, FLOATS)
    check_pixels("x", x)
    b, c1, height, width = x.shape
    b2, c2 = b, 0
    if x2 is not None:
        check_shape("x2", x2, ("B2", "C2", height, width), "it must be x's but for the channels and rows")
        check_dtype("x2", x2, (x.dtype,), "it must have x's dtype")
        b2, c2 = x2.shape[:2]
        if not b2 <= b <= 2 * b2:
            raise ValueError(f"x2 must have B / 2 to B rows, B = {b} of x, got {b2}")
    c = c1 + c2
    for name, channels in (("x", c1), ("x2", c2)):
        if channels == 0 and (name == "x" or x2 is not None):
            raise ValueError(f"{name} must have at least one channel, got none")
    check_int("groups", groups, 1)
    if c % groups:
        raise ValueError(f"groups must divide the {c} channels of x{' and x2' if c2 else ''}, got {groups}")
    if isinstance(eps, bool) or not isinstance(eps, float | int | torch.SymFloat):
        raise TypeError(f"eps must be a float, got {type(eps).__name__}")
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")
    check_resample(resample)
    if resample == "down" and (height % 2 or width % 2):
        raise ValueError(f"resample='down' needs an even height and width, got {height} x {width}")
    if (scale is None) != (shift is None):
        raise ValueError("scale and shift must be given together, got only one; pass zeros for the other")
    rows = b
    if scale is not None:
        check_shape("scale", scale, ("ROWS", c))
        rows = scale.shape[0]
        if not b <= rows <= 2 * b:
            raise ValueError(f"scale must have B to 2B rows, B = {b} of x, got {rows}")
        if b2 != b and rows != b:
            raise ValueError(f"scale must have the {b} rows of x where x2 has fewer, got {rows}")
    vectors: list[tuple[str, Any, tuple[int, ...]]] = [
        ("weight", weight, (c,)),
        ("bias", bias, (c,)),
        ("x_bias", x_bias, (c,)),
        ("scale", scale, (rows, c)),
        ("shift", shift, (rows, c)),
    ]
    for name, value, shape in vectors:
        if value is not None or name in ("weight", "bias"):
            check_shape(name, value, shape)
            check_dtype(name, value, (x.dtype, torch.float32))
            check_device(name, value, x.device)
    if x2 is not None:
        check_device("x2", x2, x.device)
    for name, part, of, of_rows, channels in (("stats", stats, x, b, c1), ("stats2", stats2, x2, b2, c2)):
        if part is None:
            continue
        if of is None:
            raise ValueError("stats2 must be None without x2, got a tensor")
        check_shape(name, part, (2, of_rows, "CHUNKS", channels), "see reference.chunk_statistics")
        if part.shape[2] < 1:
            raise ValueError(f"{name} must have at least one chunk, got {tuple(part.shape)}")
        check_dtype(name, part, (torch.float32, torch.promote_types(x.dtype, torch.float32)))
        check_device(name, part, x.device)

    check_impl(impl, x)
    differentiable = (x, x2, x_bias, weight, bias, scale, shift)
    need_moments = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in differentiable)
    run = _forward if plain(*differentiable, stats, stats2) else _op
    return run(*differentiable, stats, stats2, groups, eps, silu, resample, need_moments, impl)[0]
