"""Chooses the cases, builds each distinct one once, judges all of them and says what was found"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import importlib
import multiprocessing
import pkgutil
import random
import sys
import time
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import triton
from tqdm import tqdm
from triton.runtime.jit import JITFunction

import fastdiff_kernels.jit
from fastdiff_kernels._plan import Plan

from . import table
from .build import TARGETS, Built, build, build_key, faults
from .cases import OPS, Build, Factors, New, Op, case_id
from .covering import covering
from .launcher import launched

ORDERS = 48
MOST_BUILDS = 300  # of the check that runs before every commit


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch of a case, to be built for one target"""

    key: table.Key
    factors: Factors
    made: Build

    @functools.cached_property
    def build_key(self) -> str:
        return build_key(self.made.plan, self.key.target)


def launches(op: Op) -> tuple[list[Launch], list[str]]:
    """Every case for every target, and the cases of which no plan can be made"""
    found, broken = [], []
    for factors in op.cases:
        case = case_id(factors)
        try:
            builds = op.builds(factors, New())
        except Exception as error:
            broken.append(f"{op.name} [{case}]: cannot be planned: {type(error).__name__}: {error}")
            continue
        found += [
            Launch(table.Key(op.name, kernel, case, target), factors, made)
            for kernel, made in builds.items()
            for target in TARGETS
        ]
    return found, broken


def pairs(op: Op, found: Iterable[Launch]) -> set[tuple[str, str]]:
    """Cases and targets that together hold every pair of factor values, the target being a factor too"""
    builds = collections.defaultdict(set)
    for launch in found:
        builds[launch.key.case, launch.key.target].add(launch.build_key)
    rows = [{**factors, "target": target} for factors in op.cases for target in TARGETS]
    # the greedy choice depends on the order of rows: of some, the one with the fewest builds
    orders = [rows, *(random.Random(seed).sample(rows, len(rows)) for seed in range(ORDERS))]
    coverings = [
        {(case_id({name: row[name] for name in op.factors}), row["target"]) for row in map(dict, covering(order))}
        for order in orders
    ]
    return min(coverings, key=lambda chosen: len(set().union(*(builds[each] for each in chosen))))


def all_kernels() -> set[str]:
    """What a plan can launch: functions of fastdiff_kernels.jit called *_kernel"""
    found = set()
    for module in pkgutil.iter_modules(fastdiff_kernels.jit.__path__, "fastdiff_kernels.jit."):
        for name, value in vars(importlib.import_module(module.name)).items():
            if isinstance(value, JITFunction) and name.endswith("_kernel"):
                found.add(Plan(value, (), {}, {}).name)
    return found


def refuses(plan: Plan) -> str | None:
    """Why Triton's launcher would not take the arguments of a plan: some names are its own"""
    try:
        launched(plan, TARGETS["sm_90"].gpu)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def work(op: str, factors: Factors, kernel: str, target: str) -> Built | str:
    """In a process of its own: a plan cannot be sent there, what it is made from can"""
    try:
        return build(OPS[op].builds(factors, New())[kernel].plan, target)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def build_all(wanted: Iterable[Launch], jobs: int) -> dict[str, Built | str]:
    """What each distinct build showed, or why there is none, by build key"""
    distinct: dict[str, Launch] = {}
    for launch in wanted:
        distinct.setdefault(launch.build_key, launch)
    results: dict[str, Built | str] = {}
    # a forked process would inherit locks of threads that it does not have
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
        pending = {
            pool.submit(work, launch.key.op, launch.factors, launch.key.kernel, launch.key.target): key
            for key, launch in distinct.items()
        }
        for done in tqdm(concurrent.futures.as_completed(pending), total=len(pending), unit=" builds", disable=None):
            try:
                results[pending[done]] = done.result()
            except concurrent.futures.BrokenExecutor:
                results[pending[done]] = "a build process died, in this build or in one beside it"
    return results


def judge(
    wanted: Sequence[Launch], results: dict[str, Built | str], committed: table.Table | None
) -> tuple[table.Table, dict[table.Key, list[str]]]:
    """The rows that the builds make, and what is refused; without a committed table what is wrong in itself"""
    rows: table.Table = {}
    refused: dict[table.Key, list[str]] = collections.defaultdict(list)
    for launch in wanted:
        built = results[launch.build_key]
        if isinstance(built, str):
            refused[launch.key] = [f"does not build: {built}"]
            continue
        rows[launch.key] = table.Row.of(built)
        reasons = faults(launch.made, built, launch.key.target)
        if committed is not None:
            reasons += table.worse(launch.key, rows[launch.key], committed)
        if reasons:
            refused[launch.key] = reasons
    return rows, refused


