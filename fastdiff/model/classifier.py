"""The noisy-image classifier of ADM: the U-Net's way down with a pool for its head (2105.05233, section 4.3)"""

import dataclasses
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from fastdiff.model.blocks import AdaGroupNorm, attention, zero_init
from fastdiff.model.trunk import Trunk, TrunkConfig

POOLS = ("attention", "adaptive", "spatial", "spatial_v2")

# guided-diffusion's, whatever the network's own width and groups
_HIDDEN = 2048
_HIDDEN_GROUPS = 32


@dataclasses.dataclass(frozen=True)
class EncoderConfig(TrunkConfig):
    """Everything that fixes an EncoderUNet's architecture: TrunkConfig's fields, and

    out_channels: logits, one a class.
    pool: "attention" (of the mean to all positions of the last level, which ties H and W to image_size), "adaptive"
        (norm, mean over positions, 1x1 convolution), "spatial" or "spatial_v2" (a network of one hidden layer on the
        means of every block's output; the second has a norm and SiLU for ReLU).
    """

    out_channels: int = 1000
    channels: int = 128
    pool: str = "attention"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pool not in POOLS:
            raise ValueError(f"pool must be one of {list(POOLS)}, got {self.pool!r}")


class AttentionPool2d(nn.Module):
    """c_proj(softmax(q k^T / sqrt(ch)) v), q of the mean, k and v of the mean and every position: (B, out_channels)

    x: (B, channels, side, side); each of the side^2 + 1 tokens has an embedding of its own added first.
    Rows of qkv_proj are [q, k, v][head][ch], as in AttentionBlock; weights have Conv1d's shape (C_out, C, 1).
    """

    def __init__(self, side: int, channels: int, num_heads: int, out_channels: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.positional_embedding = nn.Parameter(torch.randn(channels, side**2 + 1) / channels**0.5)
        self.qkv_proj = nn.Conv1d(channels, 3 * channels, 1)
        self.c_proj = nn.Conv1d(channels, out_channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, C, H, W = x.shape
        tokens = x.permute(0, 2, 3, 1).reshape(B, H * W, C)
        tokens = torch.cat((tokens.mean(1, keepdim=True), tokens), 1) + self.positional_embedding.T
        bias = cast(torch.Tensor, self.qkv_proj.bias)
        (w_q, w_kv), (b_q, b_kv) = (p.split((C, 2 * C)) for p in (self.qkv_proj.weight.squeeze(2), bias))
        # the other positions' queries would be answered for nothing
        q = F.linear(tokens[:, :1], w_q, b_q).view(B, 1, self.num_heads, -1).transpose(1, 2)
        kv = F.linear(tokens, w_kv, b_kv).view(B, H * W + 1, 2, self.num_heads, -1)
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
        a = attention(q, k, v)  # (B, heads, 1, ch)
        return F.linear(a.reshape(B, C), self.c_proj.weight.squeeze(2), self.c_proj.bias)


class EncoderUNet(Trunk):
    """The network of a noisy-image classifier: (x, t) -> logits, differentiable in x

    The head is `out`, whose parameters have guided-diffusion's names and shapes for every pool, too.
    """

    config: EncoderConfig

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        ch, features = config.widths[-1], sum(self.input_widths) + config.widths[-1]
        layers: dict[str, nn.Module]
        if config.pool == "attention":
            pool = AttentionPool2d(config.resolutions[-1], ch, config.heads(ch), config.out_channels)
            layers = {"0": AdaGroupNorm(ch, config.groups), "2": pool}
        elif config.pool == "adaptive":
            head = zero_init(nn.Conv2d(ch, config.out_channels, 1))
            layers = {"0": AdaGroupNorm(ch, config.groups), "3": head}
        else:
            hidden: list[nn.Module] = [nn.ReLU()]
            if config.pool == "spatial_v2":
                hidden = [nn.GroupNorm(_HIDDEN_GROUPS, _HIDDEN), nn.SiLU()]
            stack = [nn.Linear(features, _HIDDEN), *hidden, nn.Linear(_HIDDEN, config.out_channels)]
            layers = {str(i): layer for i, layer in enumerate(stack)}
        self.out = nn.ModuleDict(layers)
        self._add_modulation()

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x: (B, in_channels, H, W); t: (B,), in [0, T) -> (B, out_channels), float64 or else float32

        H and W are multiples of 2 ** (levels - 1), and image_size with the attention pool.
        """
        self._check_images(x)
        self._check_times(t, x)
        config, side = self.config, self.config.image_size
        if config.pool == "attention" and x.shape[2:] != (side, side):
            raise ValueError(
                f"x must have shape (B, {config.in_channels}, {side}, {side}), whose positions the attention pool has "
                f"embeddings for, got {tuple(x.shape)}"
            )
        hs = self._encode(x, self._mods(self.mod(F.silu(self._embedded_time(t)))))
        if config.pool in ("spatial", "spatial_v2"):
            out = torch.cat([h.x.mean((2, 3)) for h in hs], 1)
            for layer in self.out.values():
                out = layer(out)
        elif config.pool == "attention":
            out = self.out["2"](self.out["0"](hs[-1]))
        else:
            out = self.out["3"](self.out["0"](hs[-1]).mean((2, 3), keepdim=True)).flatten(1)
        return out.to(torch.promote_types(out.dtype, torch.float32))


# guided-diffusion's published classifiers: the levels of the ADM model of the size, 1000 ImageNet classes
_AT_64 = EncoderConfig(image_size=64, num_blocks=4)
_AT_256 = EncoderConfig(image_size=256, channel_mult=(1, 1, 2, 2, 4, 4), num_blocks=2)
CLASSIFIER_PRESETS: dict[str, EncoderConfig] = {
    "classifier-64": _AT_64,
    "classifier-128": dataclasses.replace(_AT_256, image_size=128, channel_mult=(1, 1, 2, 3, 4)),
    "classifier-256": _AT_256,
    "classifier-512": dataclasses.replace(_AT_256, image_size=512, channel_mult=(0.5, 1, 1, 2, 2, 4, 4)),
}
