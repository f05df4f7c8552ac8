"""The end of a residual block, and the statistics of what it wrote"""

from typing import Any

import torch
from torch import Tensor

from . import reference
from ._checks import (
    FLOATS,
    check_bool,
    check_device,
    check_dtype,
    check_pixels,
    check_resample,
    check_shape,
    check_tensor,
)
from ._impl import check_impl, plain, uses_triton
from ._tuning import num_chunks


def _outputs(h: Tensor, stats: bool) -> tuple[Tensor, Tensor]:
    """y like h, and statistics without chunks where none are asked for"""
    b, c, height, width = h.shape
    chunks = num_chunks(height * width) if stats else 0
    dtype = torch.promote_types(h.dtype, torch.float32)
    return torch.empty_like(h), torch.empty((2, b, chunks, c), dtype=dtype, device=h.device)


def _residual(
    h: Tensor,
    bias: Tensor | None,
    skip: Tensor | None,
    skip2: Tensor | None,
    weight: Tensor | None,
    weight_bias: Tensor | None,
    resample: str | None,
    stats: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """weight (C, C1 + C2)"""
    y, statistics = _outputs(h, stats)
    if uses_triton(impl, h):
        written = statistics if stats else None
        if weight is None or skip is None:
            from .jit.residual import plan_residual

            plan_residual(h, bias, skip, y, written, resample).launch()
        else:
            from .jit.projection import plan_projection

            # their strides are constants of the kernel; a copy only of a view with gaps
            weight, weight_bias = weight.contiguous(), None if weight_bias is None else weight_bias.contiguous()
            plan_projection(h, bias, skip, skip2, weight, weight_bias, y, written).launch()
        return y, statistics
    if weight is not None and skip is not None and h.dtype == torch.bfloat16 and h.device.type == "cpu":
        # bfloat16 products are several times as fast on CPUs that have them, and are rounded before they are added
        parts = [reference.project(x, columns) for x, columns in reference.split_columns(weight, skip, skip2)]
        value = reference.residual_sum(h.float(), (bias, weight_bias), parts).to(h.dtype)
        of_value = reference.chunk_statistics(value, num_chunks(h.shape[2] * h.shape[3])) if stats else None
    else:
        value, of_value = reference.residual(h, bias, skip, skip2, weight, weight_bias, resample=resample, stats=stats)
    if value.stride() != y.stride():
        value = y.copy_(value)
    return value, statistics if of_value is None else of_value


_residual_op = torch.library.custom_op("fastdiff_kernels::residual", _residual, mutates_args=())


@_residual_op.register_fake
def _(h: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *_operands, _resample, stats, _impl = rest
    return _outputs(h, stats)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, bias, skip, skip2, weight, weight_bias, ctx.resample, _, _ = inputs
    ctx.bias_dtypes = [None if value is None else value.dtype for value in (bias, weight_bias)]
    ctx.skip_rows = None if skip is None else skip.shape[0]
    # the sum alone needs no operand for its derivative
    ctx.save_for_backward(*((None, None, None) if weight is None else (skip, skip2, weight)))
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 9
    dskip, dskip2, dweight = None, None, None
    skip, skip2, weight = ctx.saved_tensors
    wide = torch.promote_types(grad.dtype, torch.float32)
    _, need_bias, need_skip, need_skip2, need_weight, need_weight_bias = ctx.needs_input_grad[:6]
    dbiases: list[Tensor | None] = [None, None]
    if need_bias or need_weight_bias:
        total = grad.sum((0, 2, 3), dtype=wide)
        for i, needed in enumerate((need_bias, need_weight_bias)):
            dbiases[i] = total.to(ctx.bias_dtypes[i]) if needed else None
    if weight is not None:
        parts = reference.split_columns(weight, skip, skip2)
        summed = [_sum_fed(grad, x.shape[0], wide) for x, _ in parts]
        given = [
            reference.project(g.to(grad.dtype), columns.mT) if needed else None
            for g, (_, columns), needed in zip(summed, parts, (need_skip, need_skip2), strict=False)
        ]
        dskip, dskip2 = given if len(given) == 2 else (given[0], None)
        if need_weight:
            products = [_pixels(g.to(wide)).mT @ _pixels(x.to(wide)) for g, (x, _) in zip(summed, parts, strict=True)]
            dweight = torch.cat(products, 1).to(weight.dtype)
    elif need_skip:
        dskip = _sum_fed(grad, ctx.skip_rows, wide)
        if ctx.resample == "down":
            dskip = reference.nearest_2x(dskip * 0.25)
        elif ctx.resample == "up":
            dskip = reference.sum_2x2(dskip.to(wide))
        dskip = dskip.to(grad.dtype)
    return grad, dbiases[0], dskip, dskip2, dweight, dbiases[1], None, None, None


def _sum_fed(grad: Tensor, rows: int, wide: torch.dtype) -> Tensor:
    """grad summed over the rows of y that one row of `rows` fed, in the wide dtype; grad itself where each fed one"""
    twice = grad.shape[0] - rows
    if twice == 0:
        return grad
    return torch.cat((grad[:twice].to(wide) + grad[rows:].to(wide), grad[twice:rows].to(wide)))


def _pixels(x: Tensor) -> Tensor:
    """(B H W, C) of (B, C, H, W), a view of channels_last"""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


_residual_op.register_autograd(_backward, setup_context=_setup_context)


def residual(
    h: Tensor,
    bias: Tensor | None,
    skip: Tensor | None,
    skip2: Tensor | None = None,
    weight: Tensor | None = None,
    weight_bias: Tensor | None = None,
    *,
    resample: str | None = None,
    stats: bool = True,
    impl: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """(y, stats) of y = h + bias[c] + resample(skip), h a convolution's output that its bias was kept from

    With weight, y = h + bias[c] + weight @ [skip, skip2] + weight_bias[c] at every pixel, a 1 x 1 convolution of a
    concatenation that is never stored; without skip, y = h + bias[c]. stats holds mean and M2, the sum of squared
    deviations from that mean, of each channel of y over each of CHUNKS chunks of pixels, for the norm that reads y
    next. Chunk k is the row-major pixels [k P, min((k + 1) P, H W)), P = ceil(H W / CHUNKS), zeros where it is empty;
    CHUNKS depends on H W alone. stats=False leaves it out: None.

    Layout:    h, y (B, C, H, W), y in the layout of h; bias, weight_bias (C,); skip (ROWS, C, H, W), or
               (ROWS, C, 2H, 2W) that resample="down" averages 2 x 2, or (ROWS, C, H/2, W/2) that resample="up" repeats;
               any strides; stats (2, B, CHUNKS, C). B in [ROWS, 2 ROWS]: row b of y takes row b of skip, or b - ROWS
               from row ROWS on. With weight (C, C1 + C2), or (C, C1 + C2, 1) or (.., 1, 1): skip (ROWS, C1, H, W),
               skip2 None or (ROWS2, C2, H, W) with rows of its own, no resample.
    Precision: h, skip, skip2 and weight of one dtype, float16, bfloat16, float32 or float64; biases that dtype or
               float32. Products and sum in fp32 (fp64 for fp64 h), no tf32, one rounding at the end; only bfloat16
               products on a CPU are rounded before they are added. Statistics of the rounded y, in fp32 (fp64) by two
               passes.
    Traffic:   2 reads + 1 write, and with weight all of it for every few pixels. Differentiable but for stats.
    Reference: reference.residual

    Raises ValueError for a shape, device or resample that does not fit, TypeError for a dtype: nothing is cast.
    """
    check_shape("h", h, ("B", "C", "H", "W"))
    check_dtype("h", h, FLOATS)
    b, c, height, width = h.shape
    check_pixels("h", h)
    check_resample(resample)
    check_bool("stats", stats)
    if weight is not None and resample is not None:
        raise ValueError(f"resample must be None with weight, got {resample!r}")
    if skip is None and (weight is not None or resample is not None):
        raise ValueError("skip must be given with weight or resample, got None")
    size, why = (height, width), ""
    if resample == "down":
        size, why = (2 * height, 2 * width), "resample='down' halves it"
    elif resample == "up":
        if height % 2 or width % 2:
            raise ValueError(f"h must have even height and width for resample='up', got {height} x {width}")
        size, why = (height // 2, width // 2), "resample='up' doubles it"
    if skip is not None:
        check_shape("skip", skip, ("ROWS", c if weight is None else "C1", *size), why)
    if weight is None and skip2 is not None:
        raise ValueError("skip2 must be None without weight, got a tensor")
    if weight is None and weight_bias is not None:
        raise ValueError("weight_bias must be None without weight, got a tensor; bias is added once")
    if weight is not None and skip is not None:
        if skip2 is not None:
            check_shape("skip2", skip2, ("ROWS", "C2", height, width))
        check_tensor("weight", weight)
        columns = skip.shape[1] + (0 if skip2 is None else skip2.shape[1])
        check_shape("weight", weight, (c, columns, *(1,) * min(max(weight.dim() - 2, 0), 2)), "C, and C1 + C2 of skips")
        weight = weight.flatten(1)
    for name, value in (("skip", skip), ("skip2", skip2), ("weight", weight)):
        if value is not None:
            check_dtype(name, value, (h.dtype,), "it must have h's dtype")
            check_device(name, value, h.device, like="h")
    for name, part in (("skip", skip), ("skip2", skip2)):
        if part is not None and not part.shape[0] <= b <= 2 * part.shape[0]:
            raise ValueError(f"{name} must have B / 2 to B rows, B = {b} of h, got {part.shape[0]}")
    for name, value in (("bias", bias), ("weight_bias", weight_bias)):
        if value is not None:
            check_shape(name, value, (c,))
            check_dtype(name, value, (h.dtype, torch.float32))
            check_device(name, value, h.device, like="h")
    check_impl(impl, h, "h")
    operands = (h, bias, skip, skip2, weight, weight_bias)
    run = _residual if plain(*operands) else _residual_op
    y, statistics = run(*operands, resample, stats, impl)
    return y, statistics if stats else None
