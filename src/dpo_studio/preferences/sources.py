"""A source -> its pairs, and its refused rows with their reasons; as a stream, or as two lists.

Every row is one or the other. A reason is the same text for the same kind of problem, so that it can be
counted; what makes a whole source useless (no such file, no known shape, not one usable row) is a `DataError`.
"""

from __future__ import annotations

import difflib
import itertools
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from dpo_studio.config import SourceSection
from dpo_studio.errors import DataError
from dpo_studio.preferences.bounds import BadRow
from dpo_studio.preferences.formats import FORMATS, Parser, formats_help, scores_of, shape_of, trl_implicit
from dpo_studio.preferences.guesses import other_kind, suggested_map
from dpo_studio.preferences.mapping import columns_of, mapped_parser
from dpo_studio.preferences.pair import Pair
from dpo_studio.preferences.refused_rows import Refusal, RefusedRows
from dpo_studio.preferences.row_contents import strange_in_row
from dpo_studio.preferences.rows import read_rows
from dpo_studio.preferences.turns import Row, RowError

__all__ = ["PairSource", "PairStream", "Refusal", "nothing_usable", "open_pairs", "pairs_of", "read_pairs"]

_LOOK_AT = 64  # rows that decide the format: enough that a few broken ones at the top do not
_EXPECTED = (
    "prompt, chosen and rejected; chosen and rejected alone as message lists or Human/Assistant transcripts; "
    "or those of docs/data.md"
)
_ORIGINS = ("source", "dataset", "domain")
_LONGEST_ORIGIN = 100  # characters: anything longer is not the name of a data set


@dataclass(frozen=True)
class PairStream:
    """A source that is read once, row by row."""

    name: str
    """The source as the user gave it."""
    format: str
    """The shape its rows are read as."""
    results: Iterator[Pair | Refusal]
    """Every row in source order: its pair (nectar-all: its pairs), or why it is not one. May raise a DataError."""


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
        return dict(_by_reason(self.refused).counts.most_common())

    def refused_lines(self) -> list[str]:
        """The same as text, each with its first row and the value there."""
        refused = _by_reason(self.refused)
        return [f"{count} rows refused: {refused.described(reason)}" for reason, count in refused.counts.most_common()]


def _by_reason(refused: Iterable[Refusal]) -> RefusedRows:
    found = RefusedRows()
    for refusal in refused:
        found.add(refusal)
    return found


def read_pairs(section: SourceSection, *, seed: int = 0) -> PairSource:
    """Every pair of a source, and every refused row with its reason.

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
        raise nothing_usable(stream, _by_reason(refused))
    rows = len({pair.row for pair in pairs}) + len(refused)
    return PairSource(stream.name, stream.format, rows, pairs, refused)


def open_pairs(section: SourceSection, *, seed: int = 0) -> PairStream:
    """The same one row at a time: memory does not grow with the source (but with `section.rows`, where that is set).

    Raises:
        DataError: the source is missing, unreadable, empty, or of no known shape.
    """
    return pairs_of(section, read_rows(section, seed=seed))


def pairs_of(section: SourceSection, rows: Iterator[tuple[int, object]]) -> PairStream:
    """The same of numbered rows that are being read already.

    Raises:
        DataError: there are none, or they are of no known shape.
    """
    first = list(itertools.islice(rows, _LOOK_AT))
    if not first:
        raise DataError(f"{section.source} has no rows", hint="it needs at least one preference pair")
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
            yield Refusal(number, refusal.reason, refusal.seen)
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


def nothing_usable(source: PairStream, refused: RefusedRows) -> DataError:
    """The error for a source that has rows but no pair."""
    counts = "; ".join(refused.lines(5))
    hint = refused.advice()
    if refused.only_ties:
        hint = "every row is a tie; if that is not so, look at what the label's values mean (--label, data.train.label)"
    return DataError(
        f"{source.name}: none of its {refused.counts.total()} rows can be used (read as {source.format}): {counts}",
        hint=f"{hint} Rows count from 0.",
    )


def _format(section: SourceSection, first: list[object]) -> tuple[str, Parser]:
    """The format's name and the function that reads a row of it."""
    known = ["auto", "mapped", *FORMATS]
    if section.format not in known:
        near = difflib.get_close_matches(section.format, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the formats are {formats_help()}"
        raise DataError(f"{section.source}: unknown format {section.format!r}", hint=hint)
    rows = [row for row in first if isinstance(row, dict)]
    if bad := [row.reason for row in first if isinstance(row, BadRow)] if not rows else []:
        counts = "; ".join(f"{count} x {reason}" for reason, count in Counter(bad).most_common(5))
        message = f"{section.source}: none of its first {len(first)} rows can be used: {counts}"
        raise DataError(message, hint="is this a file of pairs, one a row?")
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
    if section.pairs != "best-worst":
        return name, _other_pairs(section, FORMATS[name].parser(section.pairs))
    if name == "trl" and not any("prompt" in row for row in rows):
        return name, trl_implicit
    return name, FORMATS[name].parse


def _other_pairs(section: SourceSection, parse: Parser | None) -> Parser:
    if parse is None:
        raise DataError(
            f"{section.source}: pairs: {section.pairs} is for rows of several ranked or scored answers",
            hint="remove it, or name lists of answers and scores: --map answers=COLUMN --map scores=COLUMN",
        )
    return parse


def _wrong_columns(section: SourceSection, rows: list[Row]) -> DataError:
    """The error for unknown columns: what the file may be, and the options that name them, ready to be typed."""
    said = f"{section.source}: its columns ({columns_of(rows)}) are not those of a known format"
    if (options := suggested_map(rows)) is not None:
        once = f"`dpo data convert {shlex.quote(section.source)} pairs.jsonl {options}`"
        return DataError(
            f"{said}; expected {_EXPECTED}",
            hint=f"probably {options} (a recipe: data.train.map). {once} makes a file that needs none of it",
        )
    by_hand = (
        "say which column contains what: --map prompt=COLUMN --map chosen=COLUMN --map rejected=COLUMN; or first and "
        "second, and a label: --map label=COLUMN --label first=VALUE --label second=VALUE (a recipe: data.train.map)"
    )
    if (other := other_kind(rows)) is not None:
        return DataError(
            f"{said}: {other[0]}; expected {_EXPECTED}", hint=f"{other[1]}. Is it pairs all the same, {by_hand}"
        )
    return DataError(f"{said}; expected {_EXPECTED}", hint=by_hand)
