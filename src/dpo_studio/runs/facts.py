"""The facts of a run folder: any file or key may be missing, and a last line may be incomplete."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dpo_studio.config import parse_yaml
from dpo_studio.errors import DPOStudioError, RunError
from dpo_studio.objectives import DPO, to_objective
from dpo_studio.reading import parse_json, read_bytes
from dpo_studio.runs.folder import RunFolder

__all__ = ["RunFacts", "Series", "finite", "interval", "read_run", "share"]

_LARGEST = 128 * 2**20
"""Bytes of a run's file: metrics.jsonl of a hundred thousand steps has half."""
Row = dict[str, Any]
Series = tuple[list[float], list[float]]
"""Steps and the values at them, finite ones only."""


@dataclass(frozen=True)
class RunFacts:
    """A run folder, in memory."""

    name: str
    metrics: list[Row]
    """One a step, in order, step 0 being the held-out pairs before training."""
    timing: list[Row]
    recipe: Row
    recipe_text: str
    environment: Row
    result: Row
    answers: list[Row]
    """What the demo compared."""
    notes: tuple[str, ...] = ()
    """The files that could not be read, for the reader of the report."""
    win_rates: Row = field(default_factory=dict)
    """evaluation/winrate.json: what an evaluation measured at each temperature."""
    comparisons: list[Row] = field(default_factory=list)
    """What `dpo eval` compared: both answers and the verdict, temperature by temperature."""
    win_rates_svg: str = ""
    """Its figure."""
    pages: frozenset[str] = frozenset()
    """Names of the pages in its folder `evaluation` that a report links to."""

    @property
    def temperatures(self) -> list[Row]:
        """What was measured at each of them."""
        rows = self.win_rates.get("temperatures")
        return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []

    @property
    def against_reference(self) -> bool:
        """Whether the evaluation compared the run with its own reference, not with another model."""
        return str(self.win_rates.get("against", "reference")) == "reference"

    @property
    def saturates(self) -> bool:
        """The recipe's objective; plain DPO if it cannot be read."""
        try:
            return to_objective(self.recipe.get("objective") or {}).saturates
        except ValueError:
            return DPO().saturates

    def series(self, key: str) -> Series:
        """The values of one metric over the steps."""
        points = [(finite(row, "step"), finite(row, key)) for row in self.metrics]
        known = [(step, value) for step, value in points if step is not None and value is not None]
        return [step for step, _ in known], [value for _, value in known]

    def number(self, key: str) -> float | None:
        """A finite number of result.json, or None."""
        return finite(self.result, key)

    def words(self, key: str) -> str | None:
        """A text of result.json, or None."""
        value = self.result.get(key)
        return value if isinstance(value, str) and value.strip() else None

    def timings(self, key: str) -> list[float]:
        """The finite values of one key of timing.jsonl."""
        return [value for row in self.timing if (value := finite(row, key)) is not None]


def read_run(folder: Path) -> RunFacts:
    """Everything a report needs to know of a run."""
    if not folder.is_dir():
        raise RunError(f"{folder}: no such run folder", hint="give the folder that `dpo train` or `dpo demo` wrote")
    run = RunFolder(folder)
    run.refuse_what_leads_out()
    notes: list[str] = []
    recipe, recipe_text = _read_recipe(folder / run.RECIPE, notes)
    return RunFacts(
        name=folder.resolve().name,
        metrics=_by_step(_read_lines(folder / run.METRICS, notes)),
        timing=_by_step(_read_lines(folder / run.TIMING, notes)),
        recipe=recipe,
        recipe_text=recipe_text,
        environment=_read_object(folder / run.ENVIRONMENT, notes),
        result=_read_object(run.result_file, notes),
        answers=_read_lines(run.evaluation / run.ANSWERS, notes),
        win_rates=_read_object(run.evaluation / run.WIN_RATES, notes),
        comparisons=_read_lines(run.evaluation / run.COMPARISONS, notes),
        win_rates_svg=_read_text(run.evaluation / run.WIN_RATES_FIGURE),
        pages=frozenset(name for name in (run.ANSWERS_PAGE, run.ALL_ANSWERS_PAGE) if (run.evaluation / name).is_file()),
        notes=tuple(notes),
    )


def finite(row: Mapping[str, Any], key: str) -> float | None:
    """The number under a key; None where it is missing, not a number, or not finite."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:  # JSON has no largest integer
        return None
    return number if math.isfinite(number) else None


def share(row: Mapping[str, Any], key: str) -> float | None:
    """A number between 0 and 1, or None."""
    value = finite(row, key)
    return value if value is not None and 0 <= value <= 1 else None


def interval(row: Mapping[str, Any], key: str) -> tuple[float, float] | None:
    """The two ends of an interval, or None."""
    value = row.get(key)
    if not isinstance(value, list) or len(value) != 2:
        return None
    low, high = (finite({"end": end}, "end") for end in value)
    return None if low is None or high is None else (low, high)


def _by_step(rows: Iterable[Row]) -> list[Row]:
    """One row a step, in order; a later line about the same step adds to it."""
    steps: dict[float, Row] = {}
    for row in rows:
        step = finite(row, "step")
        if step is not None:
            steps.setdefault(step, {}).update(row)
    return [steps[step] for step in sorted(steps)]


def _read_text(path: Path) -> str:
    if not path.exists():
        return ""
    return read_bytes(path, what="run", limit=_LARGEST, error=RunError).decode("utf-8", "replace")


def _read_object(path: Path, notes: list[str]) -> Row:
    text = _read_text(path)
    if not text:
        return {}
    value = _parsed(text)
    if isinstance(value, dict):
        return value
    notes.append(f"{path.name} is not a JSON object and was skipped")
    return {}


def _read_lines(path: Path, notes: list[str]) -> list[Row]:
    """The objects of a JSONL file. An incomplete last line is not counted as missing."""
    lines = _read_text(path).split("\n")
    values = [_parsed(line) for line in lines if line.strip()]
    broken = sum(not isinstance(value, dict) for value in values[:-1])
    if broken:
        notes.append(f"{path.name}: {broken} unreadable line{'s' * (broken > 1)} skipped")
    return [value for value in values if isinstance(value, dict)]


def _parsed(text: str) -> object:
    try:
        return parse_json(text, what="run", finite=False)
    except DPOStudioError:
        return None


def _read_recipe(path: Path, notes: list[str]) -> tuple[Row, str]:
    text = _read_text(path)
    try:
        recipe = parse_yaml(text)
    except yaml.YAMLError:
        notes.append(f"{path.name} is not YAML and is shown unchanged")
        return {}, text
    return (recipe if isinstance(recipe, dict) else {}), text
