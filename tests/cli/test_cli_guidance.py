"""fastdiff sample with a classifier and with pictures to enlarge: what it passes on, records and refuses"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_cases import FAST
from PIL import Image
from reference.networks import judging, mixing

import fastdiff
from fastdiff import Classifier, DiffusionModel, checkpoint, cli, images

FACTS = {"sha256": "c" * 64, "config": {"name": "judge"}}


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Classifier:
    """What the name "judge" stands for"""
    classifier, info = Classifier(judging, "linear"), checkpoint.info
    folder = Path("/where/it/is")

    def load_classifier(src: object, **options: object) -> Classifier:
        assert src == "judge"
        return classifier

    monkeypatch.setattr(checkpoint, "BUNDLED_CLASSIFIERS", {"judge": folder}, raising=False)
    monkeypatch.setattr(checkpoint, "load_classifier", load_classifier, raising=False)
    monkeypatch.setattr(checkpoint, "info", lambda src: FACTS if src == folder else info(src))
    return classifier


OPTIONS = {
    "defaults": (["--classifier", "judge"], {}, "score"),
    "scale": (["--classifier", "judge", "--classifier-scale", "2.5", "--w", "0"], {"classifier_scale": 2.5}, "score"),
    "mean": (["--classifier", "judge", "--solver", "ddpm"], {"solver": "ddpm"}, "mean"),
    "form": (
        ["--classifier", "judge", "--solver", "ddpm", "--classifier-form", "score"],
        {"solver": "ddpm", "classifier_form": "score"},
        "score",
    ),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_a_classifier_guides_and_is_recorded(tiny: str, judge: Classifier, case: str) -> None:
    arguments, options, form = OPTIONS[case]
    assert cli.main(["sample", tiny, *FAST, *arguments, "--dtype", "float64", "-q", "-o", "a.npz"]) == 0
    facts = images.read_metadata("a.npz")
    assert (facts["classifier"], facts["classifier_sha256"]) == ("judge", "c" * 64)
    assert (facts["classifier_scale"], facts["classifier_form"]) == (options.get("classifier_scale", 1.0), form)
    call = {name: facts[name] for name in ("labels", "w", "seed", "steps", "dtype")}
    drawn = images.to_uint8(fastdiff.sample(tiny, **call, **options, classifier=judge)).numpy()
    unguided = images.to_uint8(fastdiff.sample(tiny, **call, solver=facts["solver"])).numpy()
    with np.load("a.npz") as arrays:
        assert np.abs(arrays["arr_0"].astype(int) - drawn).max() <= 1
        assert np.abs(arrays["arr_0"].astype(int) - unguided).max() > 1


def test_without_one_nothing_is_recorded(tiny: str) -> None:
    assert cli.main(["sample", tiny, *FAST, "-q", "-o", "a.npz"]) == 0
    assert not [key for key in images.read_metadata("a.npz") if "classifier" in key or "low_res" in key]


def enlarging(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None, low_res: torch.Tensor) -> torch.Tensor:
    return mixing(x, t, y) - torch.nn.functional.interpolate(low_res, scale_factor=2.0)


enlarging.extra_shapes = {"low_res": (1, 8, 8)}  # type: ignore[attr-defined]


@pytest.fixture
def upsampler(monkeypatch: pytest.MonkeyPatch, tiny: str) -> str:
    """A checkpoint whose network enlarges"""
    model = DiffusionModel(enlarging, "linear", name="upsampler")
    monkeypatch.setattr("fastdiff.sampler.load", lambda src, **options: model)
    return tiny


def pictures(n: int, **wrong: Any) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, 8, 8, 1)).astype(wrong.get("dtype", np.uint8))


@pytest.mark.parametrize("batch_size", ["4", "3"])
def test_pictures_are_enlarged_in_order(upsampler: str, batch_size: str) -> None:
    low = pictures(4)
    np.savez("low.npz", arr_0=low)
    arguments = [*FAST, "--dtype", "float64", "--low-res", "low.npz", "--batch-size", batch_size]
    assert cli.main(["sample", upsampler, *arguments, "-q", "-o", "a.npz"]) == 0
    facts = images.read_metadata("a.npz")
    assert facts["low_res"] == "low.npz"
    call = {name: facts[name] for name in ("labels", "w", "seed", "steps", "dtype")}
    model = DiffusionModel(enlarging, "linear")
    low_res = torch.from_numpy(low).permute(0, 3, 1, 2) / 127.5 - 1
    drawn = images.to_uint8(fastdiff.sample(model, **call, extra={"low_res": low_res})).numpy()
    with np.load("a.npz") as arrays:
        assert np.abs(arrays["arr_0"].astype(int) - drawn).max() <= 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "enlarges pictures: give 4 of 8x8 by --low-res FILE.npz"),
        (["--low-res", "three.npz"], "--low-res three.npz must hold 4 pictures, one an image drawn, got 3"),
        (["--low-res", "floats.npz"], "floats.npz: arr_0 must be uint8"),
        (["--low-res", "missing.npz"], "missing.npz: No such file"),
        (["--low-res", "three.npz", "--labels", "3", "-n", "3", "--classifier-scale", "2"], "needs a --classifier"),
        (["--low-res", "three.npz", "--labels", "3", "-n", "3", "--classifier-form", "mean"], "needs a classifier"),
    ],
)
def test_what_is_missing_is_one_sentence(
    upsampler: str, arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez("three.npz", arr_0=pictures(3))
    np.savez("floats.npz", arr_0=pictures(4, dtype=np.float32))
    assert cli.main(["sample", upsampler, *FAST, *arguments, "-o", "a.npz"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastdiff: ") and error.count("\n") == 1 and sentence in error
    assert not Path("a.npz").exists()


def test_pictures_of_another_size_are_refused(upsampler: str, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez("wide.npz", arr_0=pictures(8).reshape(4, 8, 16, 1))
    assert cli.main(["sample", upsampler, *FAST, "--low-res", "wide.npz", "-o", "a.npz"]) == 2
    told = capsys.readouterr().err
    assert "--low-res wide.npz must hold pictures (channels, height, width) of (1, 8, 8), got (1, 8, 16)" in told


def test_pictures_are_refused_by_a_model_that_enlarges_none(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez("low.npz", arr_0=pictures(4))
    assert cli.main(["sample", tiny, *FAST, "--low-res", "low.npz", "-o", "a.npz"]) == 2
    assert "enlarges no pictures; leave --low-res out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("labels", "shape"),
    [([7, 7, 7, 7], (1, 4)), ([2, 2, 0, 0], (2, 2)), ([5, 1, 1, 0], (4, 1)), ([3], (1, 1))],
    ids=["one", "two", "mixed", "single"],
)
def test_pictures_bring_their_labels(upsampler: str, labels: list[int], shape: tuple[int, int]) -> None:
    low = pictures(len(labels))
    np.savez("low.npz", arr_0=low, arr_1=np.array(labels))
    fast = ["--steps", "2", "--seed", "1", "-q"]
    for out in ("a.npz", "a.png", "a/"):
        assert cli.main(["sample", upsampler, *fast, "--low-res", "low.npz", "-o", out]) == 0
    facts = images.read_metadata("a.npz")
    assert facts["labels"] == labels
    assert facts["low_res_sha256"] == hashlib.sha256(Path("low.npz").read_bytes()).hexdigest()
    rows, columns = shape
    blank = np.zeros((rows * columns, 16, 16, 1), np.uint8)
    assert Image.open("a.png").size == images.grid(torch.from_numpy(blank), rows, columns, ["7"] * rows).size
    singles = [images.read_metadata(path) for path in sorted(Path("a").glob("*.png"))]
    assert [(single["low_res_row"], single["labels"]) for single in singles] == [
        (row, [label]) for row, label in enumerate(labels)
    ]
    # who says otherwise is heeded
    other = ["--labels", "4", "-n", str(len(labels)), "-o", "b.npz"]
    assert cli.main(["sample", upsampler, *fast, "--low-res", "low.npz", *other]) == 0
    assert images.read_metadata("b.npz")["labels"] == [4] * len(labels)
