"""What a newcomer's own file meets: reasons with row and value, the options to type, annotators by majority.

Every count and every expected pair is written out by hand.
"""

from __future__ import annotations

import json
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dpo_studio.doctor.text_checks import TextChecks
from dpo_studio.preferences.guesses import meaning_of
from dpo_studio.preferences.pair import Message, Pair
from tests.tiny_runs import dpo, write_rows

LABELLED = ("--map", "prompt=ask", "--map", "first=x", "--map", "second=y", "--map", "label=who")
MEANINGS = ("--label", "first=A", "--label", "second=B", "--label", "tie=T")


def labelled(*labels: Any) -> list[dict[str, Any]]:
    return [{"ask": f"q{row}", "x": "left", "y": "right", "who": label} for row, label in enumerate(labels)]


def converted(folder: Path, rows: list[dict[str, Any]], *options: str) -> tuple[list[tuple[str, str]], list[Any], str]:
    """(chosen and rejected text of every pair, the refused rows, what was said on stderr)."""
    out = folder / "pairs.jsonl"
    said = dpo("data", "convert", write_rows(folder / "in.jsonl", rows), out, *options)
    assert said.code == 0, said.err
    pairs = [json.loads(line) for line in out.read_text().splitlines()]
    refused = [json.loads(line) for line in (folder / "pairs.refused.jsonl").read_text().splitlines()]
    return [(pair["chosen"][0]["content"], pair["rejected"][0]["content"]) for pair in pairs], refused, said.err


def test_a_refused_label_is_told_with_its_row_and_value(tmp_path: Path) -> None:
    rows = labelled(*["A"] * 17, "mixed", "B")
    pairs, refused, said = converted(tmp_path, rows, *LABELLED, *MEANINGS)
    assert Counter(pairs) == {("left", "right"): 17, ("right", "left"): 1}
    assert refused == [{"row": 17, "reason": "label has a value that no label setting names", "seen": "'mixed'"}]
    assert "the first is row 17, 'mixed'" in said and "rows count from 0" in said


def test_a_file_of_ties_is_not_called_a_wrong_mapping(tmp_path: Path) -> None:
    said = dpo("data", "check", write_rows(tmp_path / "in.jsonl", labelled("T", "T")), *LABELLED, *MEANINGS)
    assert said.code == 1 and "a tie has no preference" in said.out and "--map" not in said.out
    out = dpo("data", "convert", tmp_path / "in.jsonl", tmp_path / "out.jsonl", *LABELLED, *MEANINGS)
    assert "every row is a tie" in out.err and "2 x tie (row 0)" in out.err


