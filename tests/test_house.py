"""The house rules: who may import whom, what importing costs, what is public."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
KERNELS = "fastdiff_kernels"

# Rooms of fastdiff, and what each may import of it; torch, numpy and the standard library are free to all.
MAY_IMPORT: dict[str, set[str]] = {
    "schedule": set(),
    "prediction": set(),
    "guidance": set(),
    "noise": set(),
    "images": {"atomic"},
    "atomic": set(),
    "canvas": set(),
    "diffusion_model": {"schedule", "prediction"},
    "classifier": {"schedule"},
    "variational_bound": {"prediction", "schedule", "solvers"},
    "placement": {"classifier", "diffusion_model"},
    "cuda_graph": set(),
    "request": {
        *("loading", "classifier", "diffusion_model", "guidance", "noise", "schedule", "solvers", "step"),
    },
    "networks": {"classifier", "diffusion_model", "placement"},
    "step": {"cuda_graph", "diffusion_model", "guidance", "networks", "solvers", KERNELS},
    "solvers": {"schedule", "prediction"},
    "model": {KERNELS},
    "manifest": {"classifier", "diffusion_model", "model", "placement", "schedule"},
    "checkpoint": {"atomic", "classifier", "diffusion_model", "manifest", "placement"},
    "convert": {
        *("diffusion_model", "model", "schedule"),
        *("atomic", "checkpoint", "classifier", "manifest", "placement"),
    },
    "loading": {"checkpoint", "classifier", "convert", "diffusion_model", "hub", "integrations"},
    "hub": {"checkpoint", "manifest"},
    "integrations": {
        *("sampler", "solvers", "schedule", "diffusion_model", "guidance", "noise", "convert", KERNELS),
        *("prediction", "checkpoint", "hub", "manifest", "placement"),
    },
    "sampler": {
        *("solvers", "schedule", "guidance", "noise", "placement", "diffusion_model", "loading", KERNELS),
        *("request", "step", "cuda_graph", "classifier", "networks"),
    },
    "training": {
        *("atomic", "schedule", "prediction", "guidance", "noise", "diffusion_model", "checkpoint", KERNELS),
        *("classifier", "canvas", "placement", "variational_bound"),
    },
    "evaluation": {
        *("sampler", "diffusion_model", "schedule", "prediction", "solvers", "variational_bound"),
        *("checkpoint", "classifier", "canvas", "guidance", "noise", "placement", KERNELS),
    },
}
FREE = {"cli", "doctor", "__init__", "__main__"}
ONLY_IN = {
    "tyro": {"cli"},
    "diffusers": {"cli", "integrations"},
    "huggingface_hub": {"hub"},
    "triton": set(),
    "sklearn": {"training", "evaluation"},
}


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / "fastdiff").parts[0].removesuffix(".py")


def imported_modules(path: Path) -> set[str]:
    """Every module a file imports, at any depth of its code."""
    return set().union(*(imported_names(node) for node in ast.walk(ast.parse(path.read_text()))))


def imported_names(node: ast.AST) -> set[str]:
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        return {f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names}
    return set()


def rooms_of(names: set[str]) -> set[str]:
    """The rooms that names lie in; what the package re-exports at its top counts as a room of that name."""
    rooms = {[*name.split("."), "the whole package"][1] for name in names if name.split(".")[0] == "fastdiff"}
    return rooms | ({KERNELS} if any(name.split(".")[0] == KERNELS for name in names) else set())


SOURCES = sorted((ROOT / "fastdiff").rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_imports_only_what_it_may(path: Path) -> None:
    room = room_of(path)
    names = imported_modules(path)
    for library, rooms in ONLY_IN.items():
        assert room in rooms or library not in {name.split(".")[0] for name in names}, f"{room} imports {library}"
    if room in FREE:
        return
    assert room in MAY_IMPORT, f"{room} is a new room: say here what it may import"
    assert not [name for name in names if name.startswith(".")], "say where a module lives: no relative imports"
    found = rooms_of(names) - {room}
    assert found <= MAY_IMPORT[room], f"{room} must not import {sorted(found - MAY_IMPORT[room])}"


@pytest.mark.parametrize(
    "line",
    [
        "from fastdiff import Sampler",
        "import fastdiff",
        "import fastdiff.sampler",
        "from fastdiff.sampler import sample",
        "from ..sampler import sample",
        "from .. import sampler",
        "def f():\n    from fastdiff import sampler",
        "import tyro",
        "from fastdiff.model import UNet",
    ],
)
def test_a_forbidden_import_is_seen(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = ROOT / "fastdiff" / "training" / "losses.py"
    text = path.read_text() + "\n" + line + "\n"
    monkeypatch.setattr(Path, "read_text", lambda self, *args, **kwargs: text)
    with pytest.raises(AssertionError):
        test_a_room_imports_only_what_it_may(path)


@pytest.mark.parametrize("path", sorted((ROOT / "kernels" / KERNELS).rglob("*.py")), ids=lambda path: path.name)
def test_the_kernels_stand_alone(path: Path) -> None:
    outside = {name.split(".")[0] for name in imported_modules(path)} - set(sys.stdlib_module_names)
    allowed = {"torch", ""} | ({"triton"} if path.parent.name == "jit" else set())  # "": its own modules, relative
    assert outside <= allowed, outside


@pytest.mark.parametrize("path", sorted((ROOT / "kernels" / KERNELS).glob("*.py")), ids=lambda path: path.name)
def test_what_imports_triton_is_loaded_at_a_launch(path: Path) -> None:
    names = set().union(*(imported_names(node) for node in ast.parse(path.read_text()).body))
    assert not [name for name in names if "jit" in name.split(".")], (
        "import from .jit inside the function that launches"
    )


def test_kernels_is_a_folder_not_a_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


def fresh(code: str) -> str:
    """What code prints in a new process that sees only the two packages."""
    env = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PATH": "", "HOME": "/"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_fastdiff_initialises_no_cuda() -> None:
    code = """
import sys, fastdiff
assert "torch" not in sys.modules, "importing fastdiff alone must not load torch"
for name in fastdiff.__all__: getattr(fastdiff, name)
import torch
print(torch.cuda.is_initialized(), "diffusers" in sys.modules, "tyro" in sys.modules, "triton" in sys.modules)
"""
    assert fresh(code) == "False False False False"


def test_importing_the_kernels_loads_neither_fastdiff_nor_triton() -> None:
    assert (
        fresh("import sys, fastdiff_kernels; print('fastdiff' in sys.modules, 'triton' in sys.modules)")
        == "False False"
    )


@pytest.mark.parametrize("package", ["fastdiff", KERNELS])
def test_everything_public_exists_and_says_what_it_is(package: str) -> None:
    module = __import__(package)
    assert len(set(module.__all__)) == len(module.__all__)
    for name in module.__all__:
        value = getattr(module, name)
        assert not callable(value) or (value.__doc__ or "").strip(), f"{package}.{name} has no docstring"
    with pytest.raises(AttributeError, match="nonsense"):
        module.nonsense  # noqa: B018


def test_the_version_is_a_literal() -> None:
    for path in (ROOT / "fastdiff" / "__init__.py", ROOT / "kernels" / KERNELS / "__init__.py"):
        assert '__version__ = "' in path.read_text()


@pytest.mark.parametrize("word", ["utils", "helpers", "common", "misc", "manager"])
def test_no_file_is_named_after_nothing(word: str) -> None:
    assert not [p for p in ROOT.rglob(f"{word}*") if not {".venv", ".git"} & set(p.relative_to(ROOT).parts)]
