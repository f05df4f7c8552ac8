"""What step fusion is worth inside a pipeline of diffusers, and what fastdiff's sampler is, on the same weights

A case is pipeline-<solver>-<network>-<device>-<dtype>-n<images>-w<w>, a folder that both libraries load; -k takes any
part of it, and "toy" is for rehearsals. A row a provider: "diffusers", the loop of DiTPipeline with the stock
scheduler (pipelines.py), the same once more as "diffusers-again", "diffusers-fused" with the fused scheduler in its
place and nothing else changed, and "fastdiff", the sampler of what fastdiff.load made of the folder. Times are as in
bench_networks.py; first_s is making a pipeline or sampler and its first images, the weights being loaded, fastdiff's
before anything else has been run in the case and the fused pipeline's after the stock one's.

scheduler-<solver>-<network>-<device>-<dtype>-n<images> is a scheduler's step alone at that network's shape: of a chain
of STEPS with no network between them, so that on a GPU the time is the host's for launching, wherever that is longer.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from benchmarks import pipelines, scheduler_steps
from benchmarks.networks import bytes_of
from benchmarks.observe import TookTooLong, energy, launches, limit, why
from benchmarks.pipelines import Case, Ours, Pipeline, Problem
from benchmarks.scheduler_steps import SHAPES
from benchmarks.timing import interleaved
from benchmarks.versions import (
    Exact,
    Version,
    as_benchmarked,
    drawn,
    facts_of,
    leave_out,
    parametrised,
    sampled,
    take_turns,
    timed,
)
from fastdiff.evaluation.results import Row

if TYPE_CHECKING:
    from benchmarks.conftest import Recorder

StepCase = scheduler_steps.Case

CPU_CASES = [
    *(
        Case(solver, "digits", "cpu", dtype, images, steps=50)
        for solver in pipelines.SOLVERS
        # in bfloat16 one image is too few to tell rounding, which DDIM carries on, from a mistake
        for dtype, images in (("float32", 1), ("float32", 8), ("bfloat16", 8))
    ),
    Case("ddim", "adm-64", "cpu", "bfloat16", 1),
    *(Case(solver, "toy", "cpu", dtype, 2) for solver in pipelines.SOLVERS for dtype in ("float32", "bfloat16")),
]
GPU_CASES = [
    Case(solver, "adm-64", "cuda", dtype, images, steps=25)
    for solver, dtype in (("ddim", "float16"), ("ddim", "bfloat16"), ("ddpm", "float16"))
    for images in (1, 8, 64)
]
CPU_STEPS = [
    StepCase(solver, network, "cpu", "float32", images)
    for solver in pipelines.SOLVERS
    for network in SHAPES
    for images in (1, 8)
]
GPU_STEPS = [
    StepCase(solver, network, "cuda", "float16", images)
    for solver in pipelines.SOLVERS
    for network in SHAPES
    for images in (1, 8, 64)
]

# what the fused pipeline is given to draw its first images
PEER_S = {"cpu": 600.0, "cuda": 240.0}
# mean difference of the stock pipeline's images from those in float32, its state being in half precision, too
HALF_ALONE = 0.2


def started(made: Callable[[], Any], problem: Problem, weights: int) -> tuple[Version, Tensor]:
    """A version, and what it draws from the problem's noise, not checked yet"""
    version, images = drawn(made, problem, weights)
    if problem.noise is not None:
        call: Any = version.call
        images = call.replayed()
    return version, images


def facts(problem: Problem, version: Version | None = None) -> Row:
    return facts_of(problem, "pipeline", version) | {"solver": problem.case.solver}


