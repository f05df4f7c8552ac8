"""Rows of a results file: one JSON object a line, appended as soon as it is known, so that a killed run resumes."""

from __future__ import annotations

import datetime
import json
import platform
import re
import subprocess
from os import PathLike
from pathlib import Path
from typing import Any

import torch

__all__ = ["append_row", "device_name", "git_state", "read_rows", "results_file"]

Row = dict[str, Any]


def git_state() -> tuple[str, bool | None]:
    """Commit (12 hex) of the repository that tracks this package, and whether tracked files differ from it.

    ("unknown", None) where git or the repository is missing. Results themselves do not make a tree dirty.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        # an installed package may lie inside somebody else's repository
        git("ls-files", "--error-unmatch", Path(__file__).name)
        changes = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)benchmarks/results")
        return git("rev-parse", "--short=12", "HEAD"), bool(changes)
    except (OSError, subprocess.CalledProcessError):
        return "unknown", None


def device_name(device: torch.device) -> str:
    """What the hardware calls itself: the GPU's name, or the CPU's model."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1].strip() if match else platform.processor() or platform.machine()


def results_file(out: str | PathLike[str], commit: str, device: str) -> Path:
    """The .jsonl file to append to: out itself, or <date>-<commit>-<device>.jsonl in the folder out. Made if missing.

    ValueError where it cannot be written.
    """
    path = Path(out)
    if path.suffix != ".jsonl":
        slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
        path = path / f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}-{commit}-{slug}.jsonl"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        raise ValueError(f"out={str(out)!r} cannot be written: {error.strerror or error}") from None
    return path


def read_rows(out: str | PathLike[str], kind: str) -> list[Row]:
    """Rows of one kind in a .jsonl file, or in all those of a folder; a line that a kill cut short is skipped."""
    path = Path(out)
    files = [path] if path.suffix == ".jsonl" else sorted(path.glob("*.jsonl"))
    rows = []
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and row.get("kind") == kind:
                rows.append(row)
    return rows


def append_row(path: Path, row: Row) -> None:
    """Add one row, on a line of its own even after one that a kill cut short."""
    with open(path, "a+b") as file:
        if file.tell() > 0:
            file.seek(-1, 2)
            broken = file.read(1) != b"\n"
        else:
            broken = False
        file.write(b"\n" * broken + json.dumps(row, allow_nan=False).encode() + b"\n")
