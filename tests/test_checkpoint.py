"""The native checkpoint: what is saved comes back bit for bit, and a save that fails leaves what was there."""

from __future__ import annotations

import hashlib
import math
import os
import pickle
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import (
    MODEL,
    PNG,
    SHAPE,
    assert_same_model,
    config_of,
    digits,
    files,
    refused,
    state,
    unet,
    weights_of,
)

from fastdiff import checkpoint
from fastdiff.checkpoint import CheckpointError, atomic_write, info, load, save
from fastdiff.diffusion_model import DiffusionModel
from fastdiff.manifest import Manifest
from fastdiff.schedule import Schedule


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(MODEL, tmp_path / "model")


# What is saved comes back


OWN_BETAS = Schedule(np.linspace(1e-4, 0.3, 37) ** 1.5)
MODELS = {
    "named schedule": lambda: MODEL,
    "short schedule": lambda: digits(schedule=Schedule.named("linear", 50)),
    "own betas": lambda: digits(schedule=OWN_BETAS),
    "a name that lies": lambda: digits(schedule=Schedule(OWN_BETAS.betas, name="cosine")),
    "zero terminal snr": lambda: digits(schedule=Schedule(np.array([0.1, 0.5, 1.0])), prediction="v"),
    "learned variance": lambda: DiffusionModel(
        unet(out_channels=2), "linear", variance="learned_range", image_shape=SHAPE, clip_x0=False
    ),
    "unconditional": lambda: DiffusionModel(
        unet(num_labels=None), "linear", "x0", num_classes=None, null_label=None, image_shape=SHAPE
    ),
    "no null label": lambda: digits(null_label=None, dtype=torch.float32, name="zero — \u2603"),
    "two levels with attention": lambda: DiffusionModel(
        unet(channel_mult=(1, 1.5), attention_resolutions=(4,)), "cosine", image_shape=SHAPE
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    assert_same_model(load(save(model, tmp_path / "new" / "folder")), model)


def test_the_network_computes_the_same_in_eval_mode_and_channels_last(folder: Path) -> None:
    network = load(folder).network
    x, t, y = torch.randn(3, *SHAPE), torch.tensor([0.0, 10.5, 999.0]), torch.tensor([0, 9, 10])
    with torch.no_grad():
        assert torch.allclose(network(x, t, y), MODEL.network(x, t, y), atol=1e-4)
    assert not any(module.training for module in network.modules())
    convolutions = [p for p in network.parameters() if p.ndim == 4]
    assert convolutions and all(p.is_contiguous(memory_format=torch.channels_last) for p in convolutions)


F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


@pytest.mark.parametrize(
    ("storage", "recorded", "asked", "expected"),
    [
        (None, None, None, F32),
        (F16, None, None, F16),
        (F16, F32, None, F32),
        (BF16, F32, None, F32),
        (None, BF16, None, BF16),
        (F16, F32, F64, F64),
        (F64, BF16, F32, F32),
    ],
)
def test_dtypes_stored_recorded_and_asked_for(
    storage: torch.dtype | None,
    recorded: torch.dtype | None,
    asked: torch.dtype | None,
    expected: torch.dtype,
    tmp_path: Path,
) -> None:
    model = digits(dtype=recorded)
    loaded = load(save(model, tmp_path / "m", storage_dtype=storage), dtype=asked)
    for key, tensor in state(model).items():
        assert torch.equal(state(loaded)[key], tensor.to(storage or F32).to(expected)), key
        assert state(loaded)[key].dtype == expected
    assert loaded.dtype == (asked or recorded)


def test_float16_storage_halves_the_file(folder: Path, tmp_path: Path) -> None:
    half = save(MODEL, tmp_path / "half", storage_dtype=torch.float16)
    parameters = sum(tensor.numel() for tensor in state(MODEL).values())
    assert weights_of(folder).stat().st_size - weights_of(half).stat().st_size == pytest.approx(2 * parameters, abs=64)


def test_loading_leaves_the_random_generator_alone(folder: Path) -> None:
    before = torch.get_rng_state()
    load(folder)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_loaded_model_can_be_trained_and_does_not_reach_into_the_file(folder: Path) -> None:
    model = load(folder)
    with torch.no_grad():
        for parameter in model.network.parameters():
            assert parameter.requires_grad
            parameter.zero_()
    assert_same_model(load(folder), MODEL)


def test_saving_the_same_model_twice_writes_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    assert files(save(load(folder), tmp_path / "again")) == files(folder)


def test_info_tells_what_is_stored(folder: Path) -> None:
    facts, weights = info(folder), weights_of(folder)
    assert facts["path"] == str(folder)
    assert facts["parameters"] == sum(p.numel() for p in MODEL.network.parameters())
    assert facts["bytes"] == weights.stat().st_size
    assert facts["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert facts["storage"] == ["float32"]
    assert facts["config"] == config_of(folder)
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with pytest.raises(CheckpointError, match=re.escape(str(folder))):
        info(folder)


def test_a_bundled_name_wins_over_a_folder_only_as_a_plain_string(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(checkpoint.BUNDLED, "digits", save(digits(1), tmp_path / "bundled"))
    monkeypatch.chdir(tmp_path)
    save(digits(2), "digits")
    assert_same_model(load("digits"), digits(1))
    assert_same_model(load(Path("digits")), digits(2))
    assert_same_model(load("./digits"), digits(2))


# Saving over what is there


def test_a_checkpoint_is_replaced_only_with_overwrite(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    before = files(folder)
    with pytest.raises(CheckpointError, match="overwrite=True") as caught:
        save(digits(1), folder)
    assert str(folder) in str(caught.value) and files(folder) == before
    save(digits(1), folder, overwrite=True)
    assert_same_model(load(folder), digits(1))
    assert files(folder).keys() == {"notes.txt", "config.json", weights_of(folder).name}


def test_a_save_removes_what_killed_saves_left_and_nothing_else(folder: Path) -> None:
    left = [
        ".tmp-12-0123abcd-config.json",
        ".tmp-9-ffffffff-model-0123456789ab.safetensors",
        "model-0123456789ab.safetensors",
    ]
    kept = [".tmp-12-0123abcd-state.pt", ".tmp-notes", "model-best.safetensors", "model-0123456789ab.safetensors.bak"]
    for name in left + kept:
        (folder / name).write_bytes(b"?")
    save(digits(1), folder, overwrite=True)
    assert files(folder).keys() == {*kept, "config.json", weights_of(folder).name}


def test_a_folder_without_config_is_no_checkpoint_and_can_be_saved_into(tmp_path: Path) -> None:
    (tmp_path / "model-0123456789ab.safetensors").write_bytes(b"the first save was killed here")
    refused(tmp_path, "config.json")
    assert_same_model(load(save(MODEL, tmp_path)), MODEL)


CALLS = [("fsync", n) for n in range(4)] + [("replace", n) for n in range(2)]


@pytest.mark.parametrize("old", [True, False], ids=["over an old checkpoint", "into a new folder"])
@pytest.mark.parametrize(("call", "at"), CALLS, ids=[f"{call} {n}" for call, n in CALLS])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "ctrl-c"])
def test_a_save_that_fails_at_any_call_leaves_one_whole_checkpoint(
    call: str, at: int, error: BaseException, old: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "a" / "b"
    if old:
        save(MODEL, folder)
    before = files(folder) if old else {}
    counted, real = iter(range(100)), getattr(os, call)

    def failing(*args: Any) -> Any:
        if next(counted) == at:
            raise error
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        with pytest.raises(CheckpointError if isinstance(error, OSError) else KeyboardInterrupt) as caught:
            save(digits(1), folder, overwrite=True)
    if isinstance(error, OSError):
        assert str(folder) in str(caught.value) and "No space left" in str(caught.value)
        assert caught.value.__cause__ is error
    # The last sync comes after the new config has its name
    if (call, at) == ("fsync", 3):
        assert_same_model(load(folder), digits(1))
    elif old:
        assert files(folder) == before
    else:
        assert not (tmp_path / "a").exists()
    save(digits(2), folder, overwrite=True)
    assert_same_model(load(folder), digits(2))
    assert len(files(folder)) == 2


def test_a_load_overtaken_by_a_save_returns_the_new_checkpoint(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, overtaken = Manifest.parse, []

    def parse_then_save(text: bytes) -> Any:
        manifest = real(text)
        if not overtaken:
            overtaken.append(True)
            save(digits(1), folder, overwrite=True)
        return manifest

    monkeypatch.setattr(Manifest, "parse", parse_then_save)
    assert_same_model(load(folder), digits(1))


def test_loads_and_saves_at_the_same_time_see_whole_checkpoints(folder: Path) -> None:
    models, failures = [digits(seed) for seed in range(3)], []
    save(models[0], folder, overwrite=True)

    def saving(first: int) -> None:
        try:
            for i in range(12):
                save(models[(first + i) % 3], folder, overwrite=True)
        except Exception as error:
            failures.append(error)

    savers = [threading.Thread(target=saving, args=(first,)) for first in range(2)]
    for saver in savers:
        saver.start()
    keys = [state(model)["mod.weight"] for model in models]
    while any(saver.is_alive() for saver in savers):
        loaded = state(load(folder))["mod.weight"]
        assert any(torch.equal(loaded, key) for key in keys)
    assert not failures
    assert len(files(folder)) == 2


@pytest.mark.parametrize("network", [lambda x, t, y: x, torch.nn.Linear(1, 1), torch.nn.Sequential(unet())])
def test_only_known_networks_are_saved(network: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=rf"model.network.*UNet.*got {type(network).__name__}"):
        save(DiffusionModel(network, "cosine"), tmp_path / "m")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("model", "word"),
    [
        (lambda: digits(provenance={"loss": math.nan}), "provenance"),
        (lambda: digits(provenance={"model": object()}), "provenance"),
        (lambda: digits(provenance={1: "a", "1": "b"}), "twice"),
        (lambda: digits(provenance={"log": "x" * 2**20}), "provenance"),
        (lambda: digits(name=b"bytes"), "name"),
        (lambda: digits(num_classes=None, null_label=None), "num_labels"),
        (lambda: digits(image_shape=(3, 8, 8)), "in_channels"),
        (lambda: digits(variance="learned_range"), "out_channels"),
    ],
    ids=[
        "nan",
        "object",
        "keys that collide",
        "too long",
        "name",
        "no classes",
        "channels",
        "2C",
    ],
)
def test_what_load_would_refuse_is_not_saved(model: Callable[[], DiffusionModel], word: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=word) as caught:
        save(model(), tmp_path / "m")
    assert str(tmp_path / "m") in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("labels", [{"num_classes": 12}, {"null_label": 11}, {"num_classes": 11}], ids=str)
def test_a_model_needs_a_row_of_the_embedding_for_every_label(labels: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"num_classes=.* need 1\d labels, the network has 11"):
        digits(**{"num_classes": 10, "null_label": ...} | labels)


def test_save_checks_its_arguments(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="model must be a DiffusionModel or a Classifier, got UNet"):
        save(unet(), tmp_path / "m")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"storage_dtype must be one of .* got torch\.int8"):
        save(MODEL, tmp_path / "m", storage_dtype=torch.int8)
    with pytest.raises(TypeError, match=r"storage_dtype must be a torch\.dtype"):
        save(MODEL, tmp_path / "m", storage_dtype="float16")  # type: ignore[arg-type]
    large = digits()
    state(large)["mod.bias"][3] = 1e5
    with pytest.raises(ValueError, match=r"float16 cannot hold mod\.bias"):
        save(large, tmp_path / "m", storage_dtype=torch.float16)
    assert not list(tmp_path.iterdir())


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "m").write_text("a file")
    for target in (tmp_path / "m", tmp_path / "m" / "n"):
        with pytest.raises(CheckpointError, match=re.escape(str(target))):
            save(MODEL, target, overwrite=True)
    assert (tmp_path / "m").read_text() == "a file"


# What is refused


@pytest.mark.parametrize("device", ["tpu", "meta", "cpu:1", "cuda:99", "", 2.5])
def test_a_device_that_is_not_here(device: Any, folder: Path) -> None:
    with pytest.raises(ValueError, match=r"device must be one of \['cpu'.*got " + repr(str(device))):
        load(folder, device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_cuda(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"device must be one of \['cpu'\] here, torch sees no GPU; got 'cuda'"):
        load(folder, device="cuda")


@pytest.mark.parametrize(("dtype", "error"), [(torch.int32, ValueError), ("float32", TypeError)])
def test_a_dtype_that_cannot_be(dtype: Any, error: type[Exception], folder: Path) -> None:
    with pytest.raises(error, match="dtype must be"):
        load(folder, dtype=dtype)


def test_sources_that_are_no_checkpoint(tmp_path: Path) -> None:
    refused(tmp_path, "config.json")
    refused(tmp_path / "missing", "digits")
    for name, data in {"empty.pt": b"", "picture.png": PNG, "weights.pt": pickle.dumps({"a": 1})}.items():
        (tmp_path / name).write_bytes(data)
        refused(tmp_path / name, "folder")
    refused(tmp_path / ("n" * 300))
    refused(tmp_path / "null\0byte")
    with pytest.raises(TypeError, match="src must be a bundled name"):
        load(3)  # type: ignore[arg-type]


# atomic_write


def test_atomic_write_replaces_and_sweeps_its_own_temporaries(tmp_path: Path) -> None:
    for name in (".tmp-1-00000000-state.pt", ".tmp-1-00000000-other.pt"):
        (tmp_path / name).write_bytes(b"?")
    for data in (b"one", b"", bytes(range(256)) * 100):
        atomic_write(tmp_path / "state.pt", data)
        assert files(tmp_path) == {"state.pt": data, ".tmp-1-00000000-other.pt": b"?"}


def test_atomic_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    atomic_write(tmp_path / "state.pt", b"old")
    monkeypatch.setattr(os, "fsync", lambda descriptor: os.write(-1, b""))
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path / "state.pt"))):
        atomic_write(tmp_path / "state.pt", b"new")
    assert files(tmp_path) == {"state.pt": b"old"}
    with pytest.raises(CheckpointError, match="missing"):
        atomic_write(tmp_path / "missing" / "state.pt", b"new")
