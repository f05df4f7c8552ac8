"""Cases by (target, seed, number), run one by one in a process that may crash or hang, and what came of them

Law: a mutated input is refused by the target's own errors, or what is loaded is what it says. Anything else is a fault:
another exception ("raised"), no end within the time limit ("hang"), a dead process ("crash"), another thing loaded than
the input says ("silent"), code of the input executed ("executed").
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import random
import resource
import select
import signal
import struct
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .archives import SPRUNG

__all__ = ["Case", "Fault", "Tally", "Target", "case_of", "run", "run_case"]

FAULTS = ("raised", "hang", "crash", "silent", "executed")
# of an error's sentence in letters: it may repeat a value, but not a file
_LONGEST = 20_000
# bytes of address space beyond what the process has at its start
_MEMORY = 2**32
_GRACE = 4


@dataclass(frozen=True)
class Case:
    """original, mutated: what target.load takes, before and after; mutator: what was done."""

    mutator: str
    original: Any
    mutated: Any


@dataclass(frozen=True)
class Target:
    """Something that reads what others wrote.

    make: a case from a generator. load: reads an input. judge: the outcome of what was loaded, "same" as the original
    or "as told" where the mutated input says something else and that was loaded; AssertionError where it was not.
    errors: how load may refuse. whole: original inputs, which must load.
    """

    name: str
    kind: str
    make: Callable[[random.Random], Case]
    load: Callable[[Any], Any]
    judge: Callable[[Case, Any], str]
    errors: tuple[type[Exception], ...]
    whole: Sequence[Any] = ()


@dataclass(frozen=True)
class Fault:
    target: str
    seed: int
    number: int
    mutator: str
    outcome: str
    reason: str


@dataclass
class Tally:
    """outcomes: by target and outcome; seconds: in all; peak_bytes: of the processes that ran cases."""

    outcomes: dict[str, Counter[str]] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    seconds: float = 0.0
    peak_bytes: int = 0

    @property
    def cases(self) -> int:
        return sum(sum(counter.values()) for counter in self.outcomes.values())


class Hang(BaseException):
    """Not an Exception: a loader that catches those must not swallow it."""


def case_of(target: Target, seed: int, number: int) -> Case:
    return target.make(random.Random(f"{target.name} {seed} {number}"))


def run_case(target: Target, seed: int, number: int, limit: float = 5.0) -> tuple[str, str, str]:
    """(mutator, outcome, reason) of one case; limit: seconds"""
    case = case_of(target, seed, number)
    return case.mutator, *_outcome(target, case, limit)


def _outcome(target: Target, case: Case, limit: float) -> tuple[str, str]:
    SPRUNG.clear()
    try:
        with _limited(limit):
            loaded = target.load(case.mutated)
    except target.errors as error:
        sentence = str(error)
        outcome = (
            ("refused", "")
            if 0 < len(sentence) <= _LONGEST
            else ("raised", f"{len(sentence)} letters: {sentence[:200]}")
        )
    except Hang:
        outcome = "hang", f"no end within {limit} s"
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        outcome = (
            "raised",
            f"{type(error).__name__} at {os.path.basename(where.filename)}:{where.lineno}: {str(error)[:200]}",
        )
    else:
        try:
            outcome = target.judge(case, loaded), ""
        # a judge that cannot follow what was loaded does not approve of it
        except Exception as error:
            outcome = "silent", f"{type(error).__name__}: {str(error)[:500]}"
    return ("executed", SPRUNG[0]) if SPRUNG else outcome


def check_whole(target: Target, limit: float = 5.0) -> None:
    """AssertionError unless what is not mutated loads as it is: the next valid call succeeds"""
    for original in target.whole:
        outcome, reason = _outcome(target, Case("none", original, original), limit)
        assert outcome == "same", f"{target.name} does not load what is not mutated: {outcome} {reason}"


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run(
    targets: Sequence[Target],
    count: int,
    seed: int,
    *,
    limit: float = 5.0,
    seconds: float = float("inf"),
    report: Callable[[Tally], None] = lambda tally: None,
) -> Tally:
    """count cases, the targets in turn, in child processes; another one goes on where one died

    limit: seconds a case may take. seconds: of the whole run, which then ends early. report: called now and then.
    """
    tally = Tally({target.name: Counter() for target in targets})
    begin, position = time.monotonic(), 0
    while position < count and time.monotonic() - begin < seconds:
        position = _child(targets, position, count, seed, limit, begin + seconds, tally, report)
    tally.seconds = time.monotonic() - begin
    return tally


def _child(
    targets: Sequence[Target],
    position: int,
    count: int,
    seed: int,
    limit: float,
    until: float,
    tally: Tally,
    report: Callable[[Tally], None],
) -> int:
    """Runs cases from position on in a process of its own; returns the number of the first case not run"""
    shared = mmap.mmap(-1, 8)
    shared[:] = struct.pack("q", position)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(reader)
            with open(writer, "w", buffering=1) as lines:
                _work(targets, range(position, count), seed, limit, until, shared, lines)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writer)
    finished, hung = False, False
    with open(reader, "rb", buffering=0) as pipe:
        pending = b""
        while True:
            ready, _, _ = select.select([pipe], [], [], _GRACE * limit + 1)
            if not ready:
                # it does not even hear the alarm
                hung = True
                os.kill(pid, signal.SIGKILL)
            if not (chunk := pipe.read(65536)):
                break
            *lines, pending = (pending + chunk).split(b"\n")
            finished = any([_count(tally, json.loads(line)) for line in lines]) or finished
            report(tally)
    status = os.waitpid(pid, 0)[1]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 1:
        raise RuntimeError("the harness itself failed, see above")
    if finished:
        return count
    number = struct.unpack("q", shared[:])[0]
    target, number_of_target = targets[number % len(targets)], number // len(targets)
    outcome = "hang" if hung else "crash"
    reason = f"no end within {_GRACE * limit} s, deaf" if hung else f"the process died, wait status {status}"
    mutator = case_of(target, seed, number_of_target).mutator
    tally.outcomes[target.name][outcome] += 1
    tally.faults.append(Fault(target.name, seed, number_of_target, mutator, outcome, reason))
    return number + 1


def _work(
    targets: Sequence[Target], numbers: range, seed: int, limit: float, until: float, shared: Any, lines: Any
) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * mmap.PAGESIZE
    resource.setrlimit(resource.RLIMIT_AS, (size + _MEMORY, size + _MEMORY))
    for target in targets:
        check_whole(target)
    for number in numbers:
        if time.monotonic() > until:
            break
        shared[:] = struct.pack("q", number)
        target = targets[number % len(targets)]
        mutator, outcome, reason = run_case(target, seed, number // len(targets), limit)
        lines.write(json.dumps([target.name, seed, number // len(targets), mutator, outcome, reason]) + "\n")
    for target in targets:
        check_whole(target)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    lines.write(json.dumps({"peak_bytes": peak}) + "\n")


def _count(tally: Tally, line: Any) -> bool:
    """Whether the child ended well"""
    if isinstance(line, dict):
        tally.peak_bytes = max(tally.peak_bytes, line["peak_bytes"])
        return True
    fault = Fault(*line)
    tally.outcomes[fault.target][fault.outcome] += 1
    if fault.outcome in FAULTS:
        tally.faults.append(fault)
    return False
