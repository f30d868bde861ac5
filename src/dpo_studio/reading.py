"""The one gate for what is read: regular files, opened once, and no more of them than a limit says.

A name leads anywhere: to a pipe nobody writes to, a device without an end, a socket, or a link to one of them. What was
opened is therefore looked at after it was opened, without waiting for it, and only a regular file is read; whatever
looks at a name first and opens it afterwards may open something else. The streams that this process was started with
(`-`, /dev/stdin, /dev/fd/N) are read where the user may name one: they end, or are ended. Untrusted JSON has one
reader, with limits.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import math
import os
import re
import select
import stat
import tempfile
from dataclasses import dataclass
from typing import Any, BinaryIO, NoReturn

from dpo_studio.errors import DataError, DPOStudioError

__all__ = [
    "input_text",
    "is_own_stream",
    "kind_of_file",
    "open_input",
    "open_regular",
    "parse_json",
    "read_bytes",
    "read_json",
    "read_text",
    "sha256_of",
    "shown_path",
]

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe (FIFO)"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)
_DEPTH = 100
"""Levels of JSON. A model's settings have eight; Python's own limit is a thousand, less what the caller has used."""
_DIGITS = 100
"""Digits of a whole number. transformers writes 1000000000000000019884624838656 for "no limit"; from 309 on a number
fits no float, from 4,300 on Python reads none."""
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_OWN_STREAM = re.compile(r"-|/dev/stdin|/(?:dev|proc/self)/fd/(\d{1,6})")
_NULL = os.makedev(1, 3)
"""The device without content, which cron and the like give a process as its input."""
_PIECE = 2**20


@dataclass(frozen=True)
class StreamLimits:
    """What is read of a stream that is not a file."""

    size: int = 4 * 2**30
    """Bytes. Ten times the largest public set of pairs as JSON Lines; kept in the folder for temporary files."""
    silence: float = 60.0
    """Seconds without a byte: a program that takes longer to begin is better asked to write a file."""


STREAM_LIMITS = StreamLimits()
_ONLY_FILES = "only regular files are read: write what it gives to a file, and name that"


def shown_path(path: str | os.PathLike[str]) -> str:
    """A path as text that every file and terminal can take: bytes that are not UTF-8 as `\\xff`, `-` as stdin."""
    if os.fspath(path) == "-":
        return "stdin"
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def open_regular(path: str | os.PathLike[str], *, what: str, error: type[DPOStudioError] = DataError) -> BinaryIO:
    """Open a regular file for reading, without waiting for anything.

    Args:
        path: The file; links are followed.
        what: What it is to the user, for the message: `recipe`, `the run's result`.
        error: The project's error that is raised.

    Raises:
        DPOStudioError: there is no such file, it may not be read, or it is a pipe, device, socket or folder.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except (OSError, ValueError) as failure:  # ValueError: a NUL in the name
        _refuse(path, what, failure, error)
    kind = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(kind):
        os.close(descriptor)
        hint = None if stat.S_ISDIR(kind) else _ONLY_FILES
        raise error(f"{what}: {shown_path(path)} is {kind_of_file(kind)}, not a file", hint=hint)
    return open(descriptor, "rb")  # noqa: PTH123 - what was looked at, not a name


# What this process was started with


def is_own_stream(name: str | os.PathLike[str]) -> bool:
    """Whether the name means a stream that this process was given as it started: `-`, /dev/stdin, /dev/fd/N."""
    return _OWN_STREAM.fullmatch(os.fspath(name)) is not None


def open_input(name: str | os.PathLike[str], *, what: str, error: type[DPOStudioError] = DataError) -> BinaryIO:
    """What a user may name to be read: a regular file, or a stream that this process was started with.

    A stream may be opened again, and then begins where it began the first time: it is kept once it was read.

    Raises:
        DPOStudioError: as `open_regular`; or the stream is closed, a device without an end, silent, or too long.
    """
    found = _OWN_STREAM.fullmatch(os.fspath(name))
    if found is None:
        return open_regular(name, what=what, error=error)
    try:
        return io.BufferedReader(_kept(int(found[1] or 0), f"{what}: {shown_path(name)}", error), _PIECE)
    except OSError as failure:
        hint = "is it open? `COMMAND | dpo ...` or `dpo ... < FILE` give one"
        raise error(f"{what}: {shown_path(name)} cannot be read: {failure.strerror}", hint=hint) from None


