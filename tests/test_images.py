"""fastdiff.images: pixels, grids, and files that are whole, checked beforehand and say how they were made."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff.images import check_out, grid, grid_size, read_metadata, save_folder, save_npz, save_png, to_uint8
from fastdiff.training import npz

FACTS = {"seed": 2**62 + 1, "labels": [3, 1], "w": 1.5, "name": "Ziffern äöü"}


def pixels(n: int = 2, side: int = 8, channels: int = 1) -> torch.Tensor:
    return torch.randint(0, 256, (n, side, side, channels), generator=torch.Generator().manual_seed(0)).byte()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("channels", [1, 3])
def test_to_uint8_undoes_the_scaling_of_all_256_levels(dtype: torch.dtype, channels: int) -> None:
    levels = torch.arange(256).view(1, 1, 16, 16).repeat(2, channels, 1, 1)
    back = to_uint8(levels.to(dtype) / 127.5 - 1)
    assert back.dtype == torch.uint8 and back.shape == (2, 16, 16, channels)
    assert torch.equal(back.permute(0, 3, 1, 2).long(), levels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_to_uint8_takes_the_nearest_level(dtype: torch.dtype) -> None:
    x = (torch.rand(3, 3, 9, 7, generator=torch.Generator().manual_seed(1)) * 2 - 1).to(dtype)
    error = to_uint8(x).permute(0, 3, 1, 2).double() - (x.double() + 1) * 127.5
    assert error.abs().max() <= 0.5 + 1e-4


def test_to_uint8_clamps_and_leaves_its_input_alone() -> None:
    x = torch.tensor([-torch.inf, -1.5, -1, 1, 1.5, torch.inf]).view(1, 1, 2, 3)
    kept = x.clone()
    assert to_uint8(x).flatten().tolist() == [0, 0, 0, 255, 255, 255]
    assert torch.equal(x, kept)
    assert to_uint8(torch.zeros(0, 3, 4, 4)).shape == (0, 4, 4, 3)


@pytest.mark.parametrize(
    ("images", "error", "sentence"),
    [
        (torch.zeros(1, 2, 4, 4), ValueError, "C = 1 or 3"),
        (torch.zeros(1, 4, 4), ValueError, r"\(N, C, H, W\)"),
        (torch.zeros(2, 1, 2, 2).index_fill(0, torch.tensor([1]), torch.nan), ValueError, "NaN in image 1"),
        (torch.zeros(1, 1, 4, 4, dtype=torch.uint8), TypeError, "floating-point"),
        (np.zeros((1, 1, 4, 4), np.float32), TypeError, "ndarray"),
    ],
    ids=["channels", "rank", "nan", "integers", "numpy"],
)
def test_to_uint8_refuses(images: torch.Tensor, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        to_uint8(images)


@pytest.mark.parametrize(("side", "factor"), [(8, 8), (16, 4), (28, 3), (64, 1), (256, 1)])
def test_small_pictures_are_enlarged_by_an_integer(side: int, factor: int) -> None:
    got, height, width = grid_size(side, side, 1, 1)
    assert got == factor
    assert height == width and 64 <= side * factor < height


@pytest.mark.parametrize("channels", [1, 3])
def test_every_cell_of_a_grid_is_its_picture(channels: int) -> None:
    images = pixels(5, 16, channels)
    factor, height, width = grid_size(16, 16, 2, 3)
    picture = grid(images, 2, 3)
    assert picture.size == (width, height)
    cell, step = 16 * factor, (width - 4) // 3
    for i, image in enumerate(images.numpy()):
        row, column = divmod(i, 3)
        left, top = 4 + column * step, 4 + row * step
        crop = np.asarray(picture.crop((left, top, left + cell, top + cell)))
        assert (crop[factor // 2 :: factor, factor // 2 :: factor] == image).all()
        assert (crop == crop[::factor, ::factor].repeat(factor, 0).repeat(factor, 1)).all()
    empty = np.asarray(picture)[4 + step :, 4 + 2 * step :]
    assert (empty == np.asarray(picture)[0, 0]).all() and empty.min() > 200


def test_labels_stand_left_of_their_rows() -> None:
    images = pixels(6, 16)
    plain, labelled = grid(images, 3, 2), grid(images, 3, 2, ["0", "label 1", ""])
    gutter = labelled.width - plain.width
    assert labelled.height == plain.height and gutter > 20
    assert (np.asarray(labelled)[:, gutter:] == np.asarray(plain)).all()
    bands = np.asarray(labelled.convert("L"))[4:, :gutter].reshape(-1, gutter)[: 3 * 68].reshape(3, 68, gutter)
    ink = [(band < 128).sum() for band in bands]
    assert ink[1] > ink[0] > 20 and ink[2] == 0
    assert (bands[:, :, 0] > 200).all() and (bands[:, 0] > 200).all(), "text is cut off"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((pixels(3), 1, 2), r"images must hold 1 to 1 \* 2"),
        ((pixels(0), 1, 2), "images must hold"),
        ((pixels(2), 1, 2, ["a", "b"]), "one text a row, got 2 for 1"),
        ((pixels(2), 0, 2), "rows and columns"),
        ((pixels(1), 10_000, 10_000), "folder or an .npz"),
    ],
    ids=["too-many", "none", "labels", "no-rows", "huge"],
)
def test_grid_refuses(arguments: tuple, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        grid(*arguments)
    with pytest.raises(TypeError, match="uint8"):
        grid(torch.zeros(1, 8, 8, 1), 1, 1)


@pytest.mark.parametrize(
    ("name", "kind"), [("a.png", "png"), ("a.PNG", "png"), ("a.npz", "npz"), ("a", "folder"), ("a.b/", "folder")]
)
def test_the_name_tells_what_is_written(tmp_path: Path, name: str, kind: str) -> None:
    assert check_out(f"{tmp_path}/{name}") == kind
    assert not list(tmp_path.iterdir()), "a check leaves nothing"


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("there.png", "exists; --force"),
        ("there.npz", "exists; --force"),
        ("dangling.png", "exists; --force"),
        ("there.png/", "a file is there"),
        ("plain", "a file is there"),
        ("folder.png", "is a folder"),
        ("pictures", "holds pictures already; --force"),
        ("other/", "holds other files, such as notes.txt"),
        ("a.jpg", r"must end in \.png or \.npz"),
        ("missing/a.png", "make it first"),
        ("missing/a/", "make it first"),
        ("x" * 300 + ".png", "cannot be written"),
        ("nul\0.png", "cannot be written"),
    ],
)
def test_an_output_that_cannot_be_is_refused_beforehand(tmp_path: Path, name: str, sentence: str) -> None:
    for file in ("there.png", "there.npz", "plain"):
        (tmp_path / file).write_text("kept")
    (tmp_path / "dangling.png").symlink_to("nowhere.png")
    for folder, file in (("folder.png", None), ("pictures", "00000_label3.png"), ("other", "notes.txt")):
        (tmp_path / folder).mkdir()
        if file:
            (tmp_path / folder / file).write_text("kept")
    with pytest.raises(ValueError, match=sentence) as caught:
        check_out(f"{tmp_path}/{name}")
    assert name.split("\0")[0].rstrip("/") in str(caught.value)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a file system that nobody can write to")
@pytest.mark.parametrize("name", ["a.png", "a.npz", "a/"])
def test_an_unwritable_folder_is_refused_beforehand(name: str) -> None:
    with pytest.raises(ValueError, match=f"/proc/self/{name} cannot be written: .*; give a path you may write to"):
        check_out(f"/proc/self/{name}")


def test_an_empty_name_is_refused() -> None:
    with pytest.raises(ValueError, match="names no file"):
        check_out("")


def test_force_replaces_files_but_no_foreign_folder(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("old")
    (tmp_path / "a").mkdir()
    assert check_out(tmp_path / "a.png", force=True) == "png"
    assert check_out(tmp_path / "a") == "folder", "an empty folder needs no force"
    (tmp_path / "a" / "notes.txt").write_text("kept")
    with pytest.raises(ValueError, match="notes"):
        check_out(tmp_path / "a", force=True)


def test_a_png_says_how_it_was_made(tmp_path: Path) -> None:
    picture = grid(pixels(), 1, 2)
    save_png(tmp_path / "a.png", picture, FACTS)
    assert read_metadata(tmp_path / "a.png") == FACTS
    assert (np.asarray(Image.open(tmp_path / "a.png")) == np.asarray(picture)).all()
    with pytest.raises(ValueError, match="exists"):
        save_png(tmp_path / "a.png", picture, FACTS)
    save_png(tmp_path / "a.png", picture, {"seed": 5}, force=True)
    assert read_metadata(tmp_path / "a.png") == {"seed": 5}
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("labels", [[3, 1], None], ids=["labels", "none"])
def test_an_npz_says_how_it_was_made_and_can_be_trained_on(tmp_path: Path, labels: list[int] | None) -> None:
    images = pixels(channels=3)
    save_npz(tmp_path / "a.npz", images, labels, FACTS)
    assert read_metadata(tmp_path / "a.npz") == FACTS
    data = npz(tmp_path / "a.npz")
    assert torch.equal(to_uint8(data.images), images)
    assert (data.labels.tolist(), data.num_classes) == ((labels, 4) if labels else ([0, 0], None))


def test_a_folder_holds_one_picture_an_image(tmp_path: Path) -> None:
    images, facts = pixels(3, channels=3), [{"seed": [i]} for i in range(3)]
    folder = tmp_path / "a"
    save_folder(folder, images, [3, 1, 3], facts)
    names = ["00000_label3.png", "00001_label1.png", "00002_label3.png"]
    assert sorted(os.listdir(folder)) == names
    for name, image, said in zip(names, images, facts, strict=True):
        assert (np.asarray(Image.open(folder / name)) == image.numpy()).all()
        assert read_metadata(folder / name) == said
    (folder / ".tmp-12-0123abcd-00000.png").write_text("left by a kill")
    with pytest.raises(ValueError, match="pictures already"):
        save_folder(folder, images, None, facts)
    save_folder(folder, images[:2], None, facts[:2], force=True)
    assert sorted(os.listdir(folder)) == ["00000.png", "00001.png"], "nothing of the run before is mixed in"


@pytest.mark.parametrize(
    ("labels", "error"),
    [(["../x", "y"], TypeError), ([1.0, 2.0], TypeError), ([True, False], TypeError), ([1], ValueError)],
    ids=["escape", "float", "bool", "length"],
)
def test_labels_that_are_no_numbers_never_become_names(tmp_path: Path, labels: list, error: type[Exception]) -> None:
    with pytest.raises(error, match="labels must be"):
        save_folder(tmp_path / "a", pixels(), labels, [{}, {}])
    with pytest.raises(error, match="labels must be"):
        save_npz(tmp_path / "a.npz", pixels(), labels, {})
    with pytest.raises(ValueError, match="one mapping an image"):
        save_folder(tmp_path / "a", pixels(), None, [{}])
    assert not list(tmp_path.iterdir())


def test_a_kind_that_the_name_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="writes a png, but the name is that of a npz"):
        save_png(tmp_path / "a.npz", grid(pixels(), 1, 2), {})


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = grid(pixels(), 1, 2)
    save_png(tmp_path / "a.png", picture, FACTS)
    old, replace = (tmp_path / "a.png").read_bytes(), os.replace

    def full(source: Path, target: Path) -> None:
        if "00001" in str(target) or "a.png" in str(target):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        save_png(tmp_path / "a.png", picture, {}, force=True)
    with pytest.raises(OSError, match="No space"):
        save_folder(tmp_path / "many", pixels(), None, [{}, {}])
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
    assert (tmp_path / "a.png").read_bytes() == old


def damaged(tmp_path: Path, how: str) -> Path:
    path = tmp_path / ("a.npz" if "npz" in how else "a.png")
    if how == "no-metadata-png":
        Image.new("L", (4, 4)).save(path)
    elif how == "jpeg":
        Image.new("L", (4, 4)).save(path, format="JPEG")
    elif how == "cut-png":
        save_png(path, grid(pixels(), 1, 2), FACTS)
        path.write_bytes(path.read_bytes()[:60])
    elif how == "no-metadata-npz":
        np.savez(path, arr_0=pixels())
    elif how == "pickle-npz":
        np.savez(path, metadata=np.array([{"a": 1}], dtype=object))
    elif how == "list-npz":
        np.savez(path, metadata=np.array("[1, 2]"))
    elif how == "bomb-npz":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("metadata.npy", bytes(2**24 + 1))
    elif how != "missing":
        path.write_bytes(b"" if how == "empty-npz" else b"words")
    return path


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("missing", "No such file"),
        ("words", "cannot identify"),
        ("jpeg", "cannot identify"),
        ("cut-png", "is no picture"),
        ("no-metadata-png", "holds no metadata"),
        ("empty-npz", "not a zip file"),
        ("no-metadata-npz", "holds no metadata"),
        ("pickle-npz", "allow_pickle"),
        ("list-npz", "no JSON object"),
        ("bomb-npz", "too large"),
    ],
)
def test_metadata_of_anything_else_is_an_error_that_names_the_file(tmp_path: Path, how: str, sentence: str) -> None:
    path = damaged(tmp_path, how)
    with pytest.raises(ValueError, match=f"{path}.*{sentence}"):
        read_metadata(path)
