"""fastdiff convert, and sampling what other people saved"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_convert_guided_diffusion import state_of

import fastdiff
from fastdiff import checkpoint, cli, images
from fastdiff.cli.convert import FLAGS as FLAG_NAMES
from fastdiff.convert.diffusers_folder import save_folder
from fastdiff.convert.guided_diffusion import Flags
from fastdiff.convert.state_files import read_state

NAME = "adm, new order"
FLAGS = [
    *("--image-size", "16", "--head-channels", "32", "--attention-order", "new", "--schedule", "cosine"),
    *("--num-train-timesteps", "1000", "--dtype", "float32"),
]


@pytest.fixture
def file() -> Path:
    torch.save(state_of(NAME), "theirs.pt")
    return Path("theirs.pt")


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["convert", *arguments]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert cli.main(list(arguments)) == 2
    return capsys.readouterr().err


def test_a_file_becomes_a_checkpoint_and_the_same_file_again(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, "theirs.pt", "ours", *FLAGS)
    assert "attention_order new" in out and "UNet, " in out and out.endswith("ours\n")
    assert "published       no, taken as told" in out
    model = fastdiff.load("ours")
    assert model.name == "theirs" and model.provenance["file"] == "theirs.pt"
    printed(capsys, "ours", "back.pt")
    printed(capsys, "ours", "back.safetensors")
    for back in ("back.pt", "back.safetensors"):
        state, _ = read_state(back)
        assert state.keys() == state_of(NAME).keys()
        assert all(torch.equal(state[key], value) for key, value in state_of(NAME).items())
    # in the other order it is another file of the same network
    printed(capsys, "ours", "legacy.pt", "--attention-order", "legacy")
    printed(capsys, "legacy.pt", "again", *[flag.replace("new", "legacy") for flag in FLAGS])
    other, _ = read_state("legacy.pt")
    assert not torch.equal(other["middle_block.1.qkv.weight"], state["middle_block.1.qkv.weight"])
    pairs = zip(fastdiff.load("again").parameters(), model.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)


def test_a_checkpoint_keeps_its_weights_whatever_it_computes_in(capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(state_of(NAME), "theirs.pt")
    flags = [flag.replace("float32", "bfloat16") for flag in FLAGS]
    printed(capsys, "theirs.pt", "ours", *flags)
    assert checkpoint.info("ours")["storage"] == ["float32"] and fastdiff.load("ours").dtype == torch.bfloat16
    printed(capsys, "ours", "back.pt")
    assert all(torch.equal(read_state("back.pt")[0][key], value) for key, value in state_of(NAME).items())
    printed(capsys, "theirs.pt", "half", *flags, "--storage-dtype", "float16")
    assert checkpoint.info("half")["storage"] == ["float16"]


@pytest.mark.parametrize(("word", "scale"), [("yes", 0.25), ("no", 1.0)])
def test_rescaled_times(word: str, scale: float, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [flag.replace("1000", "4000") for flag in FLAGS]
    assert "rescale_timesteps (" in refused(capsys, "convert", "theirs.pt", "ours", *flags)
    printed(capsys, "theirs.pt", "ours", *flags, "--rescale-timesteps", word)
    assert fastdiff.load("ours").network.config.time_scale == scale


def test_nan_weights_are_taken_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(state_of(NAME) | {"out.2.bias": torch.full((6,), float("nan"))}, "nan.pt")
    assert "allow_nonfinite" in refused(capsys, "convert", "nan.pt", "ours", *FLAGS)
    printed(capsys, "nan.pt", "ours", *FLAGS, "--allow-nonfinite")
    printed(capsys, "ours", "back.pt", "--allow-nonfinite")
    assert read_state("back.pt")[0]["out.2.bias"].isnan().all()


def test_half_precision_stays_as_it_is(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed(capsys, "theirs.pt", "half", *FLAGS, "--storage-dtype", "float16")
    printed(capsys, "half", "back.pt")
    assert {value.dtype for value in read_state("back.pt")[0].values()} == {torch.float16}


def test_the_flags_are_those_of_the_converter() -> None:
    assert set(FLAG_NAMES) == set(Flags.__annotations__)
    assert {field.name for field in dataclasses.fields(cli.Convert)} >= set(FLAG_NAMES)


def test_classifiers_too(capsys: pytest.CaptureFixture[str]) -> None:
    name = "classifier, attention"
    torch.save(state_of(name), "judge.pt")
    flags = ["--head-channels", "32", "--attention-order", "legacy", *FLAGS[6:]]
    printed(capsys, "judge.pt", "judge", *flags)
    assert fastdiff.load_classifier("judge").num_classes == 11
    printed(capsys, "judge", "back.pt")
    assert all(torch.equal(read_state("back.pt")[0][key], value) for key, value in state_of(name).items())


def test_diffusers_both_ways(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed(capsys, "theirs.pt", "ours", *FLAGS)
    printed(capsys, "ours", "pipeline", "--to", "diffusers")
    assert json.loads(Path("pipeline/model_index.json").read_text())["unet"] == ["diffusers", "UNet2DModel"]
    printed(capsys, "pipeline", "again")
    ours, again = fastdiff.load("ours"), fastdiff.load("again")
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), again.parameters(), strict=True))
    printed(capsys, "pipeline", "back.pt", "--attention-order", "new")
    assert all(torch.equal(read_state("back.pt")[0][key], value) for key, value in state_of(NAME).items())


def test_a_pipeline_in_half_precision_stays_so(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A CPU computes in float32 then, which is not what is written"""
    printed(capsys, "theirs.pt", "ours", *FLAGS, "--storage-dtype", "float16")
    model = fastdiff.load("ours", dtype=torch.float16)
    model.network.half()
    model.solver = {"name": "ddpm", "spacing": "leading:N"}
    save_folder(model, "pipeline")
    assert "dtype           float16" in printed(capsys, "pipeline", "again")
    assert checkpoint.info("again")["storage"] == ["float16"]


