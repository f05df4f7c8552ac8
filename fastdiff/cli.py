"""The command line: parses into frozen configs and calls the API; torch is imported by the commands, not by --help."""

from __future__ import annotations

import json
import re
import secrets
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from tyro.conf import Positional, arg, subcommand

import fastdiff
from fastdiff.arguments import classifier_facts, free_name, low_res_images, parse_labels, parse_steps

if TYPE_CHECKING:
    from fastdiff.diffusion_model import DiffusionModel

__all__ = ["Doctor", "Evaluate", "Info", "Plot", "Sample", "Train", "main", "parse_labels"]

DEFAULT_W = 1.5
MAX_IMAGES = 10**6
RECIPE = Path(__file__).parent / "assets" / "digits" / "recipe.json"


def _option(metavar: str, default: str | None = None, *aliases: str) -> Any:
    hint = None if default is None else f"(default: {default})"
    return arg(metavar=metavar, help_behavior_hint=hint, aliases=aliases)


ModelName = Annotated[Positional[str], _option("[MODEL]")]
Device = Annotated[str | None, _option("DEVICE", "a GPU if there is one")]
Dtype = Annotated[str | None, _option("DTYPE", "the model's, or what suits the device")]
Quiet = Annotated[bool, arg(aliases=["-q"])]


@dataclass(frozen=True)
class Sample:
    """Draw images and write them to a file: without arguments, a labelled grid of handwritten digits."""

    model: ModelName = "digits"
    """A bundled model's name, or a checkpoint's folder."""
    labels: Annotated[str | None, _option("LABELS", "the model's first ten classes")] = None
    """Classes: 0-9, 3,1,4 or 0-3,7; or none, for images without a class."""
    images_per_label: Annotated[int, _option("N", None, "-n")] = 4
    """Images of each label; with --labels none, images in all."""
    w: Annotated[float | None, _option("W", "1.5, or 0 where there is nothing to guide towards")] = None
    """Guidance weight: (1 + w) * eps_cond - w * eps_null; 0 guides nothing; guidance_scale elsewhere is 1 + w."""
    guidance_interval: Annotated[tuple[float, float] | None, _option("LO HI", "everywhere")] = None
    """Guide only where LO < sigma / alpha <= HI."""
    classifier: Annotated[str | None, _option("NAME|FOLDER", "none guides")] = None
    """A classifier of noisy images, whose gradient guides towards the labels, besides W."""
    classifier_scale: Annotated[float | None, _option("SCALE", "1")] = None
    """What its gradient is multiplied by."""
    classifier_form: Annotated[str | None, _option("FORM", "mean for ddpm, else score")] = None
    """mean moves a stochastic step by its variance times the gradient; score moves eps, in any solver."""
    low_res: Annotated[str | None, _option("FILE", "only super-resolution needs one")] = None
    """An .npz (arr_0, uint8 N H W C) of pictures for a super-resolution model, one an image drawn, in order."""
    steps: Annotated[str, _option("STEPS")] = "50"
    """N, ddimN, 10,15,20 (sections), leading:N, linspace:N or trailing:N."""
    solver: Annotated[str, _option("NAME")] = "ddim"
    """One of fastdiff.SOLVERS; a wrong name lists them."""
    eta: Annotated[float | None, _option("ETA", "0")] = None
    """Stochasticity of ddim, in [0, 1]."""
    seed: Annotated[int | None, _option("SEED", "drawn, and printed")] = None
    """In [0, 2^63); the same seed draws the same picture again."""
    out: Annotated[
        str | None, _option("PATH", "samples.png, or the first of samples-2.png, ... that is free", "-o")
    ] = None
    """A .png (labelled grid), an .npz (arr_0 images, arr_1 labels), or a folder/ (one PNG an image)."""
    force: bool = False
    """Replace what is there."""
    device: Device = None
    """cpu, cuda or cuda:N."""
    dtype: Dtype = None
    """Compute dtype: float32, bfloat16, float16 or float64."""
    batch_size: Annotated[int | None, _option("N", "all")] = None
    """Images at a time; changes no picture."""
    quiet: Quiet = False
    """No progress bar; print only the name of what was written."""

    def run(self) -> int:
        """Checks everything, the output first, then samples and writes."""
        from fastdiff import checkpoint, images

        out = self.out if self.out is not None else free_name(self.force)
        kind = images.check_out(out, self.force)
        if self.images_per_label < 1:
            raise ValueError(f"--images-per-label must be at least 1, got {self.images_per_label}")
        rows = None if self.labels is None else parse_labels(self.labels)
        facts = checkpoint.info(self.model)
        if "diffusion" not in facts["config"]:
            raise ValueError(f"model {self.model}: is a classifier, which draws no images; give a diffusion model")
        diffusion = facts["config"]["diffusion"]
        if self.labels is None:
            rows = _first_labels(diffusion["num_classes"])
        guide = classifier_facts(self.classifier, self.classifier_scale)
        columns, texts = self.images_per_label, ["none"] if rows is None else rows
        channels, height, width = diffusion["image_shape"]
        if channels not in (1, 3):
            raise ValueError(f"model {self.model}: pictures have 1 or 3 channels, got {channels}; use fastdiff.sample")
        if kind == "png":
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
            self.model,
            device=self.device,
            dtype=self.dtype,
            batch_size=self.batch_size,
            classifier=self.classifier,
            classifier_form=self.classifier_form,
            **options,
        )
        extra = low_res_images(self.low_res, self.model, sampler.model.network, n)
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
            "model": facts["config"]["name"],
            "model_sha256": facts["sha256"],
            "seed": seed,
            "labels": labels,
            "num_images": n,
            "w": w,
            **options,
            **(guide and guide | {"classifier_form": sampler.table.classifier_form}),
            **({} if self.low_res is None else {"low_res": self.low_res}),
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
                metadata | {"seed": [s], "labels": None if labels is None else [labels[i]], "num_images": 1}
                for i, s in enumerate(fastdiff.image_seeds(seed, n))
            ]
            images.save_folder(out, pixels, labels, single, force=self.force)
        print(out if self.quiet else f"time    {seconds:.2f} s ({n / seconds:.1f} images/s)\nfile    {out}")
        return 0


