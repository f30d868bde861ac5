"""Public shapes: rows as their files have them, and the pairs they mean, written out by hand."""

from __future__ import annotations

import csv
import gzip
import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dpo_studio.cli.options import source_section
from dpo_studio.config import SourceSection
from dpo_studio.errors import DataError
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


def test_raw_ultrafeedback(tmp_path: Path) -> None:
    """Four ratings' mean decides: of 2.5, 5 and 1 the second is best, the third worst, whatever `overall_score` says.

    Without a mean the overall score is all there is (row 1: 3 over 1). An answer that nobody rated takes no part: in
    row 2 it is the only other one. Rows 3 and 4 are a tie and a list of texts.
    """

    def completion(response: object, mean: object, overall: object) -> Row:
        return {
            "model": "m",
            "response": response,
            "fine-grained_score": mean,
            "overall_score": overall,
            "critique": "",
        }

    def row(*completions: object) -> Row:
        return {"source": "sharegpt", "instruction": "2+2?", "models": ["m"], "completions": [*completions]}

    a, b, c = completion("5", 2.5, 10), completion("4", "5", 1), completion("six", 1.0, 9)
    old = [{"response": "5", "overall_score": 1}, {"response": "4", "overall_score": 3.0}]
    rows = [row(a, b, c), row(*old), row(a, completion("4", None, 3)), row(a, a | {"response": "4"}), row("5", "4")]
    source = read(tmp_path, *rows)
    assert source.format == "ultrafeedback-raw"
    told = {"origin": "sharegpt"}
    assert source.pairs == [
        asked("2+2?", "4", "six", 0, scores=(5, 1), **told),
        asked("2+2?", "4", "5", 1, scores=(3, 1), **told),
    ]
    refused = ["fewer than two answers have a score", "tie", "completions is not a list of objects"]
    assert list(reasons(source).values()) == refused


def test_webgpt(tmp_path: Path) -> None:
    """The scores are of people, one the negative of the other; 0 is a tie."""
    row = {"question": {"dataset": "eli5", "full_text": "Why?"}, "answer_0": "a [1]", "answer_1": "b", "quotes_0": {}}
    source = read(tmp_path, *[row | {"score_0": score, "score_1": -score} for score in (0.5, -1.0, 0.0)])
    assert source.format == "webgpt"
    assert source.pairs == [
        asked("Why?", "a [1]", "b", 0, scores=(0.5, -0.5)),
        asked("Why?", "b", "a [1]", 1, scores=(1, -1)),
    ]
    assert reasons(source) == {2: "tie"}


def talked(*texts: str) -> list[Row]:
    return [said(("user", "assistant")[at % 2], text) for at, text in enumerate(texts)]


def test_arena(tmp_path: Path) -> None:
    """Chatbot Arena's words and those of the newer sets; MT-Bench's rows hold both turns whichever was judged."""
    row = {"model_a": "x", "model_b": "y", "turn": 1, "language": "English"}
    row |= {"conversation_a": talked("q", "a"), "conversation_b": talked("q", "b")}
    winners = ["model_a", "model_b", "tie", "tie (bothbad)", "both_bad", "x", None, ["model_a"]]
    source = read(tmp_path, *[row | {"winner": winner} for winner in winners])
    assert source.format == "arena"
    assert source.pairs == [asked("q", "a", "b", 0), asked("q", "b", "a", 1)]
    wrong = "winner is none of model_a, model_b, tie and both_bad"
    told = ["tie", "both bad", "both bad", wrong, "winner is missing", wrong]
    assert reasons(source) == dict(enumerate(told, 2))
    two = {"conversation_a": talked("q", "a", "r", "c"), "conversation_b": talked("q", "b", "r", "d")}
    bench = read(tmp_path, *[two | {"winner": "model_b", "judge": "expert_1", "turn": turn} for turn in (1, 2, 3)])
    assert bench.pairs == [
        asked("q", "b", "a"),
        Pair((user("q"),), (bot("b"), user("r"), bot("d")), (bot("a"), user("r"), bot("c")), 1),
    ]
    assert reasons(bench) == {2: "turn is no turn of conversation_a"}


def test_arena_of_columns_of_json(tmp_path: Path) -> None:
    """One of three columns is 1: read as one label of two values its ties would be the second answer's wins."""
    row = {
        "model_a": "x",
        "model_b": "y",
        "prompt": '["q", "r"]',
        "response_a": '["a", "c"]',
        "response_b": '["b","d"]',
    }
    wins = [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0), ("1", "1", "0")]
    names = ("winner_model_a", "winner_model_b", "winner_tie")
    rows = [row | dict(zip(names, win, strict=True)) for win in wins]
    rows += [rows[0] | {"response_a": text} for text in ('["a"]', '["a", null]', "a")]
    source = read(tmp_path, *rows)
    assert source.format == "arena-55k"
    answers = (bot("a"), user("r"), bot("c")), (bot("b"), user("r"), bot("d"))
    assert source.pairs == [Pair((user("q"),), *answers, 0), Pair((user("q"),), *answers[::-1], 1)]
    none = "not one of winner_model_a, winner_model_b, winner_tie is 1"
    uneven, not_text, not_json = (
        "prompt and responses have not as many turns",
        "response_a is not text",
        "response_a is not a list written as JSON",
    )
    assert reasons(source) == dict(enumerate(["tie", none, none, uneven, not_text, not_json], 2))


