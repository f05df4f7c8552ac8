"""Finds launch settings on the GPU at hand and writes them to kernels/fastdiff_kernels/configs/<GPU name>.json

    PYTHONPATH=.:kernels python3 -m benchmarks.tune [--ops norm,residual] [--only adm64-b16-] [--budget 540]

Per kernel and bucket of shapes one setting after the other is varied, starting from the rule. A candidate's results
must equal the rule's, each is timed as replays of a CUDA graph, and it is kept only if it beats the rule by more than
the rule differs from itself. The file is written after every bucket; what it has is not measured again.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import BATCHES, Case, Work, gpu_cases
from benchmarks.machine import machine
from benchmarks.timing import Replay, apart, cache_bytes, interleaved, num_calls, num_copies, percentiles
from fastdiff.evaluation.results import git_state
from fastdiff_kernels import _plan, _tuning
from fastdiff_kernels._plan import Plan

Settings = dict[str, int]
Found = dict[str, Any]

POWERS = {"num_warps": (1, 16), "num_stages": (1, 4)}
BLOCKS = (8, 1024)
# more cases of a bucket say little more about its kernel; larger ones need no company
MAX_CASES, MAX_BYTES = 3, 4 * 10**9
# a smaller gain is not worth a second look
STEP = 0.99


def candidates(name: str, value: int) -> list[int]:
    """Other values for a setting, nearest first; a rule of the shape alone has none"""
    if name == "num_stages":
        return [n for n in range(1, POWERS[name][1] + 1) if n != value]
    low, high = POWERS.get(name, BLOCKS)
    if name == "CHUNKS" or value < 1 or value & (value - 1):
        return []
    steps = (value * 2, value // 2, value * 4, value // 4)
    return [n for n in steps if low <= n <= high]


def search(rule: Settings, measure: Callable[[Settings], float | None], expired: Callable[[], bool]) -> Settings:
    """The fastest settings found by varying one at a time until none helps

    measure gives None for settings that cannot be used; the rule itself, where that is so.
    """
    best, fastest = rule, measure(rule)
    if fastest is None:
        return rule
    tried = [rule]
    improved = True
    while improved:
        improved = False
        for name in rule:
            for value in candidates(name, best[name]):
                settings = best | {name: value}
                if settings in tried:
                    continue
                if expired():
                    return best
                tried.append(settings)
                found = measure(settings)
                if found is not None and found < STEP * fastest:
                    best, fastest, improved = settings, found, True
    return best


def verdict(rule: Sequence[float], again: Sequence[float], best: Sequence[float]) -> bool:
    """Whether best beats the rule by more than the rule, timed twice, differs from itself"""
    slower = min(percentiles(rule)[1], percentiles(again)[1])
    noise = abs(percentiles(rule)[1] - percentiles(again)[1])
    return apart(best, rule) and apart(best, again) and slower - percentiles(best)[1] > noise


@dataclasses.dataclass
class Target:
    """A kernel and a bucket of shapes, with the rule's settings and cases that launch it"""

    kernel: str
    bucket: str
    rule: Settings
    cases: list[Case] = dataclasses.field(default_factory=list)


def targets(cases: Sequence[Case], asked: Callable[[Case], Iterator[tuple[str, str, Settings]]]) -> list[Target]:
    """Every kernel and bucket that cases ask settings for, in the order in which they come"""
    found: dict[tuple[str, str], Target] = {}
    for case in cases:
        for kernel, bucket, rule in asked(case):
            target = found.setdefault((kernel, bucket), Target(kernel, bucket, rule))
            if case not in target.cases and len(target.cases) < MAX_CASES:
                target.cases.append(case)
    return list(found.values())


def read(path: Path) -> Found:
    return json.loads(path.read_text()) if path.exists() else {"settings": {}, "measured": {}}


def write(path: Path, found: Found) -> None:
    """Whole or not at all"""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    os.replace(part, path)


def note(found: Found, target: Target, best: Settings, kept: bool, evidence: Mapping[str, object]) -> None:
    """Adds what was found: settings only if kept, the evidence always"""
    place = found["settings"].setdefault(target.kernel, {})
    place.pop(target.bucket, None)
    if kept:
        place[target.bucket] = {name: value for name, value in best.items() if value != target.rule[name]}
    measured = found["measured"].setdefault(target.kernel, {})
    measured[target.bucket] = {"rule": target.rule, "best": best, "kept": kept, **evidence}


class Bench:
    """A target on the GPU: the data of its cases, and the kernel's launches under any settings"""

    def __init__(self, target: Target, device: torch.device, dtype: torch.dtype) -> None:
        self.target = target
        cache = cache_bytes(device)
        self.works: list[list[Work]] = []
        for case in target.cases:
            generator = torch.Generator(device).manual_seed(0)
            first = case.make(generator, dtype)
            if self.works and first.floor > MAX_BYTES:
                break
            copies = num_copies(first.floor, cache)
            self.works.append([first] + [case.make(generator, dtype) for _ in range(copies - 1)])
        self.floor = sum(works[0].floor for works in self.works)
        self.expected = self.outputs(target.rule)

    def outputs(self, settings: Settings) -> list[torch.Tensor]:
        """What the cases compute, each from the same arguments"""
        results = []
        with self.using(settings):
            for works in self.works:
                work = works[0]
                given = {k: v.clone() if k in work.written else v for k, v in work.arguments.items()}
                results += [output.clone() for output in work.ours(**given)]
        return results

    def using(self, settings: Settings) -> Any:
        return _Trial(self.target.kernel, settings)

    def right(self, settings: Settings) -> bool:
        """The order of sums may differ, by which a result may round to the other side"""
        for got, want in zip(self.outputs(settings), self.expected, strict=True):
            error = torch.linalg.vector_norm(got.float() - want.float())
            if not error <= 1e-3 * torch.linalg.vector_norm(want.float()):
                return False
        return True

    def replay(self, settings: Settings) -> Replay:
        plans: list[Plan] = []
        with self.using(settings), _observing(plans):
            for copy in range(max(map(len, self.works))):
                for works in self.works:
                    work = works[copy % len(works)]
                    work.ours(**work.arguments)
        launches = [plan.launch for plan in plans if plan.name == self.target.kernel]
        return Replay(launches, num_calls(len(launches), self.floor), torch.cuda.graph_pool_handle())

    def measure(self, settings: Settings) -> float | None:
        try:
            if not self.right(settings):
                print(f"  {settings}: other results than the rule's", flush=True)
                return None
            return percentiles(interleaved({"": self.replay(settings)}, 10)[""])[1]
        except Exception as error:
            print(f"  {settings}: {type(error).__name__}", flush=True)
            return None

    def compare(self, best: Settings) -> dict[str, list[float]]:
        """Times of the rule, the rule again and best, in turn"""
        versions = {"rule": self.target.rule, "again": self.target.rule, "best": best}
        return interleaved({name: self.replay(settings) for name, settings in versions.items()}, 40)


