"""The ADM network and its sampling step composed as they were published (2105.05233): eager PyTorch, one op at a time

Norms in float32 with a cast before and behind them, the convolutions between the first and the last block in float16,
a modulation product in every block, concatenations stored, attention as two products around a softmax in float32.
Activations are NCHW. What fastdiff fuses or hoists is counted, timed and checked against this.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.model import UNet, UNetConfig
from fastdiff.solvers import StepTable


class Norm(nn.GroupNorm):
    """Statistics and affine in float32, whatever comes in"""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).to(x.dtype)


def resampled(x: Tensor, how: str | None) -> Tensor:
    if how == "up":
        return F.interpolate(x, scale_factor=2, mode="nearest")
    return F.avg_pool2d(x, kernel_size=2, stride=2) if how == "down" else x


class ResBlock(nn.Module):
    def __init__(self, config: UNetConfig, channels: int, out_channels: int, resample: str | None = None) -> None:
        super().__init__()
        self.resample = resample
        self.in_layers = nn.Sequential(
            Norm(config.groups, channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(4 * config.channels, 2 * out_channels))
        self.out_layers = nn.Sequential(
            Norm(config.groups, out_channels),
            nn.SiLU(),
            nn.Dropout(config.dropout),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        self.skip_connection = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm, act, conv = self.in_layers
        h = conv(resampled(act(norm(x)), self.resample))
        x = resampled(x, self.resample)
        modulation = self.emb_layers(emb).to(h.dtype)[:, :, None, None]
        scale, shift = modulation.chunk(2, dim=1)
        norm, *rest = self.out_layers
        h = norm(h) * (1 + scale) + shift
        for layer in rest:
            h = layer(h)
        return self.skip_connection(x) + h


class Attention(nn.Module):
    """Rows of qkv are [q, k, v][head][ch]"""

    def __init__(self, config: UNetConfig, channels: int) -> None:
        super().__init__()
        self.heads = config.heads(channels)
        self.norm = Norm(config.groups, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, *size = x.shape
        x = x.reshape(b, c, -1)
        shape = (b * self.heads, c // self.heads, x.shape[2])
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=1)
        # split over both operands: their product in float16 stays small
        split = (c // self.heads) ** -0.25
        logits = torch.einsum("bct,bcs->bts", (q * split).view(shape), (k * split).view(shape))
        weights = torch.softmax(logits.float(), dim=-1).to(logits.dtype)
        h = torch.einsum("bts,bcs->bct", weights, v.reshape(shape))
        return (x + self.proj_out(h.reshape(b, c, -1))).reshape(b, c, *size)


class Stage(nn.ModuleList):
    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        for layer in self:
            h = layer(h, emb) if isinstance(layer, ResBlock) else layer(h)
        return h


class Network(nn.Module):
    """(x, t, y) -> eps and the variance's interpolation, from the configuration of fastdiff's UNet

    ValueError for one without scale_shift and resblock_updown, which no published model is.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        if not (config.scale_shift and config.resblock_updown):
            raise ValueError("config must have scale_shift and resblock_updown, as every published one, got False")
        self.config = config
        self.dtype = torch.float32
        self.time_embed = nn.Sequential(
            nn.Linear(config.channels, 4 * config.channels),
            nn.SiLU(),
            nn.Linear(4 * config.channels, 4 * config.channels),
        )
        if config.num_labels is not None:
            self.label_emb = nn.Embedding(config.num_labels, 4 * config.channels)
        width = config.widths[0]
        skips = [width]
        down: list[Stage] = [Stage([nn.Conv2d(config.in_channels, width, 3, padding=1)])]
        for level, out in enumerate(config.widths):
            for _ in range(config.num_blocks):
                down.append(self._stage(level, width, out))
                width = out
                skips.append(width)
            if level < len(config.widths) - 1:
                down.append(Stage([ResBlock(config, width, width, "down")]))
                skips.append(width)
        self.input_blocks = nn.ModuleList(down)
        self.middle_block = Stage(
            [ResBlock(config, width, width), Attention(config, width), ResBlock(config, width, width)]
        )
        up: list[Stage] = []
        for level, out in reversed(list(enumerate(config.widths))):
            for i in range(config.num_blocks + 1):
                stage = self._stage(level, width + skips.pop(), out)
                width = out
                if level and i == config.num_blocks:
                    stage.append(ResBlock(config, width, width, "up"))
                up.append(stage)
        self.output_blocks = nn.ModuleList(up)
        self.out = nn.Sequential(
            Norm(config.groups, width), nn.SiLU(), nn.Conv2d(width, config.out_channels, 3, padding=1)
        )

    def _stage(self, level: int, channels: int, out: int) -> Stage:
        attends = self.config.resolutions[level] in self.config.attention_resolutions
        return Stage([ResBlock(self.config, channels, out), *([Attention(self.config, out)] if attends else [])])

    def half_convolutions(self) -> Self:
        """float16 between the first and the last block; norms, embeddings and modulation products stay float32"""
        self.dtype = torch.float16
        for part in (self.input_blocks, self.middle_block, self.output_blocks):
            for module in part.modules():
                if isinstance(module, nn.Conv1d | nn.Conv2d):
                    module.half()
        return self

    def load(self, network: UNet) -> Self:
        """Takes over a UNet's weights, whose modulation products are one"""
        weights = dict(network.state_dict())
        products = {kind: weights.pop(f"mod.{kind}") for kind in ("weight", "bias")}
        for kind, rows in products.items():
            parts = rows.split([count for _, count in network.mod_layout])
            names = [f"{name}.emb_layers.1.{kind}" for name, _ in network.mod_layout]
            weights.update(zip(names, parts, strict=True))
        self.load_state_dict(weights)
        return self

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        emb = self.time_embed(sinusoids(t, self.config.channels))
        if y is not None:
            emb = emb + self.label_emb(y)
        h, skips = x.to(self.dtype), []
        for stage in self.input_blocks:
            h = stage(h, emb)
            skips.append(h)
        h = self.middle_block(h, emb)
        for stage in self.output_blocks:
            h = stage(torch.cat([h, skips.pop()], dim=1), emb)
        return self.out(h.to(x.dtype))


