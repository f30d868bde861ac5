"""What a row and a file of rows may have at most, and the opening of both: nothing is read uncounted.

Every limit is far above what honest data has, and one line says which was met: memory and time follow from them, not
from untrusted data.
"""

from __future__ import annotations

import codecs
import gzip
import io
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from dpo_studio.errors import DataError
from dpo_studio.reading import is_deeper, open_input, shown_path

__all__ = [
    *("MAX_COLUMNS", "MAX_ROW", "MIB", "LIMITS", "TOO_DEEP", "TOO_LONG", "TOO_WIDE", "BadRow"),
    *("as_utf8", "checked", "numbered", "open_rows", "reading_rows", "too_many_values"),
]

MIB = 2**20
MAX_ROW = 16 * MIB
"""Bytes or characters of a row; no model reads an answer of four million tokens."""
MAX_COLUMNS = 10_000
"""Columns of a row; embeddings written one number a column have four thousand."""
MAX_DEPTH = 100
"""Levels of a row, which is looked through level by level; a dialogue with tool calls has eight."""
_MAX_VALUES = 1_000_000
"""Values of a row, each a Python object of some 60 bytes: the same 16 MiB as `[],[],...` would take half a gigabyte."""
_COUNT_FROM = MIB  # a shorter row cannot have so many


@dataclass(frozen=True, slots=True)
class SourceLimits:
    """How large a source of pairs may be, beyond what a row may be."""

    rows: int = 50_000_000
    """The largest public set of pairs has forty million."""
    line_bytes: int = 2**30
    """Of a line that is skipped: a longer line means that the file is not JSON Lines."""
    blank_lines: int = 1_000_000
    """One after the other: a .gz of nothing else is small, and takes minutes."""
    unfolded_times: int = 100
    """How many times its size a .gz may decompress to. Text decompresses to 3 to 20 times; only repetition to more."""
    unfolded_always: int = 64 * MIB
    """Bytes that any .gz may decompress to."""
    group_bytes: int = 4 * 2**30
    """Of a Parquet row group in memory, by the file's description: writers make 1 GiB at most."""
    group_values: int = 2**27
    """Of one column in a row group: writers make a million rows at most, each of a hundred turns."""
    files: int = 200_000
    """Files and folders in a source's folder: more is a home folder or a disk, not a set of pairs."""


LIMITS = SourceLimits()


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that is not even data."""

    reason: str


TOO_LONG = BadRow(f"row is longer than {MAX_ROW // MIB} MiB")
TOO_WIDE = BadRow(f"row has more than {MAX_COLUMNS:,} columns")
TOO_DEEP = BadRow(f"row is nested deeper than {MAX_DEPTH} levels")
_TOO_MANY = BadRow(f"row has more than {_MAX_VALUES:,} values")


def checked(row: object, opened: int) -> object:
    """The row; or what it has too much of. `opened`: brackets and braces in its text, at least its levels."""
    if opened > MAX_DEPTH and is_deeper(row, MAX_DEPTH):
        return TOO_DEEP
    return TOO_WIDE if isinstance(row, dict) and len(row) > MAX_COLUMNS else row


def too_many_values(text: str | bytes) -> BadRow | None:
    """Decided by a row's text before it is parsed."""
    if len(text) < _COUNT_FROM:
        return None
    marks = text.count(",") + text.count("[") if isinstance(text, str) else text.count(b",") + text.count(b"[")
    return _TOO_MANY if marks > _MAX_VALUES else None


def numbered(rows: Iterator[object], name: str) -> Iterator[tuple[int, object]]:
    """Every row with its number, from 0.

    Raises:
        DataError: there are more than any source has.
    """
    for number, row in enumerate(rows):
        if number >= LIMITS.rows:
            raise DataError(f"{name} has over {LIMITS.rows:,} rows", hint="give a part of it")
        yield number, row


@contextmanager
def reading_rows(path: Path | str) -> Iterator[BinaryIO]:
    """A source of rows, opened once; a .gz is decompressed. Errors while reading name it.

    Raises:
        DataError: it cannot be opened or read, or decompresses to too much.
    """
    with open_rows(path) as stream:
        try:
            yield stream
        except (OSError, EOFError, zlib.error) as error:  # EOFError: a gzip that ends too early
            raise DataError(
                f"{shown_path(path)} cannot be read: {error}",
                hint="is the file whole, and may you read it? download or copy it again",
            ) from None
        except UnicodeDecodeError:
            raise DataError(f"{shown_path(path)} is not UTF-8 text", hint=as_utf8(stream)) from None


def as_utf8(stream: BinaryIO) -> str:
    """How to make UTF-8 of it: UTF-16 begins with a mark, what else it may be only its owner knows."""
    stream.seek(0)
    utf16 = stream.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    old = "UTF-16" if utf16 else "WINDOWS-1252"
    says = "it begins as UTF-16 does" if utf16 else "Excel's old files are often Windows-1252"
    return f"save it as UTF-8 ({says}: iconv -f {old} -t UTF-8 OLD > NEW)"


def open_rows(path: Path | str) -> BinaryIO:
    """The bytes of a source: those of a .gz decompressed, and counted."""
    stream = open_input(path, what="source")
    if not os.fspath(path).lower().endswith(".gz"):
        return stream
    return io.BufferedReader(_Unfolded(stream, shown_path(path)), MIB)


class _Unfolded(io.RawIOBase):
    """The content of a gzip, up to the most that text of that size can be."""

    def __init__(self, folded: BinaryIO, name: str) -> None:
        size = os.fstat(folded.fileno()).st_size
        self._folded, self._gzip, self._name = folded, gzip.GzipFile(fileobj=folded), name
        self._most, self._so_far = max(LIMITS.unfolded_always, LIMITS.unfolded_times * size), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._gzip.readinto(buffer)
        self._so_far += count
        if self._so_far > self._most:
            raise DataError(
                f"{self._name} decompresses to over {self._most // MIB:,} MiB, {LIMITS.unfolded_times} times its size",
                hint="text does not; if you trust it, unpack it with gunzip and name the result",
            )
        return count

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._so_far = self._gzip.seek(offset, whence)
        return self._so_far

    def close(self) -> None:
        self._gzip.close()
        self._folded.close()
        super().close()
