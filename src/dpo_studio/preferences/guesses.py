"""Which column probably holds what, by its name: for hints, and for exports whose columns their users have named.

A guess is either the only one there is, or there is none: two columns that could both be it are not chosen between.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence

from dpo_studio.preferences.turns import Row

__all__ = [
    "answer_columns",
    "meaning_of",
    "other_kind",
    "prompt_column",
    "suggested_map",
]

_PROMPTS = ("prompt", "instruction", "question", "query", "request", "task", "problem", "input", "context", "user",
            "post", "topic")  # fmt: skip
"""The likeliest first."""
_ANSWERS = {"answer", "response", "output", "completion", "generation", "text", "txt", "reply", "candidate", "summary",
            "option", "result", "conversation", "model", "assistant", "message", "messages"}  # fmt: skip
_BETTER = {"chosen", "preferred", "good", "better", "best", "winner", "winning", "win", "accepted", "accept",
           "positive", "pos", "liked"}  # fmt: skip
_WORSE = {"rejected", "reject", "bad", "worse", "worst", "loser", "losing", "lose", "dispreferred", "unpreferred",
          "negative", "neg", "disliked", "nonpreferred"}  # fmt: skip
_NUMBERS = {"score", "scores", "rating", "ratings", "rank", "id", "tokens", "length", "count", "logprob", "index"}
_LABELS = {"label", "labels", "preference", "preferred", "winner", "choice", "better", "best", "chosen", "selected",
           "verdict", "comparison", "pairwise", "vote", "judgment", "judgement", "decision", "pick"}  # fmt: skip
_ORDERED = (("a", "b"), ("1", "2"), ("0", "1"), ("left", "right"), ("first", "second"), ("one", "two"))
_SIDES = ("first", "second")
_TIES = {"tie", "tied", "equal", "equally", "same", "draw", "both", "neither", "none"}
_SHORT = 40
"""Characters: anything longer is not a label."""


def words_of(name: object) -> tuple[str, ...]:
    """`Response_A` and `responseA` -> (response, a); `answer1` -> (answer, 1)."""
    parts = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", str(name))
    return tuple(part.lower() for part in parts)


def prompt_column(names: Iterable[str]) -> str | None:
    """The column that is probably the prompt."""
    names = list(names)
    for word in _PROMPTS:
        found = [name for name in names if word in words_of(name)]
        if len(found) == 1:
            return found[0]
    return None


def answer_columns(names: Iterable[str]) -> tuple[str, str] | None:
    """The two columns of answers that differ in a word that orders them, such as response_a and response_b."""
    found = _in_order(name for name in names if not _NUMBERS & {*words_of(name)})
    return found[0] if len(found) == 1 else None


def _in_order(names: Iterable[str]) -> list[tuple[str, str]]:
    by_words = {words_of(name): name for name in names}
    pairs = []
    for words, name in by_words.items():
        for first, second in _ORDERED:
            at = [place for place, word in enumerate(words) if word == first]
            rest = {word for word in words if word != first}
            if len(at) != 1 or (rest and not rest & (_ANSWERS | _NUMBERS)):
                continue
            other = by_words.get((*words[: at[0]], second, *words[at[0] + 1 :]))
            if other is not None:
                pairs.append((name, other))
    return pairs


def meaning_of(value: object, first: str, second: str) -> str | None:
    """Which of two columns a label's value names: first, second or tie; None where that is not sure."""
    words = words_of(value)
    if not words or len(str(value)) > _SHORT:
        return None
    if words in (words_of(first), words_of(second)):
        return "first" if words == words_of(first) else "second"
    sides = {word: side for pair in _ORDERED if pair != ("0", "1") for word, side in zip(pair, _SIDES, strict=True)}
    if {*words_of(first)} ^ {*words_of(second)} == {"0", "1"}:  # elsewhere 0 may as well be a tie, or 1 the second
        sides = {word: side for word, side in sides.items() if word != "2"} | {"0": "first", "1": "second"}
    hits = {sides[word] for word in words if word in sides}
    if _TIES & {*words}:
        return None if len(hits) == 1 else "tie"
    return hits.pop() if len(hits) == 1 else None


