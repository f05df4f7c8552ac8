"""What the shapes of a guided-diffusion or improved-diffusion state dict show of its network"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fastdiff.model import EncoderConfig, SuperResolutionConfig, TrunkConfig, UNetConfig
from fastdiff.model.trunk import channel_multiple

__all__ = ["Seen", "readings", "shown"]

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Seen:
    """One reading of a state dict's shapes

    widths, attention: of each level, the latter whether its ResBlocks are followed by attention.
    low_res_channels: of the second image that the first convolution takes, 0 for networks without.
    pool: a classifier's head, None for a U-Net. last_side: of its last level in pixels, where the head shows it.
    resblock_updown, conv_resample: as in TrunkConfig; the second is True where the first is, and where nothing is
    resampled the first is False.
    """

    channels: int
    widths: tuple[int, ...]
    num_blocks: int
    attention: tuple[bool, ...]
    in_channels: int
    low_res_channels: int
    out_channels: int
    num_labels: int | None
    resblock_updown: bool
    conv_resample: bool
    scale_shift: bool
    pool: str | None
    last_side: int | None

    @property
    def image_size(self) -> int | None:
        return None if self.last_side is None else self.last_side * 2 ** (len(self.widths) - 1)

    def config(self, facts: Mapping[str, Any]) -> TrunkConfig:
        """The network's config; facts: the fields that weights do not show, image_size and num_heads among them"""
        side = facts["image_size"]
        fields: dict[str, Any] = {
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "channels": self.channels,
            "channel_mult": tuple(channel_multiple(width, self.channels) for width in self.widths),
            "num_blocks": self.num_blocks,
            "attention_resolutions": tuple(side // 2**i for i, attends in enumerate(self.attention) if attends),
            "num_heads": None,
            "head_channels": None,
            "resblock_updown": self.resblock_updown,
            "conv_resample": self.conv_resample,
            "scale_shift": self.scale_shift,
            **facts,
        }
        if self.pool is not None:
            return EncoderConfig(pool=self.pool, **fields)
        if self.low_res_channels:
            return SuperResolutionConfig(num_labels=self.num_labels, low_res_channels=self.low_res_channels, **fields)
        return UNetConfig(num_labels=self.num_labels, **fields)


def shown(config: TrunkConfig) -> Seen:
    """What the weights of a network of this config show"""
    pool = config.pool if isinstance(config, EncoderConfig) else None
    resampled = len(config.widths) > 1
    return Seen(
        channels=config.channels,
        widths=config.widths,
        num_blocks=config.num_blocks,
        attention=tuple(side in config.attention_resolutions for side in config.resolutions),
        in_channels=config.in_channels,
        low_res_channels=config.first_channels - config.in_channels,
        out_channels=config.out_channels,
        num_labels=config.num_labels if isinstance(config, UNetConfig) else None,
        resblock_updown=config.resblock_updown and resampled,
        conv_resample=config.conv_resample or config.resblock_updown or not resampled,
        scale_shift=config.scale_shift,
        pool=pool,
        last_side=config.resolutions[-1] if pool == "attention" else None,
    )


def readings(shapes: Shapes) -> list[Seen]:
    """Every network that the shapes could be of, one if all is well. ValueError where the first layers are not there.

    Keys are looked at as far as need be; whether all of them are the network's is for whoever builds it.
    """
    if found := {"conv_in.weight", "pos_embed.proj.weight"} & shapes.keys():
        raise ValueError(f"these are weights of diffusers, with {found.pop()}: give the folder that holds them")
    channels = _size(shapes, "time_embed.0.weight", 2, 1)
    first = _size(shapes, "input_blocks.0.0.weight", 4, 1)
    rows = _size(shapes, "input_blocks.1.0.emb_layers.1.weight", 2, 0)
    num_labels = _size(shapes, "label_emb.weight", 2, 0) if "label_emb.weight" in shapes else None
    pool, last_side = None, None
    if any(key.startswith("output_blocks.") for key in shapes):
        out = _size(shapes, "out.2.weight", 4, 0)
        images = _images(first, out)
    else:
        pool, last_side, out = _head(shapes)
        images = [(first, 0)]
    return [
        Seen(
            channels=channels,
            in_channels=image,
            low_res_channels=low_res,
            out_channels=out,
            num_labels=num_labels,
            scale_shift=rows == 2 * _size(shapes, "input_blocks.1.0.in_layers.2.weight", 4, 0),
            pool=pool,
            last_side=last_side,
            **levels,
        )
        for levels in _levels(shapes, pool is None)
        for image, low_res in images
    ]


def _images(first: int, out: int) -> list[tuple[int, int]]:
    """Channels of the image and of a smaller one: the network returns an image's or twice as many"""
    options = [(first, 0)] + ([(first // 2, first // 2)] if first % 2 == 0 else [])
    return [(image, low_res) for image, low_res in options if out in (image, 2 * image)]


def _head(shapes: Shapes) -> tuple[str, int | None, int]:
    """A classifier's pool, the side of its last level where that shows, and its logits"""
    if "out.2.positional_embedding" in shapes:
        side = math.isqrt(max(0, _size(shapes, "out.2.positional_embedding", 2, 1) - 1))
        return "attention", side, _size(shapes, "out.2.c_proj.weight", 3, 0)
    if len(shapes.get("out.0.weight", ())) == 2:
        pool, last = ("spatial_v2", 3) if "out.1.weight" in shapes else ("spatial", 2)
        return pool, None, _size(shapes, f"out.{last}.weight", 2, 0)
    return "adaptive", None, _size(shapes, "out.3.weight", 4, 0)


def _levels(shapes: Shapes, decodes: bool) -> Iterator[dict[str, Any]]:
    """Every way to divide the input blocks into levels: widths, num_blocks, attention and how they are resampled"""
    parts = _parts(shapes)
    count = max(parts) + 1
    upsampled = _upsampled(shapes)
    # a level is num_blocks and what halves it, and pooling has no weights
    if count > 2 * len(parts):
        return
    for size in range(2, count + 1):
        if count % size:
            continue
        starts = range(0, count, size)
        kinds = {_kind(parts.get(start, ())) for start in starts if start}
        blocks = [[_block(shapes, start + i) for i in range(1, size)] for start in starts]
        if len(kinds) > 1 or None in kinds or any(len(set(level)) > 1 or None in level for level in blocks):
            continue
        kind = str(kinds.pop()) if kinds else "conv"
        ends = {size * i + size - 1 for i in range(len(starts) - 1)}
        if decodes and upsampled != (set() if kind == "pool" else ends):
            continue
        widths, attention = zip(*(level[0] for level in blocks if level[0]), strict=True)
        yield {
            "widths": widths,
            "num_blocks": size - 1,
            "attention": attention,
            "resblock_updown": kind == "block",
            "conv_resample": kind != "pool",
        }


def _parts(shapes: Shapes) -> dict[int, set[str]]:
    """What follows an input block's number in its keys"""
    parts: dict[int, set[str]] = {}
    for key in shapes:
        if match := re.fullmatch(r"input_blocks\.(\d{1,6})\.(.*)", key):
            parts.setdefault(int(match[1]), set()).add(match[2])
    return parts


def _kind(parts: Collection[str]) -> str | None:
    """How an input block with these parts halves the resolution; None for one that does not"""
    if not parts:
        return "pool"
    if "0.op.weight" in parts:
        return "conv"
    keeps = "0.in_layers.0.weight" in parts and "0.skip_connection.weight" not in parts
    return "block" if keeps and not any(part.startswith("1.") for part in parts) else None


def _block(shapes: Shapes, index: int) -> tuple[int, bool] | None:
    """Width of an input block's ResBlock, and whether attention follows; None if there is none"""
    shape = shapes.get(f"input_blocks.{index}.0.in_layers.2.weight", ())
    return (shape[0], f"input_blocks.{index}.1.qkv.weight" in shapes) if len(shape) == 4 else None


def _upsampled(shapes: Shapes) -> set[int]:
    """The output blocks that double the resolution by weights of their own"""
    pattern = r"output_blocks\.(\d{1,6})\.[12]\.(?:in_layers\.0|conv)\.weight"
    return {int(match[1]) for key in shapes if (match := re.fullmatch(pattern, key))}


def _size(shapes: Shapes, key: str, ndim: int, axis: int) -> int:
    shape = shapes.get(key)
    if shape is None or len(shape) != ndim or 0 in shape:
        raise ValueError(
            f"{key} must have {ndim} dimensions in a state dict of guided-diffusion or improved-diffusion, got "
            f"{'no such key' if shape is None else list(shape)}"
        )
    return shape[axis]
