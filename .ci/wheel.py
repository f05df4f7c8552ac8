"""Builds the wheel, compares its files with an expected list, installs it into a new environment, and samples from an
empty directory with the network off."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXPECTED = ROOT / "tests" / "wheel_files.txt"

# connecting anywhere fails, as on a machine without a network
OFFLINE = """
import socket, sys
def refuse(*args): raise OSError("the network is off")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
import fastdiff.cli
sys.exit(fastdiff.cli.main(["sample", "--labels", "0-9", "-n", "1", "--steps", "5", "--out", "digits.png"]))
"""


def run(*command: str | Path, cwd: Path = ROOT) -> None:
    print("$", *command[:6], flush=True)
    subprocess.run([str(part) for part in command], cwd=cwd, check=True)


def check_files(wheel: Path) -> None:
    found = sorted(
        name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name or "licenses" in name
    )
    expected = EXPECTED.read_text().split()
    normal = [name.split("-")[0] + "/licenses/LICENSE" if "licenses" in name else name for name in found]
    extra, missing = sorted(set(normal) - set(expected)), sorted(set(expected) - set(normal))
    if extra or missing:
        sys.exit(f"the wheel's files differ from {EXPECTED.name}: extra {extra}, missing {missing}")
    print(f"{len(found)} files, as expected")


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run(sys.executable, "-m", "build", "--wheel", "--outdir", folder)
        (wheel,) = folder.glob("*.whl")
        check_files(wheel)
        venv.create(folder / "env", with_pip=True)
        python = folder / "env" / "bin" / "python"
        run(python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", wheel)
        empty = folder / "empty"
        empty.mkdir()
        run(python, "-I", "-c", OFFLINE, cwd=empty)
        picture = empty / "digits.png"
        if not picture.read_bytes().startswith(b"\x89PNG"):
            sys.exit("the installed wheel drew no picture")
        print("the installed wheel samples from an empty directory with the network off")


if __name__ == "__main__":
    main()
