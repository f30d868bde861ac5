"""Public shapes: rows as their files have them, and the pairs they mean, written out by hand."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from dpo_studio.config import SourceSection
from dpo_studio.preferences import files as files_module
from dpo_studio.preferences.pair import Message, Pair, prompt_key
from dpo_studio.preferences.sources import PairSource, Refusal, open_pairs, read_pairs

Row = dict[str, object]


def user(text: str) -> Message:
    return Message("user", text)


def bot(text: str) -> Message:
    return Message("assistant", text)


def system(text: str) -> Message:
    return Message("system", text)


def said(role: str, content: object) -> Row:
    return {"role": role, "content": content}


def spoken(who: str, value: object) -> Row:
    return {"from": who, "value": value}


def asked(prompt: str, chosen: str, rejected: str, row: int = 0, **more: Any) -> Pair:
    return Pair((user(prompt),), (bot(chosen),), (bot(rejected),), row, **more)


def read(folder: Path, *rows: object, **section: Any) -> PairSource:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return read_pairs(SourceSection(source=str(file), **section))


def reasons(source: PairSource) -> dict[int, str]:
    return {refusal.row: refusal.reason for refusal in source.refused}


# Slices of the development files' shapes, counted by hand


def test_pandalm(tmp_path: Path) -> None:
    """As in PandaLM's test set (999 rows: 105 ties, 6 booleans, 52 empty answers, 836 pairs), here 12 rows.

    Rows 0 and 1 have majorities 1 and 2 (two of three). 2 is a tie by majority, 3 has three opinions: no majority.
    4 and 5 hold a boolean, one on each side. 6 and 7 have an empty answer, 8 two equal ones. 9 is an exact copy of 0:
    kept, a copy is no broken row. 10 is a tie *and* empty: told as a tie. 11 has a label nobody defined.
    So 3 pairs; 3 ties by majority or by disagreement; 2 booleans; 2 empty, 1 identical; 1 label.
    """

    def row(one: object, two: object, *votes: object) -> Row:
        labels = {f"annotator{n}": vote for n, vote in enumerate(votes, 1)}
        return {"idx": 7, "cmp_key": "a_b", "instruction": "Shorten.", "input": "A b c."} | {
            "response1": one,
            "response2": two,
            **labels,
        }

    rows = [row("A.", "A b.", 1, 1, 0), row("A.", "A b.", 0, 2, 2), row("A.", "B.", 0, 0, 1), row("A.", "B.", 0, 1, 2)]
    rows += [row(True, "B.", 1, 1, 1), row("A.", False, 2, 1, 1), row("", "B.", 2, 2, 2), row(" ", "B.", 1, 1, 1)]
    rows += [row("A. ", "A.", 1, 1, 2), row("A.", "A b.", 1, 1, 0), row("", "B.", 0, 0, 0), row("A.", "B.", 3, 3, 3)]
    source = read(tmp_path, *rows)
    prompt = "Shorten.\nA b c."
    assert source.format == "pandalm"
    assert source.pairs == [
        asked(prompt, "A.", "A b.", 0),
        asked(prompt, "A b.", "A.", 1),
        asked(prompt, "A.", "A b.", 9),
    ]
    assert reasons(source) == {
        2: "tie",
        3: "tie: no majority of annotators",
        4: "chosen is neither text nor messages",
        5: "rejected is neither text nor messages",
        6: "rejected is empty",
        7: "chosen is empty",
        8: "chosen and rejected are identical",
        10: "tie",
        11: "an annotator's label is not 0, 1 or 2",
    }


def test_alpaca_eval(tmp_path: Path) -> None:
    """As in AlpacaEval's annotations (8,727 rows: 63 zeros and 3 times 1.5 are ties, 3 empty, 1 identical), 13 rows.

    Numbers and texts mean the same. 1.02 and 1.97 come from log-probs and lean to the first and the second answer.
    0 is what it writes for two equal answers. 3, 0.5, null, NaN, true and a word are no labels.
    """
    labels = [1, "2", 1.0, "1.02", 1.97, 1.5, "1.5", 0, 3, 0.5, None, float("nan"), True, "first"]
    row = {"annotator": "gpt4", "dataset": "koala", "instruction": "Why?", "output_1": "A", "output_2": "B"}
    source = read(tmp_path, *[row | {"preference": label} for label in labels])
    assert source.format == "alpaca-eval"
    first, second = (asked("Why?", *texts, origin="koala") for texts in (("A", "B"), ("B", "A")))
    assert [pair.chosen for pair in source.pairs] == [p.chosen for p in (first, second, first, first, second)]
    assert source.pairs[0] == first
    outside, missing, word = (
        "preference is neither 0 nor from 1 to 2",
        "preference is missing",
        "preference is not a number",
    )
    told = ["tie", "tie", "tie", outside, outside, missing, missing, word, word]
    assert reasons(source) == dict(enumerate(told, 5))


def test_llamafactory_sharegpt_ranking(tmp_path: Path) -> None:
    """As in LLaMA-Factory's demo (300 rows, all pairs): one array over many lines; system turns and many turns stay."""
    rows = [
        {
            "conversations": [
                spoken("system", "Be brief."),
                spoken("human", "Hi"),
                spoken("gpt", "Yes?"),
                spoken("human", "2+2?"),
            ],
            "chosen": spoken("gpt", "4"),
            "rejected": spoken("gpt", "5"),
        },
        {
            "conversations": [spoken("human", "q")],
            "chosen": [spoken("gpt", "a")],
            "rejected": "b",
            "system": "Be kind.",
        },
        {
            "conversations": [spoken("human", "q"), spoken("gpt", "let me look"), spoken("observation", "42")],
            "chosen": spoken("gpt", "42"),
            "rejected": said("assistant", "41"),
        },
        {
            "conversations": [spoken("human", "q")],
            "chosen": spoken("function_call", "{}"),
            "rejected": spoken("gpt", "b"),
        },
        {"conversations": [spoken("human", "q")], "chosen": spoken("gpt", True), "rejected": spoken("gpt", "b")},
        {"conversations": [spoken("cat", "q")], "chosen": spoken("gpt", "a"), "rejected": spoken("gpt", "b")},
        {"conversations": [], "chosen": spoken("gpt", "a"), "rejected": spoken("gpt", "b")},
    ]
    file = tmp_path / "demo.json.gz"
    file.write_bytes(gzip.compress(json.dumps(rows, indent=2).encode()))
    source = read_pairs(SourceSection(source=str(file)))
    assert source.format == "sharegpt-ranking"
    assert source.pairs == [
        Pair((system("Be brief."), user("Hi"), bot("Yes?"), user("2+2?")), (bot("4"),), (bot("5"),), 0),
        Pair((system("Be kind."), user("q")), (bot("a"),), (bot("b"),), 1),
        Pair((user("q"), bot("let me look"), Message("tool", "42")), (bot("42"),), (bot("41"),), 2),
    ]
    assert reasons(source) == {
        3: "chosen has a message with tool calls, which are not supported",
        4: "chosen has a message whose content is not text",
        5: "prompt has a message of unknown role 'cat'",
        6: "prompt is empty",
    }


