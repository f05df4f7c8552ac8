"""Training: stateless randomness, the loop's arithmetic, and what a killed run leaves behind."""

from __future__ import annotations

import copy
import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from training_cases import TINY, ConvNet, assert_same, config, conv_model, small_data, stop_at, unet_model, weights

from fastdiff import checkpoint
from fastdiff.diffusion_model import DiffusionModel
from fastdiff.model.unet import UNet, UNetConfig
from fastdiff.training import Dataset, TrainConfig, TrainingError, train
from fastdiff.training.losses import Batch, DiffusionLoss, draw, sample_keys
from fastdiff.training.timesteps import Uniform

# The loop


def test_dropped_labels_reach_the_network_as_the_null_label() -> None:
    model, data = conv_model(), small_data(8)
    train(model, data, config(iterations=40, p_uncond=0.25), None, progress=False)
    assert isinstance(model.network, ConvNet)
    seen = torch.cat(model.network.seen)
    assert abs((seen == 10).double().mean() - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 320)
    assert set(seen.tolist()) == {10, *data.labels.tolist()}


def test_every_epoch_shows_every_image_once() -> None:
    # 20 images, batches of 8: epochs end inside batches
    model, data = conv_model(), small_data(20)
    data = Dataset(data.images, torch.arange(20) % 10, 10, "", "", "")
    train(model, data, config(iterations=10, p_uncond=0.0), None, progress=False)
    assert isinstance(model.network, ConvNet)
    epochs = torch.cat(model.network.seen).view(4, 20)
    assert [epoch.bincount().tolist() for epoch in epochs] == [[2] * 10] * 4
    assert not torch.equal(epochs[0], epochs[1])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_resume_is_bit_exact(tmp_path: Path, precision: str) -> None:
    whole = train(unet_model(), small_data(), config(precision=precision), tmp_path / "whole", progress=False)
    with pytest.raises(KeyboardInterrupt):
        train(
            unet_model(),
            small_data(),
            config(precision=precision),
            tmp_path / "parts",
            progress=False,
            callback=stop_at(3),
        )
    torch.manual_seed(99)
    torch.rand(7)
    fresh = DiffusionModel(UNet(TINY), "cosine", "v", image_shape=(1, 8, 8), name="tiny")
    resumed = train(fresh, small_data(), config(precision=precision), tmp_path / "parts", resume=True, progress=False)
    assert_same(weights(whole), weights(resumed))
    states = [checkpoint_tensors(tmp_path / name / "state.safetensors") for name in ("whole", "parts")]
    assert_same(*states)
    # moments, averages and weights are all there
    assert {name.split(".")[0] for name in states[0]} == {"raw", "ema", "exp_avg", "exp_avg_sq"}


def checkpoint_tensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def test_runs_are_repeatable_and_seeds_differ() -> None:
    first, second, other = (
        weights(train(conv_model(), small_data(), config(seed=seed), None, progress=False)) for seed in (1, 1, 2)
    )
    assert_same(first, second)
    assert not torch.equal(first["last.weight"], other["last.weight"])


