"""Data sets that fit in memory: the bundled handwritten digits, and npz files as `fastdiff sample` writes them."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

__all__ = ["Dataset", "digits", "load_data", "npz"]

SPLITS = ("train", "heldout", "all")
HELD_OUT_PER_CLASS = 30
SPLIT_SEED = 1998
MAX_BYTES = 8 * 2**30

DIGITS_SOURCE = (
    "Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak (1998), UCI Machine Learning Repository, "
    "doi:10.24432/C50P49; the 1,797 images of its test set, as in scikit-learn's load_digits"
)
DIGITS_LICENCE = "Creative Commons Attribution 4.0 International (CC BY 4.0)"


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images with labels, and where they come from.

    images: float32 (N, C, H, W) in [-1, 1]. labels: int64 (N,) in [0, num_classes); all 0 where num_classes is None.
    extra: what else a network takes of each image, tensors (N, ...) by name; training makes low_res itself.
    ValueError or TypeError names the field that cannot be.
    """

    images: torch.Tensor
    labels: torch.Tensor
    num_classes: int | None
    name: str
    source: str
    licence: str
    extra: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if not isinstance(images, torch.Tensor) or not isinstance(labels, torch.Tensor):
            raise TypeError(f"images and labels must be tensors, got {type(images).__name__}, {type(labels).__name__}")
        if images.dtype != torch.float32 or labels.dtype != torch.int64:
            raise TypeError(f"images must be float32 and labels int64, got {images.dtype} and {labels.dtype}")
        if images.ndim != 4 or images.numel() == 0:
            raise ValueError(f"images must be (N, C, H, W) and not empty, got shape {tuple(images.shape)}")
        if labels.shape != images.shape[:1]:
            raise ValueError(f"labels must have shape ({len(images)},), one an image, got {tuple(labels.shape)}")
        low, high = (float(value) for value in images.aminmax())
        if not (low >= -1 and high <= 1):
            raise ValueError(f"images must be in [-1, 1], got {low:g} to {high:g}")
        classes = self.num_classes or 1
        if int(labels.min()) < 0 or int(labels.max()) >= classes:
            raise ValueError(f"labels must be in [0, {classes}), got {int(labels.min())} to {int(labels.max())}")

        if not isinstance(self.extra, Mapping):
            raise TypeError(f"extra must be a mapping of names to tensors, got {type(self.extra).__name__}")
        for name, tensor in self.extra.items():
            if not isinstance(tensor, torch.Tensor) or tensor.shape[:1] != images.shape[:1]:
                got = getattr(tensor, "shape", type(tensor).__name__)
                raise ValueError(f"extra must hold tensors of {len(images)} rows, one an image, got {name}: {got}")

    def __len__(self) -> int:
        return len(self.images)


def digits(split: str = "train", size: int = 16) -> Dataset:
    """1,797 real handwritten digits, 10 classes: "train" 1,497, "heldout" 300 (30 a class), or "all".

    The originals are 8x8 with 17 levels; they are resized to (size, size), bicubic, and clamped to [-1, 1]. The split
    is fixed for good. ValueError without scikit-learn, which holds the data.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {list(SPLITS)}, got {split!r}")
    if isinstance(size, bool) or not isinstance(size, int) or size < 8:
        raise ValueError(f"size must be an integer of at least 8, the originals' size, got {size!r}")
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ValueError(
            "data='digits' needs scikit-learn, which holds the images; install it with: pip install 'fastdiff[train]'"
        ) from None
    pixels, labels = load_digits(return_X_y=True)
    if split != "all":
        # RandomState's stream is frozen by NumPy's compatibility policy, Generator's is not
        shuffled = np.random.RandomState(SPLIT_SEED).permutation(len(labels))
        held_out = np.concatenate([shuffled[labels[shuffled] == k][:HELD_OUT_PER_CLASS] for k in range(10)])
        chosen = np.isin(np.arange(len(labels)), held_out, invert=split == "train")
        pixels, labels = pixels[chosen], labels[chosen]
    images = torch.from_numpy(pixels.astype(np.float32)).view(-1, 1, 8, 8) / 8 - 1
    if size != 8:
        images = F.interpolate(images, size=(size, size), mode="bicubic", align_corners=False).clamp_(-1, 1)
    return Dataset(
        images=images,
        labels=torch.from_numpy(labels.astype(np.int64)),
        num_classes=10,
        name="digits" if split == "train" else f"digits:{split}",
        source=DIGITS_SOURCE,
        licence=DIGITS_LICENCE,
    )


def npz(path: str | PathLike[str]) -> Dataset:
    """The images that `fastdiff sample --out x.npz` writes.

    arr_0 is uint8 (N, H, W, 1 or 3); arr_1 the integer labels (N,), or absent. num_classes is the largest label + 1, or
    None without labels. Anything else is a ValueError that names the file; pickled objects are never loaded, nor more
    than 8 GiB.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            total = sum(entry.file_size for entry in archive.infolist())
        if total > MAX_BYTES:
            raise ValueError(f"unpacks to {total} bytes, over the limit of {MAX_BYTES}")
        with np.load(path, allow_pickle=False) as arrays:
            if "arr_0" not in arrays:
                raise ValueError(f"has no arr_0 with the images, only {sorted(arrays.files)}")
            pixels, labels = arrays["arr_0"], arrays.get("arr_1")
        return _from_arrays(pixels, labels, path)
    except (OSError, EOFError, MemoryError, ValueError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
        raise ValueError(f"data set {path}: {reason}") from error


def _from_arrays(pixels: np.ndarray, labels: np.ndarray | None, path: Path) -> Dataset:
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] not in (1, 3) or pixels.size == 0:
        raise ValueError(f"arr_0 must be uint8 (N, H, W, 1 or 3), not empty, got {pixels.dtype} {pixels.shape}")
    if labels is not None and (labels.dtype.kind not in "iu" or labels.shape != pixels.shape[:1]):
        raise ValueError(f"arr_1 must hold {len(pixels)} integer labels, got {labels.dtype} {labels.shape}")
    num_classes = None if labels is None else int(labels.max()) + 1
    if labels is None:
        labels = np.zeros(len(pixels), dtype=np.int64)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
    return Dataset(
        images=images.contiguous(),
        labels=torch.from_numpy(labels.astype(np.int64)),
        num_classes=num_classes,
        name=path.name,
        source=str(path),
        licence="unknown",
    )


def load_data(name_or_path: str | PathLike[str]) -> Dataset:
    """A data set by name ("digits", "digits:heldout", "digits:all") or by the path of an npz file."""
    name = str(name_or_path)
    if name == "digits":
        return digits()
    if name.startswith("digits:"):
        return digits(name.removeprefix("digits:"))
    if name.endswith(".npz"):
        return npz(name)
    raise ValueError(f"data must be 'digits', 'digits:heldout', 'digits:all' or the path of an .npz file, got {name!r}")
