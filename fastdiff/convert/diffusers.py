"""Weights of diffusers' UNet2DModel, both ways; reads configs and state dicts, never imports diffusers

The two networks compute the same function. Names differ; to_q, to_k and to_v are one qkv here, and the time_emb_proj
of all blocks are one `mod`.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from fastdiff.model import SuperResolutionUNet, UNet, UNetConfig
from fastdiff.model.blocks import AttentionBlock, Downsample, ResBlock, Upsample

# UNet2DModel's defaults: a config of the Hub may leave keys out
_DEFAULTS: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (224, 448, 672, 896),
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
    "num_train_timesteps": None,
}
# What fastdiff's UNet does always
_FIXED: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "freq_shift": (0,),
    "flip_sin_to_cos": (True,),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "act_fn": ("silu", "swish"),
    "norm_eps": (1e-5,),
    "add_attention": (True,),
    "class_embed_type": (None,),
    "resnet_time_scale_shift": ("scale_shift", "default"),
    "downsample_type": ("resnet", "conv"),
}
_PLAIN_BLOCKS = {True: ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"), False: ("DownBlock2D", "UpBlock2D")}
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


def unet_from_diffusers(
    config: Mapping[str, Any], state_dict: Mapping[str, torch.Tensor], *, image_size: int | None = None
) -> UNet:
    """The UNet that computes what UNet2DModel(**config) with these weights computes

    config, state_dict: `model.config` and `model.state_dict()`, or config.json and the weights file's contents. Keys
    left out of config have UNet2DModel's defaults. image_size: for a config whose sample_size is None.
    The network has the weights' dtype, is on the CPU, in eval mode, and shares no memory with state_dict.
    ValueError: a config that UNet cannot hold (key, expected, got); missing, extra or mis-shaped weights.
    """
    with torch.device("meta"):
        unet = UNet(_config_from_diffusers(config, image_size))
    layout = _layout(unet)
    shapes = {key: shape for part in layout.values() for key, shape in part.items()}
    missing, extra = sorted(set(shapes) - set(state_dict)), sorted(set(state_dict) - set(shapes))
    if missing or extra:
        raise ValueError(f"state_dict lacks keys {missing} and has unexpected keys {extra} for this config")
    for key, shape in shapes.items():
        if tuple(state_dict[key].shape) != shape:
            raise ValueError(f"state_dict[{key!r}] must have shape {shape}, got {tuple(state_dict[key].shape)}")
    dtypes = {value.dtype for value in state_dict.values()}
    if len(dtypes) > 1 or not all(dtype.is_floating_point for dtype in dtypes):
        raise ValueError(
            f"state_dict must have one floating-point dtype, got {sorted(map(str, dtypes))}; cast it first"
        )
    unet = unet.to(dtypes.pop()).to_empty(device="cpu")
    for name, parameter in unet.named_parameters():
        rows = torch.cat([state_dict[key] for key in layout[name]])
        parameter.data.copy_(rows.reshape(parameter.shape))
    return unet.eval()


def unet_to_diffusers(unet: UNet) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Config and state dict of the UNet2DModel that computes what this UNet computes

    UNet2DModel(**config).load_state_dict(state_dict) takes them; the tensors are copies.
    ValueError: channel_mult[0] other than 1, pooled resampling without ResBlocks, or a head count over several widths.
    TypeError: a SuperResolutionUNet, whose second image UNet2DModel does not take.
    """
    if isinstance(unet, SuperResolutionUNet):
        raise TypeError("unet must be a UNet, got SuperResolutionUNet: UNet2DModel takes no low_res")
    config = _config_to_diffusers(unet.config)
    weights, theirs = unet.state_dict(), {}
    for name, shapes in _layout(unet).items():
        rows = weights[name].split([shape[0] for shape in shapes.values()])
        for (key, shape), part in zip(shapes.items(), rows, strict=True):
            theirs[key] = part.reshape(shape).clone(memory_format=torch.contiguous_format)
    return config, theirs


