"""fastdiff against what the published code did when it was run: tests/published holds its names, shapes and numbers"""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from published.weights import noise
from reference.networks import NULL, Recorder, judging, mixing, mixing_learned

from fastdiff import Classifier, DiffusionModel, Sampler, Schedule
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
TRAJECTORIES = json.loads((PUBLISHED / "trajectories.json").read_text())
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


class Trajectory:
    """A recorded run of the published sampler, and the same run of ours"""

    def __init__(self, name: str) -> None:
        self.record = TRAJECTORIES[name]
        self.config = self.record["config"]
        T = self.config["diffusion_steps"]
        learned = self.config["variance"] == "learned_range"
        # improved-diffusion's networks see times of 1000 steps
        scale = 1000 / T if self.config.get("rescale_timesteps") else 1.0
        self.network = Recorder(mixing_learned if learned else mixing)
        schedule = Schedule.named(self.config["schedule"], T)
        shape = tuple(self.record["shape"][1:])
        prediction, clip = self.config.get("prediction", "eps"), self.config["clip_denoised"]
        variance, scales = self.config["variance"], self.config.get("classifier_scale")
        self.model = DiffusionModel(
            lambda x, t, y: self.network(x, scale * t, y), schedule, prediction, variance, 10, NULL, shape, clip_x0=clip
        )
        self.options = {
            "steps": self.config["respacing"] or T,
            "solver": {"p_sample_loop": "ddpm", "ddim_sample_loop": "ddim"}[self.config["sampler"]],
            "eta": self.config.get("eta"),
            "classifier": None if scales is None else Classifier(judging, schedule, 10, shape),
        }
        x_T, drawn = noise(self.record["seed"], self.record["rows"], self.record["shape"])
        self.call = {"x_T": x_T.double(), "noise": drawn.double()}
        if scales is not None:
            self.call["classifier_scale"] = scales

    def __call__(self, dtype: str) -> tuple[Sampler, torch.Tensor]:
        sampler = Sampler(self.model, dtype=dtype, **self.options)
        return sampler, sampler(self.record["y"], **self.call)

    def assert_images(self, got: torch.Tensor, recorded: str, tolerance: float) -> None:
        """In units of the image: unclipped, this network drives images to thousands"""
        expected = torch.tensor(self.record[recorded], dtype=torch.float64).view(got.shape)
        atol = tolerance * max(1.0, expected.abs().max().item())
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=atol)

    @property
    def rounding(self) -> float:
        """What their tables, float32 when gathered, can do to an image

        DDIM carries a row's error on to the image, and has four numbers from a table in each; DDPM forgets it.
        """
        return max(1e-6, 4 * 2**-24 * self.record["rows"] * (self.options["solver"] == "ddim"))


BY_FORMULA = [name for name, record in TRAJECTORIES.items() if "network" not in record["config"]]


@pytest.mark.parametrize("name", BY_FORMULA)
def test_a_trajectory_is_the_published_samplers(name: str) -> None:
    trajectory = Trajectory(name)
    _, images = trajectory("float64")
    # their own arithmetic in double, and as it is
    trajectory.assert_images(images, "float64", 1e-10)
    trajectory.assert_images(images, "tables", trajectory.rounding)
    assert [t.tolist() for t in trajectory.network.t] == [[t] * 2 for t in trajectory.record["t"]]


@pytest.mark.parametrize("name", BY_FORMULA)
def test_a_trajectory_in_float32_errs_by_its_conditioning_alone(name: str) -> None:
    trajectory = Trajectory(name)
    sampler, images = trajectory("float32")
    assert images.dtype == torch.float32
    bound = max(1e-5, 8 * 2**-24 * np.abs(sampler.table.c_x0 * sampler.table.k_x).max())
    trajectory.assert_images(images, "float64", bound)
    trajectory.assert_images(images, "float32", bound + trajectory.rounding)
