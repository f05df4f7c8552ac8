"""Checkpoints of upsamplers and of classifiers: as strict as a U-Net's, and never one taken for the other."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from checkpoints import (
    MODEL,
    SHAPE,
    assert_same_model,
    config_of,
    encoder,
    files,
    judge,
    put_weights,
    refused,
    state,
    unet,
    upsampler,
    weights_of,
)

import fastdiff
from fastdiff import checkpoint, cli
from fastdiff.checkpoint import CheckpointError, fresh, info, kind_of, load, load_classifier, save
from fastdiff.classifier import Classifier
from fastdiff.diffusion_model import DiffusionModel
from fastdiff.model.classifier import POOLS
from fastdiff.schedule import Schedule

JUDGE = judge(name="judge", provenance={"accuracy": 0.9})
UPSAMPLER = DiffusionModel(upsampler(), "linear", image_shape=SHAPE, name="upsampler")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(JUDGE, tmp_path / "judge")


# What is saved comes back


@pytest.mark.parametrize("pool", POOLS)
def test_a_classifier_comes_back_bit_for_bit(pool: str, tmp_path: Path) -> None:
    model = Classifier(encoder(pool=pool), Schedule.named("linear", 50), image_shape=SHAPE, dtype=torch.float32)
    loaded = load_classifier(save(model, tmp_path / "m"))
    assert_same_model(loaded, model)
    assert not any(module.training for module in loaded.network.modules())
    x, t = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0)), torch.tensor([1.5, 40.0])
    logits, expected = loaded.network(x, t), model.network(x, t)
    # another layout adds in another order
    assert (logits - expected).norm() < 1e-5 * expected.norm()
    assert files(save(loaded, tmp_path / "again")) == files(tmp_path / "m")


def test_an_upsampler_comes_back_bit_for_bit(tmp_path: Path) -> None:
    loaded = load(save(UPSAMPLER, tmp_path / "m"))
    assert_same_model(loaded, UPSAMPLER)
    assert loaded.network.extra_shapes == {"low_res": (2, 4, 4)}
    assert files(save(loaded, tmp_path / "again")) == files(tmp_path / "m")


def test_what_config_json_says_of_a_classifier(folder: Path) -> None:
    config = config_of(folder)
    assert list(config) == ["format", "network", "classifier", "dtype", "name", "provenance", "weights"]
    assert config["classifier"] == {
        "schedule": {"name": "cosine", "num_train_timesteps": 1000},
        "num_classes": 10,
        "image_shape": [1, 8, 8],
    }
    assert (config["format"], config["network"]["type"], config["network"]["pool"]) == (1, "encoder", "attention")


@pytest.mark.parametrize(("asked", "stored"), [(torch.bfloat16, None), (torch.float64, None), (None, torch.float16)])
def test_a_classifier_in_another_dtype(asked: torch.dtype | None, stored: torch.dtype | None, tmp_path: Path) -> None:
    loaded = load_classifier(save(JUDGE, tmp_path / "m", storage_dtype=stored), dtype=asked)
    assert {tensor.dtype for tensor in state(loaded).values()} == {asked or stored}
    assert loaded.dtype == asked


def test_loading_a_classifier_leaves_the_random_generator_alone(folder: Path) -> None:
    before = torch.get_rng_state()
    load_classifier(folder)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_bundled_name_is_the_classifiers_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(checkpoint.BUNDLED_CLASSIFIERS, "digits", save(JUDGE, tmp_path / "bundled"))
    monkeypatch.chdir(tmp_path)
    save(judge(2), "digits")
    assert_same_model(load_classifier("digits"), JUDGE)
    assert_same_model(load_classifier("./digits"), judge(2))
    assert isinstance(load("digits"), DiffusionModel)
    with pytest.raises(CheckpointError, match=r"nothing: no such file or folder; bundled names are \['digits'\]"):
        load_classifier("nothing")


def test_a_classifier_is_replaced_only_with_overwrite_and_by_either_kind(folder: Path) -> None:
    before = files(folder)
    with pytest.raises(CheckpointError, match="overwrite=True"):
        save(MODEL, folder)
    assert files(folder) == before
    save(MODEL, folder, overwrite=True)
    assert_same_model(load(folder), MODEL)
    save(JUDGE, folder, overwrite=True)
    assert files(folder) == before


def test_a_new_process_needs_only_the_public_names(folder: Path) -> None:
    code = f"import fastdiff; print(fastdiff.load_classifier({str(folder)!r}))"
    path = f"{Path(fastdiff.__file__).parents[1]}:{Path(fastdiff.__file__).parents[1] / 'kernels'}"
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.stdout.strip() == "Classifier(judge, 1x8x8, classes=10, T=1000)", done.stderr


# One kind for the other


def test_each_function_names_the_other(folder: Path, tmp_path: Path) -> None:
    refused(folder, "config.json", "a classifier's", "fastdiff.load_classifier reads it")
    for name, model in {"unet": MODEL, "upsampler": UPSAMPLER}.items():
        save(model, tmp_path / name)
        refused(tmp_path / name, "config.json", "not a classifier's", "fastdiff.load reads it", by=load_classifier)
    with pytest.raises(CheckpointError, match=r"fastdiff\.load reads it"):
        load_classifier(checkpoint.BUNDLED["digits"])
    with pytest.raises(CheckpointError, match=r"fastdiff\.load_classifier reads it"):
        fastdiff.Sampler(folder, steps=2)


def test_kind_of_tells_every_type() -> None:
    assert [kind_of(model) for model in (MODEL, UPSAMPLER, JUDGE)] == ["unet", "super_resolution", "encoder"]
    swapped = [(DiffusionModel(encoder(), "cosine"), "UNet"), (Classifier(unet(), "cosine"), "EncoderUNet")]
    for model, right in swapped:
        with pytest.raises(TypeError, match=rf"model\.network must be one of .*{right}.* to be saved, got"):
            kind_of(model)
    with pytest.raises(TypeError, match="model must be a DiffusionModel or a Classifier, got EncoderUNet"):
        kind_of(encoder())  # type: ignore[arg-type]


def sections_of(folder: Path) -> dict[str, Any]:
    config = config_of(folder)
    return {key: config[key] for key in config if key not in ("format", "provenance", "weights")}


@pytest.mark.parametrize("model", [JUDGE, UPSAMPLER], ids=["classifier", "upsampler"])
def test_fresh_draws_the_same_weights_for_a_seed(model: DiffusionModel | Classifier, tmp_path: Path) -> None:
    sections, before = sections_of(save(model, tmp_path / "m")), torch.get_rng_state()
    first, again, other = (fresh(sections, seed=seed) for seed in (3, 3, 4))
    assert_same_model(again, first)
    assert type(first) is type(model) and first.network.config == model.network.config
    assert not torch.equal(state(first)["mod.weight"], state(other)["mod.weight"])
    assert torch.equal(torch.get_rng_state(), before)


def test_info_of_a_classifier(folder: Path) -> None:
    facts = info(folder)
    assert facts["parameters"] == sum(p.numel() for p in JUDGE.network.parameters())
    assert facts["config"] == config_of(folder) and facts["storage"] == ["float32"]


def test_the_command_line_shows_a_classifier_and_does_not_sample_it(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["info", str(folder)]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert (lines["name"], lines["kind"], lines["num_classes"]) == ("judge", "classifier", "10")
    assert json.loads(lines["network"])["type"] == "encoder" and "prediction" not in lines
    assert cli.main(["info", str(save(MODEL, tmp_path / "m")), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["kind"], facts["prediction"]) == ("diffusion", "eps")
    assert cli.main(["sample", str(folder), "-q"]) == 2
    said = capsys.readouterr()
    assert re.fullmatch(r"fastdiff: model \S*judge: is a classifier, which draws no images; .*\n", said.err)
    assert not (tmp_path / "samples.png").exists()


# What is refused


@pytest.mark.parametrize("damage", ["truncated", "bit", "trailing", "honest"])
def test_damaged_weights_are_refused(damage: str, folder: Path) -> None:
    weights = weights_of(folder)
    data = weights.read_bytes()
    if damage == "honest":
        put_weights(folder, data[:-4])
        refused(folder, "not a valid safetensors file", by=load_classifier)
        return
    flipped = bytes([*data[:-1], data[-1] ^ 1])
    weights.write_bytes({"truncated": data[:-1], "bit": flipped, "trailing": data + b"\0"}[damage])
    refused(folder, weights.name, by=load_classifier)
    with pytest.raises(CheckpointError, match=weights.name):
        info(folder)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nonfinite_weights_need_a_word(bad: float, tmp_path: Path) -> None:
    model = judge()
    state(model)["out.2.positional_embedding"][3, 2] = bad
    save(model, tmp_path / "m")
    refused(tmp_path / "m", "out.2.positional_embedding", "allow_nonfinite=True", by=load_classifier)
    loaded = load_classifier(tmp_path / "m", allow_nonfinite=True)
    assert state(loaded)["out.2.positional_embedding"][3, 2].item() == pytest.approx(bad, nan_ok=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop("out.2.c_proj.bias"), ["missing keys", "out.2.c_proj.bias"]),
        (lambda tensors: tensors.update({"label_emb.weight": torch.zeros(10, 16)}), ["unknown keys", "label_emb"]),
        (
            lambda tensors: tensors.update({"out.2.positional_embedding": torch.zeros(4, 17)}),
            ["wrong shapes", "out.2.positional_embedding [4, 17] instead of [4, 65]"],
        ),
    ],
    ids=["missing", "extra", "mis-shaped"],
)
def test_every_key_and_shape_must_be_the_networks(
    change: Callable[[dict[str, torch.Tensor]], Any], words: list[str], folder: Path
) -> None:
    tensors = safetensors.torch.load_file(weights_of(folder))
    change(tensors)
    put_weights(folder, safetensors.torch.save(tensors))
    refused(folder, *words, by=load_classifier)


def altered(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Sets a.b.c, or takes it away where value is ..."""

    def change(config: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for key in parents:
            config = config[key]
        if value is ...:
            del config[last]
        else:
            config[last] = value

    return change


OF_A_CLASSIFIER = {
    "unknown classifier key": ("classifier.prediction", "eps", "prediction"),
    "missing classifier key": ("classifier.schedule", ..., "schedule"),
    "classifier a list": ("classifier", [], "classifier must be an object"),
    "no section": ("classifier", ..., "diffusion"),
    "both sections": ("diffusion", {}, "unknown [diffusion]"),
    "unknown network key": ("network.num_labels", 11, "unknown keys ['num_labels']"),
    "missing network key": ("network.pool", ..., "lacks keys ['pool']"),
    "pool": ("network.pool", "mean", "pool must be one of"),
    "pool of other weights": ("network.pool", "adaptive", "unknown keys"),
    "a U-Net's type": ("network.type", "unet", "network.type must be one of ['encoder']"),
    "type a list": ("network.type", ["encoder"], "network.type"),
    "more classes than logits": ("classifier.num_classes", 11, "out_channels=11"),
    "one class": ("classifier.num_classes", 1, "num_classes must be an integer of at least 2"),
    "num_classes null": ("classifier.num_classes", None, "num_classes"),
    "channels": ("classifier.image_shape", [3, 8, 8], "in_channels=3"),
    "another size": ("classifier.image_shape", [1, 16, 16], "sides of 8"),
    "not square": ("classifier.image_shape", [1, 8, 4], "sides of 8"),
    "schedule unknown": ("classifier.schedule.name", "warp", "warp"),
    "too many blocks to build": ("network.num_blocks", 10**9, "num_blocks"),
    "another image_size": ("network.image_size", 2**40, "sides of"),
}


@pytest.mark.parametrize("fault", OF_A_CLASSIFIER)
def test_a_config_that_is_not_exactly_right_is_refused(fault: str, folder: Path) -> None:
    path, value, word = OF_A_CLASSIFIER[fault]
    config = config_of(folder)
    altered(path, value)(config)
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, word, by=load_classifier)