def test_hh(tmp_path: Path) -> None:
    """As in hh-rlhf (the 200 rows of the development file are all pairs): a turn that spells a speaker stays whole."""
    start = "\n\nHuman: are vaccines bad?\n\nAssistant: Human: OK, let's see.\n\nHuman: well?\n\nAssistant:"
    source = read(tmp_path, {"chosen": f"{start} No.", "rejected": f"{start} Yes."})
    assert source.format == "hh"
    assert source.pairs == [
        Pair((user("are vaccines bad?"), bot("Human: OK, let's see."), user("well?")), (bot("No."),), (bot("Yes."),))
    ]


# The other public shapes


def test_llamafactory_alpaca_ranking(tmp_path: Path) -> None:
    row = {"instruction": "Add.", "input": "1 and 2", "chosen": "3", "rejected": "4"}
    more = row | {"input": "", "system": "Count.", "history": [["Hi", "Yes?"]]}
    source = read(tmp_path, row, more, row | {"history": [["Hi"]]}, row | {"instruction": ["Add."]})
    assert source.format == "alpaca-ranking"
    assert source.pairs == [
        asked("Add.\n1 and 2", "3", "4"),
        Pair((system("Count."), user("Hi"), bot("Yes?"), user("Add.")), (bot("3"),), (bot("4"),), 1),
    ]
    assert reasons(source) == {2: "history is not a list of [question, answer]", 3: "instruction is not text"}


STRENGTHS = [-3, -1, "-2", 1, 3, 0, 4, "much better", None]
"""HelpSteer's scale: below 0 the first answer is better, 0 is a tie, beyond 3 there is nothing."""


