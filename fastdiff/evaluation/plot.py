"""The trade-off over the guidance weight, and bits per dimension over the chain, as pictures. They need matplotlib."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["bits_by_t", "require_matplotlib", "tradeoff"]

BLUE, ORANGE, GREY = "#1f5fa8", "#c8551b", "#777777"


def require_matplotlib() -> None:
    """ValueError that says how to install matplotlib, where it is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("plots need matplotlib; install it with: pip install 'fastdiff[train]'") from None


def tradeoff(report: dict[str, Any], path: str | PathLike[str]) -> Path:
    """Draw an `evaluate` report: accuracy and spread over w on the left, Fréchet distance on the right, 900x350 pixels.

    Error bars are one standard deviation over seeds; dashed lines are the judge's accuracy on real images and the
    distance between two real halves. The suffix of path chooses the format. ValueError without matplotlib.
    """
    figure, (left, right) = _figure(9.0, 3.5, 2)
    points, real = report["points"], report["real"]
    w = [point["w"] for point in points]

    def curve(axes: Any, name: str, colour: str, marker: str, label: str) -> None:
        mean, std = ([point[name][part] for point in points] for part in ("mean", "std"))
        axes.errorbar(w, mean, std, color=colour, marker=marker, markersize=4, capsize=3, linewidth=1.5, label=label)

    curve(left, "accuracy", BLUE, "o", "judge's accuracy")
    curve(left, "spread_ratio", ORANGE, "s", "within-class spread / real")
    left.axhline(real["accuracy"]["mean"], color=BLUE, linestyle="--", linewidth=1, label="accuracy on real images")
    left.axhline(1.0, color=ORANGE, linestyle="--", linewidth=1, label="spread of real images")
    least = min(point[name]["mean"] for point in points for name in ("accuracy", "spread_ratio"))
    left.set_ylim(bottom=0.9 * least, top=max(1.02, left.get_ylim()[1]))
    left.set_title("fidelity and diversity", fontsize=10)
    curve(right, "frechet", BLUE, "o", "generated against real")
    sizes = real["frechet_halves"]["sizes"]
    floor = real["frechet_halves"]["mean"]
    right.axhline(floor, color=GREY, linestyle="--", linewidth=1, label=f"real halves ({sizes[0]} and {sizes[1]})")
    right.set_ylim(bottom=0)
    right.set_title("Fréchet distance (8x8 pooled pixels)", fontsize=10)
    for axes in (left, right):
        # the weights crowd near 0; a square root spreads them
        axes.set_xscale("function", functions=(_root, _square))
        axes.set_xticks(w, [f"{value:g}" for value in w])
        axes.set_xlim(-0.002, 1.08 * max(w) or 1.0)
        axes.set_xlabel("guidance weight w")
        axes.legend(fontsize=8, frameon=False)
    return _save(figure, path)


def bits_by_t(report: dict[str, Any], path: str | PathLike[str]) -> Path:
    """Draw a `bits_per_dimension` report: each variance's terms over t, on a log scale, 600x350 pixels.

    The suffix of path chooses the format. ValueError without matplotlib.
    """
    figure, axes = _figure(6.0, 3.5, 1)
    for bound, colour in zip(report["bounds"], (BLUE, ORANGE, GREY), strict=False):
        label = f"{bound['variance']}: {bound['total']['mean']:.3f} in all"
        axes.plot(report["t"], bound["terms"], color=colour, marker=".", markersize=3, linewidth=1, label=label)
    axes.set_yscale("log")
    axes.set_xlabel("t")
    axes.set_title("terms of the variational bound, bits per dimension", fontsize=10)
    axes.legend(fontsize=8, frameon=False)
    return _save(figure, path)


def _figure(width: float, height: float, columns: int) -> tuple[Any, Any]:
    """A figure of width x height hundreds of pixels that no display is needed for."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns)
    for each in np.atleast_1d(axes):
        each.spines[["top", "right"]].set_visible(False)
        each.grid(alpha=0.25)
    return figure, axes


def _root(v: Any) -> Any:
    return np.sign(v) * np.sqrt(np.abs(v))


def _square(v: Any) -> Any:
    return np.sign(v) * np.square(v)


def _save(figure: Any, path: str | PathLike[str]) -> Path:
    figure.savefig(path)
    return Path(path)
