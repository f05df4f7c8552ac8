"""Whether a build is what a launch would build: asks Triton's own launcher, and prints as JSON where they differ

Plans are made a second time from tensors on the CPU, which have addresses; Triton's binder looks at those as it does in
a launch and hands its compiler a source, whose hash must be that of the gate's.
"""

from __future__ import annotations

import json
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from fastdiff_kernels._plan import Plan

from .build import TARGETS, options, source
from .cases import OPS, New, case_id

MOST = 1 << 31  # bytes that a plan's tensors may have; pages that nobody touches cost nothing
GPUS = {name: TARGETS[name].gpu for name in ("sm_90", "gfx942")}  # one a backend: the binder knows no more


@triton.jit
def _probe_kernel(x_ptr, y_ptr, a, b, SIZE: tl.constexpr, FLAG: tl.constexpr):
    pass


def launched(plan: Plan, gpu: GPUTarget) -> tuple[ASTSource, Any]:
    """What plan.launch() would give to the compiler, and its options, by Triton's code for it"""
    backend = make_backend(gpu)
    kernel = plan.kernel
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    given = {"num_warps": plan.num_warps, "num_stages": plan.num_stages, "debug": False, "instrumentation_mode": ""}
    keywords = {**plan.args, **plan.constexprs, **given}
    bound, specialised, rest = binder(**keywords)
    chosen, signature, constants, attributes = kernel._pack_args(backend, keywords, bound, specialised, rest)
    return ASTSource(kernel, signature, constants, attributes), chosen


def difference(meta: Plan, real: Plan, gpu: GPUTarget) -> str | None:
    """Of the source that the gate builds from meta to the one that a launch of real builds"""
    mine = source(meta, gpu)
    try:
        theirs, chosen = launched(real, gpu)
    except Exception as error:
        return f"cannot be launched: {type(error).__name__}: {error}"
    if mine.hash() == theirs.hash() and make_backend(gpu).parse_options(options(meta)) == chosen:
        return None
    return "; ".join(
        f"{part} built {getattr(mine, part)}, launched {getattr(theirs, part)}"
        for part in ("signature", "constants", "attrs")
    )


def probes(new: New) -> dict[str, Plan]:
    """What no case has: integers at the edges of what Triton tells apart, odd addresses, tensors at 2 GB"""
    edges = [0, 1, 2, 15, 16, 17, 2**31 - 16, 2**31 - 1, 2**31, 2**31 + 16, 2**40, 2**63 - 1]
    arguments: dict[str, list[Any]] = {
        "integer": [*edges, *(-edge for edge in edges)],
        "float": [0.0, 0.5, 1.0, 16.0],
        "none": [None],
        "at": [new(64, dtype=dtype)[at:] for dtype in ("fp16", "bf16", "fp32", "int64") for at in (0, 1, 2, 4, 8)],
        "bytes": [new(size, dtype="fp16") for size in (2**30 - 1, 2**30)],
    }
    return {
        f"{name} {index}": Plan(
            _probe_kernel, (1,), {"x_ptr": new(64), "y_ptr": value, "a": 7, "b": 0.25}, {"SIZE": 4, "FLAG": True}
        )
        for name, values in arguments.items()
        for index, value in enumerate(values)
    }


def allocates(plan: Plan) -> int:
    return sum(value.untyped_storage().nbytes() for value in plan.args.values() if isinstance(value, Tensor))


def main() -> None:
    meta, real = New("meta"), New("cpu")
    pairs = [(name, plan, probes(real)[name]) for name, plan in probes(meta).items()]
    for op in OPS.values():
        for factors in op.cases:
            builds = op.builds(factors, meta)
            if max(allocates(build.plan) for build in builds.values()) > MOST:
                continue
            of_real = op.builds(factors, real)
            pairs += [
                (f"{op.name} {kernel} {case_id(factors)}", build.plan, of_real[kernel].plan)
                for kernel, build in builds.items()
            ]
    found = {
        f"{name} {target}": difference(built, launched_plan, gpu)
        for name, built, launched_plan in pairs
        for target, gpu in GPUS.items()
    }
    differ = {name: text for name, text in found.items() if text}
    print(
        json.dumps(
            {"compared": len(found), "ops": sorted({name.split()[0] for name in found} & set(OPS)), "differ": differ}
        )
    )


if __name__ == "__main__":
    main()
