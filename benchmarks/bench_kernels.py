"""Each kernel at each shape of the networks, beside eager PyTorch, torch.compile and a copy of the same bytes

A case is op-network-batch-shape, and -k takes any part of it: -k norm-adm64-b16- . Per case one row a provider:
"fastdiff", the same once more as "again" (what the difference of equal code is), and those of --providers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from benchmarks.cases import Case, Work, cpu_cases, gpu_cases
from benchmarks.timing import cache_bytes, interleaved, num_copies, percentiles, timers
from benchmarks.traffic import FORMULAS, moved
from fastdiff_kernels import _plan
from fastdiff_kernels._plan import Plan

if TYPE_CHECKING:
    from benchmarks.conftest import Recorder

PEERS = ("eager", "compile", "copy")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# users' code rounds after every step
EAGER_TOLERANCE = 8
# elements that are compared in float64
CHECKED = 2**25

Call = Callable[[], object]


def compare(got: Sequence[Tensor], exact: Sequence[Tensor], work: Work, rows: Tensor, tolerance: float) -> float:
    """Relative error of these rows in the 2-norm, the largest of the outputs; AssertionError if one is wrong"""
    worst = 0.0
    for output, want in zip(got, exact, strict=True):
        output = work.take(output, rows).double()
        assert output.shape == want.shape
        error = output - want
        relative = float(error.norm() / want.norm())
        # also by element, or a wrong pixel would drown
        largest = float((error.abs() / (1 + want.abs())).max())
        assert relative <= tolerance and largest <= 8 * tolerance, (relative, largest, tolerance)
        worst = max(worst, relative)
    return worst


def check(work: Work, function: Callable[..., Sequence[Tensor]], private: bool, tolerance: float) -> float:
    """The error of function, with or without the arguments that only ours takes; the arguments are left as they are"""
    given = work.arguments if private else work.public
    size = max(value.numel() // work.rows for name, value in given.items() if name not in work.shared)
    count = min(work.rows, max(1, CHECKED // size))
    rows = torch.linspace(0, work.rows - 1, count, device=next(iter(given.values())).device).round().long()
    exact = work.exact(**work.some(rows))
    got = function(**{k: v.clone() if k in work.written else v for k, v in given.items()})
    return compare(got, exact, work, rows, tolerance)


def launches(work: Work) -> list[Plan]:
    plans: list[Plan] = []
    _plan.observers.append(plans.append)
    try:
        work.ours(**work.arguments)
    finally:
        _plan.observers.remove(plans.append)
    return plans


def copy_of(work: Work, generator: torch.Generator) -> Call:
    """Reads half of the floor's bytes and writes as many"""
    source = torch.randn(work.floor // 8 + 1, generator=generator, device=generator.device)
    return partial(torch.empty_like(source).copy_, source)


def versions(works: Sequence[Work], peers: Sequence[str], generator: torch.Generator) -> dict[str, list[Call] | str]:
    """Calls over all copies of the data by provider, or why there are none"""
    first = works[0]
    tolerance = EAGER_TOLERANCE * TOLERANCE[_dtype(first)]
    made: dict[str, list[Call] | str] = {
        name: [partial(work.ours, **work.arguments) for work in works] for name in ("fastdiff", "again")
    }
    for name in peers:
        try:
            if name == "copy":
                made[name] = [copy_of(work, generator) for work in works]
                continue
            # dynamo counts shapes, and gives up after a few, silently
            torch._dynamo.reset()
            function = first.eager if name == "eager" else torch.compile(first.eager, dynamic=False)
            if first.random:
                function(**first.public)
            else:
                check(first, function, False, tolerance)
            made[name] = [partial(function, **work.public) for work in works]
        except Exception as error:
            # a peer that is wrong, or cannot run, is absent
            made[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return made


def _dtype(work: Work) -> torch.dtype:
    """The narrowest of the arguments, in which results are rounded"""
    floats = [value.dtype for value in work.arguments.values() if value.is_floating_point()]
    return min(floats, key=lambda dtype: (dtype.itemsize, -TOLERANCE[dtype]), default=torch.float32)


def measure(
    case: Case, device: torch.device, dtype: torch.dtype, peers: Sequence[str], rounds: int, record: Recorder
) -> None:
    generator = torch.Generator(device).manual_seed(0)
    work = case.make(generator, dtype)
    error = check(work, work.ours, True, TOLERANCE[_dtype(work)])
    plans = launches(work)
    cache = cache_bytes(device)
    works = [work] + [case.make(generator, dtype) for _ in range(num_copies(work.floor, cache) - 1)]
    made = versions(works, peers, generator)
    runs = timers({k: v for k, v in made.items() if not isinstance(v, str)}, device, work.floor)
    failed = {k: v for k, v in {**made, **runs}.items() if isinstance(v, str)}
    times = interleaved({k: v for k, v in runs.items() if not isinstance(v, str)}, rounds)
    assert not {"fastdiff", "again"} & set(failed), failed
    p50 = {name: percentiles(found)[1] for name, found in times.items()}
    facts = {
        **{"op": case.op, "network": case.network, "batch": case.batch, "shape": case.shape, "id": case.id},
        **{"dtype": str(dtype).removeprefix("torch."), "floor_bytes": work.floor},
        **{"copies": len(works), "cache_bytes": cache, "timed": "graph" if device.type == "cuda" else "host"},
    }
    # --resume asks for the row of "fastdiff", which comes last
    for name in reversed(made):
        if name in failed:
            record.row(case="kernel", provider=name, **facts, absent=failed[name])
            continue
        mine = name in ("fastdiff", "again")
        row: dict[str, Any] = {**facts, "GB_per_s": work.floor / p50[name] / 1e6}
        if mine:
            counted = plans and all(plan.name in FORMULAS for plan in plans)
            row |= {"launches": len(plans), "bytes": moved(plans) if counted else None, "relative_error": error}
            row["implementation"] = "triton" if plans else "reference"
        if "copy" in p50:
            row["fraction_of_copy"] = p50["copy"] / p50[name]
        record(partial(work.ours, **work.arguments), case="kernel", provider=name, times=times[name], **row)


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.id) for case in cpu_cases()]
    + [pytest.param(case, id=case.id, marks=pytest.mark.gpu) for case in gpu_cases()],
)
def test_kernel(case: Case, device: torch.device, record: Recorder, pytestconfig: pytest.Config) -> None:
    dtype = getattr(torch, pytestconfig.getoption("--dtype") or ("float16" if device.type == "cuda" else "float32"))
    if record.has(case="kernel", id=case.id, dtype=str(dtype).removeprefix("torch."), provider="fastdiff"):
        pytest.skip("has rows already (--resume)")
    chosen = pytestconfig.getoption("--providers")
    peers = PEERS if chosen is None else [name for name in chosen.split(",") if name]
    with torch.no_grad():
        measure(case, device, dtype, peers, pytestconfig.getoption("--rounds"), record)
