"""Pictures out of samples: 8-bit pixels, labelled grids, and files that say how they were made."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import stat
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from fastdiff.atomic import replace

__all__ = [
    "check_out",
    "grid",
    "grid_size",
    "read_metadata",
    "save_folder",
    "save_npz",
    "save_png",
    "to_uint8",
]

Pixels = torch.Tensor | npt.NDArray[np.uint8]

_KEY = "fastdiff"
_SMALLEST = 64  # side in pixels below which a person wants a picture enlarged
_PADDING = 4
_FONT_SIZE = 18
_BACKGROUND, _INK = (244, 244, 242), (40, 40, 40)
_MAX_PIXELS = 2**26  # Pillow warns of larger pictures when it opens them
_MAX_METADATA = 2**24
_MAX_NAME = 200  # of the 255 that file systems take, as temporary names are longer
# a killed run leaves the temporary ones
_OURS = re.compile(r"(\.tmp-\d+-[0-9a-f]{8}-)?\d{5,}(_label\d+)?\.png")


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """8-bit pixels, uint8 (N, H, W, C), of images (N, C, H, W) in [-1, 1]: floor(127.5 x + 128), clamped to 0..255.

    Exact on what 8-bit pixels u become as u / 127.5 - 1. Raises TypeError unless images is a floating-point tensor,
    ValueError for another shape, for channels other than 1 or 3, and for NaN.
    """
    if not isinstance(images, torch.Tensor) or not images.is_floating_point():
        got = images.dtype if isinstance(images, torch.Tensor) else type(images).__name__
        raise TypeError(f"images must be a floating-point tensor in [-1, 1], got {got}")
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images must be (N, C, H, W) with C = 1 or 3, got shape {tuple(images.shape)}")
    images = images.detach()
    if len(bad := torch.isnan(images).flatten(1).any(1).nonzero()):
        raise ValueError(f"images must be numbers, got NaN in image {int(bad[0])}; try dtype=float32")
    # half precisions cannot tell 255 levels apart
    exact = images if images.dtype == torch.float64 else images.float()
    return exact.mul(127.5).add_(128).floor_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def grid_size(height: int, width: int, rows: int, columns: int) -> tuple[int, int, int]:
    """(factor, height, width): by how much a grid enlarges each picture, and the grid's own size without its labels.

    Raises ValueError for a grid without cells or over 2^26 pixels.
    """
    if rows < 1 or columns < 1:
        raise ValueError(f"rows and columns must be at least 1, got {rows} and {columns}")
    factor = max(1, -(-_SMALLEST // max(height, width)))
    total = [count * (side * factor + _PADDING) + _PADDING for count, side in ((rows, height), (columns, width))]
    if total[0] * total[1] > _MAX_PIXELS:
        raise ValueError(
            f"a grid of {rows} x {columns} pictures of {height} x {width} has over {_MAX_PIXELS} pixels; "
            "write a folder or an .npz instead"
        )
    return factor, total[0], total[1]


def grid(images: Pixels, rows: int, columns: int, labels: Sequence[object] | None = None) -> Image.Image:
    """One RGB picture of up to rows * columns images, row by row, uint8 (N, H, W, 1 or 3); small ones enlarged.

    labels: the text left of each row. Raises ValueError or TypeError naming the argument.
    """
    pixels = _pixels(images)
    n, height, width, _ = pixels.shape
    factor, total_height, total_width = grid_size(height, width, rows, columns)
    if not 1 <= n <= rows * columns:
        raise ValueError(f"images must hold 1 to {rows} * {columns} pictures, got {n}")
    if labels is not None and len(labels) != rows:
        raise ValueError(f"labels must hold one text a row, got {len(labels)} for {rows} rows")
    font = ImageFont.load_default(_FONT_SIZE)
    texts = [] if labels is None else [str(label) for label in labels]
    gutter = round(max((font.getlength(text) for text in texts), default=-2 * _PADDING)) + 2 * _PADDING
    picture = Image.new("RGB", (gutter + total_width, total_height), _BACKGROUND)
    draw = ImageDraw.Draw(picture)
    for row, text in enumerate(texts):
        middle = _PADDING + row * (height * factor + _PADDING) + height * factor / 2
        draw.text((gutter, middle), text, fill=_INK, font=font, anchor="rm")
    for i, array in enumerate(pixels):
        row, column = divmod(i, columns)
        cell = _image(array).resize((width * factor, height * factor), Image.Resampling.NEAREST)
        left = gutter + _PADDING + column * (width * factor + _PADDING)
        picture.paste(cell.convert("RGB"), (left, _PADDING + row * (height * factor + _PADDING)))
    return picture


def check_out(path: str | os.PathLike[str], force: bool = False) -> str:
    """What will be written at path, "png", "npz" or "folder" (a final slash, or no suffix), once it is sure to work.

    Raises ValueError naming path and remedy: another suffix; a file that exists, or a folder that is not empty, without
    force; a folder that holds anything but such pictures, even with force; a parent that is missing or not writable.
    """
    text = os.fspath(path)
    target, suffix = Path(text), Path(text).suffix.lower()
    if not text.strip() or target.name.lower() in (".png", ".npz"):
        raise ValueError(f"{text!r} names no file; give a name such as samples.png")
    if len(os.fsencode(target.name)) > _MAX_NAME:
        raise ValueError(f"{text} cannot be written: its name is too long, at most {_MAX_NAME} bytes are allowed")
    try:
        status: os.stat_result | None = os.stat(target)
    except (FileNotFoundError, NotADirectoryError):
        status = os.lstat(target) if os.path.islink(target) else None
    except (OSError, ValueError) as error:
        raise ValueError(f"{text!r} cannot be written: {_reason(error)}") from None
    is_folder = status is not None and stat.S_ISDIR(status.st_mode)
    if text and (text.endswith(("/", os.sep)) or not suffix or (is_folder and suffix not in (".png", ".npz"))):
        if status is not None and not is_folder:
            raise ValueError(f"{text}: a folder of pictures was asked for, but a file is there; give another name")
        if is_folder:
            _check_folder(text, force)
        _check_writable(text, target if is_folder else target.resolve().parent)
        return "folder"
    if suffix not in (".png", ".npz"):
        raise ValueError(f"{text!r}: the name must end in .png or .npz, or in / for a folder with one PNG an image")
    if is_folder:
        raise ValueError(f"{text} is a folder; write {text}/ to put pictures into it, or give another name")
    if status is not None and not force:
        raise ValueError(f"{text} exists; --force (force=True) replaces it, or give another name")
    _check_writable(text, target.parent)
    return suffix[1:]


def save_png(
    path: str | os.PathLike[str], picture: Image.Image, metadata: Mapping[str, Any], *, force: bool = False
) -> None:
    """Writes a picture with its metadata (JSON in the text chunk "fastdiff"), whole or not at all.

    Raises ValueError like check_out, OSError where writing fails.
    """
    _check_kind(path, "png", force)
    replace(Path(path), _png(picture, metadata), durable=False)


def save_npz(
    path: str | os.PathLike[str],
    images: Pixels,
    labels: Sequence[int] | None,
    metadata: Mapping[str, Any],
    *,
    force: bool = False,
) -> None:
    """Writes arr_0 uint8 (N, H, W, C), arr_1 int64 (N,) unless labels is None, and metadata, a JSON string.

    Raises ValueError like check_out, TypeError for labels that are no integers, OSError where writing fails.
    """
    _check_kind(path, "npz", force)
    pixels = _pixels(images)
    arrays: dict[str, Any] = {"arr_0": pixels, "metadata": np.array(json.dumps(metadata))}
    if labels is not None:
        arrays["arr_1"] = np.array(_labels(labels, len(pixels)), dtype=np.int64)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    replace(Path(path), buffer.getvalue(), durable=False)


def save_folder(
    path: str | os.PathLike[str],
    images: Pixels,
    labels: Sequence[int] | None,
    metadata: Sequence[Mapping[str, Any]],
    *,
    force: bool = False,
) -> None:
    """Writes one PNG an image, 00000_label3.png and so on (00000.png without labels), each with its own metadata.

    The folder is made if need be; force replaces the pictures of an earlier run. Where writing fails (OSError) new
    names are removed again. Raises ValueError like check_out.
    """
    folder = Path(path)
    _check_kind(f"{folder}/", "folder", force)
    pixels = _pixels(images)
    if len(metadata) != len(pixels):
        raise ValueError(f"metadata must hold one mapping an image, got {len(metadata)} for {len(pixels)} images")
    numbers = [""] * len(pixels) if labels is None else [f"_label{k}" for k in _labels(labels, len(pixels))]
    made, names = not folder.exists(), [f"{i:05}{number}.png" for i, number in enumerate(numbers)]
    folder.mkdir(exist_ok=True)
    before, written = set(os.listdir(folder)), []
    try:
        for name, array, facts in zip(names, pixels, metadata, strict=True):
            replace(folder / name, _png(_image(array), facts), durable=False)
            written.append(folder / name)
        for old in before - set(names):
            (folder / old).unlink(missing_ok=True)
    except BaseException:
        with contextlib.suppress(OSError):
            for file in written:
                if file.name not in before:
                    file.unlink()
            if made:
                folder.rmdir()
        raise


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """How a .png or .npz of fastdiff's was made. Raises ValueError naming path for anything else."""
    try:
        if Path(path).suffix.lower() == ".npz":
            with zipfile.ZipFile(path) as archive:
                if archive.getinfo("metadata.npy").file_size > _MAX_METADATA:
                    raise ValueError("its metadata are too large")
            with np.load(path, allow_pickle=False) as arrays:
                text = str(arrays["metadata"])
        else:
            with Image.open(path, formats=["PNG"]) as picture:
                text = picture.info[_KEY]
        metadata = json.loads(text)
        if not isinstance(metadata, dict):
            raise ValueError("its metadata are no JSON object")
        return metadata
    except KeyError:
        raise ValueError(f"{path} holds no metadata of fastdiff's") from None
    # both libraries raise errors of many kinds on damaged files
    except Exception as error:
        raise ValueError(f"{path} is no picture or .npz of fastdiff's: {_reason(error)}") from error


