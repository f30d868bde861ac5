"""The prompts of a source: those of its pairs, or rows that hold a prompt alone; each once.

    prompt        text, or messages
    messages      a chat (`conversations` too): an assistant's last turns are left out, they are its answer
    instruction   Alpaca's, with its input
    question      text

and `system` before any of them, or the columns that `--map prompt=COLUMN` (input, system) names.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dpo_studio.config import SourceSection
from dpo_studio.errors import DataError
from dpo_studio.preferences.formats import shape_of
from dpo_studio.preferences.mapping import columns_of, value_at
from dpo_studio.preferences.pair import Pair, prompt_key
from dpo_studio.preferences.refused_rows import Refusal, RefusedRows
from dpo_studio.preferences.row_contents import strange_in_row
from dpo_studio.preferences.rows import read_rows
from dpo_studio.preferences.sources import pairs_of
from dpo_studio.preferences.turns import (
    Row,
    RowError,
    Turns,
    instruction_of,
    messages,
    text_of,
    turns_of,
    value_of,
    with_system,
)

__all__ = ["PromptSource", "read_prompts"]

_LOOK_AT = 64  # rows that decide what the source holds, as for pairs
_ASKED = frozenset({"prompt", "input", "system"})
_CHATS = ("messages", "conversations", "conversation")
_COLUMNS = "prompt, messages, instruction or question, or --map prompt=COLUMN"


@dataclass(frozen=True)
class PromptSource:
    """The prompts of a source."""

    name: str
    """The source as the user gave it."""
    rows: int
    """Rows read, after sampling."""
    prompts: dict[str, Turns]
    """By their keys, each once, in source order."""
    refused: RefusedRows
    """Rows without a prompt that can be used."""


def read_prompts(section: SourceSection, *, seed: int = 0) -> PromptSource:
    """Every prompt of a source once, by `prompt_key`; of several spellings with one key the first.

    Raises:
        DataError: the source is missing, unreadable, or holds no prompt.
    """
    rows = read_rows(section, seed=seed)
    first = list(itertools.islice(rows, _LOOK_AT))
    if not first:
        raise DataError(f"{section.source} has no rows", hint="it needs at least one prompt")
    found = _found(section, [row for _, row in first], itertools.chain(first, rows))
    prompts: dict[str, Turns] = {}
    refused, numbers = RefusedRows(), set()
    for number, prompt in found:
        numbers.add(number)
        if isinstance(prompt, Refusal):
            refused.add(prompt)
        else:
            prompts.setdefault(prompt_key(prompt), prompt)
    if not prompts:
        raise DataError(f"{section.source}: no row has a prompt that can be used: {'; '.join(refused.lines(5))}")
    return PromptSource(section.source, len(numbers), prompts, refused)


def _found(
    section: SourceSection, first: list[object], rows: Iterator[tuple[int, object]]
) -> Iterator[tuple[int, Turns | Refusal]]:
    """(row, its prompt or why there is none) of the pairs, or of rows with a prompt alone."""
    objects = [row for row in first if isinstance(row, dict)]
    mapped = section.map.keys()
    pairs = bool(mapped - _ASKED) if mapped else any(shape_of(row) is not None for row in objects)
    if pairs or section.format != "auto":
        results = pairs_of(section, rows).results
        return ((one.row, one.prompt if isinstance(one, Pair) else one) for one in results)
    read = _mapped(section.map) if mapped else _column_of
    if not any(_is_prompt(read, row) for row in objects):
        raise DataError(
            f"{section.source}: its columns ({columns_of(objects)}) hold no prompt", hint=f"rows have {_COLUMNS}"
        )
    return ((number, _prompt(read, number, row)) for number, row in rows)


def _is_prompt(read: Callable[[Row], Turns], row: Row) -> bool:
    return not isinstance(_prompt(read, 0, row), Refusal)


def _prompt(read: Callable[[Row], Turns], number: int, row: object) -> Turns | Refusal:
    try:
        if not isinstance(row, dict):
            raise RowError("row is not a JSON object")
        if (strange := strange_in_row(row)) is not None:
            raise RowError(strange)
        return _checked(read(row))
    except RowError as refusal:
        return Refusal(number, refusal.reason, refusal.seen)


def _column_of(row: Row) -> Turns:
    """The prompt of a row without answers."""
    chat = next((name for name in _CHATS if name in row), None)
    if "prompt" in row:
        turns = turns_of(value_of(row, "prompt"), "prompt", "user")
    elif chat is not None:
        turns = messages(value_of(row, chat), chat)
    elif "instruction" in row:
        turns = turns_of(instruction_of(row), "prompt", "user")
    else:
        turns = turns_of(value_of(row, "question"), "prompt", "user")
    return with_system(_without_answer(turns), row.get("system"))


def _mapped(columns: dict[str, str]) -> Callable[[Row], Turns]:
    """The same by the user's names of columns."""

    def read(raw: Row) -> Turns:
        row = {name: value_at(raw, column) for name, column in columns.items()}
        prompt = value_of(row, "prompt")
        if row.get("input") is not None:
            parts = (text_of(prompt, "prompt"), text_of(row["input"], "input"))
            prompt = "\n".join(part for part in parts if part.strip())
        return with_system(_without_answer(turns_of(prompt, "prompt", "user")), row.get("system"))

    return read


def _without_answer(turns: Turns) -> Turns:
    end = len(turns)
    while end and turns[end - 1].role == "assistant":
        end -= 1
    return turns[:end]


def _checked(prompt: Turns) -> Turns:
    if not prompt or not prompt[-1].content.strip():
        raise RowError("prompt is empty")
    if prompt[-1].role not in ("user", "tool"):
        raise RowError("prompt does not end with a user turn")
    return prompt
