"""The only reader of recipe files and `--set` overrides."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import yaml
from pydantic import ValidationError

from dpo_studio.config.explain import explain
from dpo_studio.config.sections import BUNDLED, Recipe
from dpo_studio.config.yaml_text import MAX_BYTES, one_line, parse_yaml
from dpo_studio.errors import RecipeError, UsageError
from dpo_studio.paths import inside, user_path
from dpo_studio.reading import is_own_stream, open_input, shown_path

__all__ = ["RecipeFile", "RecipeLike", "cache_folder", "load_recipe", "parse_override", "validate_recipe"]


@dataclass(frozen=True)
class RecipeFile:
    """A resolved recipe, and its content as typed."""

    recipe: Recipe
    """Resolved: local paths are absolute, defaults filled in."""
    typed: dict[str, object]
    """As given, overrides merged."""
    name: str
    """The file's name without its ending; names the default run folder."""

    @property
    def run_folder(self) -> Path:
        """The run folder, relative to the working directory unless absolute.

        Raises:
            UsageError: the recipe's name does as no folder's, or leads out of `runs`.
        """
        if self.recipe.run.folder is not None:
            return user_path(self.recipe.run.folder)
        return inside(Path("runs"), self.name, hint="name the run's folder: --set run.folder=NAME")


RecipeLike = str | Path | Mapping[str, object] | Recipe | RecipeFile
"""A recipe's file, its content as a dict, a `Recipe`, or what `load_recipe` made of one of them."""


def load_recipe(recipe: RecipeLike, overrides: Sequence[str] | None = None) -> RecipeFile:
    """Read, override, validate and resolve a recipe.

    Paths in a file are relative to the file, others and those in `overrides` (`a.b=c`) to the working directory. A
    recipe that is not a file is named `recipe`, and so is its run unless `run.folder` says otherwise. What is loaded
    already is not read again.

    Raises:
        RecipeError: the file cannot be read, or holds something that is not a recipe.
        UsageError: an override is not of the form `a.b=c`, or the recipe is loaded already.
    """
    if isinstance(recipe, RecipeFile):
        if overrides:
            raise UsageError(
                f"{recipe.name} is loaded already: --set comes too late", hint="load it with its overrides"
            )
        return recipe
    typed, where, folder = _typed(recipe)
    absolute = _with_absolute_paths(typed, folder)
    for text in overrides or []:
        keys, value = parse_override(text)
        _set(typed, keys, value, text)
        patch: dict[str, object] = {}
        _set(patch, keys, value, text)
        _set(absolute, keys, _dig(_with_absolute_paths(patch, Path.cwd()), keys), text)
    return RecipeFile(recipe=validate_recipe(absolute, where=str(where)), typed=typed, name=where.stem)


def _typed(recipe: str | Path | Mapping[str, object] | Recipe) -> tuple[dict[str, object], Path, Path]:
    """(a copy of its plain content, its name, the folder that its paths are relative to)."""
    if isinstance(recipe, str | Path):
        file = user_path(recipe)
        if is_own_stream(file):
            return _read_yaml(file), Path("recipe"), Path.cwd()
        return _read_yaml(file), file, file.resolve().parent
    if isinstance(recipe, Recipe):
        return recipe.to_plain(), Path("recipe"), Path.cwd()
    return deepcopy(dict(recipe)), Path("recipe"), Path.cwd()


def validate_recipe(raw: Mapping[str, object], *, where: str) -> Recipe:
    """A Recipe from plain data; every problem in one error, each with its key."""
    _refuse_empty_sections(raw, where)
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        problems, hints = explain(error, raw)
        raise RecipeError(f"{where}: {'; '.join(problems)}", hint="; ".join(hints) or None) from None


def _refuse_empty_sections(raw: Mapping[str, object], where: str) -> None:
    """`training: null`, or `training:` with nothing under it, could mean no section or its defaults; it is refused.

    Raises:
        RecipeError: a section is null.
    """
    refused = [name for name, field in Recipe.model_fields.items() if type(None) not in get_args(field.annotation)]
    sections = [(name,) for name in refused] + [("data", "train"), ("data", "held_out")]
    empty = [
        keys
        for keys in sections
        if isinstance(within := _dig(raw, keys[:-1]), dict) and within.get(keys[-1], 0) is None
    ]
    if empty:
        names = ", ".join(".".join(keys) for keys in empty)
        hint = "leave the section out for its defaults"
        raise RecipeError(f"{where}: null where a section with keys is expected: {names}", hint=hint)


def parse_override(text: str) -> tuple[list[str], object]:
    """`a.b=c` -> (["a", "b"], c), c read as YAML."""
    keys, equals, value = text.partition("=")
    path = [key.strip() for key in keys.split(".")]
    if not equals or not all(path):
        raise UsageError(f"--set {text!r} is not of the form section.key=value", hint="--set training.epochs=2")
    try:
        return path, parse_yaml(value)
    except yaml.YAMLError as error:
        raise UsageError(f"--set {text!r}: the value is not YAML: {one_line(error)}") from None


