"""The specification of every op in plain PyTorch: any device, float64 stays float64, differentiable, no host reads"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

MASK32 = 0xFFFFFFFF


def centre(x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x - mean in the dtype of the statistics, with mean and 1 / sqrt(var + eps) per (sample, channel), (B, C, 1, 1)

    Two passes: E[x^2] - mean^2 loses every digit where the mean is large, and so does torch's group_norm of a
    channels_last tensor on CPU. Channel means are averaged, so no tensor is regrouped and the layout stays.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = over_group(x.mean((2, 3)), groups)
    centred = x - mean
    var = over_group((centred * centred).mean((2, 3)), groups)
    return centred, mean, torch.rsqrt(var + eps)


def over_group(per_channel: Tensor, groups: int) -> Tensor:
    b, c = per_channel.shape
    grouped = per_channel.view(b, groups, c // groups)
    return grouped.mean(2, keepdim=True).expand_as(grouped).reshape(b, c, 1, 1)


def modulated_affine(
    weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(gain, offset) with gain * normalised + offset = (weight * normalised + bias) * (1 + scale) + shift

    Both (B, C, 1, 1) in dtype, or (1, C, 1, 1) without modulation.
    """
    gain, offset = weight.to(dtype)[None], bias.to(dtype)[None]
    if scale is not None and shift is not None:
        modulation = 1 + scale.to(dtype)
        gain, offset = gain * modulation, offset * modulation + shift.to(dtype)
    return gain[..., None, None], offset[..., None, None]


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
    """y = silu((GroupNorm(x) * weight + bias) * (1 + scale[b, c]) + shift[b, c])

    Layout:    x, y (B, C, H, W), y in the layout of x; weight, bias (C,); scale, shift (B, C), both or neither.
    Precision: any float in; statistics by two passes and affine in fp32 (fp64 for fp64 x); one rounding at the end.
    Reference: Wu & He, 1803.08494, section 3; Dhariwal & Nichol, 2105.05233, section 3.1 (AdaGN)
    """
    centred, _, rstd = centre(x, groups, eps)
    gain, offset = modulated_affine(weight, bias, scale, shift, centred.dtype)
    y = centred * (rstd * gain) + offset
    return (F.silu(y) if silu else y).to(x.dtype)


