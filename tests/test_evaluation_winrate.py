"""Win rates and their intervals, against numbers worked by hand and against simulated experiments."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from dpo_studio.errors import DataError
from dpo_studio.evaluation.winrate import _resampled_means, share_ci95, wilson, win_rate


def test_a_tie_counts_one_half() -> None:
    """2 wins, 1 tie, 1 loss: (2 + 0.5) / 4 = 0.625, four comparisons on the three prompts a, b, c."""
    result = win_rate(["win", "tie", "loss", "win"], ["a", "a", "b", "c"])
    assert result.win_rate == 0.625
    assert (result.wins, result.ties, result.losses, result.n_prompts, result.n) == (2, 1, 1, 3, 4)
    low, high = result.win_rate_ci95
    assert 0 <= low < 0.625 < high <= 1


def test_wilson_by_hand() -> None:
    """z = 2, 8 of 10: shrink 1.4, middle (0.8 + 0.2)/1.4 = 0.7142857, half 2/1.4 * sqrt(0.016 + 0.01) = 0.2303501."""
    low, high = wilson(8, 10, z=2.0)
    assert low == pytest.approx(0.4839356, abs=1e-6)
    assert high == pytest.approx(0.9446358, abs=1e-6)


def test_wilson_stays_within_zero_and_one() -> None:
    """z = 2, 0 of 4: shrink 2, middle 0.25, half 2/2 * sqrt(0 + 4/64) = 0.25: from 0 to 0.5. 4 of 4 is its mirror."""
    assert wilson(0, 4, z=2.0) == (0.0, 0.5)
    assert wilson(4, 4, z=2.0) == (0.5, 1.0)


@pytest.mark.parametrize(("verdict", "points"), [("win", 1.0), ("tie", 0.5), ("loss", 0.0)])
def test_where_all_verdicts_agree_it_is_wilson_over_prompts(verdict: str, points: float) -> None:
    """Twelve equal verdicts on six prompts say as much as six: wilson(6 * points, 6)."""
    result = win_rate([verdict] * 12, [i // 2 for i in range(12)])  # type: ignore[list-item]
    assert result.win_rate == points
    assert result.win_rate_ci95 == wilson(6 * points, 6)
    assert result.win_rate_ci95[1] > result.win_rate_ci95[0]


def test_prompts_that_all_have_the_same_share_have_a_width_too() -> None:
    """Each prompt has one win and one loss: every drawing says 0.5, so Wilson over the 5 prompts answers."""
    assert win_rate(["win", "loss"] * 5, [i // 2 for i in range(10)]).win_rate_ci95 == wilson(2.5, 5)
    assert win_rate(["win"]).win_rate_ci95 == wilson(1, 1)


def test_the_bootstrap_by_hand() -> None:
    """Two prompts, all won (3 comparisons) and all lost (1): a drawing is AA, AB, BA or BB, its share 1, 3/4 or 0."""
    shares = _resampled_means(np.array([3.0, 0.0]), np.array([3.0, 1.0]), seed=0, resamples=4000)
    values, counts = np.unique(shares, return_counts=True)
    assert values.tolist() == [0.0, 0.75, 1.0]
    assert counts / 4000 == pytest.approx([0.25, 0.5, 0.25], abs=0.03)


def test_repeating_a_comparison_adds_no_certainty() -> None:
    """Every verdict written four times under its own prompt: the interval stays; as if apart, it would halve."""
    rng = np.random.default_rng(1)
    once = rng.random(100) < 0.6
    repeated = np.repeat(once, 4).astype(float).tolist()
    prompts = np.repeat(np.arange(100), 4).tolist()
    assert share_ci95(repeated, prompts) == pytest.approx(share_ci95(once.astype(float).tolist()), abs=1e-12)
    clustered, apart = share_ci95(repeated, prompts), share_ci95(repeated)
    assert (clustered[1] - clustered[0]) / (apart[1] - apart[0]) == pytest.approx(2.0, rel=0.15)


def test_a_seed_makes_the_interval_the_same_again() -> None:
    points = (np.random.default_rng(2).random(80) < 0.4).astype(float).tolist()
    assert share_ci95(points, seed=3) == share_ci95(points, seed=3)
    assert share_ci95(points, seed=3) != share_ci95(points, seed=4)


def test_the_order_of_large_inputs_is_drawn_in_parts() -> None:
    """3,000 prompts do not fit the block in one go; 0.5 +- 1.96 * sqrt(0.25/3000) = 0.5 +- 0.0179."""
    low, high = share_ci95([0.0, 1.0] * 1500)
    assert (low, high) == pytest.approx((0.4821, 0.5179), abs=0.003)


@pytest.mark.parametrize(("n_prompts", "share"), [(60, 0.2), (60, 0.5), (60, 0.8), (120, 0.65)])
def test_the_interval_covers_the_truth_95_times_of_100(n_prompts: int, share: float) -> None:
    """2,000 experiments, three comparisons a prompt whose own win rate is Beta(2 share, 2 (1 - share)).

    The mean of that Beta is `share`, what the interval should hold. Sampling error: sqrt(.95*.05/2000) = 0.5 %.
    """
    rng, experiments = np.random.default_rng(5), 2000
    own = rng.beta(2 * share, 2 * (1 - share), (experiments, n_prompts))
    won = rng.binomial(3, own).astype(float)
    covered = 0
    for sums in won:
        shares = _resampled_means(sums, np.full(n_prompts, 3.0), seed=7, resamples=400)
        low, high = np.percentile(shares, (2.5, 97.5))
        covered += low <= share <= high
    assert 0.93 <= covered / experiments <= 0.97


def test_ignoring_the_prompts_would_cover_too_seldom() -> None:
    """The same experiment with comparisons drawn apart: the interval is too narrow, as it should be shown to be."""
    rng, covered = np.random.default_rng(6), 0
    for _ in range(300):
        own = rng.beta(1.0, 1.0, 60)
        low, high = share_ci95((rng.random((60, 3)) < own[:, None]).astype(float).ravel().tolist(), resamples=400)
        covered += low <= 0.5 <= high
    assert covered / 300 < 0.93


def test_nothing_to_compare_is_refused() -> None:
    for empty in (lambda: win_rate([]), lambda: share_ci95([]), lambda: wilson(0, 0)):
        with pytest.raises(DataError, match="no comparisons"):
            empty()


def test_a_prompt_for_every_comparison() -> None:
    with pytest.raises(ValueError, match="2 comparisons but 1 prompts"):
        win_rate(["win", "loss"], ["a"])


def test_it_loads_no_torch() -> None:
    code = "import sys, dpo_studio.evaluation.winrate as w; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
