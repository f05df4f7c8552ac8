"""Bits per dimension: the variational bound of a model on real images, every level of the chain evaluated."""

from __future__ import annotations

import datetime
import hashlib
import time
from collections.abc import Sequence
from os import PathLike
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from fastdiff.diffusion_model import VARIANCES, DiffusionModel
from fastdiff.evaluation.results import append_row, device_name, git_state, read_rows, results_file
from fastdiff.guidance import Labels, resolve_labels
from fastdiff.noise import image_seeds
from fastdiff.placement import Placed, device_of, dtype_of, resolve_device, resolve_dtype
from fastdiff.prediction import named_prediction
from fastdiff.schedule import Steps
from fastdiff.variational_bound import VariationalBound
from fastdiff_kernels import philox_normal

__all__ = ["bits_per_dimension", "likelihood_table"]

ROW_KIND = "likelihood"
ROW_FORMAT = 1  # raised when a figure changes its meaning: older rows are then measured again
FIGURES = ("variance", "total", "prior", "decoder", "terms")
# a Philox stream beside those of sampling and training: no image meets a noise that it was trained with
STREAM_LIKELIHOOD = 3
TABLE_PARTS = 10

Report = dict[str, Any]
Array = npt.NDArray[np.float64]


def bits_per_dimension(
    model: DiffusionModel,
    images: torch.Tensor,
    labels: Labels = None,
    *,
    steps: Steps | None = None,
    seed: int = 0,
    variances: Sequence[str] | None = None,
    batch_size: int = 100,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    model_sha256: str | None = None,
    commit: str | None = None,
    dirty: bool | None = None,
    progress: bool = True,
    out: str | PathLike[str] | None = None,
) -> Report:
    """The variational bound on the negative log-likelihood of 8-bit images, in bits per dimension; JSON-able.

    images: floating (N, C, H, W) in [-1, 1], N at least 2 for the error bars. They are rounded to 8 bits first, as
        `fastdiff.to_uint8` does: the likelihood is that of the rounded pixels.
    labels: one, or N of them, of a class-conditional model, whose bound is that of p(x | y); None is the null label.
    steps: None is the whole training chain; else the chain respaced as in `fastdiff.schedule.timesteps`, whose bound is
        usually looser. The network runs once for each image and level.
    seed: of the noise. Each image draws one noise a level, from a seed of its own, whatever the batch.
    variances: of the reverse steps, any of "fixed_small", "fixed_large" and, of a model that has it, "learned_range",
        all from the same outputs of the network; None is all that the model has.
    batch_size, device: as in `fastdiff.Sampler`.
    dtype: of the network; None is float32 on every device, as coarser numbers cost bits, or float64 where parameters
        are. Terms are computed in float32, where dtype is float64 in that.
    model_sha256, commit, dirty, out: as in `evaluate`: rows appended, one a variance; those found with the same model,
        data and settings are not measured again.

    The report has model_sha256, settings, environment, and over the chain's times t, ascending, the means over images
    eps_mse, of the network's own eps (the loss of DDPM equation 14), and x0_mse, of the predicted x0 as it is clipped;
    and bounds, one a variance: total (mean, and its standard error over images), prior, decoder (the term at the
    first t) and terms (one a t; they and the prior sum to the total). `likelihood_table` prints it, `plot.bits_by_t`
    draws it.

    Raises ValueError or TypeError naming the argument, FloatingPointError where a term is not finite.
    Source: DDPM (2006.11239) equations 5 and 13, Improved DDPM (2102.09672) section 3.
    """
    if not isinstance(model, DiffusionModel):
        raise TypeError(f"model must be a DiffusionModel, got {type(model).__name__}; fastdiff.load gives one")
    if shapes := getattr(model.network, "extra_shapes", {}):
        raise ValueError(f"model must take images alone, its network takes {sorted(shapes)} of each, too")
    pixels = _eight_bits(images, model.image_shape)
    y = _labels(labels, model, len(pixels))
    seeds = torch.tensor(image_seeds(seed, len(pixels)))
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be an integer of at least 1, got {batch_size!r}")
    chosen = _checked_variances(variances, model)
    place, network_dtype = _placed(model, device, dtype)
    wide = torch.float64 if network_dtype == torch.float64 else torch.float32
    options: dict[str, Any] = {"steps": steps, "clip_x0": model.clip_x0, "device": place.device, "dtype": wide}
    bounds = {each: VariationalBound(model.schedule, model.prediction, each, **options) for each in chosen}
    if commit is None:
        commit, dirty = git_state()
    name = device_name(place.device)
    environment = {
        "device": name,
        "backend": place.device.type,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "commit": commit,
        "dirty": dirty,
    }
    t = bounds[chosen[0]].times.tolist()
    settings = {
        "data_sha256": _digest(pixels, y),
        "images": len(pixels),
        "conditional": labels is not None,
        "steps": len(t),
        "seed": int(seed),
        "clip_x0": model.clip_x0,
        "dtype": str(network_dtype).removeprefix("torch."),
    }
    identity = {"kind": ROW_KIND, "format": ROW_FORMAT, "model_sha256": model_sha256, **settings, "t": t}
    rows = _known_rows(out, identity)
    missing = {variance: bound for variance, bound in bounds.items() if variance not in rows}
    if missing:
        file = None if out is None else results_file(out, commit, name)
        figures = _measure(model, place, network_dtype, list(missing.values()), pixels, y, seeds, batch_size, progress)
        for variance, figure in zip(missing, figures, strict=True):
            rows[variance] = {**identity, "variance": variance, **figure, "batch_size": batch_size, **environment}
            if file is not None:
                append_row(file, rows[variance])
    found = [rows[variance] for variance in bounds]
    return {
        "model_sha256": model_sha256,
        "settings": settings,
        "t": t,
        "eps_mse": found[0]["eps_mse"],
        "x0_mse": found[0]["x0_mse"],
        "bounds": [{key: row[key] for key in FIGURES} for row in found],
        # of the rows, which may be of other days and machines than this call
        "environment": {
            **{key: sorted({str(row.get(key)) for row in found}) for key in ("batch_size", *environment)},
            "variances_measured": len(missing),
            "variances_reused": len(bounds) - len(missing),
        },
    }


