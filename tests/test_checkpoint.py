"""The native checkpoint: what is saved comes back bit for bit, and nothing damaged, foreign or lying is ever loaded."""

from __future__ import annotations

import hashlib
import json
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
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastdiff import checkpoint
from fastdiff.checkpoint import CheckpointError, atomic_write, info, load, save
from fastdiff.diffusion_model import DiffusionModel
from fastdiff.model import UNet, UNetConfig
from fastdiff.schedule import Schedule

PNG = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\x00\x01\x00\x00\x00\x01\x08\x00\x00\x00\x00:~\x9bU"
SHAPE = (1, 8, 8)


def unet(seed: int = 0, **fields: Any) -> UNet:
    small = dict(image_size=8, in_channels=1, out_channels=1, channels=4, channel_mult=(1,), num_blocks=1, groups=2)
    small |= dict(attention_resolutions=(), num_heads=1, head_channels=None, num_labels=11)
    network = UNet(UNetConfig(**{**small, **fields}))
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return network


def digits(seed: int = 0, **options: Any) -> DiffusionModel:
    return DiffusionModel(unet(seed), **{"schedule": "cosine", "image_shape": SHAPE, **options})


MODEL = digits(name="small", provenance={"steps": 7, "betas": [0.9, 0.999]})


def state(model: DiffusionModel) -> dict[str, torch.Tensor]:
    return model.network.state_dict()


def assert_same_model(loaded: DiffusionModel, saved: DiffusionModel) -> None:
    assert loaded.network.config == saved.network.config
    assert state(loaded).keys() == state(saved).keys()
    for key, tensor in state(saved).items():
        assert torch.equal(state(loaded)[key], tensor), key
        assert state(loaded)[key].dtype == tensor.dtype, key
    assert np.array_equal(loaded.schedule.betas, saved.schedule.betas)
    for attribute in ("prediction", "variance", "num_classes", "null_label", "image_shape", "clip_x0", "dtype", "name"):
        assert getattr(loaded, attribute) == getattr(saved, attribute), attribute
    assert loaded.provenance == saved.provenance


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_bytes())


def weights_of(folder: Path) -> Path:
    return folder / config_of(folder)["weights"]["file"]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def put_weights(folder: Path, data: bytes) -> None:
    """Other weights under an honest hash, as somebody who means harm would put them."""
    config, digest = config_of(folder), hashlib.sha256(data).hexdigest()
    weights_of(folder).unlink()
    config["weights"] = {"file": f"model-{digest[:12]}.safetensors", "sha256": digest, "bytes": len(data)}
    (folder / config["weights"]["file"]).write_bytes(data)
    (folder / "config.json").write_text(json.dumps(config))


