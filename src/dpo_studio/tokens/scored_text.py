"""Whether text of a prompt is among the scored tokens: neither mask nor loss would show it.

Where a template moves or rewrites a turn, a split at the wrong place makes the user's question a part of the answer. It
is looked for by its effect: with other words in the prompt the scored tokens must stay as they are. Where they do not,
the pair's scored text must not hold a prompt turn's more often than that of the pair with other words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dpo_studio.errors import ModelError
from dpo_studio.preferences.pair import Message, Pair
from dpo_studio.tokens.chat import AnswerIds, ChatEncoder, PairError
from dpo_studio.tokens.encode import EncodedAnswer, EncodedPair

__all__ = ["check_scored"]

_AT_MOST = 256
"""Pairs looked at: 0.2 s."""
_OF_A_SHAPE = 8
"""Pairs with the same roles: those of another shape go another way through the template, however few they are."""
_OTHER_WORDS = "Zebra quux 77 vexes"


def check_scored(pairs: Sequence[EncodedPair], texts: Sequence[Pair], encoder: ChatEncoder) -> None:
    """Check pairs of every shape.

    Raises:
        ModelError: text of a turn that nobody learns is among a pair's scored tokens.
    """
    by_row = {pair.row: pair for pair in texts}
    known = [(pair, by_row[pair.row]) for pair in pairs if pair.row in by_row]
    sample = [known[place] for place in _of_every_shape([text for _, text in known])]
    others = encoder.pairs([_with_other_words(text) for _, text in sample])
    for (pair, text), other in zip(sample, others, strict=True):
        if isinstance(other, PairError):  # a template that requires certain words: nothing to compare with
            continue
        for side in ("chosen", "rejected"):
            answer = getattr(text, side)
            unlearned = [*text.prompt, *(turn for turn in answer if _is_context(turn, in_prompt=False))]
            if turn := _scored_turn(getattr(pair, side), unlearned, getattr(other, side), encoder):
                shown = " ".join(turn.split())[:60]
                raise ModelError(
                    f"row {pair.row}: text of its prompt ({shown!r}) is among the tokens of the {side} answer that "
                    "would be learned",
                    hint="this chat template is split in the wrong place; please report it with the model's name",
                )


def _scored_turn(
    answer: EncodedAnswer, unlearned: Sequence[Message], other: AnswerIds, encoder: ChatEncoder
) -> str | None:
    """The text of a turn that is scored and should not be, if there is one."""
    scored = answer.ids[answer.scored].tolist()
    there = [i for i, own in zip(other.ids, other.scored, strict=True) if own]
    if scored == there[: len(scored)]:
        return None
    here, elsewhere = encoder.decode(scored), encoder.decode(there)
    texts = [turn.content.strip() for turn in unlearned]
    return next((text for text in texts if text and here.count(text) > elsewhere.count(text)), None)


def _of_every_shape(texts: Sequence[Pair]) -> list[int]:
    """Places of some of every shape, and of as many others, evenly spread, as are looked at in all."""
    shapes: dict[object, list[int]] = {}
    for place, text in enumerate(texts):
        turns = (text.prompt, text.chosen, text.rejected)
        shape = tuple(tuple((turn.role, turn.learned) for turn in side) for side in turns)
        shapes.setdefault(shape, []).append(place)
    rarest_first = sorted(shapes.values(), key=len)
    chosen = [place for places in rarest_first for place in places[:_OF_A_SHAPE]][:_AT_MOST]
    step = max(1, len(texts) // _AT_MOST)
    return sorted({*chosen, *list(range(0, len(texts), step))[: _AT_MOST - len(chosen)]})


def _with_other_words(pair: Pair) -> Pair:
    def changed(turns: Sequence[Message], *, in_prompt: bool) -> tuple[Message, ...]:
        new = [replace(turn, content=_OTHER_WORDS) for turn in turns]
        return tuple(
            other if _is_context(turn, in_prompt=in_prompt) else turn for turn, other in zip(turns, new, strict=True)
        )

    return replace(
        pair,
        prompt=changed(pair.prompt, in_prompt=True),
        chosen=changed(pair.chosen, in_prompt=False),
        rejected=changed(pair.rejected, in_prompt=False),
    )


def _is_context(turn: Message, *, in_prompt: bool) -> bool:
    return in_prompt or turn.role != "assistant" or not turn.learned
