"""The pairs of one source, indexed: pages are turned and searched without reading it again.

A file in the cache, named by what the source was; it may be deleted at any time, and a changed source gets another.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock, Thread
from typing import Any

from dpo_studio.config import SourceSection, cache_folder
from dpo_studio.disk import make_folder, scratch_folder
from dpo_studio.errors import DPOStudioError
from dpo_studio.preferences.pair import Pair, trl_row
from dpo_studio.preferences.sources import open_pairs

__all__ = ["PairIndexes", "key_of"]

_TABLES = (
    "CREATE TABLE pairs (row INTEGER PRIMARY KEY, refused TEXT)",  # small: pages are counted and skipped here
    "CREATE TABLE contents (row INTEGER PRIMARY KEY, content TEXT)",
    "CREATE INDEX refusals ON pairs (row) WHERE refused IS NOT NULL",
    "CREATE VIRTUAL TABLE words USING fts5(text, content='')",
)
_LAYOUT = "2"
"""Of the tables: an index of another layout has another name."""
_AT_ONCE = 1000


@dataclass
class PairIndex:
    """The index of one source: being made, made, or impossible."""

    source: str
    file: Path
    rows: int = 0
    error: DPOStudioError | None = None
    done: bool = False

    @property
    def is_ready(self) -> bool:
        return self.file.is_file()

    def make(self) -> None:
        """Read the source once; the file has its name when it is whole."""
        make_folder(self.file.parent)
        try:
            with scratch_folder(self.file) as scratch:
                made = scratch / "index"
                with closing(sqlite3.connect(made, isolation_level=None)) as db:
                    db.execute("PRAGMA synchronous = OFF")  # it can be made again
                    for table in _TABLES:
                        db.execute(table)
                    self._fill(db)
                made.replace(self.file)
        except DPOStudioError as error:
            self.error = error
        except (OSError, sqlite3.Error) as error:
            self.error = DPOStudioError(f"{self.file} cannot be written: {error}", hint="free some space")
        finally:
            self.done = True

    def _fill(self, db: sqlite3.Connection) -> None:
        db.execute("BEGIN")
        for result in open_pairs(SourceSection(source=self.source)).results:
            if isinstance(result, Pair):
                row = trl_row(result)
                words = " ".join(turn["content"] for side in ("prompt", "chosen", "rejected") for turn in row[side])
                db.execute("INSERT INTO pairs VALUES (?, NULL)", (result.row,))
                db.execute("INSERT INTO contents VALUES (?, ?)", (result.row, json.dumps(row)))
                db.execute("INSERT INTO words (rowid, text) VALUES (?, ?)", (result.row, words))
            else:
                db.execute("INSERT INTO pairs VALUES (?, ?)", (result.row, f"{result.reason} {result.seen}"))
            self.rows += 1
            if self.rows % _AT_ONCE == 0:
                db.execute("COMMIT")
                db.execute("BEGIN")
        db.execute("COMMIT")

    def page(
        self, offset: int, limit: int, search: str, *, refused: bool = False, rows: str | None = None
    ) -> dict[str, Any]:
        """Some rows with the number of all that match: words of a text, refused ones, those of a JSON list."""
        where = "1"
        values: list[object] = []
        if search.strip():
            where = "row IN (SELECT rowid FROM words WHERE words MATCH ?)"
            values = [" ".join('"' + word.replace('"', '""') + '"' for word in search.split())]
        if refused:
            where += " AND refused IS NOT NULL"
        if rows is not None:
            where += " AND row IN (SELECT value FROM json_each(?))"
            values.append(rows)
        with closing(sqlite3.connect(self.file)) as db:
            count = db.execute(f"SELECT count(*) FROM pairs WHERE {where}", values).fetchone()[0]  # noqa: S608 - constants
            found = db.execute(
                f"SELECT row, content, refused FROM (SELECT * FROM pairs WHERE {where} ORDER BY row LIMIT ? OFFSET ?) "  # noqa: S608 - constants
                "LEFT JOIN contents USING (row) ORDER BY row",
                [*values, limit, offset],
            ).fetchall()
        return {"total": count, "pairs": [_shown(*each) for each in found]}


@dataclass
class PairIndexes:
    """The indexes that this studio has asked for."""

    _known: dict[str, PairIndex] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)

    def of(self, source: str, path: Path | None) -> PairIndex:
        """The index of a source; where there is none, it is begun in a thread of its own."""
        key = key_of(source, path)
        with self._lock:
            index = self._known.get(key)
            if index is None or (index.done and index.error is None and not index.is_ready):  # new, or deleted since
                index = PairIndex(source, cache_folder() / "studio" / f"{key}.db")
                self._known[key] = index
                if not index.is_ready:
                    Thread(target=index.make, daemon=True).start()
            return index


def key_of(source: str, path: Path | None) -> str:
    """A name for a source as it is now: another size or time of any of its files is another source."""
    parts = [_LAYOUT, source]
    for file in _files(path) if path is not None else ():
        there = file.stat()
        parts.append(f"{file}\0{there.st_size}\0{there.st_mtime_ns}")
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
    elif path.is_dir():
        yield from sorted(file for file in path.rglob("*") if file.is_file())


def _shown(row: int, content: str | None, refused: str | None) -> dict[str, Any]:
    pair = json.loads(content) if content is not None else {}
    return {"row": row, "refused": refused} | {side: pair.get(side) for side in ("prompt", "chosen", "rejected")}
