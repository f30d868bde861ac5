"""Sources: files of every kind and rows of every shape, with the expected pairs written out by hand."""

from __future__ import annotations

import csv
import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_studio.config import SourceSection
from dpo_studio.errors import DataError
from dpo_studio.preferences import rows as rows_module
from dpo_studio.preferences.formats import FORMATS
from dpo_studio.preferences.pair import Message, Pair
from dpo_studio.preferences.rows import sample
from dpo_studio.preferences.sources import PairSource, Refusal, read_pairs

Turns = tuple[Message, ...]
GOOD = {"prompt": "Why?", "chosen": "Because.", "rejected": "No."}
USER, BOT, SYSTEM = ({"role": role, "content": role} for role in ("user", "assistant", "system"))


def user(text: str) -> Message:
    return Message("user", text)


def bot(text: str) -> Message:
    return Message("assistant", text)


def turn(role: str, content: object) -> dict[str, object]:
    return {"role": role, "content": content}


def jsonl(path: Path, *rows: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(source: Path | str, **section: Any) -> PairSource:
    return read_pairs(SourceSection(source=str(source), **section))


@pytest.fixture
def read_rows(tmp_path: Path) -> Callable[..., PairSource]:
    """Read these rows from a .jsonl file."""
    return lambda *rows, **section: read(jsonl(tmp_path / "pairs.jsonl", *rows), **section)


# Formats


def test_trl_text_columns_are_one_user_turn_and_assistant_turns(read_rows: Callable[..., PairSource]) -> None:
    source = read_rows(GOOD | {"score": 3})
    assert source.format == "trl"
    assert source.pairs == [Pair((user("Why?"),), (bot("Because."),), (bot("No."),), row=0)]
    assert (source.rows, source.refused) == (1, [])


def test_trl_message_lists_keep_system_turns_roles_and_many_turns(read_rows: Callable[..., PairSource]) -> None:
    prompt = [turn("system", "Be brief."), turn("user", "2+2?"), turn("assistant", "4"), turn("user", "And 3+3?")]
    row = {"prompt": prompt, "chosen": [turn("assistant", "6")], "rejected": [turn("assistant", "7")]}
    (pair,) = read_rows(row).pairs
    assert pair.prompt == (Message("system", "Be brief."), user("2+2?"), bot("4"), user("And 3+3?"))
    assert (pair.chosen, pair.rejected) == ((bot("6"),), (bot("7"),))


def test_an_answer_of_several_turns_stays_whole(read_rows: Callable[..., PairSource]) -> None:
    answer = [turn("assistant", "Look it up."), turn("tool", "42"), turn("assistant", "It is 42.")]
    (pair,) = read_rows({"prompt": [turn("user", "q")], "chosen": answer, "rejected": [turn("assistant", "x")]}).pairs
    assert pair.chosen == (bot("Look it up."), Message("tool", "42"), bot("It is 42."))


def test_a_prompt_repeated_before_the_answers_is_stripped(read_rows: Callable[..., PairSource]) -> None:
    prompt = [turn("system", "s"), turn("user", "q")]
    row = {"prompt": prompt, "chosen": [*prompt, turn("assistant", "a")], "rejected": [*prompt, turn("assistant", "b")]}
    assert read_rows(row).pairs == [Pair((Message("system", "s"), user("q")), (bot("a"),), (bot("b"),))]


def test_implicit_prompt_is_the_common_turns_up_to_the_last_user_turn(read_rows: Callable[..., PairSource]) -> None:
    """Both dialogues begin u1 a1 u2 and share even the first assistant turn after it; the prompt ends at u2."""
    shared = [turn("user", "u1"), turn("assistant", "a1"), turn("user", "u2"), turn("assistant", "Well,")]
    row = {"chosen": [*shared, turn("assistant", "yes")], "rejected": [*shared, turn("assistant", "no")], "note": "x"}
    source = read_rows(row)
    assert source.format == "trl"
    assert source.pairs == [
        Pair((user("u1"), bot("a1"), user("u2")), (bot("Well,"), bot("yes")), (bot("Well,"), bot("no")))
    ]


def test_implicit_prompt_may_end_with_a_tool_turn(read_rows: Callable[..., PairSource]) -> None:
    shared = [turn("user", "u"), turn("assistant", "call"), turn("tool", "result")]
    row = {"chosen": [*shared, turn("assistant", "yes")], "rejected": [*shared, turn("assistant", "no")]}
    (pair,) = read_rows(row).pairs
    assert pair.prompt == (user("u"), bot("call"), Message("tool", "result"))


def test_implicit_prompt_of_plain_texts_is_their_common_whole_words(read_rows: Callable[..., PairSource]) -> None:
    """TRL's own example, and one whose answers share 'gr' inside a word: the prompt stops before it."""
    source = read_rows(
        {"chosen": "The sky is blue.", "rejected": "The sky is red."},
        {"chosen": "It was grey.", "rejected": "It was green."},
    )
    assert source.pairs == [
        Pair((user("The sky is"),), (bot("blue."),), (bot("red."),), row=0),
        Pair((user("It was"),), (bot("grey."),), (bot("green."),), row=1),
    ]


def test_plain_texts_beside_an_unknown_column_are_not_an_implicit_prompt(read_rows: Callable[..., PairSource]) -> None:
    """In `topic, chosen, rejected` the common 'The' of two answers is not what was asked."""
    with pytest.raises(DataError, match="topic, chosen, rejected") as caught:
        read_rows({"topic": "Sky?", "chosen": "The sky is blue.", "rejected": "The sea."})
    assert "data.train.map" in str(caught.value.hint)


def ultrafeedback(prompt: str, *turns: dict[str, object]) -> dict[str, object]:
    chosen, rejected = [*turns, turn("assistant", "good")], [*turns, turn("assistant", "bad")]
    scores = {"score_chosen": 8.5, "score_rejected": 7.0, "prompt_id": "f0e37e9f", "messages": chosen}
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected} | scores


