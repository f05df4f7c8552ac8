"""What a run does about faults: steps that are not finite, broken weights, kills, networks that do not fit."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from training_cases import assert_same, config, poisoned, small_data, stop_at, unet_model, weights

from fastdiff import Classifier, DiffusionModel, checkpoint
from fastdiff.training import Run, TrainConfig, TrainingError, read_log, train


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(tmp_path: Path, what: str) -> None:
    model, _ = poisoned({2}, what)
    run = Run(model, small_data(), config(timesteps="loss_second_moment"))
    for _ in range(2):
        run.advance()
    before = {name: tensor.clone() for name, tensor in run._tensors()}
    updates = [int(average.n_averaged) for average in run.averages]
    step = run.advance()
    assert step.skipped and run.skipped == 1 and (run.step, run.updates) == (3, 2)
    assert_same(before, dict(run._tensors()))
    assert [int(average.n_averaged) for average in run.averages] == updates
    assert not run.advance().skipped and run.skipped == 1
    assert any(not torch.equal(before[name], tensor) for name, tensor in run._tensors())
    # averages count updates, not steps
    for name, now in run.network.named_parameters():
        expected = torch.lerp(before[f"ema.{name}"], now.detach(), 1 - run.config.ema_decay_at(2))
        torch.testing.assert_close(dict(run._tensors())[f"ema.{name}"], expected, rtol=1e-5, atol=1e-7)


def test_too_many_skipped_steps_stop_the_run_with_the_last_checkpoint_intact(tmp_path: Path) -> None:
    kept: dict[str, bytes] = {}

    def remember(step: int, averaged: DiffusionModel) -> None:
        kept.clear()
        kept.update({str(path): path.read_bytes() for path in tmp_path.rglob("*.safetensors")})

    model, _ = poisoned({1, 4, 6, 7})
    cfg = config(iterations=12, max_skipped=3, log_every=1)
    with pytest.raises(TrainingError, match=r"step 8: .*3 updates were skipped before \(max_skipped=3\)"):
        train(model, small_data(), cfg, tmp_path, progress=False, callback=remember)
    assert len(kept) == 2
    assert read_log(tmp_path / "log.jsonl")[-1]["images_per_s"] is not None
    assert {str(path): path.read_bytes() for path in tmp_path.rglob("*.safetensors")} == kept
    lines = read_log(tmp_path / "log.jsonl")
    assert [line["skipped"] for line in lines] == [0, 1, 1, 1, 2, 2, 3]
    assert lines[1]["loss"] is None and lines[1]["loss_q1"] is None and lines[0]["loss"] > 0
    # the last save was after six steps, of which two were skipped; what is left is healthy
    healthy = train(unet_model(dropout=0.0), small_data(), cfg, tmp_path, resume=True, progress=False)
    assert all(tensor.isfinite().all() for tensor in weights(healthy).values())
    assert healthy.provenance["training"]["skipped"] == 2
    assert [line["skipped"] for line in read_log(tmp_path / "log.jsonl")][6:] == [2] * 6


def test_a_run_with_skipped_steps_resumes_bit_for_bit(tmp_path: Path) -> None:
    cfg = config(iterations=6)
    train(poisoned({1})[0], small_data(), cfg, tmp_path / "whole", progress=False)
    with pytest.raises(KeyboardInterrupt):
        train(poisoned({1})[0], small_data(), cfg, tmp_path / "parts", progress=False, callback=stop_at(3))
    train(unet_model(dropout=0.0), small_data(), cfg, tmp_path / "parts", resume=True, progress=False)
    assert_same(*(load_file(tmp_path / name / "state.safetensors") for name in ("whole", "parts")))


def test_a_first_step_that_is_skipped_can_be_saved_and_followed(tmp_path: Path) -> None:
    cfg = config(iterations=3, save_every=1)
    followed = train(poisoned({0})[0], small_data(), cfg, tmp_path / "whole", progress=False)
    assert followed.provenance["training"]["skipped"] == 1
    with pytest.raises(KeyboardInterrupt):
        train(poisoned({0})[0], small_data(), cfg, tmp_path / "parts", progress=False, callback=stop_at(1))
    train(unet_model(dropout=0.0), small_data(), cfg, tmp_path / "parts", resume=True, progress=False)
    assert_same(*(load_file(tmp_path / name / "state.safetensors") for name in ("whole", "parts")))


def test_a_run_that_was_stopped_goes_on_with_more_patience(tmp_path: Path) -> None:
    cfg = config(iterations=6, save_every=2, log_every=0)
    with pytest.raises(TrainingError, match=r"step 4.* go on with a larger max_skipped"):
        train(poisoned({3})[0], small_data(), replace(cfg, max_skipped=0), tmp_path, progress=False)
    # the log has what happened before, in a time that nobody measured
    assert [(line["step"], line["images_per_s"]) for line in read_log(tmp_path / "log.jsonl")] == [(3, None)]
    calls = poisoned({1})[0]  # the first of the two that are left before the fourth
    done = train(calls, small_data(), replace(cfg, max_skipped=1), tmp_path, resume=True, progress=False)
    assert done.provenance["training"]["skipped"] == 1


def test_weights_that_an_update_broke_are_not_saved(tmp_path: Path) -> None:
    kept: dict[str, bytes] = {}

    def remember(step: int, averaged: DiffusionModel) -> None:
        kept.update({str(path): path.read_bytes() for path in tmp_path.rglob("*.safetensors")})

    def rate_at(self: TrainConfig, step: int) -> float:
        return 1e-4 if step < 2 else 1e39

    cfg = config(save_every=2, iterations=6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainConfig, "lr_at", rate_at)
        with pytest.raises(TrainingError, match=r"step 4: raw\..* must be finite .* saved last is intact"):
            train(unet_model(), small_data(), cfg, tmp_path, progress=False, callback=remember)
        with pytest.raises(TrainingError, match="must be finite"):
            train(unet_model(), small_data(), cfg, None, progress=False, callback=remember)
    assert len(kept) == 2
    assert {str(path): path.read_bytes() for path in tmp_path.rglob("*.safetensors")} == kept


@pytest.mark.parametrize("fault", ["model", "model-0.5", "callback"])
def test_what_a_kill_kept_a_finished_run_from_is_made_up_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    cfg, called = config(save_every=0, ema_decay=(0.9, 0.5)), []

    def note(step: int, averaged: DiffusionModel) -> None:
        if (tmp_path / "whole").exists() and not called and fault == "callback":
            called.append("killed")
            raise KeyboardInterrupt
        called.append(step)

    whole = train(unet_model(), small_data(), cfg, tmp_path / "parts", progress=False, callback=None)
    (tmp_path / "parts").rename(tmp_path / "whole")

    def killed(model: Any, folder: Path, **options: Any) -> Path:
        if folder.name == fault:
            raise KeyboardInterrupt
        return save(model, folder, **options)

    save = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        train(unet_model(), small_data(), cfg, tmp_path / "parts", progress=False, callback=note)
    monkeypatch.setattr(checkpoint, "save", save)
    called.clear()
    called.extend(["killed"] if fault == "callback" else [])
    done = train(unet_model(), small_data(), cfg, tmp_path / "parts", resume=True, progress=False, callback=note)
    assert_same(weights(done), weights(whole))
    assert called[-1:] == [6]
    for name in ("model", "model-0.5"):
        hashes = [checkpoint.info(tmp_path / run / name)["sha256"] for run in ("parts", "whole")]
        assert hashes[0] == hashes[1]


def test_running_statistics_are_not_spoiled_by_a_step_that_is_skipped() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.conv = nn.BatchNorm2d(1), nn.Conv2d(1, 1, 3, padding=1)
            self.spoil = False

        def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.conv(self.norm(x * math.nan if self.spoil else x))

    network = Normed()
    run = Run(DiffusionModel(network, "cosine", image_shape=(1, 8, 8)), small_data(), config())
    run.advance()
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    network.spoil = True
    assert run.advance().skipped
    assert_same(before, dict(network.named_buffers()))
    network.spoil = False
    run.advance()
    assert all(tensor.isfinite().all() for tensor in run.averaged().network.state_dict().values())


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 8, 8), (1, 8, 4)], ids=str)
def test_a_network_of_another_output_is_refused(shape: tuple[int, ...]) -> None:
    class Wrong(nn.Conv2d):
        def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return super().forward(x).mean() + torch.zeros(len(x), *shape)

    model = DiffusionModel(Wrong(1, 1, 3), "cosine", image_shape=(1, 8, 8))
    with pytest.raises(ValueError, match=r"network\(x, t, y\) must return \[\(8, 1, 8, 8\), \(8, 2, 8, 8\)\], got"):
        train(model, small_data(), config(), None, progress=False)


@pytest.mark.parametrize("logits", [9, 11])
def test_a_classifier_of_other_classes_is_refused(logits: int) -> None:
    class Net(nn.Linear):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return super().forward(x.flatten(1))

    model = Classifier(Net(64, logits), "cosine", 10, (1, 8, 8))
    with pytest.raises(ValueError, match=rf"must return logits of shape \(8, 10\), got \(8, {logits}\)"):
        train(model, small_data(), config(), None, progress=False)


def test_a_network_without_anything_to_train_is_refused() -> None:
    model = unet_model()
    assert isinstance(model.network, nn.Module)
    model.network.requires_grad_(False)
    with pytest.raises(ValueError, match="require a gradient"):
        train(model, small_data(), config(), None, progress=False)
