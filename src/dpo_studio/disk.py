"""The disk: files and folders that appear completely or not at all, syncing, and free space.

Everything is written under a hidden name in its final folder, synced, and renamed: a reader sees the old content or the
new, never half, not even after a power cut. The hidden name has the number of its process and a random one, so no two
processes ever write one file. What may be written is decided in `writing`.
"""

from __future__ import annotations

import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

from dpo_studio.errors import DataError, RunError

__all__ = [
    "OVERWRITE",
    "ROOM",
    "UNFINISHED",
    "append_line",
    "check_space",
    "delete_folder",
    "finish",
    "give_name",
    "make_folder",
    "put_folder",
    "remove_leftovers",
    "remove_leftovers_of",
    "scratch_file",
    "scratch_folder",
    "sync",
    "sync_folder",
    "unwritable",
    "write_atomically",
]

ROOM = "free some space, or choose a folder on another disk"
OVERWRITE = "--overwrite replaces it"
UNFINISHED = ".writing-"
"""In the names of files and folders that are not finished yet, before the number of their process."""


def write_atomically(file: Path, content: str | bytes, *, overwrite: bool = True, hint: str = ROOM) -> None:
    """Write a whole file, in one move.

    Raises:
        DataError: not to overwrite, and it has come to exist meanwhile; what was made is kept under the name in the
            message.
        RunError: the disk is full or read-only; what was at `file` is still there.
    """
    try:
        with scratch_file(file) as (scratch, written):
            left = memoryview(content.encode() if isinstance(content, str) else content)
            while left:  # a disk that fills up takes a part and raises at the next
                left = left[written.write(left) :]
            finish(written, file)
            give_name(scratch, file, overwrite=overwrite)
    except OSError as error:
        raise unwritable(file, error, hint) from None


@contextmanager
def scratch_file(file: Path) -> Iterator[tuple[Path, FileIO]]:
    """A new file next to `file`, removed at the end of the block."""
    scratch = _scratch_name(file)
    descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    with FileIO(descriptor, "w") as written:
        try:
            yield scratch, written
        finally:
            scratch.unlink(missing_ok=True)


def finish(written: FileIO, file: Path) -> None:
    """Sync the file, with the permissions of the file that it replaces."""
    with suppress(FileNotFoundError):
        os.fchmod(written.fileno(), file.stat().st_mode & 0o777)
    os.fsync(written.fileno())


def give_name(scratch: Path, file: Path, *, overwrite: bool) -> None:
    """Rename the finished file to its final name."""
    if overwrite:
        scratch.replace(file)
    else:
        try:
            os.link(scratch, file)
        except FileExistsError:
            kept = scratch.with_name(f"{file.name}.{secrets.token_hex(4)}")
            scratch.rename(kept)
            raise DataError(f"{file} has come to exist meanwhile; what was made is in {kept}", hint=OVERWRITE) from None
        except OSError:  # a file system without links
            if file.exists():
                raise DataError(f"{file} has come to exist meanwhile", hint=OVERWRITE) from None
            scratch.rename(file)
    sync(file.parent)


def append_line(file: Path, line: bytes) -> None:
    """Add a line to a file that `writing.check_continued` has checked; one that a full disk cut off is ended first.

    One write: a process that is killed leaves lines, not halves, and two may write one file.
    """
    make_folder(file.parent)
    with file.open("a+b", buffering=0) as stream:
        cut_off = stream.seek(0, 2) and (stream.seek(-1, 2), stream.read(1))[1] != b"\n"
        stream.write(b"\n" * bool(cut_off) + line + b"\n")


@contextmanager
def scratch_folder(folder: Path) -> Iterator[Path]:
    """A new folder next to `folder`, removed at the end of the block."""
    scratch = _scratch_name(folder)
    scratch.mkdir(parents=True)
    try:
        yield scratch
    finally:
        remove_folder(scratch)


def put_folder(made: Path, folder: Path) -> None:
    """Rename a finished folder to its final name. An existing one, which is ours, is moved away first, and back if that
    fails."""
    if os.path.lexists(folder):
        aside = _scratch_name(folder)
        folder.rename(aside)
        try:
            made.rename(folder)
        except BaseException:
            aside.rename(folder)
            raise
        remove_folder(aside)
    else:
        made.rename(folder)
    sync(folder.parent)


def delete_folder(folder: Path) -> None:
    """Remove a folder of our own; it is renamed first, so that no half of it is ever read."""
    doomed = _scratch_name(folder)
    folder.rename(doomed)
    remove_folder(doomed)


def make_folder(folder: Path) -> None:
    """A folder of our own, with those above it; it may be there."""
    folder.mkdir(parents=True, exist_ok=True)


def remove_folder(folder: Path) -> None:
    """A folder of our own, as far as it can be; no link is followed."""
    shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove the unfinished files of killed processes in a folder that only this process uses; links are not
    followed."""
    for unfinished in folder.glob(f".*{UNFINISHED}[0-9]*"):
        if unfinished.is_dir() and not unfinished.is_symlink():
            remove_folder(unfinished)
        else:
            unfinished.unlink()


def remove_leftovers_of(folder: Path) -> None:
    """Remove leftovers of ended processes that were writing this folder; they may be as large as a model."""
    for scratch in folder.parent.glob(f".{glob.escape(_short(folder.name))}{UNFINISHED}*"):
        number = scratch.name.rpartition(UNFINISHED)[2].partition("-")[0]
        if number.isdecimal() and not Path("/proc", number).exists() and Path("/proc").is_dir():
            remove_folder(scratch)


def _scratch_name(path: Path) -> Path:
    """A hidden name next to `path`, which no other process can have."""
    return path.with_name(f".{_short(path.name)}{UNFINISHED}{os.getpid()}-{secrets.token_hex(4)}")


def _short(name: str) -> str:
    """A name shortened so that a suffix fits."""
    return os.fsencode(name)[:100].decode("utf-8", "ignore")


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
    """Check the space before long work.

    Raises:
        RunError: the disk of `out` has less than `needed` bytes left.
    """
    parent = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise RunError(
            f"{what} needs {_size(needed)} on the way, and the disk of {parent} has {_size(free)} left", hint=ROOM
        )


def unwritable(file: Path, error: OSError, hint: str) -> RunError:
    return RunError(f"{file} cannot be written: {error.strerror or error}", hint=hint)


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