class _Kept(io.RawIOBase):
    """The content of an open descriptor from some place on, whatever else reads it. Closing this leaves it open."""

    def __init__(self, descriptor: int, start: int) -> None:
        self._descriptor, self._start, self._at = descriptor, start, start

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = os.pread(self._descriptor, len(buffer), self._at)
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        ends = {os.SEEK_SET: self._start, os.SEEK_CUR: self._at}
        self._at = ends.get(whence, -1) + offset if whence in ends else os.fstat(self._descriptor).st_size + offset
        return self._at - self._start


_STREAMS: dict[tuple[int, int, int], tuple[int, int]] = {}
"""Of each stream that was opened, by its number, device and inode (a number alone is used again): the descriptor that
holds its content, and where that begins."""


def _kept(number: int, what: str, error: type[DPOStudioError]) -> _Kept:
    status = os.fstat(number)
    key = number, status.st_dev, status.st_ino
    if key not in _STREAMS:
        if stat.S_ISREG(status.st_mode):
            _STREAMS[key] = os.dup(number), os.lseek(number, 0, os.SEEK_CUR)
        elif not (stat.S_ISFIFO(status.st_mode) or stat.S_ISSOCK(status.st_mode) or _ends(number, status)):
            raise error(f"{what} is {kind_of_file(status.st_mode)}, not a file, pipe or terminal")
        else:
            _STREAMS[key] = _copied(number, what, error), 0
    return _Kept(*_STREAMS[key])


def _ends(number: int, status: os.stat_result) -> bool:
    """Whether a device is one that ends: a terminal does, by Ctrl-D."""
    return stat.S_ISCHR(status.st_mode) and (status.st_rdev == _NULL or os.isatty(number))


def _copied(number: int, what: str, error: type[DPOStudioError]) -> int:
    """The descriptor of a nameless file that holds all that comes from a stream until it ends."""
    with tempfile.TemporaryFile() as file:
        total = 0
        while piece := _next_piece(number, what, error):
            total += len(piece)
            if total > STREAM_LIMITS.size:
                raise error(f"{what} gives over {STREAM_LIMITS.size:,} bytes", hint="write it to a file, and name that")
            file.write(piece)
        file.flush()
        return os.dup(file.fileno())


def _next_piece(number: int, what: str, error: type[DPOStudioError]) -> bytes:
    if not select.select([number], [], [], STREAM_LIMITS.silence)[0]:
        hint = "does its writer still run, and end? write its output to a file first, and name that"
        raise error(f"{what} gave no byte for {STREAM_LIMITS.silence:.0f} seconds", hint=hint)
    return os.read(number, _PIECE)


def kind_of_file(mode: int) -> str:
    """`a named pipe`, `a device`, `a socket`, `a folder`: of an `st_mode`, for a message."""
    return next((name for is_one, name in _KINDS if is_one(mode)), "something else")


def _refuse(
    path: str | os.PathLike[str], what: str, failure: OSError | ValueError, error: type[DPOStudioError]
) -> NoReturn:
    shown = shown_path(path)
    if isinstance(failure, FileNotFoundError | NotADirectoryError):
        raise error(f"{what}: no such file: {shown}") from None
    if isinstance(failure, OSError) and failure.errno in (errno.ENXIO, errno.ENODEV):  # what sockets say when opened
        raise error(f"{what}: {shown} is a socket or a device, not a file", hint=_ONLY_FILES) from None
    why = failure.strerror if isinstance(failure, OSError) else str(failure)
    raise error(f"{what}: {shown} cannot be read: {why}") from None


def read_bytes(
    path: str | os.PathLike[str], *, what: str, limit: int, error: type[DPOStudioError] = DataError
) -> bytes:
    """The whole of a regular file of at most `limit` bytes, whatever size its folder says it has.

    Raises:
        DPOStudioError: as `open_regular`; or it is longer.
    """
    with open_regular(path, what=what, error=error) as file:
        return _content(file, path, what, limit, error)


def _content(file: BinaryIO, path: str | os.PathLike[str], what: str, limit: int, error: type[DPOStudioError]) -> bytes:
    try:
        size = _size(file)  # a gigabyte need not be read to be known as too much
        content: bytes | None = file.read(limit + 1) if size <= limit else b""
    except OSError as failure:
        _refuse(path, what, failure, error)
    if content is None:  # a kernel's file without content yet
        raise error(f"{what}: {shown_path(path)} has no content to read now")
    if max(size, len(content)) > limit:  # a pipe says 0, and a file may grow
        raise error(f"{what}: {shown_path(path)} is over {limit:,} bytes", hint="is this the file that was meant?")
    return content


def _size(file: BinaryIO) -> int:
    """Bytes that the file says it has, 0 of a stream that was kept."""
    try:
        return os.fstat(file.fileno()).st_size
    except io.UnsupportedOperation:
        return 0


