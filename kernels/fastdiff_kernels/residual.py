"""The end of a residual block, and the statistics of what it wrote"""

from typing import Any

import torch
from torch import Tensor

from . import reference
from ._checks import FLOATS, check_bool, check_device, check_dtype, check_pixels, check_resample, check_shape
from ._impl import check_impl, plain, uses_triton
from ._tuning import num_chunks


def _outputs(h: Tensor, stats: bool) -> tuple[Tensor, Tensor]:
    """y like h, and statistics without chunks where none are asked for"""
    b, c, height, width = h.shape
    chunks = num_chunks(height * width) if stats else 0
    dtype = torch.promote_types(h.dtype, torch.float32)
    return torch.empty_like(h), torch.empty((2, b, chunks, c), dtype=dtype, device=h.device)


def _residual(
    h: Tensor, bias: Tensor | None, skip: Tensor, resample: str | None, stats: bool, impl: str
) -> tuple[Tensor, Tensor]:
    y, statistics = _outputs(h, stats)
    if uses_triton(impl, h):
        from .jit.residual import plan_residual

        plan_residual(h, bias, skip, y, statistics if stats else None, resample).launch()
        return y, statistics
    value, of_value = reference.residual(h, bias, skip, resample=resample, stats=stats)
    if value.stride() != y.stride():
        value = y.copy_(value)
    return value, statistics if of_value is None else of_value


_residual_op = torch.library.custom_op("fastdiff_kernels::residual", _residual, mutates_args=())


@_residual_op.register_fake
def _(
    h: Tensor, bias: Tensor | None, skip: Tensor, resample: str | None, stats: bool, impl: str
) -> tuple[Tensor, Tensor]:
    return _outputs(h, stats)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, bias, _, ctx.resample, _, _ = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    dbias, dskip = None, grad
    wide = torch.promote_types(grad.dtype, torch.float32)
    if ctx.needs_input_grad[1]:
        dbias = grad.sum((0, 2, 3), dtype=wide).to(ctx.bias_dtype)
    if ctx.resample == "down":
        dskip = reference.nearest_2x(grad * 0.25)
    elif ctx.resample == "up":
        dskip = reference.sum_2x2(grad.to(wide)).to(grad.dtype)
    return grad, dbias, dskip, None, None, None


_residual_op.register_autograd(_backward, setup_context=_setup_context)


def residual(
    h: Tensor,
    bias: Tensor | None,
    skip: Tensor,
    *,
    resample: str | None = None,
    stats: bool = True,
    impl: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """(y, stats) of y = h + bias[c] + resample(skip), h a convolution's output that its bias was kept from

    stats holds mean and M2, the sum of squared deviations from that mean, of each channel of y over each of CHUNKS
    chunks of pixels, for the norm that reads y next. Chunk k is the row-major pixels [k P, min((k + 1) P, H W)),
    P = ceil(H W / CHUNKS), zeros where it is empty; CHUNKS depends on H W alone. stats=False leaves it out: None.

    Layout:    h, y (B, C, H, W), y in the layout of h; bias (C,); skip (B, C, H, W), or (B, C, 2H, 2W) that
               resample="down" averages 2 x 2, or (B, C, H/2, W/2) that resample="up" repeats; any strides;
               stats (2, B, CHUNKS, C).
    Precision: h and skip of one dtype, float16, bfloat16, float32 or float64; bias that dtype or float32. Sum in fp32
               (fp64 for fp64 h), one rounding at the end; statistics of the rounded y, in fp32 (fp64) by two passes.
    Traffic:   2 reads + 1 write. Differentiable but for stats.
    Reference: reference.residual

    Raises ValueError for a shape, device or resample that does not fit, TypeError for a dtype: nothing is cast.
    """
    check_shape("h", h, ("B", "C", "H", "W"))
    check_dtype("h", h, FLOATS)
    b, c, height, width = h.shape
    check_pixels("h", h)
    check_resample(resample)
    check_bool("stats", stats)
    size, why = (height, width), ""
    if resample == "down":
        size, why = (2 * height, 2 * width), "resample='down' halves it"
    elif resample == "up":
        if height % 2 or width % 2:
            raise ValueError(f"h must have even height and width for resample='up', got {height} x {width}")
        size, why = (height // 2, width // 2), "resample='up' doubles it"
    check_shape("skip", skip, (b, c, *size), why)
    check_dtype("skip", skip, (h.dtype,), "it must have h's dtype")
    check_device("skip", skip, h.device, like="h")
    if bias is not None:
        check_shape("bias", bias, (c,))
        check_dtype("bias", bias, (h.dtype, torch.float32))
        check_device("bias", bias, h.device, like="h")
    check_impl(impl, h, "h")
    run = _residual if plain(h, bias, skip) else _residual_op
    y, statistics = run(h, bias, skip, resample, stats, impl)
    return y, statistics if stats else None
