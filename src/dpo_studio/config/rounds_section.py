"""The recipe's section of `dpo rounds`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dpo_studio.config.section import Section

__all__ = ["RoundsSection"]


class RoundsSection(Section):
    """`dpo rounds`: the policy answers, a judge judges, pairs are chosen and trained on, and again."""

    number: Annotated[int, Field(gt=0, le=100)] = 2
    """Rounds, unless one gains nothing before."""
    reference: Literal["start", "previous"] = "start"
    """What each round's policy is kept close to: the start of all rounds, or the policy of the round before."""
    prompts: Annotated[str, Field(min_length=1)] | None = None
    """A source of prompts to answer: pairs, or prompts alone. Default: the training prompts of `data.train`."""
    judge: Annotated[str, Field(min_length=1)] | None = None
    """Who judges the answers, as `--judge` names it. Default: everyday, on the bundled pairs."""
    samples: Annotated[int, Field(gt=1)] = 4
    """Answers to each prompt."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Of the answers that become pairs, and of those that are judged at the end of a round."""
    max_new_tokens: Annotated[int, Field(gt=0)] = 512
    """Longest answer; a longer one is cut, and loses."""
    choose: Literal["best-worst", "best-second", "all"] = "best-worst"
    """Which answers become a pair: the best and the worst, the best and the next lower score, or every two."""
    margin: Annotated[float, Field(ge=0)] = 0.0
    """Pairs whose scores are nearer than this are dropped."""
    match_length: Annotated[float, Field(ge=1)] | None = None
    """Only answers whose token counts are within this factor of each other are paired."""
    judged_prompts: Annotated[int, Field(gt=0)] = 120
    """Held-out prompts, at most, on which each round is judged."""
