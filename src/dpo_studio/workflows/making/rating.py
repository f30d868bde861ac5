"""What the judge says of the different answers to each prompt: numbers, or wins and half of the ties.

Answers that the token limit cut are not shown to it: they lose anyway. What a judge with weights says is kept, so that
a command that was stopped asks it once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from dpo_studio.console.progress import Progress
from dpo_studio.disk import write_atomically
from dpo_studio.errors import RunError
from dpo_studio.evaluation.judges import Comparison, Judge, ScoringJudge, summary
from dpo_studio.evaluation.kept_replies import digest_of
from dpo_studio.preferences.turns import Turns
from dpo_studio.reading import parse_json, read_text
from dpo_studio.sampling.completion import Completion
from dpo_studio.workflows.making.choosing import points

__all__ = ["Question", "Ratings", "rate"]

PROMPTS_AT_ONCE = 256
"""Prompts whose scores are kept together: a minute of a 7B reward model."""
_LARGEST = 64 * 2**20
"""Bytes of such a file: thousands of scores a prompt."""


@dataclass(frozen=True)
class Question:
    """A prompt and the different answers to it."""

    prompt: Turns
    answers: Sequence[Completion]

    @property
    def ended(self) -> list[int]:
        """The answers that were not cut, by index."""
        return [at for at, answer in enumerate(self.answers) if answer.ended]


@dataclass(frozen=True)
class Ratings:
    """What the judge said of one question."""

    scores: list[float | None]
    """Of each answer; None where it has none, as a cut one."""
    unjudged: set[tuple[int, int]] = field(default_factory=set)
    """Two answers (i < j) without a verdict."""


def rate(
    questions: Sequence[Question], judge: Judge, work: Path, progress: Progress
) -> tuple[list[Ratings], dict[str, Any]]:
    """(the ratings of each question, what there is to say of the judge's verdicts).

    Raises:
        JudgeError: the judge cannot be asked.
    """
    if isinstance(judge, ScoringJudge):
        ratings = _scored(questions, judge, work, progress)
        rated = [at for question, one in zip(questions, ratings, strict=True) for at in _judged(question, one)]
        return ratings, {"scores": len(rated), "not_judged": rated.count(None)}
    return _compared(questions, judge, progress)


def _judged(question: Question, ratings: Ratings) -> list[float | None]:
    return [ratings.scores[at] for at in question.ended]


def _compared(questions: Sequence[Question], judge: Judge, progress: Progress) -> tuple[list[Ratings], dict[str, Any]]:
    """Every two answers that ended, which the judge meets in both orders."""
    places = [
        (number, one, other)
        for number, question in enumerate(questions)
        for one, other in combinations(question.ended, 2)
    ]
    comparisons = [
        Comparison(questions[number].prompt, questions[number].answers[one], questions[number].answers[other])
        for number, one, other in places
    ]
    with progress.task(f"judging: {judge.name}", len(comparisons), "comparisons") as advance:
        verdicts = judge.judge_all(comparisons, advance)
    winners: list[list[Any]] = [[] for _ in questions]
    unjudged: list[set[tuple[int, int]]] = [set() for _ in questions]
    for (number, one, other), verdict in zip(places, verdicts, strict=True):
        winners[number].append((one, other, verdict.winner))
        if not verdict.judged:
            unjudged[number].add((one, other))
    ratings = []
    for question, won, without in zip(questions, winners, unjudged, strict=True):
        scores, ended = points(len(question.answers), won), set(question.ended)
        ratings.append(Ratings([score if at in ended else None for at, score in enumerate(scores)], without))
    return ratings, summary(verdicts)


def _scored(questions: Sequence[Question], judge: ScoringJudge, work: Path, progress: Progress) -> list[Ratings]:
    """A number for every answer that ended, a part of the questions at a time."""
    ratings: list[Ratings] = []
    with progress.task(f"judging: {judge.name}", len(questions), "prompts") as advance:
        for start in range(0, len(questions), PROMPTS_AT_ONCE):
            part = questions[start : start + PROMPTS_AT_ONCE]
            asked = [(question.prompt, question.answers[at]) for question in part for at in question.ended]
            scores = iter(_kept_or_asked(asked, judge, work))
            for question in part:
                ended = set(question.ended)
                ratings.append(Ratings([next(scores) if at in ended else None for at in range(len(question.answers))]))
            advance(len(part))
    return ratings


def _kept_or_asked(asked: Sequence[tuple[Turns, Completion]], judge: ScoringJudge, work: Path) -> list[float | None]:
    """From the file of an earlier start if it is whole: its name has a digest of all that the numbers depend on."""
    texts = [[[(turn.role, turn.content) for turn in prompt], answer.text] for prompt, answer in asked]
    digest = digest_of([judge.name, judge.description, judge.fingerprint, torch.__version__, texts])
    file = work / f"scores-{digest[:16]}.json"
    known = _read(file, len(asked))
    if known is None:
        known = judge.score_all(asked)
        write_atomically(file, json.dumps(known) + "\n")
    return known


def _read(file: Path, count: int) -> list[float | None] | None:
    """The scores of a file; None if it is missing or damaged."""
    try:
        scores: Any = parse_json(
            read_text(file, what="kept scores", limit=_LARGEST, error=RunError), what=file.name, error=RunError
        )
    except RunError:
        return None
    if not isinstance(scores, list) or len(scores) != count:
        return None
    fine = all(score is None or (type(score) is float and math.isfinite(score)) for score in scores)
    return scores if fine else None
