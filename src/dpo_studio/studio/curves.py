"""A run's metrics.jsonl as it grows: read once, then only what was added. Columns for the page, findings for people."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from threading import Lock
from typing import Any

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
    measured = [row for row in rows if any(name.startswith(_HELD_OUT) for name in row)]
    held_out = [{name: row[name] for name in row if name == "step" or name.startswith(_HELD_OUT)} for row in measured]
    whole = {name: values for name, values in columns(trained).items() if not name.startswith(_HELD_OUT)}
    width = max(1, -(-len(trained) // points))
    groups = {
        name: [[v for v in values[at : at + width] if v is not None] for at in range(0, len(values), width)]
        for name, values in whole.items()
    }
    means: Columns = {name: [fmean(group) if group else None for group in some] for name, some in groups.items()}
    if "step" in groups:
        means["step"] = [group[-1] for group in groups["step"]]
    if not spread:
        return {"columns": means, "held_out": columns(held_out)}
    low: Columns = {name: [min(group, default=None) for group in some] for name, some in groups.items()}
    high: Columns = {name: [max(group, default=None) for group in some] for name, some in groups.items()}
    return {"columns": means, "low": low, "high": high, "held_out": columns(held_out)}
