"""What models are trained on: the digits and their split, and .npz files."""

from __future__ import annotations

import io
import math
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fastdiff.training import Dataset, digits, load_data, npz


def test_digits_split_is_stratified_disjoint_and_complete() -> None:
    parts = {split: digits(split, size=8) for split in ("train", "heldout", "all")}
    assert {split: len(part) for split, part in parts.items()} == {"train": 1497, "heldout": 300, "all": 1797}
    assert parts["heldout"].labels.bincount().tolist() == [30] * 10
    rows = {
        split: sorted(map(bytes, torch.cat([part.images.flatten(1), part.labels[:, None]], 1).numpy()))
        for split, part in parts.items()
    }
    assert sorted(rows["train"] + rows["heldout"]) == rows["all"]
    assert torch.equal(digits("heldout").labels, parts["heldout"].labels)


def test_digits_are_scikit_learns_images_in_unit_range() -> None:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    whole = digits("all", size=8)
    np.testing.assert_array_equal(whole.images.numpy().reshape(1797, 64), pixels.astype(np.float32) / 16 * 2 - 1)
    np.testing.assert_array_equal(whole.labels.numpy(), labels)
    resized = digits("all")
    assert resized.images.shape == (1797, 1, 16, 16)
    assert resized.images.aminmax() == (-1, 1)
    pooled = nn.functional.avg_pool2d(resized.images, 2)
    assert (pooled - whole.images).abs().mean() < 0.1
    assert "CC BY 4.0" in resized.licence


def test_digits_without_scikit_learn_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ValueError, match=r"fastdiff\[train\]"):
        digits()


@pytest.mark.parametrize(("arguments", "word"), [(("test",), "split"), (("train", 4), "size"), (("all", 8.0), "size")])
def test_digits_arguments(arguments: tuple[Any, ...], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        digits(*arguments)


def test_load_data_by_name(tmp_path: Path) -> None:
    assert len(load_data("digits")) == 1497
    assert len(load_data("digits:heldout")) == 300
    np.savez(tmp_path / "x.npz", np.zeros((2, 8, 8, 1), np.uint8))
    assert len(load_data(tmp_path / "x.npz")) == 2
    for unknown in ("mnist", "digits:test"):
        with pytest.raises(ValueError, match="must be"):
            load_data(unknown)


@pytest.mark.parametrize("channels", [1, 3])
def test_npz_inverts_rounding_to_uint8(tmp_path: Path, channels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 6, channels), dtype=np.uint8)
    pixels[0, 0, 0, 0], pixels[0, 0, 1, 0] = 0, 255
    np.savez_compressed(tmp_path / "x.npz", pixels, np.array([0, 3, 1, 1, 2], np.int32))
    data = npz(tmp_path / "x.npz")
    assert data.images.shape == (5, channels, 4, 6)
    assert data.images.aminmax() == (-1, 1)
    np.testing.assert_array_equal((data.images * 127.5 + 127.5).round().permute(0, 2, 3, 1).numpy(), pixels)
    assert data.labels.tolist() == [0, 3, 1, 1, 2]
    assert data.num_classes == 4


def test_npz_without_labels_is_unconditional(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", np.zeros((2, 4, 4, 3), np.uint8))
    assert npz(tmp_path / "x.npz").num_classes is None


IMAGES = np.zeros((2, 4, 4, 1), np.uint8)


def _saved(*arrays: Any, **named: Any) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, *arrays, **named)
    return file.getvalue()


def _bomb() -> bytes:
    file, header = io.BytesIO(), io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (2**40, 8, 8, 3)})
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("arr_0.npy", header.getvalue())
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        pytest.param(None, "No such file", id="missing"),
        pytest.param(b"", "zip", id="empty"),
        pytest.param(b"\x89PNG\r\n", "zip", id="png"),
        pytest.param(_saved(IMAGES)[:-9], "zip", id="truncated"),
        pytest.param(_bomb(), "", id="header-of-192-TiB"),
        pytest.param(_saved(images=IMAGES), "arr_0", id="no-arr_0"),
        pytest.param(_saved(IMAGES.astype(np.float32)), "uint8", id="float"),
        pytest.param(_saved(IMAGES[0]), "arr_0", id="one-image"),
        pytest.param(_saved(IMAGES[:0]), "not empty", id="no-images"),
        pytest.param(_saved(np.zeros((2, 1, 4, 4), np.uint8)), "1 or 3", id="NCHW"),
        pytest.param(_saved(IMAGES, np.array([0, 1, 2])), "2 integer labels", id="three-labels"),
        pytest.param(_saved(IMAGES, np.array([0.0, 1.0])), "integer labels", id="float-labels"),
        pytest.param(_saved(IMAGES, np.array([0, -1])), "labels", id="negative-label"),
        pytest.param(_saved(np.array([{}, {}], dtype=object)), "pickle", id="pickle"),
    ],
)
def test_npz_errors_name_the_file(tmp_path: Path, content: bytes | None, reason: str) -> None:
    path = tmp_path / "bad.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"bad\.npz.*{reason}"):
        npz(path)


def test_npz_refuses_what_unpacks_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez_compressed(tmp_path / "x.npz", np.zeros((100, 32, 32, 3), np.uint8))
    monkeypatch.setattr("fastdiff.training.data.MAX_BYTES", 10_000)
    with pytest.raises(ValueError, match=r"x\.npz.*limit"):
        npz(tmp_path / "x.npz")


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        pytest.param({"images": torch.zeros(2, 1, 4, 4).double()}, "images", id="float64"),
        pytest.param({"images": torch.zeros(0, 1, 4, 4)}, "images", id="empty"),
        pytest.param({"images": torch.full((2, 1, 4, 4), 1.5)}, "images", id="range"),
        pytest.param({"images": torch.full((2, 1, 4, 4), math.nan)}, "images", id="nan"),
        pytest.param({"labels": torch.zeros(3, dtype=torch.int64)}, "labels", id="count"),
        pytest.param({"labels": torch.tensor([0, 3])}, "labels", id="class"),
    ],
)
def test_dataset_is_checked(fields: dict[str, Any], word: str) -> None:
    valid = {"images": torch.zeros(2, 1, 4, 4), "labels": torch.zeros(2, dtype=torch.int64), "num_classes": 3}
    with pytest.raises((ValueError, TypeError), match=word):
        Dataset(**{**valid, **fields}, name="", source="", licence="")
