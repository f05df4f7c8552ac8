"""The kernel benchmarks, rehearsed on a CPU: every case is made, checked and timed, and a wrong result leaves no row"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch

from benchmarks import bench_kernels, timing
from benchmarks.bench_kernels import check, measure
from benchmarks.cases import Case, Work, cpu_cases, gpu_cases, network_cases
from benchmarks.sites import NETWORKS, norm_sites
from benchmarks.timing import apart, num_calls, num_copies, percentiles
from fastdiff.evaluation.results import Row, append_row, read_rows

ROOT = Path(__file__).parent.parent


def rehearse(out: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "pytest", "benchmarks/bench_kernels.py", "-q", "--device", "cpu", "--rounds", "2"]
    command += ["--results", str(out), "--providers", "eager,copy", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_every_case_can_be_timed_and_is_not_timed_twice(tmp_path: Path) -> None:
    rehearse(tmp_path, "--commit", "0123456789ab", "--state", "clean")
    rows = read_rows(tmp_path, "benchmark")
    ids = {case.id for case in cpu_cases()}
    assert {(row["id"], row["provider"]) for row in rows} == {
        (name, provider) for name in ids for provider in ("fastdiff", "again", "eager", "copy")
    }
    for row in rows:
        assert "absent" not in row, row
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert row["GB_per_s"] == pytest.approx(row["floor_bytes"] / row["p50_ms"] / 1e6)
        assert (row["commit"], row["dirty"], row["backend"], row["dtype"]) == ("0123456789ab", False, "cpu", "float32")
        assert row["rounds"] == 2 and row["torch"] and row["device"] and "triton" in row
    mine = [row for row in rows if row["provider"] in ("fastdiff", "again")]
    # kernels are never timed in the interpreter
    assert {row["implementation"] for row in mine} == {"reference"}
    assert max(row["relative_error"] for row in mine) < 1e-5
    # what has rows of this commit is left out, what has rows of another is not
    drop = [row for row in rows if row["id"] != rows[0]["id"]]
    (tmp_path / "kept").mkdir()
    for row in [*drop, rows[0] | {"commit": "fedcba987654"}]:
        append_row(tmp_path / "kept" / "rows.jsonl", row)
    rehearse(tmp_path / "kept", "--commit", "0123456789ab", "--state", "clean", "--resume")
    kept = read_rows(tmp_path / "kept", "benchmark")
    new = [row for row in kept if row not in drop and row["commit"] == "0123456789ab"]
    assert sorted(row["provider"] for row in new) == ["again", "copy", "eager", "fastdiff"]
    assert {row["id"] for row in new} == {rows[0]["id"]}


class Recorder:
    def __init__(self) -> None:
        self.rows: list[Row] = []

    def __call__(self, function: object, **facts: object) -> None:
        self.rows.append(facts)

    def row(self, **facts: object) -> None:
        self.rows.append(facts)


def run(case: Case, peers: tuple[str, ...] = ("eager", "copy"), **replaced: object) -> list[Row]:
    """Rows of a case some of whose functions are replaced"""

    def make(generator: torch.Generator, dtype: torch.dtype) -> Work:
        work = case.make(generator, dtype)
        return dataclasses.replace(work, **{name: wrap(getattr(work, name)) for name, wrap in replaced.items()})

    recorder = Recorder()
    with torch.no_grad():
        measure(dataclasses.replace(case, make=make), torch.device("cpu"), torch.float32, peers, 1, recorder)
    return recorder.rows


def spoilt(function):
    """The last output with one element a little off"""

    def run(**given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        *outputs, last = (output.clone() for output in function(**given))
        last[(-1,) * last.dim()] += 0.1
        return *outputs, last

    return run


@pytest.mark.parametrize("case", cpu_cases(), ids=lambda case: case.id)
def test_a_wrong_result_leaves_no_row(case: Case) -> None:
    assert {row["provider"] for row in run(case)} == {"fastdiff", "again", "eager", "copy"}
    with pytest.raises(AssertionError):
        run(case, ours=spoilt)


@pytest.mark.parametrize("case", [case for case in cpu_cases() if case.op in ("norm", "residual")], ids=lambda c: c.id)
def test_a_peer_that_is_wrong_or_fails_is_absent(case: Case) -> None:
    def failing(function: object):
        def run(**given: object) -> None:
            raise RuntimeError("no such kernel")

        return run

    for broken, why in ((spoilt, "AssertionError"), (failing, "no such kernel")):
        rows = {row["provider"]: row for row in run(case, eager=broken)}
        assert why in rows["eager"]["absent"] and "times" not in rows["eager"]
        assert "absent" not in rows["fastdiff"]


def test_nan_never_passes() -> None:
    case = cpu_cases()[0]
    work = case.make(torch.Generator().manual_seed(0), torch.float32)
    with pytest.raises(AssertionError):
        check(work, lambda **given: tuple(output * float("nan") for output in work.ours(**given)), True, 1e-5)


def test_one_wrong_element_among_many_is_seen() -> None:
    work = cpu_cases()[0].make(torch.Generator().manual_seed(0), torch.float32)
    want = torch.ones(2, 1000, 1000, dtype=torch.float64)
    got, rows = want.clone(), torch.arange(2)
    got[1, 500, 500] += 1e-3
    assert bench_kernels.compare([want], [want], work, rows, 1e-5) == 0
    assert (got - want).norm() < 1e-5 * want.norm()
    with pytest.raises(AssertionError):
        bench_kernels.compare([got], [want], work, rows, 1e-5)


def test_a_check_reads_some_rows_of_what_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in cpu_cases() if case.op == "guided_step" and "learned" in case.id)
    work = case.make(torch.Generator().manual_seed(0), torch.float32)
    full = check(work, work.ours, True, 1e-5)
    monkeypatch.setattr(bench_kernels, "CHECKED", 1)
    before = work.arguments["x"].clone()
    assert 0 < check(work, work.ours, True, 1e-5) <= 4 * full
    assert torch.equal(work.arguments["x"], before), "a check leaves the arguments as they were"


@pytest.mark.parametrize("name", NETWORKS)
def test_every_site_is_a_case(name: str) -> None:
    cases = list(network_cases(name, 16))
    plain = {site.plain for site in norm_sites(name)}
    assert sum(case.op == "norm" for case in cases) == len(plain)
    assert sum(case.op in ("norm", "fused") for case in cases) == len(plain | {s.fused for s in norm_sites(name)})
    assert {"norm", "fused", "backward", "residual", "guided_step", "q_sample", "philox"} == {c.op for c in cases}


def test_ids_tell_cases_apart() -> None:
    cases = gpu_cases() + cpu_cases()
    assert len({case.id for case in cases}) == len(cases)
    assert all(case.id.startswith(f"{case.op}-{case.network.replace('-', '')}-b{case.batch}-") for case in cases)


@pytest.mark.parametrize("moved", [1, 10**5, 10**7, 10**8, 10**11])
def test_what_is_rotated_exceeds_the_cache(moved: int) -> None:
    cache = 50 * 2**20
    copies = num_copies(moved, cache)
    assert copies * moved >= 2 * cache or copies == 256
    assert num_copies(moved, 0) == 1
    calls = num_calls(copies, moved)
    assert calls % copies == 0 and (calls >= 20 or calls * moved >= 4 * 10**9 - moved)
    assert copies == 1 or (copies - 1) * moved < 2 * cache


def test_versions_are_apart_only_without_overlap() -> None:
    assert percentiles([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == pytest.approx((2, 3.5, 5))
    assert apart([1, 2, 3], [4, 5, 6]) and not apart([4, 5, 6], [1, 2, 3])
    assert not apart([1, 2, 10], [4, 5, 6])


class FakeCuda:
    """torch.cuda's graphs with a clock that every captured call moves by its own milliseconds"""

    def __init__(self) -> None:
        self.now, self.capturing, self.captures = 0.0, None, 0
        self.Stream = self.current_stream = lambda: self
        self.stream, self.graph_pool_handle = lambda stream: nullcontext(), object
        self.CUDAGraph = lambda: FakeGraph(self)

    def wait_stream(self, stream: object) -> None:
        pass

    @contextmanager
    def graph(self, graph: FakeGraph, pool: object, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        self.capturing, self.captures = graph, self.captures + 1
        yield
        self.capturing = None

    def Event(self, enable_timing: bool) -> FakeEvent:
        return FakeEvent(self)

    def call(self, milliseconds: float) -> None:
        if self.capturing is not None:
            self.capturing.calls.append(milliseconds)


@dataclasses.dataclass
class FakeGraph:
    cuda: FakeCuda
    calls: list[float] = dataclasses.field(default_factory=list)

    def replay(self) -> None:
        self.cuda.now += sum(self.calls)


@dataclasses.dataclass
class FakeEvent:
    cuda: FakeCuda
    at: float = 0.0

    def record(self) -> None:
        self.at = self.cuda.now

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: FakeEvent) -> float:
        return end.at - self.at


def test_replays_give_the_time_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda()
    monkeypatch.setattr(timing.torch, "cuda", cuda)

    def broken() -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    versions = {
        "fast": [lambda: cuda.call(1.0)] * 3,
        "slow": [lambda: cuda.call(2.0), lambda: cuda.call(4.0)],
        "broken": [broken],
    }
    made = timing.timers(versions, torch.device("cuda"), moved=10**6)
    assert "stream is capturing" in str(made.pop("broken")) and cuda.captures == 2
    assert [len(made[name].graph.calls) for name in made] == [21, 20]
    assert timing.interleaved(made, 4) == {"fast": [1.0] * 4, "slow": [3.0] * 4}
