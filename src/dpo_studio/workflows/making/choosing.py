"""Which answers to one prompt become pairs: pure functions of scores, of which answers were cut, and of lengths."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from dpo_studio.errors import UsageError
from dpo_studio.evaluation.judges import Winner

__all__ = ["Choice", "Rated", "choose", "points"]

Rule = Literal["best-worst", "best-second", "all"]


@dataclass(frozen=True)
class Choice:
    """How pairs are chosen among the answers to a prompt."""

    rule: Rule = "best-worst"
    """best-worst: the highest score against the lowest. best-second: against the next lower. all: every two."""
    margin: float = 0.0
    """Pairs whose scores are nearer than this are dropped."""
    match_length: float | None = None
    """Only answers whose token counts are within this factor of each other are paired."""

    def __post_init__(self) -> None:
        if not 0 <= self.margin < float("inf"):
            raise UsageError(f"--margin {self.margin} is not 0 or more")
        if self.match_length is not None and not 1 <= self.match_length < float("inf"):
            raise UsageError(f"--match-length {self.match_length} is not a factor of 1 or more")


@dataclass(frozen=True)
class Rated:
    """One of the different answers to a prompt."""

    score: float | None
    """None where it was not judged, as a cut answer never is."""
    cut: bool
    """The token limit ended it: it loses against every answer that ended, and to no other cut one."""
    tokens: int


def choose(
    answers: Sequence[Rated], choice: Choice, unjudged: Collection[tuple[int, int]] = ()
) -> tuple[list[tuple[int, int]], str]:
    """((chosen, rejected) by index, or why there is none). `unjudged`: two answers (i < j) without a verdict.

    Lengths are matched first. Of equal scores the lowest index is taken.
    """
    if len(answers) < 2:
        return [], "fewer than two different answers"
    if all(answer.cut for answer in answers):
        return [], "every answer was cut"
    alike = [both for both in combinations(range(len(answers)), 2) if _like_length(answers, both, choice.match_length)]
    if not alike:
        return [], "no two answers of like length"
    judged = [both for both in alike if both not in unjudged and all(_is_rated(answers[at]) for at in both)]
    if not judged:
        return [], "not judged"
    apart = [_better_first(answers, both) for both in judged if _rank(answers[both[0]]) != _rank(answers[both[1]])]
    if not apart:
        return [], "tie"
    kept = [both for both in _chosen(answers, apart, choice.rule) if _gap(answers, both) >= choice.margin]
    return kept, "" if kept else "below the margin"


def _chosen(answers: Sequence[Rated], apart: Sequence[tuple[int, int]], rule: Rule) -> list[tuple[int, int]]:
    if rule == "all":
        return sorted(apart)
    best = min((both[0] for both in apart), key=lambda at: (*_down(answers[at]), at))
    worse = [other for one, other in apart if one == best]
    if rule == "best-worst":
        return [(best, min(worse, key=lambda at: (*_rank(answers[at]), at)))]
    return [(best, min(worse, key=lambda at: (*_down(answers[at]), at)))]


def _rank(answer: Rated) -> tuple[bool, float]:
    """What orders answers; all cut ones are equal, and below every other."""
    return (False, 0.0) if answer.cut or answer.score is None else (True, answer.score)


def _down(answer: Rated) -> tuple[bool, float]:
    """The opposite order."""
    ended, score = _rank(answer)
    return not ended, -score


def _is_rated(answer: Rated) -> bool:
    return answer.cut or answer.score is not None


def _better_first(answers: Sequence[Rated], both: tuple[int, int]) -> tuple[int, int]:
    return both if _rank(answers[both[0]]) > _rank(answers[both[1]]) else (both[1], both[0])


def _gap(answers: Sequence[Rated], both: tuple[int, int]) -> float:
    chosen, rejected = (answers[at].score for at in both)
    if answers[both[1]].cut or chosen is None or rejected is None:
        return float("inf")
    return chosen - rejected


def _like_length(answers: Sequence[Rated], both: tuple[int, int], factor: float | None) -> bool:
    shorter, longer = sorted(max(answers[at].tokens, 1) for at in both)
    return factor is None or longer <= factor * shorter


def points(count: int, winners: Sequence[tuple[int, int, Winner]]) -> list[float]:
    """The score of each of `count` answers that were compared: its wins, and half its ties.

    `winners`: (i, j, winner), `a` where i won.
    """
    scores = [0.0] * count
    for one, other, winner in winners:
        scores[one] += {"a": 1.0, "tie": 0.5, "b": 0.0}[winner]
        scores[other] += {"a": 0.0, "tie": 0.5, "b": 1.0}[winner]
    return scores
