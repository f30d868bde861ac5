"""One process per run folder: a lock that the system releases when its process ends."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from dpo_studio.errors import RunError

__all__ = ["LOCK", "Held", "held"]

LOCK = ".lock"


@dataclass(frozen=True)
class Held:
    """A run folder locked by this process."""

    folder: Path
    descriptor: int
    """-1: held by the first of the processes that train together, which is not this one."""

    def check(self) -> None:
        """Check that the folder still exists and is the one that was locked; one `stat`.

        Raises:
            RunError: it was removed, moved away or replaced.
        """
        if self.descriptor >= 0 and not _is_at(self.descriptor, self.folder / LOCK):
            raise RunError(
                f"{self.folder} was removed, moved or replaced while it was being trained in; nothing more is written",
                hint="if it was moved, name its new place (--set run.folder=NAME): it continues from there",
            )


@contextmanager
def held(
    folder: Path,
    warn: Callable[[str], None] = lambda _: None,
    *,
    doing: str = "trained in",
    elsewhere: str = "choose another folder: --set run.folder=NAME",
) -> Iterator[Held]:
    """Inside, only this process works in `folder`, which is made if missing, and removed afterwards if it is empty.

    `doing` and `elsewhere` are for the message that another process gets.

    Raises:
        RunError: another process has it, or the folder cannot be written.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _taken(folder / LOCK, warn, doing, elsewhere)
    except OSError as error:
        raise RunError(
            f"{folder} cannot be written: {error.strerror or error}",
            hint=elsewhere,
        ) from None
    try:
        yield Held(folder, descriptor)
    finally:
        if _is_at(descriptor, folder / LOCK):  # and not a file that another process has put there since
            (folder / LOCK).unlink()
        os.close(descriptor)
        with suppress(OSError):  # something is in it
            for path in made:
                path.rmdir()


def _taken(file: Path, warn: Callable[[str], None], doing: str, elsewhere: str) -> int:
    """The open and locked file. Its content is only for the message that another process gets."""
    import fcntl  # not on Windows, where nothing is trained but runs are read

    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode("utf-8", "replace").strip()
            os.close(descriptor)
            raise RunError(
                f"{file.parent} is being {doing} by {holder or 'another process'}",
                hint=f"wait for it, stop it, or {elsewhere}",
            ) from None
        except OSError as error:  # NFS without its lock service
            warn(f"{file.parent} is on a file system without locks ({error.strerror}): see that one process uses it")
        if _is_at(descriptor, file):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            return descriptor
        os.close(descriptor)  # its holder has just removed it


def _is_at(descriptor: int, file: Path) -> bool:
    try:
        there = file.lstat()
    except OSError:
        return False
    return os.path.samestat(there, os.fstat(descriptor))