def test_ultrafeedback_dialogues_lose_the_prompt_they_repeat(read_rows: Callable[..., PairSource]) -> None:
    source = read_rows(
        ultrafeedback("q", turn("user", "q")), ultrafeedback("q", turn("system", "s"), turn("user", "q"))
    )
    assert source.format == "ultrafeedback"
    assert source.pairs == [
        Pair((user("q"),), (bot("good"),), (bot("bad"),), row=0, scores=(8.5, 7.0)),
        Pair((Message("system", "s"), user("q")), (bot("good"),), (bot("bad"),), row=1, scores=(8.5, 7.0)),
    ]


@pytest.mark.parametrize("prompt", ["first", "last"])
def test_ultrafeedback_prompt_may_be_the_first_or_last_user_turn(
    prompt: str, read_rows: Callable[..., PairSource]
) -> None:
    turns = (turn("user", "first"), turn("assistant", "a"), turn("user", "last"))
    assert read_rows(ultrafeedback(prompt, *turns)).pairs[0].prompt == (user("first"), bot("a"), user("last"))


def test_hh_transcripts_part_at_the_last_assistant_turn(read_rows: Callable[..., PairSource]) -> None:
    start = "\n\nHuman: Hello there\n\nAssistant: Hi.\n\nHuman: Two\n\nparagraphs: why?"
    row = {"chosen": f"{start}\n\nAssistant:  Because.\n", "rejected": f"{start}\n\nAssistant:"}
    fine = row | {"rejected": f"{start}\n\nAssistant: No\n\nreason."}
    source = read_rows(fine, row)
    assert source.format == "hh"
    prompt = (user("Hello there"), bot("Hi."), user("Two\n\nparagraphs: why?"))
    assert source.pairs == [Pair(prompt, (bot("Because."),), (bot("No\n\nreason."),))]
    assert source.refused == [Refusal(1, "rejected is empty")]


@pytest.mark.parametrize("repeats", [True, False])
def test_hh_with_a_prompt_column(repeats: bool, read_rows: Callable[..., PairSource]) -> None:
    """Some copies cut the shared turns off into `prompt`; in some the answers still hold them."""
    prompt = "\n\nHuman: Why?\n\nAssistant:"
    before = prompt if repeats else ""
    source = read_rows({"prompt": prompt, "chosen": f"{before} Because.", "rejected": f"{before} No."})
    assert source.format == "hh"
    assert source.pairs == [Pair((user("Why?"),), (bot("Because."),), (bot("No."),))]


def test_mapped_columns_reach_into_nested_ones(read_rows: Callable[..., PairSource]) -> None:
    columns = {"prompt": "task.text", "chosen": "best.0.out", "rejected": "worst.out", "system": "sys"}
    rows = [
        {"task": {"text": "q"}, "best": [{"out": "a"}], "worst": {"out": "b"}, "sys": "s"},
        {"task": {"text": "q"}, "best": [{"out": "a"}], "worst.out": "a column with a dot", "sys": ""},
        {"task": {"text": "q"}, "best": [], "worst": {"out": "b"}, "sys": None},
        {"task": {"text": "q"}, "best": [{"out": "a"}], "worst": {"out": "b"}, "sys": 3},
    ]
    source = read_rows(*rows, map=columns)
    assert source.format == "mapped"
    assert source.pairs == [
        Pair((Message("system", "s"), user("q")), (bot("a"),), (bot("b"),), row=0),
        Pair((user("q"),), (bot("a"),), (bot("a column with a dot"),), row=1),
    ]
    assert source.refused == [Refusal(2, "chosen is missing"), Refusal(3, "system is not text")]


LABELLED = {"prompt": "q", "first": "x", "second": "y", "label": "best"}


@pytest.mark.parametrize(
    ("label", "first_wins"),
    [(1, True), ("1", True), (1.0, True), ("1.0", True), (" 1 ", True), (2, False), ("2.00", False)],
)
def test_labels_compare_as_text(label: object, first_wins: bool, read_rows: Callable[..., PairSource]) -> None:
    row = {"q": "Why?", "x": "X", "y": "Y", "best": label}
    (pair,) = read_rows(row, map=LABELLED, label={"first": 1, "second": "2", "tie": 0}).pairs
    expected = Pair((user("Why?"),), (bot("X"),), (bot("Y"),))
    assert pair == (expected if first_wins else expected.swap())


