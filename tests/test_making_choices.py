"""Which answers become pairs, worked out by hand; and prompts of sources of every kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dpo_studio.config import SourceSection
from dpo_studio.errors import DataError, UsageError
from dpo_studio.preferences.pair import Message
from dpo_studio.preferences.prompts import read_prompts
from dpo_studio.workflows.making.choosing import Choice, Rated, choose, points
from tests.tiny_runs import write_rows


def rated(*scores: float | None, tokens: tuple[int, ...] = (), cut: tuple[int, ...] = ()) -> list[Rated]:
    lengths = tokens or (10,) * len(scores)
    return [Rated(score, at in cut, length) for at, (score, length) in enumerate(zip(scores, lengths, strict=True))]


FOUR = rated(1.0, 3.0, 0.0, 2.0)
"""In order of score: 1, 3, 0, 2."""


@pytest.mark.parametrize(
    ("answers", "choice", "pairs"),
    [
        (FOUR, Choice(), [(1, 2)]),
        (FOUR, Choice("best-second"), [(1, 3)]),
        (FOUR, Choice("all"), [(0, 2), (1, 0), (1, 2), (1, 3), (3, 0), (3, 2)]),
        # Equal scores: the lowest index, on either side; equal ones are no pair.
        (rated(2.0, 2.0, 0.0, 0.0), Choice(), [(0, 2)]),
        (rated(2.0, 2.0, 0.0, 0.0), Choice("best-second"), [(0, 2)]),
        (rated(2.0, 2.0, 0.0), Choice("all"), [(0, 2), (1, 2)]),
        # A margin drops nearer pairs and puts no other in their place.
        (FOUR, Choice("best-second", margin=1.0), [(1, 3)]),
        (FOUR, Choice("best-second", margin=1.5), []),
        (FOUR, Choice("all", margin=2.0), [(1, 0), (1, 2), (3, 2)]),
        # Lengths 10, 30, 20, 16: within a factor of 2 are 10-20, 10-16, 30-20, 30-16 and 20-16, not 30-10.
        (rated(1.0, 3.0, 0.0, 2.0, tokens=(10, 30, 20, 16)), Choice(match_length=2), [(1, 2)]),
        # Of the best there is no partner of like length, so the next best that has one: 3 (16) against 0 (15).
        (rated(1.0, 3.0, 0.0, 2.0, tokens=(15, 90, 40, 16)), Choice(match_length=1.5), [(3, 0)]),
        # A cut answer loses, whatever its score; two cut ones are equal.
        (rated(1.0, None, 2.0, cut=(1,)), Choice(), [(2, 1)]),
        (rated(1.0, None, 2.0, cut=(1,)), Choice("best-second"), [(2, 0)]),
        (rated(1.0, None, None, cut=(1, 2)), Choice("all"), [(0, 1), (0, 2)]),
        (rated(1.0, None, cut=(1,)), Choice(margin=99.0), [(0, 1)]),
        # What was not judged takes no part.
        (rated(1.0, None, 2.0), Choice(), [(2, 0)]),
    ],
)
def test_choices(answers: list[Rated], choice: Choice, pairs: list[tuple[int, int]]) -> None:
    assert choose(answers, choice)[0] == pairs


@pytest.mark.parametrize(
    ("answers", "choice", "unjudged", "why"),
    [
        (rated(1.0), Choice(), (), "fewer than two different answers"),
        (rated(None, None, cut=(0, 1)), Choice(), (), "every answer was cut"),
        (rated(1.0, 1.0, 1.0), Choice("all"), (), "tie"),
        (rated(1.0, 2.0), Choice(), [(0, 1)], "not judged"),
        (rated(None, None), Choice(), (), "not judged"),
        (rated(1.0, 2.0, tokens=(10, 31)), Choice(match_length=3), (), "no two answers of like length"),
        (rated(1.0, 2.0), Choice(margin=1.01), (), "below the margin"),
    ],
)
def test_why_there_is_no_pair(answers: list[Rated], choice: Choice, unjudged: Any, why: str) -> None:
    assert choose(answers, choice, unjudged) == ([], why)


def test_two_answers_without_a_verdict_are_not_paired_but_others_are() -> None:
    """Scores 3, 1 and 0; of the best and the worst the judge said nothing: the best against the second then."""
    assert choose(rated(3.0, 1.0, 0.0), Choice(), {(0, 2)})[0] == [(0, 1)]


def test_points_are_wins_and_half_the_ties() -> None:
    """0 beats 1, ties 2; 2 beats 1: 0 has 1.5, 1 has 0, 2 has 1.5. In a circle all have 1, and there is no pair."""
    assert points(3, [(0, 1, "a"), (0, 2, "tie"), (1, 2, "b")]) == [1.5, 0.0, 1.5]
    circle = points(3, [(0, 1, "a"), (1, 2, "a"), (0, 2, "b")])
    assert circle == [1.0, 1.0, 1.0]
    assert choose(rated(*circle), Choice("all")) == ([], "tie")


@pytest.mark.parametrize("wrong", [{"margin": -1.0}, {"margin": float("nan")}, {"match_length": 0.9}])
def test_a_choice_that_means_nothing_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        Choice(**wrong)  # type: ignore[arg-type]


ASKED = [Message("user", "What now?")]
SOURCES: dict[str, tuple[list[object], dict[str, Any], list[list[Message]], list[str]]] = {
    "texts, each once": (
        [{"prompt": "What now?"}, {"prompt": "What  now?\n"}, {"prompt": " "}, "no JSON object"],
        {},
        [ASKED],
        ["prompt is empty", "row is not a JSON object"],
    ),
    "messages": ([{"prompt": [{"role": "user", "content": "What now?"}]}], {}, [ASKED], []),
    "chats, whose last answer is no prompt": (
        [{"messages": [{"role": "user", "content": "What now?"}, {"role": "assistant", "content": "Wait."}]}],
        {},
        [ASKED],
        [],
    ),
    "alpaca": (
        [{"instruction": "Sum up.", "input": "1 2", "output": "3"}],
        {},
        [[Message("user", "Sum up.\n1 2")]],
        [],
    ),
    "a system column": (
        [{"question": "What now?", "system": "Be brief."}],
        {},
        [[Message("system", "Be brief."), *ASKED]],
        [],
    ),
    "columns by the user's names": ([{"task": {"ask": "What now?"}}], {"prompt": "task.ask"}, [ASKED], []),
    "pairs, of which only usable ones": (
        [
            {"prompt": "What now?", "chosen": "Wait.", "rejected": "No."},
            {"prompt": "And then?", "chosen": "Wait.", "rejected": "Wait."},
        ],
        {},
        [ASKED],
        ["chosen and rejected are identical"],
    ),
    "tools are not dropped": (
        [{"prompt": "What now?"}, {"prompt": "Why?", "tools": [{"name": "x"}]}],
        {},
        [ASKED],
        ["row has tools, which are not supported"],
    ),
}


@pytest.mark.parametrize("name", SOURCES)
def test_prompts_of(name: str, tmp_path: Path) -> None:
    rows, columns, prompts, refused = SOURCES[name]
    lines = [row if isinstance(row, dict) else f'"{row}"' for row in rows]
    section = SourceSection(source=str(write_rows(tmp_path / "p.jsonl", lines)), map=columns)
    found = read_prompts(section)
    assert [list(turns) for turns in found.prompts.values()] == prompts
    assert list(found.refused.counts) == refused
    assert found.rows == len(rows)


def test_a_source_without_prompts_is_refused_with_its_columns(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "p.jsonl", [{"topic": "x", "text": "y"}])
    with pytest.raises(DataError, match=r"its columns \(topic, text\) hold no prompt"):
        read_prompts(SourceSection(source=str(file)))
