"""Win rates and accuracies with 95 % intervals that take account of comparisons which share a prompt.

Verdicts on one prompt are correlated, so prompts are resampled, each with all of its comparisons: a percentile
bootstrap over prompts. Where all resamples agree, the bootstrap's width is zero, which is too small, and Wilson's
interval over the number of prompts takes its place. No torch here: reports recompute these.

Shapes: G = prompts (groups of comparisons), R = resamples.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dpo_studio.errors import DataError

__all__ = ["mean_ci95", "places_of", "share_ci95", "wilson", "win_rate"]

POINTS = {"win": 1.0, "tie": 0.5, "loss": 0.0}
Z95 = 1.959964
"""The normal distribution's 97.5 % point."""
RESAMPLES_AT_ONCE = 2_000_000
"""Indices in memory at a time: 16 MB, whatever the number of prompts."""
NO_WIDTH = 1e-9


@dataclass(frozen=True)
class WinRate:
    """Share of comparisons won, a tie counting one half, with its interval."""

    win_rate: float
    win_rate_ci95: tuple[float, float]
    wins: int
    ties: int
    losses: int
    n_prompts: int
    """Different prompts: the interval's width depends on their number."""
    n: int
    """Comparisons."""


def win_rate(
    verdicts: Sequence[Literal["win", "tie", "loss"]],
    prompt_of: Sequence[Hashable] | None = None,
    *,
    seed: int = 0,
    resamples: int = 1000,
) -> WinRate:
    """The share won. `prompt_of` names each comparison's prompt; without it every comparison has its own.

    Raises:
        DataError: there is no verdict.
    """
    points = [POINTS[verdict] for verdict in verdicts]
    interval = share_ci95(points, prompt_of, seed=seed, resamples=resamples)
    return WinRate(
        win_rate=sum(points) / len(points),
        win_rate_ci95=interval,
        wins=points.count(1.0),
        ties=points.count(0.5),
        losses=points.count(0.0),
        n_prompts=len(points) if prompt_of is None else len(set(prompt_of)),
        n=len(points),
    )


def share_ci95(
    points: Sequence[float], prompt_of: Sequence[Hashable] | None = None, *, seed: int = 0, resamples: int = 1000
) -> tuple[float, float]:
    """95 % interval of the mean of `points`, each between 0 and 1 (an accuracy: 1, 0, or one half for a tie).

    In 15 settings (60 to 200 prompts, shares 0.2 to 0.8, four correlated comparisons a prompt; 2,000 simulated
    experiments each) it contained the true share 93.9 to 95.2 times of 100; with comparisons resampled as independent,
    80 to 86 times.

    Raises:
        DataError: `points` is empty.
    """
    low, high = mean_ci95(points, prompt_of, seed=seed, resamples=resamples)
    if high - low > NO_WIDTH:
        return low, high
    n_prompts = len(points) if prompt_of is None else len(set(prompt_of))
    return wilson(n_prompts * sum(points) / len(points), n_prompts)


def mean_ci95(
    values: Sequence[float], prompt_of: Sequence[Hashable] | None = None, *, seed: int = 0, resamples: int = 1000
) -> tuple[float, float]:
    """95 % interval of the mean of any numbers by the bootstrap over prompts; of zero width where all are equal.

    Raises:
        DataError: `values` is empty.
    """
    if not values:
        raise DataError("no comparisons: a share of nothing has no value", hint="is the held-out side empty?")
    sums_G, counts_G = _by_prompt(values, range(len(values)) if prompt_of is None else prompt_of)
    means_R = _resampled_means(sums_G, counts_G, seed=seed, resamples=resamples)
    low, high = (float(end) for end in np.percentile(means_R, (2.5, 97.5)))
    return low, high


def wilson(successes: float, n: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of a share (1927): never of zero width, never outside 0 and 1.

    Raises:
        DataError: `n` is not positive.
    """
    if n <= 0:
        raise DataError("no comparisons: a share of nothing has no value", hint="is the held-out side empty?")
    share, shrink = successes / n, 1 + z * z / n
    middle = (share + z * z / (2 * n)) / shrink
    half = z / shrink * sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def places_of(prompt_of: Sequence[Hashable]) -> NDArray[np.int64]:
    """Each comparison's prompt as a number, prompts counted from 0 in the order they first appear."""
    places: dict[Hashable, int] = {}
    return np.array([places.setdefault(prompt, len(places)) for prompt in prompt_of], np.int64)


def _by_prompt(
    points: Sequence[float], prompt_of: Sequence[Hashable]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sum and number of each prompt's points."""
    if len(points) != len(prompt_of):
        raise ValueError(f"{len(points)} comparisons but {len(prompt_of)} prompts named")
    place_of = places_of(prompt_of)
    sums_G = np.bincount(place_of, weights=np.asarray(points)).astype(np.float64)
    counts_G = np.bincount(place_of).astype(np.float64)
    return sums_G, counts_G


def _resampled_means(
    sums_G: NDArray[np.float64], counts_G: NDArray[np.float64], *, seed: int, resamples: int
) -> NDArray[np.float64]:
    """The mean of each of R resamples of G prompts, with replacement, (R,)."""
    rng, n_prompts = np.random.default_rng(seed), len(sums_G)
    rows = max(1, RESAMPLES_AT_ONCE // n_prompts)
    means = []
    for start in range(0, resamples, rows):
        resampled_RG = rng.integers(n_prompts, size=(min(rows, resamples - start), n_prompts))
        means.append(sums_G[resampled_RG].sum(1) / counts_G[resampled_RG].sum(1))
    return np.concatenate(means)
