"""Steps of training ADM networks, beside diffusers with the same weights

A case is training-<network>-<device>-<dtype>-b<images a step>; -k takes any part of it, and "toy" is for rehearsals. A
row a provider: "fastdiff", the same run once more as "again", both libraries in their settings, or why one is absent.
A call is STEPS steps with draws of their own, timed whole and by its steps, on a GPU between events; versions take
turns, call by call. first_s: making a version and its first step, compiling included, fastdiff's before anything else
has been run in the case. peak_memory_bytes: the most that a later step holds beyond what was held before the version
was made (observe.PeakMemory).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch

from benchmarks import network_peers, training, training_peers
from benchmarks.networks import STEPS
from benchmarks.observe import PeakMemory, TookTooLong, limit, why
from benchmarks.timing import percentiles
from benchmarks.training import Case, Exact, Ours, Problem, Trainer
from benchmarks.versions import Version, as_benchmarked, leave_out, parametrised, take_turns, timed
from fastdiff.evaluation.results import Row

if TYPE_CHECKING:
    from benchmarks.conftest import Recorder

DTYPES = ("float32", "bfloat16")
CPU_CASES = [Case(name, "cpu", dtype, images) for name, images in (("digits", 32), ("toy", 4)) for dtype in DTYPES]
GPU_CASES = [
    Case(name, "cuda", dtype, images) for name, images in (("adm-64", 16), ("digits", 128)) for dtype in DTYPES
]

# steps before one is checked: CUDA graphs of torch.compile are warmed up, captured, and replayed from then on
WARM_UP = 3
# what a version is given to be compiled and to take its first steps; on a GPU a case ends within ten minutes
FIRST_S = {"cpu": 600.0, "cuda": 140.0}


def begun(make: Callable[[], Trainer], problem: Problem) -> tuple[Trainer, float]:
    """A trainer after its first step, and the seconds of both"""
    start = time.perf_counter()
    trainer = make()
    timed(partial(trainer, 1), problem.device)
    return trainer, time.perf_counter() - start


def started(make: Callable[[], Trainer], problem: Problem, exact: Exact) -> Version:
    """A version whose step, warmed up as it is timed, is `exact`"""
    memory = PeakMemory(problem.device)
    trainer, first_s = begun(make, problem)
    trainer(WARM_UP - 1)
    trainer.restart()
    error = exact.check(trainer, trainer.step(exact.draws))
    peak: Row = {"peak_memory_bytes": memory.of(partial(trainer, 1))}
    return Version(trainer, error, first_s, peak)


def facts_of(problem: Problem, version: Version | None = None) -> Row:
    """images: of a step; when: of the run, the same in all rows of versions that took turns"""
    case = problem.case
    row: Row = {
        **{"case": "training", "id": f"training-{case.id}", "network": case.network, "dtype": case.dtype},
        **{"images": case.images, "steps": STEPS, "when": problem.when},
    }
    if version is not None:
        slow, median, fast = (1e3 * case.images / ms for ms in reversed(percentiles(version.times)))
        row |= {"images_per_s_p20": slow, "images_per_s": median, "images_per_s_p80": fast}
        row |= {"first_s": version.first_s, "gradient_error": version.error, "timed": "call", **version.memory}
    return row


def measure(case: Case, chosen: list[str] | None, rounds: int, record: Recorder) -> None:
    """chosen: the settings beside "fastdiff"; None: all"""
    problem = Problem(case)
    unet = training.build(case.network)
    # before the checks, which would compile our kernels for us
    first_s = begun(lambda: Ours(problem, unet), problem)[1]
    absent = network_peers.why_no_diffusers()
    theirs = None if absent else network_peers.to_diffusers(unet)
    exact = Exact(problem, unet, None if absent else lambda of: training_peers.Theirs(of, theirs))
    mine = started(lambda: Ours(problem, unet), problem, exact)
    mine.first_s = first_s
    # the same run called again: what equal code differs by
    versions = {"fastdiff": mine, "again": dataclasses.replace(mine, times=[], calls=[])}
    failed: dict[str, str] = {}
    makers: dict[str, Callable[[], Trainer]] = {"fastdiff-compile": lambda: Ours(problem, unet, compile=True)}
    makers |= {name: partial(make, theirs) for name, make in training_peers.peers(problem).items()}
    for name, make in makers.items():
        if chosen is not None and name not in chosen:
            continue
        if absent is not None and name.startswith("diffusers"):
            failed[name] = absent
            continue
        try:
            with limit(FIRST_S[case.device]):
                versions[name] = started(make, problem, exact)
        except (Exception, TookTooLong) as error:
            # what is wrong, or cannot run, is absent
            failed[name] = why(error)
    take_turns(versions, problem.device, rounds)

    for name, reason in failed.items():
        record.row(provider=name, **facts_of(problem), whole=chosen is None, absent=reason)
    # --resume asks for the row of "fastdiff", which comes last
    for name, version in reversed(versions.items()):
        row: dict[str, Any] = facts_of(problem, version) | (exact.errors if name == "fastdiff" else {})
        # pytest-benchmark is given a step
        record(partial(version.call, 1), provider=name, times=version.times, **row, whole=chosen is None)


# pytest-timeout's clock is the one that limits a peer
@pytest.mark.timeout(0)
@pytest.mark.parametrize("case", parametrised(CPU_CASES, GPU_CASES, "training"))
def test_training(case: Case, device: torch.device, record: Recorder, pytestconfig: pytest.Config) -> None:
    chosen = pytestconfig.getoption("--providers")
    leave_out(case, device, record, id=f"training-{case.id}", provider="fastdiff", whole=chosen is None)
    with as_benchmarked(device), torch.enable_grad():
        measure(case, None if chosen is None else chosen.split(","), pytestconfig.getoption("--rounds"), record)
