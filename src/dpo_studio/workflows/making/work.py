"""OUT.work: what a making has got so far, and what it decided when it began; with it a stopped command goes on."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpo_studio.disk import remove_leftovers, write_atomically
from dpo_studio.errors import RunError
from dpo_studio.reading import parse_json, read_text
from dpo_studio.runs.lock import LOCK, held

__all__ = ["Work", "held_work"]

_MARK = "making.json"
_OURS = "data make"
_LARGEST = 1_000_000
"""Bytes of it: a line a model."""
_DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class Work:
    """The folder, locked, and what may not change between two starts of one command."""

    folder: Path
    today: datetime.date
    """Which templates may write."""
    _dtypes: dict[str, str] = field(default_factory=dict)

    def dtype_of(self, model: str) -> str | None:
        """The precision that the model had at the first start: `auto` is a matter of timing on a CPU."""
        return self._dtypes.get(model)

    def keep_dtype(self, model: str, dtype: str) -> None:
        """Write it down, before anything depends on it."""
        if self._dtypes.get(model) != dtype:
            self._dtypes[model] = dtype
            self.write()

    def write(self) -> None:
        """What was decided, as a file."""
        plain = {"dpo_studio": _OURS, "date": self.today.isoformat(), "dtypes": self._dtypes}
        write_atomically(self.folder / _MARK, json.dumps(plain, indent=2) + "\n")


@contextmanager
def held_work(folder: Path, warn: Any) -> Iterator[Work]:
    """Inside, only this process works in OUT.work, which is new or of an earlier start.

    Raises:
        RunError: it is something else's, or another process has it.
    """
    check_work(folder)
    with held(folder, warn, doing="worked in", elsewhere="name another OUT"):
        remove_leftovers(folder)
        known = _read(folder / _MARK)
        work = Work(folder, datetime.date.today()) if known is None else known
        work.write()
        yield work


def check_work(folder: Path) -> None:
    """Before anything long begins: nothing is there, or a folder of ours.

    Raises:
        RunError: something else.
    """
    if not folder.exists() and not folder.is_symlink():
        return
    empty = folder.is_dir() and not [path for path in folder.iterdir() if path.name != LOCK]
    if not folder.is_dir() or (not empty and _read(folder / _MARK) is None):
        raise RunError(f"{folder} is there and is not a folder of `dpo data make`", hint="name another OUT, or move it")


def _read(file: Path) -> Work | None:
    """What an earlier start decided; None where there was none, or it is damaged."""
    try:
        known: Any = parse_json(read_text(file, what=_MARK, limit=_LARGEST, error=RunError), what=_MARK, error=RunError)
        date, dtypes = datetime.date.fromisoformat(known["date"]), known["dtypes"]
    except (RunError, TypeError, KeyError, ValueError):
        return None
    fine = isinstance(dtypes, dict) and all(dtype in _DTYPES for dtype in dtypes.values())
    return Work(file.parent, date, dtypes) if fine and known.get("dpo_studio") == _OURS else None
