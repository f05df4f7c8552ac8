"""Whole sampling calls of ADM networks, beside diffusers with the same weights

A case is network-<network>-<device>-<dtype>-n<images>-w<w>; -k takes any part of it, and "toy" is for rehearsals. A row
a provider: "fastdiff", the same calls once more as "again", and diffusers as its users run it, or why it is absent.
Times are milliseconds a step, one evaluation for all images with all that follows it: of whole calls, by their steps,
on a GPU between events. Versions take turns, call by call. first_s: constructing or compiling, and the first images,
fastdiff's before anything else has been run in the case; setup_s: what of it the second call lacks.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch

from benchmarks import network_peers as peers
from benchmarks import networks
from benchmarks.networks import STEPS, Case, Network, Ours, Problem
from benchmarks.observe import TookTooLong, energy, launches, limit, why
from benchmarks.versions import (
    Exact,
    as_benchmarked,
    drawn,
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
    *(Case(name, "cpu", dtype, 1, 1.5) for name in ("adm-64", "adm-128-hc64") for dtype in ("float32", "bfloat16")),
    *(Case("toy", "cpu", dtype, 2, 1.5) for dtype in ("float32", "bfloat16")),
]
GPU_CASES = [
    Case(name, "cuda", "float16", images, w)
    for name in ("adm-64", "adm-128-hc64")
    for images in (1, 8, 64)
    for w in (0.0, 1.5)
]

# what a peer is given to be compiled and to draw its first images; on a GPU a case ends within ten minutes
PEER_S = {"cpu": 600.0, "cuda": 240.0}


def measure(case: Case, chosen: list[str] | None, rounds: int, record: Recorder) -> None:
    """chosen: the peers; None: all"""
    problem = Problem(case)
    unet = networks.build(case.network)
    absent = peers.why_no_diffusers()
    theirs = None if absent else peers.to_diffusers(unet)

    def in_dtype(dtype: torch.dtype) -> Network:
        return peers.as_ours(networks.placed(theirs, problem, dtype, channels_last=False))

    here = networks.placed(unet, problem, channels_last=True)
    weights = networks.bytes_of(here)
    # before the checks, which would compile our kernels for us
    mine, first_images = drawn(lambda: Ours(problem, here), problem, weights)
    errors = networks.check_networks(problem, unet, in_dtype if theirs is not None else None)
    # by hand, and with the other network where there is one
    float32 = networks.placed(unet, problem, torch.float32, channels_last=False)
    images = peers.loop_over(problem, float32 if theirs is None else in_dtype(torch.float32), torch.float32)().cpu()
    del float32
    exact = Exact(images, peers.loop_over(problem, here)())
    mine.error = exact.check(first_images, problem.dtype)
    # the same object called again: what equal code differs by
    versions = {"fastdiff": mine, "again": dataclasses.replace(mine, times=[], calls=[])}
    failed: dict[str, str] = {}
    for name, make in peers.peers(problem).items():
        if chosen is not None and name not in chosen:
            continue
        if absent is not None:
            failed[name] = absent
            continue
        try:
            with limit(PEER_S[case.device]):
                # on a GPU the version's own copy of the weights is counted with the rest
                own = weights if case.device == "cpu" else 0
                versions[name] = started(lambda make=make: make(theirs), problem, exact, own)  # type: ignore[misc]
        except (Exception, TookTooLong) as error:
            # a peer that is wrong, or cannot run, is absent
            failed[name] = why(error)
    take_turns(versions, problem.device, rounds)

    for name, reason in failed.items():
        record.row(provider=name, **facts_of(problem, "network"), whole=chosen is None, absent=reason)
    # --resume asks for the row of "fastdiff", which comes last
    for name, version in reversed(versions.items()):
        row: dict[str, Any] = facts_of(problem, "network", version) | (errors if name == "fastdiff" else {})
        row["whole"] = chosen is None
        if case.device == "cuda":
            row |= launches(version.call, STEPS) | energy(version.call, case.images)
        record(partial(sampled, version, problem), provider=name, times=version.times, **row)


# pytest-timeout's clock is the one that limits a peer
@pytest.mark.timeout(0)
@pytest.mark.parametrize("case", parametrised(CPU_CASES, GPU_CASES, "network"))
def test_network(case: Case, device: torch.device, record: Recorder, pytestconfig: pytest.Config) -> None:
    chosen = pytestconfig.getoption("--providers")
    leave_out(case, device, record, id=f"network-{case.id}", provider="fastdiff", whole=chosen is None)
    with as_benchmarked(device):
        measure(case, None if chosen is None else chosen.split(","), pytestconfig.getoption("--rounds"), record)
