"""Any other shape, by the user's own words: `map` names the columns, `label` says what the label's values mean.

    map: {prompt: question, chosen: good, rejected: bad, system: system}

    map: {prompt: task.text, first: output_1, second: output_2, label: preference}
    label: {first: 1, second: 2, tie: 0}

A dot reaches into a nested column; a number after it counts list places from 0 (`messages.0.content`).
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, replace

from dpo_studio.config import SourceSection
from dpo_studio.errors import DataError
from dpo_studio.preferences.formats import Parser, Row, RowError, conversation, text_of
from dpo_studio.preferences.pair import Message, Pair

__all__ = ["columns_of", "mapped_parser"]

_RANKED = {"prompt", "chosen", "rejected"}
_LABELLED = {"prompt", "first", "second", "label"}


@dataclass(frozen=True)
class _Mapped:
    """Columns by the user's names. With a label, it says which of `first` and `second` is preferred."""

    columns: dict[str, str]
    labels: dict[str, str]
    """What each label value means, by its text: first, second or tie."""

    def __call__(self, row: Row) -> Pair:
        chosen, rejected = self._sides(row)
        sides = (self._value(row, chosen), self._value(row, rejected))
        pair = conversation(self._value(row, "prompt"), *sides)
        return _with_system(pair, _dig(row, self.columns["system"])) if "system" in self.columns else pair

    def _sides(self, row: Row) -> tuple[str, str]:
        if "label" not in self.columns:
            return "chosen", "rejected"
        meaning = self.labels.get(_label_text(self._value(row, "label")))
        if meaning is None:
            raise RowError("label has a value that no label setting names")
        if meaning == "tie":
            raise RowError("tie")
        return ("first", "second") if meaning == "first" else ("second", "first")

    def _value(self, row: Row, name: str) -> object:
        value = _dig(row, self.columns[name])
        if value is None:
            raise RowError(f"{name} is missing")
        return value


def mapped_parser(section: SourceSection, rows: list[Row]) -> Parser:
    """The mapping the section describes, checked against the first rows."""
    where, given = section.source, section.map.keys()
    if section.format not in {"auto", "mapped"}:
        raise DataError(f"{where}: map goes with format: mapped, not {section.format}", hint="remove one of the two")
    if given - {"system"} not in (_RANKED, _LABELLED):
        raise DataError(
            f"{where}: map names {', '.join(sorted(given)) or 'no columns'}",
            hint="data.train.map: prompt, chosen, rejected, or prompt, first, second, label; system is optional",
        )
    for name, column in section.map.items():
        if not any(column in row or _dig(row, column) is not None for row in rows):
            raise DataError(
                f"{where} has no column {column!r} (data.train.map.{name})", hint=f"its columns: {columns_of(rows)}"
            )
    return _Mapped(section.map, _label_meanings(section, rows) if given >= _LABELLED else _no_labels(section))


def _no_labels(section: SourceSection) -> dict[str, str]:
    if section.label:
        raise DataError(f"{section.source}: label is given, and map names no label column", hint="data.train.map.label")
    return {}


def _label_meanings(section: SourceSection, rows: list[Row]) -> dict[str, str]:
    given = section.label.keys()
    meanings = {_label_text(value): name for name, value in section.label.items()}
    if not {"first", "second"} <= given <= {"first", "second", "tie"} or len(meanings) < len(given):
        seen = dict.fromkeys(str(_dig(row, section.map["label"])) for row in rows)
        raise DataError(
            f"{section.source}: label needs a value each for first and second, and may have one for tie",
            hint=f"data.train.label: {{first: ..., second: ...}}; values seen: {', '.join(itertools.islice(seen, 5))}",
        )
    return meanings


def _label_text(value: object) -> str:
    """A label as it is compared: 1, 1.0, "1" and "1.0" are the same, so are true and "True"."""
    if isinstance(value, dict | list):
        raise RowError("label is not a single value")
    text = str(value).strip()
    if re.fullmatch(r"[+-]?\d+\.\d*", text):
        return text.rstrip("0").removesuffix(".")
    return text.lower() if text.lower() in {"true", "false"} else text


def _dig(row: object, path: str) -> object:
    """What stands at a column, or at a path of keys and list places with dots; None if nothing does."""
    if isinstance(row, dict) and path in row:
        return row[path]
    value = row
    for part in path.split("."):
        if isinstance(value, dict):
            value = value.get(part)
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return value


def _with_system(pair: Pair, system: object) -> Pair:
    if system is None or (isinstance(system, str) and not system.strip()):
        return pair
    if pair.prompt[0].role in {"system", "developer"}:
        raise RowError("prompt has a system turn besides the system column")
    return replace(pair, prompt=(Message("system", text_of(system, "system")), *pair.prompt))


def columns_of(rows: list[Row]) -> str:
    """The columns of these rows, for a message."""
    return ", ".join(dict.fromkeys(str(name) for row in rows for name in row if name is not None))
