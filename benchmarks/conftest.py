"""Options, and one row a case in benchmarks/results/: nothing is timed before its output is checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.machine import machine
from benchmarks.timing import percentiles
from fastdiff.evaluation.results import Row, append_row, device_name, git_state, read_rows, results_file
from fastdiff.placement import resolve_device

RESULTS = Path(__file__).parent / "results"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default=None, help="cpu or cuda; default: a GPU if there is one")
    parser.addoption("--commit", default=None, help="commit to record; default: asks git")
    parser.addoption("--state", default=None, choices=("clean", "dirty"), help="whether the tree differs from it")
    parser.addoption("--results", default=str(RESULTS), help="folder of the rows, or a .jsonl file")
    parser.addoption(
        "--resume",
        action="store_true",
        help="leave out cases that have rows of this commit there or in benchmarks/results",
    )
    parser.addoption(
        "--providers", default=None, help="what kernels are timed beside: eager,compile,copy is everything"
    )
    parser.addoption("--dtype", default=None, help="of kernel cases; default: float16 on a GPU, float32 on a CPU")
    parser.addoption("--rounds", type=int, default=25, help="times of each version of a kernel case")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    device = config.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu")
    for item in items:
        if item.get_closest_marker("gpu") and not device.startswith("cuda"):
            item.add_marker(pytest.mark.skip(reason="needs --device cuda"))


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    return resolve_device(pytestconfig.getoption("--device"))


class Recorder:
    """record(function, case=..., **facts) times function, or takes its times, and appends a row with p20, p50, p80"""

    def __init__(self, config: pytest.Config, device: torch.device, benchmark: Any) -> None:
        self.device, self.benchmark, self.used = device, benchmark, False
        commit, state = config.getoption("--commit"), config.getoption("--state")
        dirty = None if state is None else state == "dirty"
        if commit is None:
            commit, found = git_state()
            dirty = found if state is None else dirty
            if commit == "unknown" and config.getoption("--resume"):
                raise pytest.UsageError("--resume must know what it resumes: git says no commit here, give --commit")
        self.origin: Row = {"commit": commit, "dirty": dirty}
        self.out = config.getoption("--results")
        self.resume = config.getoption("--resume")

    def __call__(
        self,
        function: Callable[[], object],
        *,
        case: str,
        rounds: int = 10,
        times: Sequence[float] | None = None,
        **facts: object,
    ) -> None:
        """times: milliseconds a call that were measured already, in rounds of their own"""
        if not self.used:
            self.used = True
            self.benchmark.pedantic(
                self._synchronised(function), rounds=rounds if times is None else 1, warmup_rounds=times is None
            )
        if times is None:
            times = [1e3 * seconds for seconds in self.benchmark.stats.stats.data]
        p20, p50, p80 = percentiles(times)
        self.row(case=case, **facts, rounds=len(times), p20_ms=p20, p50_ms=p50, p80_ms=p80)

    def _synchronised(self, function: Callable[[], object]) -> Callable[[], None]:
        def timed() -> None:
            function()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)

        return timed

    @cached_property
    def machine(self) -> Row:
        return machine(self.device)

    def row(self, **facts: object) -> None:
        row = {"kind": "benchmark", **facts, **self.machine, **self.origin}
        append_row(results_file(self.out, self.origin["commit"], row["device"]), row)

    def has(self, **facts: object) -> bool:
        """With --resume: whether a row of this machine and commit says so already"""
        if not self.resume:
            return False
        wanted = facts | self.origin | {"device": device_name(self.device)}
        # also those that came along, where each command has an empty folder for its own
        rows = (row for out in {self.out, str(RESULTS)} for row in read_rows(out, "benchmark"))
        return any(all(row.get(k) == v for k, v in wanted.items()) for row in rows)


@pytest.fixture
def record(pytestconfig: pytest.Config, device: torch.device, benchmark: Any) -> Recorder:
    return Recorder(pytestconfig, device, benchmark)
