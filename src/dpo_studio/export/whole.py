"""A folder that appears completely or not at all, after a check of the disk's space."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from dpo_studio.disk import ROOM, make_folder, put_folder, remove_leftovers_of, scratch_folder, write_atomically
from dpo_studio.errors import DataError, RunError
from dpo_studio.reading import read_json
from dpo_studio.writing import check_run_place, resolved

__all__ = ["Making", "check_new", "making"]

MARKERS = ("export.json", "quantization.json")
"""The marker of every exported folder: how it was made, and the names of its files."""
_LARGEST_MARKER = 20_000_000


@dataclass(frozen=True)
class Making:
    """The folders in which an export is made."""

    result: Path
    """The files of the output."""
    work: Path
    """Temporary files."""


@contextmanager
def making(out: Path, *, overwrite: bool = False) -> Iterator[Making]:
    """Inside, a hidden folder next to `out`; its result becomes `out` if the block succeeds. It is always removed.

    Raises:
        RunError: `out` exists and may not be replaced, or the disk is full or read-only.
    """
    check_new(out, overwrite=overwrite)
    out = resolved(out, "OUT")
    try:
        remove_leftovers_of(out)
        with scratch_folder(out) as scratch:
            place = Making(scratch / "result", scratch / "work")
            make_folder(place.result)
            make_folder(place.work)
            yield place
            check_new(out, overwrite=overwrite)
            _sign(place.result)
            _share(place.result)
            put_folder(place.result, out)
    except (OSError, SafetensorError) as error:
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise RunError(f"{out} cannot be written: {reason}", hint=ROOM if full else None) from None


def _share(folder: Path) -> None:
    """Files as readable as any new one here: safetensors writes its own for the owner alone."""
    mode = folder.stat().st_mode & 0o666
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(mode)


def check_new(out: Path, *, reads: Iterable[str | Path | None] = (), overwrite: bool = False) -> None:
    """Check before long work: a folder is replaced only if it is ours and contains no other files.

    Raises:
        RunError: there is something, or it would be in what is read, in a model or in a run.
    """
    if not out.name:
        raise RunError(f"{out} is not the name of a new folder")
    check_run_place(out, reads, option="OUT")
    if not (out.exists() or out.is_symlink()):
        return
    if not overwrite:
        raise RunError(f"{out} exists", hint="choose another folder, or remove this one")
    if not _is_ours(resolved(out, "OUT")):
        raise RunError(
            f"{out} exists, and contains something that DPO Studio did not write there",
            hint="choose another folder, or remove this one yourself: --overwrite replaces only a whole export",
        )


def _sign(folder: Path) -> None:
    """The names of all files into the marker: with any other file in it, the folder is not replaced."""
    for marker in MARKERS:
        if (folder / marker).is_file():
            content = read_json(folder / marker, what="the export's own file", limit=_LARGEST_MARKER)
            content["files"] = _names(folder)
            write_atomically(folder / marker, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _is_ours(folder: Path) -> bool:
    """Whether it contains our marker, the files that this names, and nothing else."""
    if not folder.is_dir():
        return False
    for marker in MARKERS:
        with suppress(DataError):
            content = read_json(folder / marker, what="the export's own file", limit=_LARGEST_MARKER)
            if isinstance(content, dict) and content.get("files") == _names(folder):
                return True
    return False


def _names(folder: Path) -> list[str]:
    """Every file, link and empty folder in it."""
    within = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir() or not any(path.iterdir())]
    return sorted(str(path.relative_to(folder)) for path in within)
