"""The win rate at equal length, against arithmetic by hand and simulated judges whose true value is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dpo_studio.evaluation.length_control import length_controlled


def logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_two_lengths_by_hand() -> None:
    """Ten comparisons 10 tokens longer, 7 won; ten 10 shorter, 2 won. With two values of x the model fits both shares,
    and Firth's penalty is one half added to each cell: logits ln(7.5/3.5) and ln(2.5/8.5), their middle -0.2308.
    """
    points = [1.0] * 7 + [0.0] * 3 + [1.0] * 2 + [0.0] * 8
    share, (low, high) = length_controlled(points, [10] * 10 + [-10] * 10)
    assert share == pytest.approx(logistic((math.log(7.5 / 3.5) + math.log(2.5 / 8.5)) / 2), abs=1e-6)
    assert low < share < high


def test_equal_lengths_leave_the_plain_share() -> None:
    """No slope to speak of; with one cell of 8 wins and 2 losses Firth's share is (8 + 1/2) / (10 + 1)."""
    share, (low, high) = length_controlled([1.0] * 8 + [0.0] * 2, [0] * 10)
    assert share == pytest.approx(8.5 / 11, abs=1e-6)
    assert low < share < high


@pytest.mark.parametrize(("slope", "shift"), [(1.0, 1.65), (3.0, 1.0)])
def test_a_judge_that_only_likes_length(slope: float, shift: float) -> None:
    """P(win) = logistic(slope * difference), differences of 30 tokens around `shift` of them: 0.8 are won, and at equal
    length the judge cannot tell: 0.5, within 0.03."""
    draw = np.random.default_rng(0)
    longer_by = draw.normal(shift, 1, 4000)
    points = (draw.random(4000) < 1 / (1 + np.exp(-slope * longer_by))).astype(float)
    assert points.mean() == pytest.approx(0.8, abs=0.015)
    share, (low, high) = length_controlled(points.tolist(), (30 * longer_by).tolist(), resamples=200)
    assert share == pytest.approx(0.5, abs=0.03)
    assert low < 0.5 < high


def test_a_judge_that_does_not_care_about_length() -> None:
    """Seven of ten won whatever the lengths: control changes nothing."""
    draw = np.random.default_rng(1)
    points, longer_by = (draw.random(4000) < 0.7).astype(float), draw.normal(40, 30, 4000)
    share, _ = length_controlled(points.tolist(), longer_by.tolist(), resamples=20)
    assert share == pytest.approx(0.7, abs=0.04)


def test_separated_verdicts_have_a_finite_answer() -> None:
    """Every longer answer won and every shorter one lost: maximum likelihood has no finite slope here."""
    longer_by = [*range(1, 31), *range(-10, 0)]
    share, (low, high) = length_controlled([1.0] * 30 + [0.0] * 10, longer_by)
    assert 0 < low < share < high < 1
    all_won, (low, high) = length_controlled([1.0] * 20, list(range(20)))
    assert 0.5 < all_won < 1
    assert high > low


def test_intervals_cover_and_clusters_count() -> None:
    """200 experiments of 60 prompts with 3 alike comparisons each, true value 0.6 at equal length: 95 in 100 hold it.

    Binomial noise of 200 at 0.95 is 1.5 points, so 0.91 to 0.99 is three of them.
    """
    draw = np.random.default_rng(2)
    held = 0
    for _ in range(200):
        taste = np.repeat(draw.normal(0, 1, 60), 3)
        longer_by = draw.normal(0.5, 1, 180)
        # a logistic model with a random effect of the prompt, sd 1: its middle flattens by sqrt(1 + 0.346)
        truth = math.log(0.6 / 0.4)
        points = (draw.random(180) < 1 / (1 + np.exp(-(truth * math.sqrt(1.346) + longer_by + taste)))).astype(float)
        _, (low, high) = length_controlled(
            points.tolist(), longer_by.tolist(), np.repeat(np.arange(60), 3).tolist(), resamples=200
        )
        held += low <= 0.6 <= high
    assert 0.91 <= held / 200 <= 0.99