def sinusoids(t: Tensor, dim: int) -> Tensor:
    """Cosines, then sines; the frequencies are made on the host and uploaded at every call"""
    steps = torch.arange(dim // 2, dtype=torch.float32)
    freqs = torch.exp(steps * (-math.log(10000.0) / (dim // 2))).to(t.device)
    angles = t[:, None].float() * freqs[None]
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


def sampling_step(
    network: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    table: StepTable,
    row: int,
    x: Tensor,
    y: Tensor | None,
    w: float,
    noise: Callable[[Tensor], Tensor] = torch.randn_like,
) -> Tensor:
    """One step of DDPM with a learned variance on a doubled batch, as its users write it

    table: of fastdiff.solvers.ddpm(variance="learned_range"); x (2N, C, H, W), of which the first N rows are the state
    and the others ride along; y (2N,), the last N the null label. Coefficients of a step lie on the host in float64:
    each is uploaded whole, gathered at the batch's times and cast. Returns x of the next step, (2N, C, H, W).
    """
    coefs = {name: table_of(table, name) for name in ("k_x", "k_out", "c_x", "c_x0", "log_beta", "log_beta_tilde")}
    t = torch.tensor([row] * len(x)).to(x.device)

    def at(name: str) -> Tensor:
        return coefs[name].to(x.device)[t].float()[:, None, None, None].expand(x.shape)

    state = x[: len(x) // 2]
    both = torch.cat([state, state])
    out = network(both, torch.from_numpy(table.t.copy()).to(t.device)[t].float(), y)
    eps, v = out[:, : x.shape[1]], out[:, x.shape[1] :]
    cond, null = eps.chunk(2)
    guided = (1 + w) * cond - w * null
    out = torch.cat([torch.cat([guided, guided]), v], dim=1)

    eps, v = out.split(x.shape[1], dim=1)
    fraction = (v + 1) / 2
    log_variance = fraction * at("log_beta") + (1 - fraction) * at("log_beta_tilde")
    x0 = (at("k_x") * x + at("k_out") * eps).clamp(-1, 1)
    mean = at("c_x0") * x0 + at("c_x") * x
    last = (t != len(table) - 1).float()[:, None, None, None]
    return mean + last * torch.exp(0.5 * log_variance) * noise(x)


def table_of(table: StepTable, name: str) -> Tensor:
    return torch.from_numpy(getattr(table, name).copy())
