"""The command line: parses into frozen configs and calls the API; torch is imported by the commands, not by --help."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro
from tyro.conf import subcommand

import fastdiff
from fastdiff.cli.convert import Convert
from fastdiff.cli.evaluate import Evaluate
from fastdiff.cli.info import Doctor, Info
from fastdiff.cli.sample import Sample
from fastdiff.cli.train import Plot, Train

__all__ = ["Convert", "Doctor", "Evaluate", "Info", "Plot", "Sample", "Train", "main"]

Command = (
    Annotated[Sample, subcommand("sample")]
    | Annotated[Train, subcommand("train")]
    | Annotated[Plot, subcommand("plot")]
    | Annotated[Evaluate, subcommand("evaluate")]
    | Annotated[Convert, subcommand("convert")]
    | Annotated[Info, subcommand("info")]
    | Annotated[Doctor, subcommand("doctor")]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command: 0; 1 where doctor found a fault; 2 with one sentence on stderr for errors; 130 for Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if argv == ["--version"]:
        print(f"fastdiff {fastdiff.__version__}")
        return 0
    try:
        command = tyro.cli(
            Command,
            prog="fastdiff",
            description="Sample class-conditional diffusion models fast, and train them. --version prints the version.",
            args=argv,
            config=(tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone),
        )
        return command.run()
    except KeyboardInterrupt:
        print("fastdiff: interrupted", file=sys.stderr)
        return 130
    # CheckpointError is a ValueError; OverflowError and MemoryError come of absurd sizes
    except (ValueError, TypeError, FloatingPointError, OverflowError, OSError, MemoryError, RuntimeError) as error:
        # a RuntimeError is a bug, but for torch's out of memory, which has no class of its own on a CPU
        if isinstance(error, RuntimeError) and not re.search("out of memory|allocate memory", str(error)):
            raise
        print(f"fastdiff: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 2
