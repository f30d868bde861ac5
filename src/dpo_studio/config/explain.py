"""pydantic's errors in terms of the recipe: the key, what is wrong, and a hint."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, get_args

from pydantic import BaseModel, ValidationError

from dpo_studio.config.foreign_keys import FOREIGN_KEYS, LESS_BITS
from dpo_studio.config.sections import Recipe
from dpo_studio.config.yaml_text import cut
from dpo_studio.objectives import TRL_NAMES, known_objectives, objectives_help

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

__all__ = ["explain"]


@dataclass
class _Problems:
    """Problems in terms of the recipe, and hints for misspelt names."""

    problems: list[str] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)
    refused: dict[str, tuple[list[str], str]] = field(default_factory=dict)
    """For each key the messages of every type that its value may have, and the value given."""

    def add(self, item: ErrorDetails, raw: object) -> None:
        keys = _keys_of(item["loc"], raw, missing=item["type"] == "missing")
        key = ".".join(keys) or "recipe"
        if item["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            self._unknown_key(key, keys)
        elif item["type"] == "union_tag_invalid" and isinstance(item["input"], dict):
            self._unknown_objective(str(item["ctx"]["tag"]))
        elif item["type"] == "missing":
            self.problems.append(f"{key} is required")
        else:
            given = f" (given: {_value_text(item['input'])})" if not isinstance(item["input"], dict | BaseModel) else ""
            self.refused.setdefault(key, ([], given))[0].append(_what_is_wrong(item["type"], item["msg"]))

    def _unknown_key(self, key: str, keys: list[str]) -> None:
        self.problems.append(f"unknown key {key}")
        if keys[-1].lower() in LESS_BITS:
            self.hints.append("a GPTQ or NF4 checkpoint as model.path trains as it is (`dpo quantize` makes one)")
        elif near := _nearest(keys):
            self.hints.append(f"did you mean {near}?")

    def _unknown_objective(self, tag: str) -> None:
        self.problems.append(f"unknown objective {tag!r}")
        self.hints.append(
            f"TRL's {tag} is called {TRL_NAMES[tag]} here"
            if tag in TRL_NAMES
            else f"objective.kind is one of {objectives_help()}"
        )


def explain(error: ValidationError, raw: Mapping[str, object]) -> tuple[list[str], list[str]]:
    """Problems in terms of the recipe, and hints for misspelt names."""
    found = _Problems()
    for item in error.errors(include_url=False):
        found.add(item, raw)
    refused = [f"{key}: {', or '.join(messages)}{given}" for key, (messages, given) in found.refused.items()]
    return [*found.problems, *refused], list(dict.fromkeys(found.hints))


def _keys_of(loc: tuple[int | str, ...], raw: object, *, missing: bool) -> list[str]:
    """The recipe's keys in pydantic's path, which also names the members of the unions it has tried."""
    keys: list[str] = []
    for place, part in enumerate(loc):
        found, inside = _inside(raw, part)
        if found:
            raw = inside
        elif not (missing and place == len(loc) - 1):
            continue
        keys.append(str(part))
    return keys


def _inside(raw: object, part: int | str) -> tuple[bool, object]:
    """(whether there is such a part, what it is)."""
    if isinstance(raw, dict):
        return part in raw, raw.get(part)
    if isinstance(raw, list | tuple) and isinstance(part, int) and part < len(raw):
        return True, raw[part]
    return False, None


def _what_is_wrong(kind: str, message: str) -> str:
    if kind in ("model_type", "dataclass_type", "union_tag_invalid"):
        return "a section with keys is expected"
    message = message.removeprefix("Value error, ")
    return message[:1].lower() + message[1:]


def _value_text(value: object) -> str:
    return cut(repr(value))


def _nearest(keys: list[str]) -> str | None:
    """The key that was probably meant: the same name in another section, else a similar one in this section."""
    *section, name = keys
    if (ours := FOREIGN_KEYS.get(name.lower())) is not None and ours.split(".") != keys:
        return ours
    elsewhere = [other for other in Recipe.model_fields if [other] != section and name in _known_keys([other])]
    if len(elsewhere) == 1:
        return f"{elsewhere[0]}.{name}"
    near = difflib.get_close_matches(name, [key for key in _known_keys(section) if key != name], n=1, cutoff=0.5)
    return ".".join([*section, near[0]]) if near else None


def _sections_in(annotation: object) -> Iterator[type[BaseModel]]:
    """The sections that a value may be: it may allow null, or several kinds."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inside in get_args(annotation):
        yield from _sections_in(inside)


def _known_keys(keys: list[str]) -> list[str]:
    """Names of the fields of the section at `keys`."""
    if keys[:1] == ["objective"]:  # and its terms, which are objectives again
        return list(dict.fromkeys(each.name for kind in known_objectives() for each in fields(kind)))
    section: type[BaseModel] = Recipe
    for key in (key for key in keys if not key.isdecimal()):
        known = section.model_fields.get(key)
        sections = [] if known is None else list(_sections_in(known.annotation))
        if not sections:
            return []
        section = sections[0]
    return list(section.model_fields)
