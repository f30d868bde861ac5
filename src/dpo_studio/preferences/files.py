"""One file -> its raw rows, in order, one at a time: JSON Lines, JSON, CSV, Parquet.

Nothing here knows what a pair is: a row is whatever one line, array element or record holds. What cannot be read is a
`DataError` naming the file and the line: a reader that skips what it does not understand would train on something
other than what it was given. Memory does not grow with the file: one row is at hand at a time, and a row has a limit.
NaN and Infinity, which Python and pandas write for what is missing, are read as null.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

from dpo_studio.errors import DataError

__all__ = ["SUFFIXES", "BadRow", "file_rows"]

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet", ".csv")
_MIB = 2**20
_MAX_ROW = 16 * _MIB  # bytes or characters; no model reads an answer of four million tokens
_MAX_WHOLE = 64 * _MIB  # an object around the array is read whole: some 1 GB of Python objects at the worst
_ROWS_AT_ONCE = 256
_DECODER = json.JSONDecoder(parse_constant=lambda name: None)
_ARRAY_OR_LINES = "an array of objects, or one object a line"
_SPACE = re.compile(r"[ \t\n\r]*")


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that is not even data."""

    reason: str


_TOO_LONG = BadRow(f"row is longer than {_MAX_ROW // _MIB} MiB")


def file_rows(path: Path) -> Iterator[object]:
    name = path.name.lower()
    if name.endswith((".jsonl", ".jsonl.gz")):
        return _json_lines(path)
    if name.endswith((".json", ".json.gz")):
        return _json_rows(path)
    if name.endswith(".csv"):
        return _csv_rows(path)
    if name.endswith(".parquet"):
        return _parquet_rows(path)
    raise DataError(f"{path} is not a kind of file that is read", hint=f"these are: {', '.join(SUFFIXES)}")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:  # EOFError: a gzip that ends too early
        raise DataError(
            f"{path} cannot be read: {error}", hint="is the file whole, and may you read it? download or copy it again"
        ) from None
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8 text", hint=_as_utf8(path)) from None


def _as_utf8(path: Path) -> str:
    """How to make UTF-8 of it: UTF-16 begins with a mark, what else it may be only its owner knows."""
    with _open(path) as stream:
        utf16 = stream.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    old = "UTF-16" if utf16 else "WINDOWS-1252"
    says = "it begins as UTF-16 does" if utf16 else "Excel's old files are often Windows-1252"
    return f"save it as UTF-8 ({says}: iconv -f {old} -t UTF-8 OLD > NEW)"


def _open(path: Path) -> BinaryIO:
    zipped = path.name.lower().endswith(".gz")
    return cast("BinaryIO", io.BufferedReader(cast(Any, gzip.open(path))) if zipped else path.open("rb"))


# JSON


def _json_lines(path: Path) -> Iterator[object]:
    """One row a line; blank lines are no rows. Only a newline ends a line: U+2028 may stand in an answer."""
    with _reading(path), _open(path) as stream:
        for number, line in enumerate(_lines(stream), 1):
            if line is None:
                yield _TOO_LONG
                continue
            text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if text.strip():
                yield _parse_line(text, path, number)


def _lines(stream: BinaryIO) -> Iterator[bytes | None]:
    """The lines of a file; None for one that is too long, whose rest is passed over."""
    while line := stream.readline(_MAX_ROW):
        if len(line) < _MAX_ROW or line.endswith(b"\n"):
            yield line
            continue
        while (rest := stream.readline(_MAX_ROW)) and not rest.endswith(b"\n"):
            pass
        yield None


