"""Other processes, by what /proc says of them: a number alone may belong to somebody else by now."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from dpo_studio.reading import read_bytes
from dpo_studio.runs.lock import LOCK

__all__ = ["holder_of", "is_alive", "start_of"]


def start_of(pid: int) -> str | None:
    """When a process was started, in the kernel's ticks; None when it has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    fields = stat.rpartition(b")")[2].split()  # the name before may hold anything
    return None if fields[:1] in ([b"Z"], [b"X"], []) else fields[19].decode()


def is_alive(pid: int, start: str) -> bool:
    """Whether the process is still the one that was started then."""
    return start_of(pid) == start


def holder_of(run: Path) -> int | None:
    """The process that trains in a run folder: the lock names it, and it has that very file open.

    A run folder from elsewhere may name any process in its lock, which must not be stopped.
    """
    lock = run / LOCK
    with suppress(Exception):
        words = read_bytes(lock, what="lock", limit=1000).decode("utf-8", "replace").split()
        pid = int(words[1]) if words[:1] == ["process"] else 0
        there = lock.stat()
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                if os.path.samestat(descriptor.stat(), there):
                    return pid
    return None
