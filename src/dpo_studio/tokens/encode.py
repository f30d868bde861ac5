"""Pairs as token ids under the length rule, with counts of what was changed or dropped.

Shapes: L = prompt tokens, A = answer tokens. `max_length` is for L + A, and a pair is over it if either answer is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from dpo_studio.config import TooLong
from dpo_studio.preferences.pair import Message, Pair
from dpo_studio.tokens.chat import AnswerIds, ChatEncoder, PairError, PairIds

__all__ = ["Encoded", "EncodedAnswer", "EncodedPair", "encode_pairs", "fit_pair"]

_CHUNK = 256
"""Pairs a call of the tokenizer: enough to keep its threads busy, few enough for progress to move."""

DROPPED = "dropped: "
OVER = "over max_length"
PROMPT_OVER = "prompt alone over max_length"
ANSWER_CUT = "answer end cut"
CHOSEN_CUT = "chosen answer end cut"
PROMPT_CUT = "prompt start cut"
CASE = "prompt and answers parted by case "
"""And the case (`tokens.split`); 1 is that of all others."""
THOUGHT_LEFT_OUT = "thought not written by the template"
TURN_LEFT_OUT = "turn of the prompt not written by the template"
THOUGHTS_ALONE = "answers differ in their thoughts alone"
END_APPENDED = "end of turn appended"
NOT_ENDED = "answer that its model did not end: no end of turn to learn"


@dataclass(frozen=True, eq=False, slots=True)
class EncodedAnswer:
    """One answer to a prompt."""

    ids: NDArray[np.int32]
    """(A,) what follows the prompt, end of turn included."""
    scored: NDArray[np.bool_]
    """(A,) which of them are the assistant's own: all, unless the answer has several turns."""


@dataclass(frozen=True, eq=False, slots=True)
class EncodedPair:
    """A pair the model can read."""

    row: int
    """`Pair.row`."""
    prompt: NDArray[np.int32]
    """(L,) the prompt of both answers."""
    chosen: EncodedAnswer
    rejected: EncodedAnswer

    def swap(self) -> EncodedPair:
        """The opposite preference."""
        return replace(self, chosen=self.rejected, rejected=self.chosen)


@dataclass(frozen=True)
class Encoded:
    """Pairs ready to be packed, and the reasons for the others."""

    pairs: list[EncodedPair]
    counts: dict[str, int]
    """Pairs by what was changed; counts of 0 are not listed. `dropped: ...` add up to `refused`."""
    refused: list[tuple[int, str]]
    """(`Pair.row`, reason) of the dropped."""


def encode_pairs(
    pairs: Sequence[Pair],
    encoder: ChatEncoder,
    *,
    max_length: int | None,
    too_long: TooLong = "drop",
) -> Encoded:
    """Encode the pairs in order."""
    kept: list[EncodedPair] = []
    counts: Counter[str] = Counter()
    refused: list[tuple[int, str]] = []
    for start in range(0, len(pairs), _CHUNK):
        chunk = pairs[start : start + _CHUNK]
        for pair, ids in zip(chunk, encoder.pairs(chunk), strict=True):
            try:
                encoded, notes = fit_pair(pair, ids, encoder, max_length, too_long)
            except PairError as reason:
                counts[DROPPED + reason.kind] += 1
                refused.append((pair.row, reason.message))
            else:
                counts.update(notes)
                kept.append(encoded)
    return Encoded(kept, dict(counts), refused)


def fit_pair(
    pair: Pair, ids: PairIds | PairError, encoder: ChatEncoder, max_length: int | None, too_long: TooLong
) -> tuple[EncodedPair, list[str]]:
    """The pair under the length rule, and how it was changed.

    Raises:
        PairError: why the pair has to go.
    """
    if isinstance(ids, PairError):
        raise ids
    notes: list[str] = []
    ids = _as_it_ended(pair, ids)
    if not (pair.chosen[-1].ended and pair.rejected[-1].ended):
        notes.append(NOT_ENDED)
    if max_length is not None and _longest(ids) > max_length:
        if too_long == "cut_answer_end":
            notes.append(ANSWER_CUT)
            if len(ids.prompt) + len(ids.chosen.ids) > max_length:
                notes.append(CHOSEN_CUT)
            ids = _cut_answers(ids, max_length)
        elif too_long == "cut_prompt_start":
            ids = _cut_prompt(pair, ids, encoder, max_length)
            notes.append(PROMPT_CUT)
        else:
            raise _too_long(ids, max_length)
    if ids.case != "1":
        notes.append(CASE + ids.case)
    if ids.thought_left_out:
        notes.append(THOUGHT_LEFT_OUT)
    if ids.turn_left_out:
        notes.append(TURN_LEFT_OUT)
    if ids.end_appended:
        notes.append(END_APPENDED)
    _check_learnable(ids)
    return _encoded(pair.row, ids), notes


