"""A small checkpoint, and a folder of its own for every test of the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cli_cases import NETWORK

import fastdiff
from fastdiff.model import UNet


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint of a network that heeds its label and is small enough to run in no time."""
    torch.manual_seed(0)
    network = UNet(NETWORK)
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    (fastdiff.save(fastdiff.DiffusionModel(network, "linear", name="tiny"), folder) / "README.md").write_text("a card")
    return str(folder)


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
