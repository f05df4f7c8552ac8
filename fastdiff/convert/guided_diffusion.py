"""Networks of guided-diffusion and improved-diffusion, both ways: their state dicts, and what those cannot show

Names and shapes are ours, save that each block has its own rows of `mod` as emb_layers.1, and that the rows of qkv may
be in another order.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, TypedDict

import torch

from fastdiff.classifier import Classifier
from fastdiff.convert.published import ATTENTION_ORDERS, PUBLISHED, Published
from fastdiff.convert.shapes import Seen, readings, shown
from fastdiff.diffusion_model import DiffusionModel
from fastdiff.manifest import listed
from fastdiff.model import (
    EncoderConfig,
    EncoderUNet,
    SuperResolutionConfig,
    SuperResolutionUNet,
    TrunkConfig,
    UNet,
    UNetConfig,
)
from fastdiff.model.blocks import AttentionBlock
from fastdiff.model.trunk import Trunk, check_positive
from fastdiff.schedule import Schedule

__all__ = ["Flags", "model_from_guided_diffusion", "state_to_guided_diffusion"]

Tensors = dict[str, torch.Tensor]

# guided-diffusion's norms have so many, whatever their width
_GROUPS = 32
_NETWORKS: dict[type[TrunkConfig], type[Trunk]] = {
    UNetConfig: UNet,
    SuperResolutionConfig: SuperResolutionUNet,
    EncoderConfig: EncoderUNet,
}


class Flags(TypedDict, total=False):
    """What weights cannot show; where they are a published network's, its own facts stand for what is left out

    attention_order: of the rows of qkv: "legacy", improved-diffusion's and guided-diffusion's default, or "new", of
        networks trained with use_new_attention_order.
    num_heads, head_channels: one of the two: heads of every attention, or channels of every head.
    image_size: side in pixels of the images.
    schedule: a key of SCHEDULES (noise_schedule), num_train_timesteps: its length T (diffusion_steps).
    rescale_timesteps: whether the network was trained on t * 1000 / T; of no consequence where T is 1000.
    dtype: the compute dtype (use_fp16), which becomes the model's recorded one.
    low_res_size: side of a super-resolution network's smaller images.
    image_channels: of an image, where a first convolution could also be a super-resolution network's.
    num_blocks: ResBlocks a level (num_res_blocks), where the shapes leave a choice.
    num_classes: labels, where the last row of label_emb is the null label's; else there are as many as rows.
    prediction: "x0" for networks trained with predict_xstart, else "eps".
    variance: "fixed_large" (their default) or "fixed_small" (sigma_small), where it is not learned.
    """

    attention_order: str
    num_heads: int
    head_channels: int
    image_size: int
    schedule: str
    num_train_timesteps: int
    rescale_timesteps: bool
    dtype: torch.dtype
    low_res_size: int
    image_channels: int
    num_blocks: int
    num_classes: int
    prediction: str
    variance: str


# why a flag is asked for, in the order in which they are told
_WHY = {
    "image_size": "convolutions fit every size",
    "low_res_size": "the smaller images of super-resolution fit every size",
    "num_heads": "or head_channels: the shapes are equal for every number of heads",
    "attention_order": f"one of {list(ATTENTION_ORDERS)}: the rows of qkv have the same shape in either order",
    "schedule": "the noise schedule is nowhere in the file",
    "num_train_timesteps": "T is nowhere in the file",
    "rescale_timesteps": "whether the network saw t or t * 1000 / T is nowhere in the file",
    "dtype": "the compute dtype: float32, or float16 where it was trained and sampled with use_fp16",
}
_CONFIGURED = ("image_size", "num_heads", "head_channels", "low_res_size", "dropout")
_PUBLISHED = ("schedule", "attention_order", "num_train_timesteps", "rescale_timesteps", "dtype")


def model_from_guided_diffusion(
    state_dict: Mapping[str, torch.Tensor], *, name: str | None = None, **flags: Any
) -> DiffusionModel | Classifier:
    """The model of a state dict: a DiffusionModel of a UNet or SuperResolutionUNet, or a Classifier

    flags: see Flags. name: of the model; None is the published network's.
    Parameters have the widest dtype of state_dict, are on the CPU and share no memory with it; the network is in eval
    mode. provenance tells the attention order, and the published network whose facts were taken.

    Raises ValueError or TypeError: weights that are no such network (key, expected, got), flags that are missing, each
    with its reason, or wrong.
    """
    if unknown := sorted(flags.keys() - Flags.__annotations__.keys()):
        raise TypeError(f"flags must be among {sorted(Flags.__annotations__)}, got {unknown}")
    if name is not None and not isinstance(name, str):
        raise TypeError(f"name must be a str or None, got {name!r}")
    flags = {key: value for key, value in flags.items() if value is not None}
    visible, published = _recognised({key: tuple(value.shape) for key, value in state_dict.items()}, flags)
    facts = _facts(visible, published, flags)
    T, C = facts["num_train_timesteps"], visible.in_channels
    schedule = Schedule.named(facts["schedule"], T)
    fields: dict[str, Any] = {
        key: facts[key] for key in ("image_size", "num_heads", "head_channels", "low_res_size") if key in facts
    }
    time_scale = 1000 / T if facts["rescale_timesteps"] else 1.0
    config = visible.config({**fields, "dropout": facts.get("dropout", 0.0), "time_scale": time_scale})
    network = _filled(config, state_dict, facts["attention_order"])
    known = None if published is None else published.name
    common: dict[str, Any] = {
        "image_shape": (C, config.image_size, config.image_size),
        "dtype": facts["dtype"],
        "name": known if name is None else name,
        "provenance": {
            "format": "guided-diffusion",
            "attention_order": facts["attention_order"],
            "published": known,
        },
    }
    if visible.pool is not None:
        return Classifier(network, schedule, visible.out_channels, **common)
    rows, learned = visible.num_labels, visible.out_channels == 2 * C
    classes = flags.get("num_classes", rows)
    if classes != rows and (rows is None or classes != rows - 1):
        asked = "left out, for it has no labels" if rows is None else f"{rows} or, with a null label, {rows - 1}"
        raise ValueError(f"num_classes must be {asked}, got {classes!r}")
    if learned and "variance" in flags:
        raise ValueError(f"variance must be left out: the network learned one, got {flags['variance']!r}")
    return DiffusionModel(
        network,
        schedule,
        flags.get("prediction", "eps"),
        "learned_range" if learned else flags.get("variance", "fixed_large"),
        classes,
        classes if classes != rows else None,
        **common,
    )


def state_to_guided_diffusion(network: torch.nn.Module, attention_order: str) -> Tensors:
    """The state dict that guided-diffusion's network of the same architecture takes; tensors are copies

    network: a UNet, SuperResolutionUNet or EncoderUNet with groups=32, as theirs always has.
    Raises TypeError or ValueError for another network or order.
    """
    if not isinstance(network, Trunk):
        raise TypeError(f"network must be a UNet, SuperResolutionUNet or EncoderUNet, got {type(network).__name__}")
    if network.config.groups != _GROUPS:
        raise ValueError(f"network must have groups={_GROUPS} for guided-diffusion, got {network.config.groups}")
    heads, state = _reordered(network, attention_order), network.state_dict()
    theirs = {}
    for ours, keys in _keys(network).items():
        for key, part in zip(keys, state[ours].split(list(keys.values())), strict=True):
            part = _legacy_from_new(part, heads[ours]) if ours in heads else part
            theirs[key] = part.clone(memory_format=torch.contiguous_format)
    return theirs


def _recognised(shapes: Mapping[str, tuple[int, ...]], flags: Mapping[str, Any]) -> tuple[Seen, Published | None]:
    """What the shapes show, and the published network that shows the same"""
    options = readings(shapes)
    for flag, shown_by in (("num_blocks", "num_blocks"), ("image_channels", "in_channels")):
        if flag in flags:
            check_positive(flag, flags[flag])
            kept = [seen for seen in options if getattr(seen, shown_by) == flags[flag]]
            if options and not kept:
                possible = sorted({getattr(seen, shown_by) for seen in options})
                raise ValueError(f"{flag} must be among {possible}, as the shapes allow, got {flags[flag]}")
            options = kept
    if not options:
        raise ValueError("the input blocks are no network of guided-diffusion or improved-diffusion: levels differ")
    for seen in options:
        for published in PUBLISHED:
            if shown(published.config) == seen:
                return seen, published
    if "low_res_size" in flags:
        options = [seen for seen in options if seen.low_res_channels] or options
    for flag, shown_by in (("num_blocks", "num_blocks"), ("image_channels", "in_channels")):
        if len(possible := sorted({getattr(seen, shown_by) for seen in options})) > 1:
            raise ValueError(f"{flag} must be given: the shapes are those of networks with {possible}")
    return options[0], None


def _facts(visible: Seen, published: Published | None, flags: Mapping[str, Any]) -> dict[str, Any]:
    """Every fact: given, published, or the only one possible; ValueError lists what is missing, and why it matters"""
    facts: dict[str, Any] = {}
    if published is not None:
        for source, keys in ((published.config, _CONFIGURED), (published, _PUBLISHED)):
            facts |= {key: value for key in keys if (value := getattr(source, key, None)) is not None}
    if "num_heads" in flags and "head_channels" in flags:
        raise ValueError(
            f"num_heads and head_channels exclude each other, got {flags['num_heads']} and {flags['head_channels']}"
        )
    if "num_heads" in flags or "head_channels" in flags:
        facts.pop("num_heads", None)
        facts.pop("head_channels", None)
    facts |= flags
    if visible.image_size is not None:
        facts.setdefault("image_size", visible.image_size)
    if facts.get("num_heads") == 1:
        facts.setdefault("attention_order", "legacy")  # both orders are one
    if facts.get("num_train_timesteps") == 1000:
        facts.setdefault("rescale_timesteps", False)
    known = facts.keys() | ({"num_heads"} if "head_channels" in facts else set())
    known |= set() if visible.low_res_channels else {"low_res_size"}
    if missing := [key for key in _WHY if key not in known]:
        told = "; ".join(f"{key} ({_WHY[key]})" for key in missing)
        raise ValueError(f"the weights are no published network's and do not show everything; give {told}")
    if not visible.low_res_channels and "low_res_size" in facts:
        raise ValueError(f"low_res_size must be left out: the network takes one image, got {facts['low_res_size']!r}")
    check_positive("image_size", facts["image_size"])
    for flag, words in (("prediction", ("eps", "x0")), ("variance", ("fixed_large", "fixed_small"))):
        if flag in flags and flags[flag] not in words:
            raise ValueError(f"{flag} must be one of {list(words)}, got {flags[flag]!r}")
    if not isinstance(facts["rescale_timesteps"], bool):
        raise TypeError(f"rescale_timesteps must be True or False, got {facts['rescale_timesteps']!r}")
    return facts


def _filled(config: TrunkConfig, state_dict: Mapping[str, torch.Tensor], attention_order: str) -> Trunk:
    """The network with the weights; ValueError unless every key and shape is its own"""
    with torch.device("meta"):
        network = _NETWORKS[type(config)](config)
    heads, layout, own = _reordered(network, attention_order), _keys(network), network.state_dict()
    expected = {key: (rows, *own[ours].shape[1:]) for ours, keys in layout.items() for key, rows in keys.items()}
    wrong = [
        f"{key} {list(state_dict[key].shape)} instead of {list(shape)}"
        for key, shape in expected.items()
        if key in state_dict and tuple(state_dict[key].shape) != shape
    ]
    faults = {
        "missing keys": expected.keys() - state_dict.keys(),
        "unknown keys": state_dict.keys() - expected.keys(),
        "wrong shapes": wrong,
        "not floating-point": [key for key, value in state_dict.items() if not value.is_floating_point()],
    }
    if found := [f"{fault}: {listed(keys)}" for fault, keys in faults.items() if keys]:
        raise ValueError("; ".join(found))
    dtype = functools.reduce(torch.promote_types, (value.dtype for value in state_dict.values()))
    network = network.to(dtype).to_empty(device="cpu")
    for ours, parameter in network.named_parameters():
        rows = torch.cat([state_dict[key].to(dtype) for key in layout[ours]])
        parameter.data.copy_(_new_from_legacy(rows, heads[ours]) if ours in heads else rows)
    return network.eval()


def _keys(network: Trunk) -> dict[str, dict[str, int]]:
    """For each of our parameters their keys, and how many of our rows each of these is"""
    keys = {}
    for ours, value in network.state_dict().items():
        if ours.startswith("mod."):
            keys[ours] = {f"{block}.emb_layers.1.{ours[4:]}": rows for block, rows in network.mod_layout}
        else:
            keys[ours] = {ours: len(value)}
    return keys


def _reordered(network: Trunk, attention_order: str) -> dict[str, int]:
    """The parameters whose rows are in another order there, and their heads; a pool's are in the new one always"""
    if attention_order not in ATTENTION_ORDERS:
        raise ValueError(f"attention_order must be one of {list(ATTENTION_ORDERS)}, got {attention_order!r}")
    if attention_order == "new":
        return {}
    blocks = ((name, module) for name, module in network.named_modules() if isinstance(module, AttentionBlock))
    return {f"{name}.qkv.{leaf}": module.num_heads for name, module in blocks for leaf in ("weight", "bias")}


def _new_from_legacy(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """[head][q, k, v][ch] -> [q, k, v][head][ch]"""
    return rows.reshape(heads, 3, -1, *rows.shape[1:]).transpose(0, 1).reshape(rows.shape)


def _legacy_from_new(rows: torch.Tensor, heads: int) -> torch.Tensor:
    return rows.reshape(3, heads, -1, *rows.shape[1:]).transpose(0, 1).reshape(rows.shape)
