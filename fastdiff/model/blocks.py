"""Building blocks of the ADM U-Net (Dhariwal & Nichol 2021, 2105.05233)

Module and parameter names are guided-diffusion's, which is why in_layers and out_layers are indexed by string.
No concatenation, bias or resampled activation is stored where a norm or the end of a block takes it on its way.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastdiff.model.convolution import Conv2d
from fastdiff_kernels import ada_group_norm, residual

Conv = TypeVar("Conv", nn.Conv1d, nn.Conv2d)

# rows in a grid of CUDA's attention kernels
MOST_ROWS = 65_535


class Features(NamedTuple):
    """An activation (B, C, H, W), and the chunk statistics that its producer has of it"""

    x: torch.Tensor
    stats: torch.Tensor | None = None


def zero_init(module: Conv) -> Conv:
    """The same module with weight and bias zero: a branch that starts as nothing"""
    nn.init.zeros_(module.weight)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
    return module


def joined(
    u: torch.Tensor,
    bias: torch.Tensor | None,
    h: Features | None = None,
    h2: Features | None = None,
    projection: nn.Conv1d | nn.Conv2d | None = None,
    resample: str | None = None,
) -> Features:
    """The end of a block: u + bias + skip, the skip being nothing, h, resampled h or a 1x1 convolution of [h, h2]"""
    weight = weight_bias = None
    if projection is not None:
        # under autocast parameters are wider than activations
        weight, weight_bias = projection.weight.to(u.dtype), projection.bias
    # only kernels take statistics from a producer; what runs on a CPU makes its own
    stats = u.is_cuda or u.is_meta
    if bias is None and h is None and not stats:
        return Features(u)
    return Features(*residual(u, bias, h and h.x, h2 and h2.x, weight, weight_bias, resample=resample, stats=stats))


class AdaGroupNorm(nn.Module):
    """resample(act((GroupNorm([h, h2] + x_bias) * weight + bias) * (1 + scale) + shift)); act is SiLU or nothing

    h: B rows, any dense layout, which the output keeps; h2: a second input behind its channels, whose rows may be
    shared (row b of h goes with row b or b - len(h2.x)); scale, shift: (B to 2B, channels) or None: row B + j of the
    output is row j of the input under a modulation of its own; x_bias: (channels,) or None.
    """

    def __init__(self, channels: int, groups: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.groups = groups
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(
        self,
        h: Features,
        h2: Features | None = None,
        *,
        scale: torch.Tensor | None = None,
        shift: torch.Tensor | None = None,
        x_bias: torch.Tensor | None = None,
        silu: bool = True,
        resample: str | None = None,
    ) -> torch.Tensor:
        x2, stats2 = h2 or (None, None)
        return ada_group_norm(
            h.x,
            self.weight,
            self.bias,
            scale,
            shift,
            groups=self.groups,
            eps=self.eps,
            silu=silu,
            x2=x2,
            x_bias=x_bias,
            resample=resample,
            stats=h.stats,
            stats2=stats2,
        )


class Downsample(nn.Module):
    """Half the resolution: a strided 3x3 convolution, or 2x2 averages"""

    def __init__(self, channels: int, conv: bool) -> None:
        super().__init__()
        self.op = Conv2d(channels, channels, 3, stride=2, padding=1) if conv else nn.AvgPool2d(2)

    def forward(self, h: Features) -> Features:
        return Features(self.op(h.x))


class Upsample(nn.Module):
    """Twice the resolution: nearest neighbour, then a 3x3 convolution or nothing"""

    def __init__(self, channels: int, conv: bool) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1) if conv else nn.Identity()

    def forward(self, h: Features) -> Features:
        return Features(self.conv(F.interpolate(h.x, scale_factor=2.0, mode="nearest")))


class ResBlock(nn.Module):
    """skip(h) + conv(AdaGN(conv(resample(silu(GN(h))))))

    h2: a second input behind the channels of h, as in AdaGroupNorm.
    mod: (B, mod_rows), the block's slice of the network's one modulation product: [scale, shift] with scale_shift,
    otherwise a term added before the second norm. With up to twice as many rows as h has, so many come out.
    resample: "up", "down" (both without convolution) or None.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        *,
        groups: int,
        dropout: float = 0.0,
        scale_shift: bool = True,
        resample: str | None = None,
    ) -> None:
        super().__init__()
        if resample is not None and channels != out_channels:
            raise ValueError(f"a block that resamples must keep its channels, got {channels} and {out_channels}")
        self.channels = channels
        self.out_channels = out_channels
        self.dropout = dropout
        self.scale_shift = scale_shift
        self.mod_rows = out_channels * (2 if scale_shift else 1)
        self.resample = resample
        conv_in = Conv2d(channels, out_channels, 3, padding=1)
        conv_out = zero_init(Conv2d(out_channels, out_channels, 3, padding=1))
        self.in_layers = nn.ModuleDict({"0": AdaGroupNorm(channels, groups), "2": conv_in})
        self.out_layers = nn.ModuleDict({"0": AdaGroupNorm(out_channels, groups), "3": conv_out})
        self.skip_connection = nn.Identity() if channels == out_channels else Conv2d(channels, out_channels, 1)

    @property
    def conv_in(self) -> Conv2d:
        return cast(Conv2d, self.in_layers["2"])

    @property
    def conv_out(self) -> Conv2d:
        return cast(Conv2d, self.out_layers["3"])

    def forward(self, h: Features, mod: torch.Tensor, h2: Features | None = None) -> Features:
        u = self.in_layers["0"](h, h2, resample=self.resample)
        u, bias = self.conv_in.unbiased(u)
        if self.scale_shift:
            scale, shift = mod.chunk(2, dim=1)
            u = self.out_layers["0"](Features(u), scale=scale, shift=shift, x_bias=bias)
        else:
            u = torch.cat((u, u[: len(mod) - len(u)])) if len(mod) > len(u) else u
            u = self.out_layers["0"](Features(u + mod[:, :, None, None]), x_bias=bias)
        u, bias = self.conv_out.unbiased(F.dropout(u, self.dropout, self.training))
        if isinstance(self.skip_connection, nn.Identity):
            return joined(u, bias, h, resample=self.resample)
        return joined(u, bias, h, h2, self.skip_connection)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(ch)) v of (B, heads, L, ch) each"""
    if len(q) <= MOST_ROWS:
        return F.scaled_dot_product_attention(q, k, v)
    parts = zip(*(value.split(MOST_ROWS) for value in (q, k, v)), strict=True)
    return torch.cat([F.scaled_dot_product_attention(*part) for part in parts])


class AttentionBlock(nn.Module):
    """h + proj_out(softmax(q k^T / sqrt(ch)) v) over the H * W positions, q, k, v from GN(h)

    Rows of qkv are [q, k, v][head][ch] (guided-diffusion's "new" order); weights have Conv1d's shape (C_out, C, 1).
    """

    def __init__(self, channels: int, num_heads: int, groups: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = AdaGroupNorm(channels, groups)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zero_init(nn.Conv1d(channels, channels, 1))

    def forward(self, h: Features) -> Features:
        B, C, H, W = h.x.shape
        # On channels_last input these are views: the 1x1 convolutions are matrix products over (B, HW, C)
        tokens = self.norm(h, silu=False).permute(0, 2, 3, 1).reshape(B, H * W, C)
        qkv = F.linear(tokens, self.qkv.weight.squeeze(2), self.qkv.bias)
        # ch stays innermost and contiguous: SDPA's fast CPU kernel needs that
        q, k, v = qkv.view(B, H * W, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        a = attention(q, k, v)  # (B, heads, HW, ch)
        a = a.transpose(1, 2).reshape(B, H, W, C).permute(0, 3, 1, 2)
        return joined(h.x, None, Features(a), projection=self.proj_out)


class Stage(nn.ModuleList):
    """Layers in a row; every ResBlock among them takes the next part of the modulation, the first layer also h2"""

    gradient_checkpointing = False

    def forward(self, h: Features, mods: Iterator[torch.Tensor], h2: Features | None = None) -> Features:
        for layer in self:
            args = (h, next(mods), h2) if isinstance(layer, ResBlock) else (h,)
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                h = checkpoint(layer, *args, use_reentrant=False)
            else:
                h = layer(*args)
            h2 = None
        return h
