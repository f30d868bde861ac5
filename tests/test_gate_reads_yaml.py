"""A recipe of anything: wrong types in every field, YAML that is none, names in any bytes, streams that are closed."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from dpo_studio.cli.app import _refuse_names_that_are_no_text
from dpo_studio.config import Recipe, SourceSection, load_recipe, parse_yaml
from dpo_studio.errors import DPOStudioError, RecipeError, UsageError
from dpo_studio.preferences.sources import read_pairs

from .gate_reads import GOOD, dpo

BASE = "model: {path: m}\ndata: {train: {source: a.jsonl}}\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        *((f"!!bool {word}", "is not a bool") for word in ("abc", "2", "''", "[]")[:3]),
        *((f"!!int {word}", "is not a int") for word in ("abc", "''", "0x", "0b", "'-'", "'_'", "1.5")),
        *((f"!!float {word}", "is not a float") for word in ("abc", "''", "'.'", "0x1")),
        ("0x" + "f" * 60_000, "is not a int"),
        ("0" + "7" * 60_000, "is not a int"),
        ("0b" + "1" * 60_000, "is not a int"),
        ("9" * 5000, "is not a int"),
        ("-" + "9" * 101, "is not a int"),
        ("1_" * 200 + "1", "is not a int"),
        ("9" * 200 + ".5", "is not a float"),
        ("!!timestamp 2024-01-31", "the tag !!timestamp"),
        ("!!set {a: 1}", "the tag !!set"),
        ("!!omap [a: 1]", "the tag !!omap"),
        ("!!binary aGk=", "the tag !!binary"),
        ("!!merge a", "the tag !!merge"),
        ("!local a", "the tag !local"),
        ("!!python/object/apply:os.system [ls]", "the tag !!python"),
        ("a: &x b\nc: *x", "aliases"),
        ("!!map [1]", "!!map: not a mapping"),
        ("!!seq {a: 1}", "expected a sequence"),
        ("!!str [1]", "expected a scalar"),
        ("!!int {a: 1}", "expected a scalar"),
        ("{1: a, '1': b}", "the key 1 occurs twice"),
        ("{true: a, True: b}", "the key True occurs twice"),
        ("{a: {b: 1, c: 2, b: 3}}", "the key b occurs twice"),
        ("[1]: a", "a key is not text"),
        ("{a: 1}: b", "a key is not text"),
        ("[" * 51 + "]" * 51, "nested deeper than 50"),
        ("{a: " * 51 + "1" + "}" * 51, "nested deeper than 50"),
        ("- " * 51 + "a", "nested deeper than 50"),
        ("[" * 5000, "nested deeper than 50"),
        ('"\\U00110000"', "chr"),
        ('"\\UFFFFFFFF"', "too large"),
        ("x" * 200_001, "over 200,000"),
    ],
)
def test_yaml_that_is_no_plain_data_is_a_yaml_error_in_one_line(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(yaml.YAMLError, match=says.replace("!", "!")):
        parse_yaml(text)
    (tmp_path / "r.yaml").write_text(f"{BASE}adapter:\n  rank: 1\n", encoding="utf-8")
    with pytest.raises(DPOStudioError) as caught:
        load_recipe(tmp_path / "r.yaml", [f"adapter.rank={text}"])
    assert len(caught.value.message) < 200_200 if len(text) > 150_000 else len(caught.value.message) < 130_000


def test_yaml_as_people_mean_it_still_is() -> None:
    assert parse_yaml("[5e-5, 1.5, 0x10, 017, 1_000, yes, ~, 1:30, 2024-01-31, '=', <<, .5, '1']") == [
        *(5e-5, 1.5, 16, 15, 1000, True, None, "1:30", "2024-01-31", "=", "<<", 0.5, "1")
    ]
    assert parse_yaml("[" * 50 + "]" * 50) is not None
    assert parse_yaml("9" * 100) == int("9" * 100)
    assert parse_yaml("{1: a, b: {c: d}}") == {"1": "a", "b": {"c": "d"}}
    assert parse_yaml("{!!str a: !!int '5', b: !!seq [!!float 1, !!null '']}") == {"a": 5, "b": [1.0, None]}


def test_fifteen_thousand_keys_take_as_long_as_they_are_many() -> None:
    """A section of 12,000 keys takes about as long as twelve of a thousand: each key is looked up, not searched for."""
    keys = "".join(f"k{number}: 1\n" for number in range(12_000))
    started = time.process_time()
    thousand = "".join(f"k{number}: 1\n" for number in range(1000))
    for _ in range(12):
        parse_yaml(thousand)
    twelve = time.process_time() - started
    started = time.process_time()
    made = parse_yaml(keys)
    assert isinstance(made, dict)
    assert len(made) == 12_000
    assert time.process_time() - started < 3 * twelve + 0.3  # squared it would be twelve times


def every_key(model: type[BaseModel], before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, field in model.model_fields.items():
        yield (*before, name)
        kind: Any = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from every_key(kind, (*before, name))


VALUES = (
    *("[]", "{}", "5", "-1", "0.5", "1e308", ".inf", ".nan", "true", "null", "''", "text", "[[[]]]", "{a: {b: c}}"),
    *("0x" + "f" * 90, "9" * 90, '"\\ud800"', "'9999999999999999999999'", "[null]", "{? : }", "1:30"),
)


def test_any_value_in_any_field_is_a_setting_or_an_error(tmp_path: Path) -> None:
    """Every key of the recipe, of its objective too, 21 values each: no exception but ours, no endless text."""
    (tmp_path / "r.yaml").write_text(BASE, encoding="utf-8")
    objective = [("objective", name) for name in ("kind", "beta", "terms", "label_smoothing", "weight", "margin")]
    keys = [*every_key(Recipe), *objective]
    assert len(keys) > 60
    for key in keys:
        for value in VALUES:
            try:
                load_recipe(tmp_path / "r.yaml", [f"{'.'.join(key)}={value}"])
            except DPOStudioError as error:
                assert len(str(error)) < 2000, (key, value)


def test_a_number_beyond_all_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(BASE, encoding="utf-8")
    for key in ("adapter.rank", "training.max_steps", "data.max_length", "data.train.rows", "training.learning_rate"):
        with pytest.raises(RecipeError, match="beyond 9,007,199,254,740,992"):
            load_recipe(tmp_path / "r.yaml", [f"{key}={2**53 + 1}"])
        load_recipe(tmp_path / "r.yaml", [f"{key}={2**53}"])


def test_rows_nested_as_deep_as_json_goes_are_refused_rows(tmp_path: Path) -> None:
    """In every place of a row, from a few levels to more than Python follows."""
    for depth in (50, 300, 900, 5000):
        deep = "[" * depth + "]" * depth
        for place in ('"prompt": %s, "rejected": "b"', '"prompt": %s', '"prompt": "q", "rejected": %s', '"extra": %s'):
            row = '{"chosen": "a", ' + place % deep + "}"
            (tmp_path / "x.jsonl").write_text(row + "\n" + GOOD.decode(), encoding="utf-8")
            try:
                source = read_pairs(SourceSection(source=str(tmp_path / "x.jsonl")))
            except DPOStudioError as error:
                assert depth > 900, error.message
                assert "nested too deeply" in error.message
            else:
                assert [(refusal.row, refusal.reason) for refusal in source.refused][:1] == [
                    (0, "row is nested deeper than 100 levels" if depth > 100 else source.refused[0].reason)
                ]


# Names and streams


def test_arguments_that_are_no_text_are_refused_by_name(tmp_path: Path) -> None:
    for name in (b"\xff.jsonl", b"a\xc3", b"\xed\xa0\x80", b"--out=\xfe"):
        with pytest.raises(UsageError, match="is not text in this locale") as caught:
            _refuse_names_that_are_no_text(["data", os.fsdecode(name)])
        caught.value.message.encode("utf-8")
    _refuse_names_that_are_no_text(["data", "ü", "\U0001f600", ""])
    (tmp_path / os.fsdecode(b"\xff.jsonl")).write_bytes(GOOD)
    done = dpo("data", "check", b"\xff.jsonl", cwd=tmp_path)
    assert done.code == 2
    assert "\\xff.jsonl is not text in this locale" in done.error


def test_a_folder_s_file_may_have_any_name(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"\xff\xfe.jsonl")).write_bytes(GOOD)
    assert len(read_pairs(SourceSection(source=str(tmp_path))).pairs) == 1
    (tmp_path / os.fsdecode(b"\xff\xfe.jsonl")).write_bytes(b"{")
    with pytest.raises(DPOStudioError, match=r"\\xff\\xfe\.jsonl, line 1: not JSON") as caught:
        read_pairs(SourceSection(source=str(tmp_path)))
    str(caught.value).encode("utf-8")


@pytest.mark.parametrize("plain", [{"LC_ALL": "C"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}])
def test_names_beyond_ascii_in_a_plain_locale(plain: dict[str, str], tmp_path: Path) -> None:
    """Python reads them as UTF-8 unless it is told not to; then one line says which locale would."""
    (tmp_path / "ü.jsonl").write_bytes(GOOD)
    done = dpo("data", "check", "ü.jsonl".encode(), cwd=tmp_path, env=plain)
    assert done.code == (2 if "PYTHONUTF8" in plain else 0)
    assert "PYTHONUTF8" not in plain or "set LC_ALL=C.UTF-8" in done.error


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)], ids=["stdin", "stdout", "stderr", "all"])
def test_closed_streams_are_no_error_and_no_file_of_ours(closed: tuple[int, ...], tmp_path: Path) -> None:
    """A file that gets a closed stream's number would be written into by whatever prints."""
    (tmp_path / "x.jsonl").write_bytes(GOOD * 3)
    done = dpo("data", "convert", "x.jsonl", "out.jsonl", cwd=tmp_path, closed=closed)
    assert done.code == 0, done.error
    written = (tmp_path / "out.jsonl").read_bytes()
    assert written.count(b"\n") == 3
    assert b"convert" not in written
    assert sys.platform != "linux" or not done.out or 1 not in closed


def test_a_closed_stdin_is_empty_and_an_error_still_has_its_code(tmp_path: Path) -> None:
    done = dpo("data", "check", "-", cwd=tmp_path, closed=(0,))
    assert done.code == 1
    assert "has no rows" in done.error
    assert dpo("data", "check", "missing.jsonl", cwd=tmp_path, closed=(0, 1, 2)).code == 1
