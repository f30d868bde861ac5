"""Comparisons as people labelled them: two answers and what each annotator said, ties included.

`sources.py` reads pairs to learn from, and a tie is none. To measure a judge, ties and single opinions count as well,
so here a row keeps both answers as first and second, and every label column is read for itself.

A source of plain pairs has one label: the chosen answer is the better one.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from dpo_studio.config import SourceSection
from dpo_studio.errors import DataError
from dpo_studio.preferences.mapping import pair_parser
from dpo_studio.preferences.pair import Pair
from dpo_studio.preferences.refused_rows import Refusal
from dpo_studio.preferences.rows import read_rows
from dpo_studio.preferences.sources import read_pairs
from dpo_studio.preferences.turns import Row, RowError, instruction_of

__all__ = ["Label", "Labelled", "LabelledSource", "read_labelled"]

Label = Literal["first", "second", "tie"]
Reader = Callable[[Row], Pair]

_LOOK_AT = 64
_PANDALM_COLUMNS = {"instruction", "input", "response1", "response2"}
_PANDALM_MAP = {"prompt": "prompt", "first": "response1", "second": "response2"}
_PANDALM_LABEL: dict[str, str | int | float | bool] = {"first": 1, "second": 2, "tie": 0}
_ANNOTATOR = re.compile(r"annotator\d+")


@dataclass(frozen=True, slots=True)
class Labelled:
    """Two answers to one prompt and what people said of them."""

    pair: Pair
    """Its `chosen` is the first answer, its `rejected` the second, whoever was preferred."""
    labels: tuple[Label, ...]
    """One an annotator, in the columns' order."""


@dataclass(frozen=True)
class LabelledSource:
    """What was read: every row is in `comparisons` or in `refused`."""

    name: str
    annotators: tuple[str, ...]
    """The label columns; none for a source of plain pairs."""
    comparisons: list[Labelled]
    refused: list[Refusal]

    def refused_by_reason(self) -> dict[str, int]:
        """How many rows each reason refused, most frequent first."""
        return dict(Counter(refusal.reason for refusal in self.refused).most_common())


def read_labelled(section: SourceSection, annotators: Sequence[str] = (), *, seed: int = 0) -> LabelledSource:
    """Every labelled comparison of a source.

    `annotators` names the columns of their labels; `section.map` then says which columns hold prompt, first and second,
    and `section.label` what a label's values mean. PandaLM's shape (`instruction`, `input`, `response1`, `response2`,
    `annotator1`, ...) needs none of it. Anything else is read as pairs.

    Raises:
        DataError: the source is missing, unreadable, of no known shape, or holds not one usable row.
    """
    rows = read_rows(section, seed=seed)
    first = list(itertools.islice(rows, _LOOK_AT))
    shape = next((row for _, row in first if isinstance(row, dict)), {})
    pandalm = not section.map and shape.keys() >= _PANDALM_COLUMNS
    if pandalm:
        annotators = annotators or sorted(name for name in shape if _ANNOTATOR.fullmatch(str(name)))
        section = section.model_copy(update={"map": _PANDALM_MAP, "label": section.label or _PANDALM_LABEL})
    if not annotators:
        return _from_pairs(section, seed)
    numbered = [(number, _with_prompt(row) if pandalm else row) for number, row in itertools.chain(first, rows)]
    return _from_labels(section, annotators, numbered)


def _from_pairs(section: SourceSection, seed: int) -> LabelledSource:
    source = read_pairs(section, seed=seed)
    return LabelledSource(source.name, (), [Labelled(pair, ("first",)) for pair in source.pairs], source.refused)


def _with_prompt(row: object) -> object:
    """PandaLM's instruction and what it is about as one prompt, as `formats.py` reads them to learn from.

    A row without one is left as it is, and refused when it is read.
    """
    if not isinstance(row, dict):
        return row
    try:
        return row | {"prompt": instruction_of(row)}
    except RowError:
        return row


def _from_labels(
    section: SourceSection, annotators: Sequence[str], numbered: Sequence[tuple[int, object]]
) -> LabelledSource:
    texts, readers = _readers(section, annotators, [row for _, row in numbered[:_LOOK_AT] if isinstance(row, dict)])
    comparisons: list[Labelled] = []
    refused: list[Refusal] = []
    for number, row in numbered:
        try:
            if not isinstance(row, dict):
                raise RowError("row is not a JSON object")
            pair = replace(texts(row), row=number)
            comparisons.append(Labelled(pair, tuple(_label(read, row, pair) for read in readers)))
        except RowError as refusal:
            refused.append(Refusal(number, refusal.reason, refusal.seen))
    source = LabelledSource(section.source, tuple(annotators), comparisons, refused)
    if not comparisons:
        reasons = "; ".join(f"{count} x {reason}" for reason, count in source.refused_by_reason().items())
        raise DataError(f"{section.source}: none of its {len(numbered)} rows can be used: {reasons or 'it is empty'}")
    return source


def _readers(
    section: SourceSection, annotators: Sequence[str], rows: list[dict[str, object]]
) -> tuple[Reader, list[Reader]]:
    """What reads both answers, and for each annotator what reads the one that was preferred."""
    columns = section.map
    if columns.keys() - {"system"} != {"prompt", "first", "second"}:
        raise DataError(
            f"{section.source}: label columns are named ({', '.join(annotators)}), and map names "
            f"{', '.join(sorted(columns)) or 'no columns'}",
            hint="name the others: --map prompt=COLUMN --map first=COLUMN --map second=COLUMN",
        )
    both = {"prompt": columns["prompt"], "chosen": columns["first"], "rejected": columns["second"]}
    if "system" in columns:
        both["system"] = columns["system"]
    texts = pair_parser(section.model_copy(update={"map": both, "label": {}}), rows)
    by_column = (section.model_copy(update={"map": columns | {"label": name}}) for name in annotators)
    return texts, [pair_parser(one, rows) for one in by_column]


def _label(read: Reader, row: dict[str, object], pair: Pair) -> Label:
    try:
        preferred = read(row)
    except RowError as refusal:
        if refusal.reason == "tie":
            return "tie"
        raise
    return "first" if preferred.chosen == pair.chosen else "second"