def _as_it_ended(pair: Pair, ids: PairIds) -> PairIds:
    """Without the end of turn, which is the last id, where a token limit cut the answer."""
    sides = ((pair.chosen, ids.chosen), (pair.rejected, ids.rejected))
    chosen, rejected = (
        answer if turns[-1].ended else AnswerIds(answer.ids[:-1], answer.scored[:-1]) for turns, answer in sides
    )
    return replace(ids, chosen=chosen, rejected=rejected)


def _longest(ids: PairIds) -> int:
    return len(ids.prompt) + max(len(ids.chosen.ids), len(ids.rejected.ids))


def _cut_answers(ids: PairIds, max_length: int) -> PairIds:
    """Cut tokens from the end, the end of turn first: a cut answer has none to learn."""
    room = max_length - len(ids.prompt)
    if room <= 0:
        raise _too_long(ids, max_length)
    chosen, rejected = (AnswerIds(answer.ids[:room], answer.scored[:room]) for answer in (ids.chosen, ids.rejected))
    return replace(ids, chosen=chosen, rejected=rejected)


def _cut_prompt(pair: Pair, ids: PairIds, encoder: ChatEncoder, max_length: int) -> PairIds:
    """The same pair with as many of the prompt's turns as fit, rendered again."""
    while _longest(ids) > max_length:
        shorter = _without_oldest_exchange(pair.prompt)
        if shorter is None:
            raise _too_long(ids, max_length)
        pair = replace(pair, prompt=shorter)
        ids = _as_it_ended(pair, encoder.pair(pair))
    return ids


def _without_oldest_exchange(prompt: tuple[Message, ...]) -> tuple[Message, ...] | None:
    """The prompt from its second user turn on, after the system turns; None if nothing is left to cut.

    Whole exchanges go, so that it still begins with a user: templates refuse a chat that the assistant opens.
    """
    first = next((at for at, turn in enumerate(prompt) if turn.role not in ("system", "developer")), len(prompt))
    second = next((at for at in range(first + 1, len(prompt)) if prompt[at].role == "user"), None)
    return None if second is None else prompt[:first] + prompt[second:]


def _too_long(ids: PairIds, max_length: int) -> PairError:
    if len(ids.prompt) >= max_length:
        return PairError(PROMPT_OVER, f"the prompt alone has {len(ids.prompt)} tokens, max_length is {max_length}")
    return PairError(OVER, f"prompt and answer have {_longest(ids)} tokens, max_length is {max_length}")


def _check_learnable(ids: PairIds) -> None:
    if not (any(ids.chosen.scored) and any(ids.rejected.scored)):
        raise PairError("no answer token", "an answer has no token of the assistant's own")
    if ids.chosen.ids == ids.rejected.ids and ids.thought_left_out:
        raise PairError(
            THOUGHTS_ALONE,
            "what differs in the answers is their thoughts, which the chat template does not write",
            hint="model.chat_template: FILE with a template that writes the thoughts of answers",
        )
    if ids.chosen.ids == ids.rejected.ids:
        raise PairError("identical answers", "both answers have the same token ids")


def _encoded(row: int, ids: PairIds) -> EncodedPair:
    return EncodedPair(row, np.array(ids.prompt, np.int32), _answer(ids.chosen), _answer(ids.rejected))


def _answer(ids: AnswerIds) -> EncodedAnswer:
    return EncodedAnswer(np.array(ids.ids, np.int32), np.array(ids.scored, np.bool_))
