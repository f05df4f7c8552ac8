"""What the networks of ADM share: the way down, the middle, and one modulation for all blocks (2105.05233)"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, Self, cast

import torch
from torch import nn

from fastdiff.model.blocks import AttentionBlock, Downsample, Features, ResBlock, Stage, Upsample, joined
from fastdiff.model.convolution import Conv2d
from fastdiff.model.embeddings import timestep_embedding


@dataclasses.dataclass(frozen=True)
class TrunkConfig:
    """Everything that fixes a Trunk's architecture; ValueError or TypeError names the field that cannot be

    image_size: side in pixels of the images it is made for, divisible by 2 ** (levels - 1).
    in_channels, out_channels: of the whole network.
    channels, channel_mult: width of level i is int(channel_mult[i] * channels), a multiple of groups.
    num_blocks: ResBlocks a level on the way down.
    attention_resolutions: sides in pixels at which ResBlocks are followed by attention; the middle always has one.
    num_heads, head_channels: exactly one is set, the other None: a constant head count, or a constant head width.
    scale_shift: modulate by norm(h) * (1 + scale) + shift; otherwise the embedding is added before the norm.
    resblock_updown: resample inside a ResBlock; otherwise by convolution (conv_resample) or by pooling and copying.
    time_scale: what t is multiplied by on its way in: 1000 / T for a network that was trained with improved-diffusion's
        rescale_timesteps.
    gradient_checkpointing: keep no activations inside blocks, recompute them in the backward pass.
    """

    image_size: int
    in_channels: int = 3
    out_channels: int = 3
    channels: int = 192
    channel_mult: tuple[float, ...] = (1, 2, 3, 4)
    num_blocks: int = 3
    attention_resolutions: tuple[int, ...] = (32, 16, 8)
    num_heads: int | None = None
    head_channels: int | None = 64
    dropout: float = 0.0
    resblock_updown: bool = True
    conv_resample: bool = True
    scale_shift: bool = True
    groups: int = 32
    gradient_checkpointing: bool = False
    time_scale: float = 1.0

    def __post_init__(self) -> None:
        for name in ("channel_mult", "attention_resolutions"):
            value = getattr(self, name)
            if not isinstance(value, tuple | list):
                raise TypeError(f"{name} must be a sequence of numbers, got {value!r}")
            object.__setattr__(self, name, tuple(value))
        for name in ("image_size", "in_channels", "out_channels", "channels", "num_blocks", "groups"):
            check_positive(name, getattr(self, name))
        for name in ("num_heads", "head_channels"):
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name))
        for name in ("resblock_updown", "conv_resample", "scale_shift", "gradient_checkpointing"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if isinstance(self.dropout, bool) or not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be a number in [0, 1), got {self.dropout!r}")
        scale = self.time_scale
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < math.inf:
            raise ValueError(f"time_scale must be a positive number, got {scale!r}")
        # more than any network has, less than what overflows
        if not self.channel_mult or any(
            isinstance(m, bool) or not isinstance(m, int | float) or not 0 < m <= 2**20 for m in self.channel_mult
        ):
            raise ValueError(f"channel_mult must hold one positive number a level, got {self.channel_mult!r}")
        self._check_sizes()

    def _check_sizes(self) -> None:
        stride = 2 ** (len(self.channel_mult) - 1)
        if self.image_size % stride:
            raise ValueError(
                f"image_size must be divisible by {stride} for {len(self.channel_mult)} levels (channel_mult), "
                f"got {self.image_size}; use fewer levels"
            )
        if self.channels % 2:
            raise ValueError(f"channels must be even (cosines and sines of the time), got {self.channels}")
        for width in self.widths:
            if width == 0 or width % self.groups:
                raise ValueError(
                    f"groups must divide the width of every level, got groups={self.groups} and widths {self.widths}; "
                    "change groups, channels or channel_mult"
                )
        unknown = sorted(set(self.attention_resolutions) - set(self.resolutions))
        if unknown:
            raise ValueError(
                f"attention_resolutions must be among the levels' resolutions {self.resolutions}, got {unknown}; "
                "they are sides in pixels, not downsampling factors"
            )
        if (self.num_heads is None) == (self.head_channels is None):
            raise ValueError(
                "exactly one of num_heads and head_channels must be set, the other None, "
                f"got num_heads={self.num_heads} and head_channels={self.head_channels}"
            )
        levels = zip(self.widths, self.resolutions, strict=True)
        for width in [w for w, side in levels if side in self.attention_resolutions] + [self.widths[-1]]:
            name = "num_heads" if self.head_channels is None else "head_channels"
            if width % getattr(self, name):
                raise ValueError(
                    f"{name} must divide the width of every level with attention and of the last one, "
                    f"got {name}={getattr(self, name)} at width {width}"
                )

    @property
    def first_channels(self) -> int:
        """Channels that the first convolution takes"""
        return self.in_channels

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level"""
        return tuple(int(m * self.channels) for m in self.channel_mult)

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Side in pixels of each level"""
        return tuple(self.image_size // 2**i for i in range(len(self.channel_mult)))

    def heads(self, width: int) -> int:
        """Attention heads at a width"""
        return self.num_heads if self.num_heads is not None else width // (self.head_channels or width)

    def to_dict(self) -> dict[str, Any]:
        """Every field as JSON's own types; from_dict gives the config back"""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """The config of a to_dict; ValueError lists unknown and missing keys"""
        # files may be older than the field
        fields = {"time_scale": 1.0, **fields}
        expected = {f.name for f in dataclasses.fields(cls)}
        unknown, missing = sorted(set(fields) - expected), sorted(expected - set(fields))
        if unknown or missing:
            raise ValueError(f"{cls.__name__} has unknown keys {unknown} and lacks keys {missing}")
        return cls(**fields)


