"""The routes of runs: the list, one run, its curve, and its events as it goes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel

from dpo_studio.runs.folder import RunFolder, was_begun
from dpo_studio.studio.api_errors import Refused
from dpo_studio.studio.curves import Curve, columns, thinned
from dpo_studio.studio.job_routes import Id, shown_job
from dpo_studio.studio.processes import holder_of
from dpo_studio.studio.runs import curve_of, find_runs, findings, recipe_text, run_named, summary
from dpo_studio.studio.studio import Here, Studio
from dpo_studio.studio.tails import tail

__all__ = ["router"]

router = APIRouter(prefix="/api/runs")
STREAMS = 50
"""Streams of events at a time."""
_EVERY = 1.0
_ROWS_AT_ONCE = 500


class Started(BaseModel):
    """A job is asked for under an id of the page's own."""

    id: Id


@router.get("")
def runs(here: Here) -> list[dict[str, Any]]:
    """All runs, the newest first."""
    return [summary(here, run) for run in find_runs(here)]


@router.get("/{name:path}/metrics")
def metrics(
    here: Here, name: str, points: Annotated[int, Query(ge=10, le=20_000)] = 1000, spread: bool = True
) -> JSONResponse:
    """The curve in at most so many points, and the step from which events go on; `spread`: with `low` and `high`."""
    curve = curve_of(here, run_named(here, name))
    last = curve.rows[-1]["step"] if curve.rows else -1
    told = thinned(curve.rows, points, spread=spread) | {"last_step": last, "generation": curve.generation}
    return JSONResponse(told)  # as it is: FastAPI would look at each of 50,000 numbers first


@router.get("/{name:path}/samples")
def samples(here: Here, name: str) -> list[dict[str, Any]]:
    """Answers to the same prompts as training goes; none where the recipe asks for none."""
    lines = RunFolder(run_named(here, name)).lines("samples.jsonl")
    return list(lines)


@router.get("/{name:path}/events")
async def events(
    here: Here,
    name: str,
    request: Request,
    after: int = -1,
    last_event_id: Annotated[str | None, Header()] = None,
) -> StreamingResponse:
    """New rows of the curve and changes of the state, from a step on."""
    run = await asyncio.to_thread(run_named, here, name)
    if len(here.streams) >= STREAMS:
        raise Refused("too many pages watch runs", status=503, hint="close some of them")
    step = int(last_event_id) if last_event_id is not None and last_event_id.lstrip("-").isdecimal() else after
    return StreamingResponse(_events(here, run, step, request), media_type="text/event-stream")


@router.post("/{name:path}/stop")
def stop(here: Here, name: str) -> dict[str, Any]:
    """Ask the run's process to end; it writes a checkpoint first."""
    run = run_named(here, name)
    job = here.jobs.last_of(run)
    holder = holder_of(run)
    if job is not None and job.is_active:
        here.jobs.stop(job)
    elif holder is not None:
        os.kill(holder, signal.SIGTERM)
    else:
        raise Refused("nothing trains in this run", status=409, hint="it has ended already")
    return summary(here, run)


@router.post("/{name:path}/continue")
def go_on(here: Here, name: str, started: Started) -> dict[str, Any]:
    """Train on from the last checkpoint."""
    run = run_named(here, name)
    shown = here.places.shown(run)
    words = ["train", f"./{shown}/{RunFolder.RECIPE}", "--set", f"run.folder={json.dumps(shown)}"]
    if Path(shown).is_absolute():
        words[1] = f"{shown}/{RunFolder.RECIPE}"
    return shown_job(here.jobs.start(started.id, "train", words, run))


@router.get("/{name:path}")
def one_run(here: Here, name: str) -> dict[str, Any]:
    """Everything about a run but its curve."""
    run = run_named(here, name)
    job = here.jobs.last_of(run)
    told = {} if job is None else shown_job(job)
    ended = {"log": "" if job is None else tail(job.log), "error": told.get("error"), "hint": told.get("hint")}
    checkpoints = sorted(run.glob(f"{RunFolder.CHECKPOINTS}/step-*"), key=lambda path: (len(path.name), path.name))
    return (
        summary(here, run)
        | {
            "recipe": recipe_text(run),
            "result": RunFolder(run).result() if was_begun(run) else None,
            "findings": findings(run, curve_of(here, run)),
            "checkpoints": [here.places.shown(path) for path in checkpoints],
        }
        | ended
    )


async def _events(here: Studio, run: Path, step: int, request: Request) -> AsyncIterator[str]:
    """Server-sent events; an id is the step up to which a page knows the curve."""
    ticket = object()
    here.streams.add(ticket)
    try:
        state, generation = None, None
        while not await request.is_disconnected():
            if not run.is_dir() and not await asyncio.to_thread(_may_come, here, run):
                yield _event("gone", {"error": f"{run} is not there any more"})
                return
            curve, now = await asyncio.to_thread(_look, here, run)
            if generation is not None and curve.generation != generation:
                step = -1
                yield _event("reset", {})
            generation = curve.generation
            new = [row for row in curve.rows if row["step"] > step]
            for at in range(0, len(new), _ROWS_AT_ONCE):
                rows = new[at : at + _ROWS_AT_ONCE]
                step = rows[-1]["step"]
                yield _event("metrics", columns(rows), step)
            if now["state"] != state:
                state = now["state"]
                yield _event("state", now)
            else:
                yield ": still here\n\n"
            await asyncio.sleep(_EVERY)
    finally:
        here.streams.discard(ticket)


def _may_come(here: Studio, run: Path) -> bool:
    job = here.jobs.last_of(run)
    return job is not None and job.is_active


def _look(here: Studio, run: Path) -> tuple[Curve, dict[str, Any]]:
    return curve_of(here, run), summary(here, run)


def _event(kind: str, data: Any, step: int | None = None) -> str:
    known = "" if step is None else f"id: {step}\n"
    return f"{known}event: {kind}\ndata: {json.dumps(data)}\n\n"