def suggested_map(rows: Sequence[Row]) -> str | None:
    """The options that probably name this source's columns, ready to be typed; None where no guess is sure."""
    texts = [name for name in _names(rows) if any(isinstance(row.get(name), str | list | dict) for row in rows)]
    prompt = prompt_column(texts)
    if prompt is None:
        return None
    answers = [name for name in texts if name != prompt and not _NUMBERS & {*words_of(name)}]
    better, worse = (_only_one(name for name in answers if side & {*words_of(name)}) for side in (_BETTER, _WORSE))
    if better is not None and worse is not None:
        return _options({"prompt": prompt, "chosen": better, "rejected": worse})
    both = answer_columns(answers)
    if both is None:
        return _two_lists(rows, prompt)
    columns = {"prompt": prompt, "first": both[0], "second": both[1]}
    label = _only_one(name for name in _names(rows) if name not in both and _is_label(name, rows))
    if label is not None:
        return _options(columns | {"label": label}, _label_options(rows, label, both))
    numbers = _in_order(name for name in _names(rows) if _NUMBERS & {*words_of(name)} - {"id", "index"})
    if len(numbers) == 1:
        return _options(columns | {"score_first": numbers[0][0], "score_second": numbers[0][1]})
    return None


def _two_lists(rows: Sequence[Row], prompt: str) -> str | None:
    """A list of texts beside a list of as many numbers."""
    row = rows[0]
    lists = {name: value for name, value in row.items() if isinstance(value, list) and len(value) > 1}
    texts = [name for name, value in lists.items() if all(isinstance(one, str) for one in value)]
    scores = [name for name, value in lists.items() if all(type(one) in (int, float) for one in value)]
    if len(texts) != 1 or len(scores) != 1 or len(lists[texts[0]]) != len(lists[scores[0]]):
        return None
    return _options({"prompt": prompt, "answers": texts[0], "scores": scores[0]})


def _is_label(name: str, rows: Sequence[Row]) -> bool:
    values = [row[name] for row in rows if row.get(name) is not None]
    short = all(isinstance(value, str | int | float) and len(str(value)) <= _SHORT for value in values)
    return bool(values) and short and bool(_LABELS & {*words_of(name)})


def _label_options(rows: Sequence[Row], label: str, both: tuple[str, str]) -> list[str]:
    """What the values seen mean, or where one is not sure the form alone."""
    values = list(dict.fromkeys(str(row[label]) for row in rows if row.get(label) is not None))
    meanings = {value: meaning_of(value, *both) for value in values}
    if None in meanings.values() or not {"first", "second"} <= {*meanings.values()}:
        return ["first=VALUE", "second=VALUE"]
    return [f"{meaning}={value}" for value, meaning in meanings.items()]


def _options(columns: dict[str, str], labels: Sequence[str] = ()) -> str:
    maps = [f"--map {shlex.quote(f'{name}={column}')}" for name, column in columns.items()]
    return " ".join([*maps, *(f"--label {shlex.quote(one)}" for one in labels)])


def _names(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row if isinstance(name, str)))


def _only_one(names: Iterable[str]) -> str | None:
    found = list(names)
    return found[0] if len(found) == 1 else None


_SINGLE = {"messages", "conversations", "conversation", "output", "completion", "response", "answer", "text", "reply"}


def other_kind(rows: Sequence[Row]) -> tuple[str, str] | None:
    """(what it is, what to do) where rows hold one answer each, or none: files for other ways of tuning."""
    names = _names(rows)
    single = [name for name in names if name.lower() in _SINGLE]
    if suggested_map(rows) is not None or answer_columns(names) is not None:
        return None
    thumbs = any(isinstance(value, bool) for row in rows for value in row.values())
    if single and (thumbs or "kto_tag" in names or any(_is_label(name, rows) for name in names)):
        return (
            "it looks like a file for KTO: one answer a row, and whether it was liked",
            "DPO learns from two answers to one prompt: put a liked and a disliked answer to the same prompt into one "
            "row, as prompt, chosen and rejected",
        )
    if single:
        return (
            "it looks like a file for supervised fine-tuning: one answer a row, and no preference",
            "DPO needs a second, worse answer to each prompt: `dpo generate` writes several answers to choose from",
        )
    if len(names) == 1 and prompt_column(names) is not None:
        return (
            "it looks like a file of prompts without answers",
            "`dpo generate` writes several answers to choose from",
        )
    return None
