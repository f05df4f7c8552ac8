"""What a row says about where it was measured"""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess

import torch

from fastdiff.evaluation.results import Row, device_name

SMI = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit")


def installed(package: str) -> str | None:
    """Its version, or None"""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine(device: torch.device) -> Row:
    row: Row = {
        "device": device_name(device),
        "backend": device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": installed("triton"),
    }
    if device.type == "cuda":
        row |= {"cudnn": torch.backends.cudnn.version(), **clocks()}
    return row


def clocks() -> Row:
    """Driver, clocks in MHz now and at most, power limit in W; nothing where nvidia-smi is missing or fails"""
    command = shutil.which("nvidia-smi")
    if command is None:
        return {}
    try:
        query = [command, f"--query-gpu={','.join(SMI)}", "--format=csv,noheader,nounits", "--id=0"]
        text = subprocess.run(query, check=True, capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in text.strip().splitlines()[0].split(",")]
    return {f"gpu.{name}": _number(value) for name, value in zip(SMI, values, strict=True)}


def _number(value: str) -> float | str:
    try:
        return float(value) if value.count(".") < 2 else value
    except ValueError:
        return value