def guided_step(
    x: Tensor,
    out: Tensor,
    coefs: Tensor,
    w: Tensor | None = None,
    *,
    noise: Tensor | None = None,
    hist: Tensor | None = None,
    grad: Tensor | None = None,
    learned: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(x', x0, h') of one table row

    g  = (1 + w) * out[i] - w * out[N + i] for images i < M with w[i] != 0, else out[i]
    x0 = clamp(k_x * x + k_out * g, +-x0_max) + k_grad * grad
    x' = c_x * x + c_x0 * x0 + c_out * g + c_hist * h + c_grad * S * grad + c_noise * s * z
    h' = h_x * x + h_x0 * x0
    S  = exp(f * log_beta + (1 - f) * log_beta_tilde), s = sqrt(S), f = (v + 1) / 2; S = s = 1 unless learned

    A term whose coefficient is zero is not read: NaN in it does not leak. Without noise, hist or grad their
    coefficients are taken as zero, and h' is None without hist; the coefficients are not looked at on the host.

    Layout:    x, noise, hist, grad (N, C, H, W); out (N + M, C or 2C, H, W), row N + j the null row of image j < M;
               v is out[:N, C:], read if learned; coefs (NUM_COEFS,) in the order of COEFS; w (N,).
    Precision: everything in the dtype of x, out is cast up first.
    Reference: Ho & Salimans, 2207.12598, eq. 6; Dhariwal & Nichol, 2105.05233, alg. 1; Nichol & Dhariwal,
               2102.09672, eq. 15
    """
    k_x, k_out, k_grad, x0_max, c_x, c_x0, c_out, c_hist, c_grad, c_noise, h_x, h_x0, log_beta, log_beta_tilde = (
        coefs.unbind()
    )
    n, c = x.shape[:2]
    m = out.shape[0] - n
    out = out.to(x.dtype)
    g = out[:n, :c]
    if w is not None and m:
        weight = w[:m, None, None, None]
        # an unread null row makes w = 0 exactly the conditional row
        null = torch.where(weight != 0, out[n:, :c], 0)
        g = torch.cat(((1 + weight) * g[:m] - weight * null, g[m:]))
    var = std = None
    if learned:
        f = (out[:n, c:] + 1) / 2
        var = torch.exp(f * log_beta + (1 - f) * log_beta_tilde)
        std = torch.sqrt(var)

    x0 = torch.clamp(_term(k_x, x) + _term(k_out, g), -x0_max, x0_max)
    if grad is not None:
        x0 = x0 + _term(k_grad, grad)
    x_next = _term(c_x, x) + _term(c_x0, x0) + _term(c_out, g)
    if hist is not None:
        x_next = x_next + _term(c_hist, hist)
    if grad is not None:
        x_next = x_next + _term(c_grad, grad if var is None else var * grad)
    if noise is not None:
        x_next = x_next + _term(c_noise, noise if std is None else std * noise)
    return x_next, x0, None if hist is None else _term(h_x, x) + _term(h_x0, x0)


def _term(coef: Tensor, value: Tensor) -> Tensor:
    return coef * torch.where(coef != 0, value, 0)


def philox4x32(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four output words of four counter words and two key words, all int64 in [0, 2^32)

    Reference: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011), section 4.3
    """
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        # int64 products wrap, which keeps all 64 bits; only c0 and c2 need their upper half cleared
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((p1 >> 32) ^ c1 ^ k0) & MASK32, p1, ((p0 >> 32) ^ c3 ^ k1) & MASK32, p0
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return c0, c1 & MASK32, c2, c3 & MASK32


def _philox_words(seeds: Tensor, count: int, draw: int | Tensor, stream: int) -> tuple[Tensor, ...]:
    """Four (N, ceil(count / 4)) tensors: word j of counter (i, draw, stream, 0) belongs to element 4 i + j"""
    index = torch.arange((count + 3) // 4, device=seeds.device)[None]
    draws = torch.full((1, 1), draw, device=seeds.device) if isinstance(draw, int) else draw[None] & MASK32
    streams = torch.full((1, 1), stream, device=seeds.device)
    key = seeds[:, None] & MASK32, (seeds[:, None] >> 32) & MASK32
    return philox4x32((index, draws, streams, torch.zeros_like(streams)), key)


def _interleave(parts: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    return torch.stack(tuple(parts), -1).flatten(1)[:, : math.prod(shape)].reshape(len(parts[0]), *shape)


def philox_uint32(seeds: Tensor, shape: Sequence[int], *, draw: int | Tensor, stream: int) -> Tensor:
    """int64 (N, *shape) of 32-bit words, each a function of (seed, draw, stream, element) alone"""
    return _interleave(_philox_words(seeds, math.prod(shape), draw, stream), shape)


def philox_normal(
    seeds: Tensor, shape: Sequence[int], *, draw: int | Tensor, stream: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """(N, *shape) of standard normals by Box-Muller on the words of philox_uint32

    u = ((word >> 8) + 0.5) * 2^-24, (z0, z1) = sqrt(-2 ln u0) * (cos, sin)(2 pi u1), (z2, z3) of words 2 and 3.
    Computed in float32 whatever dtype is, so that a float64 run sees the float32 run's noise.
    """
    words = _philox_words(seeds, math.prod(shape), draw, stream)
    m0, m1, m2, m3 = ((word >> 8).to(torch.int32) for word in words)
    (cos_1, sin_1), (cos_3, sin_3) = _cos_sin(m1), _cos_sin(m3)
    r0, r2 = _radius(m0), _radius(m2)
    return _interleave((r0 * cos_1, r0 * sin_1, r2 * cos_3, r2 * sin_3), shape).to(dtype)


def _radius(m: Tensor) -> Tensor:
    """sqrt(-2 ln u), u = (m + 0.5) * 2^-24"""
    # m + 0.5 is exact in float32 below 2^23 only; above, 1 - u is, and log1p keeps the digits where u nears 1
    upper = m >= 1 << 23
    v = (torch.where(upper, (1 << 24) - 1 - m, m).to(torch.float32) + 0.5) * 2.0**-24  # min(u, 1 - u)
    return torch.sqrt(-2 * torch.where(upper, torch.log1p(-v), torch.log(v)))


def _cos_sin(m: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of (m + 0.5) * 2^-24 turns: the nearest quarter turn and a polynomial, the same on every device"""
    q = (m + (1 << 21)) >> 22
    # exact before the last product; in [-pi/4, pi/4]
    a = ((m - (q << 22)).to(torch.float32) + 0.5) * 2.0**-22 * (math.pi / 2)
    s = a * a
    # Taylor to a^9 and a^10: the remainders stay below 2e-9 on [-pi/4, pi/4]
    sin = a * (1 + s * (-1 / 6 + s * (1 / 120 + s * (-1 / 5040 + s * (1 / 362880)))))
    cos = 1 + s * (-1 / 2 + s * (1 / 24 + s * (-1 / 720 + s * (1 / 40320 + s * (-1 / 3628800)))))
    odd = (q & 1) == 1
    return torch.where(odd, sin, cos) * (1 - ((q + 1) & 2)), torch.where(odd, cos, sin) * (1 - (q & 2))


def load_row(table: Tensor, times: Tensor, counter: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(table[counter], times[counter] as (1,), counter + 1); an index of shape (1,) needs no host read"""
    return table.index_select(0, counter)[0], times.index_select(0, counter), counter + 1
