"""The comparison of an export with its run, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from dpo_studio.export.verify import BARS, Bar, ExportCheck, compare
from dpo_studio.objectives import PairLogps


def logps(chosen: list[float], rejected: list[float]) -> PairLogps:
    counts = torch.full((len(chosen),), 10)
    return PairLogps(torch.tensor(chosen), torch.tensor(rejected), counts, counts)


ZERO = logps([0.0] * 4, [0.0] * 4)


def compared(before: PairLogps, after: PairLogps, reference: PairLogps = ZERO, *, beta: float = 0.5) -> ExportCheck:
    return compare(before, after, reference, ["a", "b", "c", "d"][: len(before)], beta=beta)


def test_the_same_model_keeps_everything() -> None:
    policy = logps([-1, -2, -3, -9], [-5, -4, -1, -8])
    found = compared(policy, policy)
    assert (found.pairs, found.signs_kept, found.noise, found.margins_beyond_noise) == (4, 1, 0, 4)
    assert (found.margins_kept, found.accuracy_change, found.accuracy_change_ci95) == (1, 0, (0, 0))
    assert all(found.misses(bar) == [] for bar in BARS.values())


def test_the_figures_by_hand() -> None:
    """Differences 4, 2, -2, -1 become 4, -1, -2, -3; rewards are half of that, the reference being zero.

    Margins 2, 1, -1, -0.5 become 2, -0.5, -1, -1.5: changes 0, -1.5, 0, -1, so the noise is sqrt(3.25 / 4) = 0.901.
    Three margins are beyond it, two of those keep their sign. Accuracy 2/4 becomes 1/4, the mean margin 0.375 -0.25.
    Log-probs move by 0, 3, 0, 2 over 80 tokens.
    """
    before = logps([-1, -2, -3, -9], [-5, -4, -1, -8])
    after = logps([-1, -5, -3, -11], [-5, -4, -1, -8])
    found = compared(before, after)
    assert found.signs_kept == 0.75
    assert found.noise == pytest.approx(math.sqrt(3.25 / 4))
    assert found.margins_beyond_noise == 3
    assert found.margins_kept == pytest.approx(2 / 3)
    assert (found.accuracy_before, found.accuracy, found.accuracy_change) == (0.5, 0.25, -0.25)
    assert [found.margin_before, found.margin] == pytest.approx([0.375, -0.25])
    assert found.nats_a_token == pytest.approx(5 / 80)
    low, high = found.margin_ci95
    assert -1.5 <= low < -0.25 < high <= 2
    low, high = found.accuracy_change_ci95
    assert -1 <= low <= -0.25 <= high <= 0


def test_what_is_missed_is_said_with_both_numbers() -> None:
    before = logps([-1, -2, -3, -9], [-5, -4, -1, -8])
    after = logps([-1, -5, -3, -11], [-5, -4, -1, -8])
    signs, margins = compared(before, after).misses(Bar(0.95, 0.85))
    assert "75.0 %" in signs and "95.0 %" in signs
    assert "66.7 %" in margins and "85.0 %" in margins
    assert compared(before, after).misses(Bar(0.7, 0.6)) == []


def test_an_adapter_that_is_gone_leaves_no_margin_and_counts_as_not_kept() -> None:
    """The export is the reference again: every margin becomes 0, the noise is their own size."""
    before = logps([4, 4, 4, 4], [0, 0, 0, 0])
    found = compared(before, ZERO)
    assert (found.noise, found.margins_beyond_noise) == (2.0, 0)
    assert any("no reward margin" in miss for miss in found.misses(BARS["gptq"]))


def test_what_is_not_finite_is_left_out_and_is_too_far() -> None:
    before = logps([-1, -2, -3, -9], [-5, -4, -1, -8])
    after = logps([-1, float("nan"), -3, -9], [-5, -4, -1, float("-inf")])
    found = compared(before, after)
    assert (found.pairs, found.not_finite, found.signs_kept) == (2, 2, 1)
    assert "not finite" in found.misses(BARS["merged"])[0]
    nothing = compared(logps([float("nan")], [0]), logps([0], [0]), logps([0], [0]))
    assert nothing.pairs == 0 and nothing.misses(BARS["gptq"])


def test_the_lines_say_the_figures() -> None:
    policy = logps([-1, -2, -3, -9], [-5, -4, -1, -8])
    text = "\n".join(compared(policy, policy).lines())
    assert "100.0 % of 4 pairs" in text and "accuracy 0.500 -> 0.500" in text
