"""The routes of data: the doctor's report, pages of pairs, and a new file without what was set aside."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from dpo_studio.config import BUNDLED, SourceSection
from dpo_studio.disk import finish, give_name, scratch_file
from dpo_studio.errors import DPOStudioError
from dpo_studio.paths import plain_name
from dpo_studio.preferences.pair import Pair, trl_row
from dpo_studio.preferences.sources import open_pairs
from dpo_studio.reading import parse_json, read_bytes
from dpo_studio.studio.api_errors import Refused
from dpo_studio.studio.downloads import ask_first
from dpo_studio.studio.job_routes import shown_job
from dpo_studio.studio.jobs import Job
from dpo_studio.studio.pair_index import key_of
from dpo_studio.studio.studio import Here, Studio
from dpo_studio.writing import appearing, check_outputs

__all__ = ["router", "uploads"]

router = APIRouter(prefix="/api/data")
uploads = APIRouter(prefix="/api/uploads")
_LARGEST_REPORT = 64 * 2**20
REFUSED = "refused"
Name = Annotated[str, Query(max_length=1000)]


class Text(BaseModel):
    """A turn that a person has mended."""

    model_config = ConfigDict(extra="forbid")
    role: str = Field(pattern="^(system|user|assistant)$")
    content: str = Field(min_length=1)


class Mended(BaseModel):
    """A pair with other words."""

    model_config = ConfigDict(extra="forbid")
    prompt: list[Text]
    chosen: list[Text]
    rejected: list[Text]


class Saved(BaseModel):
    """A new file: the pairs of a source but for some rows, and some with other words."""

    path: str
    out: str
    without: list[int] = []
    edited: dict[int, Mended] = {}


@router.get("")
def report(here: Here, path: Name) -> dict[str, Any]:
    """The doctor's report, made by a job that is started at the first question; `state` says how far it is.

    A finding whose rows `pairs?finding=NAME` can show has `has_rows`.
    """
    source, file = _source(here, path)
    job = _doctor(here, source, file)
    shown = shown_job(job)
    if job.state in ("running", "interrupted"):
        return shown | {"report": None}
    try:
        return shown | {"report": _read_report(job.out, job.out.stat().st_mtime_ns)[0]}
    except (DPOStudioError, OSError) as error:
        return shown | {"report": None, "error": str(error)}


def _doctor(here: Studio, source: str, file: Path | None) -> Job:
    words = ["data", "check", source, "--json", "--all-rows"]
    return here.jobs.start(f"check-{key_of(source, file)}", "data-check", words)


@lru_cache(maxsize=4)
def _read_report(file: Path, _: int) -> tuple[Any, dict[str, str]]:
    """(the report without rows, the rows of each finding as a JSON list); None where nothing was printed."""
    content = read_bytes(file, what="report", limit=_LARGEST_REPORT).decode("utf-8", "replace")
    told = parse_json(content, what="report") if content else None
    rows = {}
    for finding in told["findings"] if isinstance(told, dict) else ():
        finding["has_rows"] = bool(finding["rows"])
        rows[finding["name"]] = json.dumps(finding.pop("rows"))
    return told, rows


@router.get("/pairs")
def pairs(
    here: Here,
    path: Name,
    offset: Annotated[int, Query(ge=0, le=10**9)] = 0,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    search: Annotated[str, Query(max_length=500)] = "",
    finding: Annotated[str, Query(max_length=200)] = "",
) -> dict[str, Any]:
    """A page of pairs; until the index is whole, how many rows were read.

    `finding` is a name of the doctor's report, or `refused`: rows that are no pair.
    """
    source, file = _source(here, path)
    index = here.indexes.of(source, file)
    if index.error is not None:
        raise Refused(index.error.message, hint=index.error.hint, field="path")
    if not index.is_ready:
        return {"state": "indexing", "rows": index.rows, "total": None, "pairs": []}
    rows = None
    if finding and finding != REFUSED:
        job = _doctor(here, source, file)
        if job.state == "running":
            return {"state": "indexing", "rows": index.rows, "total": None, "pairs": []}
        rows = _rows_of(job, finding)
    return {"state": "ready"} | index.page(offset, limit, search, refused=finding == REFUSED, rows=rows)


def _rows_of(job: Job, finding: str) -> str:
    known = _read_report(job.out, job.out.stat().st_mtime_ns)[1] if job.out.exists() else {}
    if finding not in known:
        raise Refused(f"{finding[:80]!r} is no finding of the report", status=404, field="finding")
    return known[finding]


@uploads.put("/{name}")
async def upload(here: Here, name: str, request: Request) -> dict[str, Any]:
    """A file of the browser's machine, into DIR/uploads, piece by piece; none is replaced."""
    folder = here.places.inside("uploads", "name")
    folder.mkdir(exist_ok=True)
    file = here.places.inside(f"uploads/{plain_name(name)}", "name")
    if file.exists():
        raise Refused(f"uploads/{name} exists", status=409, field="name", hint="choose another name")
    length = 0
    body = request.stream()
    try:
        with scratch_file(file) as (scratch, written):
            async for piece in body:
                left = memoryview(piece)
                while left:  # a disk that is nearly full takes a part of it
                    left = left[written.write(left) :]
                length += len(piece)
            finish(written, file)
            give_name(scratch, file, overwrite=False)
    except OSError:  # a full disk: a browser hears of it only once its whole body was taken
        async for _ in body:
            pass
        raise
    return {"path": here.places.shown(file), "bytes": length}


@router.post("/save")
def save(here: Here, asked: Saved) -> dict[str, Any]:
    """Write the new file; the source stays as it is, and rows that are no pairs are left out and counted."""
    source, _ = _source(here, asked.path)
    out = here.places.inside(asked.out, "out")
    check_outputs({"out": out}, reads=[str(here.folder / source)])
    count = 0
    with appearing([out], overwrite=False) as (stream,):
        for row in _kept(source, here, asked):
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
        if not count:
            raise Refused("nothing is left", field="without", hint="keep at least one pair")
    return {"out": here.places.shown(out), "pairs": count}


def _kept(source: str, here: Studio, asked: Saved) -> Iterator[dict[str, Any]]:
    without = frozenset(asked.without)
    for result in open_pairs(SourceSection(source=_absolute(source, here))).results:
        if result.row in without:
            continue
        if (mended := asked.edited.get(result.row)) is not None:
            yield mended.model_dump()
        elif isinstance(result, Pair):
            yield trl_row(result)


def _source(here: Studio, name: str) -> tuple[str, Path | None]:
    """(the source as a command takes it, absolute where it is a file; its file or folder)."""
    checked = here.places.named(name, "path")
    absolute = _absolute(checked, here)
    path = here.folder / checked
    ask_first(here, checked)
    if not here.places.is_there(checked):
        raise Refused(f"{checked[:80]!r} is not there", status=404, field="path", hint="was it moved or removed?")
    return absolute, path if path.exists() else None


def _absolute(name: str, here: Studio) -> str:
    """What is a path, from the studio's folder: a server works in any folder."""
    path = here.folder / name
    return str(path) if not name.startswith(BUNDLED) and path.exists() else name