def test_log_has_a_line_per_interval_and_resume_rewrites_its_tail(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(unet_model(), small_data(), config(), tmp_path, progress=False, callback=stop_at(3))
    log = tmp_path / "log.jsonl"
    # a killed run may have logged steps after its last save, the last line cut short
    log.write_text(log.read_text() + '{"step": 4, "loss": 1.0}\n{"ste')
    train(unet_model(), small_data(), config(), tmp_path, resume=True, progress=False)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    for line in lines:
        quarters = {f"loss_q{q}" for q in (1, 2, 3, 4)}
        assert (
            line.keys() == {"step", "loss", "mse", "grad_norm", "lr", "skipped", "images_per_s", "seconds"} | quarters
        )
        assert line["lr"] == config().lr_at(line["step"] - 1)
        assert line["loss"] > 0
        assert line["images_per_s"] > 0
    assert lines[0]["seconds"] < lines[2]["seconds"]


def test_checkpoint_holds_the_average_and_its_provenance(tmp_path: Path) -> None:
    data, cfg = small_data(), config()
    returned = train(unet_model(), data, cfg, tmp_path, progress=False)
    loaded = checkpoint.load(tmp_path / "model")
    assert_same(weights(returned), weights(loaded))
    assert (loaded.prediction, loaded.image_shape, loaded.name) == ("v", (1, 8, 8), "tiny")
    facts = loaded.provenance["training"]
    assert (facts["data"], facts["data_source"]) == (data.name, data.source)
    assert (facts["iterations"], facts["seed"], facts["torch"]) == (6, cfg.seed, torch.__version__)
    assert TrainConfig(**facts["config"]) == cfg


def test_average_follows_its_formula() -> None:
    cfg = config(iterations=5, save_every=1, ema_decay=0.4)
    model, raw, averages = conv_model(), [], []

    def record(step: int, averaged: DiffusionModel) -> None:
        raw.append(copy.deepcopy(weights(model)))
        averages.append(copy.deepcopy(weights(averaged)))

    train(model, small_data(), cfg, None, progress=False, callback=record)
    assert [cfg.ema_decay_at(n) for n in (1, 2, 10)] == [2 / 11, 3 / 12, 0.4]
    expected = {name: tensor.double() for name, tensor in raw[0].items()}
    for n in range(1, 5):
        decay = min(0.4, (1 + n) / (10 + n))
        expected = {name: decay * expected[name] + (1 - decay) * raw[n][name].double() for name in expected}
        for name in expected:
            torch.testing.assert_close(averages[n][name], expected[name].float(), rtol=1e-5, atol=1e-7)
    assert not torch.equal(raw[4]["last.weight"], averages[4]["last.weight"])


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_loss_falls(tmp_path: Path, prediction: str) -> None:
    model, data = conv_model(prediction), small_data(16)
    objective = DiffusionLoss(model, config())
    keys = sample_keys(77, 0, 16)
    batch = Batch(data.images, data.labels, keys, Uniform(1000).choose(draw(keys, 0.0)[0])[0])

    def measured(model: DiffusionModel) -> float:
        with torch.no_grad():
            return float(objective(model.network, batch).loss.mean())

    before = measured(model)
    after = measured(train(model, data, config(iterations=150, lr=1e-2, batch_size=16), None, progress=False))
    assert after < 0.7 * before


def test_gradients_are_clipped_and_the_rate_scales_the_step() -> None:
    steps = {}
    for lr in (1e-3, 2e-3):
        model = conv_model()
        before = copy.deepcopy(weights(model))
        train(model, small_data(), config(iterations=1, lr=lr, warmup=4), None, progress=False)
        steps[lr] = weights(model)["last.weight"] - before["last.weight"]
    # Adam's first step is lr * sign(gradient), a quarter of lr here
    torch.testing.assert_close(steps[1e-3].abs(), torch.full_like(steps[1e-3], 2.5e-4), rtol=1e-2, atol=0)
    torch.testing.assert_close(steps[2e-3], 2 * steps[1e-3], rtol=1e-2, atol=0)

    norms: list[float] = []
    model = conv_model()

    def record(step: int, averaged: DiffusionModel) -> None:
        assert isinstance(model.network, ConvNet)
        norms.append(
            math.sqrt(sum(float(p.grad.square().sum()) for p in model.network.parameters() if p.grad is not None))
        )

    train(model, small_data(), config(save_every=1, grad_clip=1e-3), None, progress=False, callback=record)
    assert max(norms) <= 1e-3 * 1.001


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_not_finite_stops_and_leaves_the_last_save(tmp_path: Path, fault: str) -> None:
    model = unet_model()
    network = model.network
    assert isinstance(network, UNet)
    kept: dict[str, bytes] = {}

    def poison(step: int, averaged: DiffusionModel) -> None:
        if step == 3:
            kept.update({str(path): path.read_bytes() for path in tmp_path.rglob("*.safetensors")})
            if fault == "loss":
                network.out["2"].register_forward_hook(lambda module, given, output: output * math.nan)
            else:
                network.out["2"].weight.register_hook(lambda gradient: gradient * math.inf)
            kept["weights"] = bytes(network.out["2"].bias.detach().numpy())

    with pytest.raises(TrainingError, match="step 4"):
        train(model, small_data(), config(max_skipped=0), tmp_path, progress=False, callback=poison)
    assert kept.pop("weights") == bytes(network.out["2"].bias.detach().numpy())
    assert len(kept) == 2
    assert {str(path): path.read_bytes() for path in tmp_path.rglob("*.safetensors")} == kept
    healthy = train(unet_model(), small_data(), config(max_skipped=0), tmp_path, resume=True, progress=False)
    assert all(tensor.isfinite().all() for tensor in weights(healthy).values())


# Arguments


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        pytest.param({field: value}, field, id=f"{field}={value}")
        for field, value in [
            ("iterations", 0),
            ("iterations", 1.5),
            ("batch_size", 0),
            ("batch_size", True),
            ("lr", 0.0),
            ("lr", math.nan),
            ("lr", math.inf),
            ("lr", "fast"),
            ("warmup", -1),
            ("decay", "step"),
            ("final_lr", 1.1),
            ("weight_decay", -0.1),
            ("betas", (0.9, 1.0)),
            ("betas", (-0.1, 0.9)),
            ("betas", (0.9,)),
            ("grad_clip", 0),
            ("p_uncond", 1.01),
            ("p_uncond", -0.01),
            ("ema_decay", 1.0),
            ("seed", -1),
            ("seed", 2**63),
            ("precision", "float16"),
            ("accumulate", 3),
            ("accumulate", 0),
            ("loss", "mse"),
            ("vlb_weight", 0.0),
            ("min_snr_gamma", 0.0),
            ("timesteps", "importance"),
            ("ema_decay", ()),
            ("ema_decay", (0.9, 0.9)),
            ("ema_decay", (0.9, 1.0)),
            ("max_skipped", -1),
            ("compile", 1),
            ("tensorboard", "yes"),
            ("sample_every", -1),
            ("log_every", -1),
            ("save_every", -5),
        ]
    ],
)
def test_config_names_the_field(fields: dict[str, Any], word: str) -> None:
    with pytest.raises((ValueError, TypeError), match=word):
        config(**fields)


