"""Files of guided-diffusion's weights: read, refused, written; and the one door that opens them all"""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from checkpoints import PNG, refused
from test_convert_guided_diffusion import CHECKPOINTS, NETWORKS, flags_of, state_of

import fastdiff
from fastdiff import Classifier
from fastdiff.convert.state_files import SUFFIXES, read_model, read_state, save_file
from fastdiff.loading import load, load_classifier

NAME = "plain, convolutions"
FLAGS = flags_of(NETWORKS[NAME])


def published() -> dict[str, torch.Tensor]:
    """Zeros in the shapes of the smallest published network"""
    keys = CHECKPOINTS["128x128_classifier"]["keys"]
    return {key: torch.zeros(shape) for key, (shape, _) in keys.items()}


def torch_saved(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def written(folder: Path, data: bytes, name: str = "model.pt") -> Path:
    (folder / name).write_bytes(data)
    return folder / name


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return state_of(NAME)


def assert_loaded(path: Path, state: dict[str, torch.Tensor]) -> None:
    model = load(path, **FLAGS)
    back = save_file(model, path.with_name("back.safetensors"), overwrite=True)
    tensors, _ = read_state(back)
    assert tensors.keys() == state.keys()
    assert all(torch.equal(tensors[key], state[key]) for key in state)


def test_every_way_in_which_state_dicts_are_saved(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    for number, data in enumerate(
        (
            torch_saved(state),
            torch_saved(state, _use_new_zipfile_serialization=False),
            torch_saved({key: torch.nn.Parameter(value) for key, value in state.items()}),
        )
    ):
        assert_loaded(written(tmp_path, data, f"{number}.pt"), state)
    assert_loaded(written(tmp_path, safetensors.torch.save(state), "a.safetensors"), state)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_is_written_is_read_again(tmp_path: Path, suffix: str, state: dict[str, torch.Tensor]) -> None:
    model = load(written(tmp_path, torch_saved(state)), **FLAGS)
    path = save_file(model, tmp_path / "new" / f"out{suffix}")
    again, digest = read_state(path)
    assert all(torch.equal(again[key], state[key]) for key in state) and len(digest) == 64
    with pytest.raises(fastdiff.CheckpointError, match="is there already; overwrite=True"):
        save_file(model, path)
    save_file(model, path, overwrite=True)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_the_model_knows_its_file(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    path = written(tmp_path, torch_saved(state), "mine.pt")
    model = load(path, **FLAGS)
    assert model.name == "mine" and model.provenance["file"] == "mine.pt"
    assert model.provenance["sha256"] == read_state(path)[1]
    assert not model.network.training
    weights = [p for p in model.network.parameters() if p.ndim == 4]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)


def test_dtypes(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    path = written(tmp_path, torch_saved(state))
    for dtype in (torch.bfloat16, torch.float16):
        model = load(path, **FLAGS | {"dtype": dtype})
        assert (model.dtype, model.parameters()[0].dtype) == (dtype, dtype)
        assert read_model(path, **FLAGS | {"dtype": dtype}).parameters()[0].dtype == torch.float32
    judge = torch_saved({key: value.half() for key, value in published().items()})
    published_dtype = load_classifier(written(tmp_path, judge))
    assert (published_dtype.dtype, published_dtype.parameters()[0].dtype) == (torch.float32, torch.float32)
    with pytest.raises(ValueError, match="dtype must be one of"):
        load(path, **FLAGS | {"dtype": torch.int8})


def test_a_sampler_takes_a_file_too(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    path = written(tmp_path, torch_saved(state))
    with pytest.raises(fastdiff.CheckpointError, match=r"give image_size"):
        fastdiff.sample(path, num_images=1, steps=2)
    images = fastdiff.sample(load(path, **FLAGS), num_images=2, steps=2, seed=0)
    assert images.shape == (2, 3, 8, 8) and images.isfinite().all()


def test_classifiers_and_models_know_their_own_door(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    name = "classifier, adaptive"
    path = written(tmp_path, torch_saved(state_of(name)))
    assert isinstance(load_classifier(path, **flags_of(NETWORKS[name])), Classifier)
    refused(path, "load_classifier reads it", by=load, **flags_of(NETWORKS[name]))
    path = written(tmp_path, torch_saved(state))
    refused(path, "fastdiff.load reads it", by=load_classifier, **FLAGS)


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch executed",)


def zipped(data: bytes, *, compression: int = zipfile.ZIP_STORED, **changed: bytes) -> bytes:
    """An archive of torch.save again, entries that end in a name of `changed` replaced"""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, changed.get(name.split("/")[-1], old.read(name)))
    return buffer.getvalue()


def flipped(data: bytes, part: bytes) -> bytes:
    at = data.index(part)
    return data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :]


def damaged(state: dict[str, torch.Tensor]) -> dict[str, bytes]:
    whole = torch_saved(state)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(Evil()))
        file.writestr("archive/version", "3")
    return {
        "empty": b"",
        "truncated": whole[: len(whole) // 2],
        "one byte short": whole[:-1],
        "header alone": whole[:100],
        "PNG": PNG,
        "text": b"hello",
        "evil pickle": pickle.dumps(Evil()),
        "evil among weights": torch_saved({**state, "x": Evil()}),
        "evil archive": archive.getvalue(),
        "a whole module": torch_saved(torch.nn.Linear(2, 2)),
        "a list": torch_saved(list(state.values())),
        "nothing": torch_saved({}),
        "nested": torch_saved({"state_dict": state, "step": 3}),
        "numbers for keys": torch_saved(dict(enumerate(state.values()))),
        "sparse": torch_saved(state | {"out.2.bias": torch.zeros(3).to_sparse()}),
        "expanded": torch_saved(state | {"out.2.bias": torch.zeros(1).expand(3, 2**40)}),
        "on meta": torch_saved(state | {"out.2.bias": torch.zeros(3, device="meta")}),
        "a flipped bit": flipped(whole, state["out.2.bias"].numpy().tobytes()),
        "one byte more": whole + b"\0",
        "more after it": whole + whole[:100],
        "legacy, one byte more": torch_saved(state, _use_new_zipfile_serialization=False) + b"\0",
        "NaN": torch_saved(state | {"out.2.bias": torch.tensor([0.0, float("nan"), 0.0])}),
        "compressed": zipped(whole, compression=zipfile.ZIP_DEFLATED),
        "a long byte order": zipped(whole, byteorder=b"x" * 10**6),
        "missing key": torch_saved({key: value for key, value in state.items() if key != "out.2.bias"}),
    }


WORDS = {
    "evil pickle": "nothing was executed",
    "evil among weights": "nothing was executed",
    "evil archive": "nothing was executed",
    "nested": "not tensors are state_dict, step",
    "sparse": "dense tensors",
    "expanded": "dense tensors",
    "on meta": "dense tensors",
    "a flipped bit": "the checksum of",
    "one byte more": "something follows its end",
    "more after it": "damaged archive",
    "legacy, one byte more": "something follows the weights",
    "NaN": "allow_nonfinite=True",
    "compressed": "torch.save compresses nothing",
    "missing key": "missing keys: out.2.bias",
    "nothing": "state dict",
}


@pytest.mark.parametrize("kind", list(damaged(state_of(NAME))))
def test_damaged_and_evil_files_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, state: dict[str, torch.Tensor]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path, damaged(state)[kind])
    assert len(refused(path, WORDS.get(kind, ""), by=load, **FLAGS)) < 4000
    assert not (tmp_path / "executed").exists()
    assert_loaded(written(tmp_path, torch_saved(state)), state)


def test_a_small_archive_of_much_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: dict[str, torch.Tensor]
) -> None:
    bomb = zipped(torch_saved(state), compression=zipfile.ZIP_DEFLATED, version=bytes(10**8))
    path = written(tmp_path, bomb)
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("read"))
    refused(path, f"says that {len(bomb)} bytes hold 10", by=load, **FLAGS)


