"""What a run can be asked to do: parts of a batch, averages, other losses, logs and schedules."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from training_cases import TINY, assert_same, config, conv_model, poisoned, small_data, stop_at, unet_model, weights

from fastdiff import Classifier, DiffusionModel, checkpoint
from fastdiff.model.unet import UNet, UNetConfig
from fastdiff.training import Run, Step, TrainConfig, TrainingError, read_log, train
from fastdiff.training.log import RunLog
from fastdiff.training.losses import Batch, draw, sample_keys
from fastdiff.training.plot import plot_loss
from fastdiff.training.timesteps import TIMESTEP_SAMPLERS, Uniform


def assert_close(a: Any, b: Any, atol: float = 1e-6) -> None:
    for name, tensor in weights(a).items():
        torch.testing.assert_close(tensor, weights(b)[name], rtol=0, atol=atol, msg=name)


# Parts of a batch


@pytest.mark.parametrize("accumulate", [2, 8])
@pytest.mark.parametrize("loss", [{}, {"timesteps": "loss_second_moment"}], ids=["uniform", "importance"])
def test_a_batch_in_parts_is_the_same_step(accumulate: int, loss: dict[str, Any]) -> None:
    # no dropout, which is seeded anew for each part; rounding grows with the steps
    runs = [Run(unet_model(dropout=0.0), small_data(), config(accumulate=n, **loss)) for n in (1, accumulate)]
    for run in runs:
        first = run.advance()
        assert len(first.t) == len(first.losses) == 8
    for name, gradient in ((n, p.grad) for n, p in runs[0].network.named_parameters()):
        other = dict(runs[1].network.named_parameters())[name].grad
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-6, msg=name)


def test_importance_weighs_each_loss() -> None:
    run = Run(unet_model(dropout=0.0), small_data(), config(timesteps="loss_second_moment"))
    for _ in range(10):
        run.timesteps.update(torch.arange(1000), 1.0 + torch.arange(1000) / 100)
    _, weights = run._batch(0, 8)
    step = run.advance()
    assert weights.unique().numel() > 2 and torch.equal(step.weights, weights)
    assert torch.equal(run.timesteps.losses[step.t[-1], -1], step.losses[-1].double())
    assert step.loss == pytest.approx(float((weights * step.losses).mean()), rel=1e-5)
    assert step.loss != pytest.approx(float(step.losses.mean()), rel=1e-2)


def test_each_part_has_dropout_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    real = torch.manual_seed
    run = Run(unet_model(), small_data(), config(accumulate=4))
    monkeypatch.setattr(torch, "manual_seed", lambda seed: (seeds.append(seed), real(seed))[1])
    run.advance()
    run.advance()
    assert len(set(seeds)) == len(seeds) == 8


# Averages


def test_several_averages_are_those_of_single_runs(tmp_path: Path) -> None:
    rates = (0.9, 0.3, 0.5)
    several = train(unet_model(), small_data(), config(ema_decay=rates), tmp_path / "all", progress=False)
    singles = [train(unet_model(), small_data(), config(ema_decay=rate), None, progress=False) for rate in rates]
    assert_same(weights(several), weights(singles[0]))
    folders = ["model", "model-0.3", "model-0.5"]
    for folder, single, rate in zip(folders, singles, rates, strict=True):
        loaded = checkpoint.load(tmp_path / "all" / folder)
        assert_same(weights(loaded), weights(single))
        assert loaded.provenance["training"]["ema_decay"] == rate
    assert not torch.equal(weights(singles[1])["out.2.weight"], weights(singles[2])["out.2.weight"])


def test_rates_that_nearly_agree_have_folders_of_their_own(tmp_path: Path) -> None:
    rates = (0.9, 0.9999999, 0.99999999)
    train(unet_model(), small_data(), config(iterations=1, ema_decay=rates), tmp_path, progress=False)
    assert sorted(path.name for path in tmp_path.glob("model*")) == ["model", "model-0.9999999", "model-0.99999999"]


def test_rates_of_numpy_are_numbers(tmp_path: Path) -> None:
    rates = tuple(np.linspace(0.5, 0.75, 2))
    train(unet_model(), small_data(), config(ema_decay=rates), tmp_path, progress=False)
    assert {path.name for path in tmp_path.glob("model*")} == {"model", "model-0.75"}


def test_checkpoints_are_stored_as_asked(tmp_path: Path) -> None:
    cfg = config(iterations=1, ema_decay=(0.9, 0.5))
    train(unet_model(), small_data(), cfg, tmp_path, progress=False, storage_dtype=torch.float16)
    for folder in ("model", "model-0.5"):
        assert checkpoint.info(tmp_path / folder)["storage"] == ["float16"]


def test_several_averages_resume_bit_for_bit(tmp_path: Path) -> None:
    options = {"ema_decay": (0.9, 0.3), "timesteps": "loss_second_moment", "iterations": 8, "save_every": 4}
    model = DiffusionModel(UNet(TINY), "cosine", "v", image_shape=(1, 8, 8))
    # ten losses for each of few times, so that times are drawn by their losses before and after the stop
    schedule = {"schedule": type(model.schedule).named("cosine", 3), "prediction": "v", "image_shape": (1, 8, 8)}

    def fresh() -> DiffusionModel:
        torch.manual_seed(0)
        return DiffusionModel(UNet(TINY), **schedule)

    cfg = config(batch_size=16, **options)
    train(fresh(), small_data(), cfg, tmp_path / "whole", progress=False)
    with pytest.raises(KeyboardInterrupt):
        train(fresh(), small_data(), cfg, tmp_path / "parts", progress=False, callback=stop_at(4))
    assert int(load_file(tmp_path / "parts" / "state.safetensors")["timesteps.counts"].min()) == 10
    train(fresh(), small_data(), cfg, tmp_path / "parts", resume=True, progress=False)
    states = [load_file(tmp_path / name / "state.safetensors") for name in ("whole", "parts")]
    assert_same(*states)
    assert {name.split(".")[0] for name in states[0]} == {"raw", "ema", "ema1", "exp_avg", "exp_avg_sq", "timesteps"}
    for folder in ("model", "model-0.3"):
        assert_same(*(weights(checkpoint.load(tmp_path / name / folder)) for name in ("whole", "parts")))


# Other ways to the same step


def test_gradient_checkpointing_changes_no_bit_of_a_run() -> None:
    plain, checkpointed = (
        train(unet_model(dropout=0.2, gradient_checkpointing=kept), small_data(), config(), None, progress=False)
        for kept in (False, True)
    )
    assert_same(weights(plain), weights(checkpointed))


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_a_compiled_network_trains_alike() -> None:
    cfg = {"iterations": 3, "warmup": 1}
    plain, compiled = (
        train(unet_model(dropout=0.0), small_data(), config(compile=flag, **cfg), None, progress=False)
        for flag in (False, True)
    )
    assert_close(plain, compiled, 1e-4)


def test_bfloat16_keeps_float32_masters(tmp_path: Path) -> None:
    run = Run(unet_model(), small_data(), config(precision="bfloat16"))
    step = run.advance()
    assert {tensor.dtype for name, tensor in run._tensors()} == {torch.float32}
    assert step.losses.dtype == torch.float32
    exact = Run(unet_model(), small_data(), config()).advance()
    # a fresh network says zero in every precision; its gradient does not
    assert 0 < abs(step.grad_norm - exact.grad_norm) < 0.02 * exact.grad_norm


@pytest.mark.parametrize("loss", ["hybrid", "vlb", "kl"])
def test_a_learned_variance_trains(loss: str) -> None:
    run = Run(unet_model(out_channels=2, dropout=0.0), small_data(), config(loss=loss, iterations=40, lr=3e-3))
    keys = sample_keys(99, 0, 200)
    t = Uniform(1000).choose(draw(keys, 0.0)[0])[0]
    batch = Batch(run.images.repeat(10, 1, 1, 1), run.labels.repeat(10), keys, t)

    def measured() -> tuple[float, float]:
        with torch.no_grad():
            parts = run.loss(run.network, batch).parts
        return float(parts["mse"].mean()), float(parts["vlb"].mean())

    before = measured()
    for _ in range(40):
        run.advance()
    after = measured()
    # most of the bound is t = 0, which few samples see
    assert after[0] < 0.9 * before[0] and after[1] < before[1] - 0.1


def test_linear_decay_is_a_line() -> None:
    cfg = TrainConfig(iterations=101, lr=2.0, warmup=20, decay="linear", final_lr=0.1)
    assert [cfg.lr_at(step) for step in (20, 60, 100)] == pytest.approx([2.0, 1.1, 0.2])
    assert cfg.lr_at(40) - cfg.lr_at(60) == pytest.approx(cfg.lr_at(70) - cfg.lr_at(90))


# What a run tells


def test_quarters_of_t_are_told_apart(tmp_path: Path) -> None:
    run = Run(unet_model(dropout=0.0), small_data(), config(batch_size=16))
    steps = [run.advance() for _ in range(2)]
    train(unet_model(dropout=0.0), small_data(), config(iterations=2, batch_size=16), tmp_path, progress=False)
    (line,) = read_log(tmp_path / "log.jsonl")
    t, losses = torch.cat([s.t for s in steps]), torch.cat([s.losses for s in steps])
    for q in range(4):
        inside = losses[(t >= 250 * q) & (t < 250 * (q + 1))]
        assert line[f"loss_q{q + 1}"] == pytest.approx(float(inside.mean()), rel=1e-5)
    assert line["loss"] == pytest.approx(float(losses.mean()), rel=1e-5) == line["mse"]


def test_figures_of_samples_drawn_by_importance_are_those_of_uniform_times() -> None:
    """Frozen, T = 8: the means of a log over many steps agree, though one draws some times ten times as often"""
    lines = {}
    for name in ("uniform", "loss_second_moment"):
        log = RunLog(None, 8, False)
        sampler = TIMESTEP_SAMPLERS[name](8)
        losses = 10.0 / (1 + torch.arange(8)) ** 2
        for _ in range(10):
            sampler.update(torch.arange(8), losses)
        for start in range(0, 40_000, 4000):
            t, weights = sampler.choose(draw(sample_keys(0, start, 4000), 0.0)[0])
            parts = {"vlb": 3 * losses[t]}
            log.add(Step(float((weights * losses[t]).mean()), 1.0, 1.0, False, t, weights, losses[t], parts))
        lines[name] = log.write(1, 0, 1.0, 1.0)
    for name in ("loss", "vlb", "loss_q1", "loss_q2", "loss_q3", "loss_q4"):
        assert lines["uniform"][name] == pytest.approx(lines["loss_second_moment"][name], rel=0.03), name


@pytest.mark.parametrize(
    ("every", "expected"), [({}, [3, 6, 7]), ({"sample_every": 2}, [2, 4, 6, 7]), ({"sample_every": 0}, [7])]
)
def test_the_callback_has_a_schedule_of_its_own(every: dict[str, int], expected: list[int]) -> None:
    called: list[int] = []
    cfg = config(iterations=7, **every)
    train(unet_model(), small_data(), cfg, None, progress=False, callback=lambda step, model: called.append(step))
    assert called == expected


def test_tensorboard_has_the_lines_of_the_log(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(unet_model(), small_data(), config(tensorboard=True), tmp_path, progress=False)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    lines = read_log(tmp_path / "log.jsonl")
    for name in ("loss", "lr", "images_per_s"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines]


def test_tensorboard_has_no_step_twice_after_a_resume(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    cfg = config(tensorboard=True, log_every=1)
    model, _ = poisoned({4})
    with pytest.raises(TrainingError):
        train(model, small_data(), replace(cfg, max_skipped=0), tmp_path, progress=False)
    time.sleep(1.1)  # events of one second have no order
    train(unet_model(dropout=0.0), small_data(), cfg, tmp_path, resume=True, progress=False)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("lr")] == [1, 2, 3, 4, 5, 6]


def test_tensorboard_that_is_missing_is_named_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r"pip install 'fastdiff\[tensorboard\]'"):
        train(unet_model(), small_data(), config(tensorboard=True), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_the_progress_bar_tells_loss_and_speed(capsys: pytest.CaptureFixture[str]) -> None:
    train(poisoned({3})[0], small_data(), config(), None)
    told = capsys.readouterr().err
    assert "loss " in told and "images/s" in told and "1 skipped" in told and "6/6" in told


def test_a_plot_of_one_run_and_of_two(tmp_path: Path) -> None:
    from PIL import Image

    for name in ("one", "two"):
        lines = [{"step": i, "loss": 1 / i, "loss_q1": 2 / i, "loss_q2": None} for i in range(1, 5)]
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"st')
    single = plot_loss([tmp_path / "one"], tmp_path / "one.png")
    both = plot_loss([tmp_path / "one", tmp_path / "two"], tmp_path / "two.png")
    assert Image.open(single).size == Image.open(both).size == (800, 450)
    assert single.read_bytes() != both.read_bytes()
    with pytest.raises(ValueError, match=r"nowhere has no line in its log\.jsonl"):
        plot_loss([tmp_path / "nowhere"], tmp_path / "x.png")
    for loss in ("null", "0.0"):
        (tmp_path / "two" / "log.jsonl").write_text(f'{{"step": 1, "loss": {loss}}}\n')
        with pytest.raises(ValueError, match=r"two has no loss above 0 in its log\.jsonl"):
            plot_loss([tmp_path / "one", tmp_path / "two"], tmp_path / "x.png")


# What a network may ask of its data


class Conditioned(nn.Module):
    """Takes an image of a quarter the size beside x"""

    def __init__(self) -> None:
        super().__init__()
        self.extra_shapes = {"low_res": (1, 4, 4)}
        self.conv = nn.Conv2d(2, 1, 3, padding=1)
        self.seen: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, low_res: torch.Tensor) -> torch.Tensor:
        self.seen.append(low_res.clone())
        return self.conv(torch.cat([x, nn.functional.interpolate(low_res, x.shape[2:])], 1))


def test_low_res_is_made_of_the_images_averages_and_goes_with_them() -> None:
    data = small_data(6)
    network = Conditioned()
    model = DiffusionModel(network, "cosine", image_shape=(1, 8, 8))
    train(model, data, config(iterations=2, batch_size=6), None, progress=False)
    for seen, start in zip(network.seen, (0, 6), strict=True):
        batch, _ = Run(model, data, config(iterations=2, batch_size=6))._batch(start, 6)
        assert not torch.equal(batch.x0, data.images[:6])
        torch.testing.assert_close(seen, batch.x0.unflatten(2, (4, 2)).unflatten(4, (4, 2)).mean((3, 5)))


def test_data_without_what_the_network_takes_is_refused() -> None:
    network = Conditioned()
    network.extra_shapes = {"mask": (1, 8, 8)}
    with pytest.raises(ValueError, match=r"data must have extra tensors of shapes \{'mask': \(1, 8, 8\)\}.*got \{\}"):
        train(DiffusionModel(network, "cosine", image_shape=(1, 8, 8)), small_data(), config(), None)


def test_a_classifier_learns_from_noisy_images() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 10)

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return self.linear(x.flatten(1))

    torch.manual_seed(0)
    # no null label among what it sees: the loss would be out of range
    run = Run(Classifier(Net(), "cosine", 10, (1, 8, 8)), small_data(), config(iterations=80, lr=0.05, p_uncond=1.0))
    steps = [run.advance() for _ in range(80)]
    assert sum(s.loss for s in steps[-10:]) < 0.8 * sum(s.loss for s in steps[:10])
    assert set(steps[0].parts) == {"accuracy"}
    assert isinstance(run.averaged(), Classifier) and run.averaged().provenance["training"]["iterations"] == 80
    with pytest.raises(ValueError, match="cross entropy"):
        train(run.model, small_data(), config(loss="vlb"), None)


def test_the_models_other_facts_are_kept() -> None:
    model = conv_model(clip_x0=False, dtype=torch.bfloat16, provenance={"by": "hand"})
    trained = train(model, small_data(), config(), None, progress=False)
    assert trained is not model and trained.network is not model.network
    assert (trained.clip_x0, trained.dtype, trained.provenance["by"]) == (False, torch.bfloat16, "hand")
    assert UNetConfig.from_dict(TINY.to_dict()) == TINY
