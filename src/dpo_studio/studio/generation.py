"""The routes of Compare and Chat: what can be asked, and the answers as they come."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from dpo_studio.studio.downloads import ask_first
from dpo_studio.studio.runs import find_runs, summary
from dpo_studio.studio.studio import Here, Studio

__all__ = ["router"]

router = APIRouter(prefix="/api")


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
    """What can be compared without typing: runs, their checkpoints, and the bases that they were trained on."""
    runs = find_runs(here)
    checkpoints = [path for run in runs for path in sorted(run.glob("checkpoints/step-*/adapter"))]
    bases = {run["base"] for run in (summary(here, run) for run in runs) if run["base"]}
    return {
        "bases": sorted(bases | {"bundled:smollm2-135m-instruct"}),
        "runs": [here.places.shown(run) for run in runs],
        "checkpoints": [here.places.shown(path) for path in checkpoints],
    }


@router.post("/generate")
async def generate(here: Here, asked: Question) -> StreamingResponse:
    """The answers, piece by piece, as server-sent events: say, piece, end, error, done."""
    names = [here.places.named(name, "models") for name in asked.models]
    for name in names:
        await asyncio.to_thread(ask_first, here, name)
    request = asked.model_dump() | {"models": names}
    return StreamingResponse(_events(here, request), media_type="text/event-stream")


async def _events(here: Studio, request: dict[str, Any]) -> AsyncIterator[str]:
    kinds = ("error", "piece", "end", "say", "done")
    async for line in here.workshop.ask(request):
        kind = next(name for name in kinds if name in line)
        yield f"event: {kind}\ndata: {json.dumps(line)}\n\n"