def test_ties_among_pairs_are_no_warning(tmp_path: Path) -> None:
    """Half of the rows are ties, far over the tenth that warns of refused rows."""
    file = write_rows(tmp_path / "in.jsonl", labelled("A", "T", "B", "T"))
    found = json.loads(dpo("data", "check", file, *LABELLED, *MEANINGS, "--json").out)["findings"]
    (refused,) = [one for one in found if one["name"] == "refused-rows"]
    assert (refused["count"], refused["level"]) == (2, "note")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"prompt": "q", "chosen": "a", "rejected": "a"}], "drop these rows"),
        ([{"prompt": "q", "chosen": "a", "rejected": ""}], "Fill the column in"),
        (labelled("?"), "Say what each value means: --label first=VALUE"),
    ],
)
def test_advice_follows_the_reason(rows: list[dict[str, Any]], words: str, tmp_path: Path) -> None:
    how = (*LABELLED, *MEANINGS) if "who" in rows[0] else ()
    said = dpo("data", "convert", write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl", *how)
    assert said.code == 1 and words in said.err


@pytest.mark.parametrize(
    ("options", "meant"),
    [
        (("--map", "promt=ask", "--map", "chosen=x", "--map", "rejected=y"), "did you mean prompt?"),
        (("--map", "prompt=aks", "--map", "chosen=x", "--map", "rejected=y"), "did you mean ask?"),
        ((*LABELLED, "--label", "frist=A", "--label", "second=B"), "did you mean first?"),
    ],
)
def test_a_typo_in_a_mapping_is_answered_with_the_nearest(options: tuple[str, ...], meant: str, tmp_path: Path) -> None:
    said = dpo("data", "check", write_rows(tmp_path / "in.jsonl", labelled("A")), *options)
    assert said.code == 1 and meant in said.err


SHAPES: list[tuple[list[dict[str, Any]], list[tuple[str, str]]]] = [
    ([{"question": "q", "good_answer": "g", "bad_answer": "b", "id": 3}], [("g", "b")]),
    (
        [
            {"Prompt": "q", "Response A": "g", "Response B": "b", "Better": "A"},
            {"Prompt": "r", "Response A": "b", "Response B": "g", "Better": "B"},
        ],
        [("g", "b"), ("g", "b")],
    ),
    ([{"query": "q", "answer1": "b", "answer2": "g", "score1": 2, "score2": 7.5}], [("g", "b")]),
    ([{"task": "q", "candidates": ["b", "g"], "ratings": [1, 4]}], [("g", "b")]),
]


@pytest.mark.parametrize(("rows", "expected"), SHAPES)
def test_the_options_a_refusal_suggests_read_the_file(
    rows: list[dict[str, Any]], expected: list[tuple[str, str]], tmp_path: Path
) -> None:
    """The hint has a whole `dpo data convert` command: it is typed as it stands, but for where it writes."""
    said = dpo("data", "check", write_rows(tmp_path / "in.jsonl", rows))
    assert said.code == 1
    command = said.err.partition("`dpo data convert ")[2].partition("`")[0]
    source, _, *options = shlex.split(command)
    assert source == str(tmp_path / "in.jsonl")
    assert converted(tmp_path, rows, *options)[0] == expected


def test_values_that_are_not_sure_are_left_to_the_user(tmp_path: Path) -> None:
    """0 and 1 of answers 1 and 2: 0 may be the first or a tie."""
    rows = [{"prompt": "q", "answer1": "a", "answer2": "b", "label": label} for label in (0, 1)]
    assert "--label first=VALUE" in dpo("data", "check", write_rows(tmp_path / "in.jsonl", rows)).err
    assert [meaning_of(value, "answer_0", "answer_1") for value in (0, 1, 2)] == ["first", "second", None]
    assert [meaning_of(value, "answer_a", "answer_b") for value in ("left", "B", "tie", "A>B", "?", "A tie")] == [
        "first", "second", "tie", None, None, None]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, "supervised"),
        ({"instruction": "q", "input": "", "output": "a"}, "supervised"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "supervised"),
        ({"text": "a whole document"}, "supervised"),
        ({"prompt": "q", "completion": "a", "label": True}, "KTO"),
        ({"messages": [{"role": "user", "content": "q"}], "kto_tag": False}, "KTO"),
        ({"prompt": "q", "completion": "a", "label": 1}, "KTO"),
        ({"prompt": "q"}, "prompts without answers"),
    ],
)
def test_files_for_other_ways_of_tuning_are_named(row: dict[str, Any], kind: str, tmp_path: Path) -> None:
    said = dpo("data", "check", write_rows(tmp_path / "in.jsonl", [row]))
    assert said.code == 1 and kind in said.err


def task(*selected: str | None, cancelled: bool = False) -> dict[str, Any]:
    """A task of Label Studio's human preference template, one annotation each; None: submitted without an answer."""
    annotations = [
        {
            "id": number,
            "completed_by": number,
            "was_cancelled": cancelled and number == 0,
            "result": [] if side is None else [{"type": "pairwise", "value": {"selected": side}}],
        }
        for number, side in enumerate(selected)
    ]
    data = {"prompt": "q", "answer1": "one", "answer2": "two"}
    return {"id": 1, "data": data, "annotations": annotations, "predictions": []}


def test_label_studio_s_annotators_decide_by_majority(tmp_path: Path) -> None:
    rows = [
        task("left", "right", "right"),  # 2 of 3: the second, though the first annotator said left
        task("left"),
        task("left", "right"),  # no majority
        task("left", "right", cancelled=True),  # the first one does not count
        task(None, "left"),
        task(),
        task("left", "up"),
    ]
    pairs, refused, _ = converted(tmp_path, rows)
    assert pairs == [("two", "one"), ("one", "two"), ("two", "one"), ("one", "two")]
    assert refused == [
        {"row": 2, "reason": "tie: no majority of annotators"},
        {"row": 5, "reason": "no annotator has labelled it"},
        {"row": 6, "reason": "an annotator's value names neither of the answers nor a tie", "seen": "'up'"},
    ]


