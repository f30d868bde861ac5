"""The demo's rule judge, on answers written by hand."""

from __future__ import annotations

import pytest

from dpo_studio.evaluation.everyday import EverydayRule, content_stems
from dpo_studio.evaluation.judges import Verdict
from dpo_studio.sampling.completion import Completion

PROMPT = "My bedroom door squeaks every time someone opens it. How do I make it quiet?"
GOOD = (
    "Put a drop of oil on each hinge of the door and swing it back and forth. "
    "Wipe away what runs down, and tighten loose screws with a screwdriver."
)
OTHER_GOOD = (
    "Lift the door off its hinges, clean the pins with a cloth and rub them with candle wax. "
    "Hang it again and the noise should be gone."
)
RULE = EverydayRule()


def ended(text: str) -> Completion:
    return Completion(text, ended=True, tokens=len(text.split()) + 1)


def cut(text: str) -> Completion:
    return Completion(text, ended=False, tokens=160)


BORDERLINE = {
    "good": ended(GOOD),
    "other good": ended(OTHER_GOOD),
    "good but cut": cut(GOOD + " Then take the"),
    "empty": ended(""),
    "blank": ended(" \n "),
    "thin": ended("You can oil the door."),
    "echo": ended("My bedroom door squeaks every time someone opens it, so how do I make it quiet?"),
    "off": ended("Tomatoes like sun, compost and plenty of water; pinch the side shoots and tie the stems to canes."),
    "contact": ended(GOOD + " Call 555-123-4567 for help."),
    "loop": ended(GOOD + " " + GOOD),
    "long": ended(GOOD + " " + " ".join(f"word{i}" for i in range(90))),
    "cut contact": cut(GOOD + " Write to helper@hinges.example and"),
}


@pytest.mark.parametrize("left", BORDERLINE)
@pytest.mark.parametrize("right", BORDERLINE)
def test_swapping_the_answers_swaps_the_verdict(left: str, right: str) -> None:
    swapped = {"a": "b", "b": "a", "tie": "tie"}
    there = RULE(PROMPT, BORDERLINE[left], BORDERLINE[right])
    back = RULE(PROMPT, BORDERLINE[right], BORDERLINE[left])
    assert back.winner == swapped[there.winner]


@pytest.mark.parametrize("name", BORDERLINE)
def test_an_answer_ties_with_itself(name: str) -> None:
    assert RULE(PROMPT, BORDERLINE[name], BORDERLINE[name]).winner == "tie"


def test_a_complete_answer_beats_the_same_answer_cut() -> None:
    verdict = RULE(PROMPT, ended(GOOD), cut(GOOD + " Then take the"))
    assert verdict == Verdict("a", "B never ended; A is complete.")


@pytest.mark.parametrize("nothing", ["empty", "blank", "thin", "echo", "off"])
def test_ending_early_and_saying_nothing_loses_even_to_an_answer_that_never_ended(nothing: str) -> None:
    """The rule must not reward a model that only learned to stop."""
    assert RULE(PROMPT, BORDERLINE[nothing], cut(GOOD + " Then take the")).winner == "b"


def test_two_answers_of_no_use_tie() -> None:
    assert RULE(PROMPT, ended(""), ended("You can oil the door.")).winner == "tie"
    assert RULE(PROMPT, ended(""), cut(" ")) == Verdict("tie", "Both say nothing.")


def test_two_good_answers_tie_whichever_is_longer() -> None:
    assert RULE(PROMPT, ended(GOOD), ended(OTHER_GOOD)) == Verdict("tie", "Both are complete.")


@pytest.mark.parametrize("worse", ["contact", "loop", "long"])
def test_each_fault_costs_a_complete_answer_the_win(worse: str) -> None:
    assert RULE(PROMPT, ended(OTHER_GOOD), BORDERLINE[worse]).winner == "a"


def test_one_fault_each_ties_and_two_lose_to_one() -> None:
    assert RULE(PROMPT, BORDERLINE["contact"], BORDERLINE["loop"]).winner == "tie"
    assert RULE(PROMPT, BORDERLINE["contact"], BORDERLINE["cut contact"]).winner == "a"


@pytest.mark.parametrize(
    "text",
    [
        "Call 1-800-HINGES now.",
        "Ring +44 123 4567 today.",
        "See www.doors.example for more.",
        "Look at squeak.com first.",
        "Yours, [Your Name]",
    ],
)
def test_invented_contacts_are_seen(text: str) -> None:
    assert RULE.faults(ended(text)) == ("makes up contacts or leaves blanks",)


@pytest.mark.parametrize(
    "text",
    ["Use 100-200 g of flour.", "Wait 1-2 weeks.", "It cost $1,000 in 2015.", "Mix 1 to 10 parts [1].", "Dr. Net ran."],
)
def test_plain_numbers_are_no_contacts(text: str) -> None:
    assert RULE.faults(ended(text)) == ()


def test_a_phrase_three_times_is_repetition_and_twice_is_not() -> None:
    twice = "oil the hinge of the door, then oil the hinge of the door"
    assert not RULE.repeats(twice)
    assert RULE.repeats(twice + ", and oil the hinge of the door")


def test_a_prompt_without_content_words_puts_no_subject() -> None:
    assert content_stems("What should I do with it?") == frozenset()
    assert RULE.void("What should I do with it?", GOOD) is None


def test_word_forms_meet_on_their_stem() -> None:
    assert content_stems("flower stopping berries") == content_stems("flowers stopped berry")
    assert content_stems("phone").isdisjoint(content_stems("photo"))


def test_thresholds_are_fields_and_stand_in_the_description() -> None:
    strict = EverydayRule(min_own_words=40, max_words=20)
    assert strict(PROMPT, ended(GOOD), ended(OTHER_GOOD)).winner == "tie"  # neither says forty things
    assert "rambles past 20 words" in EverydayRule(max_words=20).faults(ended(GOOD))
    assert "40 different" in strict.description
    assert "20 words" in strict.description
