"""config.json of a checkpoint: written, and read back with nothing dropped, guessed or corrected.

{"format": 1, "network": {"type", ...}, "diffusion": {...}, "dtype", "name", "provenance", "weights": {"file", "sha256",
"bytes"}} for a DiffusionModel; for a Classifier, "classifier": {...} in place of "diffusion".
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastdiff.classifier import Classifier
from fastdiff.diffusion_model import DiffusionModel
from fastdiff.placement import DTYPES
from fastdiff.schedule import SCHEDULES, Schedule

__all__ = ["CONFIG_BYTES", "SECTIONS", "Blueprint", "Manifest", "NetworkType", "listed", "networks", "strict_json"]

CONFIG_BYTES = 2**20
# in place of each other: what a model is beside its network
SECTIONS: dict[str, tuple[str, ...]] = {
    "diffusion": ("schedule", "prediction", "variance", "num_classes", "null_label", "image_shape", "clip_x0"),
    "classifier": ("schedule", "num_classes", "image_shape"),
}

# left out where they are None
OPTIONAL = {"diffusion": ("solver", "guided_channels"), "classifier": ()}

_FORMAT = 1
_FILE_AND_SHA256 = re.compile(r"model-([0-9a-f]{12})\.safetensors \1[0-9a-f]{52}")

Model = DiffusionModel | Classifier


@dataclass(frozen=True)
class NetworkType:
    """What a network.type stands for, and the section that its model has."""

    config: type[Any]
    network: type[torch.nn.Module]
    section: str


def networks() -> dict[str, NetworkType]:
    """Every network that a checkpoint may hold, by network.type."""
    from fastdiff import model

    return {
        "unet": NetworkType(model.UNetConfig, model.UNet, "diffusion"),
        "super_resolution": NetworkType(model.SuperResolutionConfig, model.SuperResolutionUNet, "diffusion"),
        "encoder": NetworkType(model.EncoderConfig, model.EncoderUNet, "classifier"),
    }


@dataclass(frozen=True)
class Blueprint:
    """The sections that describe a model, understood: its network's type and config, and its other arguments."""

    kind: str
    network: Any
    options: dict[str, Any]

    @property
    def section(self) -> str:
        return networks()[self.kind].section

    @classmethod
    def parse(cls, sections: Mapping[str, Any]) -> Blueprint:
        """Of network, diffusion or classifier, dtype and name; ValueError or TypeError names what is wrong."""
        section = _section(sections)
        _check_keys("model", sections, _model_keys(section))
        fields, dtype = sections[section], sections["dtype"]
        _check_keys(section, fields, SECTIONS[section], OPTIONAL[section])
        for key in OPTIONAL[section]:
            if key in fields and fields[key] is None:
                raise ValueError(f"{section}.{key} must be left out where there is none, got null")
        _check_type("name", sections["name"], str | None)
        _check_type("network", sections["network"], dict)
        if "clip_x0" in fields:
            _check_type("clip_x0", fields["clip_x0"], bool)
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {list(DTYPES)} or null, got {dtype!r}")
        network = dict(sections["network"])
        kind = network.pop("type", None)
        known = sorted(name for name, found in networks().items() if found.section == section)
        if not isinstance(kind, str) or kind not in known:
            raise ValueError(f"network.type must be one of {known} where there is a {section!r} section, got {kind!r}")
        options = {
            **fields,
            "schedule": _schedule(fields["schedule"]),
            "dtype": None if dtype is None else DTYPES[dtype],
            "name": sections["name"],
        }
        blueprint = cls(kind, networks()[kind].config.from_dict(network), options)
        _check_fit(blueprint.model(lambda *_: None), blueprint.network)
        return blueprint

    def new_network(self) -> torch.nn.Module:
        return networks()[self.kind].network(self.network)

    def model(self, network: Callable[..., Any], **changes: Any) -> Model:
        """The DiffusionModel or Classifier of a network; changes: arguments in place of those described."""
        made: type[Model] = Classifier if self.section == "classifier" else DiffusionModel
        return made(network, **{**self.options, **changes})


@dataclass(frozen=True)
class Manifest:
    """config.json, understood; file, sha256 and size (in bytes) are those of the weights."""

    config: dict[str, Any]
    blueprint: Blueprint
    file: str
    sha256: str
    size: int

    @classmethod
    def parse(cls, text: bytes) -> Manifest:
        """ValueError or TypeError for whatever is not exactly as written() writes it."""
        if len(text) > CONFIG_BYTES:
            raise ValueError(
                f"the config has {len(text)} bytes, at most {CONFIG_BYTES} are allowed; shorten provenance"
            )
        config = strict_json(text)
        if not isinstance(config, dict) or type(version := config.get("format")) is not int:
            raise ValueError("is not the config of a fastdiff checkpoint: it has no format number")
        if version != _FORMAT:
            raise ValueError(f"format must be {_FORMAT}, got {version}; a newer fastdiff may read it")
        described = _model_keys(_section(config))
        _check_keys("config", config, ("format", *described, "provenance", "weights"))
        weights = config["weights"]
        _check_keys("weights", weights, ("file", "sha256", "bytes"))
        _check_type("provenance", config["provenance"], dict)
        _check_type("weights.bytes", weights["bytes"], int)
        if not _FILE_AND_SHA256.fullmatch(f"{weights['file']} {weights['sha256']}"):
            raise ValueError(
                "weights.file must be model-<first 12 hex digits of weights.sha256>.safetensors, "
                f"got {weights['file']!r} and {weights['sha256']!r}"
            )
        blueprint = Blueprint.parse({key: config[key] for key in described})
        blueprint.options["provenance"] = config["provenance"]
        return cls(config, blueprint, weights["file"], weights["sha256"], weights["bytes"])

    @staticmethod
    def written(model: Model, kind: str, weights: bytes) -> bytes:
        """config.json of a model whose network is of the type `kind` and has these weights."""
        section, digest = networks()[kind].section, hashlib.sha256(weights).hexdigest()
        fields = {key: getattr(model, key) for key in SECTIONS[section]}
        fields |= {key: value for key in OPTIONAL[section] if (value := getattr(model, key)) is not None}
        config = {
            "format": _FORMAT,
            "network": {"type": kind, **model.network.config.to_dict()},  # type: ignore[attr-defined]
            section: {**fields, "schedule": _stored(model.schedule), "image_shape": list(model.image_shape)},
            "dtype": None if model.dtype is None else str(model.dtype).removeprefix("torch."),
            "name": model.name,
            "provenance": model.provenance,
            "weights": {"file": f"model-{digest[:12]}.safetensors", "sha256": digest, "bytes": len(weights)},
        }
        try:
            return (json.dumps(config, indent=2, allow_nan=False) + "\n").encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"name and provenance must be JSON's own types: {error}") from error


