"""The specification of every op in plain PyTorch: any device, float64 stays float64, differentiable, no host reads"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ._tuning import num_chunks

MASK32 = 0xFFFFFFFF


def group_moments(
    stats: Tensor, stats2: Tensor | None, x_bias: Tensor | None, pixels: int, groups: int, eps: float
) -> Tensor:
    """(2, B, groups): mean and 1 / sqrt(var + eps) of [x, x2] + x_bias from the chunk_statistics of x and x2

    Rows of x2 as in ada_group_norm.

    Reference: Chan, Golub & LeVeque, Updating formulae and a pairwise algorithm for computing sample variances, 1979
    """
    mean, m2 = _merge_chunks(stats, pixels)
    if stats2 is not None:
        mean, m2 = (joined(*parts) for parts in zip((mean, m2), _merge_chunks(stats2, pixels), strict=True))
    if x_bias is not None:
        mean = mean + x_bias.to(mean.dtype)
    mean, m2 = (value.unflatten(1, (groups, -1)) for value in (mean, m2))
    group_mean = mean.mean(2)
    var = m2.mean(2) / max(pixels, 1) + (mean - group_mean[..., None]).square().mean(2)
    return torch.stack((group_mean, torch.rsqrt(var + eps)))


def _merge_chunks(stats: Tensor, pixels: int) -> Tensor:
    """(2, B, C) of (2, B, CHUNKS, C)"""
    mean, m2 = stats
    chunks = mean.shape[1]
    size = -(-pixels // chunks)
    starts = torch.arange(chunks, device=mean.device) * size
    count = (pixels - starts).clamp(0, size).to(mean.dtype)[None, :, None]
    total = max(pixels, 1)
    whole = (count * mean).sum(1) / total
    return torch.stack((whole, m2.sum(1) + (count * (mean - whole[:, None]).square()).sum(1)))


def centre(x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """x - mean, and (2, B, groups) of mean and 1 / sqrt(var + eps), in the dtype of the statistics

    Two passes: E[x^2] - mean^2 loses every digit where the mean is large, and so does torch's group_norm of a
    channels_last tensor on CPU. Channel means are averaged, so no tensor is regrouped and the layout stays.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    pixels = max(x.shape[2] * x.shape[3], 1)
    mean = (x.sum((2, 3)) / pixels).unflatten(1, (groups, -1)).mean(2)
    centred = x - spread(mean, x)
    var = ((centred * centred).sum((2, 3)) / pixels).unflatten(1, (groups, -1)).mean(2)
    return centred, torch.stack((mean, torch.rsqrt(var + eps)))