def measure(case: Case, chosen: list[str] | None, rounds: int, record: Recorder) -> None:
    """chosen: what is timed beside "fastdiff" and "diffusers"; None: all"""
    with tempfile.TemporaryDirectory() as folder:
        pipelines.write_folder(case, Path(folder))
        problem = Problem(case, Path(folder))
        model, unet = pipelines.load_ours(problem), pipelines.load_unet(problem)
        weights = bytes_of(unet)
        # before the checks, which would compile our kernels for us
        mine, images = started(lambda: Ours(problem, model), problem, weights)
        stock, stock_images = started(lambda: Pipeline(problem, unet, fused=False), problem, weights)
        in_float32 = stock_images
        if problem.dtype != torch.float32:
            in_float32 = Pipeline(problem, pipelines.load_unet(problem, torch.float32), fused=False).replayed()
        exact = Exact(in_float32, stock_images)
        stock.error = exact.rounding
        assert exact.rounding <= HALF_ALONE, exact.rounding
        mine.error = exact.check(images, problem.dtype)
        versions = {"fastdiff": mine, "diffusers": stock}
        failed: dict[str, str] = {}
        if chosen is None or "diffusers-fused" in chosen:
            try:
                with limit(PEER_S[case.device]):
                    fused, images = started(lambda: Pipeline(problem, unet, fused=True), problem, weights)
                fused.error = exact.check(images, problem.dtype)
                versions["diffusers-fused"] = fused
            except (Exception, TookTooLong) as error:
                # what is wrong, or cannot run, is absent
                failed["diffusers-fused"] = why(error)
        if chosen is None or "diffusers-again" in chosen:
            # the same object called again: what equal code differs by
            versions["diffusers-again"] = dataclasses.replace(stock, times=[], calls=[])
        take_turns(versions, problem.device, rounds, case.steps)

        for name, reason in failed.items():
            record.row(provider=name, **facts(problem), whole=chosen is None, absent=reason)
        # --resume asks for the row of "fastdiff", which comes last
        for name, version in reversed(versions.items()):
            row: dict[str, Any] = facts(problem, version) | {"whole": chosen is None}
            if case.device == "cuda":
                row |= launches(version.call, case.steps) | energy(version.call, case.images)
            record(partial(sampled, version, problem), provider=name, times=version.times, **row)


def measure_steps(case: StepCase, rounds: int, record: Recorder) -> None:
    problem = scheduler_steps.Problem(case)
    chains = scheduler_steps.chains(problem)
    errors = scheduler_steps.check_chains(problem, chains)
    # the same object called again: what equal code differs by
    chains["diffusers-again"] = chains["diffusers"]

    def a_step(chain: scheduler_steps.Chain) -> float:
        return timed(chain, problem.device)[1] / scheduler_steps.STEPS

    times = interleaved({name: partial(a_step, chain) for name, chain in chains.items()}, rounds)
    row: Row = {"id": f"scheduler-{case.id}", "network": case.network, "dtype": case.dtype, "images": case.images}
    row |= {"solver": case.solver, "steps": scheduler_steps.STEPS, "shape": list(case.shape), "when": problem.when}
    # --resume asks for the row of "diffusers-fused", which comes last
    for name in sorted(chains, key="diffusers-fused".__eq__):
        seen = launches(chains[name], scheduler_steps.STEPS) if case.device == "cuda" else {}
        error = errors[name.removesuffix("-again")]
        record(chains[name], case="scheduler", provider=name, times=times[name], **row, **seen, error=error)


# pytest-timeout's clock is the one that limits a peer
@pytest.mark.timeout(0)
@pytest.mark.parametrize("case", parametrised(CPU_CASES, GPU_CASES, "pipeline"))
def test_pipeline(case: Case, device: torch.device, record: Recorder, pytestconfig: pytest.Config) -> None:
    pytest.importorskip("diffusers")
    chosen = pytestconfig.getoption("--providers")
    leave_out(case, device, record, id=f"pipeline-{case.id}", provider="fastdiff", whole=chosen is None)
    with as_benchmarked(device):
        measure(case, None if chosen is None else chosen.split(","), pytestconfig.getoption("--rounds"), record)


@pytest.mark.parametrize("case", parametrised(CPU_STEPS, GPU_STEPS, "scheduler"))
def test_scheduler(case: StepCase, device: torch.device, record: Recorder, pytestconfig: pytest.Config) -> None:
    pytest.importorskip("diffusers")
    leave_out(case, device, record, id=f"scheduler-{case.id}", provider="diffusers-fused")
    with as_benchmarked(device):
        measure_steps(case, pytestconfig.getoption("--rounds"), record)
