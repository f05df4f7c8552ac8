"""The report on a class-conditional model: fidelity against diversity over the strength of guidance."""

from __future__ import annotations

import copy
import datetime
import hashlib
import math
import time
from collections.abc import Sequence
from os import PathLike
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from fastdiff.checkpoint import load
from fastdiff.classifier import Classifier
from fastdiff.diffusion_model import VARIANCES, DiffusionModel
from fastdiff.evaluation.criteria import criteria
from fastdiff.evaluation.figures import mean_std
from fastdiff.evaluation.real import Labelled, Real
from fastdiff.evaluation.results import append_row, device_name, git_state, read_rows, results_file
from fastdiff.placement import resolve_device
from fastdiff.sampler import Model, Sampler

__all__ = ["DEFAULT_SEEDS", "DEFAULT_WEIGHTS", "evaluate", "table"]

# from the range of classifier-free guidance (2207.12598) table 1, with 1.5, which the accuracy criterion is about
DEFAULT_WEIGHTS = (0.0, 0.1, 0.3, 0.5, 1.0, 1.5, 2.0, 4.0)
DEFAULT_SEEDS = (0, 1, 2)
FIGURES = ("accuracy", "spread_ratio", "frechet", "near_copies", "nearest_ratio")
ROW_KIND, REAL_KIND = "evaluation", "evaluation-real"
ROW_FORMAT = 1  # raised when a figure changes its meaning: older rows are then measured again

Report = dict[str, Any]
Point = tuple[float, float, int]  # w, classifier_scale, seed


