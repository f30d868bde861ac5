"""One file -> its raw rows, in order, one at a time: JSON Lines, JSON, CSV, Parquet.

Nothing here knows what a pair is: a row is whatever one line, array element or record holds. What cannot be read is a
`DataError` naming the file and the line: a reader that skips what it does not understand would train on something
other than what it was given. Memory does not grow with the file: one row is at hand at a time, and a row has a limit.
NaN and Infinity, which Python and pandas write for what is missing, are read as null.
"""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TextIO, cast

from dpo_studio.errors import DataError
from dpo_studio.preferences import bounds
from dpo_studio.preferences.bounds import (
    MAX_ROW,
    MIB,
    TOO_LONG,
    as_utf8,
    checked,
    open_rows,
    reading_rows,
    too_many_values,
)
from dpo_studio.preferences.tables import csv_rows, parquet_rows
from dpo_studio.reading import is_own_stream, shown_path

__all__ = ["SUFFIXES", "UNREAD", "file_rows"]

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet", ".csv", ".tsv")
UNREAD = {
    **dict.fromkeys((".xlsx", ".xls", ".xlsm", ".ods", ".numbers"), "save the sheet as CSV"),
    **dict.fromkeys((".zip", ".xz", ".zst", ".bz2", ".7z", ".rar", ".tar", ".tgz"), "unpack it first"),
    **dict.fromkeys(
        (".docx", ".doc", ".odt", ".pdf", ".rtf", ".pptx"), "a document has no rows: write one pair a line"
    ),
    **dict.fromkeys((".txt", ".md", ".html", ".xml"), "text has no columns: write one pair a line, as .jsonl"),
}
"""Files that people have and that are not read, and what to do with them."""
_MAX_WHOLE = 64 * MIB  # an object around the array is read whole: some 1 GB of Python objects at the worst
_DECODER = json.JSONDecoder(parse_constant=lambda name: None)
_ARRAY_OR_LINES = "an array of objects, or one object a line"
_SPACE = re.compile(r"[ \t\n\r]*")


def file_rows(path: Path | str) -> Iterator[object]:
    """The rows of a file by its ending; of a stream (`-`, /dev/fd/N) as JSON, whose content shows its shape.

    Raises:
        DataError: it is not a kind of file that is read; while rows are drawn: it cannot be read.
    """
    name = str(path).lower()
    if is_own_stream(path) or name.endswith((".json", ".json.gz")):
        return _json_rows(path)
    if name.endswith((".jsonl", ".jsonl.gz")):
        return _json_lines(path)
    if name.endswith(".csv"):
        return csv_rows(Path(path))
    if name.endswith(".tsv"):
        return csv_rows(Path(path), "\t")
    if name.endswith(".parquet"):
        return parquet_rows(Path(path))
    open_rows(path).close()  # a missing file is reported first
    advice = UNREAD.get(Path(name).suffix)
    hint = f"{advice}; " if advice else ""
    raise DataError(
        f"{shown_path(path)} is not a kind of file that is read", hint=f"{hint}these are: {', '.join(SUFFIXES)}"
    )


# JSON


def _json_lines(path: Path | str) -> Iterator[object]:
    with reading_rows(path) as stream:
        yield from _rows_of_lines(stream, path)


def _rows_of_lines(stream: BinaryIO, path: Path | str) -> Iterator[object]:
    """One row a line; blank lines are not rows. Only a newline ends a line: U+2028 may be in an answer."""
    blank = 0
    for number, line in enumerate(_lines(stream, path), 1):
        if line is None:
            yield TOO_LONG
            continue
        text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if text.strip():
            blank = 0
            yield too_many_values(text) or checked(
                _parse_line(text, stream, path, number), text.count(b"[") + text.count(b"{")
            )
        elif (blank := blank + 1) > bounds.LIMITS.blank_lines:
            raise DataError(
                f"{shown_path(path)} has over {bounds.LIMITS.blank_lines:,} blank lines one after the other"
            )


def _lines(stream: BinaryIO, path: Path | str) -> Iterator[bytes | None]:
    """The lines of a file; None for one that is too long, whose rest is skipped."""
    while line := stream.readline(MAX_ROW):
        if len(line) < MAX_ROW or line.endswith(b"\n"):
            yield line
            continue
        length = len(line)
        while (rest := stream.readline(MAX_ROW)) and not rest.endswith(b"\n"):
            length += len(rest)
            if length > bounds.LIMITS.line_bytes:
                raise DataError(
                    f"{shown_path(path)} has a line of over {bounds.LIMITS.line_bytes // MIB:,} MiB",
                    hint="each line must be one JSON object",
                )
        yield None