def test_learning_rate_rises_then_falls_to_its_fraction() -> None:
    cfg = TrainConfig(iterations=101, lr=2.0, warmup=20, final_lr=0.1)
    rates = [cfg.lr_at(step) for step in range(101)]
    assert rates[:20] == pytest.approx([2.0 * (i + 1) / 20 for i in range(20)])
    assert rates[20] == 2.0
    assert rates[60] == pytest.approx(2.0 * (1 + 0.1) / 2)
    assert rates[100] == pytest.approx(0.2)
    assert all(a > b for a, b in itertools.pairwise(rates[20:]))
    constant = TrainConfig(iterations=101, lr=2.0, warmup=20, decay="constant")
    assert {constant.lr_at(step) for step in range(20, 101)} == {2.0}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        pytest.param({"config": {"lr": 1e-3}}, "^lr must be", id="lr"),
        pytest.param({"config": {"batch_size": 4}}, "^batch_size must be", id="batch-size"),
        pytest.param({"config": {"iterations": 7}}, "^iterations must be", id="iterations"),
        pytest.param({"config": {"betas": (0.9, 0.95)}}, "^betas must be", id="betas"),
        pytest.param({"data": 19}, "^data must be", id="data"),
        pytest.param({"prediction": "eps"}, "^prediction must be", id="prediction"),
        pytest.param({"schedule": "linear"}, "^schedule must be", id="schedule"),
        pytest.param({"channels": 16}, "^network must be", id="network"),
        pytest.param({"dropout": 0.5}, "^network must be", id="dropout"),
        pytest.param({"num_heads": 2, "head_channels": None}, "^network must be", id="heads"),
    ],
)
def test_resume_refuses_another_run(state: Path, change: dict[str, Any], word: str) -> None:
    fields = {name: change.get(name, value) for name, value in TINY.to_dict().items()}
    model = DiffusionModel(
        UNet(UNetConfig.from_dict(fields)),
        change.get("schedule", "cosine"),
        change.get("prediction", "v"),
        image_shape=(1, 8, 8),
    )
    before = (state / "state.safetensors").read_bytes()
    with pytest.raises(ValueError, match=word):
        train(
            model,
            small_data(change.get("data", 20)),
            config(**change.get("config", {})),
            state,
            resume=True,
            progress=False,
        )
    assert (state / "state.safetensors").read_bytes() == before


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("run")
    train(unet_model(), small_data(), config(), folder, progress=False)
    return folder


