"""Sources of pairs that are small and unfold to much, or have no end: each is one line of error, or one refused row."""

from __future__ import annotations

import gzip
import json
import os
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest

from dpo_studio.config import SourceSection
from dpo_studio.errors import DataError
from dpo_studio.preferences import bounds, rows, tables
from dpo_studio.preferences.bounds import MAX_COLUMNS, TOO_LONG, TOO_WIDE, BadRow
from dpo_studio.preferences.files import file_rows
from dpo_studio.preferences.sources import read_pairs

from .gate_reads import GOOD, dpo


def limit(monkeypatch: pytest.MonkeyPatch, **lower: int) -> None:
    """Other limits of a source, for what is read from here on."""
    monkeypatch.setattr(bounds, "LIMITS", replace(bounds.LIMITS, **lower))


MIB = 2**20
BIG = "x" * (17 * MIB)
"""Longer than a row may be."""


def unfolded(file: Path) -> tuple[list[object], int]:
    """The rows of a file, and the most bytes of Python objects that were there at once."""
    tracemalloc.start()
    try:
        return list(file_rows(file)), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# Parquet


@pytest.mark.parametrize(
    "columns",
    [
        {"prompt": [BIG] * 12, "chosen": ["a"] * 12},
        {"prompt": ["q"] * 12, "chosen": [[{"role": "user", "content": BIG}]] * 12},
        {"prompt": ["q"] * 12, "chosen": [["y" * MIB] * 17] * 12},
        {"prompt": ["q"] * 12, "chosen": [{"a": {"b": BIG}}] * 12},
        {"prompt": ["q"] * 12, "chosen": [{f"c{n}": "z" * (2 * MIB) for n in range(9)}] * 12},
    ],
    ids=["texts", "messages", "lists", "nested", "many-columns"],
)
def test_a_small_parquet_of_huge_rows_is_refused_rows(
    columns: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few kilobytes on disk; written out, the rows take 200 MB and more. None of them is made, by Arrow neither."""
    file = tmp_path / "x.parquet"
    pq.write_table(pa.table(columns), file, compression="zstd")
    assert file.stat().st_size < 300_000
    taken: list[int] = []
    made = tables.batch_rows

    def noting(batch: Any) -> Iterator[object]:
        taken.append(batch.nbytes)
        return made(batch)

    monkeypatch.setattr(tables, "batch_rows", noting)
    found, most = unfolded(file)
    assert found == [TOO_LONG] * 12
    assert most < 50 * MIB
    assert taken[0] < 60 * MIB


def test_the_rows_beside_a_huge_one_are_read(tmp_path: Path) -> None:
    file = tmp_path / "x.parquet"
    texts = ["a", "b", BIG, "c", None, "d" * (9 * MIB), "e" * (9 * MIB)]
    pq.write_table(pa.table({"prompt": texts, "n": list(range(7))}), file, compression="zstd")
    expected = [{"prompt": text, "n": n} if text != BIG else TOO_LONG for n, text in enumerate(texts)]
    assert list(file_rows(file)) == expected


@pytest.mark.parametrize("texts", [[BIG] * 8, ["w" * MIB + str(n) for n in range(8)]], ids=["same", "same-beginning"])
def test_texts_that_repeat_the_one_before_are_read_one_at_a_time(texts: list[str], tmp_path: Path) -> None:
    """Parquet's DELTA_BYTE_ARRAY writes only where a text differs from the last: no dictionary holds it short."""
    file = tmp_path / "x.parquet"
    options: Any = {"use_dictionary": False, "column_encoding": {"prompt": "DELTA_BYTE_ARRAY"}, "compression": "zstd"}
    pq.write_table(pa.table({"prompt": texts}), file, **options)
    assert file.stat().st_size < 100_000
    found, most = unfolded(file)
    assert found == [TOO_LONG if text == BIG else {"prompt": text} for text in texts]
    assert most < 100 * MIB
    options["column_encoding"] = {"prompt.list.element": "DELTA_BYTE_ARRAY"}
    pq.write_table(pa.table({"prompt": [texts]}), file, **options)
    with pytest.raises(DataError, match="DELTA_BYTE_ARRAY, which is not read in lists"):
        list(file_rows(file))


def test_numbers_without_end_are_bounded_by_what_the_file_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A list of three million equal numbers takes a few bytes; a row group may not have too many values, or bytes."""
    file = tmp_path / "x.parquet"
    pq.write_table(pa.table({"prompt": ["q"], "n": [[1] * 3_000_000]}), file, compression="zstd")
    assert file.stat().st_size < 10_000
    assert list(file_rows(file)) == [TOO_LONG]
    limit(monkeypatch, group_values=2_999_999)
    with pytest.raises(DataError, match=r"a row group of 3,000,000 values"):
        list(file_rows(file))
    monkeypatch.undo()
    pq.write_table(pa.table({"prompt": ["q" * 3_000_000]}), file, compression="zstd")
    limit(monkeypatch, group_bytes=3_000_000)
    with pytest.raises(DataError, match=r"takes 3,\d\d\d,\d\d\d bytes in memory; the most is .* and 3,000,000"):
        list(file_rows(file))


def test_a_parquet_of_too_many_columns_is_refused_before_it_is_described(tmp_path: Path) -> None:
    file = tmp_path / "x.parquet"
    names = [f"c{n}" for n in range(MAX_COLUMNS + 1)]
    pq.write_table(pa.table({name: [1] for name in names}), file)
    with pytest.raises(DataError, match="10,001 columns; the most is 10,000"):
        list(file_rows(file))
    names = [f"c{n}" for n in range(2 * MAX_COLUMNS)]
    pq.write_table(pa.table({name: [1] for name in names}), file)
    with pytest.raises(DataError, match=r"x\.parquet"):  # Arrow's own reader of the description stops
        list(file_rows(file))
    content = file.read_bytes()
    file.write_bytes(content[:-8] + (65 * MIB).to_bytes(4, "little") + b"PAR1")
    with pytest.raises(DataError, match="a description of 68,157,440 bytes"):
        list(file_rows(file))


def test_parquet_rows_are_what_arrow_makes_of_them(tmp_path: Path) -> None:
    """Texts pass through numbers on the way: every kind of column comes out as Arrow itself reads it."""
    table = pa.table(
        {
            "text": ["a", None, "a", "ü"],
            "large": pa.array(["a", "b", None, "a"], pa.large_string()),
            "bytes": [b"x", None, b"x", b""],
            "messages": [[{"role": "user", "content": "q"}], [], None, [{"role": None, "content": "q"}, None]],
            "lists": pa.array([[["a"], None], None, [], [[], ["b", "a"]]], pa.list_(pa.list_(pa.string()))),
            "map": pa.array([[("k", "v")], None, [], [("k", None), ("l", "v")]], pa.map_(pa.string(), pa.string())),
            "coded": pa.array(["u", "v", None, "u"]).dictionary_encode(),
            "number": [1.5, None, 2.0, -1.0],
            "fixed": pa.array([[1, 2], None, [3, 4], [5, 6]], pa.list_(pa.int8(), 2)),
            "day": pa.array([0, 1, None, 2], pa.date32()),
            "nothing": pa.nulls(4),
        }
    )
    pq.write_table(table, tmp_path / "x.parquet")
    expected = pq.ParquetFile(tmp_path / "x.parquet").read().to_pylist()
    assert list(file_rows(tmp_path / "x.parquet")) == expected


def test_a_parquet_of_deep_columns_is_refused(tmp_path: Path) -> None:
    """Arrow's own limit is a hundred levels."""
    kind = pa.int8()
    for _ in range(60):
        kind = pa.list_(kind)
    pq.write_table(pa.table({"prompt": pa.nulls(1, kind)}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match="too deeply nested"):
        list(file_rows(tmp_path / "x.parquet"))


# What `datasets` saved


def saved(folder: Path, table: pa.Table, **state: Any) -> None:
    """A folder as `save_to_disk` writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(folder / "data.arrow"), "wb") as out, pa.ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table)
    state = {"_data_files": [{"filename": "data.arrow"}], "_fingerprint": "f"} | state
    (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")


PAIRS = pa.table({"prompt": ["q"] * 3, "chosen": ["a"] * 3, "rejected": ["b"] * 3})


def test_a_saved_set_is_read_from_its_own_files_alone(tmp_path: Path) -> None:
    """Whatever its description names, in whatever type; nothing is opened that lies elsewhere, or waited for."""
    folder = tmp_path / "saved"
    saved(folder, PAIRS)
    assert len(read_pairs(SourceSection(source=str(folder))).pairs) == 3
    (tmp_path / "elsewhere.arrow").write_bytes((folder / "data.arrow").read_bytes())
    elsewhere: list[Any] = [
        "../elsewhere.arrow",
        str(tmp_path / "elsewhere.arrow"),
        "..",
        "",
        "a\0b",
        None,
        5,
        ["x"],
        {},
    ]
    for name in elsewhere:
        saved(folder, PAIRS, _data_files=[{"filename": name}])
        with pytest.raises(DataError, match="names a file that is not in it"):
            read_pairs(SourceSection(source=str(folder)))
    wrong: list[Any] = [None, 5, "data.arrow", {}, {"filename": "data.arrow"}]
    for value in wrong:
        saved(folder, PAIRS, _data_files=value)
        with pytest.raises(DataError, match="damaged"):
            read_pairs(SourceSection(source=str(folder)))
    saved(folder, PAIRS, _data_files=[])
    with pytest.raises(DataError, match="has no rows"):
        read_pairs(SourceSection(source=str(folder)))
    saved(folder, PAIRS, _indices_files=[{"filename": "indices.arrow"}])
    with pytest.raises(DataError, match="a selection of another set"):
        read_pairs(SourceSection(source=str(folder)))
    saved(folder, PAIRS)
    (folder / "data.arrow").unlink()
    os.mkfifo(folder / "data.arrow")
    with pytest.raises(DataError, match=r"data\.arrow is a named pipe"):
        read_pairs(SourceSection(source=str(folder)))
    (folder / "state.json").write_text("[" * 9999, encoding="utf-8")
    with pytest.raises(DataError, match=r"state\.json: not JSON"):
        read_pairs(SourceSection(source=str(folder)))
    (folder / "state.json").write_text("[]", encoding="utf-8")
    with pytest.raises(DataError, match="damaged"):
        read_pairs(SourceSection(source=str(folder)))
    (folder / "state.json").unlink()
    os.mkfifo(folder / "state.json")
    with pytest.raises(DataError, match=r"state\.json is a named pipe"):
        read_pairs(SourceSection(source=str(folder)))


def test_the_splits_of_a_saved_set_lie_in_it(tmp_path: Path) -> None:
    saved(tmp_path / "outside", PAIRS)
    folder = tmp_path / "saved"
    saved(folder / "test", PAIRS.slice(0, 2))
    (folder / "dataset_dict.json").write_text('{"splits": ["test"]}', encoding="utf-8")
    assert len(read_pairs(SourceSection(source=str(folder))).pairs) == 2
    for name in ("../outside", "..", ""):
        (folder / "dataset_dict.json").write_text(json.dumps({"splits": [name]}), encoding="utf-8")
        with pytest.raises(DataError, match="names a file that is not in it"):
            read_pairs(SourceSection(source=str(folder)))


def test_a_saved_set_of_huge_or_broken_rows(tmp_path: Path) -> None:
    """A long text that is kept once and pointed to by number; a file cut short."""
    huge = pa.DictionaryArray.from_arrays(pa.array([0] * 9, pa.int32()), pa.array([BIG]))
    saved(tmp_path / "saved", pa.table({"prompt": huge, "chosen": ["a"] * 9, "rejected": ["b"] * 9}))
    with pytest.raises(DataError, match="9 x row is longer than 16 MiB"):
        read_pairs(SourceSection(source=str(tmp_path / "saved"), format="trl"))
    content = (tmp_path / "saved" / "data.arrow").read_bytes()
    (tmp_path / "saved" / "data.arrow").write_bytes(content[:100])
    with pytest.raises(DataError, match=r"data\.arrow cannot be read"):
        read_pairs(SourceSection(source=str(tmp_path / "saved")))


def test_a_saved_set_of_too_many_columns_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "saved", pa.table({f"c{n}": [1] for n in range(MAX_COLUMNS + 1)}))
    with pytest.raises(DataError) as refused:
        read_pairs(SourceSection(source=str(tmp_path / "saved")))
    assert refused.value.message == f"{tmp_path / 'saved' / 'data.arrow'} has 10,001 columns"


def test_a_parquet_of_too_many_columns_is_called_that_and_not_unreadable(tmp_path: Path) -> None:
    file = tmp_path / "x.parquet"
    pq.write_table(pa.table({f"c{n}": [1] for n in range(MAX_COLUMNS + 1)}), file)
    with pytest.raises(DataError) as refused:
        list(file_rows(file))
    assert refused.value.message == f"{file} has 10,001 columns; the most is 10,000"


@pytest.mark.parametrize("content", [b"\xff" * 100, b"", b"\0" * 100, gzip.compress(GOOD * 9)[10:20] + b"\xff" * 9])
def test_a_gz_with_a_fault_in_it_cannot_be_read(tmp_path: Path, content: bytes) -> None:
    """After a header that is sound: a block of no known kind, an end that comes too early, a sum that is another."""
    file = tmp_path / "x.jsonl.gz"
    file.write_bytes(gzip.compress(b"")[:10] + content)
    with pytest.raises(DataError, match=r"x\.jsonl\.gz cannot be read"):
        list(file_rows(file))


def test_a_value_that_python_has_none_for_costs_only_the_rows_that_need_it(tmp_path: Path) -> None:
    """A time of a zone that is nowhere, of which Arrow makes no datetime: its column says of what type it is."""
    times = pa.array([1, 2], pa.timestamp("us", tz="Nowhere/None"))
    pq.write_table(pa.table({"prompt": ["p", "q"], "at": times}), tmp_path / "x.parquet")
    with pytest.raises(pa.ArrowInvalid):
        times.to_pylist()
    rows = list(file_rows(tmp_path / "x.parquet"))
    assert rows == [{"prompt": "p", "at": times.type}, {"prompt": "q", "at": times.type}]


@pytest.mark.parametrize("row", ["[" * 101 + "]" * 101, '{"prompt": ' + '{"a": ' * 101 + "1" + "}" * 102])
def test_rows_of_too_many_levels_are_refused_rows(row: str) -> None:
    """And rows that are only full of brackets are not."""
    assert bounds.checked(json.loads(row), row.count("[") + row.count("{")) is bounds.TOO_DEEP
    flat = {"prompt": "[" * 200}
    assert bounds.checked(flat, 200) is flat


# gzip


@pytest.mark.parametrize(
    "content",
    [b"\n" * (8 * MIB), b" " * (8 * MIB), GOOD * (8 * MIB // len(GOOD)), b"[" + b" " * (8 * MIB)],
    ids=["blank-lines", "one-blank-line", "the-same-pair", "one-array"],
)
@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.json.gz"])
def test_a_gz_unfolds_to_no_more_than_text_does(
    content: bytes, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8 MiB from less than 0.04, with the floor lowered that lets small files pass."""
    (tmp_path / name).write_bytes(gzip.compress(content, compresslevel=9))
    limit(monkeypatch, unfolded_always=MIB // 2, blank_lines=10**9)
    with pytest.raises(DataError, match=r"decompresses to over \d+ MiB, 100 times its size"):
        for _ in file_rows(tmp_path / name):
            pass


def test_an_honest_gz_passes_however_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read again from its beginning (JSON Lines in a .json) is not counted twice."""
    limit(monkeypatch, unfolded_always=0, unfolded_times=12)
    lines = b"".join(
        b'{"prompt": "%s", "chosen": "a", "rejected": "b"}\n' % os.urandom(30).hex().encode() for _ in range(99)
    )
    for name in ("x.jsonl.gz", "x.json.gz"):
        (tmp_path / name).write_bytes(gzip.compress(lines))
        assert len(list(file_rows(tmp_path / name))) == 99


# Lines, arrays, CSV


def test_a_line_or_blank_without_end_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sparse file of a terabyte takes no place on the disk and is one line of NULs."""
    with (tmp_path / "x.jsonl").open("wb") as sparse:
        sparse.truncate(2**40)
    limit(monkeypatch, line_bytes=40 * MIB)
    with pytest.raises(DataError, match=r"x\.jsonl has a line of over 40 MiB"):
        list(file_rows(tmp_path / "x.jsonl"))
    limit(monkeypatch, blank_lines=1000)
    (tmp_path / "y.jsonl").write_bytes(b"\n" * 1000 + GOOD + b" \n" * 1000)
    assert len(list(file_rows(tmp_path / "y.jsonl"))) == 1
    (tmp_path / "y.jsonl").write_bytes(GOOD + b"\n" * 1001)
    with pytest.raises(DataError, match="over 1,000 blank lines"):
        list(file_rows(tmp_path / "y.jsonl"))


def test_rows_of_too_many_columns_or_values_are_refused(tmp_path: Path) -> None:
    wide = json.dumps({f"c{n}": 1 for n in range(MAX_COLUMNS + 1)})
    many = '{"a": [' + "[]," * 1_000_001 + "1]}"
    text = json.dumps({"a": "," * 900_000 + "x" * 900_000})
    for name, before, after in (("x.jsonl", "", "\n"), ("x.json", "[", "]")):
        mark = "\n" if name == "x.jsonl" else ","
        (tmp_path / name).write_text(before + mark.join([wide, many, text, "{}"]) + after, encoding="utf-8")
        first, second, third, last = file_rows(tmp_path / name)
        assert first == TOO_WIDE
        assert second == BadRow("row has more than 1,000,000 values")
        assert third == json.loads(text)
        assert last == {}


def test_rows_without_end_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch, rows=5)
    (tmp_path / "x.jsonl").write_bytes(GOOD * 5)
    assert len(read_pairs(SourceSection(source=str(tmp_path / "x.jsonl"))).pairs) == 5
    (tmp_path / "y.jsonl").write_bytes(GOOD)
    with pytest.raises(DataError, match="has over 5 rows"):
        read_pairs(SourceSection(source=str(tmp_path)))
    saved(tmp_path / "saved", pa.concat_tables([PAIRS] * 2))
    with pytest.raises(DataError, match="has over 5 rows"):
        read_pairs(SourceSection(source=str(tmp_path / "saved")))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (",".join(f"c{n}" for n in range(1_000_000)) + "\n1\n", "1,000,000 columns; the most is 10,000"),
        ("," * 10_000 + "\n", "10,001 columns"),
        (";" * 10_000 + "\n", "10,001 columns"),
        ("\t" * 10_000 + "\n", "10,001 columns"),
        (
            'prompt,chosen,rejected\nq,a,b\nq,"' + "x\n" * (9 * MIB),
            "the row from line 3 on: not CSV .longer than 16 MiB",
        ),
        ("prompt,chosen,rejected\nq,a," + "b" * (17 * MIB), "line 2 on: not CSV .longer than 16 MiB"),
        ("x" * (17 * MIB), "line 1 on: not CSV .longer than 16 MiB"),
        ('a,b\n"' + 'x\n","' * (4 * MIB), "line 2 on: not CSV .longer than 16 MiB"),
    ],
    ids=["million", "commas", "semicolons", "tabs", "open-quote", "long-row", "long-header", "many-quotes"],
)
def test_a_csv_of_too_much_is_an_error(content: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=says):
        list(file_rows(tmp_path / "x.csv"))


