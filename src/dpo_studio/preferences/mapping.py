"""Any other shape, by the user's options: `map` names the columns, `label` says what the label's values mean.

    map: {prompt: question, chosen: good, rejected: bad, system: system}

    map: {prompt: task.text, first: output_1, second: output_2, label: preference}
    label: {first: 1, second: 2, tie: [0, 1.5], both_bad: 3}

    map: {prompt: instruction, input: input, first: a.text, second: b.text, score_first: a.score, score_second: b.score}

    map: {prompt: prompt, answers: generations, scores: ratings}

    map: {prompt: ask, first: a, second: b, label: "ann,bob,eve"}      (more than half of them must agree)

A dot reaches into a nested column; a number after it counts list places from 0 (`messages.0.content` or
`messages[0].content`), and a name after a list is looked up in each of its objects (`completions.text`). Without a
label the higher score is preferred; of a list of answers the best is chosen and the worst rejected. Without a prompt
the answers are whole dialogues, and what they share is it.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from dpo_studio.config import SourceSection
from dpo_studio.errors import DataError
from dpo_studio.preferences.exports import majority
from dpo_studio.preferences.pair import Pair
from dpo_studio.preferences.ranked import PairsRule, Ranked, pairs_of_ranked, scored
from dpo_studio.preferences.turns import (
    Row,
    RowError,
    conversation,
    implicit,
    is_missing,
    number,
    text_of,
    value_of,
    with_system,
)

__all__ = ["columns_of", "mapped_parser", "pair_parser", "value_at"]

_RANKED, _LABELLED = ("chosen", "rejected"), ("first", "second")
_LISTS = {"answers", "scores"}
_ASKED = {"prompt", "input", "system"}
_RANKED_SCORES, _LABELLED_SCORES = {"score_chosen", "score_rejected"}, {"score_first", "score_second"}
_WAYS = (  # to say which answer is preferred, each of them once
    {*_RANKED},
    {*_RANKED} | _RANKED_SCORES,
    {*_LABELLED, "label"},
    {*_LABELLED, "label"} | _LABELLED_SCORES,
    {*_LABELLED} | _LABELLED_SCORES,
    _LISTS,
)
_NAMES = _ASKED.union(*_WAYS)
_MEANINGS = {"first", "second", "tie", "both_bad"}


@dataclass(frozen=True)
class _Mapped:
    """Columns by the user's names. With a label or scores, they say which of `first` and `second` is preferred."""

    columns: dict[str, str]
    meanings: dict[str, str]
    """What each label value means, by its text: first, second, tie or both_bad."""

    def __call__(self, raw: Row) -> Pair:
        row: Row = {
            name: _labels(raw, column) if name == "label" else value_at(raw, column)
            for name, column in self.columns.items()
        }
        chosen, rejected = self._sides(row)
        pair = _pair(row, _answer(row, chosen), _answer(row, rejected))
        return replace(pair, prompt=with_system(pair.prompt, row.get("system")), scores=_scores(row, chosen, rejected))

    def _sides(self, row: Row) -> tuple[str, str]:
        """The names of the preferred and of the other answer."""
        if "chosen" in row:
            return _RANKED
        if "label" in row:
            meaning = self._meaning(value_of(row, "label"))
        else:
            first, second = (number(row, f"score_{name}") for name in _LABELLED)
            meaning = "first" if first > second else "second" if second > first else "tie"
        if meaning in {"tie", "both_bad"}:
            raise RowError(meaning.replace("_", " "))
        return ("first", "second") if meaning == "first" else ("second", "first")

    def _meaning(self, label: object) -> str:
        """What a label says, or what more than half of a list of them say."""
        found = []
        for one in label if isinstance(label, list) else [label]:
            meaning = self.meanings.get(_label_text(one))
            if meaning is None:
                raise RowError("label has a value that no label setting names", one)
            found.append(meaning)
        return majority(found)


def _of_lists(row: Row, rule: PairsRule) -> list[Pair]:
    """The pairs of two lists of as many places, answers and their scores."""
    answers, scores = (value_of(row, name) for name in ("answers", "scores"))
    if not isinstance(answers, list) or not isinstance(scores, list):
        raise RowError("answers and scores are not two lists")
    if len(answers) != len(scores):
        raise RowError("answers and scores are not as many")
    turns = [[answer] if isinstance(answer, dict) else answer for answer in answers]
    pairs = pairs_of_ranked(Ranked(_prompt(row), scored(scores, turns)), rule)
    return [replace(pair, prompt=with_system(pair.prompt, row.get("system"))) for pair in pairs]


def _prompt(row: Row) -> object:
    """The prompt with its input; None where the answers are whole dialogues."""
    if "prompt" not in row:
        return None
    prompt = value_of(row, "prompt")
    if (more := row.get("input")) is not None:
        parts = (text_of(prompt, "prompt"), text_of(more, "input"))
        prompt = "\n".join(part for part in parts if part.strip())
    return prompt


def _pair(row: Row, chosen: object, rejected: object) -> Pair:
    prompt = _prompt(row)
    return implicit(chosen, rejected) if prompt is None else conversation(prompt, chosen, rejected)


def _answer(row: Row, name: str) -> object:
    """An answer: text, messages, or one message."""
    value = value_of(row, name)
    return [value] if isinstance(value, dict) else value


def _scores(row: Row, chosen: str, rejected: str) -> tuple[float, float] | None:
    try:
        return number(row, f"score_{chosen}"), number(row, f"score_{rejected}")
    except RowError:
        return None


