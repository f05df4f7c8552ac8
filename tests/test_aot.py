"""The ahead-of-time gate: what it refuses, that it builds what a launch builds, that its few cases hold every pair"""

from __future__ import annotations

import csv
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastdiff_kernels._impl import HAS_TRITON

if not HAS_TRITON:
    pytest.skip("triton is not installed", allow_module_level=True)

from tests.aot import gate
from tests.aot.cases import DTYPES, OPS, New, Op
from tests.aot.covering import covering, product

ROOT = Path(__file__).resolve().parent.parent
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
NVIDIA = TARGETS[:3]
NARROW = "must be accessed 128 bits at a time, found"
# what the gate says to each kernel of tests/aot/faulty.py, and for which targets
FAULTS = {
    "unbuildable": ("does not build: CompileTimeAssertionFailure", TARGETS),
    "grid": ("its grid (1, 65536) is larger than", TARGETS),
    "shared": ("takes 262144 bytes of shared memory", TARGETS),
    "cos": ("spills: ", NVIDIA),
    "larger": ("spills: ", TARGETS),
    "strided": (f"x_ptr {NARROW}", TARGETS),
    "unaligned": (f"x_ptr {NARROW}", TARGETS),
    "uneven": (f"y_ptr {NARROW}", TARGETS),
    "narrow store": (f"y_ptr {NARROW}", TARGETS),
    "narrow on AMD": (f"y_ptr {NARROW}", NVIDIA),
    "narrow tail": (f"x_ptr {NARROW}", TARGETS),
    "unread": (f"y_ptr {NARROW} no access", TARGETS),
}


def python(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, since here the interpreter may have taken the kernels over"""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", **environment}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)


def refusals(stderr: str) -> dict[tuple[str, str], list[str]]:
    """Reasons by kernel of faulty.py and target"""
    found: dict[tuple[str, str], list[str]] = {}
    for line in stderr.splitlines():
        head, bracket, rest = line.partition("[kernel=")
        if head.startswith("aot: REFUSED faulty / ") and bracket:
            kernel, _, rest = rest.partition("] ")
            target, _, reason = rest.partition(": ")
            found.setdefault((kernel, target), []).append(reason)
    return found


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """The gate over all faulty kernels and the sound one, writing its table"""
    path = tmp_path_factory.mktemp("aot") / "table.csv"
    return python("-m", "tests.aot.faulty", path, "sound", *FAULTS, "--write"), path


@pytest.mark.slow
@pytest.mark.parametrize("kernel", FAULTS)
def test_a_faulty_kernel_is_refused(written: tuple[Any, Path], kernel: str) -> None:
    done, _ = written
    assert done.returncode == 1
    reason, targets = FAULTS[kernel]
    found = refusals(done.stderr)
    for target in targets:
        assert any(text.startswith(reason) for text in found.get((kernel, target), [])), found


@pytest.mark.slow
def test_what_is_sound_is_not_refused(written: tuple[Any, Path]) -> None:
    done, path = written
    found = refusals(done.stderr)
    for target in TARGETS:
        assert ("sound", target) not in found
        assert (("narrow on AMD", target) in found) == (target in NVIDIA)
        assert not [text for text in found["narrow store", target] if text.startswith("x_ptr")]
        assert not [text for text in found["narrow tail", target] if text.startswith("y_ptr")]
    rows = path.read_text().splitlines()[2:]
    assert {row.split(",")[3] for row in rows if ",kernel=sound," in row} == set(TARGETS)
    assert not [row for row in rows if any(f",kernel={kernel},{target}" in row for kernel, target in found)]


@pytest.fixture
def sound_table(written: tuple[Any, Path], tmp_path: Path) -> Path:
    """The table's rows of the sound kernel alone"""
    lines = written[1].read_text().splitlines(keepends=True)
    path = tmp_path / "table.csv"
    path.write_text("".join(lines[:2] + [line for line in lines[2:] if ",kernel=sound," in line]))
    return path


def changed(path: Path, target: str, **by: int) -> None:
    head, *lines = path.read_text().splitlines()
    rows = list(csv.DictReader(lines))
    for row in rows:
        if row["target"] == target:
            row |= {name: str(int(row[name]) + step) for name, step in by.items()}
    text = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
    path.write_text("\n".join([head, *text]) + "\n")


@pytest.mark.slow
def test_a_table_holds_what_it_was_written_from(sound_table: Path) -> None:
    # registers may move by 8, and fewer or wider than the table is no fault
    changed(sound_table, "sm_80", registers=-8)
    changed(sound_table, "sm_90", registers=9, wide_loads=-1, wide_stores=-1)
    done = python("-m", "tests.aot.faulty", sound_table, "sound")
    assert done.returncode == 0, done.stderr
    assert "aot: 4 builds" in done.stdout


@pytest.mark.slow
def test_what_is_worse_than_the_table_is_refused(sound_table: Path) -> None:
    changed(sound_table, "sm_80", registers=-9)
    changed(sound_table, "sm_90", wide_loads=1)
    changed(sound_table, "sm_100", wide_stores=1)
    lines = sound_table.read_text().splitlines()
    sound_table.write_text("\n".join(line for line in lines if "gfx942" not in line) + "\n")
    done = python("-m", "tests.aot.faulty", sound_table, "sound")
    assert done.returncode == 1
    found = {target: text for (_, target), (text,) in refusals(done.stderr).items()}
    assert "registers, more than 8 above the table's" in found["sm_80"]
    assert "wide loads, the table has" in found["sm_90"]
    assert "wide stores, the table has" in found["sm_100"]
    assert found["gfx942"] == "has no row in the table"


@pytest.mark.slow
def test_a_row_without_a_case_is_refused(sound_table: Path) -> None:
    lines = sound_table.read_text().splitlines()
    sound_table.write_text("\n".join([*lines, lines[-1].replace("kernel=sound", "kernel=gone")]) + "\n")
    done = python("-m", "tests.aot.faulty", sound_table, "sound")
    assert done.returncode == 1
    assert "1 rows of the table have no case; the first is faulty / copy [kernel=gone]" in done.stderr


@pytest.mark.slow
def test_a_kernel_that_cannot_be_launched_is_refused(tmp_path: Path) -> None:
    done = python("-m", "tests.aot.faulty", tmp_path / "table.csv", "reserved", "--write")
    assert done.returncode == 1
    assert "reserved: cannot be launched: AssertionError: stream option" in done.stderr


def test_nothing_built_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert gate.run(pairwise=True, only=["absent"], write=False, jobs=1, path=tmp_path / "table.csv") == 1
    assert "nothing was built" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_builds_under_triton_interpret_too() -> None:
    done = python("-m", "tests.aot", "--pairwise", "--op", "load_row", TRITON_INTERPRET="1")
    assert "aot: 12 builds, " in done.stdout, done.stderr
    assert "does not build" not in done.stderr


def test_an_unknown_op_is_answered() -> None:
    done = python("-m", "tests.aot", "--op", "nonsense")
    assert done.returncode == 2
    assert "--op must be one of philox, " in done.stderr


WITHOUT_TRITON = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
from tests.aot.__main__ import main
sys.platform = sys.argv[1]
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    ("arguments", "status"), [(["darwin", "--pairwise"], 0), (["linux", "--pairwise"], 1), (["darwin"], 1)]
)
def test_without_triton_the_check_goes_on_only_where_there_is_none(arguments: list[str], status: int) -> None:
    done = python("-c", WITHOUT_TRITON, *arguments)
    assert done.returncode == status
    assert "triton is not installed" in done.stderr


