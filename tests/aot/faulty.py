"""Kernels that the gate must refuse, a sound one that it must not, and the gate over them: tests/test_aot.py reads it

python -m tests.aot.faulty TABLE KERNEL... [--write]
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

from fastdiff_kernels._plan import Plan

from .cases import WIDE, Build, New, op
from .gate import run


@triton.jit
def _copy_kernel(x_ptr, y_ptr, count, STEP: tl.constexpr, BLOCK: tl.constexpr):
    """y = x where STEP is 1; with 2 no two elements that one thread has lie together"""
    at = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)) * STEP
    tl.store(y_ptr + at, tl.load(x_ptr + at, at < count), at < count)


@triton.jit
def _narrow_store_kernel(x_ptr, y_ptr, count, BLOCK: tl.constexpr):
    """Reads 128 bits at a time, and writes one element behind where it may"""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at + 1, tl.load(x_ptr + at, at < count), at < count - 1)


@triton.jit
def _narrow_tail_kernel(x_ptr, y_ptr, count, BLOCK: tl.constexpr):
    """One access of 128 bits, then a narrow one to the same tensor"""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, at < count)
    x += tl.load(x_ptr + at * 3, at * 3 < count)
    tl.store(y_ptr + at, x, at < count)


@triton.jit
def _cos_kernel(x_ptr, y_ptr, count, BLOCK: tl.constexpr):
    """tl.cos has a slow path that keeps an array on the stack"""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.cos(tl.load(x_ptr + at, at < count)), at < count)


@triton.jit
def _large_kernel(x_ptr, y_ptr, count, BLOCK: tl.constexpr):
    """Holds its whole tile until the sum is known"""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, at < count, 0.0)
    tl.store(y_ptr + at, x / tl.sum(x, 0), at < count)


@triton.jit
def _shared_kernel(x_ptr, y_ptr, count, BLOCK: tl.constexpr):
    """A transpose through shared memory"""
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i[:, None] * BLOCK + i[None, :])
    tl.store(y_ptr + i[:, None] * BLOCK + i[None, :], tl.trans(x))


@triton.jit
def _unread_kernel(x_ptr, y_ptr, count, BLOCK: tl.constexpr):
    """Takes y and leaves it alone"""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + at, tl.load(x_ptr + at, at < count), at < count)


@triton.jit
def _unbuildable_kernel(x_ptr, y_ptr, count, BLOCK: tl.constexpr):
    tl.static_assert(BLOCK < 0, "this is why")


@triton.jit
def _reserved_kernel(x_ptr, y_ptr, count, stream, BLOCK: tl.constexpr):
    """As sound as any, but its launcher has an argument of that name"""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at, at < count) + stream, at < count)


def plan(kernel: Any, count: int = 1 << 20, offset: int = 0, warps: int = 4, **constexprs: int) -> Plan:
    x, y = (torch.empty(count + offset, device="meta")[offset:] for _ in "xy")
    return Plan(kernel, (8,), {"x_ptr": x, "y_ptr": y, "count": count}, constexprs, warps)


RESERVED = plan(_reserved_kernel, BLOCK=1024)
SOUND = plan(_copy_kernel, BLOCK=1024, STEP=1)
PLANS = {
    "sound": SOUND,
    "unbuildable": plan(_unbuildable_kernel, BLOCK=1024),
    "reserved": dataclasses.replace(RESERVED, args={**RESERVED.args, "stream": 3}),
    "grid": dataclasses.replace(SOUND, grid=(1, 1 << 16)),
    "strided": plan(_copy_kernel, BLOCK=1024, STEP=2),
    "unaligned": plan(_copy_kernel, offset=1, BLOCK=1024, STEP=1),
    "uneven": plan(_copy_kernel, count=(1 << 20) + 1, BLOCK=1024, STEP=1),
    "narrow store": plan(_narrow_store_kernel, BLOCK=1024),
    "narrow on AMD": plan(_narrow_store_kernel, BLOCK=1024),
    "narrow tail": plan(_narrow_tail_kernel, BLOCK=1024),
    "unread": plan(_unread_kernel, BLOCK=1024),
    "cos": plan(_cos_kernel, BLOCK=1024),
    "larger": plan(_large_kernel, BLOCK=131072),
    "shared": plan(_shared_kernel, BLOCK=256, warps=16),
}


# a process that builds imports this module too, with the same arguments
@op(kernel=tuple(name for name in PLANS if name in sys.argv))
def faulty(new: New, kernel: str) -> Iterator[Build]:
    yield Build(
        PLANS[kernel], {"x_ptr": WIDE, "y_ptr": WIDE}, of_amd={"y_ptr": 32} if kernel == "narrow on AMD" else {}
    )


if __name__ == "__main__":
    sys.exit(run(pairwise=False, only=["faulty"], write="--write" in sys.argv, jobs=2, path=Path(sys.argv[1])))