def header_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def with_header(header: dict[str, Any], body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def refused(src: Path, *words: str, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(src, **options)
    sentence = str(caught.value)
    for word in (str(src), *words):
        assert word in sentence
    return sentence


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
    real, overtaken = checkpoint._parse, []

    def parse_then_save(text: bytes) -> Any:
        recipe = real(text)
        if not overtaken:
            overtaken.append(True)
            save(digits(1), folder, overwrite=True)
        return recipe

    monkeypatch.setattr(checkpoint, "_parse", parse_then_save)
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
    with pytest.raises(TypeError, match="model must be a DiffusionModel, got UNet"):
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


def lying_offsets(data: bytes) -> bytes:
    header, body = header_of(data)
    header["mod.bias"]["data_offsets"][1] += 4
    return with_header(header, body)


def lying_shape(data: bytes) -> bytes:
    header, body = header_of(data)
    header["mod.bias"]["shape"] = [2**62, 2**62]
    return with_header(header, body)


def lying_dtype(data: bytes) -> bytes:
    header, body = header_of(data)
    header["mod.bias"]["dtype"] = "F4"
    return with_header(header, body)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "truncated": lambda data: data[: len(data) // 2],
    "one byte short": lambda data: data[:-1],
    "a trailing byte": lambda data: data + b"\0",
    "header longer than the file": lambda data: (2**62).to_bytes(8, "little") + data[8:],
    "header not JSON": lambda data: data[:8] + b"\xff" + data[9:],
    "lying offsets": lying_offsets,
    "lying shape": lying_shape,
    "lying dtype": lying_dtype,
    "pickle": lambda data: pickle.dumps({"mod.bias": [0.0] * 100}),
    "png": lambda data: PNG,
}


@pytest.mark.parametrize("hash_is_honest", [False, True], ids=["old hash", "honest hash"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_weights_are_refused_even_under_an_honest_hash(damage: str, hash_is_honest: bool, folder: Path) -> None:
    data = DAMAGE[damage](weights_of(folder).read_bytes())
    if hash_is_honest:
        put_weights(folder, data)
        refused(folder, "not a valid safetensors file")
    else:
        weights_of(folder).write_bytes(data)
        refused(folder, weights_of(folder).name)
    save(MODEL, folder, overwrite=True)
    assert_same_model(load(folder), MODEL)


@pytest.mark.parametrize("kind", ["missing", "folder", "link", "fifo"])
def test_weights_that_are_no_regular_file(kind: str, folder: Path, tmp_path: Path) -> None:
    weights = weights_of(folder)
    weights.rename(tmp_path / "elsewhere")
    if kind == "folder":
        weights.mkdir()
    elif kind == "link":
        weights.symlink_to(tmp_path / "elsewhere")
    elif kind == "fifo":
        os.mkfifo(weights)
    refused(folder, weights.name)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nonfinite_weights_need_a_word(bad: float, tmp_path: Path) -> None:
    model = digits()
    state(model)["mod.bias"][3] = bad
    save(model, tmp_path / "m")
    refused(tmp_path / "m", "mod.bias", "allow_nonfinite=True")
    assert state(load(tmp_path / "m", allow_nonfinite=True))["mod.bias"][3].item() == pytest.approx(bad, nan_ok=True)


def test_weights_that_overflow_in_the_dtype_asked_for_are_refused(tmp_path: Path) -> None:
    model = digits()
    state(model)["mod.bias"][3] = 1e5
    save(model, tmp_path / "m")
    refused(tmp_path / "m", "mod.bias", dtype=torch.float16)
    assert_same_model(load(tmp_path / "m"), model)


def drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["mod.bias"]


def add(tensors: dict[str, torch.Tensor]) -> None:
    tensors["mod.extra"] = torch.zeros(1)


def reshape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["mod.bias"] = tensors["mod.bias"][None]


def integers(tensors: dict[str, torch.Tensor]) -> None:
    tensors["mod.bias"] = tensors["mod.bias"].to(torch.int32)


def rename_all(tensors: dict[str, torch.Tensor]) -> None:
    for key in list(tensors):
        tensors[f"module.{key}"] = tensors.pop(key)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop, ["missing keys", "mod.bias"]),
        (add, ["unknown keys", "mod.extra"]),
        (reshape, ["wrong shapes", "mod.bias"]),
        (integers, ["wrong dtypes", "mod.bias", "int32"]),
        (rename_all, ["missing keys", "unknown keys", "module.", "more"]),
    ],
    ids=["missing", "extra", "mis-shaped", "integers", "all renamed"],
)
def test_every_key_and_shape_must_be_the_networks(
    change: Callable[[dict[str, torch.Tensor]], None], words: list[str], folder: Path
) -> None:
    tensors = safetensors.torch.load_file(weights_of(folder))
    change(tensors)
    put_weights(folder, safetensors.torch.save(tensors))
    assert len(refused(folder, *words)) < 2000


def at(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        for key in path[:-1]:
            config = config[key]
        config[path[-1]] = value

    return change


def without(*path: str) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        for key in path[:-1]:
            config = config[key]
        del config[path[-1]]

    return change


HEX = "0" * 64
CONFIGS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "unknown key": (at("colour", value=1), "colour"),
    "unknown diffusion key": (at("diffusion", "rescale", value=1), "rescale"),
    "unknown network key": (at("network", "rescale", value=1), "rescale"),
    "unknown weights key": (at("weights", "url", value="x"), "url"),
    "missing key": (without("provenance"), "provenance"),
    "missing diffusion key": (without("diffusion", "clip_x0"), "clip_x0"),
    "missing network key": (without("network", "groups"), "groups"),
    "no format": (without("format"), "format"),
    "newer format": (at("format", value=2), "format must be 1, got 2"),
    "format true": (at("format", value=True), "format"),
    "unknown network type": (at("network", "type", value="fastdiff.model.UNet"), "network.type"),
    "network type a list": (at("network", "type", value=["unet"]), "network.type"),
    "network a list": (at("network", value=[]), "network"),
    "prediction": (at("diffusion", "prediction", value="epsilon"), "prediction"),
    "prediction a list": (at("diffusion", "prediction", value=[]), "unhashable"),
    "variance": (at("diffusion", "variance", value="fixed"), "variance"),
    "num_classes a string": (at("diffusion", "num_classes", value="10"), "num_classes"),
    "more classes than rows": (at("diffusion", "num_classes", value=12), "num_labels"),
    "null label without row": (at("diffusion", "null_label", value=11), "num_labels"),
    "image_shape": (at("diffusion", "image_shape", value=[1, 8]), "image_shape"),
    "clip_x0 an int": (at("diffusion", "clip_x0", value=1), "clip_x0"),
    "schedule a string": (at("diffusion", "schedule", value="cosine"), "schedule"),
    "schedule unknown": (at("diffusion", "schedule", "name", value="warp"), "warp"),
    "schedule too long": (at("diffusion", "schedule", "num_train_timesteps", value=10**12), "num_train_timesteps"),
    "schedule fractional": (at("diffusion", "schedule", "num_train_timesteps", value=10.0), "num_train_timesteps"),
    "betas of strings": (at("diffusion", "schedule", value={"betas": ["0.1"]}), "betas"),
    "betas above 1": (at("diffusion", "schedule", value={"betas": [0.1, 2.0]}), "betas"),
    "betas and a name": (at("diffusion", "schedule", "betas", value=[0.1]), "betas"),
    "dtype": (at("dtype", value="int8"), "dtype"),
    "name a number": (at("name", value=3), "name"),
    "provenance a list": (at("provenance", value=[]), "provenance"),
    "NaN": (at("provenance", value={"x": math.nan}), "NaN"),
    "weights elsewhere": (at("weights", "file", value="../model-000000000000.safetensors"), "weights.file"),
    "weights absolute": (at("weights", "file", value="/etc/passwd"), "weights.file"),
    "weights a pickle": (at("weights", "file", value="model.pt"), "weights.file"),
    "hash of other weights": (at("weights", "sha256", value=HEX), "weights.file"),
    "hash too short": (at("weights", "sha256", value="abc"), "weights.file"),
    "bytes negative": (at("weights", "bytes", value=-1), "bytes"),
    "bytes a string": (at("weights", "bytes", value="9"), "bytes"),
    "too many blocks to build": (at("network", "num_blocks", value=10**9), "num_blocks"),
    "too many channels to allocate": (at("network", "channels", value=2**40), ""),
    "more channels than 64 bits": (at("network", "channels", value=10**30), ""),
    "another width": (at("network", "channels", value=8), "wrong shapes"),
}


@pytest.mark.parametrize("fault", CONFIGS)
def test_a_config_that_is_not_exactly_right_is_refused(fault: str, folder: Path) -> None:
    change, word = CONFIGS[fault]
    config = config_of(folder)
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, word)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (b"", "config.json"),
        (b"[]", "format"),
        (b"null", "format"),
        (b"\xff\xfe{}", "config.json"),
        (b'{"format": 1, "format": 1}', "twice"),
        (b'{"format": 1e999}', "1e999"),
        (b'{"format": ' + b"9" * 5000 + b"}", "config.json"),
        (b"[" * 100_000, "config.json"),
        (b" " * (2**20 + 1), "bytes"),
        (pickle.dumps({"format": 1}), "config.json"),
    ],
    ids=["empty", "list", "null", "not utf-8", "key twice", "infinite", "huge integer", "deep", "huge", "pickle"],
)
def test_a_config_that_is_no_config(text: bytes, word: str, folder: Path) -> None:
    (folder / "config.json").write_bytes(text)
    refused(folder, word)


