"""The one gate for what is written: no output replaces a file unasked, mixes with foreign files, or is half there.

A command's outputs are checked before its long work begins (`check_outputs`, `check_continued`, `check_run_place`),
and appear whole (`appearing`, `write_output`; `disk` says how). A link is judged by where it leads.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Literal, TextIO

from dpo_studio.config import BUNDLED
from dpo_studio.disk import OVERWRITE, ROOM, finish, give_name, scratch_file, unwritable, write_atomically
from dpo_studio.errors import DataError, RunError, UsageError
from dpo_studio.paths import user_path
from dpo_studio.reading import open_regular
from dpo_studio.runs.folder import was_begun

__all__ = [
    "appearing",
    "check_continued",
    "check_outputs",
    "check_run_place",
    "resolved",
    "stream_of",
    "write_output",
]

_STDOUT = frozenset({"/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"})
_SYSTEM = ("/dev", "/proc", "/sys")
_MODEL_MARKS = ("adapter_config.json", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
_CONFIG_MARKS = ("tokenizer_config.json", "tokenizer.json", "generation_config.json")
"""One of them beside `config.json` makes a model; that file alone may be any program's."""
_LONGEST_FIRST_LINE = 16 * 2**20
_BESIDE = "choose a folder next to it, not in it"
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS})


def stream_of(path: Path) -> Literal["stdout", "null"] | None:
    """Whether an output is not a file but our own stdout (`-`, /dev/stdout) or /dev/null, by name or through links."""
    if str(path) == "-":
        return "stdout"
    place = os.path.normpath(f"/{str(Path(path).absolute()).lstrip('/')}")
    for _ in range(40):  # as many links as Linux follows
        if place in _STDOUT or place == "/dev/null":
            return "null" if place == "/dev/null" else "stdout"
        try:
            place = os.path.normpath(Path(place).parent / Path(place).readlink())
        except (OSError, ValueError):
            return None
    return None


def resolved(path: Path, option: str) -> Path:
    """Where an output leads, links followed, whether anything is there or not.

    Raises:
        UsageError: no file can have this name, or its links go in a circle.
    """
    circle = False
    try:
        there = Path(path).resolve()
        with suppress(FileNotFoundError, NotADirectoryError):
            circle = stat.S_ISLNK(there.lstat().st_mode)
    except RuntimeError:  # what Python 3.11 makes of a circle
        circle = True
    except (OSError, ValueError) as error:
        raise UsageError(f"{option} {path} is not the name of a file: {error}") from None
    if circle:
        raise UsageError(f"{option} {path} is a link that leads nowhere")
    return there


def check_outputs(
    outputs: Mapping[str, Path] | Sequence[tuple[str, Path]],
    *,
    reads: Iterable[str | Path | None] = (),
    continued: Mapping[str, Path | None] | None = None,
    overwrite: bool = False,
) -> None:
    """Before anything long begins: whether each output, by its option, can be written where it is to go.

    `reads`: sources, models and files that the command reads; a Hub id among them is not a place.
    `continued`: files that it adds to, for which `check_continued` is asked.

    Raises:
        UsageError: not a file, two of one name, or what is read, or in a model, a run or a source's folder.
        DataError: it exists, and nobody said `overwrite`.
    """
    listed = list(outputs.items()) if isinstance(outputs, Mapping) else list(outputs)
    read = _places(reads)
    taken = [(option, resolved(path, option)) for option, path in (continued or {}).items() if path is not None]
    for option, path in listed:
        if stream_of(path) is not None:
            continue
        there = resolved(path, option)
        _check_file(there, option, path)
        for other, place in taken:
            if _same(there, place):
                raise UsageError(f"{option} {path} and {other} are one file: it would be written twice")
        taken.append((option, there))
        _refuse_what_is_read(there, read, option, path)
        refuse_place(there.parent, f"{option} {path}")
        if there.exists() and not overwrite:
            raise DataError(f"{option} {path} exists", hint=OVERWRITE)


def check_continued(
    path: Path, is_ours: Callable[[bytes], bool], *, option: str, what: str, reads: Iterable[str | Path | None] = ()
) -> None:
    """Before anything long begins: whether lines can be added to a file, which is new or whose first line is ours.

    Its folder is made if it is not there.

    Raises:
        UsageError: not a file, or what is read, or in a model, a run or a source's folder.
        DataError: somebody else's file.
    """
    there = resolved(path, option)
    if stream_of(path) is not None:
        raise UsageError(f"{option} {path} is not a file")
    _refuse_what_is_read(there, _places(reads), option, path)
    refuse_place(there.parent, f"{option} {path}")
    nearest = next(folder for folder in there.parents if os.path.lexists(folder))
    if not nearest.is_dir() or not os.access(there if there.exists() else nearest, os.W_OK):
        raise UsageError(f"{option} {path} cannot be written")
    if there.exists():
        with open_regular(there, what=option, error=UsageError) as lines:
            if not is_ours(lines.readline(_LONGEST_FIRST_LINE)):
                raise DataError(
                    f"{option} {path} is not {what}: its first line is not one that DPO Studio wrote",
                    hint="name another file; if it is ours and its first line is damaged, remove that line",
                )