def evaluate(
    model: Model,
    real_train: Labelled,
    real_heldout: Labelled,
    *,
    weights: Sequence[float] = DEFAULT_WEIGHTS,
    images: int = 1000,
    seeds: Sequence[int] = DEFAULT_SEEDS,
    steps: int | str = "ddim25",
    solver: str = "ddim",
    variance: str | None = None,
    classifier: Classifier | str | PathLike[str] | None = None,
    classifier_scales: Sequence[float] = (),
    classifier_form: str | None = None,
    classifier_sha256: str | None = None,
    batch_size: int = 100,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    model_sha256: str | None = None,
    commit: str | None = None,
    dirty: bool | None = None,
    progress: bool = True,
    out: str | PathLike[str] | None = None,
) -> Report:
    """Measure a class-conditional model at each strength of guidance; returns a JSON-able report with verdicts.

    model: a DiffusionModel, a bundled model's name, or a checkpoint's folder.
    real_train, real_heldout: (images float (N, C, H, W) in [-1, 1], labels int (N,)); the judge learns from
        real_heldout only, the generated images are compared with real_train.
    weights: guidance weights w >= 0. images: how many at each w and seed; their labels run 0, 1, ..., 0, 1, ...
    seeds: at least two, for the error bars; each (w, seed) draws noise of its own.
    steps, solver, batch_size, device, dtype: as in `fastdiff.Sampler`; "ddim25" is an integer stride, 25 evaluations.
    variance: of ddpm's reverse step in place of the model's; None: the model's.
    classifier, classifier_scales, classifier_form: further points, at w = 0, guided by a classifier of noisy images at
        each of these scales > 0, as in `fastdiff.sample`.
    model_sha256, classifier_sha256: identify the weights. commit, dirty: of the code; commit=None asks git for both.
    out: a .jsonl file, or a folder for <date>-<commit>-<device>.jsonl, to which one row a (w, seed) is appended, and
        one of the real images. Rows found there (in any .jsonl of the folder) with the same model_sha256, data and
        settings are not sampled again; without model_sha256 none are reused.

    The report has model_sha256, settings, real, points (one a w: mean and std over seeds of each figure of
    `Real.measure`), classifier_points (one a scale), criteria and environment; `table` prints it, `plot.tradeoff` draws
    it. Raises ValueError or TypeError naming the argument, FloatingPointError where the model draws NaN.
    """
    w_list, seed_list = _checked_strengths("weights", weights, 0.0), _checked_seeds(seeds)
    given = not isinstance(classifier_scales, Sequence) or len(classifier_scales) > 0
    scale_list = _checked_strengths("classifier_scales", classifier_scales, math.ulp(0.0)) if given else []
    if bool(scale_list) != (classifier is not None):
        raise ValueError("classifier and classifier_scales must be given together, got only one")
    if classifier is None and classifier_form is not None:
        raise ValueError(f"classifier_form={classifier_form!r} needs a classifier, got None")
    options: dict[str, Any] = {
        **{"steps": steps, "solver": solver, "batch_size": batch_size, "device": device, "dtype": dtype}
    }
    sampler = Sampler(_with_variance(model, variance, solver, device), **options)
    if shapes := getattr(sampler.model.network, "extra_shapes", {}):
        raise ValueError(f"model must take images alone, its network takes {sorted(shapes)} of each, too")
    guided = None
    if classifier is not None:
        guided = Sampler(sampler.model, classifier=classifier, classifier_form=classifier_form, **options)
    num_classes = sampler.model.num_classes
    if num_classes is None:
        raise ValueError("model must be class-conditional, got one with num_classes=None")
    if sampler.model.null_label is None and any(w_list):
        raise ValueError("weights must be (0,) for a model with null_label=None: it cannot be guided")
    if isinstance(images, bool) or not isinstance(images, int) or images < 2 * num_classes:
        raise ValueError(f"images must be an integer of at least {2 * num_classes}, two a class, got {images!r}")
    real = Real(real_train, real_heldout, num_classes, sampler.model.image_shape)
    if commit is None:
        commit, dirty = git_state()
    name = device_name(sampler.device)
    environment = {
        "device": name,
        "backend": sampler.device.type,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "commit": commit,
        "dirty": dirty,
    }
    settings = {
        "data_sha256": real.digest(),
        "images": images,
        "steps": steps,
        "solver": solver,
        "dtype": str(sampler.dtype).removeprefix("torch."),
    }
    if solver == "ddpm":
        settings["variance"] = sampler.model.variance
    identity = {"kind": ROW_KIND, "format": ROW_FORMAT, "model_sha256": model_sha256, **settings}
    of_classifier = {
        "classifier_sha256": classifier_sha256,
        "classifier_form": None if guided is None else guided.table.classifier_form,
    }
    known = _known_rows(out, identity, of_classifier)
    labels = np.arange(images) % num_classes
    strengths = [*((w, 0.0) for w in w_list), *((0.0, scale) for scale in scale_list)]
    points = [(w, scale, seed) for w, scale in strengths for seed in seed_list]
    rows: dict[Point, Report] = {point: known[point] for point in points if point in known}
    reused = len(rows)
    file = None if out is None or reused == len(points) else results_file(out, commit, name)
    with tqdm(points, desc="evaluate", unit="point", initial=reused, disable=not progress) as bar:
        for point in points:
            if point in rows:
                continue
            w, scale, seed = point
            row = {**identity, "w": w, "seed": seed}
            if guided is not None and scale:
                row |= {"classifier_scale": scale, **of_classifier}
            row |= _draw_and_measure(guided if guided is not None and scale else sampler, real, labels, point)
            rows[point] = {**row, "batch_size": batch_size, **environment}
            if file is not None:
                append_row(file, rows[point])
            bar.update()

    real_figures = real.figures()
    data = {"kind": REAL_KIND, "format": ROW_FORMAT, "data_sha256": settings["data_sha256"]}
    if out is not None and not any(data.items() <= row.items() for row in read_rows(out, REAL_KIND)):
        append_row(file or results_file(out, commit, name), {**data, **real_figures, **environment})

    def summary(w: float, scale: float) -> dict[str, Any]:
        return {f: mean_std(np.array([rows[w, scale, seed][f] for seed in seed_list])) for f in FIGURES}

    by_weight = [{"w": w, **summary(w, 0.0)} for w in w_list]
    return {
        "model_sha256": model_sha256,
        "settings": {
            **settings,
            "nfe": len(sampler.table),
            "weights": w_list,
            "seeds": seed_list,
            **({} if guided is None else of_classifier),
        },
        "real": real_figures,
        "points": by_weight,
        "classifier_points": [{"classifier_scale": scale, **summary(0.0, scale)} for scale in scale_list],
        "criteria": criteria(real_figures, by_weight),
        # of the rows, which may be of other days and machines than this call
        "environment": {
            **{key: sorted({str(row.get(key)) for row in rows.values()}) for key in ("batch_size", *environment)},
            "seconds": sum(row["seconds"] for row in rows.values()),
            "points_sampled": len(rows) - reused,
            "points_reused": reused,
            "results": None if file is None else file.name,
        },
    }


