"""Rows of tables: CSV and TSV, Parquet, and the Arrow files that `datasets` saves.

A table's file says little about its size in memory: a Parquet file of two kilobytes repeats one long text by number.
Texts therefore stay such numbers until a row is known to be no longer than a row may be.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

from dpo_studio.errors import DataError, reason_of
from dpo_studio.preferences import bounds
from dpo_studio.preferences.bounds import MAX_COLUMNS, MAX_ROW, MIB, TOO_LONG, TOO_WIDE, reading_rows
from dpo_studio.reading import shown_path

__all__ = ["arrow_rows", "batch_rows", "csv_rows", "parquet_rows"]

_ROWS_AT_ONCE = 4096
_MAX_FOOTER = 64 * MIB
"""Bytes of a Parquet file's own description: a thousand row groups of a hundred columns take ten."""
_MAX_PARTS = 20_000
"""Members of any list in the description: columns with those they are nested in, row groups, pages."""
_OBJECT = 56
"""Bytes of a Python object beside its content."""


# CSV


def csv_rows(path: Path, delimiter: str | None = None) -> Iterator[object]:
    """Rows by the header's names. A row too long has a key None, a row too short has None values (csv.DictReader).

    Fields are separated by commas; or semicolons or tabs, where the header has none of the former: one column is not a
    pair.
    """
    csv.field_size_limit(MAX_ROW)  # its own limit of 131,072 characters is shorter than some answers
    with reading_rows(path) as raw:
        stream = io.TextIOWrapper(raw, encoding="utf-8-sig", newline="")
        header = stream.readline(MAX_ROW)
        delimiter = delimiter or next((mark for mark in ",;\t" if mark in header), ",")
        lines = _RowLines(header, stream)
        reader = csv.reader(lines, strict=True, delimiter=delimiter)
        try:
            names = next(reader, [])
            lines.length = 0
            if len(names) > MAX_COLUMNS:
                raise DataError(
                    f"{shown_path(path)} has {len(names):,} columns; the most is {MAX_COLUMNS:,}",
                    hint="keep the columns of prompt and answers",
                )
            for fields in reader:
                lines.length = 0
                if len(fields) > MAX_COLUMNS:
                    yield TOO_WIDE
                elif fields:
                    yield _by_name(names, fields)
        except csv.Error as error:
            raise DataError(
                f"{shown_path(path)}, the row from line {lines.first + 1} on: not CSV ({error})",
                hint='a field with a comma, quote or newline must be in double quotes, a quote in it is written ""',
            ) from None


class _RowLines:
    """The lines of one row of a CSV: a quote that is never closed takes one of them after the other."""

    def __init__(self, header: str, stream: TextIO) -> None:
        self._next, self._stream = header, stream
        self.length = 0
        """Characters of this row so far: whoever has a whole row sets it back."""
        self.first = self._lines = 0
        """Lines before this row."""

    def __iter__(self) -> _RowLines:
        return self

    def __next__(self) -> str:
        line, self._next = self._next or self._stream.readline(MAX_ROW), ""
        if not line:
            raise StopIteration
        if not self.length:
            self.first = self._lines
        self._lines += 1
        self.length += len(line)
        if self.length >= MAX_ROW:
            raise csv.Error(f"longer than {MAX_ROW // MIB} MiB")
        return line


def _by_name(names: list[str], fields: list[str]) -> dict[str | None, Any]:
    row: dict[str | None, Any] = dict(zip(names, fields, strict=False))
    if len(fields) > len(names):
        row[None] = fields[len(names) :]
    for name in names[len(fields) :]:
        row[name] = None
    return row


# Parquet


def parquet_rows(path: Path) -> Iterator[object]:
    """Rows of a Parquet file, some at a time; a row that is too long is not made.

    Raises:
        DataError: it is not a Parquet file, or describes itself as larger than any legitimate one.
    """
    import pyarrow.parquet as parquet  # type: ignore[import-untyped] # half a second, and only Parquet needs it

    name = shown_path(path)
    with reading_rows(path) as stream:
        try:
            _check_footer(stream, name)
            limits = {"thrift_string_size_limit": _MAX_FOOTER, "thrift_container_size_limit": _MAX_PARTS}
            described = parquet.ParquetFile(stream, **limits).metadata
            texts, at_once = _check_metadata(described, name)
            file = parquet.ParquetFile(stream, metadata=described, read_dictionary=texts, **limits)
            for batch in file.iter_batches(batch_size=at_once):
                yield from batch_rows(batch)
        except DataError:
            raise
        except Exception as error:  # pyarrow raises dozens of kinds, KeyErrors for time zones among them
            raise DataError(
                f"{name}: not a Parquet file that can be read ({reason_of(error)})",
                hint="download or write it again",
            ) from None


def _check_footer(stream: BinaryIO, name: str) -> None:
    """The length of the description is before the last four bytes."""
    stream.seek(max(0, stream.seek(0, os.SEEK_END) - 8))
    length = int.from_bytes(stream.read(8)[:4], "little")
    stream.seek(0)
    if length > _MAX_FOOTER:
        raise DataError(
            f"{name}: not a Parquet file that is read: a description of {length:,} bytes; the most is {_MAX_FOOTER:,}",
            hint="write the file again",
        )


