"""Writing files so that a kill at any moment leaves the old bytes or the new ones, and nothing half done."""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["locked", "made", "replace", "sweep"]

_TEMPORARY = re.compile(r"\.tmp-\d+-[0-9a-f]{8}-(.+)")
_LOCK_SECONDS = 60.0


def replace(path: Path, data: bytes, *, durable: bool = True) -> None:
    """path holds data, or what it held before; no temporary is left but by a kill. durable: on the disk at return."""
    temporary = path.with_name(f".tmp-{os.getpid()}-{secrets.token_hex(4)}-{path.name}")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # writing, unlike opening, names no file
        raise
    if durable:
        # the new name must be on the disk before anything that relies on it, or before what it replaces goes
        _sync(path.parent)


def _sync(folder: Path) -> None:
    if fcntl is None:  # Windows cannot open folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep(folder: Path, ours: Callable[[str], bool]) -> None:
    """Removes what killed saves left; the lock is held, so no temporary of these names is anybody's still."""
    for entry in folder.iterdir():
        if (target := _TEMPORARY.fullmatch(entry.name)) and ours(target[1]):
            with suppress(OSError):
                entry.unlink()


@contextmanager
def made(folder: Path) -> Iterator[None]:
    """The folder exists inside; on an error what was made for it is gone again."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for path in missing:
            with suppress(OSError):
                path.rmdir()
        raise


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One saver at a time in a folder; the system releases the lock of a killed one."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        give_up = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > give_up:
                    raise TimeoutError(f"another process has been saving here for {_LOCK_SECONDS:.0f} s") from None
                time.sleep(0.01)
            except OSError:  # a file system without locks
                break
        yield
    finally:
        os.close(descriptor)
