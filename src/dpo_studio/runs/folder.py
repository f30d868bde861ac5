"""The run folder: the results of a recipe. Only this module knows its layout.

recipe.yaml         resolved: defaults filled in, paths absolute, every `auto` resolved
recipe.typed.yaml   as given
data.json           the date, and a digest of every pair (runs.data_digests)
status.json         of several processes: the exit code of the last start, and why it ended
metrics.jsonl       one line a step; equal after a resume
.lock               while a process trains here
timing.jsonl        pairs/s, tokens/s, memory; may differ
samples.jsonl       the policy's answers as training goes, where the recipe asks for them
memory.jsonl        where memory ran out, and what was done; not there if it did not
checkpoints/        step-N/, whole or not there
adapter/            the result, in PEFT's format
model/              the result where the whole model was trained: a folder that plain transformers loads
evaluation/         answers and their verdicts: `answers.jsonl` of the demo, `comparisons.jsonl` of `dpo eval`
result.json, report.html, environment.json
"""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from dpo_studio import __version__
from dpo_studio.config import Recipe, RecipeFile, parse_yaml, validate_recipe
from dpo_studio.config.yaml_text import one_line
from dpo_studio.disk import UNFINISHED, make_folder, remove_leftovers, sync, write_atomically
from dpo_studio.errors import DataError, RunError
from dpo_studio.reading import kind_of_file, parse_json, read_bytes, read_text
from dpo_studio.runs.flat_keys import flat_keys, nested_keys
from dpo_studio.runs.lock import LOCK
from dpo_studio.scan import where_files_may_be

__all__ = ["RunFolder", "environment", "is_run", "was_begun"]

_MAY_CHANGE = (
    *("training.save_every", "training.evaluate_every", "training.sample_every", "model.sharding"),
    *("run.tracker", "run.folder", "run.sample_prompts"),
)
_MAY_GROW = ("training.epochs", "training.max_steps")
_RESOLVED = {
    "model.dtype": "auto",
    "model.layout": "auto",
    "training.tokens_per_micro_batch": "auto",
    "adapter.targets": "all-linear",
}
"""Keys and the value of each that is decided once and written into the run."""
_LARGEST = 20_000_000
"""Bytes of a file that is read whole; of a recipe, `parse_yaml` takes less."""
_LARGEST_LINES = 1_000_000_000
"""Bytes. A million steps have half of that."""
_MORE_ROOM = "free some space and run the same command, or choose another folder: --set run.folder=NAME"


