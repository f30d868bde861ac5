"""`dpo models`: the families that were tested, and what a given model gets."""

from __future__ import annotations

from typing import get_args

from dpo_studio.config import Layout, ModelSection
from dpo_studio.errors import UsageError
from dpo_studio.models.folder import open_model
from dpo_studio.models.support import describe, tested_families

__all__ = ["model_lines", "table_lines"]


def table_lines() -> list[str]:
    """A line a family: name, layout, adapted layers, fast path, tested verbs; or why it is refused."""
    families = tested_families()
    wide = max(len(row.family) for row in families) + 2
    lines = [f"{'family':{wide}}{'layout':8} adapted; fast path; tested by `python -m tests.families`"]
    for row in families:
        if row.layout:
            what = f"{row.adapted}; {row.fast}; {row.right}"
            what += f"; not: {row.refused}" if row.refused else ""
        else:
            what = f"refused: {row.refused}"
        lines.append(f"{row.family:{wide}}{row.layout or '-':8} {what}")
    return lines


def model_lines(name: str, layout: str = "auto") -> list[str]:
    """What this model gets, a line each.

    Raises:
        UsageError: no such layout.
        ModelError: the model is not found, or cannot be trained, with the reason.
    """
    if layout not in ("auto", *get_args(Layout)):
        raise UsageError(f"--layout {layout!r} is not one of auto, {', '.join(get_args(Layout))}")
    section = ModelSection.model_validate({"path": name, "layout": layout})
    found = describe(open_model(name), section)
    wide = max(len(what) for what, _ in found) + 2
    return [f"{what:{wide}}{which}" for what, which in found]