@dataclass(frozen=True)
class Train:
    """Train a model by a recipe, from nothing or from where a run stopped."""

    out: Annotated[str, _option("FOLDER", None, "-o")]
    """Takes model/ (a checkpoint), samples-<step>.png, log.jsonl and state.safetensors, which --resume needs."""
    recipe: Annotated[str, _option("FILE", "the bundled digits model's")] = str(RECIPE)
    """JSON: name, data (digits, or an .npz beside the recipe), network, diffusion or classifier, dtype, storage_dtype,
    training."""
    resume: bool = False
    """Go on with the run in --out; the recipe must be what it was."""
    iterations: Annotated[int | None, _option("N", "the recipe's")] = None
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
        # a run that ended before its first save leaves a log, and the beginning of a save
        left = [file.name for file in folder.iterdir()] if folder.is_dir() else []
        if not self.resume and [name for name in left if name != "log.jsonl" and not name.startswith(".tmp-")]:
            raise ValueError(f"--out {folder} is not empty; --resume goes on with a run, or give a new folder")
        recipe = training.read_recipe(self.recipe, self.iterations)
        data = training.load_data(recipe.data)
        model = checkpoint.fresh(recipe.sections, seed=recipe.config.seed, device=resolve_device(self.device))

        def draw(step: int, averaged: Any) -> None:
            extra = training.extra_of(averaged, data)
            _sample_grid(averaged, folder / f"samples-{step}.png", recipe.config.seed, extra)

        try:
            trained = training.train(
                model,
                data,
                recipe.config,
                folder,
                resume=self.resume,
                progress=not self.quiet,
                callback=draw if isinstance(model, fastdiff.DiffusionModel) else None,
            )
        except training.TrainingError as error:
            raise FloatingPointError(str(error)) from error
        checkpoint.save(trained, folder / "model", overwrite=True, storage_dtype=recipe.storage_dtype)
        to = "sample" if isinstance(trained, fastdiff.DiffusionModel) else "sample --classifier"
        print(
            folder / "model" if self.quiet else f"model   {folder / 'model'}\nsample  fastdiff {to} {folder / 'model'}"
        )
        return 0


