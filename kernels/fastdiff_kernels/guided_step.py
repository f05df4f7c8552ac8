"""Guidance, one row of a solver's table and its noise, in one pass and in place"""

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import reference
from ._checks import FLOATS, check_apart, check_bool, check_device, check_dtype, check_shape, check_writable
from ._impl import check_impl, plain, uses_triton
from .philox import STREAM_STEP, check_seeds

COEFS = (
    *("k_x", "k_out", "k_grad", "x0_max"),
    *("c_x", "c_x0", "c_out", "c_hist", "c_grad", "c_noise"),
    *("h_x", "h_x0"),
    *("log_beta", "log_beta_tilde"),
)
NUM_COEFS = len(COEFS)
STATE_DTYPES = (torch.float32,)


def _guided_step(
    x: Tensor,
    out: Tensor,
    coefs: Tensor,
    w: Tensor | None,
    x_net: Tensor | None,
    x0: Tensor | None,
    hist: Tensor | None,
    grad: Tensor | None,
    noise: Tensor | None,
    seeds: Tensor | None,
    draw: Tensor | None,
    learned: bool,
    impl: str,
) -> None:
    if uses_triton(impl, x, STATE_DTYPES):
        from .jit.guided_step import plan_guided_step

        plan_guided_step(
            x, out, coefs, w,
            x_net=x_net, x0=x0, hist=hist, grad=grad, noise=noise, seeds=seeds, draw=draw, learned=learned,
        ).launch()  # fmt: skip
        # a launch is nothing that autograd sees
        increment_version([tensor for tensor in (x, x_net, x0, hist) if tensor is not None])
        return
    n = len(x)
    if seeds is not None and draw is not None:
        noise = reference.philox_normal(seeds, x.shape[1:], draw=draw, stream=STREAM_STEP, dtype=x.dtype)
    x_next, x0_next, hist_next = reference.guided_step(
        x, out, coefs, w, noise=noise, hist=hist, grad=grad, learned=learned
    )
    x.copy_(x_next)
    if x0 is not None:
        x0.copy_(x0_next)
    if hist is not None and hist_next is not None:
        hist.copy_(hist_next)
    if x_net is not None:
        x_net[:n].copy_(x_next)
        x_net[n:].copy_(x_next[: len(x_net) - n])


_guided_step_op = torch.library.custom_op(
    "fastdiff_kernels::guided_step", _guided_step, mutates_args=("x", "x_net", "x0", "hist")
)
_guided_step_op.register_fake(lambda *args: None)