def test_ties_and_unknown_labels_are_set_aside(read_rows: Callable[..., PairSource]) -> None:
    """1.5 is the tie; 15, an object and nothing at all are not labels; True is not 1; 2 is read."""
    row = {"q": "Why?", "x": "X", "y": "Y"}
    labels = [1.5, "1.50", 15, {"a": 1}, None, True, 2]
    source = read_rows(
        *[row | {"best": label} for label in labels], map=LABELLED, label={"first": 1, "second": 2, "tie": 1.5}
    )
    unknown = "label has a value that no label setting names"
    reasons = ["tie", "tie", unknown, "label is not a single value", "label is missing", unknown]
    assert source.refused == [Refusal(row, reason) for row, reason in enumerate(reasons)]
    assert [pair.row for pair in source.pairs] == [6]


def test_boolean_labels(read_rows: Callable[..., PairSource]) -> None:
    rows = [{"q": "Why?", "x": "X", "y": "Y", "best": label} for label in (True, "True", False)]
    pairs = read_rows(*rows, map=LABELLED, label={"first": True, "second": False}).pairs
    assert [pair.chosen[0].content for pair in pairs] == ["X", "X", "Y"]


def test_a_mapped_prompt_with_its_own_system_turn_takes_no_second_one(read_rows: Callable[..., PairSource]) -> None:
    row = {"q": [SYSTEM, USER], "a": "A", "b": "B", "s": "be kind"}
    columns = {"prompt": "q", "chosen": "a", "rejected": "b", "system": "s"}
    source = read_rows(row, row | {"s": None}, map=columns)
    assert source.refused == [Refusal(0, "prompt has a system turn besides the system column")]
    assert len(source.pairs) == 1


def test_content_parts_that_are_all_text_are_joined(read_rows: Callable[..., PairSource]) -> None:
    parts = [{"type": "text", "text": "Be"}, {"type": "text", "text": "cause."}]
    row = {"prompt": [USER], "chosen": [turn("assistant", parts)], "rejected": [BOT]}
    assert read_rows(row).pairs[0].chosen == (bot("Because."),)


# Refusals