@dataclass(frozen=True)
class Plot:
    """Draw the loss of one run, also by quarters of t, or of several."""

    runs: Annotated[Positional[tuple[str, ...]], _option("RUN [RUN ...]")]
    """Folders of fastdiff train."""
    out: Annotated[str, _option("FILE", None, "-o")] = "loss.png"
    """A .png."""
    force: bool = False
    """Replace what is there."""

    def run(self) -> int:
        """Draws, and prints the name of what was written."""
        from fastdiff import images
        from fastdiff.training.plot import plot_loss

        if images.check_out(self.out, self.force) != "png":
            raise ValueError(f"--out must end in .png, got {self.out}")
        if not self.runs:
            raise ValueError("RUN must name at least one folder of fastdiff train, got none")
        print(plot_loss(self.runs, self.out))
        return 0


@dataclass(frozen=True)
class Evaluate:
    """Measure fidelity and diversity over the guidance weight, against real images."""

    model: ModelName = "digits"
    """A bundled model's name, or a checkpoint's folder."""
    data: Annotated[str, _option("DATA")] = "digits"
    """Real images to compare with: digits, or an .npz."""
    heldout: Annotated[str, _option("DATA")] = "digits:heldout"
    """Other real images, from which the judge learns: digits:heldout, or an .npz."""
    weights: Annotated[tuple[float, ...], _option("W [W ...]")] = (0.0, 0.1, 0.3, 0.5, 1.0, 1.5, 2.0, 4.0)
    """Guidance weights."""
    images: Annotated[int, _option("N")] = 1000
    """Images at each weight and seed."""
    seeds: Annotated[tuple[int, ...], _option("SEED [SEED ...]")] = (0, 1, 2)
    """At least two, for the error bars."""
    steps: Annotated[str, _option("STEPS")] = "ddim25"
    """As in fastdiff sample."""
    solver: Annotated[str, _option("NAME")] = "ddim"
    """As in fastdiff sample."""
    batch_size: Annotated[int, _option("N")] = 100
    """Images at a time."""
    device: Device = None
    """cpu, cuda or cuda:N."""
    dtype: Dtype = None
    """Compute dtype: float32, bfloat16, float16 or float64."""
    out: Annotated[str | None, _option("PATH", "nothing is kept", "-o")] = None
    """A .jsonl file, or a folder for one, to append results to; what it holds already is not measured again."""
    plot: Annotated[str | None, _option("FILE", "no plot")] = None
    """Draw the trade-off into a .png."""
    force: bool = False
    """Replace the plot that is there."""
    quiet: Quiet = False
    """No progress bar."""

    def run(self) -> int:
        """Measures, and prints the table."""
        from fastdiff import checkpoint, evaluation, images, training

        if self.plot is not None:
            from fastdiff.evaluation import plot

            plot.require_matplotlib()
            if images.check_out(self.plot, self.force) != "png":
                raise ValueError(f"--plot must end in .png, got {self.plot}")
        real = [training.load_data(name) for name in (self.data, self.heldout)]
        report = evaluation.evaluate(
            self.model,
            (real[0].images, real[0].labels),
            (real[1].images, real[1].labels),
            weights=self.weights,
            images=self.images,
            seeds=self.seeds,
            steps=parse_steps(self.steps),
            solver=self.solver,
            batch_size=self.batch_size,
            device=self.device,
            dtype=self.dtype,
            model_sha256=checkpoint.info(self.model)["sha256"],
            progress=not self.quiet,
            out=self.out,
        )
        print(evaluation.table(report), end="")
        if self.plot is not None:
            print(f"\nplot    {plot.tradeoff(report, self.plot)}")
        return 0


@dataclass(frozen=True)
class Info:
    """Show what a model or classifier is, or how a picture was made."""

    path: Annotated[Positional[str], _option("[MODEL|PICTURE]")] = "digits"
    """A bundled model's name, a checkpoint's folder, or a .png or .npz that fastdiff sample wrote."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        """Prints facts; a model's weights are hashed, no network is built."""
        from fastdiff import checkpoint, images

        if Path(self.path).is_file() or self.path.lower().endswith((".png", ".npz")):
            facts = images.read_metadata(self.path)
        else:
            facts = _model_facts(checkpoint.info(self.path))
        if self.json:
            print(json.dumps(facts, indent=2))
        else:
            _print_table({key: v if isinstance(v, str) else json.dumps(v) for key, v in facts.items()})
        return 0


