"""Builds one plan for one target with no GPU, and reads what came out of the compiler"""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from fastdiff_kernels._plan import Plan

from .accesses import UNKNOWN, Access, accesses
from .cases import WIDE, Build

MAX_GRID = (2**31 - 1, 65535, 65535)
NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclasses.dataclass(frozen=True)
class Target:
    gpu: GPUTarget
    shared: int  # bytes that one program may have


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 * 1024),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 * 1024),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 * 1024),
}


@dataclasses.dataclass(frozen=True)
class Built:
    """What one build shows

    registers:   of a thread: REG of cuobjdump, .vgpr_count of gfx942
    shared:      bytes of a program, those given at the launch among them
    stack:       bytes of a thread: STACK of cuobjdump, .private_segment_fixed_size of gfx942
    spills:      LDL and STL in the SASS; .vgpr_spill_count and scratch accesses of gfx942
    wide_loads, wide_stores: instructions of at least 128 bits in the machine code
    accesses:    how wide each access is and which parameter it goes through, from LLVM IR
    """

    registers: int
    shared: int
    stack: int
    spills: int
    wide_loads: int
    wide_stores: int
    accesses: tuple[Access, ...]
    seconds: float = 0.0
    cached: bool = False


def source(plan: Plan, gpu: GPUTarget) -> ASTSource:
    """What a launch of plan on gpu gives to the compiler, to the letter: equal hashes mean equal code (launches.py)"""
    backend = make_backend(gpu)
    names, signature = plan.kernel.arg_names, plan.signature()
    assumed = dict.fromkeys(plan.aligned(), "D")
    # AMD's buffer operations need to know that a tensor lies within 2 GB
    if gpu.backend == "hip" and knobs.amd.use_buffer_ops:
        for name, value in plan.args.items():
            if isinstance(value, Tensor) and backend.is_within_2gb(value):
                assumed[name] = assumed.get(name, "") + "S"
    return ASTSource(
        plan.kernel,
        signature,
        {(names.index(name),): value for name, value in plan.compile_time().items()},
        {
            (position,): backend.parse_attr(assumed.get(name, ""))
            for position, name in enumerate(names)
            if signature[name] not in ("fp32", "fp64")
        },
    )


def options(plan: Plan) -> dict[str, int]:
    return {"num_warps": plan.num_warps, "num_stages": plan.num_stages}


def build_key(plan: Plan, target: str) -> str:
    """Equal for plans that give the same build"""
    return f"{target} {source(plan, TARGETS[target].gpu).hash()} {options(plan)}"


def build(plan: Plan, target: str) -> Built:
    gpu = TARGETS[target].gpu
    hits: list[bool] = []
    knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
    start = time.perf_counter()
    compiled = triton.compile(source(plan, gpu), target=gpu, options=options(plan))
    parameters = [name for name, kind in plan.signature().items() if kind != "constexpr"]
    read = _read_amd if gpu.backend == "hip" else _read_nvidia
    return Built(
        shared=compiled.metadata.shared,
        accesses=tuple(accesses(compiled.asm["llir"], parameters)),
        seconds=time.perf_counter() - start,
        cached=all(hits),
        **read(compiled.asm),
    )


def _read_nvidia(asm: dict[str, Any]) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        sass = _tool("nvdisasm", "--no-dataflow", "--print-code", file.name)
    # LOCAL is 0 even where registers spill; the stack is where they go
    ((registers, stack),) = re.findall(r"REG:(\d+) STACK:(\d+)", usage)
    return {"registers": int(registers), "stack": int(stack), **count_sass(sass)}


def count_sass(sass: str) -> dict[str, int]:
    found = re.findall(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass)
    instructions = [(name, {"128", "256"} & set(modifiers)) for name, *modifiers in (text.split(".") for text in found)]
    if "EXIT" not in {name for name, _ in instructions}:
        raise RuntimeError("nvdisasm printed something that cannot be read")
    return {
        "spills": sum(name in ("LDL", "STL") for name, _ in instructions),
        # LDGSTS copies to shared memory past the registers
        "wide_loads": sum(name in ("LDG", "LDGSTS") and bool(is_wide) for name, is_wide in instructions),
        "wide_stores": sum(name == "STG" and bool(is_wide) for name, is_wide in instructions),
    }


def _read_amd(asm: dict[str, Any]) -> dict[str, int]:
    text = asm["amdgcn"]

    def metadata(name: str) -> int:
        (value,) = re.findall(rf"^\s+\.{name}:\s+(\d+)$", text, re.MULTILINE)
        return int(value)

    def instructions(pattern: str) -> int:
        return len(re.findall(rf"^\s+{pattern}\b", text, re.MULTILINE))

    return {
        "registers": metadata("vgpr_count"),
        "stack": metadata("private_segment_fixed_size"),
        "spills": metadata("vgpr_spill_count") + instructions(r"scratch_(?:load|store)\w*"),
        "wide_loads": instructions(r"(?:global|buffer|flat)_load_(?:lds_)?dwordx4"),
        "wide_stores": instructions(r"(?:global|buffer|flat)_store_dwordx4"),
    }


@functools.cache
def _exists(tool: Path) -> bool:
    return tool.is_file()


def _tool(name: str, *arguments: str) -> str:
    tool = NVIDIA_TOOLS / name
    if not _exists(tool):
        raise FileNotFoundError(f"{tool} is missing: it comes with the triton package")
    done = subprocess.run([tool, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def faults(made: Build, built: Built, target: str) -> list[str]:
    """What is wrong with a build, whatever the table says

    Width: every access through a parameter that the case names has at least the bits that the case demands, and there
    is one. That is read from LLVM IR, where parameters can be told apart; the machine code, where they cannot, must
    still have an access of 128 bits of each kind. How many there are is held by the table.
    """
    found = []
    gpu = TARGETS[target].gpu
    if built.stack or built.spills:
        found.append(f"spills: {built.stack} bytes of stack, {built.spills} accesses to it")
    if built.shared > TARGETS[target].shared:
        found.append(f"takes {built.shared} bytes of shared memory, {target} has {TARGETS[target].shared}")
    if any(size > most for size, most in zip(made.plan.grid, MAX_GRID, strict=False)):
        found.append(f"its grid {made.plan.grid} is larger than {MAX_GRID}")
    if any(access.parameter == UNKNOWN for access in built.accesses):
        found.append("an access to global memory goes through no parameter that could be told")
    for name, bits in made.needed(made.plan.num_warps * gpu.warp_size, gpu.backend == "hip").items():
        mine = collections.Counter((access.kind, access.bits) for access in built.accesses if access.parameter == name)
        narrow = [f"{count} {kind}s of {got}" for (kind, got), count in sorted(mine.items()) if got < bits]
        if narrow or not mine:
            found.append(f"{name} must be accessed {bits} bits at a time, found {', '.join(narrow) or 'no access'}")
    # ptxas may drop accesses that no lane reaches, so not as many need be left in the machine code
    for kind, there in (("load", built.wide_loads), ("store", built.wide_stores)):
        if not there and any(access.kind == kind and access.bits >= WIDE for access in built.accesses):
            found.append(f"no {kind} of 128 bits is left in the machine code")
    return found