def check_run_place(folder: Path, reads: Iterable[str | Path | None], *, option: str = "run.folder") -> None:
    """Before a folder is made for a run, a sweep or an export: it is not inside anything that is read, a model or a
    run.

    Raises:
        RunError: it does.
    """
    there = resolved(folder, option)
    for place in _places(reads):
        if place.is_dir() and (there == place or place in there.parents):
            raise RunError(f"{option} {folder} is in {place}, which is read", hint=_BESIDE)
        if _same(there, place):
            raise RunError(f"{option} {folder} is a file that is read", hint="choose another folder")
    try:
        refuse_place(there.parent, f"{option} {folder}")
    except UsageError as error:
        raise RunError(error.message, hint=error.hint) from None


def refuse_place(folder: Path, what: str) -> None:
    """Nothing is written into a model, a run or the system's own folders, however deep.

    Raises:
        UsageError: `folder` is one, or in one.
    """
    for place in (folder, *folder.parents):
        if str(place) in _SYSTEM and not folder.is_relative_to("/dev/shm"):  # noqa: S108 - a disk like any other
            raise UsageError(f"{what} is in {place}, which is the system's", hint="choose another folder")
        kind = "a run" if was_begun(place) else "a model" if _is_model(place) else None
        if kind is not None:
            raise UsageError(
                f"{what} is in {place}, which is {kind}: nothing else is written there",
                hint=_BESIDE,
            )


def write_output(file: Path, content: str | bytes, *, overwrite: bool, spill: bool = False) -> None:
    """Write a checked output: a stream line by line, a file completely or not at all.

    `spill`: where a file cannot be written, its lines go to stdout before the error is reported: they took hours.

    Raises:
        DataError: it has come to exist meanwhile; what was made is kept under the name that is said.
        RunError: the disk is full or read-only; what was at `file` is still there.
    """
    stream = stream_of(file)
    if stream == "stdout":
        sys.stdout.write(content if isinstance(content, str) else content.decode())
    if stream is not None:
        return
    try:
        write_atomically(resolved(file, "output"), content, overwrite=overwrite)
    except RunError as error:
        if spill:
            sys.stdout.write(content if isinstance(content, str) else content.decode())
            error.message += "; its lines are on stdout"
        raise


@contextmanager
def appearing(files: Sequence[Path], *, overwrite: bool) -> Iterator[list[TextIO]]:
    """Checked outputs that are written row by row and take their names when all is done; the first given is last.

    Raises:
        DataError, RunError: as `write_output`.
    """
    with ExitStack() as opened:
        streams: list[TextIO] = []
        parts: list[tuple[Path, FileIO, TextIO, Path]] = []
        for file in files:
            kind = stream_of(file)
            if kind is not None:
                streams.append(sys.stdout if kind == "stdout" else opened.enter_context(_text(os.devnull)))
                continue
            there = resolved(file, "output")
            scratch, written = opened.enter_context(scratch_file(there))
            streams.append(opened.enter_context(_text(written.fileno())))
            parts.append((scratch, written, streams[-1], there))
        try:
            yield streams
            for _, written, text, there in parts:
                text.flush()
                finish(written, there)
            for scratch, _, _, there in reversed(parts):
                give_name(scratch, there, overwrite=overwrite)
        except OSError as error:
            if error.errno not in _FULL or not parts:
                raise
            raise unwritable(parts[0][3], error, ROOM) from None


@contextmanager
def _text(file: str | int) -> Iterator[TextIO]:
    text = open(file, "w", encoding="utf-8", newline="\n", closefd=isinstance(file, str))  # noqa: SIM115
    try:
        yield text
    finally:
        with suppress(OSError):  # what could not be flushed has been reported
            text.close()


def _check_file(there: Path, option: str, path: Path) -> None:
    """In a folder that can be written; nothing but a regular file is ever replaced."""
    if there.exists() and not there.is_file():
        raise UsageError(f"{option} {path} is not a file")
    if not there.parent.is_dir():
        raise UsageError(f"{option} {path}: no such folder")
    if not os.access(there.parent, os.W_OK | os.X_OK):
        raise UsageError(f"{option} {path}: nothing can be written into its folder")


def _refuse_what_is_read(there: Path, read: Sequence[Path], option: str, path: Path) -> None:
    for place in read:
        if place in there.parents:
            raise UsageError(f"{option} {path} is in {place}, which is read", hint=_BESIDE)
        if _same(there, place):
            raise UsageError(f"{option} {path} is what is read: it would be replaced", hint="choose another name")


def _places(reads: Iterable[str | Path | None]) -> list[Path]:
    """The files and folders of this machine among them; `FILE:split` is the file."""
    found = []
    for name in map(str, filter(None, reads)):
        if name.startswith(BUNDLED):
            continue
        for text in (name, name.rpartition(":")[0]):
            with suppress(OSError, RuntimeError, ValueError, UsageError):
                if text and user_path(text).exists():
                    found.append(user_path(text).resolve())
    return found


def _same(one: Path, other: Path) -> bool:
    """One file, by its name or as two names of it."""
    try:
        return one == other or one.samefile(other)
    except OSError:
        return False


def _is_model(folder: Path) -> bool:
    if any((folder / name).exists() for name in _MODEL_MARKS):
        return True
    return (folder / "config.json").is_file() and any((folder / name).exists() for name in _CONFIG_MARKS)
