"""fastdiff train and fastdiff plot: what a recipe makes, and what they refuse."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_cases import ENVIRONMENT, FAST, recipe
from PIL import Image

import fastdiff
from fastdiff import Classifier, checkpoint, cli, images
from fastdiff.checkpoint import BUNDLED
from fastdiff.cli import train as train_cli
from fastdiff.training import TrainConfig, read_log, read_recipe


def test_train_makes_a_model_that_sample_takes(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", "--recipe", str(recipe()), "--out", "run"]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr()
    assert "fastdiff sample run/model" in printed.out and "train" in printed.err
    assert sorted(os.listdir("run")) == ["log.jsonl", "model", "samples-2.png", "samples-3.png", "state.safetensors"]
    facts = fastdiff.checkpoint.info("run/model")
    assert (facts["config"]["name"], facts["storage"]) == ("small", ["float16"])
    assert facts["config"]["provenance"]["training"]["iterations"] == 3
    assert images.read_metadata("run/samples-3.png")["seed"] == 5
    assert cli.main(["sample", "run/model", *FAST, "-q"]) == 0

    assert cli.main(arguments) == 2
    assert "not empty; --resume" in capsys.readouterr().err
    assert cli.main([*arguments, "--resume", "--iterations", "4"]) == 2
    assert "iterations must be what it was" in capsys.readouterr().err
    assert cli.main([*arguments, "--resume", "-q"]) == 0
    assert capsys.readouterr().out == "run/model\n"
    assert fastdiff.checkpoint.info("run/model")["sha256"] == facts["sha256"]


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX")
def test_a_killed_training_command_leaves_a_whole_model_and_goes_on() -> None:
    """The real command, killed at random moments; taken up again, it ends with the weights of one never killed."""
    training = {"iterations": 15, "batch_size": 4, "seed": 5, "log_every": 1}
    path, dice = recipe(training={**training, "save_every": 1}), random.Random(0)
    command = [sys.executable, "-m", "fastdiff", "train", "--recipe", str(path), "--out", "run", "-q"]
    log, steps = Path("run/log.jsonl"), []
    for _ in range(2):
        resume = ["--resume"] if Path("run/state.safetensors").exists() else []
        with subprocess.Popen([*command, *resume], env=ENVIRONMENT) as run:
            began = log.read_text() if log.exists() else ""
            while run.poll() is None and not (Path("run/model/config.json").exists() and log.read_text() != began):
                time.sleep(0.01)
            time.sleep(dice.uniform(0, 0.3))
            run.kill()
        assert run.returncode == -signal.SIGKILL
        steps.append(fastdiff.load("run/model").provenance["training"]["iterations"])
    assert 0 < steps[0] <= steps[1] < 15
    subprocess.run([*command, "--resume"], env=ENVIRONMENT, check=True, timeout=100)
    whole = recipe(training={**training, "save_every": 0})
    subprocess.run([*command[:5], str(whole), "--out", "whole", "-q"], env=ENVIRONMENT, check=True, timeout=100)
    assert fastdiff.checkpoint.info("run/model")["sha256"] == fastdiff.checkpoint.info("whole/model")["sha256"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"training": {"iterations": 3, "momentum": 0.9}}, "unknown ['momentum']"),
        ({"training": {}}, "training must have iterations"),
        ({"training": 3}, "unknown ['training']"),
        ({"training": {"iterations": 0}}, "recipe.json: training.iterations must be at least 1"),
        ({"training": {"iterations": 1, "ema_decay": [[1]]}}, "recipe.json: training.ema_decay"),
        ({"data": "mnist"}, "data must be"),
        ({"data": 7}, "data must be a string"),
        ({"data": "b.npz"}, "b.npz"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"storage_dtype": "int8"}, "recipe.json: storage_dtype must be one of"),
        ({"network": {"type": "mlp"}}, "mlp"),
        ({"extra": 1}, "'extra'"),
        ({"network": "left out"}, "must be an object with the keys"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_a_recipe_that_cannot_be_is_refused_before_training(
    changes: dict, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", "--recipe", str(recipe(**changes)), "--out", "run"]) == 2
    assert sentence in capsys.readouterr().err
    assert not Path("run").exists()


@pytest.mark.parametrize("text", [None, "{", "[]", "\xff"], ids=["missing", "cut", "list", "latin-1"])
def test_a_recipe_that_is_none_is_refused(text: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    if text is not None:
        Path("bad.json").write_text(text, encoding="latin-1")
    assert cli.main(["train", "--recipe", "bad.json", "--out", "run"]) == 2
    assert "recipe bad.json" in capsys.readouterr().err


def test_training_that_diverges_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    training = {"iterations": 9, "batch_size": 4, "lr": 1e30, "warmup": 0, "grad_clip": 1e30, "max_skipped": 2}
    path = recipe(training=training)
    assert cli.main(["train", "--recipe", str(path), "--out", "run"]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert "must be finite, and 2 updates were skipped before (max_skipped=2)" in told


def test_the_bundled_recipe_is_the_default_and_whole() -> None:
    assert cli.Train(out="run").recipe == str(BUNDLED["digits"] / "recipe.json")
    sections = json.loads(Path(cli.Train(out="run").recipe).read_text())
    assert TrainConfig(**sections["training"]).iterations > 0
    assert read_recipe(cli.Train(out="run").recipe).sections["name"] == "digits"


ENCODER = {
    **{
        "type": "encoder",
        "image_size": 16,
        "in_channels": 1,
        "out_channels": 10,
        "channels": 8,
        "channel_mult": [1, 2],
    },
    **{"num_blocks": 1, "attention_resolutions": [], "num_heads": 1, "head_channels": None, "dropout": 0.0},
    **{"resblock_updown": True, "conv_resample": True, "scale_shift": True, "groups": 4},
    **{"gradient_checkpointing": False, "pool": "adaptive"},
}
NOISY = {"schedule": {"name": "linear", "num_train_timesteps": 1000}, "num_classes": 10, "image_shape": [1, 16, 16]}


def test_train_makes_a_classifier_that_sample_takes(capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(diffusion="left out", classifier=NOISY, network=ENCODER)
    assert cli.main(["train", "--recipe", str(path), "--out", "run"]) == 0
    assert "fastdiff sample --classifier run/model" in capsys.readouterr().out
    # there is nothing to draw
    assert sorted(os.listdir("run")) == ["log.jsonl", "model", "state.safetensors"]
    assert isinstance(checkpoint.load_classifier("run/model"), Classifier)
    assert "accuracy" in read_log(Path("run/log.jsonl"))[-1]
    assert cli.main(["sample", *FAST, "--classifier", "run/model", "-q"]) == 0
    assert images.read_metadata("samples.png")["classifier"] == "small"


def test_train_makes_an_upsampler_whose_grids_enlarge_the_data(capsys: pytest.CaptureFixture[str]) -> None:
    network = json.loads(recipe().read_text())["network"]
    network |= {"type": "super_resolution", "low_res_size": 8, "low_res_channels": 1}
    assert cli.main(["train", "--recipe", str(recipe(network=network)), "--out", "a run"]) == 0
    assert capsys.readouterr().out.endswith("fastdiff sample 'a run/model' --low-res FILE.npz\n")
    assert Image.open("a run/samples-3.png").width > 100
    model = fastdiff.load("a run/model")
    assert model.network.extra_shapes == {"low_res": (1, 8, 8)}


def test_grids_of_an_upsampler_enlarge_images_of_their_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    data = torch.tensor([3, 1, 0, 1, 3, 3])
    assert train_cli._images_of([0, 0, 1, 1, 1, 3, 3, 2, 2], data, 9) == [2, 2, 1, 3, 1, 0, 4, 0, 1]
    assert train_cli._images_of(None, data, 8) == [0, 1, 2, 3, 4, 5, 0, 1]
    seen = []

    class Recording:
        timesteps = (0,)

        def __call__(self, labels: list[int], w: float, *, extra: dict[str, torch.Tensor], **options: Any) -> Any:
            seen.append((labels, extra["low_res"].tolist()))
            return torch.zeros(len(labels), 1, 16, 16)

    monkeypatch.setattr(train_cli, "_grid_sampler", lambda model: Recording())
    model = checkpoint.fresh(read_recipe(recipe()).sections)
    labels = torch.arange(9, -1, -1)
    train_cli._sample_grid(model, Path("a.png"), TrainConfig(1), labels, {"low_res": labels})
    # one image a class in these data, shown twice
    assert seen == [([label for label in range(10) for _ in range(2)],) * 2]


@pytest.mark.parametrize(("p_uncond", "w"), [(0.1, 1.5), (0.0, 0.0)])
def test_grids_are_guided_where_training_shows_the_null_label(p_uncond: float, w: float) -> None:
    training = {"iterations": 1, "batch_size": 4, "p_uncond": p_uncond}
    assert cli.main(["train", "--recipe", str(recipe(training=training)), "--out", "run", "-q"]) == 0
    assert images.read_metadata("run/samples-1.png")["w"] == w


def test_plot_draws_the_losses_of_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--recipe", str(recipe()), "--out", "run", "-q"]) == 0
    assert cli.main(["plot", "run"]) == 0
    assert capsys.readouterr().out.endswith("loss.png\n")
    assert Image.open("loss.png").size == (800, 450)
    assert cli.main(["plot", "run"]) == 2
    assert "--force" in capsys.readouterr().err
    assert cli.main(["plot", "run", "run", "--force"]) == 0
    capsys.readouterr()
    assert cli.main(["plot", "run", "-o", "loss.npz"]) == 2
    assert "--out must end in .png, got loss.npz" in capsys.readouterr().err
    assert cli.main(["plot", "nowhere", "-o", "b.png"]) == 2
    assert "run nowhere has no line in its log.jsonl" in capsys.readouterr().err
    assert not Path("b.png").exists()


@pytest.mark.parametrize("left", ["samples-2.png", "tensorboard", "log.jsonl", ".tmp-3-state"])
def test_what_a_run_leaves_before_its_first_save_is_no_obstacle(left: str) -> None:
    Path("run").mkdir()
    (Path("run") / left).mkdir() if left == "tensorboard" else (Path("run") / left).write_text("")
    assert cli.main(["train", "--recipe", str(recipe()), "--out", "run", "-q"]) == 0


def test_further_averages_are_stored_as_the_first() -> None:
    training = {"iterations": 2, "batch_size": 4, "ema_decay": [0.9, 0.5]}
    assert cli.main(["train", "--recipe", str(recipe(training=training)), "--out", "run", "-q"]) == 0
    assert [checkpoint.info(f"run/{name}")["storage"] for name in ("model", "model-0.5")] == [["float16"]] * 2


def test_what_cannot_be_drawn_is_said_before_training(capsys: pytest.CaptureFixture[str]) -> None:
    diffusion = json.loads(recipe().read_text())["diffusion"]
    # no signal is left at the last time, where eps says nothing
    diffusion["schedule"] = {"betas": [0.1, 0.5, 1.0]}
    assert cli.main(["train", "--recipe", str(recipe(diffusion=diffusion)), "--out", "run", "-q"]) == 2
    assert "alpha = 0" in capsys.readouterr().err
    assert not Path("run").exists()


def test_doctor_finds_an_upsampler_sound(capsys: pytest.CaptureFixture[str]) -> None:
    network = json.loads(recipe().read_text())["network"]
    network |= {"type": "super_resolution", "low_res_size": 8, "low_res_channels": 1}
    model = checkpoint.fresh(read_recipe(recipe(network=network)).sections)
    fastdiff.save(model, "up")
    assert cli.main(["doctor", "up"]) == 0
    assert cli.main(["evaluate", "up", "--likelihood", "--images", "2", "-q"]) == 2
    assert "model must take images alone, its network takes ['low_res']" in capsys.readouterr().err
    assert cli.main(["evaluate", "up", "--images", "20", "-q"]) == 2
    assert "model must take images alone, its network takes ['low_res']" in capsys.readouterr().err
