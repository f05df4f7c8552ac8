"""Weights of diffusers' UNet2DModel, both ways; reads configs and state dicts, never imports diffusers

The two networks compute the same function. Names differ; to_q, to_k and to_v are one qkv here, and the time_emb_proj
of all blocks are one `mod`. Where theirs has no attention in the middle, ours has one whose weights are all zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from fastdiff.convert.diffusers_config import config_from_diffusers, config_to_diffusers, has_middle_attention
from fastdiff.manifest import listed
from fastdiff.model import SuperResolutionUNet, UNet, UNetConfig
from fastdiff.model.blocks import AttentionBlock, Downsample, ResBlock, Upsample

_RES_BLOCK = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb": "class_embedding",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
# of diffusers' first releases; theirs renames as it loads
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def unet_from_diffusers(
    config: Mapping[str, Any], state_dict: Mapping[str, torch.Tensor], *, image_size: int | None = None
) -> UNet:
    """The UNet that computes what UNet2DModel(**config) with these weights computes

    config, state_dict: `model.config` and `model.state_dict()`, or config.json and the weights file's contents. Keys
    left out of config have UNet2DModel's defaults. image_size: for a config whose sample_size is None.
    The network has the weights' dtype, is on the CPU, in eval mode, and shares no memory with state_dict.
    ValueError or TypeError: a config that UNet cannot hold (key, expected, got); missing, extra or mis-shaped weights.
    """
    ours, weights = config_from_diffusers(config, image_size), _renamed(state_dict)
    # a lying config must not grow the network for ever: each block has tensors of its own
    if (blocks := ours.num_blocks * len(ours.widths)) > len(weights):
        raise ValueError(f"state_dict has {len(weights)} tensors, too few for {blocks} blocks of layers_per_block")
    with torch.device("meta"):
        unet = UNet(ours)
    layout = _layout(unet, middle_attention=has_middle_attention(config))
    _check_weights(weights, {key: shape for part in layout.values() for key, shape in part.items()})
    unet = unet.to(next(iter(weights.values())).dtype).to_empty(device="cpu")
    if not config.get("flip_sin_to_cos", True):
        # theirs has the sines first
        key = "time_embedding.linear_1.weight"
        weights[key] = weights[key].roll(ours.channels // 2, dims=1)
    for name, parameter in unet.named_parameters():
        if layout[name]:
            rows = torch.cat([weights[key] for key in layout[name]])
            parameter.data.copy_(rows.reshape(parameter.shape))
        else:
            parameter.data.zero_()
    return unet.eval()


def unet_to_diffusers(unet: UNet) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Config and state dict of the UNet2DModel that computes what this UNet computes

    UNet2DModel(**config).load_state_dict(state_dict) takes them; the tensors are copies.
    ValueError: channel_mult[0] or time_scale other than 1, pooled resampling without ResBlocks, or a head count over
    several widths.
    TypeError: a SuperResolutionUNet, whose second image UNet2DModel does not take.
    """
    if isinstance(unet, SuperResolutionUNet):
        raise TypeError("unet must be a UNet, got SuperResolutionUNet: UNet2DModel takes no low_res")
    config = config_to_diffusers(unet.config)
    weights, theirs = unet.state_dict(), {}
    for name, shapes in _layout(unet).items():
        rows = weights[name].split([shape[0] for shape in shapes.values()])
        for (key, shape), part in zip(shapes.items(), rows, strict=True):
            theirs[key] = part.reshape(shape).clone(memory_format=torch.contiguous_format)
    return config, theirs


def _renamed(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Its tensors, under today's names where attention has those of diffusers' first releases."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must be a mapping of names to tensors, got {type(state_dict).__name__}")
    renamed = {}
    for key, value in state_dict.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise TypeError(f"state_dict must map names to tensors, got {key!r}: {type(value).__name__}")
        module, _, leaf = key.rpartition(".")
        parent, _, last = module.rpartition(".")
        today = f"{parent}.{_OLD_ATTENTION[last]}.{leaf}" if last in _OLD_ATTENTION else key
        renamed[key if today in state_dict else today] = value
    return renamed


