"""Milliseconds a call: several versions in turn, so that a clock that drifts drifts for all of them

On a GPU each version is one CUDA graph of calls over copies of its data that together exceed the cache, timed between
events; on a CPU calls are timed one by one. Nothing here checks results: check before timing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

Calls = Sequence[Callable[[], object]]

MAX_COPIES = 256
# of one time p20 and p80 are that time, and equal code would differ
LEAST_ROUNDS = 3
# a replay is long against the resolution of events and the start of a graph, but not of one call that is long itself
MIN_CALLS, MIN_REPLAY_BYTES = 20, 4 * 10**9


def cache_bytes(device: torch.device) -> int:
    """L2 of a GPU; nothing is rotated on a CPU"""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0


def num_copies(moved: int, cache: int) -> int:
    """Sets of data such that twice the cache passes through before one is used again"""
    return min(MAX_COPIES, max(1, -(-2 * cache // max(moved, 1))))


def num_calls(copies: int, moved: int) -> int:
    """Calls in one replay, each copy equally often"""
    wanted = min(MIN_CALLS, -(-MIN_REPLAY_BYTES // max(moved, 1)))
    return copies * -(-wanted // copies)


def percentiles(times: Sequence[float]) -> tuple[float, float, float]:
    """p20, p50, p80"""
    p20, p50, p80 = np.percentile(times, (20, 50, 80))
    return float(p20), float(p50), float(p80)


def apart(times: Sequence[float], others: Sequence[float]) -> bool:
    """Whether times are below others with no overlap from p20 to p80"""
    return percentiles(times)[2] < percentiles(others)[0]


class Replay:
    """count of these calls, in turn, as one CUDA graph"""

    def __init__(self, calls: Calls, count: int, pool: Any) -> None:
        self.count = count
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in (calls[0],) * 2:
                call()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            # results are kept until the end, or all calls would write one block that stays in the cache
            kept = [call() for call in calls]
            for i in range(len(calls), count):
                calls[i % len(calls)]()
            del kept
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self) -> float:
        self.start.record()
        self.graph.replay()
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end) / self.count


def on_host(calls: Calls) -> Callable[[], float]:
    """Times the next of calls, in turn"""
    position = 0

    def run() -> float:
        nonlocal position
        call = calls[position % len(calls)]
        position += 1
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)

    return run


def timers(versions: Mapping[str, Calls], device: torch.device, moved: int) -> dict[str, Callable[[], float] | str]:
    """A timer a version, or why it cannot be had; moved: bytes of one call, about"""
    # one pool: what a version leaves behind between its calls may lie where another's lay
    pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
    result: dict[str, Callable[[], float] | str] = {}
    for name, calls in versions.items():
        try:
            result[name] = on_host(calls) if pool is None else Replay(calls, num_calls(len(calls), moved), pool)
        except Exception as error:
            result[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return result


def interleaved(runs: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """rounds times of each version, after a first round that does not count"""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(rounds + 1):
        for name, run in runs.items():
            elapsed = run()
            if round_:
                times[name].append(elapsed)
    return times