def _pixels(images: Pixels) -> npt.NDArray[np.uint8]:
    if getattr(images, "dtype", None) not in (torch.uint8, np.dtype(np.uint8)):
        got = getattr(images, "dtype", type(images).__name__)
        raise TypeError(f"images must be uint8, got {got}; to_uint8 converts samples")
    array = images.numpy(force=True) if isinstance(images, torch.Tensor) else images
    if array.ndim != 4 or array.shape[-1] not in (1, 3):
        raise ValueError(f"images must be (N, H, W, C) with C = 1 or 3, got shape {array.shape}")
    return array


def _labels(labels: Sequence[int], n: int) -> list[int]:
    # they become part of file names
    if wrong := [label for label in labels if isinstance(label, bool) or not isinstance(label, int | np.integer)]:
        raise TypeError(f"labels must be integers, got {wrong[0]!r}")
    if len(labels) != n or any(label < 0 for label in labels):
        raise ValueError(f"labels must be {n} numbers of at least 0, one an image, got {list(labels)}")
    return [int(label) for label in labels]


def _image(array: npt.NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def _png(picture: Image.Image, metadata: Mapping[str, Any]) -> bytes:
    chunks, buffer = PngImagePlugin.PngInfo(), io.BytesIO()
    chunks.add_text(_KEY, json.dumps(metadata))
    picture.save(buffer, format="PNG", pnginfo=chunks)
    return buffer.getvalue()


def _check_kind(path: str | os.PathLike[str], kind: str, force: bool) -> None:
    if (found := check_out(path, force)) != kind:
        raise ValueError(f"{path}: this writes a {kind}, but the name is that of a {found}")


def _check_folder(text: str, force: bool) -> None:
    with _blaming(text):
        names = os.listdir(text)
    if foreign := sorted(name for name in names if not _OURS.fullmatch(name)):
        raise ValueError(f"{text} holds other files, such as {foreign[0]}; give a new folder")
    if names and not force:
        raise ValueError(f"{text} holds pictures already; --force (force=True) replaces them, or give another folder")


def _check_writable(text: str, folder: Path) -> None:
    if not folder.is_dir():
        raise ValueError(f"{text} cannot be written: there is no folder {folder}; make it first")
    with _blaming(text), tempfile.TemporaryFile(dir=folder):
        pass


@contextlib.contextmanager
def _blaming(text: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(f"{text} cannot be written: {_reason(error)}; give a path you may write to") from None


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
