"""What rows and messages hold beside their text: used, harmless, or refused by name; never left out in silence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpo_studio.config import SourceSection
from dpo_studio.preferences.formats import FORMATS
from dpo_studio.preferences.pair import Message, Pair, trl_row
from dpo_studio.preferences.sources import PairSource, read_pairs

Row = dict[str, Any]
GOOD: Row = {"prompt": "How long do eggs boil?", "chosen": "Seven minutes.", "rejected": "Ask a hen."}


def said(role: str, content: object, **more: object) -> Row:
    return {"role": role, "content": content, **more}


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., PairSource]:
    def rows(*given: Row, **section: Any) -> PairSource:
        file = tmp_path / "pairs.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in given), encoding="utf-8")
        return read_pairs(SourceSection(source=str(file), **section))

    return rows


def only_reason(source: PairSource) -> str:
    (refusal,) = source.refused
    return refusal.reason


THOUGHTS = ["reasoning_content", "reasoning", "thinking", "thought", "reasoningContent", "Thinking", "thinking_content"]


@pytest.mark.parametrize("field", THOUGHTS)
@pytest.mark.parametrize("side", ["chosen", "rejected", "prompt"])
def test_a_thought_in_a_field_of_its_own_is_not_dropped(field: str, side: str, read: Callable[..., PairSource]) -> None:
    """Two answers that differ in their thoughts alone are refused for the thoughts, not as identical."""
    answers = {"chosen": [said("assistant", "It is 25.")], "rejected": [said("assistant", "It is 26.")]}
    row: Row = {"prompt": [said("user", "5 x 5?")], **answers}
    row[side] = [row[side][0] | {field: "five fives"}]
    assert only_reason(read(GOOD, row)) == f"{side} has a message with {field}, which are not supported"
    same = row | {"chosen": [said("assistant", "25", **{field: "a"})], "rejected": [said("assistant", "25")]}
    assert "identical" not in only_reason(read(GOOD, same))


@pytest.mark.parametrize("nothing", [None, "", " ", "[]", "{}", "null", [], {}, [None], False])
def test_nothing_is_nothing_however_it_is_written(nothing: object, read: Callable[..., PairSource]) -> None:
    columns = dict.fromkeys(("tools", "functions", "images", "image", "audio", "documents"), nothing)
    fields = dict.fromkeys(("reasoning_content", "tool_calls", "function_call", "thinking", "images"), nothing)
    row = {"prompt": "q", "chosen": [said("assistant", "a", **fields)], "rejected": "b", **columns}
    assert read(row).pairs == [
        Pair((Message("user", "q"),), (Message("assistant", "a"),), (Message("assistant", "b"),))
    ]


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("tools", '[{"type": "function", "function": {"name": "weather"}}]'),
        ("tools", [{"type": "function"}]),
        ("functions", [{"name": "add"}]),
        ("chat_template_kwargs", {"enable_thinking": False}),
        ("chat_template_kwargs", '{"enable_thinking": false}'),
        ("images", ["a.png"]),
        ("image", "a.png"),
        ("videos", [{"path": "a.mp4"}]),
        ("audio", {"array": [0.5]}),
        ("documents", [{"title": "t", "text": "x"}]),
        ("image_url", "a.png"),
        ("Images", ["a.png"]),
        ("template_kwargs", {"thinking": True}),
        ("chat_template", "{{ messages }}"),
    ],
)
def test_a_column_that_a_server_would_render_is_refused_by_name(
    column: str, value: object, read: Callable[..., PairSource]
) -> None:
    assert only_reason(read(GOOD, GOOD | {column: value})) == f"row has {column}, which are not supported"
    hidden = {"input": {"messages": [said("user", "q")], column: value}}
    answers = {"preferred_output": [said("assistant", "a")], "non_preferred_output": [said("assistant", "b")]}
    good = {"input": {"messages": [said("user", "q")]}} | answers
    assert only_reason(read(good, hidden | answers)) == f"row has {column}, which are not supported"


@pytest.mark.parametrize("name", ["alpaca-ranking", "sharegpt-ranking", "orca", "argilla", "pandalm"])
def test_in_every_format(name: str, read: Callable[..., PairSource]) -> None:
    rows: dict[str, Row] = {
        "alpaca-ranking": {"instruction": "q", "input": "", "chosen": "a", "rejected": "b"},
        "sharegpt-ranking": {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
        "orca": {"system": "", "question": "q", "chosen": "a", "rejected": "b"},
        "argilla": {"instruction": "q", "chosen_response": "a", "rejected_response": "b"},
        "pandalm": {"instruction": "q", "input": "", "response1": "a", "response2": "b", "annotator1": 1},
    }
    source = read(rows[name] | {"tools": "[]"}, rows[name] | {"tools": [{"name": "f"}]})
    assert source.format == name and name in FORMATS
    assert len(source.pairs) == 1
    assert only_reason(source) == "row has tools, which are not supported"


def test_a_column_that_a_mapping_uses_is_what_the_mapping_says(read: Callable[..., PairSource]) -> None:
    rows = [{"documents": "q", "a": "yes", "b": "no"}, {"documents": "q", "a": "yes", "b": "no", "tools": [1]}]
    source = read(*rows, map={"prompt": "documents", "chosen": "a", "rejected": "b"})
    assert len(source.pairs) == 1
    assert only_reason(source) == "row has tools, which are not supported"


def test_a_turn_of_weight_0_is_context(read: Callable[..., PairSource]) -> None:
    """Fireworks' and OpenAI's field: in a prompt it changes nothing, in an answer the turn is not learned."""

    def answer(first: object, last: str) -> list[Row]:
        return [said("assistant", "Which tap?", weight=first), said("user", "The left."), said("assistant", last)]

    prompt = [said("user", "It drips."), said("assistant", "What does?", weight=0), said("user", "My tap.")]
    for weight in (0, 0.0, False, "0"):
        row = {"prompt": prompt, "chosen": answer(weight, "Change its washer."), "rejected": answer(weight, "Move.")}
        (pair,) = read(row).pairs
        assert [turn.learned for turn in pair.chosen] == [turn.learned for turn in pair.rejected] == [False, True, True]
        assert all(turn.learned for turn in pair.prompt)
        assert read(trl_row(pair)).pairs == [pair]
    (pair,) = read({"prompt": prompt, "chosen": answer(1, "Washer."), "rejected": answer(None, "Move.")}).pairs
    assert all(turn.learned for turn in pair.chosen + pair.rejected)


def test_whole_dialogues_share_turns_of_either_weight(read: Callable[..., PairSource]) -> None:
    start = [said("user", "q"), said("assistant", "which?", weight=0), said("user", "that")]
    row = {"chosen": [*start, said("assistant", "a")], "rejected": [*start[:1], start[1] | {"weight": 1}, start[2]]}
    row["rejected"].append(said("assistant", "b"))
    (pair,) = read(row).pairs
    assert [turn.content for turn in pair.prompt] == ["q", "which?", "that"]


@pytest.mark.parametrize("weight", [0.5, 2, -1, "much", [1]])
def test_other_weights_are_refused(weight: object, read: Callable[..., PairSource]) -> None:
    row = {"prompt": "q", "chosen": [said("assistant", "a", weight=weight)], "rejected": "b"}
    assert only_reason(read(GOOD, row)) == "chosen has a message of assistant whose weight is neither 0 nor 1"
    assert "weight" in only_reason(read(GOOD, GOOD | {"weight": weight}))


def test_an_answer_of_which_nothing_is_learned_is_refused(read: Callable[..., PairSource]) -> None:
    row = {"prompt": "q", "chosen": "a", "rejected": [said("assistant", "b", weight=0)]}
    assert only_reason(read(GOOD, row)) == "rejected has no assistant turn of weight 1"


MESSAGES = [said("user", "Pick a number."), said("assistant", "Seven.")]


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(MESSAGES),
        json.dumps(MESSAGES, indent=2),
        json.dumps(said("assistant", "A square.")),
        json.dumps({"content": "A square.", "role": "assistant"}),
        json.dumps({"messages": MESSAGES, "tools": [{"name": "pick"}]}),
        json.dumps({"conversations": [{"from": "gpt", "value": "Seven."}]}),
        json.dumps([{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]),
        str(MESSAGES),
        str(said("assistant", "It's a square.")),
    ],
)
def test_a_chat_written_out_as_text_is_not_learned_as_text(text: str, read: Callable[..., PairSource]) -> None:
    for side in ("prompt", "chosen", "rejected"):
        assert only_reason(read(GOOD, GOOD | {side: text})) == f"{side} is a message list written out as text"
    both = {"chosen": text, "rejected": json.dumps([said("assistant", "Eight.")])}
    assert only_reason(read({"chosen": "The sky is blue.", "rejected": "The sky is red."}, both)).endswith("as text")


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "Ada", "age": 36}',
        '[{"title": "a"}, {"title": "b"}]',
        '{"role": "admin", "content": "x"}',
        '{"content": "a page"}',
        "[1, 2, 3]",
        '```json\n[{"role": "user", "content": "hi"}]\n```',
        "{'a': 1}",
        "[" * 100_000,
    ],
)
def test_an_answer_that_is_json_is_an_answer(text: str, read: Callable[..., PairSource]) -> None:
    (pair,) = read(GOOD | {"chosen": text}).pairs
    assert pair.chosen[0].content == text


@pytest.mark.parametrize("blank", ["", "  ", None, [], "absent"])
def test_a_blank_prompt_hides_no_prompt_of_whole_dialogues(blank: object, read: Callable[..., PairSource]) -> None:
    asked = said("user", "How do I peel garlic?")
    row: Row = {"prompt": blank, "chosen": [asked, said("assistant", "Crush it.")]}
    row["rejected"] = [asked, said("assistant", "With gloves.")]
    if blank == "absent":
        del row["prompt"]
    beside = row | {"prompt": asked["content"]}
    for rows in ([row], [row] * 3, [beside, row], [row, row, beside]):
        source = read(*rows)
        assert not source.refused
        assert {pair.prompt for pair in source.pairs} == {(Message("user", "How do I peel garlic?"),)}


def test_a_blank_prompt_beside_texts_is_named(read: Callable[..., PairSource]) -> None:
    assert only_reason(read(GOOD, GOOD | {"prompt": ""})) == "prompt is empty"


@pytest.mark.parametrize("role", ["user", "system", "tool"])
def test_an_answer_of_another_role_is_named_with_side_and_role(role: str, read: Callable[..., PairSource]) -> None:
    row = {"prompt": [said("user", "Why yellow?")], "chosen": [said("assistant", "Water.")]}
    row["rejected"] = [said(role, "Paint them.")]
    mapped = row | {"system": [said("user", "You know plants.")]}
    for wrong in (row, mapped):
        assert only_reason(read(GOOD, wrong)) == f"rejected has no assistant turn: its role is {role}"


def test_what_a_tool_turn_carries_is_not_dropped(read: Callable[..., PairSource]) -> None:
    turns = [said("user", "q"), said("assistant", "Let me see."), said("tool", "42", name="look_up")]
    row = {"prompt": turns, "chosen": "42", "rejected": "41"}
    assert only_reason(read(GOOD, row)) == "prompt has a message with name, which are not supported"
    turns[2] = said("tool", "42")
    assert len(read(row).pairs) == 1


@pytest.mark.parametrize("field", ["tool_plan", "tool_responses", "function_calls", "attachments", "refusal"])
def test_other_fields_that_templates_render_are_refused_by_name(field: str, read: Callable[..., PairSource]) -> None:
    row = {"prompt": "q", "chosen": [said("assistant", "a", **{field: "x"})], "rejected": "b"}
    assert only_reason(read(GOOD, row)) == f"chosen has a message with {field}, which are not supported"
    assert len(read(row | {"chosen": [said("assistant", "a", **{field: None}, mood="glad", id=3)]}).pairs) == 1


@pytest.mark.parametrize(("field", "value"), [("loss", False), ("train", 0), ("training", "0")])
def test_a_turn_that_another_tool_would_not_train_on_is_refused(
    field: str, value: object, read: Callable[..., PairSource]
) -> None:
    def row(value: object) -> Row:
        return {"prompt": "q", "chosen": [said("assistant", "a", **{field: value})], "rejected": "b"}

    assert f"{field}: {str(value).lower()}, which is not supported; weight: 0 is" in only_reason(read(GOOD, row(value)))
    assert len(read(row(True), row(None), row(0.53)).pairs) == 3


def test_a_part_of_text_holds_nothing_beside_it(read: Callable[..., PairSource]) -> None:
    part = {"type": "text", "text": "a"}
    row = {"prompt": "q", "chosen": [said("assistant", [part | {"image_url": None}, part])], "rejected": "b"}
    assert read(row).pairs[0].chosen[0].content == "aa"
    row["chosen"] = [said("assistant", [part, part | {"image_url": "a.png"}])]
    assert only_reason(read(GOOD, row)) == "chosen has a message with image_url, which are not supported"


@pytest.mark.parametrize("column", ["system", "system_prompt", "system_message"])
def test_system_text_in_a_column_of_its_own_is_used_in_every_format(
    column: str, read: Callable[..., PairSource]
) -> None:
    argilla = {"instruction": "q", "chosen_response": "a", "rejected_response": "b"}
    shp = {"history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": 1}
    for row in ({"prompt": "q", "chosen": "a", "rejected": "b"}, argilla, shp):
        (pair,) = read(row | {column: "Be brief."}).pairs
        assert pair.prompt == (Message("system", "Be brief."), Message("user", "q"))
        assert read(row | {column: None}, row | {column: " "}).pairs[1].prompt == (Message("user", "q"),)
    there = {"prompt": [said("system", "Be brief."), said("user", "q")], "chosen": "a", "rejected": "b"}
    assert len(read(there | {column: "Be brief."}).pairs[0].prompt) == 2
    assert "system" in only_reason(read(GOOD, there | {column: "Be long."}))


CHAT = [said("assistant", "It's blue.")]
WRITTEN = {
    "twice": json.dumps(json.dumps(CHAT)),
    "behind a byte order mark": "\ufeff" + json.dumps(CHAT),
    "one message a line": "".join(json.dumps(message) + "\n" for message in [said("user", "q"), *CHAT]),
    "as Gemini's": json.dumps([{"role": "model", "parts": [{"text": "Blue."}]}]),
    "in one conversation": json.dumps({"id": 7, "conversation": CHAT}),
    "parts of text": json.dumps([{"type": "text", "text": "Blue."}]),
    "a tuple": str(tuple(CHAT * 2)),
    "another key first": str([{"id": 1, "model": "m", **CHAT[0]}]),
    "an array": f"array([{CHAT[0]}], dtype=object)",
}


@pytest.mark.parametrize("text", WRITTEN.values(), ids=WRITTEN.keys())
def test_a_chat_written_as_text_is_known_however_it_is_written(text: str, read: Callable[..., PairSource]) -> None:
    assert only_reason(read(GOOD, GOOD | {"chosen": text})) == "chosen is a message list written out as text"


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "Ida", "age": 4}',
        "[1, 2]",
        '["role"]',
        '"[sic]"',
        "(a) first, (b) second",
        "{'name': 'Ida', 'age': 4}",
        "{'name': 'Ida', 'value': 4, 'content': 'x'}",
        '{"a": 1}\n{"b": 2}',
        "array([1, 2])",
    ],
)
def test_an_answer_that_only_looks_like_one_is_an_answer(text: str, read: Callable[..., PairSource]) -> None:
    assert read(GOOD | {"chosen": text}).pairs[0].chosen[0].content == text


def test_an_answer_says_that_a_token_limit_cut_it(read: Callable[..., PairSource]) -> None:
    """`cut: true` on an answer's last turn, kept by a round trip; on a turn before the last it means nothing."""
    answer = [said("assistant", "Seven min", cut=True)]
    row: Row = {"prompt": [said("user", "How long?")], "chosen": "Seven minutes.", "rejected": answer}
    (pair,) = read(row).pairs
    assert pair.rejected == (Message("assistant", "Seven min", ended=False),)
    assert pair.chosen[0].ended
    assert read(trl_row(pair)).pairs == [pair]
    assert read(row | {"rejected": [said("assistant", "Seven min", cut=None)]}).pairs[0].rejected[0].ended
    several = [said("assistant", "Seven", cut=True), said("user", "What?"), said("assistant", "Eight.")]
    assert only_reason(read(GOOD, row | {"rejected": several})) == "rejected has a cut turn before its last one"
    wrong = [said("assistant", "Seven min", cut="yes")]
    assert only_reason(read(GOOD, row | {"rejected": wrong})) == (
        "rejected has a message whose cut is neither true nor false"
    )