LONE = "half a pair \ud83d"
IMAGE = [{"type": "image", "url": "x.png"}]
REFUSED: dict[str, list[Any]] = {
    "row is not a JSON object": [1, "text", None, [GOOD], True],
    "prompt is missing": [{"chosen": "a", "rejected": "b"}, GOOD | {"prompt": None}],
    "chosen is missing": [{"prompt": "q", "rejected": "b"}],
    "rejected is missing": [GOOD | {"rejected": None}],
    "prompt is neither text nor messages": [GOOD | {"prompt": 3}, GOOD | {"prompt": {"role": "user", "content": "q"}}],
    "chosen is neither text nor messages": [GOOD | {"chosen": True}, GOOD | {"chosen": 1.5}],
    "rejected is neither text nor messages": [GOOD | {"rejected": 0}, GOOD | {"rejected": {"text": "b"}}],
    "prompt is empty": [GOOD | {"prompt": " \n"}, GOOD | {"prompt": []}, GOOD | {"prompt": [turn("user", "")]}],
    "chosen is empty": [GOOD | {"chosen": ""}, GOOD | {"chosen": []}, GOOD | {"chosen": [turn("assistant", "\t")]}],
    "rejected is empty": [GOOD | {"rejected": " "}, GOOD | {"prompt": [USER], "rejected": [USER]}],
    "chosen and rejected are identical": [
        GOOD | {"rejected": "Because."},
        GOOD | {"rejected": " Because.\n"},
        GOOD | {"chosen": [BOT], "rejected": "assistant"},
    ],
    "prompt does not end with a user turn": [GOOD | {"prompt": [USER, BOT]}, GOOD | {"prompt": [SYSTEM]}],
    "chosen does not start with an assistant turn": [
        GOOD | {"chosen": [turn("tool", "x"), BOT]},
        GOOD | {"prompt": [USER], "chosen": [USER, USER, BOT]},
    ],
    "rejected does not end with an assistant turn": [GOOD | {"rejected": [BOT, USER]}],
    "prompt differs from the dialogue": [
        GOOD | {"chosen": [USER, BOT]},
        GOOD | {"prompt": [SYSTEM, USER], "chosen": [USER, BOT]},
        GOOD | {"chosen": [USER, BOT], "rejected": [USER, turn("assistant", "other")]},
    ],
    "chosen has a message without a role": [GOOD | {"chosen": [{"content": "a"}]}],
    "chosen has a message without content": [
        GOOD | {"chosen": [{"role": "assistant"}]},
        GOOD | {"chosen": [turn("assistant", None)]},
    ],
    "chosen has a message of unknown role 'gpt'": [GOOD | {"chosen": [turn("gpt", "a")]}],
    "chosen has a message whose content is not text": [
        GOOD | {"chosen": [turn("assistant", content)]}
        for content in (3, [{"type": "text"}], ["a"], [{"type": "text", "text": 1}])
    ],
    "chosen has a message whose content is not text (image)": [
        GOOD | {"chosen": [turn("assistant", content)]} for content in (IMAGE, {"type": "image"})
    ],
    "chosen has a message with tool calls, which are not supported": [
        GOOD | {"chosen": [{"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}, BOT]}
    ],
    "rejected holds something that is not a message": [GOOD | {"rejected": ["b"]}, GOOD | {"rejected": [None]}],
    "row has tools, which are not supported": [GOOD | {"tools": [{"name": "f"}]}],
    "text is not valid Unicode": [
        GOOD | {"prompt": LONE},
        GOOD | {"chosen": LONE},
        GOOD | {"rejected": [turn("assistant", LONE)]},
    ],
    "chosen is a message list written out as text": [
        GOOD | {"chosen": "[{'role': 'assistant', 'content': 'a'}]"},
        GOOD | {"chosen": '[ {"content": "a", "role": "assistant"} ]'},
    ],
}


@pytest.mark.parametrize("reason", REFUSED)
def test_trl_rows_that_are_refused(reason: str, read_rows: Callable[..., PairSource]) -> None:
    """Each row stands between two good ones, which are kept under their own numbers."""
    bad = REFUSED[reason]
    source = read_rows(GOOD, *bad, GOOD)
    assert source.refused == [Refusal(row, reason) for row in range(1, len(bad) + 1)]
    assert [pair.row for pair in source.pairs] == [0, len(bad) + 1]
    assert source.refused_by_reason() == {reason: len(bad)}


def test_ultrafeedback_rows_that_are_refused(read_rows: Callable[..., PairSource]) -> None:
    good = ultrafeedback("q", turn("user", "q"))
    rows = {
        "prompt is not text": good | {"prompt": [USER]},
        "rejected is not a list of messages": good | {"rejected": "bad"},
        "prompt differs from the dialogue": good | {"prompt": "another"},
        "chosen and rejected are identical": good | {"rejected": good["chosen"]},
        "rejected does not end with an assistant turn": good | {"rejected": [turn("user", "q"), BOT, USER]},
    }
    source = read_rows(good, *rows.values())
    assert [refusal.reason for refusal in source.refused] == list(rows)


def test_implicit_prompts_that_are_refused(read_rows: Callable[..., PairSource]) -> None:
    good = {"chosen": [USER, turn("assistant", "a")], "rejected": [USER, turn("assistant", "b")]}
    rows = {
        "no prompt: chosen and rejected share no user turn": good | {"rejected": [turn("user", "other"), BOT]},
        "no prompt: chosen and rejected do not begin alike": {"chosen": "Yes.", "rejected": "No."},
        "rejected is not a list of messages": good | {"rejected": "b"},
        "rejected is empty": good | {"rejected": [USER]},
    }
    source = read_rows(good, *rows.values())
    assert [refusal.reason for refusal in source.refused] == list(rows)


def test_hh_rows_that_are_refused(read_rows: Callable[..., PairSource]) -> None:
    good = {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}
    rows = {
        "the transcripts differ before the last answer": good | {"rejected": "\n\nHuman: r\n\nAssistant: b"},
        "chosen is not text": good | {"chosen": [USER, BOT]},
        "rejected is not a Human/Assistant transcript": good | {"rejected": "b"},
        "rejected does not end with an assistant turn": good | {"rejected": "\n\nHuman: q\n\nHuman: b"},
        "prompt is empty": {"chosen": "\n\nAssistant: a", "rejected": "\n\nAssistant: b"},
        "prompt differs from the dialogue": good | {"prompt": "\n\nHuman: another\n\nAssistant:"},
    }
    source = read_rows(good, *rows.values())
    assert [refusal.reason for refusal in source.refused] == list(rows)


def test_reasons_are_counted_most_frequent_first(read_rows: Callable[..., PairSource]) -> None:
    empty, missing = GOOD | {"rejected": ""}, GOOD | {"prompt": None}
    source = read_rows(missing, empty, GOOD, empty)
    assert list(source.refused_by_reason().items()) == [("rejected is empty", 2), ("prompt is missing", 1)]
    assert source.rows == 4


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "tool_calls"]), inner, max_size=3)
        | st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "gpt"]), "content": inner})
    ),
    max_leaves=8,
)
ROW = JSON | st.dictionaries(st.sampled_from(["prompt", "chosen", "rejected", "tools"]), JSON)


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(ROW, max_size=6), shape=st.sampled_from(["auto", "trl", "ultrafeedback", "hh"]))
def test_whatever_a_row_holds_it_is_a_pair_or_refused(
    rows: list[object], shape: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Every row once, in order, on one of the two lists; or one DataError. Never another exception."""
    file = jsonl(tmp_path_factory.getbasetemp() / "fuzz.jsonl", *rows)
    try:
        source = read(file, format=shape)
    except DataError as error:
        assert error.hint
        return
    assert [pair.row for pair in source.pairs] == sorted(pair.row for pair in source.pairs)
    assert sorted([x.row for x in source.pairs] + [x.row for x in source.refused]) == list(range(len(rows)))


# Files


def write_csv(path: Path, *rows: list[str], bom: bool = False) -> Path:
    with path.open("w", encoding="utf-8-sig" if bom else "utf-8", newline="") as stream:
        csv.writer(stream).writerows(rows)
    return path


def write_parquet(path: Path, *rows: Mapping[str, object]) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    path.parent.mkdir(parents=True, exist_ok=True)
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


OTHER = {"prompt": "Où?", "chosen": "Là,\n\u2028 ici \U0001f600.", "rejected": '"Non"'}
TWO = [
    Pair((user("Why?"),), (bot("Because."),), (bot("No."),), row=0),
    Pair((user("Où?"),), (bot("Là,\n\u2028 ici \U0001f600."),), (bot('"Non"'),), row=1),
]
LINES = b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in (GOOD, OTHER))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.jsonl", LINES),
        ("p.jsonl", b"\xef\xbb\xbf" + LINES.rstrip()),  # a byte order mark, no newline at the end
        ("P.JSONL", b"\n" + LINES.replace(b"\n", b"\r\n\r\n")),  # blank lines are no rows
        ("p.jsonl.gz", gzip.compress(LINES, mtime=0)),
        ("p.json", json.dumps([GOOD, OTHER], indent=2).encode()),
        ("p.json", b"\xef\xbb\xbf" + json.dumps({"version": 1, "data": [GOOD, OTHER]}).encode()),
        ("p.json", LINES),  # JSON Lines under another name
        ("p.json.gz", gzip.compress(json.dumps([GOOD, OTHER]).encode())),
    ],
)
def test_json_files(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    source = read(tmp_path / name)
    assert source.pairs == TWO
    assert source.name == str(tmp_path / name)


def test_a_json_file_of_one_row_is_one_row(tmp_path: Path) -> None:
    """Its one list is a message list, not a list of rows."""
    (tmp_path / "p.json").write_text(json.dumps(GOOD | {"chosen": [BOT]}), encoding="utf-8")
    assert read(tmp_path / "p.json").pairs == [Pair((user("Why?"),), (bot("assistant"),), (bot("No."),))]


@pytest.mark.parametrize("bom", [True, False])
def test_csv_files(bom: bool, tmp_path: Path) -> None:
    """A field over csv's default limit of 131,072 characters is read too."""
    names = ["prompt", "chosen", "rejected"]
    long = "x" * 200_000
    rows = [[row[name] for name in names] for row in (GOOD, OTHER)]
    source = read(write_csv(tmp_path / "p.csv", names, *rows, ["q", long, "short"], bom=bom))
    assert source.pairs == [*TWO, Pair((user("q"),), (bot(long),), (bot("short"),), row=2)]


def test_csv_rows_of_another_length_than_the_header_are_refused(tmp_path: Path) -> None:
    file = write_csv(
        tmp_path / "p.csv", ["prompt", "chosen", "rejected"], ["q", "a", "b"], ["q", "a"], ["q", "a", "b", "c"]
    )
    assert read(file).refused == [Refusal(1, "rejected is missing"), Refusal(2, "row has more fields than the header")]


def test_parquet_files_with_message_lists(tmp_path: Path) -> None:
    asked = turn("user", "q")
    rows = [
        {"prompt": "q", "chosen": [asked, turn("assistant", text)], "rejected": [asked, BOT]}
        for text in ("a", "assistant")
    ]
    source = read(write_parquet(tmp_path / "p.parquet", *rows))
    assert source.format == "ultrafeedback"
    assert source.pairs == [Pair((user("q"),), (bot("a"),), (bot("assistant"),))]
    assert source.refused == [Refusal(1, "chosen and rejected are identical")]


def prompts(source: PairSource) -> list[str]:
    return [pair.prompt[-1].content for pair in source.pairs]


def row_of(prompt: str) -> dict[str, str]:
    return GOOD | {"prompt": prompt}


def test_a_folder_reads_the_files_of_one_split_in_order_of_name(tmp_path: Path) -> None:
    jsonl(tmp_path / "b_train.jsonl", row_of("b"))
    jsonl(tmp_path / "train" / "a.jsonl", row_of("t"))
    jsonl(tmp_path / "a.json", row_of("a"))  # names no split: training
    jsonl(tmp_path / "data" / "test-1.jsonl", row_of("test"))
    jsonl(tmp_path / "dev.jsonl", row_of("dev"))
    jsonl(tmp_path / "held_out" / "x.jsonl", row_of("held"))
    jsonl(tmp_path / ".cache" / "train.jsonl", row_of("hidden"))
    (tmp_path / "dataset_info.json").write_text("{}", encoding="utf-8")
    (tmp_path / "README.md").write_text("# train", encoding="utf-8")
    whole = read(tmp_path)
    assert prompts(whole) == ["a", "b", "t"]
    assert [pair.row for pair in whole.pairs] == [0, 1, 2]
    assert prompts(read(tmp_path, split="test")) == ["test"]
    assert prompts(read(f"{tmp_path}:test")) == ["test"]
    assert prompts(read(tmp_path, split="validation")) == prompts(read(tmp_path, split="dev")) == ["dev"]
    assert prompts(read(tmp_path, split="held_out")) == ["held"]
    assert prompts(read(tmp_path, data_dir="train")) == ["t"]


def test_a_folder_laid_out_as_on_the_hub(tmp_path: Path) -> None:
    """UltraFeedback's own layout: splits are named by the shards, and none of them is plain `train`."""
    for split in ("train_prefs", "test_prefs", "train_sft"):
        write_parquet(tmp_path / "data" / f"{split}-00000-of-00002.parquet", row_of(f"{split} 0"))
    write_parquet(tmp_path / "data" / "train_prefs-00001-of-00002.parquet", row_of("train_prefs 1"))
    assert prompts(read(tmp_path, split="train_prefs")) == ["train_prefs 0", "train_prefs 1"]
    with pytest.raises(DataError, match="several splits") as caught:
        read(tmp_path)
    assert caught.value.hint == "name one with split: test_prefs, train_prefs, train_sft"


def test_a_split_may_be_a_files_name(tmp_path: Path) -> None:
    jsonl(tmp_path / "train_prefs.jsonl", row_of("prefs"))
    jsonl(tmp_path / "train_sft.jsonl", row_of("sft"))
    assert prompts(read(tmp_path, split="train_prefs")) == ["prefs"]


def test_a_folder_with_one_split_needs_no_choice(tmp_path: Path) -> None:
    jsonl(tmp_path / "test.jsonl", row_of("t"))
    assert prompts(read(tmp_path)) == ["t"]


def test_a_file_is_one_split(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "pairs.jsonl", GOOD)
    assert len(read(file, split="train").pairs) == len(read(file, split="pairs").pairs) == 1
    with pytest.raises(DataError, match="has no split 'test'"):
        read(file, split="test")


def test_bundled_pairs_have_two_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "_BUNDLED_FOLDER", tmp_path)
    rows = [row_of(f"{split} {n}") | {"split": split} for n in range(2) for split in ("held_out", "train")]
    jsonl(tmp_path / "everyday.jsonl", *rows)
    assert prompts(read("bundled:everyday")) == ["train 0", "train 1"]
    held_out = read("bundled:everyday:held_out")
    assert prompts(held_out) == ["held_out 0", "held_out 1"]
    assert [pair.row for pair in held_out.pairs] == [0, 1]
    assert prompts(read("bundled:everyday", split="held_out")) == prompts(held_out)
    with pytest.raises(DataError, match="twice"):
        read("bundled:everyday:train", split="train")
    with pytest.raises(DataError, match="no split 'test'") as caught:
        read("bundled:everyday:test")
    assert caught.value.hint == "its splits: held_out, train"
    with pytest.raises(DataError, match="'nothing'") as caught:
        read("bundled:nothing")
    assert caught.value.hint == "there is bundled:everyday"


