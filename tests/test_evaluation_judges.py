"""What every judge has in common, and how far one agrees with people: all by hand."""

from __future__ import annotations

import subprocess
import sys

import pytest

from dpo_studio.evaluation.agreement import agreement, kappa, leave_one_out, majority
from dpo_studio.evaluation.everyday import everyday_judge
from dpo_studio.evaluation.judges import (
    Comparison,
    Opinion,
    RuleJudge,
    Verdict,
    Winner,
    in_both_orders,
    longer_wins,
    summary,
)
from dpo_studio.preferences.pair import Message
from dpo_studio.sampling.completion import Completion


def comparison(a: str, b: str, *turns: str) -> Comparison:
    prompt = tuple(Message("user" if n % 2 == 0 else "assistant", turn) for n, turn in enumerate(turns or ("why?",)))
    return Comparison(prompt, *(Completion(text, ended=True, tokens=1) for text in (a, b)))


def test_the_longer_answer_wins_and_as_long_ties() -> None:
    verdicts = longer_wins().judge_all([comparison("ab", "a"), comparison("a", "ab"), comparison("a", "b")])
    assert [verdict.winner for verdict in verdicts] == ["a", "b", "tie"]
    assert verdicts[0].reason == "A has 2 characters, B has 1."


def test_the_everyday_rule_reads_the_last_turn() -> None:
    """An answer about the first turn alone is not about the question."""
    tomatoes = "Tomatoes like sun, compost, water; pinch shoots, tie stems loosely, pick ripe fruit weekly, mulch soil."
    hinges = "Oil hinges, swing the door, wipe drops, tighten screws, rub candle wax, lift pins, clean rust, grease."
    (verdict,) = everyday_judge().judge_all([comparison(tomatoes, hinges, "Tomatoes?", "Sure.", "My door squeaks.")])
    assert verdict.winner == "b"


@pytest.mark.parametrize(
    ("a_first", "b_first", "winner"),
    [("a", "a", "a"), ("b", "b", "b"), ("tie", "tie", "tie"), ("a", "b", "tie"), ("a", "tie", "tie")]
    + [(failed, "a", "tie") for failed in ("unparsable", "refused", "too long")]
    + [("a", failed, "tie") for failed in ("unparsable", "refused", "too long")],
)
def test_only_what_is_said_twice_counts(a_first: Opinion, b_first: Opinion, winner: Winner) -> None:
    verdict = in_both_orders(a_first, b_first, "why")
    assert verdict.winner == winner
    assert (verdict.reason == "why") == (a_first == b_first)


def test_a_summary_counts_opinions_and_comparisons() -> None:
    """Opinions: a a, a b, tie b, unparsable a, refused "too long". Six prefer an answer; of them `a` in the first order
    (three times) and `b` in the second (twice) prefer what is shown first."""
    opinions: list[tuple[Opinion, Opinion]] = [
        ("a", "a"),
        ("a", "b"),
        ("tie", "b"),
        ("unparsable", "a"),
        ("refused", "too long"),
    ]
    verdicts = [in_both_orders(*orders, "why") for orders in opinions] + [Verdict("b", "read once")]
    assert summary(verdicts) == {
        "comparisons": 6,
        "a": 1,
        "b": 1,
        "ties": 4,
        "asked_in_both_orders": 5,
        "orders_disagree": 2,
        "first_shown_preferred": (2 + 2) / 6,
        "not_judged": 2,
        "unparsable": 1,
        "refused": 1,
        "too_long": 1,
    }
    assert summary([])["first_shown_preferred"] is None


def test_a_rule_that_contradicts_itself_ties() -> None:
    always_a = RuleJudge("a", "", lambda pair: Verdict("a", "A it is."))
    (verdict,) = always_a.judge_all([comparison("x", "y")])
    assert (verdict.winner, verdict.by_order) == ("tie", ("a", "b"))


def test_kappa_of_a_textbook_table() -> None:
    """Two raters, 50 things: both yes 20, both no 15, yes-no 5, no-yes 10. Agreement 0.7; by chance
    0.5 x 0.6 + 0.5 x 0.4 = 0.5; kappa 0.4."""
    cells: list[tuple[Winner, Winner, int]] = [("a", "a", 20), ("a", "b", 5), ("b", "a", 10), ("b", "b", 15)]
    said: list[Winner] = [x for x, _, n in cells for _ in range(n)]
    meant: list[Winner] = [y for _, y, n in cells for _ in range(n)]
    assert kappa(said, meant) == pytest.approx(0.4)
    assert kappa(["a", "a"], ["a", "a"]) is None
    assert kappa(["a", "b", "tie"], ["a", "b", "tie"]) == 1.0


def test_agreement_where_people_prefer_and_exactly() -> None:
    """Right, wrong, a tie where people prefer, a tie where they tie: (1 + 0 + 1/2) / 3, and 2 of 4 exactly."""
    numbers = agreement(["a", "a", "tie", "tie"], ["a", "b", "b", "tie"], range(4))
    assert (numbers["n"], numbers["n_preferred"]) == (4, 3)
    assert numbers["agreement"] == pytest.approx(0.5)
    assert numbers["exact"] == 0.5
    nobody = agreement(["a"], ["tie"], [0])
    assert (nobody["agreement"], nobody["agreement_ci95"], nobody["kappa"]) == (None, None, 0.0)


def test_intervals_are_clustered_by_prompt() -> None:
    """200 comparisons that are 20 prompts ten times over are as sure as 20."""
    said: list[Winner] = [("a" if prompt % 2 else "b") for prompt in range(20) for _ in range(10)]
    meant: list[Winner] = ["a"] * 200
    alone = agreement(said, meant, range(200))["agreement_ci95"]
    together = agreement(said, meant, [prompt for prompt in range(20) for _ in range(10)])["agreement_ci95"]
    assert together[1] - together[0] > 2.5 * (alone[1] - alone[0])


def test_a_majority_is_more_than_any_other() -> None:
    assert majority(["a", "b", "a"]) == "a"
    assert majority(["a", "b"]) is None
    assert majority(["a", "b", "tie"]) is None
    assert majority(["tie"]) == "tie"
    assert majority([]) is None


def test_each_annotator_stands_against_the_others() -> None:
    """(a, a, b): the two a's stand against a split, the b against a: wrong. (b, b, b): three right. So 3 of 4; a judge
    that always says a is right in the first and wrong three times: 1 of 4."""
    found = leave_one_out([["a", "a", "b"], ["b", "b", "b"]], ["a", "a"], ["p", "q"])
    assert found is not None
    assert (found["people"]["n"], found["people"]["agreement"]) == (4, 0.75)
    assert (found["judge"]["n"], found["judge"]["agreement"]) == (4, 0.25)
    assert leave_one_out([["a"], ["b"]], ["a", "a"], ["p", "q"]) is None


def test_judging_by_rules_and_llms_loads_no_torch() -> None:
    code = "import sys, dpo_studio.workflows.judging; print('torch' in sys.modules, 'openai' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False False"