def strict_json(text: bytes) -> Any:
    """What the text says, with no key twice and no number that is not finite; ValueError otherwise."""
    try:
        return json.loads(text.decode(), object_pairs_hook=_unique, parse_float=_finite, parse_constant=_finite)
    except RecursionError as error:
        raise ValueError("is nested too deeply to be a config") from error


def listed(keys: Iterable[str], most: int = 8) -> str:
    """Names for an error's sentence, however many there are."""
    names = sorted(map(str, keys))
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _section(sections: object) -> str:
    return "classifier" if isinstance(sections, dict) and "classifier" in sections else "diffusion"


def _model_keys(section: str) -> tuple[str, ...]:
    return ("network", section, "dtype", "name")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(keys := dict(pairs)) != len(pairs):
        raise ValueError(f"a key occurs twice among {listed(key for key, _ in pairs)}")
    return keys


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is not a finite number")
    return number


def _check_keys(where: str, value: object, expected: tuple[str, ...], optional: tuple[str, ...] = ()) -> None:
    if not isinstance(value, dict):
        raise TypeError(f"{where} must be an object with keys {list(expected)}, got {type(value).__name__}")
    if value.keys() - set(optional) != set(expected):
        unknown = listed(value.keys() - set(expected) - set(optional))
        missing = listed(set(expected) - value.keys())
        raise ValueError(f"{where} must have keys {list(expected)}, got unknown [{unknown}] and lacks [{missing}]")


def _check_type(key: str, value: object, expected: Any) -> None:
    if not isinstance(value, expected):
        raise TypeError(f"{key} must be {getattr(expected, '__name__', expected)}, got {value!r}")


def _schedule(fields: Any) -> Schedule:
    if isinstance(fields, dict) and fields.keys() == {"betas"} and isinstance(fields["betas"], list):
        if wrong := [beta for beta in fields["betas"] if isinstance(beta, bool) or not isinstance(beta, int | float)]:
            raise TypeError(f"schedule.betas must be numbers, got {wrong[0]!r}")
        return Schedule(np.array(fields["betas"], dtype=np.float64))
    _check_keys("schedule", fields, ("name", "num_train_timesteps"))
    return Schedule.named(fields["name"], fields["num_train_timesteps"])


def _stored(schedule: Schedule) -> dict[str, Any]:
    """Its name where that alone gives the same betas, else the betas."""
    if schedule.name in SCHEDULES:
        with suppress(ValueError):
            named = Schedule.named(schedule.name, schedule.num_train_timesteps)
            if (named.betas == schedule.betas).all():
                return {"name": schedule.name, "num_train_timesteps": schedule.num_train_timesteps}
    return {"betas": schedule.betas.tolist()}


def _check_fit(model: Model, network: Any) -> None:
    """Refuses a network whose channels, logits, labels or levels do not fit the model, or an attention pool of another
    size: it would fail only when it runs."""
    C, H, W = model.image_shape
    if isinstance(model, Classifier):
        channels, said = (C, model.num_classes), f"num_classes={model.num_classes}"
    else:
        channels, said = (C, model.out_channels), f"variance={model.variance!r}"
    if (network.in_channels, network.out_channels) != channels:
        raise ValueError(
            f"image_shape={model.image_shape} and {said} need in_channels={channels[0]} and "
            f"out_channels={channels[1]} of the network, got {network.in_channels} and {network.out_channels}"
        )
    factor = 2 ** (len(network.channel_mult) - 1)
    if H % factor or W % factor:
        raise ValueError(
            f"image_shape={model.image_shape} must have sides that are multiples of {factor}, which the network's "
            f"{len(network.channel_mult)} levels halve"
        )
    if isinstance(model, Classifier):
        if network.pool == "attention" and {H, W} != {network.image_size}:
            raise ValueError(
                f"image_shape={model.image_shape} must have sides of {network.image_size}, the image_size of the "
                "network, whose pool is 'attention'"
            )
        return
    labels = None if model.num_classes is None else max(model.num_classes, (model.null_label or 0) + 1)
    if (labels is None) != (network.num_labels is None) or (labels or 0) > (network.num_labels or 0):
        raise ValueError(
            f"num_classes={model.num_classes} and null_label={model.null_label} need num_labels={labels} of the "
            f"network, got {network.num_labels}"
        )
