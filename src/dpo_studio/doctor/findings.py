"""The data doctor's findings, and the report of all of them. Plain values; text from the data is untrusted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["EXAMPLES", "DataReport", "Example", "Finding", "Histogram", "Level", "histogram_of", "level_of"]

Level = Literal["stop", "warning", "note", "fine"]
"""stop: a run would be worthless. warning: it costs the run something. note: worth knowing. fine: nothing found."""

_BINS = 30
EXAMPLES = 3
"""How many examples a finding shows: the first ones, so that the same file gives the same report."""


@dataclass(frozen=True, slots=True)
class Example:
    """One row that a finding is about."""

    row: int
    """Its place in the source, from 0."""
    text: str
    """The text found there, unchanged from the data: escape it before it is shown."""


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    name: str
    """For machines; it never changes."""
    title: str
    """For people."""
    count: int
    """How many it concerns."""
    of: int
    """Out of how many."""
    level: Level
    does: str
    """What it does to a run."""
    todo: str
    """What to do about it."""
    detail: str = ""
    """What was measured, in a sentence."""
    examples: tuple[Example, ...] = ()
    numbers: Mapping[str, float | None] = field(default_factory=dict)
    """What was measured, for machines."""
    rows: Sequence[int] = ()
    """All rows that it concerns, where the check knows them."""

    @property
    def share(self) -> float:
        """Count over total; 0 where there was nothing to look at."""
        return self.count / self.of if self.of else 0.0


def level_of(count: int, of: int, *, warning: float, stop: float | None = None) -> Level:
    """The level of a count: fine at 0, a note up to a share of `warning`, a stop over `stop` if that is given."""
    if not count:
        return "fine"
    share = count / of
    if stop is not None and share > stop:
        return "stop"
    return "warning" if share > warning else "note"


@dataclass(frozen=True)
class Histogram:
    """Counts between edges for the two answers, or for one series."""

    name: str
    title: str
    edges: Sequence[float]
    """One more than there are counts."""
    counts: Mapping[str, Sequence[int]]
    """By series: `chosen` and `rejected`, or `margin`."""


def histogram_of(name: str, title: str, *, least: float | None = None, **series: NDArray[np.float64]) -> Histogram:
    """Equal bins from `least` (or the least value) to the 99.5th percentile; larger values are in the last bin."""
    values = np.concatenate(list(series.values()))
    low = float(values.min()) if least is None else least
    edges = np.linspace(low, max(float(np.quantile(values, 0.995)), low + 1e-6), _BINS + 1)
    counts = {key: np.histogram(np.clip(some, low, edges[-1]), edges)[0].tolist() for key, some in series.items()}
    return Histogram(name, title, edges.tolist(), counts)


@dataclass(frozen=True)
class DataReport:
    """What was found in one source."""

    source: str
    format: str
    rows: int
    pairs: int
    """Rows that are pairs."""
    usable: int
    """Pairs that could be trained on: those that the length rule keeps, where a tokenizer was given."""
    prompts: int
    """Different prompts."""
    refused: Mapping[str, int]
    """Rows that are not a pair, by reason, most frequent first."""
    findings: Sequence[Finding]
    """The findings of all checks, in order."""
    histograms: Sequence[Histogram] = ()
    model: str | None = None
    """The model whose tokenizer was used."""
    looked_at: str = ""
    """What the more costly checks did not cover, if anything."""

    def at(self, level: Level) -> list[Finding]:
        """The findings of one level."""
        return [finding for finding in self.findings if finding.level == level]

    @property
    def verdict(self) -> str:
        """One line: whether a run on this is worth starting."""
        if not self.usable:
            return f"Nothing usable: none of {_counted(self.rows, 'row')} can be trained on."
        if stops := self.at("stop"):
            return f"Not ready: {_listed([_headline(finding) for finding in stops])}."
        ready = f"{_counted(self.usable, 'pair')} of {_counted(self.rows, 'row')}"
        if warnings := self.at("warning"):
            return f"Usable: {ready}; look at {_listed([finding.title for finding in warnings])} first."
        return f"Ready: {ready}, and no check has anything against them."

    def to_plain(self, *, all_rows: bool = False) -> dict[str, Any]:
        """Everything, as JSON has it; with `all_rows` each finding has its `rows`: as many as the source, at most."""
        return {
            "source": self.source,
            "format": self.format,
            "model": self.model,
            "verdict": self.verdict,
            "usable": self.usable,
            "rows": self.rows,
            "pairs": self.pairs,
            "prompts": self.prompts,
            "refused": dict(self.refused),
            "looked_at": self.looked_at,
            "findings": [
                _plain(finding) | ({"rows": list(finding.rows)} if all_rows else {}) for finding in self.findings
            ],
            "histograms": [
                {
                    "name": h.name,
                    "title": h.title,
                    "edges": list(h.edges),
                    "counts": {k: list(v) for k, v in h.counts.items()},
                }
                for h in self.histograms
            ],
        }


def _plain(finding: Finding) -> dict[str, Any]:
    return {
        "name": finding.name,
        "title": finding.title,
        "level": finding.level,
        "count": finding.count,
        "of": finding.of,
        "share": round(finding.share, 6),
        "detail": finding.detail,
        "does": finding.does,
        "todo": finding.todo,
        "examples": [{"row": example.row, "text": example.text} for example in finding.examples],
        "numbers": dict(finding.numbers),
    }


def _headline(finding: Finding) -> str:
    return f"{finding.title} ({100 * finding.share:.0f} %)"


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _listed(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`; no more than four."""
    shown = list(names) if len(names) <= 4 else [*names[:3], f"{len(names) - 3} more"]
    return " and ".join([", ".join(shown[:-1]), shown[-1]]) if len(shown) > 1 else shown[0]
