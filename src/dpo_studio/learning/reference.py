"""The reference: log-probs of the same answers under what the policy is held close to, computed once, kept on disk.

One entry a pair, so added data reuses what is there. The key is exactly what a number depends on: weights, starting
adapter, numerics, token ids and which of them are scored; never beta, the learning rate or the template's text.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sqlite3
import struct
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dpo_studio.cache import held, limit_bytes, trim
from dpo_studio.disk import make_folder
from dpo_studio.learning.logprobs import pair_logps
from dpo_studio.learning.memory import too_long_for_memory, unless_out_of_memory
from dpo_studio.objectives import PairLogps
from dpo_studio.tokens.encode import EncodedPair
from dpo_studio.tokens.pack import micro_batches

__all__ = ["ReferenceCache", "batched_logps", "reference_logps"]

COLUMNS = ("chosen_P", "rejected_P", "chosen_shared_P", "rejected_shared_P")
"""What is kept of a pair. Token counts follow from its ids."""
_TABLE = (  # named anew when the columns change: entries of another shape are not looked at
    "CREATE TABLE IF NOT EXISTS logps5 (pair BLOB PRIMARY KEY, chosen REAL, rejected REAL, "
    "chosen_shared REAL, rejected_shared REAL, digest BLOB) WITHOUT ROWID"
)
_PAIRS_BETWEEN_SAVES = 128
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
        """One transaction; on a damaged file once more with a new one, for what was in it can be computed again."""
        make_folder(self.folder)
        with self.held():
            return self._used(work)

    def held(self) -> AbstractContextManager[None]:
        """Inside, no process removes the entries, however full the cache is."""
        with suppress(OSError):  # told of by whoever writes
            make_folder(self.folder)
        return held(self.file)

    def trim(self) -> None:
        """Other references' entries go, the oldest first, where all take more than they may."""
        trim(self.folder, limit_bytes())

    def _used(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        try:
            result = self._transaction(work)
            with suppress(OSError):
                os.utime(self.file)  # used now, though nothing may have been written
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


def reference_logps(
    model: nn.Module,
    pairs: Sequence[EncodedPair],
    *,
    budget: int,
    cache: ReferenceCache | None,
    progress: Callable[[int, int], None] = lambda pairs, tokens: None,
) -> PairLogps:
    """The reference's log-probs of all `pairs`, in order, on the CPU; only what the cache lacks is computed.

    `model` computes as the reference does when called (see `models.adapters.as_reference`).
    """
    known: list[tuple[float, ...] | None] = [None] * len(pairs)
    with nullcontext() if cache is None else cache.held():
        if cache is not None:
            known = cache.load(pairs)
        missing = [position for position, value in enumerate(known) if value is None]
        progress(len(pairs) - len(missing), 0)
        for start in range(0, len(missing), _PAIRS_BETWEEN_SAVES):
            positions = missing[start : start + _PAIRS_BETWEEN_SAVES]
            part = batched_logps(model, pairs, positions, budget=budget, progress=progress)
            if cache is not None:
                cache.save([pairs[position] for position in positions], part)
            rows = zip(*(getattr(part, name).tolist() for name in COLUMNS), strict=True)
            for position, row in zip(positions, rows, strict=True):
                known[position] = row
        if cache is not None and missing:
            cache.trim()
    values = [value for value in known if value is not None]
    return _from_columns(COLUMNS, torch.tensor(values, dtype=torch.float32).reshape(-1, len(COLUMNS)).T, pairs)


@torch.no_grad()
def batched_logps(
    model: nn.Module,
    pairs: Sequence[EncodedPair],
    positions: Sequence[int],
    *,
    budget: int,
    agreement: bool = False,
    progress: Callable[[int, int], None] = lambda pairs, tokens: None,
) -> PairLogps:
    """Log-probs of the pairs at `positions` under `model` as it is, in that order, on the CPU."""
    device = next(model.parameters()).device
    names = (*COLUMNS, "agreement_P") if agreement else COLUMNS
    done: list[int] = []
    columns: list[Tensor] = []
    rows = deque(micro_batches(pairs, positions, budget))
    while rows:
        batch = rows.popleft()
        logps = unless_out_of_memory(model, partial(pair_logps, model, batch.to(device), agreement=agreement))
        if logps is None:
            if len(batch) == 1:
                raise too_long_for_memory(batch.tokens)
            rows.extendleft(micro_batches(pairs, batch.pairs, batch.tokens // 2))
            continue
        done += batch.pairs
        columns.append(torch.stack([getattr(logps, name) for name in names]))
        progress(len(batch), batch.tokens)
    columns_CP = torch.cat(columns, 1).cpu() if columns else torch.zeros(len(names), 0)  # read once: nobody waits a row
    place = {position: index for index, position in enumerate(done)}
    in_order = columns_CP[:, [place[position] for position in positions]]
    return _from_columns(names, in_order, [pairs[position] for position in positions])


def _from_columns(names: Sequence[str], columns_CP: Tensor, pairs: Sequence[EncodedPair]) -> PairLogps:
    counts = [[int(pair.chosen.scored.sum()), int(pair.rejected.scored.sum())] for pair in pairs]
    chosen_tokens_P, rejected_tokens_P = torch.tensor(counts, dtype=torch.int64).reshape(-1, 2).T
    named: dict[str, Any] = dict(zip(names, columns_CP, strict=True))
    return PairLogps(chosen_tokens_P=chosen_tokens_P, rejected_tokens_P=rejected_tokens_P, **named)


def _is_whole(key: bytes, row: tuple[Any, ...]) -> bool:
    *numbers, digest = row
    return all(isinstance(number, float) for number in numbers) and digest == _digest(key, numbers)


def _digest(key: bytes, numbers: Sequence[float]) -> bytes:
    numbers = [number + 0.0 for number in numbers]  # SQLite keeps no -0.0
    return hashlib.blake2b(key + struct.pack(f"<{len(COLUMNS)}d", *numbers), digest_size=8).digest()


def _pair_key(pair: EncodedPair) -> bytes:
    digest = hashlib.sha256()
    for array in (pair.prompt, pair.chosen.ids, pair.chosen.scored, pair.rejected.ids, pair.rejected.scored):
        digest.update(len(array).to_bytes(8, "little"))
        digest.update(array.tobytes())
    return digest.digest()
