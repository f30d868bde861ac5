"""What people said of answers where they met them: votes and corrections of chat pages and traces.

    open-webui   data {rating}, meta {message_id}, snapshot {chat}: a feedback of Open WebUI with its whole chat
    langfuse     input, output, scores: a trace of Langfuse whose answer somebody corrected
    studio-votes answers {left, right}, models, choice: votes of our studio, as /api/votes lists them

An edited answer beats what it was before, an answer that was preferred beats the others to the same prompt, and where
all are bad, or one thumb stands alone, there is no pair.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from dpo_studio.preferences.pair import Pair
from dpo_studio.preferences.row_contents import strange_in_row
from dpo_studio.preferences.turns import (
    Row,
    RowError,
    Turns,
    answers_to,
    messages,
    text_of,
    turns_of,
    value_of,
    with_system,
)

__all__ = ["langfuse", "open_webui", "studio_vote"]

_THOUGHT = '<details type="reasoning"'
"""How Open WebUI writes a thought into an answer's text."""
_LONGEST_CHAT = 10_000
"""Turns from an answer back to the first."""
_CORRECTION = "CORRECTION"
_CHAT_OUTPUTS = ("content", "output", "text", "completion")


def studio_vote(row: Row) -> Pair:
    """One vote of the studio."""
    choice, answers = value_of(row, "choice"), value_of(row, "answers")
    if choice in ("tie", "both_bad"):
        raise RowError(str(choice).replace("_", " "))
    if choice not in ("left", "right"):
        raise RowError("choice is none of left, right, tie and both_bad", choice)
    if not isinstance(answers, dict):
        raise RowError("answers is not an object", answers)
    prompt = turns_of(value_of(row, "prompt"), "prompt", "user")
    chosen, rejected = ("left", "right") if choice == "left" else ("right", "left")
    return answers_to(prompt, *(text_of(value_of(answers, side), side) for side in (chosen, rejected)))


# Open WebUI


def open_webui(row: Row) -> list[Pair]:
    """A feedback: what the rated answer was edited from loses to it; and it beats, or loses to, its siblings.

    Siblings are the other answers to the same turn, of other models or drawn again. Of two that have the same thumb
    neither is better. A thumb down says that models which were compared with this one won, and that an answer which was
    drawn later did; of one that was drawn earlier it says nothing.
    """
    history, rating, met = (
        _history(row),
        _thumb(_inside(row, "data", "rating")),
        _inside(row, "data", "sibling_model_ids"),
    )
    compared = set(map(str, met)) if isinstance(met, list) else set()
    rated = history.get(str(_inside(row, "meta", "message_id")))
    if rated is None or rated.get("role") != "assistant":
        raise RowError("the snapshot has no answer of that message_id")
    prompt = with_system(_prompt(rated, history), _inside(row, "snapshot", "chat", "chat", "params", "system"))
    pairs = []
    if (before := rated.get("originalContent")) is not None and before != rated.get("content"):
        pairs.append(answers_to(prompt, _answer(rated), _text(before)))
    others = list(_siblings(rated, history))
    for other, later in others:
        thumb = _thumb(_inside(other, "annotation", "rating"))
        if rating > max(thumb, 0):
            pairs.append(answers_to(prompt, _answer(rated), _answer(other)))
        elif rating < thumb and (thumb > 0 or later or str(other.get("model")) in compared):
            pairs.append(answers_to(prompt, _answer(other), _answer(rated)))
    if pairs:
        return pairs
    if others:
        raise RowError("both bad" if rating < 0 else "tie")
    raise RowError("one answer with a thumb, and none to compare it with")


def _history(row: Row) -> dict[str, dict[str, Any]]:
    """Every message of the chat by its id."""
    found = _inside(row, "snapshot", "chat", "chat", "history", "messages")
    if not isinstance(found, dict):
        raise RowError("the snapshot has no history of messages")
    return {key: message for key, message in found.items() if isinstance(message, dict)}


