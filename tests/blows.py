"""A `dpo train` in a forked process, and ways to end it: by a signal from outside, or from inside at the n-th thing it
does to its run folder, with or without what the disk had not been told to keep.

The process that forks has imported everything once and started no thread; see `tests/faults.py`.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["Events", "Journal", "after_power_cut", "fork", "kill_after", "start", "wait"]

_REMOVALS = {"os.remove", "os.rmdir"}


def fork(work: Callable[[], object], log: Path) -> int:
    """Start a process that does this with its words in `log`, and ends with the code that it leaves by."""
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads must not fork"  # noqa: PTH208
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code: object = 99
    try:
        target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(target, 1)
        os.dup2(target, 2)
        work()
        code = 0
    except SystemExit as done:
        code = done.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code if isinstance(code, int) else 1)


def start(arguments: Sequence[str], log: Path, cache: Path, before: Callable[[], None] = lambda: None) -> int:
    """`dpo ARGUMENTS` in a process of its own; its id. `before` prepares the child."""

    def work() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ["DPO_STUDIO_CACHE"] = str(cache)
        sys.argv = ["dpo", *arguments]
        before()
        from dpo_studio.cli import main

        main()

    return fork(work, log)


def wait(pid: int) -> int:
    """The exit code; -9 after SIGKILL."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_after(pid: int, seconds: float, *numbers: int, pause: float = 0.02) -> int:
    """Send the signals, the first after so many seconds, and return the exit code; a process may end before."""
    end = time.monotonic() + seconds
    for number in numbers:
        while time.monotonic() < end:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.001)
        os.kill(pid, number)
        end = time.monotonic() + pause
    return wait(pid)


class Events:
    """Counts what a process does to its run folder: every open, write, rename, fsync and removal.

    A text file is met three times: before it is opened, while it is empty, when half of it is written. The weights are
    written in Rust, unseen: before, cut in half, and after. At event number `last` the process kills itself.
    """

    def __init__(self, run: Path, names: Path | None = None, last: int | None = None) -> None:
        self.run, self.last = str(run), last
        self.count = 0
        self._names = names.open("a") if names is not None else None

    def install(self) -> None:
        """In the child: from here on every event counts."""
        checkpoints: Any = importlib.import_module("dpo_studio.learning.checkpoints")
        adapters: Any = importlib.import_module("dpo_studio.models.adapters")
        real_open: Any = io.open
        real_fsync, real_save = os.fsync, checkpoints.save_file

        def opening(file: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
            writes = self._inside(file) and set(mode) & set("wax+")
            if not writes:
                return real_open(file, mode, *rest, **more)
            self.meet(f"open {file}")
            stream = real_open(file, mode, *rest, **more)
            self.meet(f"empty {file}")
            write = stream.write

            def writing(content: Any) -> Any:
                def half() -> None:
                    write(content[: len(content) // 2])
                    stream.flush()

                self.meet(f"half {file}", half)
                return write(content)

            stream.write = writing
            return stream

        def saving(tensors: Any, file: Any, **more: Any) -> None:
            def half() -> None:
                real_save(tensors, file, **more)
                os.truncate(file, Path(file).stat().st_size // 2)

            self.meet(f"open {file}")
            self.meet(f"half {file}", half)
            real_save(tensors, file, **more)
            self.meet(f"whole {file}")

        def syncing(fd: Any) -> None:
            self.meet(f"fsync {os.readlink(f'/proc/self/fd/{fd}')}")  # noqa: PTH115
            real_fsync(fd)

        io.open = opening
        os.fsync = syncing
        checkpoints.save_file = adapters.save_file = saving
        sys.addaudithook(self._hear)

    def meet(self, name: str, half: Callable[[], None] = lambda: None) -> None:
        """One event; the last one does its half, and no more is done by anyone."""
        self.count += 1
        if self._names is not None:
            self._names.write(name.replace(self.run, "RUN") + "\n")
            self._names.flush()
        if self.count == self.last:
            half()
            os.kill(os.getpid(), signal.SIGKILL)

    def _inside(self, path: Any) -> bool:
        return isinstance(path, str | Path) and (str(path) == self.run or str(path).startswith(self.run + "/"))

    def _hear(self, event: str, details: tuple[Any, ...]) -> None:
        made = event in ("os.rename", "os.mkdir") and self._inside(details[0])
        removed = event in _REMOVALS and (details[1] >= 0 or self._inside(details[0]))  # rmtree gives a folder's number
        if made or removed:
            self.meet(f"{event} {details[0]}")


class Journal:
    """In the child: keeps what every fsync has made sure of, file by file and folder by folder, by inode."""

    def __init__(self, kept: Path) -> None:
        self.kept = kept

    def install(self) -> None:
        """From here on fsync is copied."""
        self.kept.mkdir()
        real = os.fsync

        def syncing(fd: Any) -> None:
            real(fd)
            path, inode = os.readlink(f"/proc/self/fd/{fd}"), os.fstat(fd).st_ino  # noqa: PTH115
            what = f"{inode}-folder" if Path(path).is_dir() else f"{inode}-file"  # numbers are given again
            copy = self.kept / f"{what}.new"
            if Path(path).is_dir():
                names = {entry.name: (entry.stat().st_ino, entry.is_dir()) for entry in Path(path).iterdir()}
                copy.write_text(json.dumps(names))
            else:
                shutil.copyfile(path, copy)
            copy.rename(self.kept / what)

        os.fsync = syncing


def after_power_cut(run: Path, kept: Path) -> None:
    """Make the run folder what a disk may hold that loses all that no fsync covered: a name that its folder was not
    synced with is gone, a file that was not is empty."""
    now = {path.stat().st_ino: path for path in run.rglob("*") if path.is_file()}
    again = run.with_name(f"{run.name}-again")
    _rebuild(run.stat().st_ino, again, kept, now)
    shutil.rmtree(run)
    again.rename(run)


def _rebuild(inode: int, target: Path, kept: Path, now: dict[int, Path]) -> None:
    target.mkdir()
    listing = kept / f"{inode}-folder"
    names = json.loads(listing.read_text()) if listing.exists() else {}
    for name, (number, is_folder) in names.items():
        if is_folder:
            _rebuild(number, target / name, kept, now)
            continue
        synced = kept / f"{number}-file"
        content = synced.read_bytes() if synced.exists() else b""
        if number in now and not now[number].read_bytes().startswith(content):
            content = b""  # the number of a file that is gone, given to a new one
        (target / name).write_bytes(content)