def spread(per_group: Tensor, x: Tensor) -> Tensor:
    """(B, C, 1, 1) of (B, groups), for the channels of x"""
    return per_group.repeat_interleave(x.shape[1] // max(per_group.shape[1], 1), 1)[..., None, None]


def modulated_affine(
    weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(gain, offset) with gain * normalised + offset = (weight * normalised + bias) * (1 + scale) + shift

    Both (ROWS, C, 1, 1) in dtype, or (1, C, 1, 1) without modulation.
    """
    gain, offset = weight.to(dtype)[None], bias.to(dtype)[None]
    if scale is not None and shift is not None:
        modulation = 1 + scale.to(dtype)
        gain, offset = gain * modulation, offset * modulation + shift.to(dtype)
    return gain[..., None, None], offset[..., None, None]


def repeat_rows(x: Tensor, rows: int) -> Tensor:
    """Row b of the result is row b of x, or b - B from row B on; rows in [B, 2B]"""
    return x if rows == len(x) else torch.cat((x, x[: rows - len(x)]))


def joined(x: Tensor, x2: Tensor | None) -> Tensor:
    """[x, x2] along channels; row b of x goes with row b of x2, or b - B2 from row B2 on"""
    return x if x2 is None else torch.cat((x, repeat_rows(x2, len(x))), 1)


def resampled(x: Tensor, resample: str | None) -> Tensor:
    """x, its 2 x 2 averages ("down"), or each pixel four times ("up")"""
    if resample == "down":
        return sum_2x2(x) * 0.25
    return x if resample is None else nearest_2x(x)


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
) -> Tensor:
    """y = resample(silu((GroupNorm([x, x2] + x_bias) * weight + bias) * (1 + scale[b, c]) + shift[b, c]))

    Layout:    x, x2 (B, C1, H, W), (B2, C2, H, W), B in [B2, 2 B2]: row b of x goes with row b of x2, or b - B2 from
               row B2 on; weight, bias, x_bias (C,); scale, shift (ROWS, C), both or neither, ROWS in [B, 2B]: row b of
               y comes from row b of x, or b - B from row B on. y in the layout of x.
    Precision: any float in; statistics by two passes and affine in fp32 (fp64 for fp64 x); one rounding at the end.
    Reference: Wu & He, 1803.08494, section 3; Dhariwal & Nichol, 2105.05233, section 3.1 (AdaGN)
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    whole = joined(x, x2).to(dtype)
    if x_bias is not None:
        whole = whole + x_bias.to(dtype)[:, None, None]
    centred, (_, rstd) = centre(whole, groups, eps)
    gain, offset = modulated_affine(weight, bias, scale, shift, dtype)
    normalised = centred * spread(rstd, whole)
    y = repeat_rows(normalised, len(normalised) if scale is None else len(scale)) * gain + offset
    return resampled(F.silu(y) if silu else y, resample).to(x.dtype)


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


def chunk_statistics(x: Tensor, chunks: int) -> Tensor:
    """(2, B, chunks, C): mean, and M2 = sum of (x - mean)^2, of each channel over each chunk of pixels

    Chunk k is the row-major pixels [k P, min((k + 1) P, H W)), P = ceil(H W / chunks); an empty one holds zeros.
    Layout:    x (B, C, H, W).
    Precision: any float in; two passes in fp32 (fp64 for fp64 x).
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    pixels = x.shape[2] * x.shape[3]
    size = -(-pixels // chunks)
    parts = F.pad(x.flatten(2), (0, chunks * size - pixels)).unflatten(2, (chunks, size))  # (B, C, chunks, P)
    inside = torch.arange(chunks * size, device=x.device).view(chunks, size) < pixels
    mean = parts.sum(3) / inside.sum(1).clamp(min=1)
    # selected before the square, or lanes outside would add mean^2
    deviation = torch.where(inside, parts - mean[..., None], 0)
    return torch.stack((mean, deviation.square().sum(3))).transpose(2, 3).contiguous()


def nearest_2x(x: Tensor) -> Tensor:
    """(B, C, 2H, 2W), every pixel four times; channels_last whatever the layout of x"""
    b, c, height, width = x.shape
    cells = x.permute(0, 2, 3, 1)[:, :, None, :, None].expand(b, height, 2, width, 2, c)
    return cells.reshape(b, 2 * height, 2 * width, c).permute(0, 3, 1, 2)


def sum_2x2(x: Tensor) -> Tensor:
    """(B, C, H / 2, W / 2), the sum of every 2 x 2 pixels"""
    top, bottom = x[:, :, 0::2], x[:, :, 1::2]
    return top[..., 0::2] + top[..., 1::2] + bottom[..., 0::2] + bottom[..., 1::2]


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
) -> tuple[Tensor, Tensor | None]:
    """(y, chunk_statistics of y or None), y = h + bias[c] + resample(skip), h + bias[c], or
    h + bias[c] + weight @ [skip, skip2] + weight_bias[c]

    Layout:    h, y (B, C, H, W); bias, weight_bias (C,); skip (ROWS, C, H, W), (ROWS, C, 2H, 2W) averaged 2 x 2 for
               resample="down", or (ROWS, C, H / 2, W / 2) repeated 2 x 2 for resample="up"; with weight (C, C1 + C2)
               skip (ROWS, C1, H, W) and skip2 (ROWS2, C2, H, W). B in [ROWS, 2 ROWS]: row b of y takes row b of skip,
               or b - ROWS from row ROWS on, and so of skip2.
    Precision: any float in; fp32 (fp64 for fp64 h), one rounding at the end; statistics of the rounded y.
    Reference: Dhariwal & Nichol, 2105.05233, section 3 (residual blocks that resample)
    """
    dtype = torch.promote_types(h.dtype, torch.float32)
    if skip is None:
        added = []
    elif weight is None:
        added = [resampled(skip.to(dtype), resample)]
    else:
        added = [project(x.to(dtype), columns.to(dtype)) for x, columns in split_columns(weight, skip, skip2)]
    y = residual_sum(h.to(dtype), (bias, weight_bias), added).to(h.dtype)
    return y, chunk_statistics(y, num_chunks(h.shape[2] * h.shape[3])) if stats else None


def residual_sum(h: Tensor, biases: Sequence[Tensor | None], added: Sequence[Tensor]) -> Tensor:
    """h + biases[c] + what is added, rows as in residual, in the dtype of h; h comes last, its digits may be few"""
    terms = [repeat_rows(x, h.shape[0]).to(h.dtype) for x in added]
    terms += [bias.to(h.dtype)[:, None, None] for bias in biases if bias is not None]
    total = None
    for term in terms:
        total = term if total is None else total + term
    return h.clone() if total is None else h + total


def split_columns(weight: Tensor, x: Tensor, x2: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    """x and x2 where it is given, each with its columns of weight (C, C1 + C2)"""
    c1 = x.shape[1]
    return [(x, weight[:, :c1])] + ([] if x2 is None else [(x2, weight[:, c1:])])


def project(x: Tensor, weight: Tensor) -> Tensor:
    """(B, C, H, W) of (B, K, H, W) and (C, K): weight applied at every pixel, channels_last"""
    return F.linear(x.permute(0, 2, 3, 1), weight).permute(0, 3, 1, 2)


def q_sample(
    x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    noise: Tensor,
    *,
    prediction: str = "eps",
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """(x_t, target): x_t = alpha[b] * x0 + sigma[b] * eps, target = eps, v = alpha[b] * eps - sigma[b] * x0, or x0

    A term whose coefficient is zero is not read: NaN in it does not leak.

    Layout:    x0, noise (eps), x_t, target (B, C, H, W); alpha, sigma (B,).
    Precision: any float in; fp32 (fp64 for fp64 x0); x_t rounded once to dtype, that of x0 unless given.
    Reference: Ho et al., 2006.11239, eq. 4; Salimans & Ho, 2202.00512, appendix D (v)
    """
    wide = torch.promote_types(x0.dtype, torch.float32)
    clean, eps = x0.to(wide), noise.to(wide)
    alpha, sigma = (value.to(wide)[:, None, None, None] for value in (alpha, sigma))
    x_t = _term(alpha, clean) + _term(sigma, eps)
    if prediction == "eps":
        target = eps
    elif prediction == "x0":
        target = clean
    else:
        target = _term(alpha, eps) - _term(sigma, clean)
    return x_t.to(x0.dtype if dtype is None else dtype), target
