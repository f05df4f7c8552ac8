"""Options, and one row a case in benchmarks/results/: nothing is timed before its output is checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastdiff.evaluation.results import append_row, device_name, git_state, results_file
from fastdiff.placement import resolve_device

RESULTS = Path(__file__).parent / "results"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default=None, help="cpu or cuda; default: a GPU if there is one")
    parser.addoption("--commit", default=None, help="commit to record; default: asks git")
    parser.addoption("--state", default=None, choices=("clean", "dirty"), help="whether the tree differs from it")
    parser.addoption("--results", default=str(RESULTS), help="folder of the rows")


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    return resolve_device(pytestconfig.getoption("--device"))


@pytest.fixture
def record(pytestconfig: pytest.Config, device: torch.device, benchmark: Any) -> Iterator[Callable[..., None]]:
    """record(function, case=..., **facts): times function and appends a row with p20, p50 and p80 in milliseconds."""
    commit, state = pytestconfig.getoption("--commit"), pytestconfig.getoption("--state")
    dirty = None if state is None else state == "dirty"
    if commit is None:
        commit, found = git_state()
        dirty = found if state is None else dirty

    def run(function: Callable[[], object], *, case: str, rounds: int = 10, **facts: object) -> None:
        def timed() -> None:
            function()
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        benchmark.pedantic(timed, rounds=rounds, warmup_rounds=1)
        p20, p50, p80 = (1e3 * np.percentile(benchmark.stats.stats.data, q) for q in (20, 50, 80))
        row = {
            "kind": "benchmark",
            "case": case,
            **facts,
            "rounds": rounds,
            "p20_ms": float(p20),
            "p50_ms": float(p50),
            "p80_ms": float(p80),
            "device": device_name(device),
            "backend": device.type,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "commit": commit,
            "dirty": dirty,
        }
        append_row(results_file(pytestconfig.getoption("--results"), commit, row["device"]), row)

    yield run
