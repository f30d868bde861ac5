"""The checks of text on rows whose problems were put there by hand, and counted by hand."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_studio.doctor.findings import DataReport, Finding
from dpo_studio.doctor.text_checks import TextChecks
from dpo_studio.preferences.pair import Message, Pair
from dpo_studio.preferences.sources import Refusal
from tests.tiny_tokenizers import TEXT

WORDS = TEXT.split()


def words(seed: int, count: int = 40) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=count)) + "."


def pair(row: int, **sides: Any) -> Pair:
    """A pair of random words; `prompt`, `chosen`, `rejected` are texts or turns."""
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    turns: dict[str, tuple[Message, ...]] = {}
    for place, (side, role) in enumerate(roles.items()):
        given = sides.get(side, words(1000 * place + row))
        turns[side] = (Message(role, given),) if isinstance(given, str) else tuple(Message(*turn) for turn in given)
    return Pair(turns["prompt"], turns["chosen"], turns["rejected"], row, sides.get("scores"))


def found(pairs: Sequence[Pair], held_out: Sequence[Pair] = (), refused: Sequence[Refusal] = ()) -> dict[str, Finding]:
    checks = TextChecks()
    for refusal in refused:
        checks.refuse(refusal)
    for one in pairs:
        checks.see(one)
    for one in held_out:
        checks.see_held_out(one)
    return {finding.name: finding for finding in checks.findings()}


def rows(finding: Finding) -> list[int]:
    return [example.row for example in finding.examples]


def test_plain_pairs_have_nothing_against_them() -> None:
    findings = found([pair(row) for row in range(30)], [pair(row) for row in range(40, 50)])
    assert {name: finding.count for name, finding in findings.items() if finding.level != "fine"} == {}
    assert all(finding.does and finding.todo for finding in findings.values())


@pytest.mark.parametrize(
    ("name", "sides"),
    [
        ("empty-turns", {"prompt": [("system", "  "), ("user", "Why?")]}),
        ("role-order", {"prompt": [("user", "Why?"), ("user", "Why not?")]}),
        ("role-order", {"prompt": [("assistant", "Hello."), ("user", "Why?")]}),
        ("role-order", {"prompt": [("user", "Why?"), ("system", "Be brief.")], "chosen": "No.", "rejected": "Yes."}),
        ("chat-markup", {"chosen": "It is so.<|im_end|>"}),
        ("chat-markup", {"prompt": "[INST] Why? [/INST]"}),
        ("chat-markup", {"rejected": "No.\n\nHuman: And then?"}),
        ("chat-markup", {"rejected": "No.\n### Instruction: more"}),
        ("unseen-characters", {"chosen": "abc\u202edef"}),
        ("unseen-characters", {"prompt": "a\x07b"}),
        ("unseen-characters", {"rejected": "caf\ufffd"}),
        ("unseen-characters", {"rejected": "seen \U000e0041\U000e0042"}),
        ("refusing-chosen", {"chosen": "I’m sorry, but I can’t do that."}),
        ("unfinished-answers", {"chosen": words(1, 80) + " and when the water has run off then you take the"}),
    ],
)
def test_what_one_pair_can_have(name: str, sides: dict[str, Any]) -> None:
    """One such pair among ten: that check counts one, shows its row, and no other check of words counts any."""
    findings = found([pair(row, **sides) if row == 7 else pair(row) for row in range(10)])
    assert (findings[name].count, findings[name].of, rows(findings[name])) == (1, 10, [7])
    of_words = {
        "empty-turns",
        "role-order",
        "chat-markup",
        "unseen-characters",
        "refusing-chosen",
        "unfinished-answers",
    }
    assert {other for other in of_words if findings[other].count} == {name}


@pytest.mark.parametrize(
    "sides",
    [
        {"prompt": [("system", "Be brief."), ("user", "2+2?"), ("assistant", "4"), ("user", "3+3?")]},
        {"chosen": [("assistant", "Look."), ("tool", "4"), ("tool", "5"), ("assistant", "It is 4.")]},
        {"prompt": "a [link] <b>bold</b> <- ### heading\r\n\tman\u200c\u200d e\u0301 👩‍👩‍👧 [0]"},
        {"chosen": "I'm sorry, but I cannot.", "rejected": "I am sorry, but I can not do that."},
        {"chosen": words(1, 80) + "\n- apples and pears"},
        {"chosen": words(1, 80) + " This is where all of it stands: https://a.example/b"},
        {"chosen": "Nothing"},
    ],
)
def test_what_only_looks_like_a_problem(sides: dict[str, Any]) -> None:
    findings = found([pair(row, **sides) if row == 7 else pair(row) for row in range(10)])
    of_words = (
        "empty-turns",
        "role-order",
        "chat-markup",
        "unseen-characters",
        "refusing-chosen",
        "unfinished-answers",
    )
    assert {name: findings[name].examples for name in of_words if findings[name].count} == {}


def test_copies_opposites_and_near_copies() -> None:
    """Of ten pairs row 3 is row 1 with other white space, row 5 is row 2 the other way round, and row 8 is row 6 with
    one word of its 40-word answer changed. The opposite and the copy are counted once, not as near copies too."""
    pairs = [pair(row) for row in range(10)]
    text = pairs[1].chosen[0].content.replace(" ", "\n", 3)
    pairs[3] = pair(3, prompt=pairs[1].prompt[0].content, chosen=text, rejected=pairs[1].rejected[0].content)
    pairs[5] = pairs[2].swap()
    pairs[5] = Pair(pairs[5].prompt, pairs[5].chosen, pairs[5].rejected, 5)
    nearly = pairs[6].chosen[0].content.replace(pairs[6].chosen[0].content.split()[20], "elsewhere", 1)
    pairs[8] = Pair(pairs[6].prompt, (Message("assistant", nearly),), pairs[6].rejected, 8)
    findings = found(pairs)
    assert {n: (f.count, rows(f)) for n, f in findings.items() if n.endswith("pairs") and f.count} == {
        "duplicate-pairs": (1, [3]),
        "opposite-pairs": (1, [5]),
        "near-duplicate-pairs": (1, [8]),
    }
    assert "row 1" in findings["duplicate-pairs"].examples[0].text
    assert "row 2" in findings["opposite-pairs"].examples[0].text
    assert "row 6" in findings["near-duplicate-pairs"].examples[0].text


def test_many_answers_to_one_prompt_are_no_duplicates() -> None:
    """A long prompt makes pairs alike in most of their text; it is the answers that have to differ."""
    findings = found([pair(row, prompt=words(1, 500)) for row in range(10)])
    assert {name: f.count for name, f in findings.items() if "duplicate" in name} == {
        "duplicate-pairs": 0,
        "near-duplicate-pairs": 0,
        "near-duplicate-prompts": 0,
    }


def test_contradictions_stop_a_run_from_a_tenth_on() -> None:
    """20 pairs and the opposites of 2: 2 of 22 are no tenth. Of 3: 3 of 23 are more."""
    pairs = [pair(row) for row in range(20)]
    assert found([*pairs, *(one.swap() for one in pairs[:2])])["opposite-pairs"].level == "warning"
    assert found([*pairs, *(one.swap() for one in pairs[:3])])["opposite-pairs"].level == "stop"


def test_prompts_on_both_sides_are_told_from_prompts_that_are_nearly_so() -> None:
    """Held out: row 0's prompt in other white space, row 1's with one word of 40 changed, and three of their own."""
    train = [pair(row) for row in range(6)]
    first, second = (train[row].prompt[0].content for row in (0, 1))
    held = [pair(0, prompt=first.replace(" ", "  ")), pair(1, prompt=second.replace(second.split()[9], "elsewhere", 1))]
    findings = found(train, [*held, *(pair(row) for row in (70, 71, 72))])
    assert [(findings[n].count, findings[n].of) for n in ("held-out-leak", "held-out-near-leak")] == [(1, 5), (1, 5)]
    assert "training row 1" in findings["held-out-near-leak"].examples[0].text
    assert found(train, [pair(row) for row in range(3)])["held-out-leak"].level == "stop"


def test_longer_wins_by_hand() -> None:
    """Chosen and rejected lengths 30/20, 30/30, 10/20, 30/10: the longer one is chosen in 2 of 4, and with the tie as
    one half "longer wins" is right in 2.5 of 4 = 0.625. Scores 3/1, 2/2, 1/2, 5/1: with differences of length 10, 0,
    -10, 20 and of score 2, 0, -1, 4 the correlation within pairs is (20 + 10 + 80) / sqrt(600 * 21) = 0.98."""
    lengths, scores = [(30, 20), (30, 30), (10, 20), (30, 10)], [(3.0, 1.0), (2.0, 2.0), (1.0, 2.0), (5.0, 1.0)]
    pairs = [
        pair(row, chosen="c" * c, rejected="r" * r, scores=s)
        for row, ((c, r), s) in enumerate(zip(lengths, scores, strict=True))
    ]
    bias = found(pairs)["length-bias"]
    assert (bias.count, bias.numbers["longer_wins"]) == (2, 0.625)
    assert bias.numbers["length_score_correlation"] == pytest.approx(110 / np.sqrt(600 * 21), abs=1e-6)
    centred = [[value - np.mean(two) for two in some for value in two] for some in (lengths, scores)]
    assert bias.numbers["length_score_correlation"] == pytest.approx(np.corrcoef(centred)[0, 1], abs=1e-6)


def test_a_length_bias_is_a_warning() -> None:
    """Of 40 pairs 30 have the longer answer chosen, 75 %: over 70."""
    sides = ["c" * 300 if row % 4 else "c" * 100 for row in range(40)]
    bias = found([pair(row, chosen=f"{chosen} {row:02}", rejected="r" * 200) for row, chosen in enumerate(sides)])[
        "length-bias"
    ]
    assert (bias.count, bias.level, rows(bias)) == (30, "warning", [1, 2, 3])


def test_an_opening_that_only_chosen_answers_have() -> None:
    """12 of 40 chosen answers (30 %) and 2 of 40 rejected ones (5 %) begin with the same words."""
    pairs = [
        pair(
            row,
            chosen=("Sure! Here is " if row < 12 else "") + words(row),
            rejected=("Sure! Here is " if row >= 38 else "") + words(row + 99),
        )
        for row in range(40)
    ]
    opening = found(pairs)["same-opening"]
    assert (opening.count, opening.level, opening.numbers) == (12, "warning", {"chosen": 0.3, "rejected": 0.05})
    assert '"sure! here is …"' in opening.detail


def test_scores_that_say_the_opposite_or_next_to_nothing() -> None:
    """Margins 9, 0, -1, 0.4 of scores between 1 and 10: a twentieth of the range of 9 is 0.45, so two are small, and
    one of four is reversed. Turned round, three of four have a margin at most 0 and two below: half is no stop."""
    scores = [(10.0, 1.0), (5.0, 5.0), (4.0, 5.0), (5.4, 5.0)]
    pairs = [pair(row, scores=both) for row, both in enumerate(scores)]
    findings = found([*pairs, pair(4)])
    small, reversed_ = findings["small-margins"], findings["reversed-scores"]
    assert (small.count, small.of, rows(small)) == (2, 4, [1, 3])
    assert small.numbers["threshold"] == pytest.approx(0.45)
    assert (reversed_.count, rows(reversed_), reversed_.level) == (1, [2], "warning")
    assert found([pair(row, scores=(1.0, 2.0)) for row in range(3)])["reversed-scores"].level == "stop"
    assert "small-margins" not in found([pair(0)])


def test_refusals_by_reason() -> None:
    refused = [Refusal(row, "rejected is empty" if row % 2 else "tie") for row in range(1, 6)]
    finding = found([pair(0)], refused=refused)["refused-rows"]
    assert (finding.count, finding.of, finding.level) == (5, 6, "warning")
    assert finding.detail == "3 x rejected is empty; 2 x tie"
    assert [(example.row, example.text) for example in finding.examples] == [(1, "rejected is empty"), (2, "tie")]
    assert found([], refused=refused)["refused-rows"].level == "stop"


def test_the_histograms_count_every_answer() -> None:
    checks = TextChecks()
    for row in range(50):
        checks.see(pair(row, chosen="c" * (row + 1), rejected="r" * 1000, scores=(2.0, 1.0)))
    lengths, margins = checks.histograms()
    assert {name: sum(counts) for name, counts in lengths.counts.items()} == {"chosen": 50, "rejected": 50}
    assert lengths.counts["rejected"][-1] == 50
    assert sum(margins.counts["margin"]) == 50


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.text(max_size=30), st.text(max_size=30), st.text(max_size=30)), min_size=1, max_size=8))
def test_any_text_gives_a_report(texts: list[tuple[str, str, str]]) -> None:
    findings = found([pair(row, prompt=p, chosen=c, rejected=r) for row, (p, c, r) in enumerate(texts)])
    assert all(0 <= finding.count <= finding.of for finding in findings.values())
    report = DataReport("x", "trl", len(texts), len(texts), len(texts), 1, {}, list(findings.values()))
    assert report.verdict and report.to_plain()["findings"]


def test_a_row_of_several_pairs_is_one_row() -> None:
    checks = TextChecks()
    for one in (pair(0), pair(1), pair(1, chosen="Another."), pair(1, chosen="A third.")):
        checks.see(one)
    checks.refuse(Refusal(2, "tie"))
    assert (checks.rows, checks.pairs) == (3, 4)


def test_answers_that_differ_in_white_space_alone_do_not_contradict_themselves() -> None:
    findings = found([pair(0, chosen="It  is so.", rejected="It is so."), pair(1)])
    assert (findings["opposite-pairs"].count, findings["duplicate-pairs"].count) == (0, 0)