OF_AN_UPSAMPLER = {
    "an encoder's type": ("network.type", "encoder", "['super_resolution', 'unet']"),
    "a U-Net's type": ("network.type", "unet", "unknown keys ['low_res_channels', 'low_res_size']"),
    "missing low_res_size": ("network.low_res_size", ..., "lacks keys ['low_res_size']"),
    "low_res_size": ("network.low_res_size", 9, "low_res_size must be at most"),
    "low_res_channels of other weights": ("network.low_res_channels", 3, "input_blocks.0.0.weight"),
    "channels counted together": ("network.in_channels", 3, "need in_channels=1"),
    "learned variance": ("diffusion.variance", "learned_range", "out_channels=2"),
    "more classes than rows": ("diffusion.num_classes", 12, "num_labels"),
}


@pytest.mark.parametrize("fault", OF_AN_UPSAMPLER)
def test_an_upsamplers_config_that_is_not_exactly_right_is_refused(fault: str, tmp_path: Path) -> None:
    path, value, word = OF_AN_UPSAMPLER[fault]
    config = config_of(save(UPSAMPLER, tmp_path / "m"))
    altered(path, value)(config)
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    refused(tmp_path / "m", word)


@pytest.mark.parametrize(
    ("model", "word"),
    [
        (lambda: judge(num_classes=9), "num_classes=9 need .*out_channels=9 of the network, got 1 and 10"),
        (lambda: judge(image_shape=(3, 8, 8)), "in_channels=3"),
        (
            lambda: judge(image_shape=(1, 16, 16)),
            "sides of 8, the image_size of the network, whose pool is 'attention'",
        ),
        (lambda: judge(provenance={"loss": math.nan}), "provenance"),
        (lambda: DiffusionModel(upsampler(), "linear", image_shape=(3, 8, 8)), "in_channels=3"),
        (
            lambda: Classifier(encoder(pool="adaptive", channel_mult=(1, 2)), "cosine", image_shape=(1, 8, 9)),
            r"sides that are multiples of 2, which the network's 2 levels halve",
        ),
    ],
    ids=["classes", "channels", "size", "nan", "upsampler", "odd"],
)
def test_what_load_would_refuse_is_not_saved(
    model: Callable[[], DiffusionModel | Classifier], word: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=word):
        save(model(), tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_other_pools_take_any_size(tmp_path: Path) -> None:
    model = Classifier(encoder(pool="adaptive"), "cosine", image_shape=(1, 16, 12))
    assert_same_model(load_classifier(save(model, tmp_path / "m")), model)