def test_helpsteer2(tmp_path: Path) -> None:
    """A prompt of several turns has NeMo's marks between them."""
    turns = "Hi\n<extra_id_1>Assistant\nYes?\n<extra_id_1>User\n2+2?"
    row = {"split": "train", "prompt": turns, "response_1": "4", "response_2": "5", "preference_statement": "..."}
    source = read(tmp_path, *[row | {"preference_strength": strength} for strength in STRENGTHS])
    assert source.format == "helpsteer2"
    first = Pair((user("Hi"), bot("Yes?"), user("2+2?")), (bot("4"),), (bot("5"),))
    assert [pair.chosen[0].content for pair in source.pairs] == ["4", "4", "4", "5", "5"]
    assert source.pairs[0] == first
    assert list(reasons(source).values()) == [
        "tie",
        "preference_strength is not from -3 to 3",
        "preference_strength is not a number",
        "preference_strength is missing",
    ]


def test_helpsteer3(tmp_path: Path) -> None:
    context = [said("user", "Hi"), said("assistant", "Yes?"), said("user", "2+2?")]
    row = {"domain": "stem", "language": "english", "context": context, "response1": "4", "response2": "5"}
    source = read(tmp_path, *[row | {"overall_preference": strength} for strength in STRENGTHS])
    assert source.format == "helpsteer3"
    assert [pair.chosen[0].content for pair in source.pairs] == ["4", "4", "4", "5", "5"]
    assert source.pairs[3] == Pair((user("Hi"), bot("Yes?"), user("2+2?")), (bot("5"),), (bot("4"),), 3, origin="stem")


def test_shp(tmp_path: Path) -> None:
    """labels 1 = A, 0 = B; the scores go along with the answers."""
    row = {
        "domain": "askbaking_train",
        "history": "Why?",
        "human_ref_A": "A",
        "human_ref_B": "B",
        "score_A": 9,
        "score_B": 4,
    }
    source = read(tmp_path, row | {"labels": 1}, row | {"labels": 0}, row | {"labels": 2})
    assert source.format == "shp"
    told = {"origin": "askbaking_train"}
    assert source.pairs == [
        asked("Why?", "A", "B", 0, scores=(9, 4), **told),
        asked("Why?", "B", "A", 1, scores=(4, 9), **told),
    ]
    assert reasons(source) == {2: "labels is neither 0 nor 1"}


def test_orca(tmp_path: Path) -> None:
    row = {"system": "Be brief.", "question": "2+2?", "chosen": "4", "rejected": "5"}
    source = read(tmp_path, row, row | {"system": ""})
    assert source.format == "orca"
    assert source.pairs == [
        Pair((system("Be brief."), user("2+2?")), (bot("4"),), (bot("5"),), 0),
        asked("2+2?", "4", "5", 1),
    ]
    argillas = {"system": "", "input": "2+2?", "chosen": "4", "rejected": "5", "status": "swapped"}
    copy = read(tmp_path, argillas, argillas | {"status": "tie"})
    assert copy.format == "orca"
    assert copy.pairs == [asked("2+2?", "4", "5")]
    assert reasons(copy) == {1: "tie"}


def nectar(*ranked: tuple[object, object]) -> Row:
    answers = [{"answer": answer, "model": "m", "rank": rank} for answer, rank in ranked]
    return {"prompt": "\n\nHuman: 2+2?\n\nAssistant: ", "answers": answers, "source": ["lmsys"]}


def test_nectar(tmp_path: Path) -> None:
    """Best against worst is one pair a row; best against each other is one for each rank below the best.

    The first row's ranks 2, 1, 3, 1 say: a and d are best, c is worst, b between. Read from the best in the row's own
    order: a > c; and a > b, a > c, where d, as good as a, is no pair.
    """
    rows = [nectar(("b", 2.0), ("a", 1.0), ("c", 3.0), ("d", 1.0)), nectar(("x", 1), ("y", 1)), nectar(("x", 1))]
    rows += [nectar(("x", 1), (True, 2)), nectar(("x", 1), ("y", "third"))]
    refused = {1: "tie", 2: "answers are fewer than two", 4: "rank is not a number"}
    source = read(tmp_path, *rows)
    assert source.format == "nectar"
    assert source.pairs == [asked("2+2?", "a", "c")]
    assert reasons(source) == refused | {3: "rejected is neither text nor messages"}
    every = read(tmp_path, *rows, format="nectar-all")
    assert every.pairs == [asked("2+2?", "a", "b"), asked("2+2?", "a", "c")]
    assert every.rows == 5
    assert reasons(every) == reasons(source)