def sha256_of(path: str | os.PathLike[str], *, what: str, error: type[DPOStudioError] = DataError) -> bytes:
    """The sha256 of a regular file of any size, read a MiB at a time.

    Raises:
        DPOStudioError: as `open_regular`.
    """
    digest = hashlib.sha256()
    with open_regular(path, what=what, error=error) as file:
        while block := file.read(_PIECE):
            digest.update(block)
    return digest.digest()


def read_text(path: str | os.PathLike[str], *, what: str, limit: int, error: type[DPOStudioError] = DataError) -> str:
    """The same as UTF-8 text.

    Raises:
        DPOStudioError: as `read_bytes`; or it is not UTF-8.
    """
    return _as_text(read_bytes(path, what=what, limit=limit, error=error), path, what, error)


def input_text(name: str | os.PathLike[str], *, what: str, limit: int, error: type[DPOStudioError] = DataError) -> str:
    """UTF-8 text of what a user may name to be read, as `open_input`.

    Raises:
        DPOStudioError: as `open_input`; or it is longer than `limit` bytes, or not UTF-8.
    """
    with open_input(name, what=what, error=error) as file:
        return _as_text(_content(file, name, what, limit, error), name, what, error)


def _as_text(content: bytes, path: str | os.PathLike[str], what: str, error: type[DPOStudioError]) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise error(f"{what}: {shown_path(path)} is not UTF-8 text", hint="save it as UTF-8") from None


def read_json(
    path: str | os.PathLike[str],
    *,
    what: str,
    limit: int,
    depth: int = _DEPTH,
    finite: bool = True,
    hint: str | None = None,
    error: type[DPOStudioError] = DataError,
) -> Any:
    """`parse_json` of a regular file of at most `limit` bytes.

    Raises:
        DPOStudioError: as `read_bytes` and `parse_json`.
    """
    content = read_bytes(path, what=what, limit=limit, error=error)
    where = f"{what}: {shown_path(path)}"
    return parse_json(content, what=where, depth=depth, finite=finite, hint=hint, error=error)


def parse_json(
    text: str | bytes,
    *,
    what: str,
    depth: int = _DEPTH,
    finite: bool = True,
    hint: str | None = None,
    error: type[DPOStudioError] = DataError,
) -> Any:
    """Untrusted JSON: the result is finite, shallow, and text that can be written again.

    Args:
        text: UTF-8 where it is bytes. Its length is the caller's to bound.
        what: Whose JSON it is, for the message.
        depth: Levels of arrays and objects it may have.
        finite: Refuse NaN, Infinity and numbers that overflow. Settings of some models hold Infinity.
        hint: What to do about it.
        error: The project's error that is raised.

    Raises:
        DPOStudioError: no JSON, too deep, a number of over a hundred digits, a key twice with different values, half a
            surrogate pair, or (finite) a number that is none.
    """
    try:
        plain = text.decode("utf-8") if isinstance(text, bytes) else text
        value = json.loads(
            plain,
            object_pairs_hook=_object,
            parse_int=_whole_number,
            parse_float=_finite_number if finite else float,
            parse_constant=_no_number if finite else float,
        )
        if is_deeper(value, depth):
            raise RecursionError
        if _SURROGATE.search(plain):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as failure:
        raise error(f"{what}: not JSON that can be used ({_why(failure, depth)})", hint=hint) from None
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        for key, value in pairs:
            if value != made[key]:
                raise ValueError(f"the key {key[:80]!r} occurs twice, with different values")
    return made


def _whole_number(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise ValueError(f"a number of {len(digits):,} digits")
    return int(digits)


def _finite_number(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits[:20]} is too large for a number")
    return number


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


def is_deeper(value: Any, depth: int) -> bool:
    """Whether JSON has more levels. One pass a level over its arrays and objects: their texts cost next to nothing."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(depth):
        members = (member for one in level for member in (one.values() if isinstance(one, dict) else one))
        level = [member for member in members if isinstance(member, dict | list)]
        if not level:
            return False
    return True


def _why(failure: Exception, depth: int) -> str:
    if isinstance(failure, RecursionError):
        return f"nested deeper than {depth} levels"
    if isinstance(failure, json.JSONDecodeError):
        return f"{failure.msg}, line {failure.lineno} column {failure.colno}"
    if isinstance(failure, UnicodeDecodeError):
        return "not UTF-8 text"
    if isinstance(failure, UnicodeEncodeError):
        return "half a surrogate pair, which no text has"
    return str(failure)
