"""The networks that are measured as data: their blocks, and every norm in them with its shape"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch

from fastdiff.model import PRESETS, UNet
from fastdiff.model.blocks import AttentionBlock, ResBlock

NETWORKS = {"adm-64": 95, "adm-128": 87, "adm-256": 101}
"""The presets that are counted, and how many norms each has"""

TIMED = ("adm-64", "adm-256")
"""Those whose shapes are timed on a GPU and built ahead of time"""


class Block(NamedTuple):
    """A ResBlock or an attention (attention: channels == out_channels, resample and split None)

    side: of its input in pixels. split: channels of the two tensors whose concatenation is its input, or None.
    """

    name: str
    kind: str
    channels: int
    out_channels: int
    side: int
    resample: str | None = None
    split: tuple[int, int] | None = None

    @property
    def out_side(self) -> int:
        return {"up": self.side * 2, "down": self.side // 2, None: self.side}[self.resample]


@dataclasses.dataclass(frozen=True)
class Site:
    """A norm in a network: what it reads, and what follows it

    split: channels of the two tensors whose concatenation it reads. resample: what follows its activation.
    folded: a convolution writes what it alone reads, so that the convolution's bias can be added here.
    stats, stats2: whether a residual writes the first and the second of what it reads, and can hand in statistics.
    """

    name: str
    channels: int
    side: int
    groups: int
    modulated: bool
    silu: bool
    resample: str | None = None
    split: tuple[int, int] | None = None
    folded: bool = False
    stats: bool = False
    stats2: bool = False

    @property
    def fused(self) -> Site:
        """What a call with every option that the site allows depends on; equal sites need one measurement"""
        return dataclasses.replace(self, name="")

    @property
    def plain(self) -> Site:
        """The same norm alone: one input tensor, no resampling, its own statistics"""
        return dataclasses.replace(self, name="", resample=None, split=None, folded=False, stats=False, stats2=False)


@cache
def network(name: str) -> UNet:
    with torch.device("meta"):
        return UNet(PRESETS[name])


@cache
def blocks(name: str) -> tuple[Block, ...]:
    """Every ResBlock and attention in the order of a forward pass"""
    return tuple(_walk(network(name)))


def _walk(net: UNet) -> Iterator[Block]:
    channels, side = net.config.widths[0], net.config.image_size
    skips: list[int] = []
    stages: list[tuple[str, Any]] = [(f"input_blocks.{i}", stage) for i, stage in enumerate(net.input_blocks)]
    stages += [("middle_block", net.middle_block)]
    stages += [(f"output_blocks.{i}", stage) for i, stage in enumerate(net.output_blocks)]
    for stage_name, stage in stages:
        split = (channels, skips.pop()) if stage_name.startswith("output") else None
        for i, layer in enumerate(stage):
            layer_name = f"{stage_name}.{i}"
            if isinstance(layer, ResBlock):
                block = Block(layer_name, "res", layer.channels, layer.out_channels, side, layer.resample, split)
                channels, side, split = block.out_channels, block.out_side, None
                yield block
            elif isinstance(layer, AttentionBlock):
                yield Block(layer_name, "attention", channels, channels, side)
        if stage_name.startswith("input"):
            skips.append(channels)


@cache
def norm_sites(name: str) -> tuple[Site, ...]:
    """Every norm in the order of a forward pass; tests hold it to the shapes that a forward pass sees"""
    net, layout = network(name), blocks(name)
    groups = net.config.groups
    sites = []
    for block in layout:
        if block.kind == "attention":
            sites.append(Site(f"{block.name}.norm", block.channels, block.side, groups, False, False, stats=True))
            continue
        sites.append(
            Site(
                f"{block.name}.in_layers.0",
                block.channels,
                block.side,
                groups,
                modulated=False,
                silu=True,
                resample=block.resample,
                split=block.split,
                stats=True,
                stats2=block.split is not None,
            )
        )
        out = f"{block.name}.out_layers.0"
        sites.append(Site(out, block.out_channels, block.out_side, groups, net.config.scale_shift, True, folded=True))
    sites.append(Site("out.0", net.config.widths[0], net.config.image_size, groups, False, True, stats=True))
    return tuple(sites)
