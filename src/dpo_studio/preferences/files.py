"""One file -> its raw rows, in order, one at a time: JSON Lines, JSON, CSV, Parquet.

Nothing here knows what a pair is: a row is whatever one line, array element or record holds. What cannot be read is a
`DataError` naming the file and the line: a reader that skips what it does not understand would train on something
other than what it was given.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, cast

from dpo_studio.errors import DataError

__all__ = ["SUFFIXES", "file_rows"]

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet", ".csv")
_MAX_CSV_FIELD = 2**31 - 1  # csv's own limit of 131,072 characters is shorter than some answers
_ROWS_AT_ONCE = 1024


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
        raise DataError(f"{path} is not UTF-8 text", hint="save it as UTF-8") from None


def _open(path: Path) -> BinaryIO:
    return cast("BinaryIO", gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb"))


def _json_lines(path: Path) -> Iterator[object]:
    """One row a line; blank lines are no rows. Only a newline ends a line: U+2028 may stand in an answer."""
    with _reading(path), _open(path) as stream:
        for number, line in enumerate(stream, 1):
            text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if text.strip():
                yield _parse_line(text, path, number)


def _parse_line(line: bytes, path: Path, number: int) -> object:
    where = f"{path}, line {number}"
    try:
        return _parse(line)
    except UnicodeDecodeError:
        raise DataError(f"{where}: not UTF-8 text", hint="save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        hint = "each line holds one JSON object" + (
            "; a file that is one JSON array is named .json" if line.lstrip()[:1] == b"[" else ""
        )
        raise DataError(f"{where}: not JSON ({_why(error)})", hint=hint) from None


def _json_rows(path: Path) -> Iterator[object]:
    """An array of rows, an object with one array inside, one row alone, or JSON Lines under another name."""
    with _reading(path), _open(path) as stream:
        content = stream.read().removeprefix(codecs.BOM_UTF8)
    if not content.strip():
        return iter(())
    try:
        with _reading(path):
            whole = _parse(content)
    except (ValueError, RecursionError) as error:
        first, _, rest = content.lstrip().partition(b"\n")
        if rest and _is_json(first):
            return _json_lines(path)
        raise DataError(f"{path}: not JSON ({_why(error)})", hint="an array of objects, or one object a line") from None
    return iter(_array_in(whole))


def _array_in(whole: object) -> list[object]:
    if isinstance(whole, list):
        return whole
    if isinstance(whole, dict) and not whole.keys() & {"chosen", "rejected"}:
        arrays = [value for value in whole.values() if isinstance(value, list)]
        if len(arrays) == 1:
            return cast("list[object]", arrays[0])
    return [whole]


def _parse(content: bytes) -> object:
    return cast(object, json.loads(content.decode("utf-8"), parse_constant=_no_such_number))


def _no_such_number(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number; write null")


def _is_json(line: bytes) -> bool:
    try:
        _parse(line)
    except (ValueError, RecursionError):
        return False
    return True


def _why(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _csv_rows(path: Path) -> Iterator[object]:
    """Rows by the header's names. A row too long has a key None, a row too short has None values (csv.DictReader)."""
    csv.field_size_limit(_MAX_CSV_FIELD)
    with _reading(path), io.TextIOWrapper(_open(path), encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, strict=True)
        try:
            yield from reader
        except csv.Error as error:
            raise DataError(
                f"{path}, the row from line {reader.line_num + 1} on: not CSV ({error})",
                hint='a field with a comma, quote or newline stands in double quotes, a quote in it is written ""',
            ) from None


def _parquet_rows(path: Path) -> Iterator[object]:
    parquet: Any = import_module("pyarrow.parquet")  # half a second, and only Parquet needs it
    arrow: Any = import_module("pyarrow.lib")
    try:
        with _reading(path), parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE):
                yield from batch.to_pylist()
    except (arrow.ArrowException, ValueError, OverflowError) as error:  # the last two: no Python value can hold it
        raise DataError(
            f"{path}: not a Parquet file that can be read ({' '.join(str(error).split())})",
            hint="download or write it again",
        ) from None
