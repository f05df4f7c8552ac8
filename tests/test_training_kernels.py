"""The same training through Triton's kernels and through their references: losses that agree step by step."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from kernels.places import NO_INTERPRETER
from torch import nn
from training_cases import config, small_data, unet_model

from fastdiff import DiffusionModel
from fastdiff.model.blocks import AdaGroupNorm, Features, ResBlock
from fastdiff.model.embeddings import timestep_embedding
from fastdiff.schedule import Schedule
from fastdiff.training import Run, TrainConfig

CHANNELS, STEPS = 8, 20
OPS = ("ada_group_norm", "residual", "q_sample")


class TwoBlocks(nn.Module):
    """A ResBlock that keeps its width and one that takes a skip of the input, as the U-Net has them"""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, CHANNELS, 3, padding=1)
        self.blocks = nn.ModuleList(
            [ResBlock(CHANNELS, CHANNELS, groups=4), ResBlock(2 * CHANNELS, CHANNELS, groups=4)]
        )
        self.mod = nn.Linear(CHANNELS, 4 * CHANNELS)
        self.label = nn.Embedding(11, CHANNELS)
        self.norm = AdaGroupNorm(CHANNELS, 4)
        self.last = nn.Conv2d(CHANNELS, 1, 3, padding=1)

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        mods = self.mod(timestep_embedding(t, CHANNELS) + self.label(y)).chunk(2, 1)
        skip = Features(self.first(x).contiguous(memory_format=torch.channels_last))
        h = self.blocks[0](skip, mods[0])
        h = self.blocks[1](h, mods[1], skip)
        return self.last(self.norm(h))


def losses(device: str) -> tuple[list[float], list[float]]:
    torch.manual_seed(0)
    model = DiffusionModel(TwoBlocks().to(device), "linear", image_shape=(1, 8, 8))
    config = TrainConfig(iterations=STEPS, batch_size=4, lr=3e-3, warmup=0, decay="constant", seed=1)
    run = Run(model, small_data(), config)
    steps = [run.advance() for _ in range(STEPS)]
    return [step.loss for step in steps], [step.grad_norm for step in steps]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Sends every op to its kernels, wherever the tensor lies, and tells which were asked"""
    asked: list[str] = []
    for op in OPS:
        module = sys.modules[f"fastdiff_kernels.{op}"]

        def uses_triton(impl: str, x: torch.Tensor, *dtypes: object, op: str = op) -> bool:
            asked.append(op)
            return True

        monkeypatch.setattr(module, "uses_triton", uses_triton)
    yield asked


@pytest.mark.slow
@pytest.mark.timeout(280)
@pytest.mark.parametrize(
    "place", [pytest.param("cpu", marks=NO_INTERPRETER), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def test_kernels_and_references_train_alike(place: str, request: pytest.FixtureRequest) -> None:
    """Float32, the same seed: 20 losses within 1e-5 of one another, or 1e-3 where the convolutions are a GPU's, too"""
    bound = {"cpu": 1e-5, "cuda": 1e-3}[place]
    references = losses("cpu")
    asked = request.getfixturevalue("launches")
    with torch.backends.cudnn.flags(allow_tf32=False):
        kernels = losses(place)
    assert set(asked) == set(OPS)
    assert kernels[0] == pytest.approx(references[0], rel=bound)
    assert kernels[1] == pytest.approx(references[1], rel=bound)
    # they went somewhere: a run that stands still would agree with anything
    assert sum(references[0][-5:]) < 0.9 * sum(references[0][:5])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_run_takes_every_option_on_its_device(device: str, precision: str, tmp_path: Path) -> None:
    """Steps, skipped ones among them, and a state that another run goes on from"""

    def fresh() -> Run:
        model = unet_model(out_channels=2, channel_mult=[1, 2], attention_resolutions=[4], gradient_checkpointing=True)
        model.network.to(device)
        model.schedule = Schedule.named("cosine", 4)
        options = {"loss": "hybrid", "min_snr_gamma": 5.0, "timesteps": "loss_second_moment", "accumulate": 2}
        return Run(model, small_data(), config(batch_size=20, precision=precision, ema_decay=(0.9, 0.5), **options))

    run = fresh()
    for _ in range(6):
        assert not run.advance().skipped
    run.save(tmp_path / "state.safetensors")
    other = fresh()
    other.load(tmp_path / "state.safetensors")
    spoiled = other.network.register_forward_hook(lambda module, given, output: output * math.nan)
    before = {name: tensor.clone() for name, tensor in other._tensors()}
    assert other.advance().skipped
    assert all(torch.equal(before[name], tensor) for name, tensor in other._tensors())
    spoiled.remove()
    other.load(tmp_path / "state.safetensors")
    steps = run.advance(), other.advance()
    assert steps[0].loss == pytest.approx(steps[1].loss, rel=1e-5 if device == "cpu" else 1e-3)
