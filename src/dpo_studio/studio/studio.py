"""What all routes share: the folder, its store, the jobs, the models in memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from fastapi import Depends, Request

from dpo_studio.studio.curves import Curves
from dpo_studio.studio.guard import Door
from dpo_studio.studio.jobs import Jobs
from dpo_studio.studio.model_worker import Workshop
from dpo_studio.studio.pair_index import PairIndexes
from dpo_studio.studio.places import Places
from dpo_studio.studio.sessions import Sessions, cookie_name
from dpo_studio.studio.store import Store

__all__ = ["Here", "Studio"]


@dataclass(frozen=True)
class Studio:
    """One studio on one folder."""

    places: Places
    store: Store
    sessions: Sessions
    door: Door
    jobs: Jobs
    workshop: Workshop
    curves: Curves = field(default_factory=Curves)
    indexes: PairIndexes = field(default_factory=PairIndexes)
    streams: set[object] = field(default_factory=set)
    """Streams of events that are open."""

    @classmethod
    def opened(
        cls, folder: Path, *, host: str, port: int, allow: tuple[Path, ...] = (), password: str | None = None
    ) -> Studio:
        """A studio on a folder, which is there."""
        folder = folder.resolve()
        store = Store.of_folder(folder)
        sessions = Sessions(store, password)
        door = Door(host, port, cookie_name(port, folder), sessions.is_known)
        return cls(
            Places(folder, tuple(path.resolve() for path in allow)),
            store,
            sessions,
            door,
            Jobs(folder, store),
            Workshop(folder),
        )

    @property
    def folder(self) -> Path:
        return self.places.folder


def _of(request: Request) -> Studio:
    studio: Studio = request.app.state.studio
    return studio


Here = Annotated[Studio, Depends(_of)]
"""The studio, as a route takes it."""
