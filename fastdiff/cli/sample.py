"""fastdiff sample: pictures, and how they were made."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any

import fastdiff
from fastdiff.cli.arguments import (
    DEFAULT_W,
    Device,
    Dtype,
    ModelName,
    Quiet,
    classifier_facts,
    first_labels,
    free_name,
    low_res_facts,
    low_res_images,
    opened,
    option,
    parse_labels,
    parse_steps,
)

if TYPE_CHECKING:
    from fastdiff.training import Dataset

__all__ = ["Sample"]

IMAGES_PER_LABEL = 4
MAX_IMAGES = 10**6


@dataclass(frozen=True)
class Sample:
    """Draw images and write them to a file: without arguments, a labelled grid of handwritten digits."""

    model: ModelName = "digits"
    """A bundled model's name, a checkpoint's folder or file, or org/name of the Hub."""
    labels: Annotated[str | None, option("LABELS", "those of --low-res, or the model's first ten classes")] = None
    """Classes: 0-9, 3,1,4 or 0-3,7; or none, for images without a class."""
    images_per_label: Annotated[int | None, option("N", "4, or what --low-res holds", "-n")] = None
    """Images of each label; with --labels none, images in all."""
    w: Annotated[float | None, option("W", "1.5, or 0 where there is nothing to guide towards")] = None
    """Guidance weight: (1 + w) * eps_cond - w * eps_null; 0 guides nothing; guidance_scale elsewhere is 1 + w."""
    guidance_interval: Annotated[tuple[float, float] | None, option("LO HI", "everywhere")] = None
    """Guide only where LO < sigma / alpha <= HI."""
    classifier: Annotated[str | None, option("NAME|FOLDER", "none guides")] = None
    """A classifier of noisy images, whose gradient guides towards the labels, besides W."""
    classifier_scale: Annotated[float | None, option("SCALE", "1")] = None
    """What its gradient is multiplied by."""
    classifier_form: Annotated[str | None, option("FORM", "mean for ddpm, else score")] = None
    """mean moves a stochastic step by its variance times the gradient; score moves eps, in any solver."""
    low_res: Annotated[str | None, option("FILE", "only super-resolution needs one")] = None
    """An .npz (arr_0, uint8 N H W C) of pictures for a super-resolution model, one an image drawn, in order, with
    their labels (arr_1), unless --labels says others."""
    steps: Annotated[str, option("STEPS")] = "50"
    """N, ddimN, 10,15,20 (sections), leading:N, leading:N+K, linspace:N or trailing:N."""
    solver: Annotated[str | None, option("NAME", "the model's own, or ddim")] = None
    """One of fastdiff.SOLVERS; a wrong name lists them."""
    eta: Annotated[float | None, option("ETA", "0")] = None
    """Stochasticity of ddim, in [0, 1]."""
    seed: Annotated[int | None, option("SEED", "drawn, and printed")] = None
    """In [0, 2^63); the same seed draws the same picture again."""
    out: Annotated[str | None, option("PATH", "samples.png, or the first of samples-2.png, ... that is free", "-o")] = (
        None
    )
    """A .png (labelled grid), an .npz (arr_0 images, arr_1 labels), or a folder/ (one PNG an image)."""
    force: bool = False
    """Replace what is there."""
    device: Device = None
    """cpu, cuda or cuda:N."""
    dtype: Dtype = None
    """Compute dtype: float32, bfloat16, float16 or float64."""
    batch_size: Annotated[int | None, option("N", "all")] = None
    """Images at a time; changes no picture."""
    quiet: Quiet = False
    """No progress bar; print only the name of what was written."""

    def run(self) -> int:
        """Checks everything, the output first, then samples and writes."""
        from fastdiff import images
        from fastdiff.placement import resolve_device
        from fastdiff.training.data import npz

        out = self.out if self.out is not None else free_name(self.force)
        kind = images.check_out(out, self.force)
        if self.images_per_label is not None and self.images_per_label < 1:
            raise ValueError(f"--images-per-label must be at least 1, got {self.images_per_label}")
        rows = None if self.labels is None else parse_labels(self.labels)
        model, facts = opened(self.model)
        diffusion = facts["diffusion"]
        low_res = None if self.low_res is None else npz(self.low_res)
        columns = IMAGES_PER_LABEL if self.images_per_label is None else self.images_per_label
        if self.labels is None:
            rows = first_labels(diffusion["num_classes"])
            if low_res is not None and self.images_per_label is None:
                rows, columns = _arranged(low_res, rows)
        guide = classifier_facts(self.classifier, self.classifier_scale)
        texts = ["none"] if rows is None else rows
        channels, height, width = diffusion["image_shape"]
        decoded = getattr(model, "decode", None) is not None
        if channels not in (1, 3) and not decoded:
            raise ValueError(f"model {self.model}: pictures have 1 or 3 channels, got {channels}; use fastdiff.sample")
        if kind == "png" and not decoded:
            images.grid_size(height, width, len(texts), columns)
        n = columns * len(texts)
        if n > MAX_IMAGES:
            raise ValueError(f"--labels and --images-per-label ask for {n} images; at most {MAX_IMAGES} at a time")
        labels = None if rows is None else [label for label in rows for _ in range(columns)]
        w = self.w
        if w is None:
            w = DEFAULT_W if labels is not None and diffusion["null_label"] is not None else 0.0
        seed = secrets.randbelow(2**32) if self.seed is None else self.seed
        options: dict[str, Any] = {
            "steps": parse_steps(self.steps),
            "solver": self.solver,
            "eta": self.eta,
            "guidance_interval": self.guidance_interval,
        }
        sampler = fastdiff.Sampler(
            model,
            device=resolve_device(self.device),
            dtype=self.dtype,
            batch_size=self.batch_size,
            classifier=self.classifier,
            classifier_form=self.classifier_form,
            **options,
        )
        extra = low_res_images(self.low_res, low_res, self.model, sampler.model.network, n)
        if not self.quiet:
            print(f"seed    {seed}\ndevice  {sampler.device}\ndtype   {_plain(sampler.dtype)}", flush=True)
        began = time.perf_counter()
        drawn = sampler(
            *(labels, w),
            num_images=n,
            seed=seed,
            classifier_scale=guide.get("classifier_scale", 1.0),
            extra=extra,
            progress=not self.quiet,
        )
        pixels = images.to_uint8(drawn).cpu()
        seconds = time.perf_counter() - began

        metadata = {
            "model": facts["name"],
            "model_sha256": facts["sha256"],
            "seed": seed,
            "labels": labels,
            "num_images": n,
            "w": w,
            **options,
            "solver": self.solver or sampler.model.solver or "ddim",
            **(guide and guide | {"classifier_form": sampler.table.classifier_form}),
            **low_res_facts(self.low_res),
            "dtype": _plain(sampler.dtype),
            "device": sampler.device.type,
            "fastdiff": fastdiff.__version__,
        }
        if kind == "png":
            picture = images.grid(pixels, len(texts), columns, texts)
            images.save_png(out, picture, metadata, force=self.force)
        elif kind == "npz":
            images.save_npz(out, pixels, labels, metadata, force=self.force)
        else:
            single = [
                metadata
                | {"seed": [s], "labels": None if labels is None else [labels[i]], "num_images": 1}
                | ({} if low_res is None else {"low_res_row": i})
                for i, s in enumerate(fastdiff.image_seeds(seed, n))
            ]
            images.save_folder(out, pixels, labels, single, force=self.force)
        print(out if self.quiet else f"time    {seconds:.2f} s ({n / seconds:.1f} images/s)\nfile    {out}")
        return 0


def _plain(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _arranged(low_res: Dataset, rows: list[int] | None) -> tuple[list[int] | None, int]:
    """Labels of the rows and their length for all of the pictures: runs of one label where these have one length.

    rows: those without the pictures' labels, None for an unconditional model.
    """
    if rows is None:
        return None, len(low_res)
    if low_res.num_classes is None:
        return rows, IMAGES_PER_LABEL
    labels = low_res.labels.tolist()
    runs = [(label, len(list(run))) for label, run in groupby(labels)]
    if len({length for _, length in runs}) == 1:
        return [label for label, _ in runs], runs[0][1]
    return labels, 1