def test_a_csv_row_of_too_many_fields_is_refused(tmp_path: Path) -> None:
    """And long rows one after the other are no long row."""
    long = "x" * (3 * MIB)
    (tmp_path / "x.csv").write_text(
        f"a,b\n{',' * 10_000}\n" + f'"{long}\n{long}",1\n' * 4 + "1,2,3\n", encoding="utf-8"
    )
    first, *rest, last = file_rows(tmp_path / "x.csv")
    assert first == TOO_WIDE
    assert rest == [{"a": f"{long}\n{long}", "b": "1"}] * 4
    assert last == {"a": "1", "b": "2", None: ["3"]}


def test_tsv_is_read_by_its_tabs(tmp_path: Path) -> None:
    """Commas in the header are part of a name; in a .csv they part the columns."""
    (tmp_path / "x.tsv").write_text('prompt, or so\tchosen\n"a\tb"\tc,d\n', encoding="utf-8")
    assert list(file_rows(tmp_path / "x.tsv")) == [{"prompt, or so": "a\tb", "chosen": "c,d"}]
    (tmp_path / "y.tsv").write_text("prompt\tchosen\trejected\nq\ta\tb\n", encoding="utf-8")
    assert len(read_pairs(SourceSection(source=str(tmp_path / "y.tsv"))).pairs) == 1