def _config_from_diffusers(given: Mapping[str, Any], image_size: int | None) -> UNetConfig:
    if given.get("_class_name", "UNet2DModel") != "UNet2DModel":
        raise ValueError(f"_class_name must be 'UNet2DModel', got {given['_class_name']!r}")
    unknown = sorted(key for key in given if key not in _DEFAULTS and not key.startswith("_"))
    if unknown:
        raise ValueError(f"config has unknown keys {unknown}; known are {sorted(_DEFAULTS)}")
    config = {**_DEFAULTS, **{key: value for key, value in given.items() if key in _DEFAULTS}}
    for key, allowed in _FIXED.items():
        _expect(config, key, *allowed)
    widths, updown = tuple(config["block_out_channels"]), config["downsample_type"] == "resnet"
    if not widths:
        raise ValueError("block_out_channels must name at least one width, got none")
    scale_shift = config["resnet_time_scale_shift"] == "scale_shift"
    groups = config["norm_num_groups"]
    _expect(config, "upsample_type", config["downsample_type"])
    _expect(config, "downsample_padding", *((config["downsample_padding"],) if updown else (1,)))
    _expect(config, "time_embedding_dim", None, 4 * widths[0])
    # Without a group count UNet2DModel's middle attention has a norm only in the "default" mode
    _expect(config, "attn_norm_num_groups", groups, *(() if scale_shift else (None,)))
    side = _image_size(config["sample_size"], image_size)
    attention = _attention_levels(config, len(widths), updown)
    head_dim = config["attention_head_dim"]
    return UNetConfig(
        image_size=side,
        in_channels=config["in_channels"],
        out_channels=config["out_channels"],
        channels=widths[0],
        channel_mult=tuple(_multiple(width, widths[0]) for width in widths),
        num_blocks=config["layers_per_block"],
        attention_resolutions=tuple(side // 2**level for level in attention),
        num_heads=1 if head_dim is None else None,
        head_channels=head_dim,
        num_labels=config["num_class_embeds"],
        dropout=config["dropout"],
        resblock_updown=updown,
        scale_shift=scale_shift,
        groups=groups,
    )


def _config_to_diffusers(config: UNetConfig) -> dict[str, Any]:
    widths = config.widths
    if widths[0] != config.channels:
        raise ValueError(
            f"channel_mult[0] must be 1, got {config.channel_mult[0]}: UNet2DModel derives the width of its time "
            "embedding from the first level"
        )
    if not (config.resblock_updown or config.conv_resample) and len(widths) > 1:
        raise ValueError(
            "conv_resample must be True where resblock_updown is False, got False: UNet2DModel cannot pool alone"
        )
    attention = [side in config.attention_resolutions for side in config.resolutions]
    attended = {width for width, attends in zip(widths, attention, strict=True) if attends} | {widths[-1]}
    head_dims = {width // config.heads(width) for width in attended}
    if len(head_dims) > 1 and config.num_heads != 1:
        raise ValueError(
            f"num_heads must give one head width at all widths with attention {sorted(attended)}, got "
            f"num_heads={config.num_heads}: UNet2DModel holds a constant attention_head_dim only"
        )
    down, up = _PLAIN_BLOCKS[config.resblock_updown]
    resample = "resnet" if config.resblock_updown else "conv"
    return {
        **_DEFAULTS,
        "sample_size": config.image_size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "down_block_types": tuple("AttnDownBlock2D" if attends else down for attends in attention),
        "up_block_types": tuple("AttnUpBlock2D" if attends else up for attends in reversed(attention)),
        "block_out_channels": widths,
        "layers_per_block": config.num_blocks,
        "downsample_type": resample,
        "upsample_type": resample,
        "dropout": config.dropout,
        "attention_head_dim": None if config.num_heads == 1 else head_dims.pop(),
        "norm_num_groups": config.groups,
        "attn_norm_num_groups": config.groups,
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift else "default",
        "num_class_embeds": config.num_labels,
    }


def _expect(config: Mapping[str, Any], key: str, *allowed: Any) -> None:
    if config[key] not in allowed:
        raise ValueError(f"{key} must be {' or '.join(map(repr, allowed))} for fastdiff's UNet, got {config[key]!r}")


def _image_size(sample_size: Any, image_size: int | None) -> int:
    sides = {sample_size} if isinstance(sample_size, int) else set(sample_size or ())
    if image_size is not None:
        sides.add(image_size)
    if len(sides) != 1:
        raise ValueError(
            f"sample_size must be one side, equal to image_size where both are given, got sample_size={sample_size!r} "
            f"and image_size={image_size!r}; pass image_size for a config without sample_size"
        )
    return sides.pop()


def _attention_levels(config: Mapping[str, Any], levels: int, updown: bool) -> list[int]:
    """The levels with attention; ValueError unless both block lists agree with one another and with downsample_type"""
    down, up = _PLAIN_BLOCKS[updown]
    types = tuple(config["down_block_types"])
    if len(types) != levels or not set(types) <= {down, "AttnDownBlock2D"}:
        raise ValueError(
            f"down_block_types must be {levels} of {down!r} and 'AttnDownBlock2D' for "
            f"downsample_type={config['downsample_type']!r}, got {types}"
        )
    attention = [kind == "AttnDownBlock2D" for kind in types]
    mirror = tuple("AttnUpBlock2D" if attends else up for attends in reversed(attention))
    if tuple(config["up_block_types"]) != mirror:
        raise ValueError(
            f"up_block_types must mirror down_block_types, {mirror}, got {tuple(config['up_block_types'])}"
        )
    return [level for level, attends in enumerate(attention) if attends]


def _multiple(width: int, channels: int) -> float:
    """m with int(m * channels) == width"""
    if width % channels == 0:
        return width // channels
    ratio = width / channels
    return ratio if int(ratio * channels) == width else math.nextafter(ratio, math.inf)


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


def _layout(unet: UNet) -> dict[str, dict[str, tuple[int, ...]]]:
    """For each of our parameters their keys and shapes, whose rows one after the other are ours"""
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

    layout = {}
    for name, value in unet.state_dict().items():
        module_name, _, leaf = name.rpartition(".")
        theirs_all = renames[module_name]
        rows = mod_rows if module_name == "mod" else [value.shape[0] // len(theirs_all)] * len(theirs_all)
        # Our 1x1 convolutions over positions, (C_out, C, 1), are Linear there
        columns = value.shape[1:2] if value.ndim == 3 else value.shape[1:]
        layout[name] = {f"{key}.{leaf}": (n, *columns) for key, n in zip(theirs_all, rows, strict=True)}
    return layout