@dataclass(frozen=True)
class RunFolder:
    """One run's folder, and the names of all that is in it."""

    path: Path
    writes: bool = True
    """False: every write is left out. Of the processes that train together, the first writes."""

    RECIPE, TYPED_RECIPE, DATA = "recipe.yaml", "recipe.typed.yaml", "data.json"
    METRICS, TIMING, MEMORY = "metrics.jsonl", "timing.jsonl", "memory.jsonl"
    SAMPLES = "samples.jsonl"
    RESULT, ENVIRONMENT, REPORT, STATUS = "result.json", "environment.json", "report.html", "status.json"
    CHECKPOINTS, ADAPTER, MODEL, EVALUATION = "checkpoints", "adapter", "model", "evaluation"

    # in `evaluation`
    ANSWERS, ALL_ANSWERS_PAGE = "answers.jsonl", "all-answers.html"
    COMPARISONS, ANSWERS_PAGE = "comparisons.jsonl", "answers.html"
    WIN_RATES, WIN_RATES_FIGURE, WIN_RATES_TABLE = "winrate.json", "winrate.svg", "winrate.md"
    COMPLETIONS = "completions"

    LINES = (METRICS, TIMING, MEMORY, SAMPLES)
    PARTS = (
        *LINES,
        *(RECIPE, TYPED_RECIPE, DATA, RESULT, ENVIRONMENT, REPORT, STATUS),
        *(CHECKPOINTS, ADAPTER, MODEL, EVALUATION),
    )
    """The files of a run. Any other file in its folder belongs to the user, and is not opened."""
    TRACES = (TYPED_RECIPE, METRICS, RESULT, ENVIRONMENT)
    """Files that only a run has, besides a recipe."""

    @property
    def checkpoints(self) -> Path:
        return self.path / self.CHECKPOINTS

    @property
    def adapter(self) -> Path:
        return self.path / self.ADAPTER

    @property
    def model(self) -> Path:
        return self.path / self.MODEL

    @property
    def evaluation(self) -> Path:
        return self.path / self.EVALUATION

    @property
    def result_file(self) -> Path:
        return self.path / self.RESULT

    def recipe(self) -> Recipe | None:
        """The resolved recipe this folder was made by, None in a folder that is new."""
        self.refuse_what_leads_out()
        file = self.path / self.RECIPE
        raw = self._yaml(file)
        return None if raw is None else validate_recipe(raw if isinstance(raw, dict) else {}, where=str(file))

    def typed(self) -> dict[str, Any]:
        """The recipe as its author gave it."""
        raw = self._yaml(self.path / self.TYPED_RECIPE)
        return raw if isinstance(raw, dict) else {}

    def _yaml(self, file: Path) -> Any:
        """None where there is no such file."""
        if not file.exists():
            return None
        text = read_text(file, what="the run's recipe", limit=_LARGEST, error=RunError)
        try:
            return parse_yaml(text)
        except yaml.YAMLError as error:
            raise RunError(f"{file} cannot be read: {one_line(error)}") from None

    def refuse_what_leads_out(self) -> None:
        """Refuse links: a downloaded run must not read files of this machine in place of its own.

        What it says is shown in reports and copied into exports. Of a run in the Hub's cache every file is a link.

        Raises:
            RunError: a link that leads out of the run, or something that is not a file, among the run's files.
        """
        inside = where_files_may_be(self.path)
        waiting = [self.path / name for name in self.PARTS]
        while waiting:
            path = waiting.pop()
            if path.is_symlink() and not any(_target(path).is_relative_to(place) for place in inside):
                raise RunError(
                    f"{path} is a link that points out of the run; a run uses only its own folder",
                    hint="put the file itself there; the whole run folder may be a link to another disk",
                )
            if path.is_dir():
                waiting += path.iterdir()
            elif path.exists() and not path.is_file():
                kind = kind_of_file(path.stat().st_mode)
                raise RunError(
                    f"{path} is {kind}, not a file", hint="a device or a pipe in a run folder is never legitimate"
                )

    def result(self) -> dict[str, Any] | None:
        """The result of the finished run, None before."""
        if not self.result_file.exists():
            return None
        content = read_bytes(self.result_file, what="the run's result", limit=_LARGEST, error=RunError)
        try:
            raw = parse_json(content, what=f"{self.result_file} is not valid JSON", error=RunError)
            if not isinstance(raw, dict):
                raise RunError(f"{self.result_file} is not a JSON object")
            _check_result(raw, self.result_file)
        except RunError as error:
            error.hint = "remove it: the same command writes it again, from the last checkpoint"
            raise
        return raw

    def resolve(self, wanted: Recipe) -> Recipe:
        """The recipe to run here: `wanted`, with what an earlier start of the same run has resolved.

        Raises:
            RunError: the folder contains another recipe's run (with the difference), files that are not a run, or
            links.
        """
        self._refuse_links()
        there = self.recipe()
        if there is None:
            if self.path.exists() and (not self.path.is_dir() or any(map(_is_something, self.path.iterdir()))):
                raise RunError(
                    f"{self.path} exists and is not a run", hint="choose another folder: --set run.folder=NAME"
                )
            return wanted
        if not self._has_begun():
            return wanted
        old, new = flat_keys(there.to_plain()), flat_keys(wanted.to_plain())
        for key, auto in _RESOLVED.items():
            if new.get(key) == auto:
                new[key] = old[key]
        differences = [key for key in sorted(old | new) if old.get(key) != new.get(key) and not _allowed(key, old, new)]
        if differences:
            lines = "".join(f"\n    {key}: {old.get(key)} there, {new.get(key)} asked for" for key in differences)
            raise RunError(
                f"{self.path} is a run with other settings:{lines}",
                hint="choose another folder (--set run.folder=NAME), or the settings the run was made with",
            )
        return validate_recipe(nested_keys(new), where=str(self.path))

    def _has_begun(self) -> bool:
        """Whether the folder has results that a run with other settings would overwrite."""
        return (
            self.result_file.exists() or self.checkpoints.exists() or next(self.lines(self.METRICS), None) is not None
        )

    def has_checkpoint(self) -> bool:
        """Whether it has a checkpoint or metrics from which a later start continues."""
        return any(self.checkpoints.glob("step-*"))

    def start(self, loaded: RecipeFile, recipe: Recipe) -> None:
        """Make the folder and write the recipe, before any long work."""
        if not self.writes:
            return
        with _writing(self.path):
            make_folder(self.path)
            remove_leftovers(self.path)
        if not self._has_begun():  # of an earlier start without a result, perhaps with other settings
            (self.path / self.MEMORY).unlink(missing_ok=True)
        self.write_yaml(self.RECIPE, recipe.to_plain())
        self.write_yaml(self.TYPED_RECIPE, loaded.typed)

    def _refuse_links(self) -> None:
        """Refuse links: a run writes, and removes checkpoints, in its own folder only.

        Raises:
            RunError: something in it leads elsewhere.
        """
        for path in (
            self.checkpoints,
            self.adapter,
            self.model,
            self.evaluation,
            *(self.path / name for name in self.LINES),
        ):
            if path.is_symlink():
                raise RunError(
                    f"{path} is a link; a run uses only its own folder",
                    hint="put the files themselves there; the whole run folder may be a link to another disk",
                )

    def write_yaml(self, name: str, content: dict[str, Any]) -> None:
        self._write(name, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Write a whole file; ValueError for NaN and infinity, which JSON does not have."""
        self._write(name, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    def _write(self, name: str, text: str) -> None:
        if self.writes:
            write_atomically(self.path / name, text, hint=_MORE_ROOM)

    def append(self, name: str, line: dict[str, Any]) -> None:
        """Add one line to metrics.jsonl, timing.jsonl or memory.jsonl."""
        if not self.writes:
            return
        with _writing(self.path / name), (self.path / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps({key: _finite(value) for key, value in line.items()}) + "\n")

    def sync_lines(self) -> None:
        """Bring the .jsonl files to the disk: a checkpoint must not outlive the lines up to its step."""
        for name in self.LINES:
            with _writing(self.path / name), suppress(FileNotFoundError):
                sync(self.path / name)
        with _writing(self.path):
            sync(self.path)

    def lines(self, name: str) -> Iterator[dict[str, Any]]:
        """The whole lines of a .jsonl file; lines that a crash or a broken disk cut off are ignored."""
        file = self.path / name
        if not file.exists():
            return
        content = read_bytes(file, what="the run's lines", limit=_LARGEST_LINES, error=RunError)
        for text in content.decode("utf-8", "replace").splitlines():
            try:
                line = parse_json(text, what=name)
            except DataError:
                return
            if not isinstance(line, dict) or type(line.get("step")) is not int:
                return
            yield line

    def truncate_after(self, step: int) -> None:
        """Remove the lines after `step`: a resumed run writes them again."""
        for name in (self.METRICS, self.TIMING, self.SAMPLES):
            kept = [line for line in self.lines(name) if line["step"] <= step]
            if (self.path / name).exists():
                text = "".join(json.dumps(line) + "\n" for line in kept)
                self._write(name, text)


def is_run(path: str | Path) -> bool:
    """Whether a MODEL_OR_RUN is read as a run: it has a recipe."""
    return (Path(path) / RunFolder.RECIPE).is_file()


def was_begun(folder: Path) -> bool:
    """Whether a command has begun a run here; a recipe alone may be in any folder."""
    return is_run(folder) and any((folder / name).exists() for name in RunFolder.TRACES)


def _check_result(result: dict[str, Any], file: Path) -> None:
    """See that what is printed of a result is of its kind; anybody may have written the file.

    Raises:
        RunError: a number is something else.
    """

    def is_number(value: object) -> bool:
        return value is None or (isinstance(value, int | float) and not isinstance(value, bool))

    for key in ("steps", "pairs", "held_out_pairs", "accuracy", "accuracy_before", "longer_wins"):
        if not is_number(result.get(key)):
            raise RunError(f"{file}: {key} is not a number")
    interval = result.get("accuracy_ci95", [0, 0])
    if not (isinstance(interval, list) and len(interval) == 2 and all(map(is_number, interval))):
        raise RunError(f"{file}: accuracy_ci95 is not two numbers")


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Report a full or read-only disk with the name of the file that was being written."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{path} cannot be written: {error.strerror or error}",
            hint=_MORE_ROOM,
        ) from None


def environment(device: str, **more: Any) -> dict[str, Any]:
    """The machine and the versions of the run."""
    packages = ("torch", "transformers", "peft", "accelerate", "datasets")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device,
        "cpus": os.cpu_count(),
        "platform": platform.platform(),
        "python": sys.version.split()[0],
        # our own from the source: a checkout on PYTHONPATH has no metadata, and a run must not end over that
        "versions": {"dpo-studio": __version__} | {name: version(name) for name in packages},
    } | more


def _target(link: Path) -> Path:
    """The target of a link; the root for one that points to itself."""
    try:
        return link.resolve()
    except (OSError, RuntimeError):
        return Path("/")


def _is_something(path: Path) -> bool:
    """Whether a file in a folder without a recipe is more than a leftover of a killed start."""
    return path.name != LOCK and not (path.name.startswith(".") and UNFINISHED in path.name)


def _finite(value: Any) -> Any:
    """Replace NaN, which JSON does not have, by null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _allowed(key: str, old: dict[str, Any], new: dict[str, Any]) -> bool:
    if key in _MAY_CHANGE:
        return True
    before, after = old.get(key), new.get(key)
    return key in _MAY_GROW and (after is None or before is None or after > before)
