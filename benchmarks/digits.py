"""The digits model's figures: both kinds of guidance, what a variance is worth, and a classifier of noisy digits

    python -m benchmarks.digits tradeoff [--plot docs/tradeoff.png]     accuracy, spread, Fréchet distance by strength
    python -m benchmarks.digits variances --model FOLDER                steps x variances, as Improved DDPM's tables
    python -m benchmarks.digits classifier                              accuracy and cross entropy by t

Each prints Markdown and appends its rows to --out, where what is found is not measured again, so that a run that was
stopped goes on. The Fréchet distance falls with the number of images, so each point draws as many as were held out: how
far those are from the training images is then the floor.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from fastdiff import checkpoint, images
from fastdiff.canvas import require_matplotlib
from fastdiff.evaluation import bits_per_dimension, evaluate, plot, table
from fastdiff.evaluation.results import append_row, device_name, git_state, read_rows, results_file
from fastdiff.noise import image_seeds
from fastdiff.placement import resolve_device
from fastdiff.training import digits
from fastdiff_kernels import philox_normal

RESULTS = "benchmarks/results"
SAMPLERS: dict[str, dict[str, Any]] = {
    "DDIM-50": {"solver": "ddim", "steps": 50},
    "DDPM-250": {"solver": "ddpm", "steps": 250},
}
WEIGHTS = (0.0, 0.5, 1.5, 4.0)
SCALES = (1.0, 3.0, 10.0)
VARIANCES = ("fixed_small", "fixed_large", "learned_range")
CHAINS = (1000, 50)
TIMES = (0, 50, 100, 200, 300, 400, 500, 600, 700)
STREAM = 4  # noise that neither training nor the bound has drawn


def _real() -> dict[str, Any]:
    train, heldout = digits("train"), digits("heldout")
    return {"real_train": (train.images, train.labels), "real_heldout": (heldout.images, heldout.labels)}


def _options(given: argparse.Namespace) -> dict[str, Any]:
    names = ("batch_size", "dtype", "images", "out", "seeds")
    return {
        **{name: getattr(given, name) for name in names},
        "model_sha256": checkpoint.info(given.model)["sha256"],
    }


def tradeoff(given: argparse.Namespace) -> None:
    """Each sampler of SAMPLERS over w, and at w = 0 over the scale of a classifier"""
    classifier = checkpoint.BUNDLED_CLASSIFIERS.get(given.classifier, given.classifier)
    options = {
        **_real(),
        **_options(given),
        "classifier": given.classifier,
        "classifier_scales": SCALES,
        "classifier_sha256": checkpoint.info(classifier)["sha256"],
    }
    if given.plot is not None:
        # what cannot be drawn should be known before hours of sampling
        require_matplotlib()
        images.check_out(given.plot, force=True)
    reports = {}
    for name, sampler in SAMPLERS.items():
        if given.only in (None, name):
            reports[name] = evaluate(given.model, weights=WEIGHTS, **sampler, **options)
            print(f"{name}\n\n{table(reports[name])}", flush=True)
    if given.plot is not None:
        print(f"plot    {plot.tradeoff(reports, given.plot)}")


def variances(given: argparse.Namespace) -> None:
    """2102.09672's point: few steps need a learned variance, and so does the likelihood, which is always in float32"""
    # where a sampler of the name would run
    model = checkpoint.load(given.model, device=resolve_device(None))
    if model.variance != "learned_range":
        raise SystemExit(f"--model must have a learned variance, and that of {given.model} is {model.variance!r}")
    options = _real() | _options(given)
    pixels, labels = options["real_heldout"]
    print("| sampler | variance | accuracy | spread / real | Fréchet distance | bits / dimension |")
    print("| --- | --- | --- | --- | --- | --- |")
    for steps in CHAINS:
        bound = bits_per_dimension(
            model,
            pixels,
            labels,
            steps=None if steps == model.schedule.num_train_timesteps else steps,
            dtype="float32",
            out=given.out,
            model_sha256=options["model_sha256"],
        )
        bits = {each["variance"]: each["total"] for each in bound["bounds"]}
        for variance in VARIANCES:
            sampler: dict[str, Any] = {"solver": "ddpm", "steps": steps, "variance": variance}
            (point,) = evaluate(given.model, weights=(0.0,), **sampler, **options)["points"]
            _line(f"DDPM-{steps}", variance, point, f"{_figure(bits[variance], 'standard_error')}")
    few = CHAINS[-1]
    (point,) = evaluate(given.model, weights=(0.0,), solver="ddim", steps=few, **options)["points"]
    _line(f"DDIM-{few}", "none", point, "-")