def record(*values: str, states: tuple[str, ...] = ()) -> dict[str, Any]:
    said = [
        {"value": value, "user_id": f"u{at}"} | ({"status": states[at]} if states else {})
        for at, value in enumerate(values)
    ]
    fields = {"prompt": "q", "response_a": "one", "response_b": "two"}
    suggestion = {"preference": {"value": "response_a", "score": 0.9, "agent": "a model"}}
    return {"id": "1", "fields": fields, "suggestions": suggestion, "responses": {"preference": said} if said else {}}


def flat(row: dict[str, Any]) -> dict[str, Any]:
    """The same record as `to_datasets` writes it."""
    said = row["responses"].get("preference", [])
    fields: dict[str, Any] = row["fields"]
    return fields | {
        "preference.responses": [one["value"] for one in said],
        "preference.responses.users": [one["user_id"] for one in said],
        "preference.responses.status": [one.get("status", "submitted") for one in said],
        "preference.suggestion": "response_a",
    }


@pytest.mark.parametrize("flattened", [False, True])
def test_argilla_2_s_annotators_decide_by_majority(flattened: bool, tmp_path: Path) -> None:
    """A draft does not count, nor does the suggestion, which is a model's."""
    rows = [
        record("response_a", "response_b", "response_b"),
        record("response_b", "response_a"),
        record("response_b", "response_a", states=("submitted", "draft")),
        record("tie", "tie", "response_a"),
        record(),
    ]
    pairs, refused, _ = converted(tmp_path, [flat(row) for row in rows] if flattened else rows)
    assert pairs == [("two", "one"), ("two", "one")]
    assert [(one["row"], one["reason"]) for one in refused] == [
        (1, "tie: no majority of annotators"),
        (3, "tie"),
        (4, "no annotator has labelled it"),
    ]


def test_a_mapping_reads_several_annotators(tmp_path: Path) -> None:
    """Columns with commas between them, a list, and a path into lists within lists: 2 of 3 decide, 1 of 2 does not."""
    both = ("--map", "prompt=ask", "--map", "first=x", "--map", "second=y", "--label", "first=A", "--label", "second=B")
    said = [("B", "A", "A"), ("A", None, "B"), ("B", None, None)]
    expected, tie = [("left", "right"), ("right", "left")], "tie: no majority of annotators"
    columns = [labelled(None)[0] | dict(zip(("ann", "bob", "eve"), one, strict=True)) for one in said]
    paths = [labelled(None)[0] | {"notes": [{"result": [{"v": vote}]} for vote in one if vote]} for one in said]
    lists = [labelled(None)[0] | {"votes": [vote for vote in one if vote]} for one in said]
    for number, (rows, label) in enumerate(((columns, "ann,bob,eve"), (paths, "notes.result.v"), (lists, "votes"))):
        (folder := tmp_path / str(number)).mkdir()
        pairs, refused, _ = converted(folder, rows, *both, "--map", f"label={label}")
        assert pairs == expected and refused == [{"row": 1, "reason": tie}]


def opening(chosen: int, rejected: int) -> Any:
    """What is found of 100 pairs of which so many answers of each side open with the same three words."""
    checks = TextChecks()
    for row in range(100):
        answers = [
            f"Sure, here is {row}" if row < share else f"{word}{row} alone {row} so" for word, share in
            (("c", chosen), ("r", rejected))
        ]  # fmt: skip
        turns = [(Message("assistant", text),) for text in answers]
        checks.see(Pair((Message("user", f"question {row}"),), turns[0], turns[1], row=row))
    (found,) = [one for one in checks.findings() if one.name == "same-opening"]
    return found


def test_an_opening_that_both_sides_have_alike_is_no_finding() -> None:
    assert opening(41, 41).level == "fine" and opening(41, 40).level == "fine"
    assert opening(41, 33).level == "note" and opening(41, 10).level == "warning"
