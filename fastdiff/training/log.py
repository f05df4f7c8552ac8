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
QUARTILES = 4


class RunLog:
    """Averages steps into lines of folder/log.jsonl; folder=None keeps nothing.

    A line: step, loss (mean of the steps since the line before), loss_q1 to loss_q4 (that of samples in each quarter of
    [0, T), q1 the least noise; null where there were none), the loss's parts, grad_norm, lr, skipped (all of the run),
    images_per_s and seconds. Steps that were skipped are in no mean; null where there was no other.
    """

    def __init__(self, folder: Path | None, num_train_timesteps: int, tensorboard: bool) -> None:
        self.folder, self.T = folder, num_train_timesteps
        self.steps: list[Step] = []
        self.writer: Any = None
        if folder is not None and tensorboard:
            self.writer = require_tensorboard()(str(folder / TENSORBOARD_FOLDER))

    def add(self, step: Step) -> None:
        self.steps.append(step)

    def write(self, at: int, skipped: int, images_per_s: float, seconds: float) -> dict[str, Any]:
        """Writes a line of the steps since the last, and returns it."""
        steps, last = [step for step in self.steps if not step.skipped], self.steps[-1]
        quartile = _cat([step.t for step in steps]) * QUARTILES // self.T
        losses = _cat([step.losses for step in steps])
        line = {
            "step": at,
            "loss": sum(step.loss for step in steps) / len(steps) if steps else None,
            **{f"loss_q{q + 1}": _mean(losses[quartile == q]) for q in range(QUARTILES)},
            **{name: _mean(_cat([step.parts[name] for step in steps])) for name in last.parts},
            "grad_norm": steps[-1].grad_norm if steps else None,
            "lr": last.lr,
            "skipped": skipped,
            "images_per_s": round(images_per_s, 1),
            "seconds": round(seconds, 3),
        }
        self.steps = []
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


def _cat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(tensors) if tensors else torch.empty(0)


def _mean(values: torch.Tensor) -> float | None:
    return float(values.double().mean()) if len(values) else None


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
    for text in path.read_text().splitlines(keepends=True) if path.exists() else []:
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
