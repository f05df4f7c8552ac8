"""Building blocks of the ADM U-Net (Dhariwal & Nichol 2021, 2105.05233)

Module and parameter names are guided-diffusion's, which is why in_layers and out_layers are indexed by string.
"""

from collections.abc import Iterator
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastdiff_kernels import ada_group_norm

Conv = TypeVar("Conv", nn.Conv1d, nn.Conv2d)


def zero_init(module: Conv) -> Conv:
    """The same module with weight and bias zero: a branch that starts as nothing"""
    nn.init.zeros_(module.weight)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
    return module


class AdaGroupNorm(nn.Module):
    """act((GroupNorm(x) * weight + bias) * (1 + scale) + shift); act is SiLU or nothing

    x: (B, C, H, W), any dense layout, which the output keeps; scale, shift: (B, C) or None.
    """

    def __init__(self, channels: int, groups: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.groups = groups
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(
        self,
        x: torch.Tensor,
        scale: torch.Tensor | None = None,
        shift: torch.Tensor | None = None,
        silu: bool = True,
    ) -> torch.Tensor:
        return ada_group_norm(x, self.weight, self.bias, scale, shift, groups=self.groups, eps=self.eps, silu=silu)


class Downsample(nn.Module):
    """Half the resolution: a strided 3x3 convolution, or 2x2 averages"""

    def __init__(self, channels: int, conv: bool) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if conv else nn.AvgPool2d(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Twice the resolution: nearest neighbour, then a 3x3 convolution or nothing"""

    def __init__(self, channels: int, conv: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if conv else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class ResBlock(nn.Module):
    """skip(x) + conv(AdaGN(conv(resample(silu(GN(x))))))

    mod: (B, mod_rows), the block's slice of the network's one modulation product: [scale, shift] with scale_shift,
    otherwise a term added before the second norm. resample: "up", "down" (both without convolution) or None.
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
        self.channels = channels
        self.out_channels = out_channels
        self.dropout = dropout
        self.scale_shift = scale_shift
        self.mod_rows = out_channels * (2 if scale_shift else 1)
        self.resample = {
            "up": Upsample(channels, conv=False),
            "down": Downsample(channels, conv=False),
            None: nn.Identity(),
        }[resample]
        conv_in = nn.Conv2d(channels, out_channels, 3, padding=1)
        conv_out = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.in_layers = nn.ModuleDict({"0": AdaGroupNorm(channels, groups), "2": conv_in})
        self.out_layers = nn.ModuleDict({"0": AdaGroupNorm(out_channels, groups), "3": conv_out})
        self.skip_connection = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: torch.Tensor, mod: torch.Tensor) -> torch.Tensor:
        h = self.in_layers["2"](self.resample(self.in_layers["0"](x)))
        if self.scale_shift:
            scale, shift = mod.chunk(2, dim=1)
            h = self.out_layers["0"](h, scale, shift)
        else:
            h = self.out_layers["0"](h + mod[:, :, None, None])
        h = self.out_layers["3"](F.dropout(h, self.dropout, self.training))
        return self.skip_connection(self.resample(x)) + h


class AttentionBlock(nn.Module):
    """x + proj_out(softmax(q k^T / sqrt(ch)) v) over the H * W positions, q, k, v from GN(x)

    Rows of qkv are [q, k, v][head][ch] (guided-diffusion's "new" order); weights have Conv1d's shape (C_out, C, 1).
    """

    def __init__(self, channels: int, num_heads: int, groups: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = AdaGroupNorm(channels, groups)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zero_init(nn.Conv1d(channels, channels, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, C, H, W = x.shape
        # On channels_last input these are views: the 1x1 convolutions are matrix products over (B, HW, C)
        tokens = self.norm(x, silu=False).permute(0, 2, 3, 1).reshape(B, H * W, C)
        qkv = F.linear(tokens, self.qkv.weight.squeeze(2), self.qkv.bias)
        # ch stays innermost and contiguous: SDPA's fast CPU kernel needs that
        q, k, v = qkv.view(B, H * W, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        h = F.scaled_dot_product_attention(q, k, v)  # (B, heads, HW, ch)
        h = h.transpose(1, 2).reshape(B, H * W, C)
        h = F.linear(h, self.proj_out.weight.squeeze(2), self.proj_out.bias)
        return x + h.view(B, H, W, C).permute(0, 3, 1, 2)


class Stage(nn.ModuleList):
    """Layers in a row; every ResBlock among them takes the next part of the modulation"""

    gradient_checkpointing = False

    def forward(self, x: torch.Tensor, mods: Iterator[torch.Tensor]) -> torch.Tensor:
        for layer in self:
            args = (x, next(mods)) if isinstance(layer, ResBlock) else (x,)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, *args, use_reentrant=False)
            else:
                x = layer(*args)
        return x