def test_a_system_column_beside_trls(tmp_path: Path) -> None:
    """As truthy-dpo has it. A system turn that is there already is not there twice; another one is a contradiction."""
    row = {"source": "truthy", "system": "Be brief.", "prompt": "q", "chosen": "a", "rejected": "b"}
    turns = [said("system", "Be brief."), said("user", "q")]
    dialogue = {"chosen": [said("user", "q"), said("assistant", "a")], "rejected": talked("q", "b")}
    rows = [row, row | {"system": ""}, row | {"prompt": turns}, row | {"prompt": turns, "system": "Be long."}]
    source = read(tmp_path, *rows)
    under = Pair((system("Be brief."), user("q")), (bot("a"),), (bot("b"),), 0, origin="truthy")
    assert source.pairs == [under, asked("q", "a", "b", 1, origin="truthy"), replace(under, row=2)]
    assert reasons(source) == {3: "prompt has a system turn besides the system column"}
    assert read(tmp_path, row | dialogue).pairs == [under]
    del row["prompt"]
    assert read(tmp_path, row | dialogue).pairs == [under]


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


def test_lists_of_answers_and_scores(tmp_path: Path) -> None:
    """The best against the worst, by hand: of 3, 5 and none "b" over "a"; text counts as a number, a word does not."""
    rows: list[Row] = [
        {"q": "q", "texts": ["a", "b", "c"], "scores": scores}
        for scores in ([3, 5, None], ["2", "1.5", 7], [4, 4, 4], [1, None, None], [1, 2], [1, "N/A", 3], 5, None)
    ]
    source = mapped(tmp_path, rows, "prompt=q answers=texts scores=scores")
    assert source.pairs == [asked("q", "b", "a", 0, scores=(5, 3)), asked("q", "c", "b", 1, scores=(7, 1.5))]
    few, uneven = "fewer than two answers have a score", "answers and scores are not as many"
    told = ["tie", few, uneven, "score is not a number", "answers and scores are not two lists", "scores is missing"]
    assert reasons(source) == dict(enumerate(told, 2))


def test_a_name_after_a_list_is_looked_up_in_each_of_its_objects(tmp_path: Path) -> None:
    """As raw UltraFeedback's completions; list places may stand in brackets, as the sets' own pages write them."""
    rows: list[Row] = [{"q": "q", "out": [{"text": "a", "score": 1}, {"text": "b", "score": 2}, {"text": "c"}, None]}]
    by_name = mapped(tmp_path, rows, "prompt=q answers=out.text scores=out.score")
    by_place = mapped(
        tmp_path,
        rows,
        "prompt=q first=out[0].text second=out.1.text score_first=out[0].score score_second=out[1].score",
    )
    assert by_name.pairs == by_place.pairs == [asked("q", "b", "a", scores=(2, 1))]
    with pytest.raises(DataError, match=r"no column 'out\.txt'"):
        mapped(tmp_path, rows, "prompt=q answers=out.txt scores=out.score")


@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_a_csv_of_semicolons_or_tabs(mark: str, tmp_path: Path) -> None:
    """As spreadsheets of half of Europe save it; the other two marks are text where they are not the delimiter."""
    file = tmp_path / "pairs.csv"
    with file.open("w", newline="", encoding="utf-8-sig") as stream:
        table = [["prompt", "chosen", "rejected"], ["Öl; oder, \t was?", "a, b; c\td", 'say "b"\nthen']]
        csv.writer(stream, delimiter=mark).writerows(table)
    assert read_pairs(SourceSection(source=str(file))).pairs == [
        asked("Öl; oder, \t was?", "a, b; c\td", 'say "b"\nthen')
    ]


@pytest.mark.parametrize(("encoding", "hint"), [("utf-16", "-f UTF-16"), ("cp1252", "-f WINDOWS-1252")])
@pytest.mark.parametrize("name", ["p.csv", "p.jsonl", "p.json"])
def test_text_that_is_not_utf8_is_told_how_to_become_it(name: str, encoding: str, hint: str, tmp_path: Path) -> None:
    text = "prompt,chosen,rejected\nü,a,b\n" if name == "p.csv" else '{"prompt": "ü", "chosen": "a", "rejected": "b"}\n'
    (tmp_path / name).write_bytes(text.encode(encoding))
    with pytest.raises(DataError, match="not UTF-8") as told:
        read_pairs(SourceSection(source=str(tmp_path / name)))
    assert hint in str(told.value.hint)


