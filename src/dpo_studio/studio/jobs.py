"""Jobs: `dpo` commands in processes of their own, which outlive the studio and are found again by it.

The database says what was asked for, once per id. What became of it is in DIR/.dpo-studio/jobs: ID.pid (its process and
when that started), ID.log, ID.out, ID.exit (how it ended).
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from sqlite3 import Row

from dpo_studio.disk import make_folder
from dpo_studio.errors import DPOStudioError
from dpo_studio.reading import read_text
from dpo_studio.studio.api_errors import Refused
from dpo_studio.studio.places import OWN
from dpo_studio.studio.processes import is_alive
from dpo_studio.studio.store import Store

__all__ = ["Job", "Jobs"]

_STARTS = 30.0
"""Seconds in which a job has a process."""
_STOPPED = frozenset({128 + signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGHUP})


@dataclass(frozen=True)
class Job:
    """One command, and what its files say of it."""

    id: str
    verb: str
    words: list[str]
    run: str | None
    made: float
    folder: Path

    @property
    def command(self) -> str:
        """As one would type it in the studio's folder."""
        return shlex.join(["dpo", *self.words])

    @property
    def log(self) -> Path:
        return self.folder / f"{self.id}.log"

    @property
    def out(self) -> Path:
        return self.folder / f"{self.id}.out"

    @property
    def exit_code(self) -> int | None:
        """None while it runs, or where its process was killed and could not say."""
        text = self._read(".exit")
        return int(text) if text.isdecimal() else None

    @property
    def process(self) -> int | None:
        """The leader of its process group while that lives."""
        number, _, start = self._read(".pid").partition(" ")
        return int(number) if number.isdecimal() and is_alive(int(number), start) else None

    @property
    def is_active(self) -> bool:
        starting = not self._read(".pid") and time.time() - self.made < _STARTS
        return self.exit_code is None and (starting or self.process is not None)

    @property
    def was_stopped(self) -> bool:
        return self.exit_code in _STOPPED

    @property
    def state(self) -> str:
        if self.is_active:
            return "running"
        if self.exit_code is None:
            return "interrupted"
        return "finished" if self.exit_code == 0 else "stopped" if self.was_stopped else "failed"

    def _read(self, ending: str) -> str:
        file = self.folder / f"{self.id}{ending}"
        with suppress(DPOStudioError):
            return read_text(file, what="job", limit=1000).strip() if file.exists() else ""
        return ""


@dataclass
class Jobs:
    """All jobs of a folder, of this studio and of earlier ones."""

    folder: Path
    store: Store
    _ours: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, name: str, verb: str, words: list[str], run: Path | None = None) -> Job:
        """Start a command under an id, or find the job that this id has already.

        Raises:
            Refused: the id belongs to another command.
        """
        job = Job(name, verb, words, None if run is None else str(run), time.time(), self.folder / OWN / "jobs")
        make_folder(job.folder)
        with self.store.writing() as db:
            values = (job.id, job.verb, json.dumps(words), job.run, job.made)
            new = db.execute("INSERT OR IGNORE INTO jobs (id, verb, words, run, made) VALUES (?, ?, ?, ?, ?)", values)
            is_new = new.rowcount == 1
        if not is_new:
            there = self.get(name)
            if there.words != words:
                raise Refused("this id belongs to another command", status=409, field="id")
            return there
        self._spawn(job)
        return job

    def get(self, name: str) -> Job:
        """Raises:
        Refused: there is none of this id.
        """
        with self.store.reading() as db:
            row = db.execute("SELECT * FROM jobs WHERE id = ?", (name,)).fetchone()
        if row is None:
            raise Refused("there is no such job", status=404, field="id")
        return self._job(row)

    def all(self) -> list[Job]:
        """The newest first, the last 200."""
        self._reap()
        with self.store.reading() as db:
            return [self._job(row) for row in db.execute("SELECT * FROM jobs ORDER BY made DESC LIMIT 200")]

    def last_of(self, run: Path) -> Job | None:
        """The newest job of a run."""
        self._reap()
        with self.store.reading() as db:
            found = db.execute("SELECT * FROM jobs WHERE run = ? ORDER BY made DESC LIMIT 1", (str(run),)).fetchone()
        return None if found is None else self._job(found)

    def stop(self, job: Job) -> None:
        """Ask its whole group to end: a training writes a checkpoint first."""
        if (leader := job.process) is not None:
            with suppress(ProcessLookupError):
                os.killpg(leader, signal.SIGTERM)

    def _spawn(self, job: Job) -> None:
        command = [sys.executable, "-m", "dpo_studio.studio.runner", str(job.folder), job.id, *job.words]
        with job.log.open("ab") as log, job.out.open("ab") as out:
            started = subprocess.Popen(  # noqa: S603 - a list: our own module, and words that the routes have made
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=log, cwd=self.folder, start_new_session=True
            )
        self._ours.append(started)

    def _reap(self) -> None:
        self._ours = [process for process in self._ours if process.poll() is None]

    def _job(self, row: Row) -> Job:
        words = [str(word) for word in json.loads(row["words"])]
        return Job(row["id"], row["verb"], words, row["run"], row["made"], self.folder / OWN / "jobs")
