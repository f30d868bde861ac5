"""A pair: one prompt, a chosen answer, a rejected answer, all as chat turns."""

from __future__ import annotations

import hashlib
import unicodedata
from dataclasses import dataclass, replace
from typing import Any

__all__ = ["Message", "Pair", "prompt_key", "trl_row"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat."""

    role: str
    content: str
    learned: bool = True
    """False for an assistant's turn of weight 0: context, whose tokens are never scored."""
    ended: bool = True
    """False for an answer that a token limit cut: its model wrote no end of turn, and none is learned."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to one prompt, the first preferred. A plain string is one turn."""

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    row: int = 0
    """Where it stood in its source, from 0."""
    scores: tuple[float, float] | None = None
    """The chosen and the rejected answer's, where the source has a finite number for both."""
    origin: str | None = None
    """The set or domain it came from, where a column `source`, `dataset` or `domain` says so."""

    def swap(self) -> Pair:
        """The opposite preference."""
        scores = None if self.scores is None else self.scores[::-1]
        return replace(self, chosen=self.rejected, rejected=self.chosen, scores=scores)


def prompt_key(prompt: tuple[Message, ...]) -> str:
    """What a split goes by: sha256 of roles and text, NFC, white space collapsed (64 hex digits).

    Pairs with the same key are about the same prompt and belong on the same side of a split.
    """
    turns = (f"{m.role}\x1f{' '.join(unicodedata.normalize('NFC', m.content).split())}" for m in prompt)
    return hashlib.sha256("\x1e".join(turns).encode("utf-8", "surrogatepass")).hexdigest()


def trl_row(pair: Pair) -> dict[str, Any]:
    """The pair as a row of TRL's conversational shape, which `read_pairs` reads as the same pair again."""
    sides = {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
    row: dict[str, Any] = {name: [_message(turn) for turn in turns] for name, turns in sides.items()}
    if pair.scores is not None:
        row["score_chosen"], row["score_rejected"] = pair.scores
    if pair.origin is not None:
        row["source"] = pair.origin
    return row


def _message(turn: Message) -> dict[str, Any]:
    more = ({} if turn.learned else {"weight": 0}) | ({} if turn.ended else {"cut": True})
    return {"role": turn.role, "content": turn.content} | more
