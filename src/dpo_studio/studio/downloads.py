"""Nothing comes from the Hub before somebody has said yes to it, once for each name and folder."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, Field

from dpo_studio.runs.folder import was_begun
from dpo_studio.studio.api_errors import Refused
from dpo_studio.studio.runs import summary
from dpo_studio.studio.studio import Here, Studio

__all__ = ["ask_first", "router", "say_yes"]

router = APIRouter(prefix="/api")
ASKING = "download"
"""The field of the refusal that asks: a page answers it by a button."""


class Download(BaseModel):
    """A model or dataset of the Hub that may be downloaded from now on."""

    name: str = Field(max_length=1000)


@router.post("/downloads")
def download(here: Here, asked: Download) -> dict[str, Any]:
    """Say yes to a download."""
    if not here.places.is_on_hub(here.places.named(asked.name, "name")):
        raise Refused(f"{asked.name[:80]!r} is nothing that would be downloaded", field="name")
    say_yes(here, [asked.name])
    return {"name": asked.name}


def say_yes(here: Studio, names: Iterable[str]) -> None:
    """Remember that these may be downloaded."""
    with here.store.writing() as db:
        rows = [(name, time.time()) for name in names if here.places.is_on_hub(name)]
        db.executemany("INSERT OR IGNORE INTO downloads (name, made) VALUES (?, ?)", rows)


def ask_first(here: Studio, name: str) -> None:
    """Go on where nothing would be downloaded, or somebody said yes.

    Raises:
        Refused: the name is one of the Hub, or of a run whose base is, and nobody has said yes.
    """
    needed = _needed(here, name)
    if needed is None:
        return
    with here.store.reading() as db:
        found = db.execute("SELECT 1 FROM downloads WHERE name = ?", (needed,)).fetchone()
    if found is None:
        hint = "say yes to download it; nothing was asked for yet"
        raise Refused(f"{needed} is on the Hub, not in this folder", status=409, field=ASKING, hint=hint)


def _needed(here: Studio, name: str) -> str | None:
    if here.places.is_on_hub(name):
        return name
    run = here.folder / name
    base = summary(here, run)["base"] if was_begun(run) else None
    return base if base is not None and here.places.is_on_hub(base) else None
