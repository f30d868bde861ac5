"""Rows that hold several answers to a prompt, each with a rank or a score, and which of them become pairs.

An answer that has no number beside it takes no part, as it is neither better nor worse than another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from dpo_studio.preferences.pair import Message, Pair
from dpo_studio.preferences.turns import (
    Row,
    RowError,
    Turns,
    conversation,
    implicit,
    instruction_of,
    is_missing,
    is_transcript,
    number,
    text_of,
    transcript,
    value_of,
)

__all__ = ["PairsRule", "Ranked", "nectar", "nectar_all", "pairs_of_ranked", "raw_ultrafeedback", "scored"]

PairsRule = Literal["best-worst", "adjacent", "all"]
_RATINGS = ("fine-grained_score", "overall_score")


@dataclass(frozen=True)
class Ranked:
    """The answers to one prompt, in order."""

    prompt: object
    """Text, messages or turns; None where the answers are whole dialogues that begin with it."""
    answers: Sequence[tuple[float, object]]
    """(score, answer), the best first; equal scores in the row's own order."""
    scores: bool = True
    """Whether the numbers are kept with the pairs: ranks are not."""


def pairs_of_ranked(ranked: Ranked, rule: PairsRule) -> list[Pair]:
    """best-worst: one pair. adjacent: each answer against the next lower score. all: every two of unequal score.

    Raises:
        RowError: a tie: no two scores differ; or an answer cannot be one.
    """
    answers = ranked.answers
    levels = sorted({score for score, _ in answers}, reverse=True)
    if len(levels) < 2:
        raise RowError("tie")
    if rule == "best-worst":
        worst = next(place for place, (score, _) in enumerate(answers) if score == levels[-1])
        both = [(0, worst)]
    else:
        below = dict(pairwise(levels))
        both = [
            (one, other)
            for one, (score, _) in enumerate(answers)
            for other, (lower, _) in enumerate(answers)
            if (lower < score if rule == "all" else below.get(score) == lower)
        ]
    return [_pair(ranked, *(answers[place] for place in places)) for places in both]


def _pair(ranked: Ranked, chosen: tuple[float, object], rejected: tuple[float, object]) -> Pair:
    prompt, (high, better), (low, worse) = ranked.prompt, chosen, rejected
    pair = implicit(better, worse) if prompt is None else conversation(prompt, better, worse)
    return replace(pair, scores=(high, low)) if ranked.scores else pair


def scored(scores: Sequence[object], answers: Sequence[object]) -> list[tuple[float, object]]:
    """(score, answer) of those that have a score, the highest first.

    Raises:
        RowError: fewer than two have one.
    """
    found = [
        (number({"score": score}, "score"), answer)
        for score, answer in zip(scores, answers, strict=True)
        if not is_missing(score)
    ]
    if len(found) < 2:
        raise RowError("fewer than two answers have a score")
    return sorted(found, key=lambda one: -one[0])


def raw_ultrafeedback(row: Row) -> Ranked:
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
    return Ranked(instruction, scored(scores, answers))


def nectar(row: Row) -> Ranked:
    """`prompt`, a text or transcript, and `answers` of `{answer, rank}`."""
    prompt, ranked = _ranked(row)
    return Ranked(prompt, [(-rank, answer) for rank, answer in ranked], scores=False)


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
