"""A recipe as keys with dots, so that two can be compared key by key."""

from __future__ import annotations

from typing import Any

__all__ = ["flat_keys", "nested_keys"]

_PATTERNS = ("adapter.rank_pattern", "adapter.alpha_pattern")
"""Keys whose value is a mapping of names with dots in them, of which the first that fits counts."""


def flat_keys(raw: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a.b": value} of {"a": {"b": value}}."""
    flat: dict[str, Any] = {}
    for key, value in raw.items():
        name = f"{prefix}{key}"
        if name in _PATTERNS:
            flat[name] = list(value.items())
        else:
            flat |= flat_keys(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return flat


def nested_keys(flat: dict[str, Any]) -> dict[str, Any]:
    """What `flat_keys` was made of."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        if key in _PATTERNS:
            value = dict(value)
        *sections, name = key.split(".")
        inner = nested
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = value
    return nested