@dataclass(frozen=True)
class Doctor:
    """Look whether everything that sampling needs is there, and say what will be used."""

    model: ModelName = "digits"
    """A bundled model's name, or a checkpoint's folder."""
    device: Device = None
    """cpu, cuda or cuda:N."""

    def run(self) -> int:
        """Prints a line a finding; 1 where one of them would keep sampling from working."""
        from fastdiff.doctor import examine

        ok = True
        for finding in examine(self.model, self.device):
            print(f"{'ok ' if finding.ok else 'BAD'}  {finding.name:<9}  {finding.text}", flush=True)
            ok = ok and finding.ok
        return 0 if ok else 1


Command = (
    Annotated[Sample, subcommand("sample")]
    | Annotated[Train, subcommand("train")]
    | Annotated[Plot, subcommand("plot")]
    | Annotated[Evaluate, subcommand("evaluate")]
    | Annotated[Info, subcommand("info")]
    | Annotated[Doctor, subcommand("doctor")]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command: 0; 1 where doctor found a fault; 2 with one sentence on stderr for errors; 130 for Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if argv == ["--version"]:
        print(f"fastdiff {fastdiff.__version__}")
        return 0
    try:
        command = tyro.cli(
            Command,
            prog="fastdiff",
            description="Sample class-conditional diffusion models fast, and train them. --version prints the version.",
            args=argv,
            config=(tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone),
        )
        return command.run()
    except KeyboardInterrupt:
        print("fastdiff: interrupted", file=sys.stderr)
        return 130
    # CheckpointError is a ValueError; OverflowError and MemoryError come of absurd sizes
    except (ValueError, TypeError, FloatingPointError, OverflowError, OSError, MemoryError, RuntimeError) as error:
        # a RuntimeError is a bug, but for torch's out of memory, which has no class of its own on a CPU
        if isinstance(error, RuntimeError) and not re.search("out of memory|allocate memory", str(error)):
            raise
        print(f"fastdiff: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 2


def _first_labels(num_classes: int | None) -> list[int] | None:
    return None if num_classes is None else list(range(min(num_classes, 10)))


def _sample_grid(model: DiffusionModel, path: Path, seed: int, extra: dict[str, Any]) -> None:
    """Two images of each of the first ten classes, the same noise at every call; extra: of the data's images."""
    from fastdiff import images

    rows = _first_labels(model.num_classes)
    texts = ["none"] if rows is None else rows
    labels = None if rows is None else [label for label in rows for _ in range(2)]
    w = 0.0 if model.null_label is None else DEFAULT_W
    n = 2 * len(texts)
    extra = {name: tensor[[i % len(tensor) for i in range(n)]] for name, tensor in extra.items()}
    sampler = fastdiff.Sampler(model, steps=min(20, model.schedule.num_train_timesteps))
    pixels = images.to_uint8(sampler(labels, w, num_images=n, seed=seed, extra=extra or None))
    metadata = {"model": model.name, "seed": seed, "labels": labels, "w": w, "steps": len(sampler.timesteps)}
    images.save_png(path, images.grid(pixels, len(texts), 2, texts), metadata, force=True)


def _model_facts(info: dict[str, Any]) -> dict[str, Any]:
    config = info["config"]
    section = "classifier" if "classifier" in config else "diffusion"
    cards = sorted(Path(info["path"]).glob("*.md"))
    return {
        "name": config["name"],
        "kind": section,
        "path": info["path"],
        "card": str(cards[0]) if cards else None,
        "parameters": info["parameters"],
        "bytes": info["bytes"],
        "storage": info["storage"],
        "sha256": info["sha256"],
        "dtype": config["dtype"],
        **config[section],
        "network": config["network"],
        "provenance": config["provenance"],
    }


def _print_table(rows: dict[str, str]) -> None:
    width = max(map(len, rows), default=0)
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")


def _plain(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
