"""The command line: parses into frozen configs and calls the API; torch is imported by the commands, not by --help."""

from __future__ import annotations

import dataclasses
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

if TYPE_CHECKING:
    from fastdiff.diffusion_model import DiffusionModel
    from fastdiff.training import TrainConfig

__all__ = ["Doctor", "Evaluate", "Info", "Sample", "Train", "main", "parse_labels"]

DEFAULT_OUT = "samples.png"
DEFAULT_W = 1.5
MAX_LABELS = MAX_IMAGES = 10**6
RECIPE = Path(__file__).parent / "assets" / "digits" / "recipe.json"
RECIPE_KEYS = ("name", "data", "network", "diffusion", "dtype", "storage_dtype", "training")


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

        out = self.out if self.out is not None else _default_out(self.force)
        kind = images.check_out(out, self.force)
        if self.images_per_label < 1:
            raise ValueError(f"--images-per-label must be at least 1, got {self.images_per_label}")
        rows = None if self.labels is None else parse_labels(self.labels)
        facts = checkpoint.info(self.model)
        diffusion = facts["config"]["diffusion"]
        if self.labels is None:
            rows = _first_labels(diffusion["num_classes"])
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
            "steps": _steps(self.steps),
            "solver": self.solver,
            "eta": self.eta,
            "guidance_interval": self.guidance_interval,
        }
        sampler = fastdiff.Sampler(
            self.model, device=self.device, dtype=self.dtype, batch_size=self.batch_size, **options
        )
        if not self.quiet:
            print(f"seed    {seed}\ndevice  {sampler.device}\ndtype   {_plain(sampler.dtype)}", flush=True)
        began = time.perf_counter()
        pixels = images.to_uint8(sampler(labels, w, num_images=n, seed=seed, progress=not self.quiet)).cpu()
        seconds = time.perf_counter() - began

        metadata = {
            "model": facts["config"]["name"],
            "model_sha256": facts["sha256"],
            "seed": seed,
            "labels": labels,
            "num_images": n,
            "w": w,
            **options,
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
    """JSON: name, data (digits, or an .npz beside the recipe), network, diffusion, dtype, storage_dtype, training."""
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
        from fastdiff.placement import resolve_device, resolve_dtype

        folder = Path(self.out)
        # a run that ended before its first save leaves a log, and the beginning of a save
        left = [file.name for file in folder.iterdir()] if folder.is_dir() else []
        if not self.resume and [name for name in left if name != "log.jsonl" and not name.startswith(".tmp-")]:
            raise ValueError(f"--out {folder} is not empty; --resume goes on with a run, or give a new folder")
        recipe, device = _read_recipe(Path(self.recipe)), resolve_device(self.device)
        storage_dtype = resolve_dtype(recipe["storage_dtype"])
        config = _train_config(recipe["training"], self.iterations, self.recipe)
        data = recipe["data"]
        if data.endswith(".npz"):
            data = str(Path(self.recipe).parent / data)
        sections = {key: recipe[key] for key in ("name", "network", "diffusion", "dtype")}
        model = checkpoint.fresh(sections, seed=config.seed, device=device)

        def draw(step: int, averaged: DiffusionModel) -> None:
            _sample_grid(averaged, folder / f"samples-{step}.png", config.seed)

        try:
            trained = training.train(
                model,
                training.load_data(data),
                config,
                folder,
                resume=self.resume,
                progress=not self.quiet,
                callback=draw,
            )
        except training.TrainingError as error:
            raise FloatingPointError(str(error)) from error
        checkpoint.save(trained, folder / "model", overwrite=True, storage_dtype=storage_dtype)
        print(
            folder / "model"
            if self.quiet
            else f"model   {folder / 'model'}\nsample  fastdiff sample {folder / 'model'}"
        )
        return 0


@dataclass(frozen=True)
class Evaluate:
    """Measure fidelity and diversity over the guidance weight, or the likelihood, of real images."""

    model: ModelName = "digits"
    """A bundled model's name, or a checkpoint's folder."""
    likelihood: bool = False
    """Bits per dimension of --data instead: the variational bound, at every level of the chain."""
    data: Annotated[str | None, _option("DATA", "digits; with --likelihood digits:heldout")] = None
    """Real images: digits, digits:heldout, or an .npz."""
    heldout: Annotated[str | None, _option("DATA", "digits:heldout")] = None
    """Other real images, from which the judge learns."""
    weights: Annotated[tuple[float, ...] | None, _option("W [W ...]", "0 0.1 0.3 0.5 1 1.5 2 4")] = None
    """Guidance weights."""
    images: Annotated[int | None, _option("N", "1000; with --likelihood all")] = None
    """Images at each weight and seed; with --likelihood the first N of --data."""
    seeds: Annotated[tuple[int, ...] | None, _option("SEED [SEED ...]", "0 1 2; with --likelihood 0")] = None
    """At least two, for the error bars; with --likelihood one."""
    steps: Annotated[str | None, _option("STEPS", "ddim25; with --likelihood the whole chain")] = None
    """As in fastdiff sample."""
    solver: Annotated[str | None, _option("NAME", "ddim")] = None
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
    """Draw the trade-off, or the bits over the chain, into a .png."""
    force: bool = False
    """Replace the plot that is there."""
    quiet: Quiet = False
    """No progress bar."""

    def run(self) -> int:
        """Measures, and prints the table."""
        from fastdiff import checkpoint, evaluation, images
        from fastdiff.evaluation import plot

        if self.plot is not None:
            plot.require_matplotlib()
            if images.check_out(self.plot, self.force) != "png":
                raise ValueError(f"--plot must end in .png, got {self.plot}")
        options: dict[str, Any] = {
            "batch_size": self.batch_size,
            "device": self.device,
            "dtype": self.dtype,
            "model_sha256": checkpoint.info(self.model)["sha256"],
            "progress": not self.quiet,
            "out": self.out,
        }
        if self.steps is not None:
            options["steps"] = _steps(self.steps)
        report = self._bound(options) if self.likelihood else self._tradeoff(options)
        print(evaluation.likelihood_table(report) if self.likelihood else evaluation.table(report), end="")
        if self.plot is not None:
            draw = plot.bits_by_t if self.likelihood else plot.tradeoff
            print(f"\nplot    {draw(report, self.plot)}")
        return 0

    def _tradeoff(self, options: dict[str, Any]) -> dict[str, Any]:
        from fastdiff import evaluation, training

        data = "digits" if self.data is None else self.data
        heldout = "digits:heldout" if self.heldout is None else self.heldout
        real = [training.load_data(name) for name in (data, heldout)]
        for name in ("weights", "images", "seeds", "solver"):
            if getattr(self, name) is not None:
                options[name] = getattr(self, name)
        return evaluation.evaluate(self.model, *((each.images, each.labels) for each in real), **options)

    def _bound(self, options: dict[str, Any]) -> dict[str, Any]:
        from fastdiff import checkpoint, evaluation, training
        from fastdiff.placement import resolve_device, resolve_dtype

        for name in ("heldout", "weights", "solver"):
            if getattr(self, name) is not None:
                raise ValueError(f"--{name} must be left out with --likelihood, which no samples are drawn for")
        if self.seeds is not None and len(self.seeds) != 1:
            raise ValueError(f"--seeds must be one integer with --likelihood, got {' '.join(map(str, self.seeds))}")
        real = training.load_data("digits:heldout" if self.data is None else self.data)
        n = len(real) if self.images is None else self.images
        if not 2 <= n <= len(real):
            raise ValueError(f"--images must be in [2, {len(real)}], as many as {real.name} has, got {n}")
        model = checkpoint.load(self.model, device=resolve_device(self.device), dtype=resolve_dtype(self.dtype))
        labels = None if real.num_classes is None or model.num_classes is None else real.labels[:n]
        seed = 0 if self.seeds is None else self.seeds[0]
        return evaluation.bits_per_dimension(model, real.images[:n], labels, seed=seed, **options)


@dataclass(frozen=True)
class Info:
    """Show what a model is, or how a picture was made."""

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


def parse_labels(text: str) -> list[int] | None:
    """The labels that 0-9, 3,1,4 or 0-3,7 stand for, None for "none". Raises ValueError for anything else."""
    if text.strip().lower() == "none":
        return None
    labels: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})(?:-(\d{1,9}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            raise ValueError(f"--labels must be such as 0-9, 3,1,4 or 0-3,7, or none, got {text!r}")
        if len(labels) + last - first >= MAX_LABELS:
            raise ValueError(f"--labels must name at most {MAX_LABELS} labels, got {text!r}")
        labels += range(first, last + 1)
    return labels


def _steps(text: str) -> int | str:
    return int(text) if re.fullmatch(r"\d+", text) else text


def _default_out(force: bool) -> str:
    stem, number, name = Path(DEFAULT_OUT).stem, 1, DEFAULT_OUT
    while not force and Path(name).exists():
        number += 1
        name = f"{stem}-{number}.png"
    return name


def _first_labels(num_classes: int | None) -> list[int] | None:
    return None if num_classes is None else list(range(min(num_classes, 10)))


def _sample_grid(model: DiffusionModel, path: Path, seed: int) -> None:
    """Two images of each of the first ten classes, the same noise at every call."""
    from fastdiff import images

    rows = _first_labels(model.num_classes)
    texts = ["none"] if rows is None else rows
    labels = None if rows is None else [label for label in rows for _ in range(2)]
    w = 0.0 if model.null_label is None else DEFAULT_W
    sampler = fastdiff.Sampler(model, steps=min(20, model.schedule.num_train_timesteps))
    pixels = images.to_uint8(sampler(labels, w, num_images=2 * len(texts), seed=seed))
    metadata = {"model": model.name, "seed": seed, "labels": labels, "w": w, "steps": len(sampler.timesteps)}
    images.save_png(path, images.grid(pixels, len(texts), 2, texts), metadata, force=True)


def _read_recipe(path: Path) -> dict[str, Any]:
    try:
        recipe = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"recipe {path}: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(recipe, dict) or recipe.keys() != set(RECIPE_KEYS):
        got = sorted(recipe) if isinstance(recipe, dict) else type(recipe).__name__
        raise ValueError(f"recipe {path} must be an object with the keys {list(RECIPE_KEYS)}, got {got}")
    if not isinstance(recipe["data"], str):
        raise TypeError(f"recipe {path}: data must be a string, got {recipe['data']!r}")
    return recipe


def _train_config(fields: Any, iterations: int | None, path: str) -> TrainConfig:
    from fastdiff.training import TrainConfig

    known = {field.name for field in dataclasses.fields(TrainConfig)}
    given = dict(fields) if isinstance(fields, dict) else {"training": fields}
    if iterations is not None:
        given["iterations"] = iterations
    if (unknown := sorted(given.keys() - known)) or "iterations" not in given:
        raise ValueError(
            f"recipe {path}: training must have iterations and may have {sorted(known)}, got unknown {unknown}"
        )
    return TrainConfig(**given)


def _model_facts(info: dict[str, Any]) -> dict[str, Any]:
    config = info["config"]
    cards = sorted(Path(info["path"]).glob("*.md"))
    return {
        "name": config["name"],
        "path": info["path"],
        "card": str(cards[0]) if cards else None,
        "parameters": info["parameters"],
        "bytes": info["bytes"],
        "storage": info["storage"],
        "sha256": info["sha256"],
        "dtype": config["dtype"],
        **config["diffusion"],
        "network": config["network"],
        "provenance": config["provenance"],
    }


def _print_table(rows: dict[str, str]) -> None:
    width = max(map(len, rows), default=0)
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")


def _plain(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
