"""The disk: what has reached it, and how much it has left."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from dpo_studio.errors import RunError

__all__ = ["ROOM", "check_space", "sync", "sync_folder"]

ROOM = "free some space, or choose a folder on another disk"


def sync(path: Path) -> None:
    """Bring a file's content, or a folder's list of names, to the disk: what a power cut must not undo.

    Raises:
        OSError: the disk is full or broken.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """The same for every file and folder below, and the folder itself."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def check_space(out: Path, needed: int, what: str) -> None:
    """Before anything long begins.

    Raises:
        RunError: the disk of `out` has less than `needed` bytes left.
    """
    parent = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise RunError(
            f"{what} needs {_size(needed)} on the way, and the disk of {parent} has {_size(free)} left", hint=ROOM
        )


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