def channel_multiple(width: int, channels: int) -> float:
    """m with int(m * channels) == width, an int where there is one"""
    if width % channels == 0:
        return width // channels
    ratio = width / channels
    return ratio if int(ratio * channels) == width else math.nextafter(ratio, math.inf)


def check_positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


class Trunk(nn.Module):
    """Time embedding, input blocks and middle block; a subclass adds what comes after, _add_modulation() last

    Parameters have guided-diffusion's names and shapes, save that the emb_layers.1 of all ResBlocks are one Linear,
    `mod`: its rows are theirs, in the order of mod_layout.
    Activations are channels_last and in the parameters' dtype; `.to(memory_format=torch.channels_last)` the module.
    """

    any_dtype = True  # it may be converted: what needs float32 sums has them
    mod: nn.Linear
    mod_layout: tuple[tuple[str, int], ...]

    def __init__(self, config: TrunkConfig, num_labels: int | None = None) -> None:
        """num_labels: rows of label_emb, None for a network without"""
        super().__init__()
        self.config = config
        emb_channels = 4 * config.channels
        self.time_embed = nn.Sequential(
            nn.Linear(config.channels, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels)
        )
        if num_labels is not None:
            self.label_emb = nn.Embedding(num_labels, emb_channels)
        widths = config.widths
        ch = widths[0]
        outputs = [ch]
        self.input_blocks = nn.ModuleList([nn.ModuleList([Conv2d(config.first_channels, ch, 3, padding=1)])])
        for level, width in enumerate(widths):
            for _ in range(config.num_blocks):
                self.input_blocks.append(Stage([self._res_block(ch, width), *self._attention(level)]))
                ch = width
                outputs.append(ch)
            if level < len(widths) - 1:
                self.input_blocks.append(Stage([self._resample(ch, "down")]))
                outputs.append(ch)
        # channels of what each input block returns
        self.input_widths = tuple(outputs)

        self.middle_block = Stage(
            [self._res_block(ch, ch), AttentionBlock(ch, config.heads(ch), config.groups), self._res_block(ch, ch)]
        )

    def _add_modulation(self) -> None:
        """Gives every ResBlock that is there by now its rows of mod"""
        self.mod_layout = tuple((name, m.mod_rows) for name, m in self.named_modules() if isinstance(m, ResBlock))
        self.mod = nn.Linear(4 * self.config.channels, sum(rows for _, rows in self.mod_layout))
        for module in self.modules():
            if isinstance(module, Stage):
                module.gradient_checkpointing = self.config.gradient_checkpointing

    def _res_block(self, channels: int, out_channels: int, resample: str | None = None) -> ResBlock:
        config = self.config
        return ResBlock(
            channels,
            out_channels,
            groups=config.groups,
            dropout=config.dropout,
            scale_shift=config.scale_shift,
            resample=resample,
        )

    def _attention(self, level: int) -> list[nn.Module]:
        """What follows each ResBlock of a level: attention or nothing"""
        config, width = self.config, self.config.widths[level]
        if config.resolutions[level] not in config.attention_resolutions:
            return []
        return [AttentionBlock(width, config.heads(width), config.groups)]

    def _resample(self, channels: int, direction: str) -> nn.Module:
        """Half or twice the resolution; direction: "down" or "up"."""
        if self.config.resblock_updown:
            return self._res_block(channels, channels, resample=direction)
        return (Upsample if direction == "up" else Downsample)(channels, conv=self.config.conv_resample)

    @property
    def conv_first(self) -> Conv2d:
        return cast(Conv2d, cast(nn.ModuleList, self.input_blocks[0])[0])

    def _embedded_time(self, t: torch.Tensor) -> torch.Tensor:
        """t: (B,), fractional allowed -> (B, 4 * channels)"""
        # no product where it changes nothing: t may be a captured graph's
        t = t if self.config.time_scale == 1 else t * self.config.time_scale
        features = timestep_embedding(t, self.config.channels)
        return self.time_embed(features.to(self.mod.weight.dtype))

    def _mods(self, mod: torch.Tensor) -> Iterator[torch.Tensor]:
        """The parts of mod (B, rows of mod), a ResBlock each"""
        return iter(mod.split([rows for _, rows in self.mod_layout], dim=1))

    def _encode(self, x: torch.Tensor, mods: Iterator[torch.Tensor]) -> list[Features]:
        """x: (B, first_channels, H, W) -> what each input block returns, and the middle block at the end"""
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.mod.weight.dtype)
        # One channel has no layout of its own, so the layout of everything after is set here
        u, bias = self.conv_first.unbiased(x)
        hs = [joined(u.contiguous(memory_format=torch.channels_last), bias)]
        for block in self.input_blocks[1:]:
            hs.append(block(hs[-1], mods))
        return [*hs, self.middle_block(hs[-1], mods)]

    def _check_images(self, x: torch.Tensor) -> None:
        """ValueError unless x is (B, in_channels, H, W) with sides that can be halved once a level"""
        stride = 2 ** (len(self.config.channel_mult) - 1)
        if x.ndim != 4 or x.shape[1] != self.config.in_channels or x.shape[2] % stride or x.shape[3] % stride:
            raise ValueError(
                f"x must have shape (B, {self.config.in_channels}, H, W) with H and W multiples of {stride}, "
                f"got {tuple(x.shape)}"
            )

    @staticmethod
    def _check_times(t: torch.Tensor, x: torch.Tensor) -> None:
        """ValueError unless t is (B,), as many as x has images"""
        if t.shape != x.shape[:1]:
            raise ValueError(f"t must have shape ({x.shape[0]},), one time an image, got {tuple(t.shape)}")
