"""What is kept between commands: its size, and reference log-probs within a limit, those unused longest out first.

A process that uses an entry locks a file next to it; the system releases the lock when the process ends; no
entry that is held is removed. `$DPO_STUDIO_CACHE_GIB` sets the limit.
"""

from __future__ import annotations

import math
import os
import re
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from dpo_studio.errors import UsageError

__all__ = ["LIMIT_VARIABLE", "PARTS", "Cleared", "clear", "held", "limit_bytes", "sizes", "trim"]

LIMIT_VARIABLE = "DPO_STUDIO_CACHE_GIB"
_LIMIT_GIB = 20.0
PARTS = {
    "reference": "reference log-probs",
    "models": "converted models",
    "compiled": "compiled kernels",
    "judge-replies": "replies of LLM judges",
}
"""Folders of the cache, and what is in them."""
_ENTRY = re.compile(r"[0-9a-f]{32}\.sqlite")
"""What may be removed: any other file in the folder is not ours."""
_BESIDE = ("", "-journal", "-wal", "-shm")


@dataclass(frozen=True)
class Cleared:
    """The result of `clear`."""

    removed: int
    bytes: int
    held: int
    """In use by a process that runs, and kept."""
    newer: int
    """Used since, and kept."""


def limit_bytes() -> int:
    """How much the reference log-probs of all models may take.

    Raises:
        UsageError: the variable is not a number of GiB.
    """
    text = os.environ.get(LIMIT_VARIABLE, "").strip()
    try:
        limit = float(text or _LIMIT_GIB)
    except ValueError:
        limit = math.nan
    if not 0 <= limit < math.inf:
        raise UsageError(f"{LIMIT_VARIABLE}={text} is not a number of GiB", hint=f"{LIMIT_VARIABLE}=20, the default")
    return int(limit * 2**30)


def sizes(cache: Path) -> dict[str, tuple[int, int]]:
    """(files, bytes) of each of `PARTS`; no link is followed."""
    return {part: _size(cache / part) for part in PARTS}


def clear(folder: Path, older_than: float = 0) -> Cleared:
    """Remove the entries of `folder` that were not used for `older_than` seconds."""
    removed, size, kept, newer = 0, 0, 0, 0
    now = time.time()
    for used, taken, file in _entries(folder):
        if now - used < older_than:
            newer += 1
        elif _remove(file):
            removed, size = removed + 1, size + taken
        else:
            kept += 1
    return Cleared(removed, size, kept, newer)


def trim(folder: Path, limit: int) -> None:
    """Remove entries, the one unused longest first, until the others take at most `limit` bytes."""
    entries = _entries(folder)
    total = sum(taken for _, taken, _ in entries)
    for _, taken, file in entries:
        if total <= limit:
            return
        if _remove(file):
            total -= taken


@contextmanager
def held(file: Path) -> Iterator[None]:
    """Inside, the entry is not removed by any process; several may lock one. In a folder without locks nothing is
    locked."""
    descriptor = None
    with suppress(OSError):
        descriptor = _shared(file.with_suffix(".lock"))
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _shared(lock: Path) -> int:
    import fcntl  # not on Windows, where nothing is trained

    while True:
        descriptor = _open(lock)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            if os.path.samestat(os.fstat(descriptor), lock.lstat()):
                return descriptor
        except FileNotFoundError:  # the process that removed the entry has just removed its lock
            pass
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _open(lock: Path) -> int:
    return os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)


def _remove(file: Path) -> bool:
    """Remove an entry, unless it is locked or in a transaction; returns whether it was removed."""
    import fcntl

    lock = file.with_suffix(".lock")
    try:
        descriptor = _open(lock)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(descriptor), lock.lstat()) or _is_in_use(file):
            return False
        for end in _BESIDE:
            file.with_name(f"{file.name}{end}").unlink(missing_ok=True)
        lock.unlink()
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _is_in_use(file: Path) -> bool:
    """Whether another process is reading or writing it at this moment, whatever program it is."""
    try:
        with closing(sqlite3.connect(file, timeout=0, isolation_level=None)) as database:
            database.execute("BEGIN EXCLUSIVE")
            database.execute("ROLLBACK")
    except sqlite3.OperationalError:
        return True
    except sqlite3.DatabaseError:  # damaged: no loss
        return False
    return False


def _entries(folder: Path) -> list[tuple[float, int, Path]]:
    """(when it was last used, bytes, file) of each entry, the one unused longest first."""
    found = []
    for file in folder.glob("*.sqlite"):
        if _ENTRY.fullmatch(file.name) and not file.is_symlink():
            with suppress(FileNotFoundError):  # another process has removed it in this moment
                status = file.stat()
                beside = [file.with_name(f"{file.name}{end}") for end in _BESIDE[1:]]
                taken = status.st_size + sum(path.stat().st_size for path in beside if path.exists())
                found.append((status.st_mtime, taken, file))
    return sorted(found)


def _size(folder: Path) -> tuple[int, int]:
    files = [path for path in folder.rglob("*") if path.is_symlink() or path.is_file()]
    return len(files), sum(path.lstat().st_size for path in files)
