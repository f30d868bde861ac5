"""A run's metrics.jsonl as it grows: read once, then only what was added. Columns for the page, findings for people."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_studio.errors import DPOStudioError
from dpo_studio.reading import open_regular, parse_json
from dpo_studio.runs.facts import finite
from dpo_studio.runs.folder import RunFolder
from dpo_studio.runs.health import HealthWatch

__all__ = ["Curve", "Curves", "columns", "thinned"]

Row = dict[str, Any]
Columns = dict[str, list[float | None]]
_READ_AT_ONCE = 64 * 2**20
_JUDGING = 0.03
"""Seconds of each question, of which a page has several at once."""
_KEPT = 64
"""Curves in memory: 20,000 steps take some 20 MB."""
_HELD_OUT = "eval_"


@dataclass
class Curve:
    """The rows so far of one run."""

    file: Path
    total: int
    saturates: bool
    rows: list[Row] = field(default_factory=list)
    generation: int = 0
    """Grows when the file was replaced, as a resumed run does."""
    _at: tuple[int, int] = (0, 0)
    """Inode and offset of what was read."""
    _health: HealthWatch = field(default_factory=lambda: HealthWatch(0))
    _judged: int = 0
    _lock: Lock = field(default_factory=Lock)

    @property
    def health(self) -> list[dict[str, Any]]:
        """What the rows show, as far as they were judged: 0.25 ms a row, so a long curve takes several questions."""
        end = time.monotonic() + _JUDGING
        with self._lock:
            while self._judged < len(self.rows) and time.monotonic() < end:
                self._health.see(self.rows[self._judged])
                self._judged += 1
            return [finding.to_plain() for finding in self._health.findings]

    def update(self) -> None:
        """Read whole lines that were added; begin again where the file is another one."""
        with self._lock:
            try:
                stream = open_regular(self.file, what="metrics")
            except DPOStudioError:
                return
            with stream:
                there = os.fstat(stream.fileno())
                if there.st_ino != self._at[0] or there.st_size < self._at[1]:
                    self._begin(there.st_ino)
                stream.seek(self._at[1])
                added = stream.read(_READ_AT_ONCE)
            whole = added[: added.rfind(b"\n") + 1]
            self._at = (self._at[0], self._at[1] + len(whole))
            for line in whole.splitlines():
                self._add(line)

    def _begin(self, inode: int) -> None:
        self.generation += bool(self.rows)
        self.rows = []
        self._at = (inode, 0)
        self._health, self._judged = HealthWatch(self.total, saturates=self.saturates), 0

    def _add(self, line: bytes) -> None:
        try:
            row = parse_json(line.decode("utf-8", "replace"), what="metrics")
        except DPOStudioError:
            return
        if isinstance(row, dict) and type(row.get("step")) is int:
            self.rows.append(row)


@dataclass
class Curves:
    """The curves of the runs that were looked at last."""

    _curves: dict[Path, Curve] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)

    def of(self, run: Path, total: int, saturates: bool) -> Curve:
        """The curve of a run, brought up to date."""
        with self._lock:
            curve = self._curves.pop(run, None)
            if curve is None or curve.total != total:
                curve = Curve(run / RunFolder.METRICS, total, saturates)
            self._curves[run] = curve
            while len(self._curves) > _KEPT:
                del self._curves[next(iter(self._curves))]
        curve.update()
        return curve


def columns(rows: list[Row]) -> Columns:
    """Rows as columns of one length; None where a row has no number."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [finite(row, name) for row in rows] for name in names}


def thinned(rows: list[Row], points: int, *, spread: bool = True) -> dict[str, Columns]:
    """At most so many points: means of neighbours, with the least and the largest of each so that no spike is lost.

    Held-out numbers are few and stay as they are, in a table of their own.
    """
    trained = [row for row in rows if row["step"] > 0]
    names = dict.fromkeys(chain.from_iterable(rows))
    held = {name for name in names if name.startswith(_HELD_OUT)}
    measured = [row for row in rows if not held.isdisjoint(row)]
    held_out = [{name: row[name] for name in row if name == "step" or name in held} for row in measured]
    width = max(1, -(-len(trained) // points))
    groups = {name: _grouped(trained, name, width) for name in names if name not in held} if trained else {}
    means = {name: _plain(_mean(groups_PW)) for name, groups_PW in groups.items()}
    if "step" in groups:
        means["step"] = _plain(np.nanmax(groups["step"], axis=1))
    told = {"columns": means, "held_out": columns(held_out)}
    if spread:
        told["low"] = {name: _plain(np.fmin.reduce(some, axis=1)) for name, some in groups.items()}
        told["high"] = {name: _plain(np.fmax.reduce(some, axis=1)) for name, some in groups.items()}
    return told


def _grouped(rows: list[Row], name: str, width: int) -> NDArray[np.float64]:
    """A column in rows of `width` neighbours, (points, width); NaN where there is no number."""
    values = [row.get(name) for row in rows]
    try:
        numbers = np.array(values, np.float64)  # 20,000 of them in 2 ms; None is NaN
    except (TypeError, ValueError, OverflowError):  # not a training's own file
        numbers = np.array([finite(row, name) for row in rows], np.float64)
    numbers[~np.isfinite(numbers)] = np.nan
    whole = np.full(-(-len(rows) // width) * width, np.nan)
    whole[: len(rows)] = numbers
    return whole.reshape(-1, width)


def _mean(groups_PW: NDArray[np.float64]) -> NDArray[np.float64]:
    count_P = (~np.isnan(groups_PW)).sum(1)
    return np.where(count_P > 0, np.nansum(groups_PW, axis=1) / np.maximum(count_P, 1), np.nan)


def _plain(values: NDArray[np.float64]) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values.tolist()]