def test_openai(tmp_path: Path) -> None:
    answers: Row = {"preferred_output": [said("assistant", "4")], "non_preferred_output": [said("assistant", "5")]}
    messages = [said("system", "s"), said("user", [{"type": "text", "text": "2+2?"}])]
    rows: list[Row] = [
        {"input": {"messages": messages, "tools": [], "parallel_tool_calls": True}},
        {"messages": messages},
    ]
    rows += [{"input": {"messages": messages, "tools": [{"type": "function"}]}}, {"input": "2+2?"}, {}]
    source = read(tmp_path, *[row | answers for row in rows])
    assert source.format == "openai"
    prompt = (system("s"), user("2+2?"))
    assert source.pairs == [Pair(prompt, (bot("4"),), (bot("5"),), row) for row in (0, 1)]
    assert list(reasons(source).values()) == [
        "row has tools, which are not supported",
        "input is not an object",
        "messages is missing",
    ]


def test_argillas_ultrafeedback(tmp_path: Path) -> None:
    """The first binarized set has columns of its own; the cleaned ones are UltraFeedback's with other score columns."""
    first = {"source": "sharegpt", "instruction": "q", "chosen_response": "a", "rejected_response": "b"}
    source = read(tmp_path, first | {"chosen_avg_rating": 4.5, "rejected_avg_rating": "3.25"}, first)
    assert source.format == "argilla"
    scored = asked("q", "a", "b", scores=(4.5, 3.25), origin="sharegpt")
    assert source.pairs == [scored, asked("q", "a", "b", 1, origin="sharegpt")]
    dialogue = [said("user", "q"), said("assistant", "a")]
    cleaned = {"prompt": "q", "chosen": dialogue, "rejected": [dialogue[0], said("assistant", "b")]}
    source = read(tmp_path, cleaned | {"source": "sharegpt", "chosen-rating": 4.5, "rejected-rating": 3.25})
    assert (source.format, source.pairs) == ("ultrafeedback", [scored])
    mix = {"dataset": "sharegpt", "chosen": dialogue, "rejected": cleaned["rejected"]}
    source = read(tmp_path, mix | {"chosen_rating": 4.5, "rejected_rating": 3.25})
    assert (source.format, source.pairs) == ("trl", [scored])


# Shapes nobody knew, through the mapping alone


def mapped(folder: Path, rows: list[Row], columns: str, **label: Any) -> PairSource:
    section = dict(item.split("=") for item in columns.split())
    return read(folder, *rows, map=section, label=label)


def test_labels_of_other_meanings(tmp_path: Path) -> None:
    """Auto-J's rows say 0 for the first, 1 for the second and 2 for a tie; an arena's say it in words, ties in two."""
    auto_j = [
        {"prompt": "q", "response 1": "a", "response 2": "b", "label": label} for label in (0, 1, 2, "0", 1.0, -1)
    ]
    file = tmp_path / "auto_j.json"
    file.write_text(json.dumps({"name": "auto-j", "rows": auto_j}), encoding="utf-8")
    columns = {"prompt": "prompt", "first": "response 1", "second": "response 2", "label": "label"}
    source = read_pairs(SourceSection(source=str(file), map=columns, label={"first": 0, "second": 1, "tie": 2}))
    assert [(pair.row, pair.chosen[0].content) for pair in source.pairs] == [(0, "a"), (1, "b"), (3, "a"), (4, "b")]
    assert reasons(source) == {2: "tie", 5: "label has a value that no label setting names"}
    talk = {
        "conversation_a": [said("user", "q"), said("assistant", "a")],
        "conversation_b": [said("user", "q"), said("assistant", "b")],
    }
    winners = ["model_a", "model_b", "tie", "tie (bothbad)"]
    arena = mapped(
        tmp_path,
        [talk | {"winner": winner} for winner in winners],
        "first=conversation_a second=conversation_b label=winner",
        first="model_a", second="model_b", tie="tie", both_bad="tie (bothbad)",
    )  # fmt: skip
    assert arena.pairs == [asked("q", "a", "b", 0), asked("q", "b", "a", 1)]
    assert reasons(arena) == {2: "tie", 3: "both bad"}


def test_one_meaning_may_have_several_values(tmp_path: Path) -> None:
    rows: list[Row] = [
        {"q": "q", "a": "a", "b": "b", "v": verdict} for verdict in ("A>>B", "A>B", "A=B", "B>A", "B>>A")
    ]
    source = mapped(
        tmp_path, rows, "prompt=q first=a second=b label=v", first=["A>>B", "A>B"], second=["B>A", "B>>A"], tie="A=B"
    )
    assert [pair.chosen[0].content for pair in source.pairs] == ["a", "a", "b", "b"]
    assert reasons(source) == {2: "tie"}