def _check_weights(weights: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    missing, extra = shapes.keys() - weights.keys(), weights.keys() - shapes.keys()
    if missing or extra:
        raise ValueError(
            f"state_dict lacks keys [{listed(missing)}] and has unexpected keys [{listed(extra)}] for this config"
        )
    for key, shape in shapes.items():
        if tuple(weights[key].shape) != shape:
            raise ValueError(f"state_dict[{key!r}] must have shape {shape}, got {tuple(weights[key].shape)}")
    dtypes = {value.dtype for value in weights.values()}
    if len(dtypes) > 1 or not all(dtype.is_floating_point for dtype in dtypes):
        raise ValueError(
            f"state_dict must have one floating-point dtype, got {sorted(map(str, dtypes))}; cast it first"
        )


def _module_pairs(config: UNetConfig) -> Iterator[tuple[str, str]]:
    """(our module, their module), for everything between the first convolution and the last norm"""
    levels = range(len(config.widths))
    attention = [side in config.attention_resolutions for side in config.resolutions]
    yield "input_blocks.0.0", "conv_in"
    n = 1
    for level in levels:
        for i in range(config.num_blocks):
            yield f"input_blocks.{n}.0", f"down_blocks.{level}.resnets.{i}"
            if attention[level]:
                yield f"input_blocks.{n}.1", f"down_blocks.{level}.attentions.{i}"
            n += 1
        if level != levels[-1]:
            yield f"input_blocks.{n}.0", f"down_blocks.{level}.downsamplers.0"
            n += 1
    yield "middle_block.0", "mid_block.resnets.0"
    yield "middle_block.1", "mid_block.attentions.0"
    yield "middle_block.2", "mid_block.resnets.1"
    n = 0
    for up, level in enumerate(reversed(levels)):
        for i in range(config.num_blocks + 1):
            yield f"output_blocks.{n}.0", f"up_blocks.{up}.resnets.{i}"
            if attention[level]:
                yield f"output_blocks.{n}.1", f"up_blocks.{up}.attentions.{i}"
            if level and i == config.num_blocks:
                yield f"output_blocks.{n}.{2 if attention[level] else 1}", f"up_blocks.{up}.upsamplers.0"
            n += 1


def _layout(unet: UNet, *, middle_attention: bool = True) -> dict[str, dict[str, tuple[int, ...]]]:
    """For each of our parameters their keys and shapes, whose rows one after the other are ours; none: zero"""
    renames: dict[str, tuple[str, ...]] = {ours: (theirs,) for ours, theirs in _ENDS.items()}
    pairs = dict(_module_pairs(unet.config))
    for ours, theirs in pairs.items():
        module = unet.get_submodule(ours)
        if isinstance(module, ResBlock):
            renames |= {f"{ours}.{leaf}": (f"{theirs}.{name}",) for leaf, name in _RES_BLOCK.items()}
        elif isinstance(module, AttentionBlock):
            renames[f"{ours}.norm"] = (f"{theirs}.group_norm",)
            renames[f"{ours}.qkv"] = (f"{theirs}.to_q", f"{theirs}.to_k", f"{theirs}.to_v")
            renames[f"{ours}.proj_out"] = (f"{theirs}.to_out.0",)
        elif isinstance(module, Downsample | Upsample):
            renames[f"{ours}.op" if isinstance(module, Downsample) else f"{ours}.conv"] = (f"{theirs}.conv",)
        else:
            renames[ours] = (theirs,)
    renames["mod"] = tuple(f"{pairs[block]}.time_emb_proj" for block, _ in unet.mod_layout)
    mod_rows = [rows for _, rows in unet.mod_layout]

    layout: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, value in unet.state_dict().items():
        module_name, _, leaf = name.rpartition(".")
        if module_name.startswith("middle_block.1.") and not middle_attention:
            layout[name] = {}
            continue
        theirs_all = renames[module_name]
        rows = mod_rows if module_name == "mod" else [value.shape[0] // len(theirs_all)] * len(theirs_all)
        # Our 1x1 convolutions over positions, (C_out, C, 1), are Linear there
        columns = value.shape[1:2] if value.ndim == 3 else value.shape[1:]
        layout[name] = {f"{key}.{leaf}": (n, *columns) for key, n in zip(theirs_all, rows, strict=True)}
    return layout
