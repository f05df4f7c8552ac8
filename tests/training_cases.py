"""Small models and data for tests of training."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from fastdiff.diffusion_model import DiffusionModel
from fastdiff.model.unet import UNet, UNetConfig
from fastdiff.training import Dataset, TrainConfig, digits

TINY = UNetConfig(
    image_size=8,
    in_channels=1,
    out_channels=1,
    channels=8,
    channel_mult=(1,),
    num_blocks=1,
    attention_resolutions=(),
    head_channels=8,
    groups=4,
    dropout=0.2,
    num_labels=11,
)


class ConvNet(nn.Module):
    """The smallest network with the sampler's signature; keeps the labels that it was shown."""

    def __init__(self, out_channels: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 16, 3, padding=1)
        self.time = nn.Linear(1, 16)
        self.label = nn.Embedding(11, 16)
        self.last = nn.Conv2d(16, out_channels, 3, padding=1)
        self.seen: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.seen.append(y.clone())
        h = self.first(x) + (self.time(t[:, None] / 1000) + self.label(y))[:, :, None, None]
        return self.last(torch.nn.functional.silu(h))


def conv_model(prediction: str = "eps", **options: Any) -> DiffusionModel:
    torch.manual_seed(0)
    channels = 2 if options.get("variance") == "learned_range" else 1
    return DiffusionModel(ConvNet(channels), "cosine", prediction, image_shape=(1, 8, 8), **options)


def unet_model(**fields: Any) -> DiffusionModel:
    torch.manual_seed(0)
    network = UNet(UNetConfig.from_dict({**TINY.to_dict(), **fields}))
    variance = "learned_range" if network.config.out_channels == 2 else "fixed_small"
    return DiffusionModel(network, "cosine", "v", variance, image_shape=(1, 8, 8), name="tiny")


def small_data(n: int = 20) -> Dataset:
    whole = digits(size=8)
    return Dataset(whole.images[:n], whole.labels[:n], 10, "small", "digits", "CC BY 4.0")


def config(**fields: Any) -> TrainConfig:
    return TrainConfig(**{"iterations": 6, "batch_size": 8, "warmup": 2, "save_every": 3, "log_every": 2, **fields})


def weights(model: Any) -> dict[str, torch.Tensor]:
    assert isinstance(model.network, nn.Module)
    return model.network.state_dict()


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different


def stop_at(step: int) -> Any:
    def callback(at: int, model: object) -> None:
        if at == step:
            raise KeyboardInterrupt

    return callback


def poisoned(steps: set[int], what: str = "loss") -> tuple[DiffusionModel, dict[str, int]]:
    """A model whose loss or gradient is NaN or infinite at some steps, counted from 0"""
    model, calls = unet_model(dropout=0.0), {"n": -1}

    def spoil(module: nn.Module, given: Any, output: torch.Tensor) -> torch.Tensor:
        calls["n"] += 1
        if calls["n"] not in steps:
            return output
        if what == "gradient":
            output.register_hook(lambda gradient: gradient * math.inf)
            return output
        return output * math.nan

    assert isinstance(model.network, nn.Module)
    model.network.register_forward_hook(spoil)
    return model, calls
