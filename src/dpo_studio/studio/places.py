"""Which paths a page may name: inside the folder that the studio was opened on, or one that `--allow` added."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from dpo_studio.config.sections import BUNDLED
from dpo_studio.studio.api_errors import Refused

__all__ = ["OWN", "Places"]

OWN = ".dpo-studio"
"""Begins the names of the studio's own file and folder, which no page may name."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+){0,2}(:[\w.-]+)?")
_DATA = (".jsonl", ".json", ".gz", ".parquet", ".csv", ".tsv")
_BUNDLED = re.compile(r"bundled:[\w-]+(\.[\w-]+)*(:[\w-]+)?")
_SPLIT = re.compile(r":[\w.-]+$")


@dataclass(frozen=True)
class Places:
    """The folders that pages may read and write."""

    folder: Path
    """Resolved; relative names are relative to it."""
    allowed: tuple[Path, ...] = ()
    """Resolved, too."""

    def inside(self, name: str, field: str) -> Path:
        """The absolute path of a name, links followed; there need be nothing.

        Raises:
            Refused: it leads out, by a link either, or to the studio's own files.
        """
        try:
            if name.startswith("~"):  # a command would read it as somebody's home
                raise ValueError
            path = (self.folder / name).resolve()
        except (OSError, ValueError, RuntimeError):
            raise Refused(f"{name[:80]!r} is not the name of a file", field=field) from None
        if not any(path.is_relative_to(root) for root in (self.folder, *self.allowed)):
            raise Refused(
                f"{name[:80]!r} leads out of {self.folder}",
                status=403,
                hint="open the studio with --allow FOLDER to add another one",
                field=field,
            )
        if any(part.startswith(OWN) for part in path.parts[len(self.folder.parts) :]):
            raise Refused(f"{name[:80]!r} is the studio's own", status=403, field=field)
        return path

    def existing(self, name: str, field: str) -> Path:
        """The same for what must be there."""
        path = self.inside(name, field)
        if not path.exists():
            raise Refused(f"{name[:80]!r} is not there", status=404, field=field, hint="was it moved or removed?")
        return path

    def named(self, name: str, field: str) -> str:
        """A model or a source as a command takes it: a bundled one, a Hub id, or a path that was checked.

        Raises:
            Refused: a path that leads out, an option of the command line, or no name at all.
        """
        if not name.strip() or name.startswith("-") or "\0" in name:
            raise Refused(f"{name[:80]!r} names no model, run or data", field=field)
        if "://" in name:
            raise Refused("an address of the network is no model or data here", status=403, field=field)
        if name.startswith(BUNDLED):
            if not _BUNDLED.fullmatch(name):
                raise Refused(f"{name[:80]!r} is not bundled", field=field)
            return name
        if self.is_on_hub(name):
            return name
        whole = _exists(self.folder / name)
        self.inside(name if whole else _SPLIT.sub("", name), field)
        return name

    def is_on_hub(self, name: str) -> bool:
        """Whether a command would ask the Hub for it: the name of a model or dataset there, and of nothing here."""
        bare = _SPLIT.sub("", name)
        is_there = _exists(self.folder / bare.partition("/")[0])
        if name.startswith(BUNDLED) or is_there or bare.endswith(_DATA):
            return False
        return _HUB_ID.fullmatch(name) is not None and ".." not in name

    def is_there(self, name: str) -> bool:
        """Whether a name of `named` is of something: here, bundled, or (who knows) on the Hub."""
        here = _exists(self.folder / name) or _exists(self.folder / _SPLIT.sub("", name))
        return here or name.startswith(BUNDLED) or self.is_on_hub(name)

    def shown(self, path: Path) -> str:
        """A path as pages show it: relative to the folder where it is in it."""
        return path.relative_to(self.folder).as_posix() if path.is_relative_to(self.folder) else str(path)


def _exists(path: Path) -> bool:
    try:
        return os.path.lexists(path)
    except (OSError, ValueError):
        return False