def _line(sampler: str, variance: str, point: dict[str, Any], bits: str) -> None:
    cells = [_figure(point[name], "std") for name in ("accuracy", "spread_ratio", "frechet")]
    print(f"| {' | '.join([sampler, variance, *cells, bits])} |", flush=True)


def _figure(value: dict[str, float], error: str) -> str:
    return f"{value['mean']:.3f} ± {value[error]:.3f}"


def classifier(given: argparse.Namespace) -> None:
    """Of held-out digits at each of TIMES, which no sampler has drawn and training has not seen"""
    folder = checkpoint.BUNDLED_CLASSIFIERS.get(given.classifier, given.classifier)
    identity = {"kind": "classifier", "classifier_sha256": checkpoint.info(folder)["sha256"], "t": list(TIMES)}
    known = [row for row in read_rows(given.out, "classifier") if identity.items() <= row.items()]
    if not known:
        model, data = checkpoint.load_classifier(given.classifier), digits("heldout")
        seeds = torch.tensor(image_seeds(0, len(data)))
        found = []
        for t in TIMES:
            alpha, sigma = (float(value) for value in model.schedule.alpha_sigma(t))
            x = alpha * data.images + sigma * philox_normal(seeds, data.images.shape[1:], draw=t, stream=STREAM)
            with torch.no_grad():
                logits = model.network(x, torch.full((len(x),), float(t))).float()
            right = (logits.argmax(1) == data.labels).float()
            found.append((sigma / alpha, float(right.mean()), float(F.cross_entropy(logits, data.labels))))
        sigma_edm, accuracy, cross_entropy = np.array(found).T.tolist()
        device, (commit, dirty) = device_name(torch.device("cpu")), git_state()
        row = {
            **identity,
            "images": len(data),
            "sigma_edm": sigma_edm,
            "accuracy": accuracy,
            "cross_entropy": cross_entropy,
            **{"device": device, "commit": commit, "dirty": dirty, "torch": torch.__version__},
        }
        append_row(results_file(given.out, commit, device), row)
        known = [row]
    row = known[-1]
    print("| t | sigma / alpha | accuracy | cross entropy |\n| --- | --- | --- | --- |")
    for t, *values in zip(*(row[name] for name in ("t", "sigma_edm", "accuracy", "cross_entropy")), strict=True):
        print(f"| {t} | {values[0]:.2f} | {100 * values[1]:.1f} % | {values[2]:.3f} |")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.digits", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("figures", choices=("tradeoff", "variances", "classifier"))
    help_model = "a bundled name or a checkpoint's folder (digits); variances: one that learned its variance"
    parser.add_argument("--model", default="digits", help=help_model)
    parser.add_argument("--classifier", default="digits", help="a bundled name or a checkpoint's folder (digits)")
    parser.add_argument("--only", choices=list(SAMPLERS), help="tradeoff: one of the samplers")
    parser.add_argument("--images", type=int, default=300, help="at each point and seed (300, as many as held out)")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2), help="at least two (0 1 2)")
    parser.add_argument("--batch-size", type=int, default=100, help="images at a time (100)")
    parser.add_argument("--dtype", default="bfloat16", help="compute dtype (bfloat16)")
    parser.add_argument("--out", default=RESULTS, help=f"folder or .jsonl file of rows ({RESULTS})")
    parser.add_argument("--plot", help="tradeoff: a .png to draw")
    given = parser.parse_args(arguments)
    {"tradeoff": tradeoff, "variances": variances, "classifier": classifier}[given.figures](given)


if __name__ == "__main__":
    main()
