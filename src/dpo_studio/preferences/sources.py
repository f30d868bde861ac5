"""A source -> its pairs, and its refused rows with their reasons.

Every row ends in one of the two lists. A reason is the same text for the same kind of problem, so that it can be
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
from dpo_studio.preferences.formats import FORMATS, Parser, Row, RowError, parse_trl_implicit, shape_of
from dpo_studio.preferences.mapping import columns_of, mapped_parser
from dpo_studio.preferences.pair import Pair
from dpo_studio.preferences.rows import read_rows
from dpo_studio.preferences.scores import scores_of

__all__ = ["PairSource", "PairStream", "Refusal", "read_pairs", "stream_pairs"]

_LOOK_AT = 64  # rows that decide the format: enough that a few broken ones at the top do not
_EXPECTED = "prompt, chosen and rejected; or chosen and rejected alone as message lists or Human/Assistant transcripts"


@dataclass(frozen=True, slots=True)
class Refusal:
    """A row that is no pair, and why."""

    row: int
    """Where it stood in its source, from 0."""
    reason: str
    """The same text for the same kind of problem."""


@dataclass(frozen=True)
class PairStream:
    """A source that is read as it is asked for: one row in memory at a time."""

    name: str
    """The source as the user gave it."""
    format: str
    """The shape its rows are read as."""
    rows: Iterator[Pair | Refusal]
    """Every row, in source order. A `DataError` may come out of it where the file breaks off."""


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
    stream = stream_pairs(section, seed=seed)
    pairs: list[Pair] = []
    refused: list[Refusal] = []
    for row in stream.rows:
        if isinstance(row, Refusal):
            refused.append(row)
        else:
            pairs.append(row)
    source = PairSource(stream.name, stream.format, len(pairs) + len(refused), pairs, refused)
    if not pairs:
        raise _nothing_usable(source)
    return source


def stream_pairs(section: SourceSection, *, seed: int = 0) -> PairStream:
    """The same, one row at a time; a source of which no row is a pair is no error here.

    Raises:
        DataError: the source is missing, unreadable, empty, or of no known shape.
    """
    rows = read_rows(section, seed=seed)
    first = list(itertools.islice(rows, _LOOK_AT))
    if not first:
        raise DataError(f"{section.source} holds no rows", hint="it needs at least one preference pair")
    name, parse = _format(section, [row for _, row in first])
    return PairStream(section.source, name, (_read(number, row, parse) for number, row in itertools.chain(first, rows)))


def _read(number: int, row: object, parse: Parser) -> Pair | Refusal:
    try:
        pair = _parse(row, parse)
        return replace(pair, row=number, scores=pair.scores or scores_of(row))
    except RowError as refusal:
        return Refusal(number, refusal.reason)


def _parse(row: object, parse: Parser) -> Pair:
    if not isinstance(row, dict):
        raise RowError("row is not a JSON object")
    if None in row:  # csv.DictReader's name for fields beyond the header
        raise RowError("row has more fields than the header")
    if row.get("tools"):
        raise RowError("row has tools, which are not supported")
    return parse(row)


def _nothing_usable(source: PairSource) -> DataError:
    reasons = itertools.islice(source.refused_by_reason().items(), 5)
    counts = "; ".join(f"{count} x {reason}" for reason, count in reasons)
    return DataError(
        f"{source.name}: none of its {source.rows} rows can be used (read as {source.format}): {counts}",
        hint="another shape? name its columns with data.train.map, or the shape with data.train.format",
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
    elif section.format != "auto" and any({"chosen", "rejected"} <= row.keys() for row in rows):
        name = section.format
    else:
        raise _wrong_columns(section, rows)
    if name == "trl" and not any("prompt" in row for row in rows):
        return name, parse_trl_implicit
    return name, FORMATS[name]


def _wrong_columns(section: SourceSection, rows: list[Row]) -> DataError:
    return DataError(
        f"{section.source}: its columns ({columns_of(rows)}) are not those of a known format; expected {_EXPECTED}",
        hint="say which column holds what with data.train.map, or name the shape with data.train.format",
    )
