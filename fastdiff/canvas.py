"""Figures that no display is needed for. They need matplotlib."""

from __future__ import annotations

from typing import Any

__all__ = ["new_figure", "require_matplotlib"]


def require_matplotlib() -> None:
    """ValueError that says how to install matplotlib, where it is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("plots need matplotlib; install it with: pip install 'fastdiff[train]'") from None


def new_figure(width: float, height: float, columns: int, rows: int = 1) -> tuple[Any, Any]:
    """A figure of width x height hundreds of pixels that no display is needed for, and its axes (rows, columns)."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for each in axes.flat:
        each.spines[["top", "right"]].set_visible(False)
        each.grid(alpha=0.25)
    return figure, axes
