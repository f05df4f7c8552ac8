"""Which kernel parameter each access to global memory goes through, and how wide it is, from LLVM IR

The last stage that both backends share, after all of Triton's and LLVM's optimisations: on NVIDIA an access is inline
PTX, which ptxas keeps as it is; on AMD a load, store or buffer operation. Followed is where an address comes from,
through every instruction but a load, so an address chosen between two parameters belongs to both.
"""

from __future__ import annotations

import dataclasses
import re

UNKNOWN = "?"
GLOBAL = r"ptr addrspace\((?:1|7|8)\)"
DEFINE = re.compile(r"^define [^@]*@[\w.$]+\((.*)\)[^)]*\{$")
RESULT = re.compile(r"^\s*(?:(%[\w.]+) = )?(.*)$")
VALUE = re.compile(r"[%@][\w.$]+")
GLOBAL_VARIABLE = re.compile(r"@[\w.$]+ = .*\baddrspace\(1\)")
# instructions that take an address and access nothing there
ADDRESSING = re.compile(
    r"^(?:getelementptr|phi|select|icmp|ptrtoint|inttoptr|bitcast|addrspacecast|insert|extract|shufflevector|freeze|ret)"
    r"|@llvm\.(?:amdgcn\.make\.buffer\.rsrc|assume|lifetime|ptrmask|amdgcn\.readfirstlane|dbg)"
)
PTX = re.compile(r"\b(ld|st|atom|red)\.([.:\w]*?)\.?(?:v(\d)\.)?([bfsu])(\d+)[\s,{\[]")
ASYNC_PTX = re.compile(r"cp\.async\.\w+\.shared\.global[.:\w]* \[[^]]*\], \[[^]]*\], (0x[0-9a-f]+|\d+)")
BUFFER = re.compile(
    r"@llvm\.amdgcn\.(?:raw|struct)\.(?:ptr\.)?buffer\.(load|store|atomic)([.\w]*?)\.(v\d+)?([if])(\d+)\("
)
NATIVE = re.compile(r"^(?:tail call )?(load|store|atomicrmw|cmpxchg)\b(.*)$")
MASKED = re.compile(r"@llvm\.masked\.(load|store)\.(v\d+)?([if])(\d+)")
TYPE = re.compile(r"(?:<(\d+) x )?(half|bfloat|float|double|ptr|i\d+)\b")
BITS = {"half": 16, "bfloat": 16, "float": 32, "double": 64, "ptr": 64}
KINDS = {"ld": "load", "st": "store", "atom": "atomic", "red": "atomic", "atomicrmw": "atomic", "cmpxchg": "atomic"}


@dataclasses.dataclass(frozen=True, order=True)
class Access:
    parameter: str
    kind: str
    bits: int


def accesses(llir: str, parameters: list[str]) -> list[Access]:
    """Accesses of the one kernel in llir; parameters: names of its leading arguments. UNKNOWN: through none of them

    ValueError for an access that cannot be read: one passed over would make the kernel look better than it is.
    """
    lines = _instructions(llir)
    start = next(i for i, line in enumerate(lines) if line.startswith("define") and "kernel" in line.split("@")[0])
    end = lines.index("}", start)
    arguments = VALUE.findall(DEFINE.match(lines[start]).group(1))
    origins = {value: frozenset([name]) for value, name in zip(arguments, parameters, strict=False)}
    # tables that a library brought along
    origins |= {line.split(" ")[0]: frozenset([line.split(" ")[0]]) for line in lines if GLOBAL_VARIABLE.match(line)}

    touched = []  # (result, operands, accesses)
    for result, rest in (RESULT.match(line).groups() for line in lines[start + 1 : end]):
        touched.append((result, VALUE.findall(rest), _touches(rest), rest.startswith("load ")))

    def origin(operands: list[str]) -> frozenset[str]:
        return frozenset().union(*(origins[operand] for operand in operands if operand in origins))

    # more than once: a phi may name a value that is defined below it
    changed = True
    while changed:
        changed = False
        for result, operands, touches, loads in touched:
            if result and not touches and not loads and (found := origin(operands)) - origins.get(result, frozenset()):
                origins[result] = found
                changed = True
    found = [
        Access(name, kind, bits)
        for _, operands, touches, _ in touched
        for kind, bits in touches
        for name in sorted(origin(operands)) or [UNKNOWN]
    ]
    # what was not inlined cannot be followed
    elsewhere = [line for line in lines[:start] + lines[end:] if line.startswith(" ")]
    return found + [Access(UNKNOWN, kind, bits) for line in elsewhere for kind, bits in _touches(line)]


def _instructions(llir: str) -> list[str]:
    """Lines without debug information and comments"""
    return [re.sub(r", !\w+ !\d+", "", line).split(" ; ")[0].rstrip() for line in llir.splitlines()]


def _touches(rest: str) -> list[tuple[str, int]]:
    """(kind, bits) of every access to global memory in one instruction; ValueError where that cannot be told"""
    rest = RESULT.match(rest).group(2)
    found: list[tuple[str, int]] = []
    if " asm " in rest:
        text = re.sub(r"\\[0-9A-F]{2}", " ", rest)
        found = [
            (KINDS[what], int(count or 1) * int(bits))
            for what, space, count, _, bits in PTX.findall(text)
            if "global" in space.split(".")
        ]
        found += [("load", 8 * int(size, 0)) for size in ASYNC_PTX.findall(text)]
        expected = text.count("global.") + text.count(".global ")
    else:
        expected = bool(re.search(GLOBAL, rest)) and not ADDRESSING.search(rest.removeprefix("tail "))
        if match := BUFFER.search(rest) or MASKED.search(rest):
            kind, count, _, bits = match.group(1), *match.groups()[-3:]
            found = [(kind, int((count or "v1")[1:]) * int(bits))]
        elif match := NATIVE.match(rest):
            count, scalar = TYPE.search(match.group(2)).groups()
            bits = BITS.get(scalar) or int(scalar[1:])
            found = [(KINDS.get(match.group(1), match.group(1)), int(count or 1) * bits)]
        # on the stack or in shared memory
        if not re.search(GLOBAL, rest):
            found = []
    if len(found) != expected:
        raise ValueError(f"this access to global memory cannot be read: {rest}")
    return found
