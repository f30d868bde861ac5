"""`dpo sweep`: one recipe under several settings, each a normal run folder, then one table and one figure.

The runs share the cache of reference log-probs: it does not depend on beta, the learning rate or any other setting that
one sweeps, so only the first run computes them. And they share a date, for chat templates that write one: a difference
between two of them is a setting's.
"""

from __future__ import annotations

import datetime
import gc
import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from dpo_studio.config import RecipeFile, RecipeLike, load_recipe, parse_override
from dpo_studio.console.progress import Progress
from dpo_studio.disk import UNFINISHED, make_folder, write_atomically
from dpo_studio.errors import DataError, NonFiniteError, RunError, UsageError
from dpo_studio.paths import user_path
from dpo_studio.reading import read_json
from dpo_studio.reports.frontier import Measured, draw_frontier, frontier_table, measure
from dpo_studio.runs.data_digests import date_of
from dpo_studio.runs.folder import RunFolder, is_run
from dpo_studio.runs.location import check_place
from dpo_studio.writing import resolved

__all__ = ["plan_sweep", "run_sweep"]

_LARGEST_SUMMARY = 20_000_000


@dataclass(frozen=True)
class Member:
    """One run of a sweep."""

    name: str
    """`objective.beta=0.1`, several settings joined by a comma."""
    values: dict[str, Any]
    loaded: RecipeFile


def run_sweep(
    recipe: RecipeLike,
    overrides: Sequence[str],
    *,
    out: Path | None = None,
    anyway: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Train every combination; the same command again continues. Returns the folder, with sweep.md and sweep.json.

    A run that stops itself over numbers that are not finite is noted, and the others go on. Table and figure are
    written after each run, so that an interrupted sweep has them of what is done. `anyway`: on pairs that make a
    training worthless, too.

    Raises:
        NonFiniteError: every run stopped itself.
        DPOStudioError: before anything is trained if a setting is impossible; else what `dpo train` would stop at.
    """
    folder, members = plan_sweep(recipe, overrides, out)
    _check_place(folder, members)
    from dpo_studio.workflows.training import run_training

    dates = (date_of(RunFolder(member.loaded.run_folder)) for member in members)
    today = next((date for date in dates if date is not None), datetime.date.today())
    measured: list[Measured] = []
    make_folder(folder)
    with progress or Progress() as shown:
        for number, member in enumerate(members, 1):
            shown.say(f"run {number} of {len(members)}: {member.name}")
            stopped = None
            try:
                run_training(member.loaded, shown, anyway=anyway, today=today)
            except NonFiniteError as error:
                stopped = error.message
                shown.warn(f"{member.name} stopped itself: {error.message}")
            gc.collect()  # a model has reference cycles, and the next one needs its memory
            measured.append(measure(member.loaded.run_folder, member.name, stopped))
            _write_summary(folder, members, measured)
    if all(run.stopped is not None for run in measured):
        raise NonFiniteError(
            f"every run of {folder} stopped itself: there is nothing to choose from",
            hint=f"the first: {measured[0].stopped}",
        )
    return folder


def plan_sweep(recipe: RecipeLike, overrides: Sequence[str], out: Path | None) -> tuple[Path, list[Member]]:
    """The sweep's folder and its runs: the product of every key that has several values, in the order given.

    Raises:
        UsageError: no key has several values, or one has the same twice, or names the run's folder.
        RecipeError: a combination is not a valid recipe.
    """
    swept, fixed = _swept(overrides)
    base = load_recipe(recipe, fixed)
    folder = user_path(out) if out is not None else base.run_folder.with_name(f"{base.run_folder.name}-sweep")
    if is_run(folder):
        raise UsageError(f"{folder} is a run, not a sweep", hint="name another folder with --out")
    members = []
    for combination in itertools.product(*swept.values()):
        values = dict(zip(swept, combination, strict=True))
        name = ",".join(f"{key}={_text(value)}" for key, value in values.items())
        changes = [f"{key}={json.dumps(value)}" for key, value in values.items()]
        run_folder = folder / quote(name, safe="=,")
        loaded = load_recipe(recipe, [*fixed, *changes, f"run.folder={json.dumps(str(run_folder))}"])
        members.append(Member(name, values, loaded))
    return folder, members


def _swept(overrides: Sequence[str]) -> tuple[dict[str, list[Any]], list[str]]:
    """Keys with several values, and the overrides of every run."""
    swept: dict[str, list[Any]] = {}
    fixed: list[str] = []
    for text in overrides:
        name, _, listed = text.partition("=")
        keys, values = parse_override(f"{name}=[{listed}]")
        assert isinstance(values, list)  # what is in brackets is a list, or not YAML
        key = ".".join(keys)
        if key == "run.folder":
            raise UsageError("run.folder is each run's own in a sweep", hint="--out names the sweep's folder")
        if len(values) < 2:
            fixed.append(text)
            continue
        texts = list(map(_text, values))
        if key in swept or len(set(texts)) < len(texts):
            raise UsageError(f"--set {text}: a value or a key occurs twice", hint=f"--set {key}=A,B,C, each once")
        swept[key] = values
    if not swept:
        raise UsageError("nothing to sweep: no --set has several values", hint="--set objective.beta=0.03,0.1,0.3")
    return swept, fixed


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _check_place(folder: Path, members: Sequence[Member]) -> None:
    """Before training: check that the folder is new or a sweep's; other files are never replaced.

    Raises:
        RunError: it contains something else, or is inside what is read.
    """
    for member in members:
        check_place(member.loaded)
    there = resolved(folder, "--out")
    if not os.path.lexists(there):
        return
    summary = there / "sweep.json"
    if there.is_dir() and summary.exists() and _is_summary(summary):
        return
    runs = {member.loaded.run_folder.name for member in members}
    if not there.is_dir() or any(path.name not in runs for path in there.iterdir() if UNFINISHED not in path.name):
        raise RunError(f"{folder} exists and is not a sweep", hint="name another folder with --out")


def _is_summary(file: Path) -> bool:
    try:
        summary = read_json(file, what="sweep.json", limit=_LARGEST_SUMMARY)
    except DataError:
        return False
    return isinstance(summary, dict) and {"runs", "planned"} <= summary.keys()


def _write_summary(folder: Path, members: Sequence[Member], measured: Sequence[Measured]) -> None:
    """sweep.json, sweep.md and the figure, of the runs so far."""
    runs = [
        {"folder": member.loaded.run_folder.name, "values": member.values} | run.to_plain()
        for member, run in zip(members, measured, strict=False)
    ]
    summary = {"runs": runs, "planned": len(members)}
    write_atomically(folder / "sweep.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    write_atomically(folder / "sweep.md", frontier_table(measured))
    draw_frontier(measured, folder)