class Touch:
    """Unpickling one creates a file: what a malicious checkpoint would do, made visible."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.canary,)


def test_a_malicious_pickle_is_refused_and_not_executed(folder: Path, tmp_path: Path) -> None:
    canary, attack = tmp_path / "canary", tmp_path / "attack.pt"
    torch.save({"state": Touch(canary)}, attack)
    torch.load(attack, weights_only=False)
    assert canary.exists(), "the attack itself works"
    canary.unlink()

    refused(attack, "folder")
    for data in (attack.read_bytes(), pickle.dumps(Touch(canary))):
        put_weights(folder, data)
        refused(folder, "safetensors")
        weights_of(folder).unlink()
        save(MODEL, folder, overwrite=True)
        (folder / "config.json").write_bytes(data)
        refused(folder, "config.json")
        save(MODEL, folder, overwrite=True)
    assert not canary.exists()


MUTATIONS = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


@st.composite
def mutations(draw: st.DrawFn, size: int) -> Callable[[bytes], bytes]:
    """One edit: bytes replaced, put in or cut out anywhere."""
    start = draw(st.integers(0, size - 1))
    cut = draw(st.integers(0, 8))
    put = draw(st.binary(max_size=4) | st.sampled_from([b"0", b"1", b"-", b".", b"e", b'"', b",", b"null", b"true"]))
    return lambda data: data[:start] + put + data[start + cut :]


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [leaf for key, inner in items for leaf in leaves(inner, (*path, key))] or [path]


WORDS = ["linear", "cosine", "eps", "v", "x0", "fixed_large", "float32", "bfloat16", "unet", ""]


@st.composite
def other_values(draw: st.DrawFn, config: dict[str, Any]) -> Callable[[bytes], bytes]:
    """One value of the config replaced by another, mostly of its own kind."""
    path = draw(st.sampled_from([leaf for leaf in leaves(config) if leaf[0] != "weights"]))
    value = config
    for key in path:
        value = value[key]
    near: dict[type, Any] = {
        bool: st.just(not value),
        int: st.sampled_from([-1, 0, 1, 2, 10, 16, 500]),
        float: st.floats(0, 2),
    }
    other = draw(near.get(type(value), st.sampled_from(WORDS)) | st.sampled_from([None, False, 1, 0.5, [], "v"]))

    def edit(data: bytes) -> bytes:
        config = json.loads(data)
        at(*path, value=other)(config)
        return json.dumps(config).encode()

    return edit


def test_no_mutation_of_the_weights_is_ever_loaded(folder: Path) -> None:
    weights = weights_of(folder)
    data = weights.read_bytes()

    @MUTATIONS
    @given(edit=mutations(len(data)))
    def check(edit: Callable[[bytes], bytes]) -> None:
        weights.write_bytes(edit(data))
        if edit(data) == data:
            load(folder)
        else:
            refused(folder, weights.name)

    check()


@pytest.mark.parametrize("where", ["first", "header", "data", "last"])
def test_a_flipped_bit_is_detected(where: str, folder: Path) -> None:
    weights = weights_of(folder)
    data = bytearray(weights.read_bytes())
    data[{"first": 0, "header": 100, "data": len(data) // 2, "last": len(data) - 1}[where]] ^= 0b100
    weights.write_bytes(data)
    refused(folder, weights.name, "sha256")


def test_a_mutated_config_is_refused_or_taken_at_its_word(folder: Path, tmp_path: Path) -> None:
    """Where an edited config loads, what it says is what the model is: nothing is dropped, guessed or corrected."""
    text = (folder / "config.json").read_bytes()
    loaded = []

    @MUTATIONS
    @given(edit=mutations(len(text)) | other_values(json.loads(text)))
    def check(edit: Callable[[bytes], bytes]) -> None:
        (folder / "config.json").write_bytes(edit(text))
        try:
            model = load(folder)
        except CheckpointError as error:
            assert str(folder) in str(error)
            return
        assert config_of(save(model, tmp_path / "again", overwrite=True)) == config_of(folder)
        loaded.append(config_of(folder))

    check()
    assert any(config["diffusion"] != json.loads(text)["diffusion"] for config in loaded)


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