PUBLISHED: dict[str, list[Row]] = {
    "PKU-SafeRLHF": [
        {"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": n, "safer_response_id": 0}
        for n in (0, 1)
    ],
    "Auto-J": [{"prompt": "q", "response 1": "a", "response 2": "b", "label": n} for n in (0, 1, 2)],
    "LLMBar": [{"input": "q", "output_1": "a", "output_2": "b", "label": n} for n in (1, 2)],
    "OpenAI's summaries": [
        {"info": {"post": "q", "title": "t"}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": n} for n in (0, 1)
    ],
    "Preference-Collection": [
        {
            "orig_instruction": "q",
            "orig_response_A": "a",
            "orig_response_B": "b",
            "orig_preference": letter,
            "output": "",
        }
        for letter in "AB"
    ],
    "distilabel's `generations`": [
        {"input": "q", "generations": ["a", "b"], "rating": ratings} for ratings in ([9.0, 7.0], [5.0, 7.0], [7, 7])
    ],
}
"""In each set's own columns: the first answer preferred, the second, and in some a tie."""


def test_the_mappings_of_the_documents(tmp_path: Path) -> None:
    document = (Path(__file__).parent.parent / "docs" / "data.md").read_text(encoding="utf-8")
    mappings = dict(re.findall(r"^\| ([^|]+) \| `(--map [^`]+)` \|$", document, re.MULTILINE))
    assert len(mappings) == len(PUBLISHED)
    for name, rows in PUBLISHED.items():
        options = next(options for shown, options in mappings.items() if shown.startswith(name))
        words = shlex.split(options)
        given = [text for option, text in zip(words[::2], words[1::2], strict=True) if option == "--map"]
        labels = [text for option, text in zip(words[::2], words[1::2], strict=True) if option == "--label"]
        section = source_section("rows.jsonl", map_=given, label=labels)
        found = read(tmp_path, *rows, map=section.map, label=section.label)
        assert [(pair.row, pair.chosen[0].content) for pair in found.pairs] == [(0, "a"), (1, "b")], name
        assert reasons(found) == dict.fromkeys(range(2, len(rows)), "tie"), name


# Files that are read a piece at a time


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 64])
def test_an_array_is_the_same_however_it_is_cut(piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers, escapes, surrogate pairs and letters of several bytes, cut at every place by pieces of one character."""
    monkeypatch.setattr(files_module, "MIB", piece)
    rows = [{"n": -12.5e3, "t": 'é\\"]},{[', "u": "\U0001f600"}, [], "a", 10, None, {"deep": [[{"x": [1, 2]}]]}, 7]
    for text in (json.dumps(rows), " \n" + json.dumps(rows, indent=3, ensure_ascii=False) + "\r\n ", "[]", " [ ] "):
        file = tmp_path / "rows.json"
        file.write_bytes(text.encode())
        assert list(files_module.file_rows(file)) == json.loads(text)


def test_a_line_that_is_too_long_is_one_refused_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit of 100 bytes; the second line has 5,000 and the rows after it keep their numbers."""
    monkeypatch.setattr(files_module, "MAX_ROW", 100)
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


RANKED = {
    "ultrafeedback-raw": {
        "instruction": "q",
        "models": ["x"],
        "completions": [
            {"response": text, "fine-grained_score": score}
            for text, score in (("a", 2.0), ("b", 4.0), ("c", 1.0), ("d", 4.0))
        ],
    },
    "nectar": {
        "prompt": "q",
        "answers": [{"answer": text, "rank": rank} for text, rank in (("a", 2), ("b", 1), ("c", 3), ("d", 1))],
    },
    "mapped": {"ask": "q", "texts": ["a", "b", "c", "d"], "marks": [2.0, 4.0, 1.0, 4.0]},
}


@pytest.mark.parametrize("name", RANKED)
@pytest.mark.parametrize(
    ("rule", "pairs"),
    [
        ("best-worst", ["b>c"]),
        ("adjacent", ["b>a", "d>a", "a>c"]),
        ("all", ["b>a", "b>c", "d>a", "d>c", "a>c"]),
    ],
)
def test_which_of_several_answers_become_pairs(name: str, rule: str, pairs: list[str], tmp_path: Path) -> None:
    """Scores: b and d 4, a 2, c 1. b and d are equal and no pair; the next lower of both is a, and of a it is c."""
    columns = {"map": {"prompt": "ask", "answers": "texts", "scores": "marks"}} if name == "mapped" else {}
    source = read(tmp_path, RANKED[name], pairs=rule, **columns)
    assert [f"{pair.chosen[0].content}>{pair.rejected[0].content}" for pair in source.pairs] == pairs
    if name != "nectar":
        assert source.pairs[0].scores in ((4.0, 1.0), (4.0, 2.0))


def test_another_choice_of_pairs_needs_several_answers(tmp_path: Path) -> None:
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    with pytest.raises(DataError, match="pairs: all is for rows of several ranked or scored answers"):
        read(tmp_path, row, pairs="all")
    with pytest.raises(DataError, match="pairs: all is for lists of answers and scores"):
        read(tmp_path, row, pairs="all", map={"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"})