def guided_step(
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
    impl: str = "auto",
) -> None:
    """Writes the next state into x, and where given the history into hist, the prediction into x0, and into x_net
    the network's next input

    g  = (1 + w) * out[i] - w * out[N + i] for images i < M with w[i] != 0, else out[i]
    x0 = clamp(k_x * x + k_out * g, +-x0_max) + k_grad * grad
    x' = c_x * x + c_x0 * x0 + c_out * g + c_hist * hist + c_grad * S * grad + c_noise * s * z
    hist' = h_x * x + h_x0 * x0
    S  = exp(f * log_beta + (1 - f) * log_beta_tilde), s = sqrt(S), f = (v + 1) / 2; S = s = 1 unless learned

    A term whose coefficient is zero is not read. Without hist, grad or noise the coefficients c_hist, k_grad and
    c_grad, or c_noise are taken as zero: they live on the device, so a missing tensor cannot be noticed.

    Layout:    x, x0, hist, grad, noise (N, C, H, W), any strides, nothing outside a view is written;
               out (N + M, C or 2C, H, W), row N + j the null row of image j; v is out[:N, C:], read if learned;
               coefs (NUM_COEFS,), one row in the order of COEFS; w (N,), needed if M > 0, read for i < M;
               x_net (N + M', C, H, W), row b gets image b, or b - N from row N on; M' in [0, N] may differ from M,
               so that a row without guidance prepares the next one with it.
               z is noise, or philox_normal of seeds int64 (N,) at draw int64 (1,), stream STREAM_STEP.
               No two buffers may overlap.
    Precision: x float32 or float64 and coefs, w, x0, hist, grad, noise like it; out of that dtype or a narrower one,
               cast up first; x_net any float, rounded once.
               Triton, which impl="auto" takes on a GPU and impl="triton" demands, holds the state in float32 alone.
    Traffic:   each tensor once
    Reference: reference.guided_step

    Raises ValueError for a shape, device or combination that does not fit, TypeError for a dtype.
    """
    check_bool("learned", learned)
    check_shape("x", x, ("N", "C", "H", "W"))
    check_dtype("x", x, (torch.float32, torch.float64))
    n, c, height, width = x.shape
    check_shape("out", out, ("N + M", "C or 2C", height, width))
    check_dtype("out", out, [d for d in FLOATS if torch.promote_types(d, x.dtype) == x.dtype])
    rows, channels = out.shape[:2]
    m = rows - n
    if not 0 <= m <= n:
        raise ValueError(f"out must have N + M rows with 0 <= M <= N = {n}, got {rows}")
    if channels not in ((2 * c,) if learned else (c, 2 * c)):
        wanted = f"{2 * c} channels (learned=True)" if learned else f"{c} or {2 * c} channels"
        raise ValueError(f"out must have {wanted} for x of {c}, got {channels}")
    check_shape("coefs", coefs, (NUM_COEFS,))
    if m and w is None:
        raise ValueError(f"w must be given: out has {m} null rows, got None; pass out[:{n}] for w = 0")
    if noise is not None and seeds is not None:
        raise ValueError("noise and seeds must not both be given: z is noise or drawn from seeds")
    if (seeds is None) != (draw is None):
        raise ValueError("seeds and draw must be given together, got only one")
    images = (n, c, height, width)
    for name, value, shape in (
        ("coefs", coefs, (NUM_COEFS,)),
        ("w", w, (n,)),
        ("x0", x0, images),
        ("hist", hist, images),
        ("grad", grad, images),
        ("noise", noise, images),
    ):
        if value is not None:
            check_shape(name, value, shape)
            check_dtype(name, value, (x.dtype,), "it must have x's dtype")
    if x_net is not None:
        check_shape("x_net", x_net, ("N + M'", c, height, width))
        if not n <= x_net.shape[0] <= 2 * n:
            raise ValueError(f"x_net must have N to 2N rows, N = {n}, got {x_net.shape[0]}")
        check_dtype("x_net", x_net, FLOATS)
    if seeds is not None and draw is not None:
        check_seeds(seeds, n)
        # a draw passed by value would freeze in a captured graph
        check_shape("draw", draw, (1,))
        check_dtype("draw", draw, (torch.int64,))
    for name, value in {
        **{"out": out, "coefs": coefs, "w": w, "x0": x0, "hist": hist},
        **{"grad": grad, "noise": noise, "x_net": x_net, "seeds": seeds, "draw": draw},
    }.items():
        if value is not None:
            check_device(name, value, x.device)
    for name, value in (("x", x), ("x0", x0), ("hist", hist), ("x_net", x_net)):
        if value is not None:
            check_writable(name, value)
    check_apart(x=x, x0=x0, hist=hist, x_net=x_net)

    check_impl(impl, x, "x", STATE_DTYPES)

    tensors = (x, out, coefs, w, x_net, x0, hist, grad, noise, seeds, draw)
    if torch.compiler.is_compiling():
        # in place of torch.no_grad: torch.export refuses such a region where it returns nothing
        _guided_step_op(*(None if tensor is None else tensor.detach() for tensor in tensors), learned, impl)
        return
    with torch.no_grad():
        run = _guided_step if plain(*tensors) else _guided_step_op
        run(*tensors, learned, impl)