def likelihood_table(report: Report, parts: int = TABLE_PARTS) -> str:
    """The report in Markdown: the bounds, then what tenths of the chain give to them, with the mean errors there."""
    settings, environment, bounds, t = report["settings"], report["environment"], report["bounds"], report["t"]
    lines = ["| variance | bits / dimension | of it prior | of it at the first t |", "| --- | --- | --- | --- |"]
    for bound in bounds:
        total = f"{bound['total']['mean']:.4f} ± {bound['total']['standard_error']:.4f}"
        lines.append(f"| {bound['variance']} | {total} | {bound['prior']:.2g} | {bound['decoder']:.4f} |")
    names = [bound["variance"] for bound in bounds]
    lines += ["", f"| t | {' | '.join(names)} | eps MSE | x0 MSE |", f"| --- |{' --- |' * (len(names) + 2)}"]
    for part in np.array_split(np.arange(len(t)), min(parts, len(t))):
        sums = [f"{np.take(bound['terms'], part).sum():.4f}" for bound in bounds]
        errors = [f"{np.take(report[key], part).mean():.4f}" for key in ("eps_mse", "x0_mse")]
        lines.append(f"| {t[part[0]]:g} to {t[part[-1]]:g} | {' | '.join((*sums, *errors))} |")
    lines += [
        "",
        f"{settings['images']} images{' given their labels' if settings['conditional'] else ''}, rounded to 8 bits; "
        f"{settings['steps']} levels of the chain, noise of seed {settings['seed']}, {settings['dtype']}; ± is the "
        f"standard error over images; measured on {', '.join(environment['device'])} at commit "
        f"{', '.join(environment['commit'])}{' (with changes)' if 'True' in environment['dirty'] else ''}.",
    ]
    return "\n".join(lines) + "\n"


