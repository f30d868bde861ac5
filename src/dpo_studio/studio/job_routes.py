"""The routes of jobs, and of the recipes that some start with. No request has a command: only a verb's values."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from dpo_studio.config.sections import recipe_schema
from dpo_studio.disk import write_atomically
from dpo_studio.paths import plain_name
from dpo_studio.reading import read_json, read_text
from dpo_studio.studio.api_errors import Refused
from dpo_studio.studio.downloads import say_yes
from dpo_studio.studio.job_options import Evaluating, Exporting, Quantizing
from dpo_studio.studio.jobs import Job
from dpo_studio.studio.recipes import downloads_of, problems_of, read_values, written
from dpo_studio.studio.studio import Here, Studio
from dpo_studio.studio.tails import error_of, tail

__all__ = ["Id", "router", "shown_job"]

router = APIRouter(prefix="/api")
Id = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{8,64}$")]
"""Made by the page: the same request twice is the same job, or vote."""
_LARGEST = 200_000


class RecipeValues(BaseModel):
    """A recipe, as text or as a form's values."""

    yaml: str | None = None
    values: dict[str, Any] | None = None
    name: str = "recipe"
    """Of the file and, unless it says otherwise, of the run."""


class Training(RecipeValues):
    """`dpo train`."""

    dry_run: bool = False
    anyway: bool = False


class Checking(BaseModel):
    """`dpo data check`."""

    model_config = ConfigDict(extra="forbid")
    source: str


class Asked(BaseModel):
    """A job: a verb, and under its name what it is asked."""

    model_config = ConfigDict(extra="forbid")
    verb: Literal["train", "export", "eval", "quantize", "data-check"]
    train: Training | None = None
    export: Exporting | None = None
    eval: Evaluating | None = None
    quantize: Quantizing | None = None
    data_check: Annotated[Checking | None, Field(alias="data-check")] = None


class AskedOnce(Asked):
    """The same with an id: asked twice it is one job."""

    id: Id


@router.get("/schema")
def schema() -> dict[str, object]:
    """The recipe's JSON Schema, which the form is made of."""
    return recipe_schema()


@router.post("/recipe/check")
def check(here: Here, given: RecipeValues) -> dict[str, Any]:
    """The YAML of a recipe, what is wrong with it, the command that trains it, and what that would download."""
    values = read_values(given.yaml, given.values)
    errors = problems_of(values, here.places)
    text = given.yaml if given.yaml is not None else written(values)
    command = shlex.join(["dpo", "train", f"{plain_name(given.name)}.yaml"])
    return {"yaml": text, "errors": errors, "command": command, "downloads": downloads_of(values, here.places)}


@router.post("/jobs/preview")
def preview(here: Here, asked: Asked) -> dict[str, Any]:
    """The command that would be run, or what is wrong with it; nothing is started."""
    if asked.verb == "train":
        raise Refused("a recipe is checked by /api/recipe/check", field="verb")
    return {"command": shlex.join(["dpo", *_words(here, asked)[0]])}


@router.post("/jobs")
def start(here: Here, asked: AskedOnce) -> dict[str, Any]:
    """Start a job, once for each id."""
    words, run = _words(here, asked)
    if asked.quantize is not None:
        asked.quantize.begun(here)
    return shown_job(here.jobs.start(asked.id, asked.verb, words, run))


def _words(here: Studio, asked: Asked) -> tuple[list[str], Path | None]:
    """(the words of the command, the run whose job it is)."""
    given = getattr(asked, asked.verb.replace("-", "_"))
    if given is None:
        raise Refused(f"{asked.verb} needs its values", field=asked.verb)
    if isinstance(given, Training):
        return _train(here, given)
    if isinstance(given, Checking):
        source = here.places.named(given.source, "source")
        say_yes(here, [source])
        return ["data", "check", source, "--json"], None
    return given.words(here), None


@router.get("/jobs")
def jobs(here: Here) -> list[dict[str, Any]]:
    """All jobs, the newest first, without their logs."""
    return [shown_job(job) for job in here.jobs.all()]


@router.get("/jobs/{name}")
def one_job(here: Here, name: str) -> dict[str, Any]:
    """A job with the end of its log and of its output."""
    job = here.jobs.get(name)
    return shown_job(job) | {"log": tail(job.log), "out": tail(job.out)}


@router.post("/jobs/{name}/stop")
def stop(here: Here, name: str) -> dict[str, Any]:
    """Ask a job to end."""
    job = here.jobs.get(name)
    here.jobs.stop(job)
    return shown_job(job)


@router.get("/exports")
def exported(here: Here, path: str) -> dict[str, Any]:
    """What an export or a quantised model says of itself: its check against the run's own model."""
    folder = here.places.existing(path, "path")
    for name in ("export.json", "quantization.json"):
        if (folder / name).is_file():
            told = read_json(here.places.inside(str(folder / name), "path"), what=name, limit=_LARGEST)
            return told if isinstance(told, dict) else {}
    raise Refused(f"{path[:80]!r} is no export", status=404, field="path")


def shown_job(job: Job) -> dict[str, Any]:
    """A job in the list; one that failed has the command's own error and hint."""
    error, hint = error_of(tail(job.log)) if job.exit_code else (None, None)
    return {
        "id": job.id,
        "verb": job.verb,
        "command": job.command,
        "state": job.state,
        "exit_code": job.exit_code,
        "started": job.made,
        "run": job.run,
        "error": error,
        "hint": hint,
    }


def _train(here: Studio, asked: Training) -> tuple[list[str], Path | None]:
    """The recipe becomes a file of the studio's folder, which is never replaced by another one."""
    values = read_values(asked.yaml, asked.values)
    if errors := problems_of(values, here.places):
        raise Refused(str(errors[0]["message"]), field=errors[0]["field"], hint=errors[0]["hint"])
    name = plain_name(asked.name)
    file = here.places.inside(f"{name}.yaml", "name")
    text = asked.yaml if asked.yaml is not None else written(values)
    if not file.exists():
        write_atomically(file, text, overwrite=False)
    elif read_text(file, what="recipe", limit=_LARGEST) != text:
        raise Refused(f"{file.name} is another recipe", status=409, field="name", hint="choose another name")
    flags = [*(["--dry-run"] if asked.dry_run else []), *(["--anyway"] if asked.anyway else [])]
    say_yes(here, downloads_of(values, here.places))  # the page names them beside the button
    section = values.get("run") or {}
    run = here.places.inside(section.get("folder") or f"runs/{name}", "run.folder")
    return ["train", f"./{file.name}", *flags], None if asked.dry_run else run
