"""The run in a sentence: the right number, and never more than it shows."""

from __future__ import annotations

from typing import Any

import pytest

from dpo_studio.reports.verdict import cautions, headline_of
from dpo_studio.runs.facts import RunFacts

TRAINED: dict[str, Any] = {
    "held_out_pairs": 120,
    "accuracy": 0.708,
    "accuracy_ci95": [0.62, 0.78],
    "accuracy_before": 0.483,
    "longer_wins": 0.4,
}
COMPARED: dict[str, Any] = {
    "win_rate": 0.7428,
    "win_rate_ci95": [0.6651, 0.8062],
    "wins": 97,
    "ties": 14,
    "losses": 29,
    "n": 140,
}


def facts(**result: Any) -> RunFacts:
    steps = [{"step": step} for step in range(40)]
    return RunFacts("run", steps, timing=[], recipe={}, recipe_text="", environment={}, result=result, answers=[])


def test_a_demo_is_judged_by_its_win_rate() -> None:
    verdict = headline_of(facts(**TRAINED, **COMPARED))
    assert verdict.tone == "better"
    assert verdict.sentence == (
        "The tuned model’s answers won 74 % of 140 comparisons with the base model’s (95 % interval 67–81 %)."
    )
    assert verdict.meaning.startswith(
        "97 won, 14 tied (each counting one half), 29 lost. The whole interval lies above"
    )


def test_a_training_is_judged_by_its_held_out_accuracy() -> None:
    verdict = headline_of(facts(**TRAINED))
    assert verdict.tone == "better"
    assert verdict.sentence == (
        "On 120 held-out pairs the tuned model prefers the chosen answer in 71 % (95 % interval 62–78 %), "
        "before training 48 %; picking the longer answer would give 40 %."
    )
    assert verdict.meaning == "That beats a coin toss, the model before training and picking the longer answer."


@pytest.mark.parametrize(
    ("change", "tone", "said"),
    [
        ({"win_rate": 0.55, "win_rate_ci95": [0.47, 0.63]}, "unclear", "may be a coin toss"),
        ({"win_rate": 0.55, "win_rate_ci95": [0.5, 0.6]}, "unclear", "includes 50 %"),
        ({"win_rate": 0.55}, "unclear", "Without an interval this may be chance"),
        ({"win_rate": 0.3, "win_rate_ci95": [0.2, 0.4]}, "worse", "made the answers worse"),
        ({"win_rate": 0.504, "win_rate_ci95": [0.5004, 0.51]}, "better", "(95 % interval 50.0–51 %)"),
        ({"accuracy": 0.55, "accuracy_ci95": [0.46, 0.64]}, "unclear", "may be a coin toss"),
        ({"longer_wins": 0.8}, "unclear", "does not beat simply picking the longer answer"),
        ({"longer_wins": 0.66}, "unclear", "still includes the score of picking the longer answer"),
        ({"accuracy_before": 0.75}, "unclear", "no better than before training"),
        (
            {"accuracy_before": 0.65, "longer_wins": 0.7},
            "unclear",
            "the longer answer and of the model before training",
        ),
        ({"accuracy_before": None, "longer_wins": None}, "better", "That beats a coin toss."),
        ({"longer_wins": None}, "better", "That beats a coin toss and the model before training."),
        ({"accuracy": 0.2, "accuracy_ci95": [0.1, 0.3]}, "worse", "prefers the rejected answers"),
        ({"accuracy": None}, "none", "39 steps recorded, no held-out result yet"),
    ],
)
def test_the_verdict_is_honest(change: dict[str, Any], tone: str, said: str) -> None:
    verdict = headline_of(facts(**(TRAINED | change)))
    assert verdict.tone == tone
    assert said in f"{verdict.sentence} {verdict.meaning}"


def test_what_a_fair_reader_should_know_is_said() -> None:
    weak = {"n": 20, "longer_wins": 0.9, "mean_tokens_base": 60, "mean_tokens_tuned": 90}
    few, length, lengthened = cautions(facts(**(TRAINED | COMPARED | weak)))
    assert "Only 20 comparisons" in few
    assert "accuracy (71 %) does not beat picking the longer answer (90 %)" in length
    assert "60 to 90 tokens" in lengthened
    assert cautions(facts(**TRAINED, **COMPARED)) == []
