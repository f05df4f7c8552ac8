"""Small checkpoints, and hands to look into them and to damage them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch

from fastdiff.checkpoint import CheckpointError, load
from fastdiff.classifier import Classifier
from fastdiff.diffusion_model import DiffusionModel
from fastdiff.manifest import SECTIONS
from fastdiff.model import (
    EncoderConfig,
    EncoderUNet,
    SuperResolutionConfig,
    SuperResolutionUNet,
    UNet,
    UNetConfig,
)

PNG = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\x00\x01\x00\x00\x00\x01\x08\x00\x00\x00\x00:~\x9bU"
SHAPE = (1, 8, 8)

Network = TypeVar("Network", bound=torch.nn.Module)


SMALL: dict[str, Any] = dict(image_size=8, in_channels=1, channels=4, channel_mult=(1,), num_blocks=1, groups=2)
SMALL |= dict(attention_resolutions=(), num_heads=1, head_channels=None)


def filled(network: Network, seed: int) -> Network:
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return network


def unet(seed: int = 0, **fields: Any) -> UNet:
    return filled(UNet(UNetConfig(**{**SMALL, "out_channels": 1, "num_labels": 11, **fields})), seed)


def upsampler(seed: int = 0, **fields: Any) -> SuperResolutionUNet:
    options = {**SMALL, "out_channels": 1, "num_labels": 11, "low_res_size": 4, "low_res_channels": 2, **fields}
    return filled(SuperResolutionUNet(SuperResolutionConfig(**options)), seed)


def encoder(seed: int = 0, **fields: Any) -> EncoderUNet:
    return filled(EncoderUNet(EncoderConfig(**{**SMALL, "out_channels": 10, **fields})), seed)


def digits(seed: int = 0, **options: Any) -> DiffusionModel:
    return DiffusionModel(unet(seed), **{"schedule": "cosine", "image_shape": SHAPE, **options})


def judge(seed: int = 0, **options: Any) -> Classifier:
    return Classifier(encoder(seed), **{"schedule": "cosine", "image_shape": SHAPE, **options})


MODEL = digits(name="small", provenance={"steps": 7, "betas": [0.9, 0.999]})


def state(model: DiffusionModel | Classifier) -> dict[str, torch.Tensor]:
    return model.network.state_dict()


def assert_same_model(loaded: DiffusionModel | Classifier, saved: DiffusionModel | Classifier) -> None:
    assert type(loaded) is type(saved) and type(loaded.network) is type(saved.network)
    assert loaded.network.config == saved.network.config
    assert state(loaded).keys() == state(saved).keys()
    for key, tensor in state(saved).items():
        assert torch.equal(state(loaded)[key], tensor), key
        assert state(loaded)[key].dtype == tensor.dtype, key
    assert np.array_equal(loaded.schedule.betas, saved.schedule.betas)
    fields = SECTIONS["classifier" if isinstance(saved, Classifier) else "diffusion"]
    for attribute in {*fields, "dtype", "name"} - {"schedule"}:
        assert getattr(loaded, attribute) == getattr(saved, attribute), attribute
    assert loaded.provenance == saved.provenance


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_bytes())


def weights_of(folder: Path) -> Path:
    return folder / config_of(folder)["weights"]["file"]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def put_weights(folder: Path, data: bytes) -> None:
    """Other weights under an honest hash, as somebody who means harm would put them."""
    config, digest = config_of(folder), hashlib.sha256(data).hexdigest()
    weights_of(folder).unlink()
    config["weights"] = {"file": f"model-{digest[:12]}.safetensors", "sha256": digest, "bytes": len(data)}
    (folder / config["weights"]["file"]).write_bytes(data)
    (folder / "config.json").write_text(json.dumps(config))


def header_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def with_header(header: dict[str, Any], body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def refused(src: Path, *words: str, by: Callable[..., Any] = load, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        by(src, **options)
    sentence = str(caught.value)
    for word in (str(src), *words):
        assert word in sentence
    return sentence
