"""Recipes that come from a page: checked key by key, and kept to the studio's folders."""

from __future__ import annotations

import re
from typing import Any

import yaml
from pydantic import ValidationError

from dpo_studio.config import Recipe, parse_yaml
from dpo_studio.config.explain import explain
from dpo_studio.config.yaml_text import one_line
from dpo_studio.studio.api_errors import Refused
from dpo_studio.studio.places import Places

__all__ = ["downloads_of", "problems_of", "read_values", "written"]

_NAMED = ("model.path", "reference.model", "data.train.source", "data.held_out.source", "rounds.prompts")
_FILES = ("model.adapter", "model.chat_template", "reference.adapter", "run.folder", "run.sample_prompts")


def read_values(text: str | None, values: dict[str, Any] | None) -> dict[str, Any]:
    """The recipe of a request: YAML, or values of a form.

    Raises:
        Refused: neither, or it is no YAML mapping.
    """
    if text is None:
        return values or {}
    try:
        raw = parse_yaml(text)
    except yaml.YAMLError as error:
        raise Refused(f"this is not YAML: {one_line(error)}", field="yaml") from None
    if not isinstance(raw, dict):
        raise Refused("a recipe is sections with keys", field="yaml", hint="it needs model.path and data.train.source")
    return raw


def written(values: dict[str, Any]) -> str:
    """The recipe as a file has it."""
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def problems_of(values: dict[str, Any], places: Places) -> list[dict[str, str | None]]:
    """Everything wrong with it, each with its key; empty for one that may be started."""
    found: list[dict[str, str | None]] = []
    try:
        Recipe.model_validate(values)
    except ValidationError as error:
        problems, hints = explain(error, values)
        found = [{"field": _field(text), "message": text, "hint": "; ".join(hints) or None} for text in problems]
    return [*found, *_leading_out(values, places)]


def _leading_out(values: dict[str, Any], places: Places) -> list[dict[str, str | None]]:
    found: list[dict[str, str | None]] = []
    for key in (*_NAMED, *_FILES, "run.tracker"):
        for value in _texts_at(values, key.split(".")):
            try:
                if key == "run.tracker":
                    raise Refused("a tracker is started from a terminal only", field=key, hint="leave run.tracker out")
                (places.named if key in _NAMED else places.inside)(value, key)
            except Refused as refused:
                found.append({"field": key, "message": refused.message, "hint": refused.hint})
    return found


def downloads_of(values: dict[str, Any], places: Places) -> list[str]:
    """What a training would download from the Hub, unless it is in the Hub's cache."""
    named = [value for key in _NAMED for value in _texts_at(values, key.split("."))]
    return [value for value in dict.fromkeys(named) if places.is_on_hub(value)]


def _texts_at(values: Any, parts: list[str]) -> list[str]:
    """The texts at a key, of every member where a list is on the way: `data.train` may be several sources."""
    if isinstance(values, list):
        return [text for one in values for text in _texts_at(one, parts)]
    if not parts:
        return [values] if isinstance(values, str) else []
    return _texts_at(values.get(parts[0]), parts[1:]) if isinstance(values, dict) else []


def _field(problem: str) -> str | None:
    """`unknown key a.b`, `a.b is required`, `a.b: what is wrong` -> a.b."""
    match = re.match(r"(?:unknown key )?([a-z_]+(?:\.[\w-]+)*)(?=:| is required|$)", problem)
    return match[1] if match else "objective.kind" if problem.startswith("unknown objective") else None