def _parse_line(line: bytes, stream: BinaryIO, path: Path | str, number: int) -> object:
    try:
        return _parse(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise DataError(f"{shown_path(path)}, line {number}: not UTF-8 text", hint=as_utf8(stream)) from None
    except (ValueError, RecursionError) as error:
        hint = "each line must be one JSON object" + (
            "; a file that is one JSON array is named .json" if line.lstrip()[:1] == b"[" else ""
        )
        raise DataError(f"{shown_path(path)}, line {number}: not JSON ({_why(error)})", hint=hint) from None


def _json_rows(path: Path | str) -> Iterator[object]:
    """An array of rows, an object with one array inside, one row alone, or JSON Lines under another name."""
    with reading_rows(path) as raw:
        stream = io.TextIOWrapper(raw, encoding="utf-8-sig")
        head = _past_space("", stream)
        if head.startswith("["):
            yield from _elements(head[1:], stream, path)
            return
        if "\n" not in head:
            head += stream.readline(MAX_ROW)
        first, _, rest = head.partition("\n")
        if not (_is_json(first) and _past_space(rest, stream)):
            yield from _whole(head + stream.read(_MAX_WHOLE), path)
            return
        stream.detach()
        raw.seek(0)
        yield from _rows_of_lines(raw, path)


def _past_space(text: str, stream: TextIO) -> str:
    """The text without white space before it, and the next of the stream where it is nothing else; empty at the end."""
    while not (text := text.lstrip()) and (text := stream.read(MIB)):
        pass
    return text


def _elements(text: str, stream: TextIO, path: Path | str) -> Iterator[object]:
    """The elements of an array whose `[` has been read, one at a time. What fails on a text cut short is read on."""
    text = _past_space(text, stream)
    at, row, more = 0, 0, not text.startswith("]")
    while more:
        try:
            element, end, mark = _element(text, at)
        except (ValueError, IndexError, RecursionError) as error:
            rest = text[at:]
            hopeless = isinstance(error, RecursionError) or len(rest) > MAX_ROW
            # As much again as there is: a long row is tried a few times, not once a MiB.
            if hopeless or not (next_ := stream.read(max(MIB, len(rest)))):
                raise _bad_element(path, row, rest, error) from None
            text, at = rest + next_, 0
            continue
        too_many = too_many_values(text[at:end]) if end - at > MIB else None
        yield too_many or checked(element, text.count("[", at, end) + text.count("{", at, end))
        at, row, more = end + 1, row + 1, mark == ","
    if _past_space(text[at:].removeprefix("]") if row == 0 else text[at:], stream):
        raise DataError(f"{shown_path(path)}: not JSON (something follows the array)", hint=_ARRAY_OR_LINES)


def _element(text: str, at: int) -> tuple[object, int, str]:
    """The element that begins here, the position of the comma or bracket after it, and which of the two it is."""
    element, end = _DECODER.raw_decode(text, _after_space(text, at))
    end = _after_space(text, end)
    if text[end] not in ",]":
        raise json.JSONDecodeError("no comma after it", text, end)
    return element, end, text[end]


def _after_space(text: str, at: int) -> int:
    return cast("re.Match[str]", _SPACE.match(text, at)).end()


def _bad_element(path: Path | str, row: int, rest: str, error: Exception) -> DataError:
    why = _why(error) if len(rest) <= MAX_ROW else f"it is broken, or longer than {MAX_ROW // MIB} MiB"
    return DataError(f"{shown_path(path)}, row {row}: not JSON ({why})", hint=_ARRAY_OR_LINES)


def _whole(text: str, path: Path | str) -> Iterator[object]:
    if not text.strip():
        return
    if len(text) > _MAX_WHOLE:
        raise DataError(
            f"{shown_path(path)} is one JSON object of more than {_MAX_WHOLE // MIB} MiB",
            hint="write the array of rows alone, or one object a line",
        )
    try:
        whole = _parse(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{shown_path(path)}: not JSON ({_why(error)})", hint=_ARRAY_OR_LINES) from None
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
