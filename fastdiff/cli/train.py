"""fastdiff train, and fastdiff plot for its losses."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional

import fastdiff
from fastdiff.cli.arguments import DEFAULT_W, Device, Quiet, check_png, first_labels, option

if TYPE_CHECKING:
    import torch

    from fastdiff.diffusion_model import DiffusionModel
    from fastdiff.sampler import Sampler
    from fastdiff.training import TrainConfig

__all__ = ["Plot", "Train"]

BEFORE_A_SAVE = re.compile(r"log\.jsonl|tensorboard|samples-\d+\.png|\.tmp-.*")
RECIPE = Path(fastdiff.__file__).parent / "assets" / "digits" / "recipe.json"


@dataclass(frozen=True)
class Train:
    """Train a model by a recipe, from nothing or from where a run stopped."""

    out: Annotated[str, option("FOLDER", None, "-o")]
    """Takes model/ (a checkpoint; model-<decay>/ for further averages), samples-<step>.png, log.jsonl and
    state.safetensors, which --resume needs."""
    recipe: Annotated[str, option("FILE", "the bundled digits model's")] = str(RECIPE)
    """JSON: name, data (digits, or an .npz beside the recipe), network, diffusion or classifier, dtype, storage_dtype,
    training (the fields of fastdiff.training.TrainConfig)."""
    resume: bool = False
    """Go on with the run in --out; the recipe must be what it was."""
    iterations: Annotated[int | None, option("N", "the recipe's")] = None
    """Optimiser steps, over which the learning rate decays."""
    device: Device = None
    """cpu, cuda or cuda:N."""
    quiet: Quiet = False
    """No progress bar; print only the model's folder."""

    def run(self) -> int:
        """Reads the recipe, checks all of it, trains, and says how to sample from the result."""
        from fastdiff import checkpoint, training
        from fastdiff.placement import resolve_device

        folder = Path(self.out)
        # a run that ended before its first save leaves these
        left = [file.name for file in folder.iterdir()] if folder.is_dir() else []
        if not self.resume and not all(map(BEFORE_A_SAVE.fullmatch, left)):
            raise ValueError(f"--out {folder} is not empty; --resume goes on with a run, or give a new folder")
        recipe = training.read_recipe(self.recipe, self.iterations)
        data = training.load_data(recipe.data)
        model = checkpoint.fresh(recipe.sections, seed=recipe.config.seed, device=resolve_device(self.device))

        extra, draw = training.extra_of(model, data), None
        if isinstance(model, fastdiff.DiffusionModel):
            # what cannot be drawn should be known before hours of training
            _grid_sampler(model)

            def draw(step: int, averaged: Any) -> None:
                _sample_grid(averaged, folder / f"samples-{step}.png", recipe.config, data.labels, extra)

        try:
            training.train(
                model,
                data,
                recipe.config,
                folder,
                resume=self.resume,
                progress=not self.quiet,
                callback=draw,
                storage_dtype=recipe.storage_dtype,
            )
        except training.TrainingError as error:
            raise FloatingPointError(str(error)) from error
        result = shlex.quote(str(folder / "model"))
        to = f"--classifier {result}" if draw is None else result
        needs = " --low-res FILE.npz" if extra else ""
        print(folder / "model" if self.quiet else f"model   {folder / 'model'}\nsample  fastdiff sample {to}{needs}")
        return 0


@dataclass(frozen=True)
class Plot:
    """Draw the loss of one run, also by quarters of t, or of several."""

    runs: Annotated[Positional[tuple[str, ...]], option("RUN [RUN ...]")]
    """Folders of fastdiff train."""
    out: Annotated[str, option("FILE", None, "-o")] = "loss.png"
    """A .png."""
    force: bool = False
    """Replace what is there."""

    def run(self) -> int:
        """Draws, and prints the name of what was written."""
        from fastdiff.training.plot import plot_loss

        check_png("--out", self.out, self.force)
        if not self.runs:
            raise ValueError("RUN must name at least one folder of fastdiff train, got none")
        print(plot_loss(self.runs, self.out))
        return 0


def _grid_sampler(model: DiffusionModel) -> Sampler:
    return fastdiff.Sampler(model, steps=min(20, model.schedule.num_train_timesteps))


def _sample_grid(
    model: DiffusionModel, path: Path, config: TrainConfig, data_labels: torch.Tensor, extra: dict[str, Any]
) -> None:
    """Two images of each of the first ten classes, the same noise at every call; extra: of the data's images, whose
    labels are data_labels."""
    from fastdiff import images

    rows = first_labels(model.num_classes)
    texts = ["none"] if rows is None else rows
    labels = None if rows is None else [label for label in rows for _ in range(2)]
    # a null label that training never showed guides nowhere
    w = 0.0 if model.null_label is None or config.p_uncond == 0 else DEFAULT_W
    n, seed = 2 * len(texts), config.seed
    if extra:
        chosen = _images_of(labels, data_labels, n)
        extra = {name: tensor[chosen] for name, tensor in extra.items()}
    sampler = _grid_sampler(model)
    pixels = images.to_uint8(sampler(labels, w, num_images=n, seed=seed, extra=extra or None))
    metadata = {"model": model.name, "seed": seed, "labels": labels, "w": w, "steps": len(sampler.timesteps)}
    images.save_png(path, images.grid(pixels, len(texts), 2, texts), metadata, force=True)


def _images_of(labels: list[int] | None, data_labels: torch.Tensor, n: int) -> list[int]:
    """n indices into the data: of each label its images in turn, where it has none, or without labels, of any."""
    counts: dict[int | None, int] = {}
    chosen = []
    for label in [None] * n if labels is None else labels:
        found = [] if label is None else (data_labels == label).nonzero()[:, 0].tolist()
        among = found or range(len(data_labels))
        turn = counts.get(label, 0)
        counts[label] = turn + 1
        chosen.append(among[turn % len(among)])
    return chosen