def test_names_are_text(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    path = written(tmp_path, torch_saved(state))
    for name in (3, False, ["x"]):
        refused(path, "name must be a str or None", by=load, **FLAGS, name=name)
    assert load(path, **FLAGS, name="mine").name == "mine"


@pytest.mark.parametrize("kind", ["empty", "truncated", "trailing", "lying header", "PNG", "pickle"])
def test_damaged_safetensors_are_refused_by_name(tmp_path: Path, kind: str, state: dict[str, torch.Tensor]) -> None:
    whole = safetensors.torch.save(state)
    data = {
        "empty": b"",
        "truncated": whole[:-1],
        "trailing": whole + b"\0",
        "lying header": (2**62).to_bytes(8, "little") + whole[8:],
        "PNG": PNG,
        "pickle": torch_saved(state),
    }[kind]
    refused(written(tmp_path, data, "a.safetensors"), "is not a valid safetensors file", by=load, **FLAGS)


def test_nonfinite_weights_load_when_asked_for(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    path = written(tmp_path, damaged(state)["NaN"])
    assert load(path, **FLAGS, allow_nonfinite=True).network.out["2"].bias.isnan().any()


def test_paths_that_are_no_weights(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere.pt", "no such", by=load)
    refused(written(tmp_path, b"", "weights.npz"), "must end in one of", by=load)
    (tmp_path / "folder.pt").mkdir()
    refused(tmp_path / "folder.pt", "no checkpoint here", by=load)
    os.mkfifo(tmp_path / "pipe.pt")
    refused(tmp_path / "pipe.pt", "this is a file", by=load)
    with pytest.raises(fastdiff.CheckpointError, match=r"must be a file, not a folder"):
        read_state(tmp_path / "pipe.pt")
    with pytest.raises(fastdiff.CheckpointError, match=r"nowhere\.pt"):
        read_state(tmp_path / "nowhere.pt")


def test_a_link_to_weights_is_followed(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    written(tmp_path, torch_saved(state), "blob.pt")
    (tmp_path / "model.pt").symlink_to("blob.pt")
    assert_loaded(tmp_path / "model.pt", state)


def test_what_cannot_be_written(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    model = load(written(tmp_path, torch_saved(state)), **FLAGS)
    with pytest.raises(fastdiff.CheckpointError, match="must end in one of"):
        save_file(model, tmp_path / "out.npz")
    with pytest.raises(ValueError, match="attention_order must be one of"):
        save_file(model, tmp_path / "out.pt", attention_order="old")
    model.provenance.clear()
    with pytest.raises(ValueError, match="attention_order must be 'legacy' or 'new'"):
        save_file(model, tmp_path / "out.pt")
    model.network = lambda x, t, y: x
    with pytest.raises(TypeError, match=r"model\.network must be a module"):
        save_file(model, tmp_path / "out.pt", attention_order="new")
    with pytest.raises(TypeError, match="model must be a DiffusionModel or a Classifier"):
        save_file(state, tmp_path / "out.pt", attention_order="new")  # type: ignore[arg-type]
    assert not (tmp_path / "out.pt").exists()


def test_flags_are_for_foreign_checkpoints_only() -> None:
    with pytest.raises(ValueError, match="attention_order must be left out: a checkpoint of fastdiff tells all"):
        load("digits", attention_order="new")
    assert load("digits", attention_order=None).name == "digits"
    with pytest.raises(ValueError, match="must be left out"):
        load_classifier("digits", schedule="cosine")
