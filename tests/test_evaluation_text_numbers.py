"""Repetition, distinct-n and calibration by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dpo_studio.evaluation.calibration import calibration
from dpo_studio.evaluation.diversity import distinct_n, repetition


def test_repetition_by_hand() -> None:
    """Eight words have five runs of four; "a b c d" comes twice, so one of five was said before. The other: none."""
    assert repetition(["A b, c d! a b c d"]) == pytest.approx(1 / 5)
    assert repetition(["A b, c d! a b c d", "one two three four five", "too short"]) == pytest.approx(1 / 15)
    assert repetition([]) is None


def test_distinct_n_by_hand() -> None:
    """Words: the, cat, the, dog, the, cat: 3 different of 6. Runs of two, none across answers: 2 different of 3."""
    assert distinct_n(["the cat", "the dog", "the cat"], 1) == pytest.approx(3 / 6)
    assert distinct_n(["the cat", "the dog", "the cat"], 2) == pytest.approx(2 / 3)
    assert distinct_n(["one", ""], 2) is None


def test_margins_that_mean_what_they_say() -> None:
    """Labels drawn with P = 1 / (1 + e^-margin): the error is sampling noise, about 0.01 a bin of 2,000."""
    draw = np.random.default_rng(0)
    claims = draw.exponential(1.5, 20_000)
    kept = draw.random(20_000) < 1 / (1 + np.exp(-claims))
    found = calibration(np.where(kept, claims, -claims).tolist())
    assert len(found["bins"]) == 10
    assert found["error"] < 0.015
    assert abs(found["overconfidence"]) < 0.01


def test_an_overconfident_policy_by_hand() -> None:
    """Twenty margins of +-ln 9 claim 0.9 each; 14 are right: 0.7, so the error and the overconfidence are 0.2."""
    found = calibration([math.log(9)] * 14 + [-math.log(9)] * 6)
    assert [one["n"] for one in found["bins"]] == [10, 10]
    assert found["overconfidence"] == pytest.approx(0.2)
    assert sum(one["n"] * one["found"] for one in found["bins"]) == pytest.approx(14)


def test_no_margin_claims_one_half() -> None:
    assert calibration([0.0])["bins"] == [{"claimed": 0.5, "found": 0.5, "n": 1}]
    assert calibration([]) == {"error": None, "overconfidence": None, "bins": []}