def _parse_line(line: bytes, path: Path, number: int) -> object:
    where = f"{path}, line {number}"
    try:
        return _parse(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise DataError(f"{where}: not UTF-8 text", hint=_as_utf8(path)) from None
    except (ValueError, RecursionError) as error:
        hint = "each line holds one JSON object" + (
            "; a file that is one JSON array is named .json" if line.lstrip()[:1] == b"[" else ""
        )
        raise DataError(f"{where}: not JSON ({_why(error)})", hint=hint) from None


def _json_rows(path: Path) -> Iterator[object]:
    """An array of rows, an object with one array inside, one row alone, or JSON Lines under another name."""
    with _reading(path), io.TextIOWrapper(_open(path), encoding="utf-8-sig") as stream:
        head = _past_space("", stream)
        if head.startswith("["):
            yield from _elements(head[1:], stream, path)
            return
        if "\n" not in head:
            head += stream.readline(_MAX_ROW)
        first, _, rest = head.partition("\n")
        lines = _is_json(first) and bool(_past_space(rest, stream))
        if not lines:
            yield from _whole(head + stream.read(_MAX_WHOLE), path)
    if lines:
        yield from _json_lines(path)


def _past_space(text: str, stream: TextIO) -> str:
    """The text without white space before it, and the next of the stream where it is nothing else; empty at the end."""
    while not (text := text.lstrip()) and (text := stream.read(_MIB)):
        pass
    return text


def _elements(text: str, stream: TextIO, path: Path) -> Iterator[object]:
    """The elements of an array whose `[` has been read, one at a time. What fails on a text cut short is read on."""
    text = _past_space(text, stream)
    at, row, more = 0, 0, not text.startswith("]")
    while more:
        try:
            element, end, mark = _element(text, at)
        except (ValueError, IndexError, RecursionError) as error:
            rest = text[at:]
            hopeless = isinstance(error, RecursionError) or len(rest) > _MAX_ROW
            # As much again as there is: a long row is tried a few times, not once a MiB.
            if hopeless or not (next_ := stream.read(max(_MIB, len(rest)))):
                raise _bad_element(path, row, rest, error) from None
            text, at = rest + next_, 0
            continue
        yield element
        at, row, more = end + 1, row + 1, mark == ","
    if _past_space(text[at:].removeprefix("]") if row == 0 else text[at:], stream):
        raise DataError(f"{path}: not JSON (something follows the array)", hint=_ARRAY_OR_LINES)


def _element(text: str, at: int) -> tuple[object, int, str]:
    """The element that begins here, where the comma or bracket after it stands, and which of the two it is."""
    element, end = _DECODER.raw_decode(text, _after_space(text, at))
    end = _after_space(text, end)
    if text[end] not in ",]":
        raise json.JSONDecodeError("no comma after it", text, end)
    return element, end, text[end]


def _after_space(text: str, at: int) -> int:
    return cast("re.Match[str]", _SPACE.match(text, at)).end()


def _bad_element(path: Path, row: int, rest: str, error: Exception) -> DataError:
    why = _why(error) if len(rest) <= _MAX_ROW else f"it is broken, or longer than {_MAX_ROW // _MIB} MiB"
    return DataError(f"{path}, row {row}: not JSON ({why})", hint=_ARRAY_OR_LINES)


def _whole(text: str, path: Path) -> Iterator[object]:
    if not text.strip():
        return
    if len(text) > _MAX_WHOLE:
        raise DataError(
            f"{path} is one JSON object of more than {_MAX_WHOLE // _MIB} MiB",
            hint="write the array of rows alone, or one object a line",
        )
    try:
        whole = _parse(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({_why(error)})", hint=_ARRAY_OR_LINES) from None
    yield from _array_in(whole)


def _array_in(whole: object) -> list[object]:
    if isinstance(whole, dict) and not whole.keys() & {"chosen", "rejected"}:
        arrays = [value for value in whole.values() if isinstance(value, list)]
        if len(arrays) == 1:
            return cast("list[object]", arrays[0])
    return [whole]


def _parse(text: str) -> object:
    return cast(object, _DECODER.decode(text))


def _is_json(line: str) -> bool:
    try:
        _parse(line)
    except (ValueError, RecursionError):
        return False
    return True


def _why(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, IndexError):
        return "it ends too early"
    return error.msg if isinstance(error, json.JSONDecodeError) else "a number of thousands of digits"


# CSV and Parquet


def _csv_rows(path: Path) -> Iterator[object]:
    """Rows by the header's names. A row too long has a key None, a row too short has None values (csv.DictReader).

    Commas stand between fields; or semicolons or tabs, where the header has none of the former: one column is no pair.
    """
    csv.field_size_limit(_MAX_ROW)  # its own limit of 131,072 characters is shorter than some answers
    with _reading(path), io.TextIOWrapper(_open(path), encoding="utf-8-sig", newline="") as stream:
        header = stream.readline(_MAX_ROW)
        delimiter = next((mark for mark in ",;\t" if mark in header), ",")
        reader = csv.DictReader(_csv_lines(header, stream), strict=True, delimiter=delimiter)
        try:
            yield from reader
        except csv.Error as error:
            raise DataError(
                f"{path}, the row from line {reader.line_num + 1} on: not CSV ({error})",
                hint='a field with a comma, quote or newline stands in double quotes, a quote in it is written ""',
            ) from None


def _csv_lines(line: str, stream: TextIO) -> Iterator[str]:
    while line:
        if len(line) == _MAX_ROW:
            raise csv.Error(f"longer than {_MAX_ROW // _MIB} MiB")
        yield line
        line = stream.readline(_MAX_ROW)


def _parquet_rows(path: Path) -> Iterator[object]:
    parquet: Any = import_module("pyarrow.parquet")  # half a second, and only Parquet needs it
    try:
        with _reading(path), parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE):
                columns = [_values(column) for column in batch.columns]
                yield from (dict(zip(batch.schema.names, row, strict=True)) for row in zip(*columns, strict=True))
    except DataError:
        raise
    except Exception as error:  # pyarrow raises dozens of kinds, KeyErrors for time zones among them
        raise DataError(
            f"{path}: not a Parquet file that can be read ({' '.join(str(error).split())})",
            hint="download or write it again",
        ) from None


def _values(column: Any) -> list[object]:
    """A column's values; where Python has none for them (a time of nanoseconds), their type, which is no text."""
    try:
        return cast("list[object]", column.to_pylist())
    except Exception:  # whatever it is, only a row that needs this column suffers
        return [column.type] * len(column)