def mapped_parser(section: SourceSection, rows: list[Row]) -> Callable[[Row], Pair | list[Pair]]:
    """The mapping the section describes, checked against the first rows: of two answers, or of lists of them."""
    if "answers" not in section.map:
        return pair_parser(section, rows)
    _check(section, rows)
    return lambda raw: _of_lists({name: value_at(raw, column) for name, column in section.map.items()}, section.pairs)


def pair_parser(section: SourceSection, rows: list[Row]) -> Callable[[Row], Pair]:
    """The same for rows of two answers."""
    _check(section, rows)
    if section.pairs != "best-worst":
        raise DataError(
            f"{section.source}: pairs: {section.pairs} is for lists of answers and scores", hint="remove it"
        )
    return _Mapped(section.map, _label_meanings(section, rows) if "label" in section.map else _no_labels(section))


def _check(section: SourceSection, rows: list[Row]) -> None:
    where, given = section.source, section.map.keys()
    if section.format not in {"auto", "mapped"}:
        raise DataError(f"{where}: map goes with format: mapped, not {section.format}", hint="remove one of the two")
    if given - _ASKED not in _WAYS or ("input" in given and "prompt" not in given):
        raise DataError(
            f"{where}: map names {', '.join(sorted(given)) or 'no columns'}",
            hint=f"{_meant(given - _NAMES, _NAMES)}data.train.map, or --map: prompt, chosen, rejected; or prompt, "
            "first, second and label, or score_first and score_second; or prompt, answers and scores, two lists; "
            "optional are input, system and scores",
        )
    for name, given_column in section.map.items():
        several = name == "label" and not any(given_column in row for row in rows)
        for column in given_column.split(",") if several else [given_column]:
            if not any(column in row or value_at(row, column) is not None or _labels(row, column) for row in rows):
                names = {str(key) for row in rows for key in row}
                raise DataError(
                    f"{where} has no column {column!r} (data.train.map.{name})",
                    hint=f"{_meant({column}, names)}its columns: {columns_of(rows)}",
                )


def _meant(given: Iterable[str], known: Iterable[str]) -> str:
    """`did you mean prompt? ` for the first name that is nearly a known one."""
    near = [match for name in sorted(given) for match in difflib.get_close_matches(name, sorted(known), n=1)]
    return f"did you mean {near[0]}? " if near else ""


def _no_labels(section: SourceSection) -> dict[str, str]:
    if section.label:
        raise DataError(f"{section.source}: label is given, and map names no label column", hint="data.train.map.label")
    return {}


def _label_meanings(section: SourceSection, rows: list[Row]) -> dict[str, str]:
    given = section.label.items()
    values = [(name, each) for name, value in given for each in (value if isinstance(value, list) else [value])]
    meanings = {_label_text(value): name for name, value in values}
    names = {*meanings.values()}
    said_twice = any(meanings[_label_text(value)] != name for name, value in values)
    if said_twice or names != section.label.keys() or not {"first", "second"} <= names <= _MEANINGS:
        seen = (_labels(row, section.map["label"]) for row in rows)
        each = (value for one in seen for value in (one if isinstance(one, list) else [one]))
        texts = dict.fromkeys(str(value) for value in each if not isinstance(value, dict | list))
        raise DataError(
            f"{section.source}: label needs a value each for first and second, and may have some for tie and both_bad",
            hint=f"{_meant(section.label.keys() - _MEANINGS, _MEANINGS)}data.train.label, or --label first=VALUE; "
            f"values seen: {', '.join(itertools.islice(texts, 5))}",
        )
    return meanings


def _label_text(value: object) -> str:
    """A label as it is compared: 1, 1.0, "1" and "1.0" are the same, so are true and "True"."""
    if isinstance(value, dict | list):
        raise RowError("label is not a single value", value)
    text = str(value).strip()
    if re.fullmatch(r"[+-]?\d+\.\d*", text):
        return text.rstrip("0").removesuffix(".")
    return text.lower() if text.lower() in {"true", "false"} else text


def _labels(row: Row, path: str) -> object:
    """A label, or a list of what several annotators said: one column each with commas between, or a path into lists.

    An annotator who said nothing has no vote.
    """
    paths = path.split(",") if path not in row else [path]
    if len(paths) == 1 and not isinstance(found := value_at(row, path), list) and found is not None:
        return found
    said = [one for each in paths for one in _flat(value_at(row, each, through_lists=True))]
    return [one for one in said if not is_missing(one)] or None


def _flat(value: object) -> list[object]:
    return [one for each in value for one in _flat(each)] if isinstance(value, list) else [value]


def value_at(row: object, path: str, *, through_lists: bool = False) -> object:
    """The value of a column, or at a path of keys and list positions with dots; None if it is missing.

    Through lists: a name is looked up in the objects of lists within a list too.
    """
    if isinstance(row, dict) and path in row:
        return row[path]
    value = row
    for part in re.sub(r"\[(\d+)\]", r".\1", path).split("."):
        if through_lists and isinstance(value, list):
            value = _flat(value)
        if isinstance(value, dict):
            value = value.get(part)
        elif isinstance(value, list) and re.fullmatch(r"\d{1,9}", part) and int(part) < len(value):
            value = value[int(part)]
        elif isinstance(value, list) and any(isinstance(item, dict) and part in item for item in value):
            value = [item.get(part) if isinstance(item, dict) else None for item in value]
        else:
            return None
    return value


def columns_of(rows: list[Row]) -> str:
    """The columns of these rows, for a message."""
    return ", ".join(dict.fromkeys(str(name) for row in rows for name in row if name is not None))