def test_a_finished_run_resumes_to_its_result(state: Path) -> None:
    again = train(unet_model(), small_data(), config(log_every=1), state, resume=True, progress=False)
    assert_same(weights(again), weights(checkpoint.load(state / "model")))


def test_a_finished_model_is_not_overwritten_and_a_file_is_no_folder(state: Path, tmp_path: Path) -> None:
    (tmp_path / "finished").mkdir()
    shutil.copytree(state / "model", tmp_path / "finished" / "model")
    with pytest.raises(ValueError, match="model exists, of a run without its state; give another folder"):
        train(unet_model(), small_data(), config(), tmp_path / "finished", progress=False)
    assert [path.name for path in (tmp_path / "finished").iterdir()] == ["model"]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"out must be a folder, and .*file is a file"):
        train(unet_model(), small_data(), config(), tmp_path / "file", progress=False)
    assert (tmp_path / "file").read_text() == "mine"


def test_an_existing_run_is_not_overwritten(state: Path) -> None:
    before = (state / "log.jsonl").read_bytes()
    with pytest.raises(ValueError, match="resume=True"):
        train(unet_model(), small_data(), config(), state, progress=False)
    assert (state / "log.jsonl").read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"not safetensors", None], ids=["empty", "garbage", "missing"])
def test_resume_names_a_bad_state(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "state.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"state\.safetensors"):
        train(unet_model(), small_data(), config(), tmp_path, resume=True, progress=False)


@pytest.mark.parametrize(
    ("model", "data", "word"),
    [
        pytest.param({"null_model": conv_model()}, {}, "null_model", id="null-model"),
        pytest.param({"null_label": None}, {}, "p_uncond", id="no-null-label"),
        pytest.param({"num_classes": 3}, {}, "classes", id="too-few-classes"),
        pytest.param({}, {"num_classes": None}, "labels", id="no-labels"),
        pytest.param({}, {"images": torch.zeros(20, 1, 4, 4)}, "data", id="image-size"),
    ],
)
def test_train_checks_that_model_and_data_fit(model: dict[str, Any], data: dict[str, Any], word: str) -> None:
    base = small_data()
    labels = base.labels if "num_classes" not in data else torch.zeros_like(base.labels)
    given = {"images": base.images, "labels": labels, "num_classes": 10, **data}
    with pytest.raises(ValueError, match=word):
        train(conv_model(**model), Dataset(**given, name="", source="", licence=""), config(), None)


def test_train_needs_a_float32_module_and_a_folder_to_resume() -> None:
    with pytest.raises(TypeError, match="Module"):
        train(DiffusionModel(lambda x, t, y: x, "cosine", image_shape=(1, 8, 8)), small_data(), config(), None)
    double = conv_model()
    assert isinstance(double.network, nn.Module)
    double.network.double()
    with pytest.raises(ValueError, match="float32"):
        train(double, small_data(), config(), None)
    with pytest.raises(ValueError, match="out"):
        train(conv_model(), small_data(), config(), None, resume=True)


def test_dropout_differs_between_steps_and_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its seed is the key of the batch's first sample, and no other step's"""
    seeds: list[int] = []
    real = torch.manual_seed
    models = [unet_model(), unet_model()]
    monkeypatch.setattr(torch, "manual_seed", lambda seed: (seeds.append(seed), real(seed))[1])
    for seed, model in enumerate(models):
        train(model, small_data(), TrainConfig(iterations=3, batch_size=4, seed=seed), None, progress=False)
    assert len(seeds) == len(set(seeds)) == 6
    assert seeds[:3] == [int(sample_keys(0, 4 * step, 1)) for step in range(3)]