@pytest.mark.slow
def test_builds_are_what_launches_would_build() -> None:
    done = python("-m", "tests.aot.launcher")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["differ"] == {}
    assert set(found["ops"]) == set(OPS)
    assert found["compared"] > 500


def combinations(rows: list[Any], names: tuple[str, ...]) -> set[tuple[Any, ...]]:
    return {tuple(row[name] for name in names) for row in rows}


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_cases_hold_every_combination_that_they_promise(op: Op) -> None:
    strength = min(op.strength or 2, len(op.factors))
    reachable = [row for row in product(op.factors) if op.allowed(**row)]
    for names in itertools.combinations(op.factors, strength):
        assert combinations(op.cases, names) == combinations(reachable, names), names


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_the_check_holds_every_pair_that_the_cases_hold(op: Op) -> None:
    cases = [{"case": gate.case_id(factors), **factors} for factors in op.cases]
    everything = [{**row, "target": target} for row in cases for target in TARGETS]
    chosen = gate.pairs(op, [])  # interpreted kernels have no builds to count
    check = [row for row in everything if (row["case"], row["target"]) in chosen]
    assert len(check) == len(chosen)
    assert len({row["case"] for row in cases}) == len(cases)
    for names in itertools.combinations([*op.factors, "target"], 2):
        assert combinations(check, names) == combinations(everything, names)


@pytest.mark.parametrize("strength", [1, 2, 3])
def test_a_covering_is_smaller_than_the_product_and_holds_the_same_combinations(strength: int) -> None:
    rows = [
        row for row in product({"a": "012", "b": "01", "c": "0123", "d": "01"}) if (row["a"], row["b"]) != ("0", "1")
    ]
    few = covering(rows, strength)
    assert len(few) < len(rows)
    for names in itertools.combinations("abcd", strength):
        assert combinations(few, names) == combinations(rows, names)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_tensors_of_cases_have_the_strides_of_torch(layout: str, dtype: str) -> None:
    import torch

    memory = torch.channels_last if layout == "nhwc" else torch.contiguous_format
    expected = torch.empty((2, 6, 4, 10), dtype=DTYPES[dtype], memory_format=memory)
    made = New("cpu")(2, 6, 4, 10, dtype=dtype, layout=layout, offset=3)
    assert made.shape == expected.shape and made.stride() == expected.stride() and made.dtype == expected.dtype
    assert made.storage_offset() == 3
    assert made.untyped_storage().nbytes() == expected.untyped_storage().nbytes() + 3 * expected.element_size()
