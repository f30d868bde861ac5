"""The reference's log-probs on disk, so that they are computed once.

One entry a pair, so added data reuses the entries. The key is exactly what a number depends on: weights, starting
adapter, numerics, token ids and which of them are scored; never beta, the learning rate or the template's text.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sqlite3
import struct
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from dpo_studio.cache import held, limit_bytes, trim
from dpo_studio.disk import make_folder
from dpo_studio.learning.batched_logps import COLUMNS
from dpo_studio.objectives import PairLogps
from dpo_studio.tokens.encode import EncodedPair

__all__ = ["ReferenceCache"]

_TABLE = (  # renamed when the columns change: entries with other columns are not read
    "CREATE TABLE IF NOT EXISTS logps5 (pair BLOB PRIMARY KEY, chosen REAL, rejected REAL, "
    "chosen_shared REAL, rejected_shared REAL, digest BLOB) WITHOUT ROWID"
)
_T = TypeVar("_T")


@dataclass(frozen=True)
class ReferenceCache:
    """Log-probs of pairs under one reference, in one SQLite file (safe for several processes at once)."""

    folder: Path
    context: dict[str, str]
    """What the numbers depend on besides the pair: weights, adapter, dtype, attention, device, torch."""

    @property
    def file(self) -> Path:
        """Where this reference's entries are."""
        digest = hashlib.sha256(json.dumps(self.context, sort_keys=True).encode()).hexdigest()
        return self.folder / f"{digest[:32]}.sqlite"

    def load(self, pairs: Sequence[EncodedPair]) -> list[tuple[float, ...] | None]:
        """`COLUMNS` of each pair; None where it is not known, or no longer as saved (SQLite notices no flipped bit)."""
        keys = [_pair_key(pair) for pair in pairs]
        query = "SELECT chosen, rejected, chosen_shared, rejected_shared, digest FROM logps5 WHERE pair = ?"
        rows = self._use(lambda database: [database.execute(query, (key,)).fetchone() for key in keys])
        return [row[:-1] if row and _is_whole(key, row) else None for key, row in zip(keys, rows, strict=True)]

    def save(self, pairs: Sequence[EncodedPair], logps: PairLogps) -> None:
        """Keep the log-probs of `pairs`. Numbers that are not finite are not kept."""
        rows = zip(map(_pair_key, pairs), *(getattr(logps, name).tolist() for name in COLUMNS), strict=True)
        kept = [(*row, _digest(row[0], row[1:])) for row in rows if all(map(math.isfinite, row[1:]))]
        insert = "INSERT OR REPLACE INTO logps5 VALUES (?, ?, ?, ?, ?, ?)"
        self._use(lambda database: database.executemany(insert, kept))

    def _use(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        """One transaction; repeated with a new file where this one is damaged: its entries can be recomputed."""
        make_folder(self.folder)
        with self.held():
            return self._used(work)

    def held(self) -> AbstractContextManager[None]:
        """Inside, no process removes the entries, however full the cache is."""
        with suppress(OSError):  # reported when it is written
            make_folder(self.folder)
        return held(self.file)

    def trim(self) -> None:
        """Remove the oldest entries of other references where the cache exceeds its limit."""
        trim(self.folder, limit_bytes())

    def _used(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        try:
            result = self._transaction(work)
            with suppress(OSError):
                os.utime(self.file)  # marks it as used, although nothing may have been written
            return result
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):  # locked, disk full, read-only: not a damaged file
                raise
            for file in (self.file, self.file.with_name(f"{self.file.name}-journal")):
                file.unlink(missing_ok=True)
            return self._transaction(work)

    def _transaction(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        with closing(sqlite3.connect(self.file, timeout=60)) as database, database:
            database.execute(_TABLE)
            return work(database)


def _is_whole(key: bytes, row: tuple[object, ...]) -> bool:
    *kept, digest = row
    numbers = [number for number in kept if isinstance(number, float)]
    return len(numbers) == len(kept) and digest == _digest(key, numbers)


def _digest(key: bytes, numbers: Sequence[float]) -> bytes:
    numbers = [number + 0.0 for number in numbers]  # SQLite keeps no -0.0
    return hashlib.blake2b(key + struct.pack(f"<{len(COLUMNS)}d", *numbers), digest_size=8).digest()


def _pair_key(pair: EncodedPair) -> bytes:
    digest = hashlib.sha256()
    for array in (pair.prompt, pair.chosen.ids, pair.chosen.scored, pair.rejected.ids, pair.rejected.scored):
        digest.update(len(array).to_bytes(8, "little"))
        digest.update(array.tobytes())
    return digest.digest()