def test_rows_is_a_seeded_sample_in_source_order(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "p.jsonl", *[row_of(str(n)) for n in range(50)])
    ten = read(file, rows=10)
    numbers = [pair.row for pair in ten.pairs]
    assert ten.rows == len(numbers) == 10
    assert numbers == sorted(numbers)
    assert prompts(ten) == [str(number) for number in numbers]
    assert read(file, rows=10).pairs == ten.pairs
    assert read_pairs(SourceSection(source=str(file), rows=10), seed=1).pairs != ten.pairs
    assert set(numbers) < {pair.row for pair in read(file, rows=20).pairs}
    assert read(file, rows=99).rows == 50


def test_every_row_is_sampled_about_equally_often() -> None:
    """10 of 40 rows under 400 seeds: each row 100 times, give or take five standard deviations of 8.7."""
    chosen = [number for seed in range(400) for number, _ in sample(((n, n) for n in range(40)), 10, seed=seed)]
    assert len(chosen) == 4000
    assert all(56 < chosen.count(number) < 144 for number in range(40))


LIBRARY_SCRIPT = """
import sys, datasets
from dpo_studio.config import SourceSection
from dpo_studio.errors import DataError
from dpo_studio.preferences import rows as rows_module
from dpo_studio.preferences.sources import read_pairs

def show(source, **section):
    try:
        pairs = read_pairs(SourceSection(source=source, **section)).pairs
        print([(pair.row, pair.prompt[0].content, pair.rejected[0].content) for pair in pairs])
    except DataError as error:
        print(error.message)
        print(error.hint)

repo, saved, broken = sys.argv[1:]
load, existing = datasets.load_dataset, rows_module._existing
load(repo).save_to_disk(saved)
show(saved)
show(saved, split="test", rows=2)
show(broken)
show("owner/pairs:train")  # HF_HUB_OFFLINE is set
datasets.load_dataset = lambda name, *args, **kwargs: load(repo, *args, **kwargs)
show("owner/pairs")
show("owner/pairs:test", rows=2)
show("owner/pairs", split="nope")
"""


