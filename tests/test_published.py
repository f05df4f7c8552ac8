"""fastdiff against what the published code did when it was run: tests/published holds its names, shapes and numbers"""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from fastdiff.model import (
    CLASSIFIER_PRESETS,
    PRESETS,
    UPSAMPLER_PRESETS,
    EncoderUNet,
    SuperResolutionUNet,
    UNet,
)
from fastdiff.model.blocks import AttentionBlock

PUBLISHED = Path(__file__).parent / "published"
CHECKPOINTS = json.loads(gzip.decompress((PUBLISHED / "keys.json.gz").read_bytes()))

FILES = {
    "adm-64": "64x64_diffusion",
    "adm-128": "128x128_diffusion",
    "adm-256": "256x256_diffusion",
    "adm-256-uncond": "256x256_diffusion_uncond",
    "adm-512": "512x512_diffusion",
    "upsampler-64-256": "64_256_upsampler",
    "upsampler-128-512": "128_512_upsampler",
    "classifier-64": "64x64_classifier",
    "classifier-128": "128x128_classifier",
    "classifier-256": "256x256_classifier",
    "classifier-512": "512x512_classifier",
}
NETWORKS = {
    **{name: (UNet, config) for name, config in PRESETS.items()},
    **{name: (SuperResolutionUNet, config) for name, config in UPSAMPLER_PRESETS.items()},
    **{name: (EncoderUNet, config) for name, config in CLASSIFIER_PRESETS.items()},
}


def keys_of(name: str) -> dict[str, tuple[list[int], str]]:
    record = CHECKPOINTS[name]
    return CHECKPOINTS[record["keys_of"]]["keys"] if "keys_of" in record else record["keys"]


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_a_preset_is_the_published_network(name: str) -> None:
    record, keys = CHECKPOINTS[FILES[name]], keys_of(FILES[name])
    network, config = NETWORKS[name]
    with torch.device("meta"):
        net = network(config)
    assert sum(p.numel() for p in net.parameters()) == record["parameters"]
    # the modulations of all blocks are one product in ours
    shapes = {key: shape for key, (shape, _) in keys.items() if ".emb_layers.1." not in key}
    for leaf in ("weight", "bias"):
        parts = [keys[f"{block}.emb_layers.1.{leaf}"][0] for block, _ in net.mod_layout]
        assert [part[0] for part in parts] == [rows for _, rows in net.mod_layout]
        shapes[f"mod.{leaf}"] = [sum(part[0] for part in parts), *parts[0][1:]]
    assert {key: list(value.shape) for key, value in net.state_dict().items()} == shapes
    heads = {name: m.num_heads for name, m in net.named_modules() if isinstance(m, AttentionBlock)}
    assert heads == record["built"]["heads"]
    assert config.dropout == record["flags"].get("dropout", 0.0)


def test_every_preset_has_its_record_and_every_record_its_keys() -> None:
    assert FILES.keys() == NETWORKS.keys()
    for name, record in CHECKPOINTS.items():
        keys = keys_of(name)
        numbers = sum(torch.Size(shape).numel() for shape, _ in keys.values())
        assert numbers == record["parameters"] and {dtype for _, dtype in keys.values()} == {"float32"}
