"""What a run tells about itself: a line of JSON every so many steps, for TensorBoard too if asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from fastdiff import checkpoint
from fastdiff.training.run import Step

__all__ = ["LOG_FILE", "RunLog", "cut_log", "read_log", "require_tensorboard"]

LOG_FILE = "log.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
QUARTERS = 4
QUARTER_NAMES = tuple(f"loss_q{q + 1}" for q in range(QUARTERS))


class RunLog:
    """Averages steps into lines of folder/log.jsonl; folder=None keeps nothing.

    A line: step, loss (mean of the steps since the line before, or since a resume), loss_q1 to loss_q4 (that of samples
    in each quarter of [0, T), q1 the least noise; null where there were none), the loss's parts, grad_norm, lr, skipped
    (all of the run), images_per_s and seconds. Samples count by their weights, so that means are those of uniform
    times. Steps that were skipped are in no mean; null where there was no other.

    start: steps that the run has taken before; TensorBoard drops what it has of later ones.
    """

    def __init__(self, folder: Path | None, num_train_timesteps: int, tensorboard: bool, start: int = 0) -> None:
        self.folder, self.T = folder, num_train_timesteps
        self.writer: Any = None
        if folder is not None and tensorboard:
            self.writer = require_tensorboard()(str(folder / TENSORBOARD_FOLDER), purge_step=start + 1)
        self._clear()

    def _clear(self) -> None:
        self._last: Step | None = None
        self._grad_norm: float | None = None
        # of each name the weighted sum and what it is divided by
        self._sums: dict[str, list[float]] = {name: [0.0, 0.0] for name in ("loss", *QUARTER_NAMES)}

    @property
    def pending(self) -> bool:
        """Whether steps were added since the last line."""
        return self._last is not None

    def add(self, step: Step) -> None:
        self._last = step
        for name in step.parts:
            self._sums.setdefault(name, [0.0, 0.0])
        if step.skipped:
            return
        self._grad_norm = step.grad_norm
        weights = step.weights.double()
        quarter = step.t * QUARTERS // self.T
        for q, name in enumerate(QUARTER_NAMES):
            inside = weights * (quarter == q)
            self._add(name, inside @ step.losses.double(), inside.sum())
        for name, values in step.parts.items():
            self._add(name, weights @ values.double(), len(weights))
        self._add("loss", step.loss, 1)

    def _add(self, name: str, total: torch.Tensor | float, divisor: torch.Tensor | float) -> None:
        self._sums[name][0] += float(total)
        self._sums[name][1] += float(divisor)

    def write(self, at: int, skipped: int, images_per_s: float | None, seconds: float) -> dict[str, Any]:
        """Writes a line of the steps since the last, of which there must be one, and returns it."""
        assert self._last is not None
        line = {
            "step": at,
            **{name: total / divisor if divisor else None for name, (total, divisor) in self._sums.items()},
            "grad_norm": self._grad_norm,
            "lr": self._last.lr,
            "skipped": skipped,
            "images_per_s": None if images_per_s is None else round(images_per_s, 1),
            "seconds": round(seconds, 3),
        }
        self._clear()
        if self.folder is not None:
            with open(self.folder / LOG_FILE, "a") as log:
                log.write(json.dumps(line) + "\n")
        if self.writer is not None:
            for name, value in line.items():
                if name != "step" and value is not None:
                    self.writer.add_scalar(name, value, at)
            self.writer.flush()
        return line

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


def require_tensorboard() -> Any:
    """torch's SummaryWriter; ValueError that says how to install TensorBoard, where it is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError(
            "tensorboard=True needs TensorBoard; install it with: pip install 'fastdiff[tensorboard]'"
        ) from None
    return SummaryWriter


def read_log(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a log, whatever a kill has left behind them; none where there is no file."""
    lines = []
    for text in path.read_text(errors="replace").splitlines(keepends=True) if path.exists() else []:
        try:
            line = json.loads(text)
            if text.endswith("\n") and isinstance(line["step"], int):
                lines.append(line)
        except (ValueError, TypeError, KeyError):
            continue
    return lines


def cut_log(folder: Path, step: int) -> None:
    """Drops the lines after step, which the run writes again."""
    kept = [line for line in read_log(folder / LOG_FILE) if line["step"] <= step]
    checkpoint.atomic_write(folder / LOG_FILE, "".join(json.dumps(line) + "\n" for line in kept).encode())