def test_what_the_datasets_library_reads(tmp_path: Path) -> None:
    """A folder from `save_to_disk`, a broken one, a Hub name offline, and `load_dataset` with a folder for the Hub.

    One process of its own, because the library reads its cache folder and HF_HUB_OFFLINE once, when it is imported.
    """
    for split in ("train", "test"):
        rows = [
            {"prompt": f"{split} {n}", "chosen": [BOT], "rejected": [turn("assistant", "no")], "extra": 1.5}
            for n in range(5)
        ]
        write_parquet(tmp_path / "repo" / "data" / f"{split}-00000-of-00001.parquet", *rows)
    jsonl(tmp_path / "broken" / "dataset_dict.json")
    folders = [str(tmp_path / name) for name in ("repo", "saved", "broken")]
    env = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", LIBRARY_SCRIPT, *folders]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    train = str([(n, f"train {n}", "no") for n in range(5)])
    two = str([(n, f"test {n}", "no") for n, _ in sample(((n, n) for n in range(5)), 2, seed=0)])
    lines = done.stdout.splitlines()
    assert lines[:2] == [train, two]
    assert lines[2].startswith(f"saved dataset: {folders[2]}/dataset_dict.json: not JSON")
    assert lines[4].startswith("owner/pairs:train is not a file or folder here, nor a dataset in the cache")
    assert lines[5].startswith("unset HF_HUB_OFFLINE")
    assert lines[6:8] == [train, two]
    assert lines[8].startswith('owner/pairs cannot be loaded: Unknown split "nope". Should be one of')
    assert "train" in lines[8]


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (ConnectionError("no route"), "HF_HUB_OFFLINE=1"),
        (type("DatasetNotFoundError", (FileNotFoundError,), {})("gone"), "hf auth login"),
        (ValueError("Config name is missing.\nPick one"), "name[/config][:split]"),
        (RuntimeError(), "name[/config][:split]"),
    ],
)
def test_hub_errors_have_hints(error: Exception, hint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    refused = rows_module._hub_error("owner/pairs", error)
    assert refused.hint is not None
    assert hint in refused.hint
    assert "\n" not in refused.message


# Errors: what was wrong, where, what to do


@pytest.mark.parametrize(
    "name",
    [
        *(
            "no.jsonl",
            "./no",
            "../no/such",
            "/no/such",
            "a/b/c/d",
            "no.csv:train",
            "c:\\no",
            "pairs.txt",
            "owner/a:b:c",
        ),
        *("~/no-such-folder-of-mine", "~nobody-here/x", "https://example.com/x.jsonl"),
        *("nul\0", "x" * 5000 + ".json"),
    ],
)
def test_no_such_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="no such file or folder") as caught:
        read(name)
    assert caught.value.hint


