"""python -m tests.fuzz: damages checkpoints, configs and scheduler configs, and holds what reads them to a law

A damaged input is refused by a typed error, or what is loaded is what it says (targets.py tells how far that can be
seen): no other exception, no crash, no hang, nothing loaded silently, nothing executed. Memory is bounded. A case is
made from (target, seed, number) alone.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pickle
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")


def main(arguments: Sequence[str] | None = None) -> int:
    from .harness import FAULTS, Fault, case_of, run, run_case
    from .targets import KINDS, targets

    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=100_000, help="cases in all (100000)")
    parser.add_argument("--seed", type=int, default=0, help="of the cases (0)")
    parser.add_argument("--only", choices=KINDS, help="targets of one kind")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="end earlier, after so many")
    parser.add_argument("--limit", type=float, default=5.0, help="seconds that a case may take (5)")
    parser.add_argument(
        "--faults", type=Path, default=Path("runs/fuzz"), help="folder for inputs of faults (runs/fuzz)"
    )
    parser.add_argument("--row", type=Path, metavar="FILE.jsonl", help="append the summary to this file")
    parser.add_argument(
        "--replay", nargs=3, metavar=("TARGET", "SEED", "NUMBER"), help="one case again, its input kept"
    )
    chosen = parser.parse_args(arguments)
    found = {target.name: target for target in targets() if chosen.only in (None, target.kind)}
    if not found:
        parser.error(f"--only {chosen.only} has no targets here; is diffusers installed?")

    def keep(fault: Fault) -> None:
        folder = chosen.faults / f"{fault.target}-{fault.seed}-{fault.number}"
        write(folder, case_of(found[fault.target], fault.seed, fault.number).mutated)
        print(f"--replay {fault.target} {fault.seed} {fault.number}: {fault.outcome} after {fault.mutator!r}")
        print(f"    {fault.reason}")
        print(f"    its input is {folder}", flush=True)

    if chosen.replay:
        name, seed, number = chosen.replay[0], int(chosen.replay[1]), int(chosen.replay[2])
        if name not in found:
            parser.error(f"TARGET must be one of {', '.join(found)}, got {name!r}")
        fault = Fault(name, seed, number, *run_case(found[name], seed, number, chosen.limit))
        keep(fault)
        return int(fault.outcome in FAULTS)
    told = 0

    def report(tally: Any) -> None:
        nonlocal told
        for fault in tally.faults[told:]:
            keep(fault)
        told = len(tally.faults)

    tally = run(
        list(found.values()), chosen.count, chosen.seed, limit=chosen.limit, seconds=chosen.seconds, report=report
    )
    report(tally)
    row = {
        "kind": "fuzz",
        "seed": chosen.seed,
        "cases": tally.cases,
        "faults": len(tally.faults),
        "targets": {name: dict(sorted(counter.items())) for name, counter in tally.outcomes.items()},
        "seconds": round(tally.seconds, 1),
        "peak_bytes": tally.peak_bytes,
        **origin(),
    }
    print(json.dumps(row, indent=1))
    if chosen.row is not None:
        from fastdiff.evaluation.results import append_row

        chosen.row.parent.mkdir(parents=True, exist_ok=True)
        append_row(chosen.row, row)
    return int(bool(tally.faults))


def origin() -> dict[str, Any]:
    """Where, when and with what: machine, versions and commit"""
    import torch

    from benchmarks.machine import installed, machine
    from fastdiff.evaluation.results import git_state

    commit, dirty = git_state()
    libraries = ("numpy", "safetensors", "diffusers", "huggingface_hub")
    return {
        **machine(torch.device("cpu")),
        "python": platform.python_version(),
        **{library: installed(library) for library in libraries},
        "commit": commit,
        "dirty": dirty,
        "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
    }


def write(folder: Path, value: Any) -> None:
    """An input, as files where it is some"""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(value, dict) and value and all(isinstance(data, bytes) for data in value.values()):
        for name, data in value.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
    elif isinstance(value, tuple) and isinstance(value[-1], bytes):
        (folder / value[-2]).write_bytes(value[-1])
    else:
        (folder / "input.txt").write_text(repr(value), errors="backslashreplace")
        (folder / "input.pickle").write_bytes(pickle.dumps(value))


if __name__ == "__main__":
    sys.exit(main())
