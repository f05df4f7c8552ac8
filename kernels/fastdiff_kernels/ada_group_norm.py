"""GroupNorm with adaptive scale and shift, then SiLU: forward and backward"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import reference
from ._checks import FLOATS, check_device, check_dtype, check_int, check_shape


class _AdaGroupNorm(torch.autograd.Function):
    """y = act(normalised * gain + offset); saves x and per-channel statistics, no activation in fp32

    With u = normalised * gain + offset, g = dL/du, xhat = normalised, E the mean over a group:
    dL/dx = rstd * (gain * g - E[gain * g] - xhat * E[gain * g * xhat])
    """

    @staticmethod
    def forward(
        x: Tensor, gain: Tensor, offset: Tensor, groups: int, eps: float, silu: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        centred, mean, rstd = reference.centre(x, groups, eps)
        y = centred.mul_(rstd * gain).add_(offset)
        return (F.silu(y, inplace=True) if silu else y).to(x.dtype), mean, rstd

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, gain, offset, ctx.groups, _, ctx.silu = inputs
        _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.save_for_backward(x, gain, offset, mean, rstd)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, offset, mean, rstd = ctx.saved_tensors
        centred, slope, grad = x.to(mean.dtype) - mean, rstd * gain, grad.to(mean.dtype)
        if ctx.silu:
            grad = torch.ops.aten.silu_backward(grad, (centred * slope).add_(offset))
        grad_sum = grad.sum((2, 3), keepdim=True)
        grad_dot = (grad * centred).sum((2, 3), keepdim=True)
        dx = None
        if ctx.needs_input_grad[0]:
            pixels = max(x.shape[2] * x.shape[3], 1)
            group_sum = reference.over_group((slope * grad_sum / pixels)[..., 0, 0], ctx.groups)
            group_dot = reference.over_group((slope * grad_dot / pixels)[..., 0, 0], ctx.groups) * rstd * rstd
            dx = centred.mul_(-group_dot).sub_(group_sum).addcmul_(grad, slope).to(x.dtype)
        dgain, doffset = (grad_dot * rstd).sum_to_size(gain.shape), grad_sum.sum_to_size(offset.shape)
        return dx, dgain, doffset, None, None, None


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
) -> Tensor:
    """y = silu((GroupNorm(x) * weight + bias) * (1 + scale[b, c]) + shift[b, c]); silu=False leaves the SiLU out

    Layout:    x, y (B, C, H, W), y in the layout of x (channels_last stays channels_last); weight, bias (C,);
               scale, shift (B, C), both or neither, any strides.
    Precision: x float16, bfloat16, float32 or float64; the others x.dtype or float32. Statistics by two passes and
               affine in fp32 (fp64 for fp64 x), one rounding at the end.
    Traffic:   no activation but x is kept for the backward pass; once differentiable.
    Reference: reference.ada_group_norm

    Raises ValueError for a shape, device, groups or eps that does not fit, TypeError for a dtype: nothing is cast.
    """
    check_shape("x", x, ("B", "C", "H", "W"))
    check_dtype("x", x, FLOATS)
    b, c = x.shape[:2]
    check_int("groups", groups, 1)
    if c % groups:
        raise ValueError(f"groups must divide the {c} channels of x, got {groups}")
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")
    if (scale is None) != (shift is None):
        raise ValueError("scale and shift must be given together, got only one; pass zeros for the other")
    operands: list[tuple[str, Tensor, tuple[int, ...]]] = [("weight", weight, (c,)), ("bias", bias, (c,))]
    if scale is not None and shift is not None:
        operands += [("scale", scale, (b, c)), ("shift", shift, (b, c))]
    for name, value, shape in operands:
        check_shape(name, value, shape)
        check_dtype(name, value, (x.dtype, torch.float32))
        check_device(name, value, x.device)
    gain, offset = reference.modulated_affine(weight, bias, scale, shift, torch.promote_types(x.dtype, torch.float32))
    return _AdaGroupNorm.apply(x, gain, offset, groups, eps, silu)[0]
