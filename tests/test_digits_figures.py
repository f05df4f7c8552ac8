"""The commands behind the digits model's figures, on few images and steps: rows, tables, pictures, no work twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import fastdiff
from benchmarks import digits as figures
from fastdiff.model import UNet, UNetConfig

FEW = ["--images", "20", "--seeds", "0", "1", "--dtype", "float32"]


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A small network with a learned variance, of four times"""
    torch.manual_seed(0)
    config = UNetConfig(
        **{"image_size": 16, "in_channels": 1, "out_channels": 2, "channels": 8, "channel_mult": (1,), "num_blocks": 1},
        **{"attention_resolutions": (), "num_heads": 1, "head_channels": None, "num_labels": 11, "groups": 4},
    )
    schedule = fastdiff.Schedule.named("cosine", 4)
    model = fastdiff.DiffusionModel(UNet(config), schedule, variance="learned_range")
    return str(fastdiff.save(model, tmp_path / "model"))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "SAMPLERS", {"A": {"solver": "ddim", "steps": 2}, "B": {"solver": "ddpm", "steps": 2}})
    monkeypatch.setattr(figures, "WEIGHTS", (0.0, 1.5))
    monkeypatch.setattr(figures, "SCALES", (2.0,))
    monkeypatch.setattr(figures, "CHAINS", (4, 2))
    monkeypatch.setattr(figures, "TIMES", (0, 300))


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for file in folder.glob("*.jsonl") for line in file.read_text().splitlines()]


@pytest.mark.slow
def test_the_tradeoff_is_drawn_of_both_kinds_of_guidance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["tradeoff", *FEW, "--out", str(tmp_path / "rows")]
    figures.main([*arguments, "--plot", str(tmp_path / "a.png")])
    printed = capsys.readouterr().out
    assert printed.count("| 1.5 |") == 2 and printed.count("| 0, classifier_scale 2 |") == 2
    assert Image.open(tmp_path / "a.png").size == (900, 700)
    found = [row for row in rows(tmp_path / "rows") if row["kind"] == "evaluation"]
    # two samplers of three strengths and two seeds
    assert len(found) == 12 and sum(row.get("classifier_scale", 0) == 2 for row in found) == 4
    assert len({(row["solver"], row["sampler_seed"]) for row in found}) == 12
    figures.main(arguments)
    assert capsys.readouterr().out == printed.replace(f"plot    {tmp_path / 'a.png'}\n", "")
    assert len(rows(tmp_path / "rows")) == 13


def test_the_variances_share_one_network(tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["variances", "--model", model, *FEW, "--out", str(tmp_path / "rows")]
    figures.main(arguments)
    printed = capsys.readouterr().out
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines()]
    names = [(f"DDPM-{n}", v) for n in (4, 2) for v in ("fixed_small", "fixed_large", "learned_range")]
    assert [tuple(line[:2]) for line in lines[2:]] == [*names, ("DDIM-2", "none")]
    bits = [float(line[5].split()[0]) for line in lines[2:8]]
    assert len(set(bits)) == 6
    found = [row for row in rows(tmp_path / "rows") if row["kind"] == "evaluation"]
    assert len({row["frechet"] for row in found}) == len(found) == 2 * 7


def test_variances_of_a_model_without_a_learned_one_are_refused_first(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--model must have a learned variance, and that of digits is 'fixed_small'"):
        figures.main(["variances", *FEW, "--out", str(tmp_path / "rows")])
    assert not (tmp_path / "rows").exists()


def test_a_picture_that_cannot_be_is_refused_first(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        figures.main(["tradeoff", *FEW, "--out", str(tmp_path / "rows"), "--plot", str(tmp_path / "nowhere" / "a.png")])
    assert not (tmp_path / "rows").exists()


def test_the_classifier_is_measured_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["classifier", "--out", str(tmp_path / "rows")]
    figures.main(arguments)
    printed = capsys.readouterr().out
    (row,) = rows(tmp_path / "rows")
    assert row["images"] == 300 and row["accuracy"][0] > 0.95 and row["cross_entropy"][0] < row["cross_entropy"][1]
    assert f"| 300 | {row['sigma_edm'][1]:.2f} | {100 * row['accuracy'][1]:.1f} % |" in printed
    figures.main(arguments)
    assert capsys.readouterr().out == printed and len(rows(tmp_path / "rows")) == 1
