"""The studio's one SQLite file: votes, jobs and who is logged in.

Any number of studios may use it at once: every change is one transaction that begins by taking the write lock.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from dpo_studio.errors import RunError
from dpo_studio.studio.places import OWN

__all__ = ["Store"]

_WAIT = 10.0
"""Seconds for another writer; a transaction takes milliseconds."""
_MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        "CREATE TABLE tokens (hash BLOB PRIMARY KEY, made REAL NOT NULL, used INTEGER NOT NULL DEFAULT 0)",
        "CREATE TABLE sessions (hash BLOB PRIMARY KEY, made REAL NOT NULL)",
        "CREATE TABLE servers (port INTEGER PRIMARY KEY, url TEXT, pid INTEGER NOT NULL, start TEXT NOT NULL)",
        "CREATE TABLE jobs (id TEXT PRIMARY KEY, verb TEXT, words TEXT NOT NULL, run TEXT, made REAL NOT NULL)",
        "CREATE TABLE votes (id TEXT PRIMARY KEY, time TEXT NOT NULL, content TEXT NOT NULL)",
    ),
    (
        "CREATE TABLE downloads (name TEXT PRIMARY KEY, made REAL NOT NULL)",
        "CREATE TABLE endpoints (name TEXT PRIMARY KEY, key_variable TEXT, made REAL NOT NULL)",
    ),
)
"""Each brings the file from `user_version` = its place to the next one. Only ever added to."""


@dataclass(frozen=True)
class Store:
    """The file, opened for each use: requests run in threads, and a connection belongs to one."""

    file: Path

    @classmethod
    def of_folder(cls, folder: Path) -> Store:
        """The file of a folder, made or brought up to date.

        Raises:
            RunError: it cannot be written, or a newer studio made it.
        """
        store = cls(folder / f"{OWN}.db")
        try:
            store._migrate()
        except sqlite3.Error as error:
            raise RunError(
                f"{store.file} cannot be used: {error}", hint="is the folder writable, and is the file a studio's?"
            ) from None
        return store

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """A connection that changes nothing."""
        with closing(self._open()) as db:
            yield db

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction: all of it is kept, or nothing."""
        with closing(self._open()) as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
            except BaseException:
                db.execute("ROLLBACK")
                raise
            db.execute("COMMIT")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep SQLite's files beside the store while a studio runs: on a full disk it could not make them to read."""
        with closing(self._open()) as db:
            db.execute("SELECT count(*) FROM sessions").fetchone()
            yield

    def _open(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.file, timeout=_WAIT, isolation_level=None)
        db.row_factory = sqlite3.Row
        db.execute("PRAGMA synchronous = FULL")  # a vote that was confirmed survives a power cut
        return db

    def _migrate(self) -> None:
        if not self.file.exists():
            self.file.touch(mode=0o600)
        with closing(self._open()) as db:
            db.execute("PRAGMA journal_mode = WAL")
        with self.writing() as db:
            version = int(db.execute("PRAGMA user_version").fetchone()[0])
            if version > len(_MIGRATIONS):
                raise RunError(f"{self.file} is of a newer DPO Studio", hint="update this one")
            for statements in _MIGRATIONS[version:]:
                for statement in statements:
                    db.execute(statement)
            db.execute(f"PRAGMA user_version = {len(_MIGRATIONS)}")