def table(report: Report) -> str:
    """The report in Markdown: figures over w, the real ones under them, and the criteria with met or MISSED."""
    real, settings, environment = report["real"], report["settings"], report["environment"]
    halves = real["frechet_halves"]
    lines = [
        "| w | accuracy | spread / real | Fréchet distance | near copies | distance to nearest / real |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for p in [*report["points"], *report["classifier_points"]]:
        cells = [
            f"{p['w']:g}" if "w" in p else f"0, classifier_scale {p['classifier_scale']:g}",
            _percent(p["accuracy"]),
            _plus_minus(p["spread_ratio"]),
            _plus_minus(p["frechet"]),
            _percent(p["near_copies"]),
            _plus_minus(p["nearest_ratio"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        f"| real, {real['train_images']} training images | {_percent(real['accuracy'])} | 1 | 0 | - | - |",
        f"| real, {real['heldout_images']} held-out images | - | {real['heldout_spread_ratio']:.3f} | "
        f"{real['frechet_heldout']:.3f} | 1 % | 1 |",
        f"| real, halves of {halves['sizes'][0]} and {halves['sizes'][1]} | - | - | {_plus_minus(halves)} | - | - |",
        "",
        f"{settings['images']} images a point, {len(settings['seeds'])} seeds (mean ± standard deviation), "
        f"{settings['solver']} with steps={settings['steps']!r} ({settings['nfe']} evaluations), {settings['dtype']}, "
        f"{_guide(settings)}"
        f"compared with {real['train_images']} training images; measured on {', '.join(environment['device'])} "
        f"at commit {', '.join(environment['commit'])}{' (with changes)' if 'True' in environment['dirty'] else ''}.",
        "",
        "| criterion | measured | bound | |",
        "| --- | --- | --- | --- |",
    ]
    verdicts = {True: "met", False: "**MISSED**", None: "not measured"}
    for c in report["criteria"]:
        value = "-" if c["value"] is None else f"{c['value']:.3f} ± {c['error']:.3f}"
        lines.append(f"| {c['claim']} | {value} | {c['relation']} {c['bound']:.3f} | {verdicts[c['met']]} |")
    return "\n".join(lines) + "\n"


def _with_variance(model: Model, variance: str | None, solver: str, device: str | torch.device | None) -> Model:
    if variance is None:
        return model
    if variance not in VARIANCES or solver != "ddpm":
        raise ValueError(f"variance must be one of {list(VARIANCES)}, with solver='ddpm', got {variance!r}, {solver!r}")
    # a name's model goes where the sampler would load it
    model = copy.copy(model if isinstance(model, DiffusionModel) else load(model, device=resolve_device(device)))
    if variance == "learned_range" != model.variance:
        raise ValueError(f"variance='learned_range' needs a model that learned one, got {model.variance!r}")
    model.variance = variance
    return model


def _draw_and_measure(sampler: Sampler, real: Real, labels: np.ndarray, point: Point) -> Report:
    w, scale, seed = point
    # a hash, so that no two points share an image's noise, in whatever order they run
    name = f"{w!r} {seed}" + (f" {scale!r}" if scale else "")
    sampler_seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7])
    strength: dict[str, Any] = {"classifier_scale": scale} if scale else {}
    started = time.perf_counter()
    images = sampler(labels.tolist(), w, seed=sampler_seed, **strength).cpu()
    seconds = time.perf_counter() - started
    if not torch.isfinite(images).all():
        at = f", classifier_scale = {scale:g}" if scale else ""
        raise FloatingPointError(f"the model drew images that are not finite at w = {w:g}{at}, seed {seed}")
    return {
        **real.measure(images, labels),
        "sampler_seed": sampler_seed,
        "seconds": seconds,
        "images_per_second": len(images) / seconds,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _known_rows(out: str | PathLike[str] | None, identity: Report, of_classifier: Report) -> dict[Point, Report]:
    if out is None or identity["model_sha256"] is None:
        return {}
    known = {}
    for row in read_rows(out, ROW_KIND):
        scale = row.get("classifier_scale", 0.0)
        if scale and of_classifier["classifier_sha256"] is None:
            continue
        needed = identity | of_classifier if scale else identity
        if all(row.get(key) == value for key, value in needed.items()):
            known[row["w"], scale, row["seed"]] = row
    return known


def _guide(settings: Report) -> str:
    if "classifier_form" not in settings:
        return ""
    return f"classifier {(settings['classifier_sha256'] or 'unknown')[:12]} as {settings['classifier_form']}, "


def _plus_minus(figure: Report) -> str:
    return f"{figure['mean']:.3f} ± {figure['std']:.3f}"


def _percent(figure: Report) -> str:
    return f"{100 * figure['mean']:.1f} ± {100 * figure['std']:.1f} %"


def _checked_strengths(name: str, strengths: Sequence[float], least: float) -> list[float]:
    try:
        values = [float(value) for value in strengths]
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a sequence of numbers, got {strengths!r}") from None
    most = float(np.finfo(np.float32).max)
    if not values or len(set(values)) != len(values) or not all(least <= v <= most for v in values):
        bound = "above 0" if least else "of at least 0"
        raise ValueError(f"{name} must be different finite numbers {bound}, got {strengths!r}")
    return sorted(values)


def _checked_seeds(seeds: Sequence[int]) -> list[int]:
    if isinstance(seeds, int | str) or any(isinstance(s, bool) or not isinstance(s, int) for s in seeds):
        raise TypeError(f"seeds must be a sequence of integers, got {seeds!r}")
    if len(set(seeds)) != len(seeds) or len(seeds) < 2:
        raise ValueError(f"seeds must be at least two different integers, for the error bars, got {seeds!r}")
    return list(seeds)