BROKEN = {
    "bad.jsonl": [
        (b'{"prompt": "q"}\n\n{"prompt": q}\n', "bad.jsonl, line 3: not JSON"),
        (b"[" * 100_000, "line 1: not JSON .nested too deeply"),
        (b'{"n": ' + b"9" * 5000 + b"}", "line 1: not JSON .a number of thousands of digits"),
        (b'{"prompt": "\xff"}\n', "line 1: not UTF-8"),
        (b"[\n" + LINES, "line 1: not JSON"),
        (b"", "has no rows"),
        (b" \n\n", "has no rows"),
        (b"1\n2\n", "its rows are not JSON objects"),
    ],
    "bad.json": [
        (b"[" + LINES, "bad.json, row 0: not JSON .no comma after it"),
        (b"[1, 2", "bad.json, row 1: not JSON .it ends too early"),
        (b"[1,]", "bad.json, row 1: not JSON .Expecting value"),
        (b'[{"a": "' + b"x" * 3_000_000, "bad.json, row 0: not JSON .Unterminated"),
        (b"[1] []", "bad.json: not JSON .something follows"),
        (LINES + b"{", "bad.json, line 3: not JSON"),
        (b"\xff\xfe[\x00", "not UTF-8"),
        (b"[]", "has no rows"),
        (b"", "has no rows"),
        (b'{"data": []}', "has no rows"),
        (b"[" * 100_000, "nested too deeply"),
    ],
    "bad.csv": [
        (b"", "has no rows"),
        (b"prompt,chosen,rejected\n", "has no rows"),
        (b'prompt,chosen,rejected\nq,"a"x,b\n', "bad.csv, the row from line 2 on: not CSV"),
        (b'prompt,chosen,rejected\nq,a,b\nq,"a,b\n', "bad.csv, the row from line 3 on: not CSV"),
        (b"prompt|chosen|rejected\nq|a|b\n", r"its columns \(prompt\|chosen\|rejected\) are not"),
        (b"prompt,chosen,rejected\n\xff,a,b\n", "not UTF-8"),
    ],
    "bad.jsonl.gz": [
        (gzip.compress(LINES * 99, mtime=0)[:-20], "cannot be read"),
        (LINES, "cannot be read"),
        (gzip.compress(LINES, mtime=0)[:12] + b"\0" * 30, "cannot be read"),
        (gzip.compress(b"{", mtime=0), "line 1: not JSON"),
    ],
    "bad.json.gz": [(gzip.compress(LINES, mtime=0)[:-9], "cannot be read")],
    "bad.parquet": [(b"", "not a Parquet file"), (b"PAR1 is not enough PAR1", "Parquet|cannot be read")],
    "bad.xlsx": [(b"PK", "not a kind of file that is read")],
}