def _check_metadata(described: Any, name: str) -> tuple[list[str], int]:
    """(the columns of texts, how many rows to read at once): the file's description is within the limits.

    Raises:
        DataError: too many columns, or more in a row group than any writer puts there.
    """
    if described.num_columns > MAX_COLUMNS:
        raise DataError(f"{name} has {described.num_columns:,} columns; the most is {MAX_COLUMNS:,}")
    texts: set[str] = set()
    repeating: set[str] = set()
    for number in range(described.num_row_groups):
        group = described.row_group(number)
        chunks = [group.column(index) for index in range(group.num_columns)]
        unpacked = max(sum(chunk.total_uncompressed_size for chunk in chunks), group.total_byte_size)
        values = max((chunk.num_values for chunk in chunks), default=0)
        if unpacked > bounds.LIMITS.group_bytes or values > bounds.LIMITS.group_values:
            raise DataError(
                f"{name}: a row group of {values:,} values that takes {unpacked:,} bytes in memory; the most is "
                f"{bounds.LIMITS.group_values:,} and {bounds.LIMITS.group_bytes:,}",
                hint="write it again with smaller row groups, or as .jsonl",
            )
        for chunk in chunks:
            if chunk.physical_type == "BYTE_ARRAY":
                texts.add(chunk.path_in_schema)
            if "DELTA_BYTE_ARRAY" in chunk.encodings:  # each text repeats the beginning of the one before, unpacked
                repeating.add(chunk.path_in_schema)
                if "." in chunk.path_in_schema:
                    raise DataError(
                        f"{name}: {chunk.path_in_schema} is written as DELTA_BYTE_ARRAY, which is not read in lists",
                        hint="write it again in the encoding that is the default, or as .jsonl",
                    )
    return sorted(texts - repeating), 1 if repeating else _ROWS_AT_ONCE


def arrow_rows(path: Path) -> Iterator[object]:
    """Rows of a file that `datasets` saved: an Arrow stream."""
    import pyarrow

    with reading_rows(path) as stream:
        try:
            for batch in pyarrow.ipc.open_stream(stream):
                if batch.num_columns > MAX_COLUMNS:
                    raise DataError(f"{shown_path(path)} has {batch.num_columns:,} columns")
                yield from batch_rows(batch)
        except DataError:
            raise
        except Exception as error:
            raise DataError(
                f"{shown_path(path)} cannot be read ({reason_of(error)})",
                hint="save it again, or as Parquet",
            ) from None


# Arrow


def batch_rows(batch: Any) -> Iterator[object]:
    """Rows as plain Python: those of a batch at once where together they are no longer than one may be."""
    if batch.num_rows and sum(map(_size_in_memory, batch.columns)) > MAX_ROW:
        if batch.num_rows == 1:
            yield TOO_LONG
            return
        half = batch.num_rows // 2
        yield from batch_rows(batch.slice(0, half))
        yield from batch_rows(batch.slice(half))
        return
    columns = [_values(_written_out(column)) for column in batch.columns]
    yield from (dict(zip(batch.schema.names, row, strict=True)) for row in zip(*columns, strict=True))


def _size_in_memory(array: Any) -> int:
    """Bytes that an array takes once its texts are written out, each as often as it occurs."""
    from pyarrow import compute, types

    kind = array.type
    if types.is_dictionary(kind):
        if not (types.is_string(kind.value_type) or types.is_binary(kind.value_type)):
            return _size_in_memory(array.cast(kind.value_type))
        lengths = compute.binary_length(array.dictionary)
        return int(compute.sum(lengths.take(array.indices)).as_py() or 0) + len(array)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind) or types.is_map(kind):
        inner = array.flatten() if not types.is_map(kind) else _entries(array)
        return _OBJECT * len(array) + sum(map(_size_in_memory, inner if isinstance(inner, list) else [inner]))
    if types.is_struct(kind):
        return _OBJECT * len(array) + sum(map(_size_in_memory, array.flatten()))
    return max(int(array.nbytes), len(array))


def _written_out(array: Any) -> Any:
    """The same array with every text in place of its number, of which Arrow makes Python texts six times faster."""
    plain = _without_numbers(array.type)
    return array if plain == array.type else array.cast(plain)


def _without_numbers(kind: Any) -> Any:
    from pyarrow import list_, struct, types

    if types.is_dictionary(kind):
        return kind.value_type
    if types.is_list(kind):
        return list_(_plain_field(kind.value_field))
    if types.is_struct(kind):
        return struct([_plain_field(kind.field(index)) for index in range(kind.num_fields)])
    return kind


def _plain_field(field: Any) -> Any:
    return field.with_type(_without_numbers(field.type))


def _entries(array: Any) -> list[Any]:
    """Keys and items of the part of a map array that is looked at."""
    first, last = array.offsets[0].as_py(), array.offsets[len(array)].as_py()
    return [array.keys.slice(first, last - first), array.items.slice(first, last - first)]


def _values(column: Any) -> list[object]:
    """A column's values; where Python has none for them (a time of nanoseconds), their type, which is not text."""
    try:
        return cast("list[object]", column.to_pylist())
    except Exception:  # whatever it is, only a row that needs this column is refused
        return [column.type] * len(column)