def cache_folder() -> Path:
    """Where downloads, conversions and reference log-probs are kept (`$DPO_STUDIO_CACHE`)."""
    return user_path(os.environ.get("DPO_STUDIO_CACHE") or "~/.cache/dpo-studio")


def _read_yaml(file: Path) -> dict[str, object]:
    shown = shown_path(file)
    if file.is_dir():
        raise RecipeError(f"{shown} is a folder, not a recipe", hint="name the .yaml file")
    if not is_own_stream(file) and not _is_there(file):
        raise RecipeError(f"no such recipe: {shown}", hint="recipes/demo.yaml is a small one to start from")
    if file.name.lower().endswith(tuple(suffix for suffix in _DATA_FILES if suffix != ".json")):
        raise _data_for_a_recipe(file)
    with open_input(file, what="recipe", error=RecipeError) as stream:
        try:
            content = stream.read(MAX_BYTES + 1)
        except OSError as error:
            raise RecipeError(f"{shown} cannot be read: {error.strerror}") from None
    if len(content) > MAX_BYTES:
        raise RecipeError(f"{shown} is over {MAX_BYTES:,} bytes: not a recipe")
    try:
        raw = parse_yaml(content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise RecipeError(f"{shown} is not UTF-8 text", hint="a recipe is a YAML file; is this the one?") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{shown} is not valid YAML: {one_line(error)}") from None
    if isinstance(raw, list) and raw and all(isinstance(row, dict) for row in raw):
        raise _data_for_a_recipe(file)
    if not isinstance(raw, dict):
        raise RecipeError(f"{shown} is not a recipe", hint="it needs at least model.path and data.train.source")
    return raw


def _data_for_a_recipe(file: Path) -> RecipeError:
    return RecipeError(
        f"{shown_path(file)} is data, not a recipe",
        hint=f"a recipe names it: model: {{path: MODEL}} and data: {{train: {{source: {file.name}}}}} in a .yaml file; "
        f"`dpo data check {file}` looks at the data",
    )


_HUB_KEYS = (
    ("model", "path"),
    ("data", "train", "source"),
    ("data", "held_out", "source"),
    ("reference", "model"),
    ("rounds", "prompts"),
)
"""Hub ids, unless a file or folder of that name exists, or the name can only be a path."""
_FILE_KEYS = (("model", "adapter"), ("model", "chat_template"), ("reference", "adapter"), ("run", "sample_prompts"))
_DATA_FILES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet", ".csv", ".tsv")


def _with_absolute_paths(raw: dict[str, object], base: Path) -> dict[str, object]:
    """A copy in which local paths are absolute; Hub ids and `bundled:` names are unchanged."""
    resolved = {key: dict(value) if isinstance(value, dict) else value for key, value in raw.items()}
    data = resolved.get("data")
    if isinstance(data, dict):
        resolved["data"] = {key: dict(value) if isinstance(value, dict) else value for key, value in data.items()}
    if isinstance(data, dict) and isinstance(several := data.get("train"), list):
        sources = [dict(one) if isinstance(one, dict) else one for one in several]
        for one in sources:
            if isinstance(one, dict) and isinstance(name := one.get("source"), str) and _is_local(name, base):
                one["source"] = _absolute(name, base)
        _set(resolved, ("data", "train"), sources, "")
    for keys in (*_HUB_KEYS, *_FILE_KEYS):
        value = _dig(resolved, keys)
        if isinstance(value, str) and value and (keys in _FILE_KEYS or _is_local(value, base)):
            _set(resolved, keys, _absolute(value, base), "")
    return resolved


def _is_local(value: str, base: Path) -> bool:
    """Whether a name that may be a Hub id is a path: it looks like one, or exists (`folder:split` too)."""
    if value.startswith(BUNDLED):
        return False
    if value.startswith((".", "~", "/")) or value.partition(":")[0].lower().endswith(_DATA_FILES):
        return True
    return _is_there(base / value) or _is_there(base / value.rpartition(":")[0], but=base)


def _is_there(path: Path, *, but: Path | None = None) -> bool:
    try:
        return path != but and path.exists()
    except (OSError, ValueError):  # too long for a name, a NUL
        return False


def _absolute(value: str, base: Path) -> str:
    return os.path.normpath(base / user_path(value)) if "\0" not in value else value


def _dig(raw: object, keys: Sequence[str]) -> object:
    for key in keys:
        if not isinstance(raw, dict) or key not in raw:
            return None
        raw = raw[key]
    return raw


def _set(raw: dict[str, object], keys: Sequence[str], value: object, text: str) -> None:
    for key in keys[:-1]:
        if raw.get(key) is None:
            raw[key] = {}
        section = raw[key]
        if not isinstance(section, dict):
            raise UsageError(f"--set {text!r}: {key} is not a section")
        raw = section
    raw[keys[-1]] = value
