"""The ladder: what each thing that fastdiff does is worth, from its network with one op at a time to its own step

A case is ladder-<network>-<device>-<dtype>-n<images>-w<w>, a row a rung, the rungs timed in turn; where w is 0, what
the null half costs that is left out there. Rows are as in bench_networks.py, but that first_s leaves out what was
compiled for the checks and for earlier rungs.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import ablations, network_peers, networks
from benchmarks.networks import STEPS, Call, Case, OnRow, Ours, Problem
from benchmarks.observe import launches
from benchmarks.versions import (
    Exact,
    Version,
    as_benchmarked,
    facts_of,
    leave_out,
    parametrised,
    sampled,
    started,
    take_turns,
)

if TYPE_CHECKING:
    from benchmarks.conftest import Recorder

CPU_CASES = [
    *(Case("adm-64", "cpu", "bfloat16", 1, w) for w in (0.0, 1.5)),
    *(Case("toy", "cpu", "float32", 2, w) for w in (0.0, 1.5)),
]
GPU_CASES = [Case("adm-64", "cuda", "float16", images, w) for images in (1, 8) for w in (0.0, 1.5)]

NULL_HALF = ("null half run", "null half left out")


def rung(problem: Problem, unet: nn.Module, missing: list[str], used: ablations.Used) -> Call:
    """A sampling call without what is missing"""
    ours = Ours(problem, ablations.network(missing, unet, used), **ablations.options(missing))

    def call(on_row: OnRow = None) -> Tensor:
        with ablations.undone(missing, used):
            return ours(on_row)

    return call


def rungs(problem: Problem, unet: nn.Module, exact: Exact) -> dict[str, Version | str]:
    """Versions by what was added last, from one op at a time; or why there is none

    Every one is checked to draw the exact images.
    """
    weights = networks.bytes_of(unet)
    if not problem.case.w:
        full = Problem(dataclasses.replace(problem.case, w=ablations.NULL_HALF))
        return {
            name: started(lambda p=p: Ours(p, unet), p, exact, weights)  # type: ignore[misc]
            for name, p in zip(NULL_HALF, (full, problem), strict=True)
        }
    names = list(ablations.LADDER)
    made: dict[str, Version | str] = {}
    used: ablations.Used = ablations.Counter()
    for done, added in enumerate(["one op at a time", *names]):
        if done and not used[added]:
            made[added] = "nothing of it to undo here"
            continue
        used = ablations.Counter()
        # where a GPU captures, that happened inside the sampler
        used["graph"] += problem.device.type == "cuda"
        make = partial(rung, problem, unet, names[done:], used)
        made[added] = started(make, problem, exact, weights)
    return made


def measure(case: Case, rounds: int, record: Recorder) -> None:
    problem = Problem(case)
    unet = networks.build(case.network)
    float32 = networks.placed(unet, problem, torch.float32, channels_last=False)
    images = network_peers.loop_over(problem, float32, torch.float32)()
    del float32
    unet = networks.placed(unet, problem, channels_last=True)
    made = rungs(problem, unet, Exact(images, network_peers.loop_over(problem, unet)()))
    versions = {name: version for name, version in made.items() if isinstance(version, Version)}
    take_turns(versions, problem.device, rounds)
    # --resume asks for the last rung
    for position, (name, version) in enumerate(made.items()):
        place: dict[str, Any] = {"provider": "fastdiff", "rung": position, "added": name}
        if isinstance(version, str):
            record.row(**place, **facts_of(problem, "ladder"), absent=version)
            continue
        row = facts_of(problem, "ladder", version)
        if case.device == "cuda":
            row |= launches(version.call, STEPS)
        record(partial(sampled, version, problem), times=version.times, **place, **row)


# a ladder takes minutes on a CPU
@pytest.mark.timeout(0)
@pytest.mark.parametrize("case", parametrised(CPU_CASES, GPU_CASES, "ladder"))
def test_ladder(case: Case, device: torch.device, record: Recorder, pytestconfig: pytest.Config) -> None:
    last = list(ablations.LADDER)[-1] if case.w else NULL_HALF[-1]
    leave_out(case, device, record, id=f"ladder-{case.id}", added=last)
    with as_benchmarked(device):
        measure(case, pytestconfig.getoption("--rounds"), record)
