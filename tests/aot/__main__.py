"""python -m tests.aot: builds every Triton kernel for four GPUs without one, and holds what comes out to a table

Refused, with the case, the target and the reason: a build that fails, any spill, more shared memory or a larger grid
than there is, an activation that could be accessed 128 bits at a time and is not, and whatever is worse than the table.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence

# kernels that the interpreter took over cannot be built; triton reads the variable when it is imported
os.environ.pop("TRITON_INTERPRET", None)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.aot", description=__doc__)
    parser.add_argument("--pairwise", action="store_true", help="only cases that hold every pair of factor values")
    parser.add_argument("--op", action="append", default=[], metavar="NAME", help="only this op; may be given again")
    parser.add_argument("--write", action="store_true", help="write the table, if nothing is refused")
    parser.add_argument("--jobs", type=int, default=2, help="processes that build (2)")
    chosen = parser.parse_args(arguments)
    if chosen.write and chosen.pairwise:
        parser.error("--write needs every case, --pairwise leaves some out")
    if importlib.util.find_spec("triton") is None:
        print("aot: triton is not installed, so no kernel was built", file=sys.stderr)
        # the check goes on only where triton cannot be had
        return 0 if chosen.pairwise and sys.platform != "linux" else 1
    from .cases import OPS
    from .gate import run

    unknown = set(chosen.op) - set(OPS)
    if unknown:
        parser.error(f"--op must be one of {', '.join(OPS)}, got {', '.join(sorted(unknown))}")
    return run(pairwise=chosen.pairwise, only=chosen.op, write=chosen.write, jobs=chosen.jobs)


if __name__ == "__main__":
    sys.exit(main())
