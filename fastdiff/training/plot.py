"""The loss of runs as a picture. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from fastdiff.canvas import new_figure
from fastdiff.training.log import LOG_FILE, QUARTER_NAMES, read_log

__all__ = ["plot_loss"]

ORANGE = "#c8551b"
BLUES = ("#b5cfe8", "#7fadd8", "#3f81bf", "#14477d")


def plot_loss(runs: str | PathLike[str] | Sequence[str | PathLike[str]], path: str | PathLike[str]) -> Path:
    """Draw loss over step of each run's log, and of one run its quarters of t, too; 800x450 pixels, log scale.

    runs: one folder with a log.jsonl, or several. The suffix of path chooses the format. ValueError names a folder
    without a line or a loss above 0, and says how to install matplotlib where it is missing.
    """
    if isinstance(runs, str | PathLike):
        runs = [runs]
    logs = {str(run): read_log(Path(run) / LOG_FILE) for run in runs}
    for run, lines in logs.items():
        if not lines:
            raise ValueError(f"run {run} has no line in its {LOG_FILE}; is it a folder of fastdiff train?")
        if not any((line.get("loss") or 0) > 0 for line in lines):
            raise ValueError(f"run {run} has no loss above 0 in its {LOG_FILE} to draw on a log scale")
    figure, ((axes,),) = new_figure(8.0, 4.5, 1)
    alone = {"label": "loss", "color": ORANGE} if len(logs) == 1 else {}
    for run, lines in logs.items():
        _curve(axes, lines, "loss", **{"label": run, "linewidth": 1.8, **alone})
    if alone:
        for q, (name, colour) in enumerate(zip(QUARTER_NAMES, BLUES, strict=True)):
            words = f"t in quarter {q + 1}" + (" (least noise)" if q == 0 else "")
            _curve(axes, lines, name, label=words, color=colour, linewidth=1)
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path)
    return Path(path)


def _curve(axes: Any, lines: list[dict[str, Any]], name: str, **style: Any) -> None:
    points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), **style)
