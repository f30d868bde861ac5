"""Votes on answers that were compared blind: kept once per id, summed up with intervals, exported as pairs."""

from __future__ import annotations

import json
from collections import Counter
from functools import lru_cache
from typing import Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from dpo_studio.disk import write_atomically
from dpo_studio.preferences.pair import Message, Pair, trl_row
from dpo_studio.studio.api_errors import Refused
from dpo_studio.studio.job_routes import Id
from dpo_studio.studio.standings import Compared, standings
from dpo_studio.studio.studio import Here, Studio
from dpo_studio.writing import check_outputs

__all__ = ["router"]

router = APIRouter(prefix="/api/votes")
_MOST_SETS = 20
"""Sets of prompts that are summed up, those with the most votes."""
Choice = Literal["left", "right", "tie", "both_bad"]


class Turn(BaseModel):
    """A turn of a prompt."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "user", "assistant"]
    content: str


class Sides(BaseModel):
    """What was shown left and right."""

    model_config = ConfigDict(extra="forbid")
    left: str
    right: str


class Vote(BaseModel):
    """One choice between two answers."""

    model_config = ConfigDict(extra="forbid")
    id: Id
    time: str = Field(max_length=40)
    prompt: str | list[Turn]
    answers: Sides
    models: Sides
    sampling: dict[str, float | int | str | None] = {}
    shown_order_seed: int
    choice: Choice
    voter: str = Field("", max_length=200)
    prompt_set: str = Field("", max_length=500)
    """The file that the prompt came from; empty for one that was typed."""

    @property
    def turns(self) -> tuple[Message, ...]:
        if isinstance(self.prompt, str):
            return (Message("user", self.prompt),)
        return tuple(Message(turn.role, turn.content) for turn in self.prompt)


class Export(BaseModel):
    """Where the pairs go."""

    out: str = "votes.jsonl"


@router.post("")
def vote(here: Here, given: Vote) -> dict[str, Any]:
    """Keep a vote. The same one twice is one vote."""
    content = given.model_dump_json()
    with here.store.writing() as db:
        there = db.execute("SELECT content FROM votes WHERE id = ?", (given.id,)).fetchone()
        if there is not None and there["content"] != content:
            raise Refused("this id belongs to another vote", status=409, field="id")
        db.execute("INSERT OR IGNORE INTO votes (id, time, content) VALUES (?, ?, ?)", (given.id, given.time, content))
    return {"id": given.id, "votes": len(_all(here))}


@router.get("")
def votes(here: Here) -> list[Vote]:
    """All votes, in the order of their time."""
    return _all(here)


@router.get("/summary")
def summary(here: Here) -> dict[str, Any]:
    """Who wins against whom, in all and by prompt set; strengths where there are more than two models."""
    with here.store.reading() as db:
        return _summed(tuple(row["content"] for row in db.execute("SELECT content FROM votes ORDER BY time, id")))


@lru_cache(maxsize=4)
def _summed(contents: tuple[str, ...]) -> dict[str, Any]:
    """Of votes as they are kept: a page asks every few seconds, and a bootstrap takes one."""
    kept = [Vote.model_validate_json(content) for content in contents]
    sets = sorted(name for name, _ in Counter(each.prompt_set for each in kept).most_common(_MOST_SETS))
    return {
        "votes": len(kept),
        "choices": Counter(each.choice for each in kept),
        **standings([_compared(each) for each in kept]),
        "by_prompt_set": {
            name: standings([_compared(each) for each in kept if each.prompt_set == name]) for name in sets
        },
    }


def _compared(vote: Vote) -> Compared:
    return Compared(
        json.dumps([turn.content for turn in vote.turns]),
        (vote.models.left, vote.models.right),
        {"left": 1.0, "right": 0.0}.get(vote.choice, 0.5),
        len(vote.answers.left) - len(vote.answers.right),
    )


@router.post("/export")
def export(here: Here, asked: Export) -> dict[str, Any]:
    """Write the votes as pairs; ties make none, and are counted."""
    file = here.places.inside(asked.out, "out")
    kept = _all(here)
    pairs = [pair for each in kept if (pair := _pair(each)) is not None]
    if not pairs:
        hint = "compare some answers first; ties, and answers that are alike or empty, make no pair"
        raise Refused("no vote prefers one of two answers", hint=hint, field="out")
    check_outputs({"out": file})
    text = "".join(json.dumps(trl_row(pair), ensure_ascii=False) + "\n" for pair in pairs)
    write_atomically(file, text, overwrite=False)
    count = Counter(each.choice for each in kept)
    left_out = len(kept) - len(pairs) - count["tie"] - count["both_bad"]
    return {
        "out": here.places.shown(file),
        "pairs": len(pairs),
        "tie": count["tie"],
        "both_bad": count["both_bad"],
        "same_answers": left_out,
    }


def _pair(vote: Vote) -> Pair | None:
    left, right = vote.answers.left, vote.answers.right
    if vote.choice not in ("left", "right") or left == right or not (left.strip() and right.strip()):
        return None
    chosen, rejected = (left, right) if vote.choice == "left" else (right, left)
    return Pair(vote.turns, (Message("assistant", chosen),), (Message("assistant", rejected),))


def _all(here: Studio) -> list[Vote]:
    with here.store.reading() as db:
        return [Vote.model_validate_json(row["content"]) for row in db.execute("SELECT * FROM votes ORDER BY time, id")]
