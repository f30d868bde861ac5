"""The routes of Compare and Chat: what can be asked, and the answers as they come."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from dpo_studio.studio.downloads import ask_first
from dpo_studio.studio.endpoints import SERVER, answer_of, listed, named_endpoints
from dpo_studio.studio.runs import find_runs, summary
from dpo_studio.studio.studio import Here, Studio

__all__ = ["router"]

router = APIRouter(prefix="/api")
Line = dict[str, Any]


class Turn(BaseModel):
    """A turn of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str = Field(max_length=200_000)


class SamplingValues(BaseModel):
    """How answers are sampled."""

    model_config = ConfigDict(extra="forbid")
    temperature: Annotated[float, Field(ge=0, le=10)] = 0.7
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_new_tokens: Annotated[int, Field(ge=1, le=4096)] = 256
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0


class Question(BaseModel):
    """What is asked, and whom."""

    models: Annotated[list[str], Field(min_length=1, max_length=2)]
    messages: Annotated[list[Turn], Field(min_length=1, max_length=200)]
    sampling: SamplingValues = SamplingValues()


@router.get("/compare/sources")
def sources(here: Here) -> dict[str, list[str]]:
    """What can be compared without typing: runs, their checkpoints, the bases of those, and listed servers."""
    runs = find_runs(here)
    checkpoints = [path for run in runs for path in sorted(run.glob("checkpoints/step-*/adapter"))]
    bases = {run["base"] for run in (summary(here, run) for run in runs) if run["base"]}
    return {
        "bases": sorted(bases | {"bundled:smollm2-135m-instruct"}),
        "runs": [here.places.shown(run) for run in runs],
        "checkpoints": [here.places.shown(path) for path in checkpoints],
        "servers": [each["name"] for each in named_endpoints(here)],
    }


@router.post("/generate")
async def generate(here: Here, asked: Question) -> StreamingResponse:
    """The answers, piece by piece, as server-sent events: say, piece, end, error, done.

    Two servers, or a server and a model of this machine, answer at the same time.
    """
    names = [await asyncio.to_thread(_named, here, name) for name in asked.models]
    request = asked.model_dump() | {"models": names}
    return StreamingResponse(_events(here, request), media_type="text/event-stream")


async def _events(here: Studio, request: dict[str, Any]) -> AsyncIterator[str]:
    kinds = ("error", "piece", "end", "say", "done")
    places: dict[bool, list[int]] = {True: [], False: []}
    for index, name in enumerate(request["models"]):
        places[name.startswith(SERVER)].append(index)
    sides = [_indexed(answer_of(here, request["models"][index], request), [index]) for index in places[True]]
    if places[False]:
        ours = request | {"models": [request["models"][index] for index in places[False]]}
        sides.append(_indexed(here.workshop.ask(ours), places[False]))
    async with aclosing(_together(sides)) as lines:
        async for line in lines:
            kind = next(name for name in kinds if name in line)
            yield f"event: {kind}\ndata: {json.dumps(line)}\n\n"
    yield 'event: done\ndata: {"done": true}\n\n'


def _named(here: Studio, name: str) -> str:
    if name.startswith(SERVER):
        return listed(here, name, "models")
    name = here.places.named(name, "models")
    ask_first(here, name)
    return name


async def _indexed(lines: AsyncGenerator[Line], places: list[int]) -> AsyncGenerator[Line]:
    """The lines of one side with the places of its models in the question, without its end."""
    async with aclosing(lines) as some:
        async for line in some:
            if "done" not in line:
                about = "piece" in line or "end" in line
                yield line | ({"index": places[line.get("index", 0)]} if about else {})


async def _together(sides: list[AsyncGenerator[Line]]) -> AsyncGenerator[Line]:
    """The lines of all sides as they come; an asker who leaves ends them all."""
    lines: asyncio.Queue[Line | None] = asyncio.Queue(maxsize=64)

    async def put(side: AsyncGenerator[Line]) -> None:
        try:
            async with aclosing(side) as some:
                async for line in some:
                    await lines.put(line)
        finally:
            await lines.put(None)

    tasks = [asyncio.create_task(put(side)) for side in sides]
    try:
        left = len(tasks)
        while left:
            if (line := await lines.get()) is None:
                left -= 1
            else:
                yield line
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
