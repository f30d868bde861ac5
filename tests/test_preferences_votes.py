"""Votes and corrections as people leave them in chat pages and traces: which answer beats which, by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dpo_studio.config import SourceSection
from dpo_studio.preferences.sources import PairSource, read_pairs
from tests.tiny_runs import write_rows


def read(folder: Path, *rows: dict[str, Any]) -> PairSource:
    return read_pairs(SourceSection(source=str(write_rows(folder / "rows.jsonl", rows))))


def won(source: PairSource) -> list[str]:
    return [f"{pair.chosen[0].content}>{pair.rejected[0].content}" for pair in source.pairs]


USER = {"id": "u", "role": "user", "content": "Why?", "parentId": None}


def answer(key: str, text: str, **more: Any) -> dict[str, Any]:
    message = {"id": key, "role": "assistant", "content": text, "parentId": "u", "childrenIds": [], "done": True}
    return message | {"model": f"model-{key}", "timestamp": 1} | more


def feedback(rated: str, rating: int, *answers: dict[str, Any], **data: Any) -> dict[str, Any]:
    """A feedback as Open WebUI exports it: the chat with its whole tree of messages."""
    messages = {"u": USER | {"childrenIds": [one["id"] for one in answers]}, **{one["id"]: one for one in answers}}
    chat = {"title": "t", "models": ["m"], "history": {"messages": messages, "currentId": rated}, "messages": []}
    return {
        "id": "f",
        "user_id": "somebody",
        "version": 0,
        "type": "rating",
        "data": {"rating": rating, "model_id": "m", "sibling_model_ids": None, "reason": "", "comment": ""} | data,
        "meta": {"message_id": rated, "chat_id": "c", "arena": False},
        "snapshot": {"chat": {"id": "c", "title": "t", "chat": chat}},
        "created_at": 1,
    }


def up(rating: int) -> dict[str, Any]:
    return {"annotation": {"rating": rating}}


A, B, C = (answer(key.lower(), key) for key in "ABC")
OPEN_WEBUI: dict[str, tuple[dict[str, Any], list[str] | str]] = {
    "a thumb up beats the others": (feedback("b", 1, A, B, C), ["B>A", "B>C"]),
    "and one that was liked, too, is its equal": (feedback("b", 1, A | up(1), B, C), ["B>C"]),
    "a thumb down loses to what was drawn again": (feedback("a", -1, A, B), ["B>A"]),
    "what was drawn before it may be as bad": (feedback("b", -1, A, B), "both bad"),
    "unless it was liked": (feedback("b", -1, A | up(1), B), ["A>B"]),
    "models that were compared win": (feedback("b", -1, A, B, sibling_model_ids=["model-a"]), ["A>B"]),
    "both bad": (feedback("a", -1, A, B | up(-1), sibling_model_ids=["model-b"]), "both bad"),
    "both good": (feedback("a", 1, A, B | up(1)), "tie"),
    "an edited answer beats the first": (feedback("a", 1, A | {"originalContent": "Before"}), ["A>Before"]),
    "whatever its thumb": (feedback("a", -1, A | {"originalContent": "Before"}), ["A>Before"]),
    "one thumb alone": (feedback("a", 1, A), "one answer with a thumb, and none to compare it with"),
    "an error is no answer": (
        feedback("a", 1, A, B | {"error": {"content": "x"}}),
        "one answer with a thumb, and none to compare it with",
    ),
    "an answer that never ended is none": (
        feedback("a", 1, A, B | {"done": False}),
        "one answer with a thumb, and none to compare it with",
    ),
    "a thought in the text": (
        feedback("a", 1, A | {"content": '<details type="reasoning" done="true">hm</details> A'}, B),
        "an answer has its thought in its text, which is not supported",
    ),
    "another message": (feedback("z", 1, A), "the snapshot has no answer of that message_id"),
    "no rating": (feedback("a", 0, A, B), "tie"),
}


@pytest.mark.parametrize("name", OPEN_WEBUI)
def test_a_feedback_of_open_webui(name: str, tmp_path: Path) -> None:
    row, expected = OPEN_WEBUI[name]
    source = read(tmp_path, feedback("b", 1, A, B), row)
    assert source.format == "open-webui"
    assert won(source)[1:] == (expected if isinstance(expected, list) else [])
    assert [refusal.reason for refusal in source.refused] == ([expected] if isinstance(expected, str) else [])


def test_its_prompt_is_the_branch_that_the_answer_is_on(tmp_path: Path) -> None:
    """Two turns and a system text; the other branch of the tree is none of it."""
    row = feedback("b", 1, A, B)
    chat = row["snapshot"]["chat"]["chat"]
    first = {"id": "s", "role": "user", "content": "Hi", "parentId": None, "childrenIds": ["t", "o"]}
    said = {"id": "t", "role": "assistant", "content": "Hello", "parentId": "s", "childrenIds": ["u"]}
    other = {"id": "o", "role": "assistant", "content": "Another", "parentId": "s", "childrenIds": []}
    chat["history"]["messages"] |= {"s": first, "t": said, "o": other}
    chat["history"]["messages"]["u"]["parentId"] = "t"
    chat["params"] = {"system": "Be brief."}
    (pair,) = read(tmp_path, row).pairs
    assert [(turn.role, turn.content) for turn in pair.prompt] == [
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", "Hello"),
        ("user", "Why?"),
    ]
    chat["history"]["messages"]["u"]["files"] = [{"type": "image"}]
    (refusal,) = read(tmp_path, feedback("b", 1, A, B), row).refused
    assert refusal.reason == "prompt has a message with files, which are not supported"
    chat["history"]["messages"]["s"]["parentId"] = "t"  # a circle
    del chat["history"]["messages"]["u"]["files"]
    (refusal,) = read(tmp_path, feedback("b", 1, A, B), row).refused
    assert refusal.reason == "the snapshot lacks a turn before the answer"


def corrected(text: str, **more: Any) -> dict[str, Any]:
    score = {"id": "s", "name": "output", "dataType": "CORRECTION", "stringValue": text, "value": 0}
    return {"id": "t", "name": "chat", "input": "Why?", "output": "Because.", "scores": [score]} | more


ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
LANGFUSE: dict[str, tuple[dict[str, Any], str | None]] = {
    "texts": (corrected("So."), None),
    "messages": (corrected("So.", input=ASKED, output={"role": "assistant", "content": "Because."}), None),
    "an object with messages": (corrected("So.", input={"messages": ASKED}, output=[{"content": "Because."}]), None),
    "JSON in text, as its tables write it": (corrected("So.", input=json.dumps(ASKED)), None),
    "a number alone": (
        corrected("", scores=[{"name": "quality", "dataType": "NUMERIC", "value": 0.9}]),
        "scores without a correction: one answer, and none to compare it with",
    ),
    "two that differ": (
        corrected("So.", scores=[*corrected("So.")["scores"], *corrected("Thus.")["scores"]]),
        "several corrections that differ",
    ),
    "the same text": (corrected("Because."), "chosen and rejected are identical"),
    "tools": (
        corrected("So.", input={"messages": ASKED, "tools": [{"name": "x"}]}),
        "input: row has tools, which are not supported",
    ),
    "a call": (
        corrected("So.", output={"role": "assistant", "content": "", "tool_calls": [{"id": 1}]}),
        "output is more than a text, which is not supported",
    ),
}


@pytest.mark.parametrize("name", LANGFUSE)
def test_a_trace_of_langfuse(name: str, tmp_path: Path) -> None:
    row, refused = LANGFUSE[name]
    source = read(tmp_path, corrected("Since."), row)
    assert source.format == "langfuse"
    assert won(source)[1:] == ([] if refused else ["So.>Because."])
    assert [refusal.reason for refusal in source.refused] == ([refused] if refused else [])


def vote(choice: str, **more: Any) -> dict[str, Any]:
    return {
        "id": "v",
        "time": "2026-11-28T00:00:00",
        "prompt": "Why?",
        "answers": {"left": "L", "right": "R"},
        "models": {"left": "base", "right": "run"},
        "sampling": {"temperature": 0.7},
        "shown_order_seed": 1,
        "choice": choice,
        "voter": "",
        "prompt_set": "",
    } | more


def test_votes_of_the_studio(tmp_path: Path) -> None:
    """Two preferences; a tie and both bad make none."""
    turns = [{"role": "user", "content": "Why?"}]
    source = read(tmp_path, vote("left"), vote("right", prompt=turns), vote("tie"), vote("both_bad"), vote("neither"))
    assert source.format == "studio-votes"
    assert won(source) == ["L>R", "R>L"]
    assert source.pairs[0].prompt == source.pairs[1].prompt
    assert [refusal.reason for refusal in source.refused] == [
        "tie",
        "both bad",
        "choice is none of left, right, tie and both_bad",
    ]