def _prompt(rated: Mapping[str, Any], history: Mapping[str, dict[str, Any]]) -> Turns:
    """The turns before an answer, back to the first."""
    turns: list[object] = []
    parent, seen = rated.get("parentId"), 0
    while parent is not None:
        turn, seen = history.get(str(parent)), seen + 1
        if turn is None or seen > _LONGEST_CHAT:
            raise RowError("the snapshot lacks a turn before the answer")
        turns.append({name: turn[name] for name in ("role", "content", "files", "tool_calls") if name in turn})
        parent = turn.get("parentId")
    return messages(turns[::-1], "prompt")


def _siblings(rated: Mapping[str, Any], history: Mapping[str, dict[str, Any]]) -> Iterator[tuple[dict[str, Any], bool]]:
    """The other finished answers to the same turn, and whether each was drawn after the rated one."""
    children, later = history.get(str(rated.get("parentId")), {}).get("childrenIds"), False
    for key in children if isinstance(children, list) else []:
        other = history.get(str(key))
        later = later or other is rated
        if other is None or other is rated or other.get("role") != "assistant" or other.get("error"):
            continue
        if isinstance(other.get("content"), str) and other["content"].strip() and other.get("done") is not False:
            yield other, later


def _answer(message: Mapping[str, Any]) -> str:
    if message.get("error"):
        raise RowError("the rated answer is an error")
    return _text(message.get("content"))


def _text(content: object) -> str:
    text = text_of(content, "answer")
    if _THOUGHT in text:
        raise RowError("an answer has its thought in its text, which is not supported")
    return text


def _thumb(rating: object) -> int:
    """1, -1, or 0 for none; a bool is no rating."""
    text = str(rating)
    return {"1": 1, "-1": -1, "1.0": 1, "-1.0": -1}.get(text, 0)


def _inside(value: object, *names: str) -> object:
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value


# Langfuse


def langfuse(row: Row) -> Pair:
    """A trace, or an observation, with a score of type CORRECTION: what somebody wrote beats what the model said.

    A number beside one answer says nothing of another one: such rows are no pairs (`--map` compares columns).
    """
    scores = value_of(row, "scores")
    listed = scores if isinstance(scores, list) else []
    corrections = [one for one in listed if isinstance(one, dict) and one.get("dataType") == _CORRECTION]
    if not corrections:
        raise RowError("scores without a correction: one answer, and none to compare it with")
    better = {_correction(one) for one in corrections}
    if len(better) > 1:
        raise RowError("several corrections that differ")
    prompt = turns_of(_messages(value_of(row, "input")), "input", "user")
    return answers_to(prompt, better.pop(), _said(value_of(row, "output")))


def _correction(score: Mapping[str, Any]) -> str:
    text = score.get("stringValue", score.get("value"))
    return text_of(text, "correction")


def _messages(value: object) -> object:
    """The prompt of an input: text, messages, or an object that has them; JSON in text is read."""
    read = _read(value)
    if not isinstance(read, dict):
        return read
    if (strange := strange_in_row(read)) is not None:
        raise RowError(f"input: {strange}")
    return read.get("messages", read.get("prompt", read))


def _said(value: object) -> str:
    """The answer of an output: text, a message, or an object with one text."""
    read = _read(value)
    if isinstance(read, list) and len(read) == 1:
        read = read[0]
    if isinstance(read, dict):
        if any(read.get(name) for name in ("tool_calls", "function_call", "reasoning_content")):
            raise RowError("output is more than a text, which is not supported")
        read = next((read[name] for name in _CHAT_OUTPUTS if isinstance(read.get(name), str)), None)
    return text_of(read, "output")


def _read(value: object) -> object:
    """An export writes objects as JSON into text; a text that only looks like JSON stays one."""
    if not isinstance(value, str) or not value.lstrip().startswith(("{", "[")):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value