def _measure(
    model: DiffusionModel,
    place: Placed,
    network_dtype: torch.dtype,
    bounds: list[VariationalBound],
    pixels: torch.Tensor,
    y: torch.Tensor | None,
    seeds: torch.Tensor,
    batch_size: int,
    progress: bool,
) -> list[Report]:
    """The figures of each bound, from one pass of the network over all images and levels."""
    began, first, N = time.perf_counter(), bounds[0], len(pixels)
    levels, device = len(first), place.device
    alpha_sigma = [values.double().cpu().numpy() for values in (first.alpha, first.sigma)]
    eps_x, eps_out = (values.tolist() for values in named_prediction(model.prediction).to_eps(*alpha_sigma))
    prior, totals, sums = np.zeros(N), np.zeros((len(bounds), N)), np.zeros((len(bounds) + 2, levels))
    parts = [slice(start, min(start + batch_size, N)) for start in range(0, N, batch_size)]
    with (
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
        place.current(model.network) as network,
        tqdm(total=len(parts) * levels, desc="likelihood", unit="step", disable=not progress) as bar,
    ):
        for part in parts:
            x0 = _images(pixels[part]).to(device, first.dtype).contiguous(memory_format=torch.channels_last)
            keys, labels = seeds[part].to(device), None if y is None else y[part].to(device)
            values = []
            for i in range(levels):
                eps = philox_normal(keys, x0.shape[1:], draw=i, stream=STREAM_LIKELIHOOD, dtype=x0.dtype)
                x_t = first.alpha[i] * x0 + first.sigma[i] * eps
                index = torch.full((len(x0),), i, device=device)
                output = network(x_t.to(network_dtype), first.times[index], labels)
                terms = [bound.terms(x0, x_t, output, index) for bound in bounds]
                own_eps = eps_x[i] * x_t + eps_out[i] * output[:, : x0.shape[1]]
                errors = own_eps - eps, first.predicted_x0(x_t, output, index) - x0
                values.append(torch.stack([*terms, *(error.square().flatten(1).mean(1) for error in errors)]))
                bar.update()
            # (levels, bounds + 2, B): the device is read once a batch
            found = torch.stack(values).double().cpu().numpy()
            if len(wrong := np.argwhere(~np.isfinite(found))):
                i, _, image = wrong[0].tolist()
                raise FloatingPointError(f"image {part.start + image} is not finite at t = {first.times[i]:g}")
            prior[part] = first.prior(x0).double().cpu().numpy()
            totals[:, part] = prior[part] + found[:, :-2].sum(0)
            sums += found.sum(2).T
    *terms_by_t, eps_mse, x0_mse = ([float(f"{value:.7g}") for value in row] for row in sums / N)
    shared = {
        "prior": float(prior.mean()),
        "eps_mse": eps_mse,
        "x0_mse": x0_mse,
        "seconds": time.perf_counter() - began,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    return [
        {"total": _mean_and_error(total), "decoder": terms[0], "terms": terms, **shared}
        for total, terms in zip(totals, terms_by_t, strict=True)
    ]


def _mean_and_error(values: Array) -> dict[str, float]:
    return {"mean": float(values.mean()), "standard_error": float(values.std(ddof=1) / np.sqrt(len(values)))}


def _placed(
    model: DiffusionModel, device: str | torch.device | None, dtype: str | torch.dtype | None
) -> tuple[Placed, torch.dtype]:
    """Where the network runs and in which dtype."""
    where = device_of(model) if device is None else resolve_device(device)
    wide = torch.promote_types(dtype_of(model), torch.float32)
    network_dtype = resolve_dtype(dtype) or wide
    if network_dtype == torch.float64 and where.type != "cpu":
        raise ValueError(f"dtype=torch.float64 runs on the CPU only, got device {where}")
    return Placed(where, network_dtype), network_dtype


def _eight_bits(images: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
    """uint8 (N, C, H, W), rounded as `fastdiff.to_uint8` rounds."""
    if not isinstance(images, torch.Tensor) or not images.is_floating_point():
        got = images.dtype if isinstance(images, torch.Tensor) else type(images).__name__
        raise TypeError(f"images must be a floating-point tensor in [-1, 1], got {got}")
    if images.ndim != 4 or tuple(images.shape[1:]) != shape or len(images) < 2:
        expected = ", ".join(map(str, shape))
        raise ValueError(f"images must be (N, {expected}) with N of at least 2, got shape {tuple(images.shape)}")
    low, high = (float(value) for value in images.detach().aminmax())
    if not (low >= -1 and high <= 1):
        raise ValueError(f"images must be in [-1, 1], got {low:g} to {high:g}")
    return images.detach().cpu().double().mul(127.5).add_(128).floor_().clamp_(0, 255).to(torch.uint8)


def _images(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.double() / 127.5 - 1


def _labels(labels: Labels, model: DiffusionModel, n: int) -> torch.Tensor | None:
    """int64 (n,), the null label where there are none; None for an unconditional model."""
    y = resolve_labels(labels, model.num_classes, model.null_label)
    if y is not None and y.ndim and len(y) != n:
        raise ValueError(f"labels must be one, or one an image: expected {n}, got {len(y)}")
    if model.num_classes is None:
        return None
    return (torch.tensor(model.null_label) if y is None else y).expand(n).contiguous()


def _checked_variances(variances: Sequence[str] | None, model: DiffusionModel) -> list[str]:
    known = [name for name in VARIANCES if name != "learned_range" or model.variance == name]
    if variances is None:
        return known
    if isinstance(variances, str) or not isinstance(variances, Sequence):
        raise TypeError(f"variances must be a sequence of names, got {variances!r}")
    if not variances or len(set(variances)) != len(variances) or not set(variances) <= set(known):
        raise ValueError(f"variances must be different ones of {known} for this model, got {list(variances)}")
    return list(variances)


def _digest(pixels: torch.Tensor, y: torch.Tensor | None) -> str:
    """12 hex digits that change with any pixel, label or order."""
    sha = hashlib.sha256()
    for array in (pixels.numpy(), np.empty(0) if y is None else y.numpy()):
        sha.update(f"{array.shape}{array.dtype}".encode() + array.tobytes())
    return sha.hexdigest()[:12]


def _known_rows(out: str | PathLike[str] | None, identity: Report) -> dict[str, Report]:
    if out is None or identity["model_sha256"] is None:
        return {}
    rows = read_rows(out, ROW_KIND)
    return {row["variance"]: row for row in rows if all(row.get(key) == value for key, value in identity.items())}
