"""The win rate that is left at equal length: most judges, people among them, like the longer answer.

A logistic regression of the points (1 won, 0 lost, one half for a tie) on the difference in length, read at a
difference of zero: Dubois et al., "Length-Controlled AlpacaEval" (arXiv 2404.04475), here with an intercept and the
standardised difference alone. Estimated with Firth's penalty (Biometrika 80, 1993, equation 4 for the logistic model):
plain maximum likelihood has no finite answer when one side's answers are always the longer ones that win, which small
comparisons often are. No torch here.

Shapes: N = comparisons, R = resamples.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from dpo_studio.evaluation.winrate import NO_WIDTH, RESAMPLES_AT_ONCE, places_of, wilson

__all__ = ["length_controlled"]

Floats = NDArray[np.float64]
_ITERATIONS = 100
_CLOSE = 1e-8
"""Newton steps smaller than this, in logits, are not steps."""
_LONGEST_STEP = 2.0
"""In logits: the first steps of a nearly separated regression would overshoot."""
_LEAST_INFORMATION = 1e-12


def length_controlled(
    points: Sequence[float],
    longer_by: Sequence[float],
    prompt_of: Sequence[Hashable] | None = None,
    *,
    seed: int = 0,
    resamples: int = 1000,
) -> tuple[float, tuple[float, float]]:
    """The share of `points` at equal length, and its 95 % interval, a bootstrap over prompts.

    `longer_by` is how many tokens the answer that scores the points has more than the other one. Where that never
    varies there is nothing to control for: the regression then has its intercept alone.
    """
    y_N, x_N = np.asarray(points, np.float64), np.asarray(longer_by, np.float64)
    spread = x_N.std()
    x_N = x_N / spread if spread > 0 else np.zeros_like(x_N)
    place_N = places_of(range(len(y_N)) if prompt_of is None else prompt_of)
    share = float(_at_equal_length(y_N, x_N, np.ones((1, len(y_N))))[0])
    n_prompts = int(place_N.max()) + 1
    rng, rows = np.random.default_rng(seed), max(1, RESAMPLES_AT_ONCE // max(len(y_N), n_prompts))
    shares = []
    for start in range(0, resamples, rows):
        drawn_RG = rng.integers(n_prompts, size=(min(rows, resamples - start), n_prompts))
        times_RG = np.stack([np.bincount(drawn, minlength=n_prompts) for drawn in drawn_RG]).astype(np.float64)
        shares.append(_at_equal_length(y_N, x_N, times_RG[:, place_N]))
    low, high = (float(end) for end in np.percentile(np.concatenate(shares), (2.5, 97.5)))
    return share, (low, high) if high - low > NO_WIDTH else wilson(n_prompts * share, n_prompts)


def _at_equal_length(y_N: Floats, x_N: Floats, times_RN: Floats) -> Floats:
    """1 / (1 + e^-intercept) of each resample's regression, (R,); `times_RN` is how often each comparison was drawn."""
    intercept_R, slope_R = np.zeros(len(times_RN)), np.zeros(len(times_RN))
    for _ in range(_ITERATIONS):
        p_RN = 1 / (1 + np.exp(-np.clip(intercept_R[:, None] + slope_R[:, None] * x_N, -30, 30)))
        weight_RN = times_RN * p_RN * (1 - p_RN)
        i00_R, i01_R, i11_R = weight_RN.sum(1), weight_RN @ x_N, weight_RN @ x_N**2
        determinant_R = i00_R * i11_R - i01_R**2
        alone_R = determinant_R < _LEAST_INFORMATION  # lengths do not vary here: no slope to speak of
        determinant_R = np.where(alone_R, 1.0, determinant_R)
        # the hat matrix's diagonal: what each comparison counts in its own fit
        hat_RN = weight_RN * (i11_R[:, None] - 2 * i01_R[:, None] * x_N + i00_R[:, None] * x_N**2)
        hat_RN = np.where(alone_R[:, None], weight_RN / i00_R[:, None], hat_RN / determinant_R[:, None])
        left_RN = times_RN * (y_N - p_RN) + hat_RN * (0.5 - p_RN)
        g0_R, g1_R = left_RN.sum(1), left_RN @ x_N
        step0_R = np.where(alone_R, g0_R / i00_R, (i11_R * g0_R - i01_R * g1_R) / determinant_R)
        step1_R = np.where(alone_R, 0.0, (i00_R * g1_R - i01_R * g0_R) / determinant_R)
        longest_R = np.maximum(np.abs(step0_R), np.abs(step1_R))
        shorten_R = np.minimum(1.0, _LONGEST_STEP / np.maximum(longest_R, _CLOSE))
        intercept_R += shorten_R * step0_R
        slope_R += shorten_R * step1_R
        if longest_R.max() < _CLOSE:
            break
    return 1 / (1 + np.exp(-intercept_R))