def against_table(
    everything: Iterable[Launch], rows: table.Table, committed: table.Table, only: Collection[str]
) -> list[str]:
    """Cases that came or went since the table was written, whether they were built now or not"""
    cases = {launch.key for launch in everything}
    mine = {key for key in committed if not only or key.op in only}
    found = []
    for keys, what in (
        (mine - cases, "rows of the table have no case"),
        (cases - mine - set(rows), "cases that this run left out have no row in the table"),
    ):
        if keys:
            found.append(f"{len(keys)} {what}; the first is {min(keys)}")
    return found


def unbuilt_kernels(kernels: Collection[str]) -> list[str]:
    """A kernel without a case would not be noticed otherwise"""
    return [f"{kernel}: no case builds it" for kernel in sorted(all_kernels() - set(kernels))]


def show(rows: table.Table) -> None:
    """Per kernel the worst of each target"""
    print(f"{'registers, shared KiB':<24}{'rows':>6}" + "".join(f"{target:>12}" for target in TARGETS))
    for kernel in sorted({key.kernel.split(".")[0] for key in rows}):
        mine = {key: row for key, row in rows.items() if key.kernel.split(".")[0] == kernel}
        cells = []
        for target in TARGETS:
            here = [row for key, row in mine.items() if key.target == target]
            most = max((row.registers for row in here), default=0)
            cells.append(f"{most}, {max(row.shared for row in here) / 1024:.1f}" if here else "-")
        print(f"{kernel:<24}{len(mine):>6}" + "".join(f"{cell:>12}" for cell in cells))


def run(*, pairwise: bool, only: Collection[str], write: bool, jobs: int, path: Path = table.PATH) -> int:
    """The exit status"""
    start = time.perf_counter()
    ops = [op for op in OPS.values() if not only or op.name in only]
    everything: list[Launch] = []
    complaints: list[str] = []
    for op in ops:
        found, broken = launches(op)
        everything += found
        complaints += broken
    wanted = everything
    if pairwise:
        chosen = {
            op.name: pairs(op, [launch for launch in everything if launch.key.op == op.name]) if op.check else set()
            for op in ops
        }
        wanted = [launch for launch in everything if (launch.key.case, launch.key.target) in chosen[launch.key.op]]
    results = build_all(wanted, jobs)

    committed = table.read(path)
    rows, refused = judge(wanted, results, None if write else committed)
    complaints += [f"{key}: {reason}" for key, reasons in refused.items() for reason in reasons]
    if not write:
        complaints += against_table(everything, rows, committed, only)
    kernels = {launch.made.plan.name: launch.made.plan for launch in everything}
    complaints += [f"{name}: cannot be launched: {why}" for name, plan in kernels.items() if (why := refuses(plan))]
    if not only:
        complaints += unbuilt_kernels(kernels)
    built = [result for result in results.values() if isinstance(result, Built)]
    cached = sum(result.cached for result in built)
    if not built:
        complaints.append("nothing was built")
    if pairwise and len(results) > MOST_BUILDS:
        complaints.append(f"{len(results)} builds for every pair of values, at most {MOST_BUILDS} are wanted")

    show(rows)
    worst = max(rows, key=lambda key: rows[key].registers, default=None)
    print(
        f"aot: {len(built)} builds, {cached} of them from Triton's cache, make {len(rows)} rows for"
        f" {len(TARGETS)} targets in {time.perf_counter() - start:.0f} s"
        + (f"; most registers: {rows[worst].registers}, {worst}" if worst else "")
    )
    compiler = f"triton {triton.__version__}"
    if write:
        others = {key: row for key, row in committed.items() if only and key.op not in only}
        kept = {key: row for key, row in rows.items() if key not in refused}
        table.write(others | kept, compiler, path)
        print(f"aot: wrote {len(others | kept)} rows to {path}; what is refused has none")
    if not complaints:
        return 0
    print(*(f"aot: REFUSED {complaint}" for complaint in complaints), sep="\n", file=sys.stderr)
    if table.written_with(path) not in ("", compiler):
        print(f"aot: the table was written with {table.written_with(path)}, this is {compiler}", file=sys.stderr)
    print(f"aot: {len(complaints)} refused", file=sys.stderr)
    return 1
