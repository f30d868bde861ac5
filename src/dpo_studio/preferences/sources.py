"""A source -> its pairs, and its refused rows with their reasons; as a stream, or as two lists.

Every row is one or the other. A reason is the same text for the same kind of problem, so that it can be
counted; what makes a whole source useless (no such file, no known shape, not one usable row) is a `DataError`.
"""

from __future__ import annotations

import difflib
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from dpo_studio.config import SourceSection
from dpo_studio.errors import DataError
from dpo_studio.preferences.bounds import BadRow
from dpo_studio.preferences.contents import strange_in_row
from dpo_studio.preferences.formats import FORMATS, Parser, scores_of, shape_of, trl_implicit
from dpo_studio.preferences.mapping import columns_of, mapped_parser
from dpo_studio.preferences.pair import Pair
from dpo_studio.preferences.rows import read_rows
from dpo_studio.preferences.turns import Row, RowError

__all__ = ["PairSource", "PairStream", "Refusal", "nothing_usable", "open_pairs", "read_pairs"]

_LOOK_AT = 64  # rows that decide the format: enough that a few broken ones at the top do not
_EXPECTED = (
    "prompt, chosen and rejected; chosen and rejected alone as message lists or Human/Assistant transcripts; "
    "or those of docs/data.md"
)
_ORIGINS = ("source", "dataset", "domain")
_LONGEST_ORIGIN = 100  # characters: what is longer is no name of a set


@dataclass(frozen=True, slots=True)
class Refusal:
    """A row that is no pair, and why."""

    row: int
    """Where it stood in its source, from 0."""
    reason: str
    """The same text for the same kind of problem."""


@dataclass(frozen=True)
class PairStream:
    """A source that is read once, row by row."""

    name: str
    """The source as the user gave it."""
    format: str
    """The shape its rows are read as."""
    results: Iterator[Pair | Refusal]
    """Every row in source order: its pair (nectar-all: its pairs), or why it is none. May raise a DataError."""


@dataclass(frozen=True)
class PairSource:
    """What was read from one source: every row is in `pairs` or in `refused`."""

    name: str
    """The source as the user gave it."""
    format: str
    """The shape its rows were read as."""
    rows: int
    """Rows read, after sampling."""
    pairs: list[Pair]
    """In source order."""
    refused: list[Refusal]
    """In source order."""

    def refused_by_reason(self) -> dict[str, int]:
        """How many rows each reason refused, most frequent first."""
        return dict(Counter(refusal.reason for refusal in self.refused).most_common())


def read_pairs(section: SourceSection, *, seed: int = 0) -> PairSource:
    """Every pair of a source, and every row that is none with its reason.

    Raises:
        DataError: the source is missing, unreadable, of no known shape, or holds not one usable row.
    """
    stream = open_pairs(section, seed=seed)
    pairs: list[Pair] = []
    refused: list[Refusal] = []
    for result in stream.results:
        if isinstance(result, Pair):
            pairs.append(result)
        else:
            refused.append(result)
    if not pairs:
        counts = Counter(refusal.reason for refusal in refused)
        raise nothing_usable(stream, counts)
    rows = len({pair.row for pair in pairs}) + len(refused)
    return PairSource(stream.name, stream.format, rows, pairs, refused)


def open_pairs(section: SourceSection, *, seed: int = 0) -> PairStream:
    """The same one row at a time: memory does not grow with the source (but with `section.rows`, where that is set).

    Raises:
        DataError: the source is missing, unreadable, empty, or of no known shape.
    """
    rows = read_rows(section, seed=seed)
    first = list(itertools.islice(rows, _LOOK_AT))
    if not first:
        raise DataError(f"{section.source} holds no rows", hint="it needs at least one preference pair")
    name, parse = _format(section, [row for _, row in first])
    results = _results(itertools.chain(first, rows), parse, _used(section))
    return PairStream(section.source, name, results)


def _results(rows: Iterator[tuple[int, object]], parse: Parser, used: set[str]) -> Iterator[Pair | Refusal]:
    origins = [name for name in _ORIGINS if name not in used]
    for number, raw in rows:
        try:
            row = _checked(raw)
            if (strange := strange_in_row({name: row[name] for name in row.keys() - used})) is not None:
                raise RowError(strange)
            pairs = parse(row)
        except RowError as refusal:
            yield Refusal(number, refusal.reason)
            continue
        origin = next((name for column in origins if (name := _origin(row.get(column)))), None)
        for pair in pairs if isinstance(pairs, list) else [pairs]:
            yield replace(pair, row=number, scores=pair.scores or scores_of(row), origin=origin)


def _used(section: SourceSection) -> set[str]:
    """Columns that the user's mapping says are something else."""
    return {column.partition(".")[0] for column in section.map.values()}


def _origin(value: object) -> str | None:
    if not isinstance(value, str) or len(value) > _LONGEST_ORIGIN or not value.isprintable():
        return None
    return value.strip() or None


def _checked(row: object) -> Row:
    if isinstance(row, BadRow):
        raise RowError(row.reason)
    if not isinstance(row, dict):
        raise RowError("row is not a JSON object")
    if None in row:  # csv.DictReader's name for fields beyond the header
        raise RowError("row has more fields than the header")
    return row


def nothing_usable(source: PairStream, refused: Counter[str]) -> DataError:
    """What to say of a source that has rows and not one pair."""
    counts = "; ".join(f"{count} x {reason}" for reason, count in refused.most_common(5))
    return DataError(
        f"{source.name}: none of its {refused.total()} rows can be used (read as {source.format}): {counts}",
        hint="another shape? name its columns with data.train.map or --map, or the shape with format",
    )


def _format(section: SourceSection, first: list[object]) -> tuple[str, Parser]:
    """The format's name and the function that reads a row of it."""
    known = ["auto", "mapped", *FORMATS]
    if section.format not in known:
        near = difflib.get_close_matches(section.format, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the formats are {', '.join(known)}"
        raise DataError(f"{section.source}: unknown format {section.format!r}", hint=hint)
    rows = [row for row in first if isinstance(row, dict)]
    if not rows:
        raise DataError(f"{section.source}: its rows are not JSON objects", hint=f"expected {_EXPECTED}")
    if section.map or section.label or section.format == "mapped":
        return "mapped", mapped_parser(section, rows)
    shapes = Counter(shape for row in rows if (shape := shape_of(row)) is not None)
    if section.format == "auto" and shapes:
        name = shapes.most_common(1)[0][0]
    elif section.format != "auto" and any(FORMATS[section.format].columns <= row.keys() for row in rows):
        name = section.format
    else:
        raise _wrong_columns(section, rows)
    if name == "trl" and not any("prompt" in row for row in rows):
        return name, trl_implicit
    return name, FORMATS[name].parse


def _wrong_columns(section: SourceSection, rows: list[Row]) -> DataError:
    return DataError(
        f"{section.source}: its columns ({columns_of(rows)}) are not those of a known format; expected {_EXPECTED}",
        hint="say which column holds what: --map prompt=COLUMN --map chosen=COLUMN --map rejected=COLUMN; or first and "
        "second, and a label: --map label=COLUMN --label first=VALUE --label second=VALUE (a recipe: data.train.map)",
    )
