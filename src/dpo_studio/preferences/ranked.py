"""Rows that hold several answers to a prompt, each with a rank or a score: the best against the worst.

An answer that has no number beside it takes no part, as it is neither better nor worse than another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dpo_studio.preferences.pair import Message, Pair
from dpo_studio.preferences.turns import (
    Row,
    RowError,
    Turns,
    conversation,
    instruction_of,
    is_missing,
    is_transcript,
    number,
    text_of,
    transcript,
    value_of,
)

__all__ = ["best_and_worst", "nectar", "nectar_all", "raw_ultrafeedback"]

_RATINGS = ("fine-grained_score", "overall_score")


def best_and_worst(
    scores: Sequence[object], answers: Sequence[object]
) -> tuple[tuple[float, object], tuple[float, object]]:
    """(score, answer) of the highest and of the lowest score; of equal ones the first."""
    scored = [
        (number({"score": score}, "score"), answer)
        for score, answer in zip(scores, answers, strict=True)
        if not is_missing(score)
    ]
    if len(scored) < 2:
        raise RowError("fewer than two answers have a score")
    best, worst = max(scored, key=lambda one: one[0]), min(scored, key=lambda one: one[0])
    if best[0] == worst[0]:
        raise RowError("tie")
    return best, worst


def raw_ultrafeedback(row: Row) -> Pair:
    """UltraFeedback as GPT-4 rated it: `completions` of `{response, fine-grained_score, overall_score}`.

    The mean of the four ratings decides, for early copies have 10 in `overall_score` where 1 was meant; rows without
    such a mean go by the other.
    """
    instruction = instruction_of(row)
    completions = value_of(row, "completions")
    if not isinstance(completions, list) or not all(isinstance(one, dict) for one in completions):
        raise RowError("completions is not a list of objects")
    rating = next((name for name in _RATINGS if any(not is_missing(one.get(name)) for one in completions)), _RATINGS[0])
    scores, answers = ([one.get(name) for one in completions] for name in (rating, "response"))
    (high, chosen), (low, rejected) = best_and_worst(scores, answers)
    return replace(conversation(instruction, chosen, rejected), scores=(high, low))


def nectar(row: Row) -> Pair:
    """`prompt`, a text or transcript, and `answers` of `{answer, rank}`: the best against the worst."""
    prompt, ranked = _ranked(row)
    (best, chosen), (worst, rejected) = ranked[0], ranked[-1]
    if best == worst:
        raise RowError("tie")
    return conversation(prompt, chosen, rejected)


def nectar_all(row: Row) -> list[Pair]:
    """One pair for each answer that is ranked below the best; what is wrong with one refuses the row."""
    prompt, ranked = _ranked(row)
    best, chosen = ranked[0]
    worse = [answer for rank, answer in ranked if rank > best]
    if not worse:
        raise RowError("tie")
    return [conversation(prompt, chosen, answer) for answer in worse]


def _ranked(row: Row) -> tuple[str | Turns, list[tuple[float, object]]]:
    """The prompt, and (rank, answer) of each answer, the best first; equal ranks in the row's own order."""
    prompt = text_of(value_of(row, "prompt"), "prompt")
    answers = value_of(row, "answers")
    if not isinstance(answers, list) or not all(isinstance(answer, dict) for answer in answers):
        raise RowError("answers is not a list of objects")
    if len(answers) < 2:
        raise RowError("answers are fewer than two")
    ranked = sorted(((number(a, "rank"), value_of(a, "answer")) for a in answers), key=lambda one: one[0])
    return (_open_transcript(prompt) if is_transcript(prompt) else prompt), ranked


def _open_transcript(prompt: str) -> Turns:
    """A transcript that waits for its last answer: `...\\n\\nAssistant:`."""
    turns = transcript(prompt, "prompt")
    return turns[:-1] if turns[-1] == Message("assistant", "") else turns
