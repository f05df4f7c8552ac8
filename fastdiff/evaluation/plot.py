"""The trade-off over the strength of guidance, and bits per dimension by t, as pictures. Needs matplotlib."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from fastdiff.canvas import new_figure

__all__ = ["bits_by_t", "tradeoff"]

STYLES = ({"linestyle": "-", "marker": "o"}, {"linestyle": "--", "marker": "s"}, {"linestyle": "-.", "marker": "^"})
BLUE, ORANGE, GREY = "#1f5fa8", "#c8551b", "#777777"


Report = dict[str, Any]


def tradeoff(reports: Report | Mapping[str, Report], path: str | PathLike[str]) -> Path:
    """Draw `evaluate` reports: accuracy and spread on the left, Fréchet distance on the right, 900x350 pixels a row.

    reports: one, or several of the same data by the names of their samplers. The first row is over w; a second, where a
    classifier guided, over its scale, which begins with the same point. Error bars are one standard deviation over
    seeds; dotted and dashed lines are what real images score, among them the distances of the held-out ones from the
    training images and between two halves of all. The suffix of path chooses the format. ValueError without matplotlib.
    """
    named: Mapping[str, Any] = {"": reports} if "points" in reports else reports
    rows = ["w"] + ["classifier_scale"] * any(report["classifier_points"] for report in named.values())
    figure, grid = new_figure(9.0, 3.5 * len(rows), 2, len(rows))
    for axes, strength in zip(grid, rows, strict=True):
        _row(axes, named, strength)
    return _save(figure, path)


def _row(pair: Any, named: Mapping[str, Report], strength: str) -> None:
    left, right = pair
    ticks: set[float] = set()
    least = 1.0
    for (name, report), style in zip(named.items(), itertools.cycle(STYLES), strict=False):
        points = report["points"]
        if strength == "classifier_scale":
            if not report["classifier_points"]:
                continue
            start = [{**point, strength: 0.0} for point in points if point["w"] == 0]
            points = [*start, *report["classifier_points"]]
        ticks.update(point[strength] for point in points)
        if strength == "classifier_scale":
            name = f"{name} ({report['settings']['classifier_form']})".strip()
        suffix = f", {name}" if name else ""
        for axes, kind, colour, label in (
            (left, "accuracy", BLUE, f"judge's accuracy{suffix}"),
            (left, "spread_ratio", ORANGE, f"within-class spread / real{suffix}"),
            (right, "frechet", BLUE, name or "generated against real"),
        ):
            at, mean, std = ([*values] for values in zip(*_curve(points, strength, kind), strict=True))
            options = {"markersize": 4, "capsize": 3, "linewidth": 1.5, "color": colour, "label": label}
            axes.errorbar(at, mean, std, **options, **style)
        least = min([least, *(point[kind]["mean"] for point in points for kind in ("accuracy", "spread_ratio"))])
    real = next(iter(named.values()))["real"]
    left.axhline(real["accuracy"]["mean"], color=BLUE, linestyle=":", linewidth=1, label="accuracy on real images")
    left.axhline(1.0, color=ORANGE, linestyle=":", linewidth=1, label="spread of real images")
    left.set_ylim(bottom=0.9 * least, top=max(1.02, left.get_ylim()[1]))
    left.set_title("fidelity and diversity", fontsize=10)
    sizes, floor = real["frechet_halves"]["sizes"], real["frechet_halves"]["mean"]
    right.axhline(floor, color=GREY, linestyle="--", linewidth=1, label=f"real halves ({sizes[0]} and {sizes[1]})")
    label = f"held-out images ({real['heldout_images']})"
    right.axhline(real["frechet_heldout"], color=GREY, linestyle=":", linewidth=1, label=label)
    right.set_ylim(bottom=0)
    right.set_title("Fréchet distance (8x8 pooled pixels)", fontsize=10)
    for axes in pair:
        # the strengths crowd near 0; a square root spreads them
        axes.set_xscale("function", functions=(_root, _square))
        axes.set_xticks(sorted(ticks), [f"{value:g}" for value in sorted(ticks)])
        axes.set_xlim(-0.002, 1.08 * max(ticks) or 1.0)
        axes.set_xlabel("guidance weight w" if strength == "w" else "classifier scale, at w = 0")
        axes.legend(fontsize=8, frameon=False)


def _curve(points: list[Any], strength: str, figure: str) -> list[tuple[float, float, float]]:
    """(strength, mean, standard deviation) of each point"""
    return [(point[strength], point[figure]["mean"], point[figure]["std"]) for point in points]


def bits_by_t(report: dict[str, Any], path: str | PathLike[str]) -> Path:
    """Draw a `bits_per_dimension` report: each variance's terms over t, on a log scale, 600x350 pixels.

    The suffix of path chooses the format. ValueError without matplotlib.
    """
    figure, ((axes,),) = new_figure(6.0, 3.5, 1)
    for bound, colour in zip(report["bounds"], (BLUE, ORANGE, GREY), strict=False):
        label = f"{bound['variance']}: {bound['total']['mean']:.3f} in all"
        axes.plot(report["t"], bound["terms"], color=colour, marker=".", markersize=3, linewidth=1, label=label)
    axes.set_yscale("log")
    axes.set_xlabel("t")
    axes.set_title("terms of the variational bound, bits per dimension", fontsize=10)
    axes.legend(fontsize=8, frameon=False)
    return _save(figure, path)


def _root(v: Any) -> Any:
    return np.sign(v) * np.sqrt(np.abs(v))


def _square(v: Any) -> Any:
    return np.sign(v) * np.square(v)


def _save(figure: Any, path: str | PathLike[str]) -> Path:
    figure.savefig(path)
    return Path(path)
