"""The runs of the studio's folders, as their files tell of them."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

import yaml

from dpo_studio.config import parse_yaml
from dpo_studio.disk import UNFINISHED
from dpo_studio.errors import DPOStudioError
from dpo_studio.objectives import to_objective
from dpo_studio.reading import parse_json, read_json, read_text
from dpo_studio.runs.facts import finite
from dpo_studio.runs.folder import RunFolder, was_begun
from dpo_studio.studio.api_errors import Refused
from dpo_studio.studio.curves import Curve
from dpo_studio.studio.jobs import Job
from dpo_studio.studio.processes import holder_of
from dpo_studio.studio.studio import Studio

__all__ = ["curve_of", "find_runs", "findings", "recipe_text", "run_named", "summary"]

_DEPTH, _MOST = 3, 1000
_SMALL = 20_000_000
_ONE_AT_A_TIME = Lock()
"""pydantic reads the source of an objective's class, and Python 3.11 cannot parse in two threads at once."""


def find_runs(studio: Studio) -> list[Path]:
    """Run folders in the studio's folders, the newest first; links are not followed."""
    found = [run for root in (studio.folder, *studio.places.allowed) for run in _below(root, _DEPTH)]
    return sorted(dict.fromkeys(found), key=_begun, reverse=True)[:_MOST]


def _below(folder: Path, depth: int) -> Iterator[Path]:
    if was_begun(folder):
        yield folder
        return
    try:
        inside = [path for path in folder.iterdir() if not path.name.startswith(".") and UNFINISHED not in path.name]
    except OSError:
        return
    for path in inside if depth else ():
        if path.is_dir() and not path.is_symlink():
            yield from _below(path, depth - 1)


def _begun(run: Path) -> float:
    try:
        return (run / RunFolder.TYPED_RECIPE).stat().st_mtime
    except OSError:
        return 0.0


def run_named(studio: Studio, name: str) -> Path:
    """The run folder of a name as the list has it; before it is there, that of a job that was started for it.

    Raises:
        Refused: it leads out, or is no run.
    """
    path = studio.places.inside(name, "name")
    if not was_begun(path) and studio.jobs.last_of(path) is None:
        raise Refused(f"{name[:80]!r} is not a run", status=404, field="name", hint="was it moved or removed?")
    RunFolder(path).refuse_what_leads_out()
    return path


def curve_of(studio: Studio, run: Path) -> Curve:
    """The metrics of a run so far."""
    recipe = _recipe(run)
    with _ONE_AT_A_TIME:
        saturates = _saturates(json.dumps(recipe.get("objective") or {}))
    return studio.curves.of(run, _steps(run, recipe) or 0, saturates)


@lru_cache(maxsize=256)
def _saturates(objective: str) -> bool:
    """As the objective's property; plain DPO's where it cannot be read."""
    try:
        return to_objective(parse_json(objective, what="objective")).saturates
    except (ValueError, DPOStudioError):
        return True


def summary(studio: Studio, run: Path) -> dict[str, Any]:
    """One run in the list."""
    recipe, curve = _recipe(run), curve_of(studio, run)
    job = studio.jobs.last_of(run)
    last = next((row for row in reversed(curve.rows) if "loss" in row), {})
    held_out = next((row for row in reversed(curve.rows) if "eval_rewards/accuracies" in row), {})
    accuracy = finite(held_out, "eval_rewards/accuracies")
    return {
        "name": studio.places.shown(run),
        "path": str(run),
        "state": _state(run, job),
        "step": curve.rows[-1]["step"] if curve.rows else 0,
        "steps": _steps(run, recipe),
        "loss": finite(last, "loss"),
        "accuracy": accuracy if accuracy is not None else finite(last, "rewards/accuracies"),
        "held_out": accuracy is not None,
        "margin": finite(last, "rewards/margins"),
        "started": datetime.datetime.fromtimestamp(_begun(run), datetime.UTC).isoformat(timespec="seconds"),
        "base": _base(studio, recipe),
        "objective": _key(recipe, "objective", "kind") or "dpo",
        "health": [finding["title"] for finding in findings(run, curve)],
        "job": None if job is None else job.id,
    }


def findings(run: Path, curve: Curve) -> list[dict[str, Any]]:
    """What is wrong with a run: as its training judged it, or by the curve so far."""
    try:
        result = RunFolder(run).result() or {}
    except DPOStudioError:
        result = {}
    known = result.get("health")
    if not isinstance(known, list):
        return curve.health
    return [each for each in known if isinstance(each, dict) and isinstance(each.get("title"), str)]


def _state(run: Path, job: Job | None) -> str:
    if holder_of(run) is not None or (job is not None and job.is_active):
        return "running"
    if (run / RunFolder.RESULT).is_file():
        return "finished"
    if job is None or job.exit_code is None:
        return "interrupted"
    return "stopped" if job.was_stopped else "failed"


def recipe_text(run: Path) -> str:
    """The resolved recipe of a run; empty where it cannot be read."""
    try:
        return read_text(run / RunFolder.RECIPE, what="the run's recipe", limit=_SMALL)
    except DPOStudioError:
        return ""


def _recipe(run: Path) -> dict[str, Any]:
    try:
        recipe = parse_yaml(recipe_text(run))
    except (DPOStudioError, yaml.YAMLError):
        return {}
    return recipe if isinstance(recipe, dict) else {}


def _steps(run: Path, recipe: dict[str, Any]) -> int | None:
    """How many there will be: `max_steps`, or as many as the pairs make; None where neither is known yet."""
    training = recipe.get("training")
    if not isinstance(training, dict):
        return None
    most = finite(training, "max_steps")
    pairs = _pairs(run)
    a_step, epochs = finite(training, "pairs_per_step"), finite(training, "epochs")
    whole = math.ceil(pairs / a_step) * epochs if pairs and a_step and epochs else None
    known = [count for count in (most, whole) if count is not None]
    return math.ceil(min(known)) if known else None


def _pairs(run: Path) -> int | None:
    try:
        kept = read_json(run / RunFolder.DATA, what="data.json", limit=_SMALL)
    except DPOStudioError:
        return None
    rows = kept.get("train") if isinstance(kept, dict) else None
    rows = rows.get("rows", rows.get("pairs")) if isinstance(rows, dict) else rows
    return len(rows) if isinstance(rows, list | dict) else rows if isinstance(rows, int) else None


def _base(studio: Studio, recipe: dict[str, Any]) -> str | None:
    """As one would type it in the studio's folder."""
    base = _key(recipe, "model", "path")
    return studio.places.shown(Path(base)) if base is not None and Path(base).is_absolute() else base


def _key(recipe: dict[str, Any], section: str, key: str) -> str | None:
    inside = recipe.get(section)
    value = inside.get(key) if isinstance(inside, dict) else None
    return value if isinstance(value, str) else None
