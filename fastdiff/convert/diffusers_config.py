"""Configs of diffusers' UNet2DModel and ours, both ways, or a refusal that names the key

Of what UNet2DModel can be, ours is all that computes the same function; what has no effect there may be anything.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from fastdiff.manifest import listed
from fastdiff.model import UNetConfig

__all__ = ["DEFAULTS", "UNET2D", "config_from_diffusers", "config_to_diffusers", "has_middle_attention"]

UNET2D = "UNet2DModel"
# its own defaults: a config of the Hub may leave keys out
DEFAULTS: dict[str, Any] = {
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
# what has one value, or a few, in fastdiff's UNet
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "freq_shift": (0,),
    "flip_sin_to_cos": (True, False),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "act_fn": ("silu", "swish"),
    "norm_eps": (1e-5,),
    "add_attention": (True, False),
    "class_embed_type": (None,),
    "resnet_time_scale_shift": ("scale_shift", "default"),
    "downsample_type": ("resnet", "conv", None),
    "upsample_type": ("resnet", "conv", None),
}
_SIZES = ("in_channels", "out_channels", "layers_per_block", "norm_num_groups")
_OPTIONAL_SIZES = ("attention_head_dim", "attn_norm_num_groups", "num_class_embeds")
# a size, and levels, beyond which a config is a mistake; the widest published level has 2048 channels
_LARGEST, _MOST_LEVELS = 2**20, 16

# how a block type resamples; None: as downsample_type or upsample_type says
_DOWN = {"DownBlock2D": "conv", "ResnetDownsampleBlock2D": "resnet", "AttnDownBlock2D": None}
_UP = {"UpBlock2D": "conv", "ResnetUpsampleBlock2D": "resnet", "AttnUpBlock2D": None}


def config_from_diffusers(given: Mapping[str, Any], image_size: int | None = None) -> UNetConfig:
    """The config of the UNet that computes what UNet2DModel(**given) computes; keys left out have its defaults.

    image_size: for a config whose sample_size is None. Where sample_size is (H, W), the UNet's is H.
    ValueError or TypeError names the key, what fastdiff's UNet can be, and what came.
    """
    if not isinstance(given, Mapping):
        raise TypeError(f"config must be a mapping, UNet2DModel's config, got {type(given).__name__}")
    if given.get("_class_name", UNET2D) != UNET2D:
        raise ValueError(f"_class_name must be {UNET2D!r}, got {_short(given['_class_name'])}")
    unknown = [key for key in given if key not in DEFAULTS and not str(key).startswith("_")]
    if unknown:
        raise ValueError(f"config has unknown keys [{listed(unknown)}]; known are {sorted(DEFAULTS)}")
    config = {**DEFAULTS, **{key: value for key, value in given.items() if key in DEFAULTS}}
    for key, allowed in _ALLOWED.items():
        _expect(config, key, *allowed)
    for key in (*_SIZES, *_OPTIONAL_SIZES):
        if config[key] is not None or key in _SIZES:
            _check_size(key, config[key])
    widths = _sequence(config, "block_out_channels")
    for width in widths:
        _check_size("block_out_channels", width)
    if not 1 <= len(widths) <= _MOST_LEVELS:
        raise ValueError(f"block_out_channels must name 1 to {_MOST_LEVELS} widths, got {len(widths)}")
    if widths[0] % 2:
        raise ValueError(
            f"block_out_channels must begin with an even width (cosines and sines of the time), got {widths[0]}"
        )
    _expect(config, "time_embedding_dim", None, 4 * widths[0])
    scale_shift, groups = config["resnet_time_scale_shift"] == "scale_shift", config["norm_num_groups"]
    if any(width % groups for width in widths):
        raise ValueError(f"norm_num_groups must divide block_out_channels {widths}, got {groups}")
    if config["add_attention"]:
        # without a group count UNet2DModel's middle attention has a norm only in the "default" mode
        _expect(config, "attn_norm_num_groups", groups, *(() if scale_shift else (None,)))
    side = _image_size(config["sample_size"], image_size, len(widths))
    attention, updown = _attention_levels(config, len(widths)), _resnets_resample(config, len(widths))
    head_dim = _head_dim(config, [widths[level] for level in attention], widths[-1])
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


def config_to_diffusers(config: UNetConfig) -> dict[str, Any]:
    """The config of the UNet2DModel that computes what UNet(config) computes; ValueError where none does."""
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
    if config.time_scale != 1:
        raise ValueError(
            f"time_scale must be 1, got {config.time_scale}: UNet2DModel embeds the times that it is given"
        )
    attention = [side in config.attention_resolutions for side in config.resolutions]
    attended = {width for width, attends in zip(widths, attention, strict=True) if attends} | {widths[-1]}
    head_dims = {width // config.heads(width) for width in attended}
    if len(head_dims) > 1 and config.num_heads != 1:
        raise ValueError(
            f"num_heads must give one head width at all widths with attention {sorted(attended)}, got "
            f"num_heads={config.num_heads}: UNet2DModel holds a constant attention_head_dim only"
        )
    resample = "resnet" if config.resblock_updown else "conv"
    down, up = (next(kind for kind, how in kinds.items() if how == resample) for kinds in (_DOWN, _UP))
    return {
        **DEFAULTS,
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


def has_middle_attention(given: Mapping[str, Any]) -> bool:
    """Whether the middle block of UNet2DModel(**given) has attention."""
    return bool(given.get("add_attention", DEFAULTS["add_attention"]))


def _short(value: object) -> str:
    return reprlib.repr(value)


def _expect(config: Mapping[str, Any], key: str, *allowed: Any) -> None:
    if config[key] not in allowed:
        choices = " or ".join(map(repr, allowed))
        raise ValueError(f"{key} must be {choices} for fastdiff's UNet, got {_short(config[key])}")


def _check_size(key: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{key} must hold integers, got {_short(value)}")
    if not 1 <= value <= _LARGEST:
        raise ValueError(f"{key} must be in [1, {_LARGEST}], got {_short(value)}")


def _sequence(config: Mapping[str, Any], key: str) -> tuple[Any, ...]:
    if isinstance(config[key], str) or not isinstance(config[key], Sequence):
        raise TypeError(f"{key} must be a list, one entry a level, got {_short(config[key])}")
    return tuple(config[key])


def _image_size(sample_size: Any, image_size: int | None, levels: int) -> int:
    both = isinstance(sample_size, Sequence) and not isinstance(sample_size, str) and len(sample_size) == 2
    sides = tuple(sample_size) if both else () if sample_size is None else (sample_size,)
    for key, side in (*(("sample_size", side) for side in sides), ("image_size", image_size)):
        if side is None and key == "image_size":
            continue
        _check_size(key, side)
        if side % 2 ** (levels - 1):
            raise ValueError(f"{key} must be divisible by {2 ** (levels - 1)} for {levels} levels, got {side}")
    given = {*sides, *(() if image_size is None else (image_size,))}
    if not given or (image_size is not None and len(given) > 1):
        raise ValueError(
            "sample_size must be given, and equal to image_size where that is given too, got "
            f"sample_size={_short(sample_size)} and image_size={image_size}; pass image_size for a config without it"
        )
    return image_size or sides[0]


def _block_types(config: Mapping[str, Any], key: str, levels: int, known: Mapping[str, str | None]) -> list[str]:
    """One of `known` a level; an old prefix is dropped, as UNet2DModel does."""
    types = _sequence(config, key)
    plain = [kind.removeprefix("UNetRes") if isinstance(kind, str) else kind for kind in types]
    if len(types) != levels or any(kind not in list(known) for kind in plain):
        raise ValueError(f"{key} must be {levels} of {list(known)} for fastdiff's UNet, got {_short(types)}")
    return plain


def _attention_levels(config: Mapping[str, Any], levels: int) -> list[int]:
    down = [kind == "AttnDownBlock2D" for kind in _block_types(config, "down_block_types", levels, _DOWN)]
    up = [kind == "AttnUpBlock2D" for kind in _block_types(config, "up_block_types", levels, _UP)]
    if down != up[::-1]:
        raise ValueError(
            "up_block_types must have attention at the levels that down_block_types has it, in reverse order, got "
            f"{_short(tuple(config['up_block_types']))} for {_short(tuple(config['down_block_types']))}"
        )
    return [level for level, attends in enumerate(down) if attends]


def _resnets_resample(config: Mapping[str, Any], levels: int) -> bool:
    """Whether ResBlocks resample, or convolutions; the last block either way does not resample at all."""
    if levels == 1:
        return bool(config["downsample_type"] == "resnet")
    down = _block_types(config, "down_block_types", levels, _DOWN)[:-1]
    up = _block_types(config, "up_block_types", levels, _UP)[:-1]
    downs = {_DOWN[kind] or config["downsample_type"] or "conv" for kind in down}
    ups = {_UP[kind] or config["upsample_type"] or "conv" for kind in up}
    if len(downs | ups) > 1:
        raise ValueError(
            "down_block_types, up_block_types, downsample_type and upsample_type must resample in one way for "
            f"fastdiff's UNet, all by 'conv' or all by 'resnet', got {sorted(downs)} on the way down and "
            f"{sorted(ups)} on the way up"
        )
    if "conv" in downs:
        _expect(config, "downsample_padding", 1)
    return "resnet" in downs


def _head_dim(config: Mapping[str, Any], attended: list[int], last: int) -> int | None:
    """Channels a head; None for one head."""
    head_dim: int | None = config["attention_head_dim"]
    if head_dim is None or not (attended or config["add_attention"]):
        return None
    # ours has attention in the middle, if only as nothing
    if any(width % head_dim for width in (*attended, last)):
        raise ValueError(
            f"attention_head_dim must divide the width of every level with attention and of the last one, "
            f"{sorted({*attended, last})}, for fastdiff's UNet, got {head_dim}"
        )
    return head_dim


def _multiple(width: int, channels: int) -> float:
    """m with int(m * channels) == width"""
    if width % channels == 0:
        return width // channels
    ratio = width / channels
    return ratio if int(ratio * channels) == width else math.nextafter(ratio, math.inf)