class _Trial:
    def __init__(self, kernel: str, settings: Settings) -> None:
        self.kernel, self.settings = kernel, settings

    def __enter__(self) -> None:
        _tuning.trial[self.kernel] = self.settings

    def __exit__(self, *_: object) -> None:
        del _tuning.trial[self.kernel]


class _observing:
    def __init__(self, plans: list[Plan]) -> None:
        self.add = plans.append

    def __enter__(self) -> None:
        _plan.observers.append(self.add)

    def __exit__(self, *_: object) -> None:
        _plan.observers.remove(self.add)


def asked_on(device: torch.device, dtype: torch.dtype) -> Callable[[Case], Iterator[tuple[str, str, Settings]]]:
    """What a case asks settings for, found by running it once"""

    def asked(case: Case) -> Iterator[tuple[str, str, Settings]]:
        calls: list[tuple[str, str, Settings]] = []

        def observe(kernel: str, bucket: str, rule: Settings) -> None:
            calls.append((kernel, bucket, rule))

        _tuning.observers.append(observe)
        try:
            work = case.make(torch.Generator(device).manual_seed(0), dtype)
            work.ours(**work.arguments)
        finally:
            _tuning.observers.remove(observe)
        yield from calls

    return asked


def tune(
    todo: Sequence[Target],
    path: Path,
    bench: Callable[[Target], Any],
    provenance: Mapping[str, object],
    expired: Callable[[], bool],
) -> Found:
    """Searches each target in turn until expired, and writes what it found after each; returns the file's contents"""
    found = read(path)
    for target in todo:
        if target.bucket in found["measured"].get(target.kernel, {}):
            continue
        if expired():
            break
        made = bench(target)
        best = search(target.rule, made.measure, expired)
        kept, times = False, {}
        if best != target.rule:
            times = made.compare(best)
            kept = verdict(times["rule"], times["again"], times["best"])
        elif expired():
            break
        medians = {f"{name}_ms": percentiles(values)[1] for name, values in times.items()}
        date = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}"
        evidence = {**medians, "cases": [case.id for case in target.cases], **provenance, "date": date}
        note(found, target, best, kept, evidence)
        write(path, found)
        print(f"{target.kernel} {target.bucket}: {best if kept else 'the rule'} {medians}", flush=True)
        del made
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--ops", default=None, help="of the cases' ids, comma-separated; default: all")
    parser.add_argument("--only", default="", help="cases whose id contains this")
    parser.add_argument("--dtype", default="float16", help="float16, bfloat16 or float32")
    parser.add_argument("--budget", type=float, default=540, help="seconds after which nothing new is begun")
    parser.add_argument("--out", type=Path, default=None, help="file; default: where the kernels look for it")
    parser.add_argument("--commit", default=None, help="commit to record; default: asks git")
    parser.add_argument("--state", default=None, choices=("clean", "dirty"), help="whether the tree differs from it")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("python -m benchmarks.tune needs a CUDA device, and this machine has none", file=sys.stderr)
        sys.exit(2)
    end = time.monotonic() + options.budget
    device, dtype = torch.device("cuda"), getattr(torch, options.dtype)
    commit, dirty = git_state() if options.commit is None else (options.commit, None)
    if commit == "unknown":
        parser.error("--commit must be given where git says none: what is measured keeps its commit")
    dirty = dirty if options.state is None else options.state == "dirty"
    cases = [case for case in gpu_cases() if options.only in case.id]
    if options.ops is not None:
        cases = [case for case in cases if case.op in options.ops.split(",")]
    # the middle batch first, and the smaller network: what matters most if time runs out
    order = {batch: i for i, batch in enumerate((BATCHES[1], BATCHES[0], BATCHES[2]))}
    cases.sort(key=lambda case: order[case.batch])
    path = options.out or _tuning.config_file(torch.cuda.get_device_name(device))
    provenance = {**machine(device), "commit": commit, "dirty": dirty}
    found = read(path)
    # a bucket of all batches is measured at the first
    for batch in dict.fromkeys(case.batch for case in cases):
        if time.monotonic() > end:
            break
        with torch.no_grad():
            todo = targets([case for case in cases if case.batch == batch], asked_on(device, dtype))
            found = tune(
                todo, path, lambda target: Bench(target, device, dtype), provenance, lambda: time.monotonic() > end
            )
    kept = sum(len(buckets) for buckets in found["settings"].values())
    done = sum(len(buckets) for buckets in found["measured"].values())
    print(f"{done} buckets measured, {kept} with settings of their own, in {path}")


if __name__ == "__main__":
    main()
