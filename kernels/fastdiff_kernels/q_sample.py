"""The forward process and its training target, the noise drawn in the same pass"""

from typing import Any

import torch
from torch import Tensor

from . import reference
from ._checks import FLOATS, check_device, check_dtype, check_pixels, check_shape
from ._impl import TRITON_DTYPES, check_impl, plain, uses_triton
from .philox import STREAM_TRAINING, check_draw, check_seeds

PREDICTIONS = ("eps", "v", "x0")


def _outputs(x0: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x0, dtype=dtype), torch.empty_like(x0, dtype=torch.promote_types(x0.dtype, torch.float32))


def _q_sample(
    x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    noise: Tensor | None,
    seeds: Tensor | None,
    draw: Tensor | None,
    draw_value: int,
    prediction: str,
    dtype: torch.dtype,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """draw_value is read without draw"""
    x_t, target = _outputs(x0, dtype)
    draws = draw_value if draw is None else draw
    if uses_triton(impl, x0) and dtype in TRITON_DTYPES:
        from .jit.q_sample import plan_q_sample

        plan_q_sample(x0, alpha, sigma, noise, seeds, draws, STREAM_TRAINING, x_t, target, prediction).launch()
        return x_t, target
    if seeds is not None:
        noise = reference.philox_normal(seeds, x0.shape[1:], draw=draws, stream=STREAM_TRAINING, dtype=target.dtype)
    assert noise is not None
    values = reference.q_sample(x0, alpha, sigma, noise, prediction=prediction, dtype=dtype)
    # an op's result may share no memory with its inputs, and has the layout of x0
    return x_t.copy_(values[0]), target.copy_(values[1])


_q_sample_op = torch.library.custom_op("fastdiff_kernels::q_sample", _q_sample, mutates_args=())


@_q_sample_op.register_fake
def _(x0: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    dtype, _impl = rest[-2:]
    return _outputs(x0, dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x0, alpha, sigma, *_, ctx.prediction, _, _ = inputs
    ctx.dtype = x0.dtype
    ctx.save_for_backward(alpha, sigma)
    ctx.set_materialize_grads(False)
    if ctx.prediction == "eps":
        ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor | None, grad_target: Tensor | None) -> tuple[Tensor | None, ...]:
    alpha, sigma = (value[:, None, None, None] for value in ctx.saved_tensors)
    wide = torch.promote_types(ctx.dtype, torch.float32)
    dx0 = None if grad is None else alpha * grad.to(wide)
    if grad_target is not None and ctx.prediction != "eps":
        through = grad_target if ctx.prediction == "x0" else -sigma * grad_target
        dx0 = through if dx0 is None else dx0 + through
    return (None if dx0 is None else dx0.to(ctx.dtype), *(None,) * 9)


_q_sample_op.register_autograd(_backward, setup_context=_setup_context)


def q_sample(
    x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    *,
    noise: Tensor | None = None,
    seeds: Tensor | None = None,
    draw: int | Tensor = 0,
    prediction: str = "eps",
    dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(x_t, target) with x_t = alpha[b] * x0 + sigma[b] * eps, and what a network should say for it: eps,
    v = alpha[b] * eps - sigma[b] * x0, or x0

    A term whose coefficient is zero is not read.

    Layout:    x0, x_t, target (B, C, H, W), x_t and target in the layout of x0; alpha, sigma (B,); any strides.
               eps is noise (B, C, H, W), or philox_normal of seeds int64 (B,), stream STREAM_TRAINING, at draw, an int
               in [0, 2^32) or an int64 tensor (1,): exactly one of noise and seeds.
    Precision: x0 float16, bfloat16, float32 or float64; noise that dtype or float32; alpha and sigma float32 (float64
               too for float64 x0). Computed in fp32 (fp64 for fp64 x0): target stays so, x_t is rounded once to dtype,
               that of x0 unless given.
    Traffic:   1 read + 2 writes, and the read of noise. Differentiable in x0 alone.
    Reference: reference.q_sample; Ho et al., 2006.11239, eq. 4; Salimans & Ho, 2202.00512, appendix D

    Raises ValueError for a shape, device, range or combination that does not fit, TypeError for a dtype.
    """
    check_shape("x0", x0, ("B", "C", "H", "W"))
    check_dtype("x0", x0, FLOATS)
    b, c, height, width = x0.shape
    check_pixels("x0", x0)
    for name, value in (("alpha", alpha), ("sigma", sigma)):
        check_shape(name, value, (b,), "one an image")
        check_dtype(name, value, (torch.float32, torch.promote_types(x0.dtype, torch.float32)))
        check_device(name, value, x0.device, like="x0")
    if (noise is None) == (seeds is None):
        got = "neither" if noise is None else "both"
        raise ValueError(f"exactly one of noise and seeds must be given, got {got}: eps is noise or drawn from seeds")
    if seeds is not None:
        check_seeds(seeds, b)
        check_device("seeds", seeds, x0.device, like="x0")
        check_draw(draw, seeds.device)
    if noise is not None:
        check_shape("noise", noise, (b, c, height, width))
        check_dtype("noise", noise, (x0.dtype, torch.float32))
        check_device("noise", noise, x0.device, like="x0")
        if isinstance(draw, Tensor) or draw != 0:
            what = "a tensor" if isinstance(draw, Tensor) else draw
            raise ValueError(f"draw must be left out with noise, got {what}: it counts what seeds draw")
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction must be one of {', '.join(map(repr, PREDICTIONS))}, got {prediction!r}")
    dtype = x0.dtype if dtype is None else dtype
    if dtype not in FLOATS:
        raise TypeError(f"dtype must be one of {', '.join(map(str, FLOATS))}, got {dtype}")
    check_impl(impl, x0, "x0")
    if impl == "triton" and dtype not in TRITON_DTYPES:
        raise ValueError(f"impl='triton' needs dtype to be one of {TRITON_DTYPES}, got {dtype}; use impl='reference'")
    for name, given in (("alpha", alpha), ("sigma", sigma), ("noise", noise)):
        if given is not None and given.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} must not require grad, got requires_grad=True: only x0 has a gradient; detach it")
    run = _q_sample if plain(x0, alpha, sigma, noise) else _q_sample_op
    on_device, by_value = (draw, 0) if isinstance(draw, Tensor) else (None, draw)
    return run(x0, alpha, sigma, noise, seeds, on_device, by_value, prediction, dtype, impl)
