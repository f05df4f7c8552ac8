"""Skips what needs a GPU where there is none, and says how many and why."""

from __future__ import annotations

import os
from typing import Any

# before torch: processes side by side must not each take every core
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# before anything imports triton: without a GPU its kernels run in its interpreter
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

WHY = "no CUDA or ROCm device"
NO_TRITON = "triton is not installed"


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Graphs wherever there may be some; a list that grows with each, and their replays are counted"""
    import fastdiff.step
    from fastdiff.cuda_graph import GraphedStep

    made: list[GraphedStep] = []

    class Counted(GraphedStep):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **kwargs)  # type: ignore[arg-type]
            made.append(self)
            self.replays = 0

        def __call__(self) -> None:
            self.replays += 1
            super().__call__()

    monkeypatch.setattr(fastdiff.Sampler, "_can_capture", lambda self: True)
    monkeypatch.setattr(fastdiff.step, "GraphedStep", Counted)
    return made


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=WHY))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    every = terminalreporter.stats.get("skipped", [])
    skipped = [r for r in every if WHY in str(r.longrepr)]
    terminalreporter.write_line(
        f"GPU tests skipped: {len(skipped)}" + (f" ({WHY})" if skipped else f" (device: {_device()})")
    )
    if without := sum(NO_TRITON in str(r.longrepr) for r in every):
        terminalreporter.write_line(f"Kernel tests skipped: {without} ({NO_TRITON})")


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "none; no GPU test was selected"
