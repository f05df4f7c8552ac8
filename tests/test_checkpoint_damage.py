"""Nothing damaged, foreign or lying is ever loaded as a checkpoint."""

from __future__ import annotations

import json
import math
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from checkpoints import (
    MODEL,
    PNG,
    assert_same_model,
    config_of,
    digits,
    files,
    header_of,
    put_weights,
    refused,
    state,
    weights_of,
    with_header,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastdiff.checkpoint import CheckpointError, load, save
from fastdiff.manifest import Manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(MODEL, tmp_path / "model")


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


@pytest.mark.parametrize("kind", ["missing", "folder", "fifo", "link to nothing", "link to a device", "link to itself"])
def test_weights_that_are_no_regular_file(kind: str, folder: Path, tmp_path: Path) -> None:
    weights = weights_of(folder)
    weights.rename(tmp_path / "elsewhere")
    if kind == "folder":
        weights.mkdir()
    elif kind == "fifo":
        os.mkfifo(weights)
    elif kind.startswith("link"):
        weights.symlink_to({"nothing": "nowhere", "device": "/dev/zero", "itself": weights.name}[kind.split()[-1]])
    refused(folder, weights.name)


def test_links_to_regular_files_are_followed_and_replaced_alone(folder: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for path in list(folder.iterdir()):
        path.symlink_to(path.rename(elsewhere / path.name))
    before = files(elsewhere)
    assert_same_model(load(folder), MODEL)
    save(digits(1), folder, overwrite=True)
    assert files(elsewhere) == before
    assert not [path for path in folder.iterdir() if path.is_symlink()]


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
    "prediction a list": (at("diffusion", "prediction", value=[]), "prediction must be one of"),
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


def test_a_long_value_makes_no_long_sentence(folder: Path) -> None:
    config = config_of(folder)
    config["network"]["channels"] = "a" * 10**5
    (folder / "config.json").write_text(json.dumps(config))
    assert len(refused(folder, "channels must be an int")) < 4000


def test_a_deep_config_is_a_value_error_of_the_manifest() -> None:
    with pytest.raises(ValueError, match="nested too deeply"):
        Manifest.parse(b"[" * 100_000)


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
