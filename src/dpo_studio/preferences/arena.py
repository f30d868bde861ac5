"""Two models' whole conversations and which of them a person preferred: LMSYS's arenas and MT-Bench."""

from __future__ import annotations

import json

from dpo_studio.preferences.pair import Message, Pair
from dpo_studio.preferences.turns import Row, RowError, Turns, dialogues, messages, number, text_of, value_of

__all__ = ["arena", "arena_55k"]

_BOTH_BAD = ("tie (bothbad)", "both_bad")
_WINNERS = ("winner_model_a", "winner_model_b", "winner_tie")


def arena(row: Row) -> Pair:
    """`conversation_a`, `conversation_b` (messages) and `winner`: model_a, model_b, tie, both bad."""
    winner = value_of(row, "winner")
    if winner in _BOTH_BAD:
        raise RowError("both bad")
    if winner == "tie":
        raise RowError("tie")
    if winner not in ("model_a", "model_b"):
        raise RowError("winner is none of model_a, model_b, tie and both_bad", winner)
    a, b = (_judged(row, name) for name in ("conversation_a", "conversation_b"))
    return dialogues(None, a, b) if winner == "model_a" else dialogues(None, b, a)


def _judged(row: Row, name: str) -> Turns:
    """A conversation up to the turn that was judged: MT-Bench has both turns in rows that are about the first."""
    turns = messages(value_of(row, name), name)
    if row.get("turn") is None:
        return turns
    ends = [place for place, turn in enumerate(turns, 1) if turn.role == "assistant"]
    judged = number(row, "turn")
    if judged not in range(1, len(ends) + 1):
        raise RowError(f"turn is no turn of {name}")
    return turns[: ends[int(judged) - 1]]


def arena_55k(row: Row) -> Pair:
    """The same as JSON lists in text, `["..."]`, a text a turn; one of three columns is 1."""
    won = [name for name in _WINNERS if number(row, name) == 1]
    if len(won) != 1:
        raise RowError(f"not one of {', '.join(_WINNERS)} is 1")
    if won == ["winner_tie"]:
        raise RowError("tie")
    asked, a, b = (_texts(row, name) for name in ("prompt", "response_a", "response_b"))
    if not len(asked) == len(a) == len(b):
        raise RowError("prompt and responses have not as many turns")
    talks = [_talk(asked, answers) for answers in (a, b)]
    return dialogues(None, *(talks if won == ["winner_model_a"] else reversed(talks)))


def _texts(row: Row, name: str) -> list[str]:
    try:
        texts = json.loads(text_of(value_of(row, name), name))
    except (ValueError, RecursionError):
        texts = None
    if not isinstance(texts, list):
        raise RowError(f"{name} is not a list written as JSON")
    return [text_of(text, name) for text in texts]


def _talk(asked: list[str], answers: list[str]) -> Turns:
    both = zip(asked, answers, strict=True)
    return tuple(turn for q, a in both for turn in (Message("user", q), Message("assistant", a)))
