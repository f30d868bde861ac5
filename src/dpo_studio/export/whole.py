"""A folder that appears whole or not at all, on a disk that was asked first."""

from __future__ import annotations

import errno
import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from dpo_studio.disk import ROOM
from dpo_studio.errors import RunError

__all__ = ["Making", "check_new", "making"]


@dataclass(frozen=True)
class Making:
    """Where something is put together."""

    result: Path
    """What becomes the output."""
    work: Path
    """What is only needed on the way."""


@contextmanager
def making(out: Path) -> Iterator[Making]:
    """Inside, a hidden folder beside `out`; its result becomes `out` when the block ends well. It never stays.

    Raises:
        RunError: `out` exists already, or the disk is full or read-only.
    """
    check_new(out)
    scratch = out.absolute().parent / f".{out.name}.making-{os.getpid()}"
    place = Making(scratch / "result", scratch / "work")
    try:
        _sweep(out.absolute())
        shutil.rmtree(scratch, ignore_errors=True)
        place.result.mkdir(parents=True)
        place.work.mkdir()
        yield place
        check_new(out)
        _share(place.result)
        place.result.rename(out)
    except (OSError, SafetensorError) as error:
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise RunError(f"{out} cannot be written: {reason}", hint=ROOM if full else None) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _sweep(out: Path) -> None:
    """What an attempt at the same folder left that was killed outright; it may be as large as a model."""
    for scratch in out.parent.glob(f".{glob.escape(out.name)}.making-*"):
        number = scratch.name.rpartition("-")[2]
        if number.isdecimal() and not Path("/proc", number).exists() and Path("/proc").is_dir():
            shutil.rmtree(scratch, ignore_errors=True)


def _share(folder: Path) -> None:
    """Files as readable as any new one here: safetensors writes its own for the owner alone."""
    mode = folder.stat().st_mode & 0o666
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(mode)


def check_new(out: Path) -> None:
    """Nothing is ever overwritten.

    Raises:
        RunError: there is something.
    """
    if not out.name:
        raise RunError(f"{out} is not the name of a new folder")
    if out.exists() or out.is_symlink():
        raise RunError(f"{out} exists", hint="choose another folder, or remove this one")
