"""Writing files so that a kill at any moment leaves the old bytes or the new ones, and nothing half done."""

from __future__ import annotations

import errno
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["locked", "made", "replace", "replace_all", "sweep"]

_TEMPORARY = re.compile(r"\.tmp-\d+-[0-9a-f]{8}-(.+)")
_LOCK_SECONDS = 60.0


def replace(path: Path, data: bytes, *, durable: bool = True) -> None:
    """path holds data, or what it held before; no temporary is left but by a kill. durable: on the disk at return."""
    temporary = _temporary(path)
    try:
        _write(temporary, data, durable)
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        _name(error, path)
        raise
    if durable:
        # the new name must be on the disk before anything that relies on it, or before what it replaces goes
        _sync(path.parent)


def replace_all(files: Mapping[Path, bytes], remove: Iterable[Path] = ()) -> None:
    """All the paths hold their data, durably, and those to remove are gone; the last path makes a whole of them.

    The last one is away while the others change, so that a kill, or an error once the first of them is replaced, leaves
    the old whole, the new one, or none. Whatever fails before, as for want of space, changes nothing.
    """
    *parts, whole = files
    for path in files:
        if path.is_dir():  # which os.replace would find out too late
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    temporaries = {path: _temporary(path) for path in files}
    aside, path, untouched = _temporary(whole), whole, True
    try:
        for path, data in files.items():
            _write(temporaries[path], data, durable=True)
        with suppress(FileNotFoundError):
            os.replace(whole, aside)
        _sync(whole.parent)
        for path in parts:
            os.replace(temporaries[path], path)
            untouched = False
        for path in remove:
            path.unlink(missing_ok=True)
        for folder in {path.parent for path in parts}:
            _sync(folder)
        os.replace(temporaries[whole], whole)
    except BaseException as error:
        with suppress(OSError):
            if untouched:
                os.replace(aside, whole)
            aside.unlink(missing_ok=True)
        for temporary in temporaries.values():
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        _name(error, path)
        raise
    aside.unlink(missing_ok=True)
    _sync(whole.parent)


def _temporary(path: Path) -> Path:
    return path.with_name(f".tmp-{os.getpid()}-{secrets.token_hex(4)}-{path.name}")


def _name(error: BaseException, path: Path) -> None:
    if isinstance(error, OSError) and error.filename is None:
        error.filename = str(path)  # writing, unlike opening, names no file


def _write(path: Path, data: bytes, durable: bool) -> None:
    with open(path, "xb") as file:
        file.write(data)
        if durable:
            file.flush()
            os.fsync(file.fileno())


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
