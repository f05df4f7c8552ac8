"""The committed table: what every build showed when it was written, and what counts as worse"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

from .build import Built

PATH = Path(__file__).parent / "table.csv"
SLACK = 8  # registers: ptxas moves them a little when something near them changes
FIELDS = ("op", "kernel", "case", "target", "registers", "shared", "wide_loads", "wide_stores", "spills")


class Key(NamedTuple):
    op: str
    kernel: str
    case: str
    target: str

    def __str__(self) -> str:
        return f"{self.op} / {self.kernel} [{self.case}] {self.target}"


@dataclasses.dataclass(frozen=True)
class Row:
    registers: int
    shared: int
    wide_loads: int
    wide_stores: int
    spills: int

    @classmethod
    def of(cls, built: Built) -> Row:
        return cls(built.registers, built.shared, built.wide_loads, built.wide_stores, built.stack + built.spills)


Table = dict[Key, Row]


def read(path: Path) -> Table:
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        lines = [line for line in file if not line.startswith("#")]
    return {
        Key(*(row[name] for name in Key._fields)): Row(*(int(row[field.name]) for field in dataclasses.fields(Row)))
        for row in csv.DictReader(lines)
    }


def written_with(path: Path) -> str:
    """The line that names the compiler"""
    return path.read_text().partition("\n")[0].strip("# ") if path.exists() else ""


def write(table: Mapping[Key, Row], compiler: str, path: Path) -> None:
    whole = path.with_suffix(".new")
    with whole.open("w", newline="") as file:
        file.write(f"# {compiler}\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(FIELDS)
        writer.writerows((*key, *dataclasses.astuple(table[key])) for key in sorted(table))
    whole.replace(path)


def worse(key: Key, row: Row, table: Mapping[Key, Row]) -> list[str]:
    """How a build fell behind its row"""
    before = table.get(key)
    if before is None:
        return ["has no row in the table"]
    found = []
    if row.registers > before.registers + SLACK:
        found.append(f"{row.registers} registers, more than {SLACK} above the table's {before.registers}")
    for name in ("wide_loads", "wide_stores"):
        now, then = getattr(row, name), getattr(before, name)
        if now < then:
            found.append(f"{now} {name.replace('_', ' ')}, the table has {then}")
    if row.spills > before.spills:
        found.append(f"spills {row.spills}, the table has {before.spills}")
    return found


def astray(table: Mapping[Key, Row], keys: Collection[Key]) -> list[Key]:
    """Rows of the table whose case is no longer built, and cases without a row"""
    return sorted(set(table) ^ set(keys))