def test_nested_dirty_rows_with_scores(tmp_path: Path) -> None:
    """Two answers in a list, their ratings beside them; rows with nulls, numbers, texts and missing parts."""
    columns = "prompt=task.ask input=task.data system=meta.sys first=out.0.text second=out.1.text "
    columns += "score_first=out.0.rating score_second=out.1.rating"

    def row(one: object, two: object, **task: object) -> Row:
        texts = zip(("a", "b"), (one, two), strict=True)
        return {"task": {"ask": "Add.", "data": "1 and 2"} | task, "out": [{"text": t, "rating": r} for t, r in texts]}

    rows = [
        row(3, 1) | {"meta": {"sys": "s"}},
        row("2.5", "4"),
        row(1, 1),
        row(None, 1),
        row(1, True),
        row(5, 1, ask=7),
    ]
    rows += [row(5, 1) | {"out": []}, row(5, 1) | {"out": "ab"}, row(1e400, 1), row(5, 1, data=None), {"task": None}]
    source = mapped(tmp_path, rows, columns)
    assert source.pairs == [
        Pair((system("s"), user("Add.\n1 and 2")), (bot("a"),), (bot("b"),), 0, scores=(3, 1)),
        asked("Add.\n1 and 2", "b", "a", 1, scores=(4, 2.5)),
        asked("Add.", "a", "b", 9, scores=(5, 1)),
    ]
    missing, text = "score_first is missing", "prompt is not text"
    assert reasons(source) == {
        2: "tie", 3: missing, 4: "score_second is not a number", 5: text, 6: missing, 7: missing,
        8: missing, 10: missing,
    }  # fmt: skip


def test_scores_beside_a_label_do_not_decide(tmp_path: Path) -> None:
    rows: list[Row] = [{"q": "q", "a": "a", "b": "b", "best": best, "s": 1, "t": 9} for best in ("x", "y")]
    columns = "prompt=q first=a second=b label=best score_first=s score_second=t"
    source = mapped(tmp_path, rows, columns, first="x", second="y")
    assert source.pairs == [asked("q", "a", "b", 0, scores=(1, 9)), asked("q", "b", "a", 1, scores=(9, 1))]


def test_a_csv_with_scores_and_a_source_column(tmp_path: Path) -> None:
    """A column that the mapping uses is not also taken for the set the row came from."""
    file = tmp_path / "pairs.csv"
    with file.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([["source", "good", "bad", "dataset"], ["Übersetze", "a", "b", "wmt"]])
    columns = {"prompt": "source", "chosen": "good", "rejected": "bad"}
    (pair,) = read_pairs(SourceSection(source=str(file), map=columns)).pairs
    assert pair == asked("Übersetze", "a", "b", origin="wmt")


# Files that are read a piece at a time


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 64])
def test_an_array_is_the_same_however_it_is_cut(piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers, escapes, surrogate pairs and letters of several bytes, cut at every place by pieces of one character."""
    monkeypatch.setattr(files_module, "_MIB", piece)
    rows = [{"n": -12.5e3, "t": 'é\\"]},{[', "u": "\U0001f600"}, [], "a", 10, None, {"deep": [[{"x": [1, 2]}]]}, 7]
    for text in (json.dumps(rows), " \n" + json.dumps(rows, indent=3, ensure_ascii=False) + "\r\n ", "[]", " [ ] "):
        file = tmp_path / "rows.json"
        file.write_bytes(text.encode())
        assert list(files_module.file_rows(file)) == json.loads(text)


def test_a_line_that_is_too_long_is_one_refused_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit of 100 bytes; the second line has 5,000 and the rows after it keep their numbers."""
    monkeypatch.setattr(files_module, "_MAX_ROW", 100)
    good = {"prompt": "q", "chosen": "a", "rejected": "b"}
    source = read(tmp_path, good, good | {"chosen": "x" * 5000}, good)
    assert [pair.row for pair in source.pairs] == [0, 2]
    assert source.refused == [Refusal(1, "row is longer than 16 MiB")]


def test_a_column_python_cannot_hold_spoils_no_other(tmp_path: Path) -> None:
    """Single nanoseconds have no Python value; the answers beside them are read, a prompt of them is refused."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    times = arrow.array([1, 2**62], arrow.timestamp("ns"))
    texts = {name: arrow.array([name, name.upper()]) for name in ("prompt", "chosen", "rejected")}
    for columns, pairs in ((texts | {"at": times}, 2), (texts | {"prompt": times}, 0)):
        parquet.write_table(arrow.table(columns), tmp_path / "p.parquet")
        results = list(open_pairs(SourceSection(source=str(tmp_path / "p.parquet"))).results)
        assert sum(isinstance(result, Pair) for result in results) == pairs


def test_roles_count_in_the_key_of_a_prompt() -> None:
    """The same words as a system turn and a user turn are another prompt."""
    assert prompt_key((system("a"), user("b"))) != prompt_key((user("a"), user("b")))