def test_a_dit_stays_diffusers_own(capsys: pytest.CaptureFixture[str]) -> None:
    Path("dit").mkdir()
    index = {"transformer": ["diffusers", "DiTTransformer2DModel"], "scheduler": ["diffusers", "DDIMScheduler"]}
    Path("dit/model_index.json").write_text(json.dumps(index))
    text = refused(capsys, "convert", "dit", "ours")
    assert "SRC holds a DiT, which stays diffusers' and cannot be converted" in text and not Path("ours").exists()


def test_what_is_missing_is_told_by_name(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = refused(capsys, "convert", "theirs.pt", "ours", *FLAGS[2:])
    assert "theirs.pt" in text and "image_size (" in text and not Path("ours").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["theirs.pt", "out.pt", *FLAGS], "is guided-diffusion's already"),
        (["digits", "ours"], "is fastdiff's already"),
        (["digits", "ours", "--to", "onnx"], "--to must be one of"),
        (["digits", "out.pt", "--num-heads", "3"], "--num-heads must be left out"),
        (["taken", "out.pt"], "taken"),
        (["digits", "out.pt"], "attention_order must be 'legacy' or 'new'"),
        (["digits", "out.pt", "--attention-order", "new", "--storage-dtype", "float16"], "--storage-dtype must be"),
        (["nowhere", "ours"], "no such file or folder"),
        (["nowhere/weights.pt", "ours"], "no such file or folder"),
        (["theirs.pt", "ours", *FLAGS, "--variance", "small"], "variance"),
        (["theirs.pt", "ours", *FLAGS, "--dtype", "int8"], "dtype"),
        (["theirs.pt", "taken", *FLAGS], "is there already; --force replaces it"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else value,
)
def test_what_cannot_be_is_one_sentence(
    file: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    Path("taken").mkdir()
    Path("taken/config.json").write_text("{}")
    text = refused(capsys, "convert", *arguments)
    assert words in text and len(text.splitlines()) == 1
    assert Path("taken/config.json").read_text() == "{}"
    assert not Path("ours").exists() and not Path("out.pt").exists()


def test_force_replaces(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        printed(capsys, "theirs.pt", "ours", *FLAGS, "--force")
        printed(capsys, "ours", "back.pt", "--force")
    assert "--force" in refused(capsys, "convert", "ours", "back.pt")


def sampled(model: str, *arguments: str) -> tuple[np.ndarray, dict[str, Any]]:
    options = ["--steps", "3", "--labels", "0-2", "-n", "1", "--seed", "5", "-q", "-o", "a.npz", "--force"]
    assert cli.main(["sample", model, *options, *arguments]) == 0
    with np.load("a.npz") as arrays:
        return arrays["arr_0"], images.read_metadata("a.npz")


def test_sample_takes_a_pipeline_as_it_is(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed(capsys, "theirs.pt", "ours", *FLAGS)
    model = fastdiff.load("ours")
    model.solver = {"name": "ddpm", "spacing": "leading:N"}
    fastdiff.save(model, "ours", overwrite=True)
    printed(capsys, "ours", "pipeline", "--to", "diffusers")
    theirs, facts = sampled("pipeline")
    ours, _ = sampled("ours")
    assert np.array_equal(theirs, ours) and facts["solver"] == model.solver and facts["w"] == 0
    plain, facts = sampled("ours", "--solver", "ddpm")
    assert not np.array_equal(plain, ours) and facts["solver"] == "ddpm"
    text = refused(capsys, "sample", "theirs.pt")
    assert "give image_size" in text and "fastdiff convert takes what is missing" in text
    assert "fastdiff convert" in refused(capsys, "info", "theirs.pt")