@pytest.mark.parametrize(
    ("name", "content", "message"), [(name, *case) for name, cases in BROKEN.items() for case in cases]
)
def test_files_that_cannot_be_read(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path / name)
    assert caught.value.hint
    assert name in caught.value.message


def test_a_folder_without_data(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing", encoding="utf-8")
    with pytest.raises(DataError, match="contains no data files") as caught:
        read(tmp_path)
    assert ".jsonl" in str(caught.value.hint)


def test_a_missing_split_lists_those_there_are(tmp_path: Path) -> None:
    for split in ("test", "train"):
        jsonl(tmp_path / f"{split}.jsonl", GOOD)
    with pytest.raises(DataError, match="has no split 'prefs'") as caught:
        read(tmp_path, split="prefs")
    assert caught.value.hint == "its splits: test, train"
    with pytest.raises(DataError, match="given twice, as :train and as split: test"):
        read(f"{tmp_path}:train", split="test")
    with pytest.raises(DataError, match="has no folder x"):
        read(tmp_path, data_dir="x")


def test_the_split_of_a_hub_name_given_twice_is_refused() -> None:
    with pytest.raises(DataError, match="twice"):
        read("owner/pairs:train", split="train")


def test_wrong_columns_are_named(read_rows: Callable[..., PairSource]) -> None:
    with pytest.raises(DataError, match=r"\(instruction, output, score\)") as caught:
        read_rows({"instruction": "q", "output": "a"}, {"instruction": "q", "score": 1})
    assert "prompt, chosen and rejected" in caught.value.message
    assert "data.train.map" in str(caught.value.hint)
    with pytest.raises(DataError, match="its columns"):
        read_rows({"instruction": "q"}, format="trl")


def test_nothing_usable_gives_the_counts(read_rows: Callable[..., PairSource]) -> None:
    with pytest.raises(
        DataError, match=r"none of its 3 rows can .*: 2 x chosen is empty \(row 0\); 1 x prompt is empty"
    ):
        read_rows(GOOD | {"chosen": ""}, GOOD | {"prompt": ""}, GOOD | {"chosen": " "})


def test_an_unknown_format_names_the_nearest(read_rows: Callable[..., PairSource]) -> None:
    with pytest.raises(DataError, match="unknown format 'ultrafeedbak'") as caught:
        read_rows(GOOD, format="ultrafeedbak")
    assert caught.value.hint == "did you mean ultrafeedback?"
    with pytest.raises(DataError) as caught:
        read_rows(GOOD, format="???")
    assert caught.value.hint == f"the formats are auto, mapped, {', '.join(FORMATS)}"


RANKED = {"prompt": "q", "chosen": "x", "rejected": "y"}
BOTH = {"first": 1, "second": 2}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"map": {"prompt": "q"}}, "map names prompt\n"),
        ({"map": {}, "format": "mapped"}, "map names no columns"),
        ({"map": RANKED | {"wins": "x"}}, "map names chosen, prompt, rejected, wins"),
        ({"map": RANKED | {"label": "best"}}, "map names chosen, label"),
        ({"map": RANKED, "format": "trl"}, "format: mapped, not trl"),
        ({"map": RANKED, "label": BOTH}, "names no label column"),
        ({"map": RANKED | {"chosen": "z"}}, r"has no column 'z' \(data.train.map.chosen\)"),
        ({"map": RANKED | {"chosen": "x.deep"}}, "has no column 'x.deep'"),
        ({"map": LABELLED}, "label needs a value each"),
        ({"map": LABELLED, "label": {"first": 1}}, "label needs a value each"),
        ({"map": LABELLED, "label": BOTH | {"neither": 3}}, "label needs a value each"),
        ({"map": LABELLED, "label": {"first": [1, 2], "second": [3, 2]}}, "label needs a value each"),
        ({"map": LABELLED, "label": {"first": 1, "second": []}}, "label needs a value each"),
        ({"map": {"first": "x", "second": "y", "prompt": "q"}}, "map names first, prompt, second"),
        ({"map": RANKED | {"score_chosen": "best"}}, "map names chosen, prompt, rejected, score_chosen"),
        ({"map": {"input": "q", "chosen": "x", "rejected": "y"}}, "map names chosen, input, rejected"),
        ({"map": LABELLED, "label": BOTH | {"tie": "1.0"}}, "label needs a value each"),
        ({"label": BOTH}, "map names no columns"),
    ],
)
def test_mappings_that_cannot_be_followed(
    section: dict[str, Any], message: str, read_rows: Callable[..., PairSource]
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_rows({"q": "Why?", "x": "X", "y": "Y", "best": 1}, **section)
    assert caught.value.hint


def test_a_few_broken_rows_at_the_top_do_not_decide_the_format(read_rows: Callable[..., PairSource]) -> None:
    good = ultrafeedback("q", turn("user", "q"))
    source = read_rows(None, {"prompt": "q"}, good | {"chosen": True}, good, good)
    assert source.format == "ultrafeedback"
    assert [pair.row for pair in source.pairs] == [3, 4]
