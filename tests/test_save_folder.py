"""Folders of diffusers, written: a stock pipeline that samples alike, whole or not at all"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import assert_same_model, digits, refused, upsampler
from checkpoints import unet as two_halves
from diffusers import (
    DDIMPipeline,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    UNet2DModel,
)
from pipeline_cases import FILES, TOLERANCE, WEIGHTS, edit, pipeline
from reference.networks import randomness

import fastdiff
from fastdiff import DiffusionModel
from fastdiff.convert.diffusers_folder import load_folder, save_folder
from fastdiff.integrations.diffusers import unet_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pipeline(DDPMScheduler(), num_class_embeds=11).save_pretrained(tmp_path / "pipe")
    return tmp_path / "pipe"


def a_model(seed: int = 0, **options: Any) -> DiffusionModel:
    given = {"solver": {"name": "ddim", "spacing": "leading:N", "eps": "network"}, "name": "pipe", **options}
    given = {"dtype": torch.float32, **given}
    return digits(seed, **given)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_there_and_back_is_the_same_model(tmp_path: Path) -> None:
    for model in (a_model(), a_model(solver={"name": "ddpm", "spacing": "leading:N"}, schedule="linear", null_label=3)):
        back = load_folder(save_folder(model, tmp_path / "pipe", overwrite=True))
        model.provenance = back.provenance
        assert_same_model(back, model)
        assert back.solver == model.solver
    assert sorted(contents(tmp_path / "pipe")) == sorted(FILES)


@pytest.mark.parametrize("solver", ["ddim", "ddpm"])
def test_a_stock_pipeline_samples_what_is_saved(solver: str, tmp_path: Path) -> None:
    model = a_model(solver={"name": solver, "spacing": "leading:N", **({"eps": "network"} if solver == "ddim" else {})})
    save_folder(model, tmp_path)
    pipe = {"ddim": DDIMPipeline, "ddpm": DDPMPipeline}[solver].from_pretrained(tmp_path)
    assert type(DiffusionPipeline.from_pretrained(tmp_path)) is type(pipe)
    steps, y = 10, torch.tensor([3, 7])
    x_T = randomness(0, 2, model.image_shape)[0].float()
    pipe.scheduler.set_timesteps(steps)
    x, generator = x_T, torch.Generator().manual_seed(1)
    replay = torch.Generator().manual_seed(1)
    noise = torch.stack([torch.randn(x.shape, generator=replay) for _ in range(steps)])
    with torch.no_grad():
        for t in pipe.scheduler.timesteps:
            x = pipe.scheduler.step(pipe.unet(x, t, y).sample, t, x, generator=generator).prev_sample
    images = fastdiff.sample(model, y, steps=steps, x_T=x_T, noise=noise if solver == "ddpm" else None, dtype="float32")
    torch.testing.assert_close(images, x, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("by", [load_folder, fastdiff.load, unet_model])
def test_a_flipped_bit_in_a_saved_pipeline_is_refused(by: Callable[..., Any], tmp_path: Path) -> None:
    folder = save_folder(a_model(), tmp_path / "pipe")
    by(folder)
    for at in (-1, -1001):
        flip(folder / WEIGHTS, at)
        refused(folder, WEIGHTS, "its sha256 must be", "model_index.json", by=by)
        flip(folder / WEIGHTS, at)
    # other weights in their place are others, too, save those that are asked for
    network = UNet2DModel.from_pretrained(folder / "unet")
    network.save_pretrained(folder / "unet", variant="fp16")
    by(folder, variant="fp16")
    network.save_pretrained(folder / "unet", max_shard_size="2KB")
    assert (folder / f"{WEIGHTS}.index.json").exists()
    refused(folder, "its sha256 must be", by=by)
    # the word of whoever takes the hash away
    edit(folder / "model_index.json", _fastdiff={"num_classes": 10, "null_label": 10})
    assert by(folder).null_label == 10


def test_weights_that_are_named_are_checked_if_they_are_those_that_were_saved(tmp_path: Path) -> None:
    folder = save_folder(a_model(), tmp_path / "pipe")
    flip(folder / WEIGHTS, -1)
    name = Path(WEIGHTS).name
    refused(folder, WEIGHTS, "its sha256 must be", by=load_folder, weights_file=name)
    shutil.copy(folder / WEIGHTS, folder / "unet" / "other.safetensors")
    load_folder(folder, weights_file="other.safetensors")


def test_what_a_pipelines_folder_cannot_hold(tmp_path: Path) -> None:
    for wrong in (
        DiffusionModel(upsampler(), "cosine", image_shape=(1, 8, 8)),
        DiffusionModel(lambda x, t, y: x, "cosine"),
        "digits",
    ):
        with pytest.raises(TypeError, match="model must be a DiffusionModel with a UNet"):
            save_folder(wrong, tmp_path / "x")  # type: ignore[arg-type]
    for options, match in (
        ({"null_model": a_model(1)}, "null_model=None"),
        ({"decode": torch.tanh}, "decode=None"),
        ({"solver": {"name": "ddim"}}, "spacing"),
        ({"solver": {"name": "ddim", "spacing": "leading:N"}}, "eps must be 'network'"),
    ):
        with pytest.raises(ValueError, match=match):
            save_folder(a_model(**options), tmp_path / "x")
    learned = DiffusionModel(two_halves(out_channels=2), "cosine", "eps", "learned_range", 10, 10, (1, 8, 8))
    learned.solver = a_model().solver
    with pytest.raises(ValueError, match=r"variance must not be 'learned_range' where its solver is 'ddim'"):
        save_folder(learned, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_nothing_is_overwritten_unasked_and_stale_weights_go(folder: Path) -> None:
    before = contents(folder)
    refused(folder, "overwrite=True replaces it", by=lambda path: save_folder(a_model(), path))
    assert contents(folder) == before
    UNet2DModel.from_pretrained(folder / "unet").save_pretrained(folder / "unet", max_shard_size="20KB")
    (folder / "unet" / "notes.txt").write_text("mine")
    save_folder(a_model(), folder, overwrite=True)
    assert sorted(contents(folder)) == sorted([*FILES, "unet/notes.txt"])
    assert_same_model(load_folder(folder), a_model(provenance=load_folder(folder).provenance))
    (folder / "config.json").write_text("{}")
    refused(folder, "of another kind", by=lambda path: save_folder(a_model(), path, overwrite=True))


@pytest.mark.parametrize("target", ["pipe", "new/pipe"])
@pytest.mark.parametrize("broken", range(4))
def test_a_full_disk_changes_nothing(broken: int, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_folder(a_model(), tmp_path / "pipe")
    before, calls = contents(tmp_path), iter(range(100))

    def fsync(descriptor: int) -> None:
        if next(calls) == broken:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        refused(tmp_path / target, "No space left", by=lambda path: save_folder(a_model(1), path, overwrite=True))
    assert contents(tmp_path) == before and [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_a_folder_in_a_files_place_changes_nothing(tmp_path: Path) -> None:
    folder = save_folder(a_model(), tmp_path)
    (folder / "scheduler" / "scheduler_config.json").unlink()
    (folder / "scheduler" / "scheduler_config.json").mkdir()
    before = contents(folder)
    refused(folder, "Is a directory", by=lambda path: save_folder(a_model(1), path, overwrite=True))
    assert contents(folder) == before


def test_a_save_cut_short_leaves_one_whole_pipeline_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new, loaded = a_model(), a_model(1), []
    replace = os.replace
    for cut in range(len(FILES) + 2):
        folder = save_folder(old, tmp_path / str(cut))
        before = contents(folder)
        left = iter(range(100))

        def stop(src: Path, dst: Path, cut: int = cut, left: Iterator[int] = left) -> None:
            if next(left) == cut:
                raise KeyboardInterrupt
            replace(src, dst)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", stop)
            try:
                save_folder(new, folder, overwrite=True)
            except KeyboardInterrupt:
                # the index goes first, and comes back where it was all that had gone
                if cut <= 1:
                    assert contents(folder) == before
                else:
                    refused(folder, "neither model_index.json", by=load_folder)
                continue
        loaded.append(load_folder(folder))
    assert len(loaded) == 1 and torch.equal(loaded[0].network.mod.bias, new.network.mod.bias)