# Names


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("mine.xlsx", "save the sheet as CSV"),
        ("MINE.XLS", "save the sheet as CSV"),
        ("mine.ods:train", "save the sheet as CSV"),
        ("mine.docx", "a document has no rows"),
        ("folder/mine.pdf", "a document has no rows"),
        ("owner/mine.zip", "unpack it first"),
        ("mine.jsonl.xz", "unpack it first"),
        ("mine.zst", "unpack it first"),
        ("mine.txt", "text has no columns"),
    ],
)
def test_a_file_that_is_not_read_is_told_of_at_once_there_or_not(
    name: str, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And never looked for on the Hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rows, "_hub_rows", lambda *_: pytest.fail("asked the Hub"))
    with pytest.raises(DataError, match="no such file or folder: ") as caught:
        read_pairs(SourceSection(source=name))
    assert advice in str(caught.value.hint)
    file = tmp_path / name.partition(":")[0]
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"PK")
    with pytest.raises(DataError, match="not a kind of file that is read") as caught:
        read_pairs(SourceSection(source=str(file)))
    assert advice in str(caught.value.hint)


def test_a_folder_s_files_are_files(tmp_path: Path) -> None:
    """A pipe, a device and a link to nothing among the data are named; what is not data, or hidden, is left alone."""
    makers: dict[str, Callable[[Path], None]] = {
        "is a named pipe": os.mkfifo,
        "is a device": lambda file: file.symlink_to("/dev/zero"),
        "no such file": lambda file: file.symlink_to("nothing"),
    }
    for says, make in makers.items():
        folder = tmp_path / says
        folder.mkdir()
        (folder / "a.jsonl").write_bytes(GOOD)
        for harmless in ("README", ".x.jsonl", "dataset_info.json"):
            os.mkfifo(folder / harmless)
        (folder / "folder.jsonl").mkdir()
        assert len(read_pairs(SourceSection(source=str(folder))).pairs) == 1
        make(folder / "b.jsonl")
        with pytest.raises(DataError, match=says):
            read_pairs(SourceSection(source=str(folder)))


def test_a_disk_is_no_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch, files=9)
    for number in range(9):
        (tmp_path / f"{number}.jsonl").write_bytes(GOOD)
    assert len(read_pairs(SourceSection(source=str(tmp_path))).pairs) == 9
    (tmp_path / "x").mkdir()
    with pytest.raises(DataError, match="contains over 9 files and folders"):
        read_pairs(SourceSection(source=str(tmp_path)))


def test_a_hostile_table_ends_the_command_in_one_line(tmp_path: Path) -> None:
    """A few kilobytes that unfold to five gigabytes, with four for everything."""
    huge = pa.DictionaryArray.from_arrays(pa.array([0] * 300, pa.int32()), pa.array([BIG]))
    table = pa.table({"prompt": huge, "chosen": ["a"] * 300, "rejected": ["b"] * 300})
    pq.write_table(table, tmp_path / "x.parquet", compression="zstd", store_schema=False)
    assert (tmp_path / "x.parquet").stat().st_size < 9000
    done = dpo("data", "check", "x.parquet", cwd=tmp_path)
    assert done.code == 1
    assert "64 x row is longer than 16 MiB" in done.error
