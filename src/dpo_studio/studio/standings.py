"""What votes say of models: win rates, the same at equal length, and strengths of three and more; all with intervals.

Shapes: N = comparisons, M = models, P = two models that met, R = resamples.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dpo_studio.evaluation.length_control import length_controlled
from dpo_studio.evaluation.winrate import places_of, win_rate

__all__ = ["Compared", "standings", "strengths"]

_ROUNDS = 1000
_CLOSE = 1e-10
_RESAMPLES = 1000
_MOST_MODELS, _MOST_PAIRS = 30, 60
"""What is summed up: two hundred models would take 300 MB, and no one reads their table."""
_VERDICTS: dict[float, Literal["win", "tie", "loss"]] = {1.0: "win", 0.5: "tie", 0.0: "loss"}
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Compared:
    """One comparison of two models' answers to a prompt."""

    prompt: str
    models: tuple[str, str]
    points: float
    """Of the first: 1 won, 0 lost, one half for a tie and where both are bad."""
    longer_by: int
    """How many characters the first one's answer has more: votes are on texts of models with different tokens."""


def standings(some: Sequence[Compared]) -> dict[str, Any]:
    """`pairs`, the first model's share against the second for each two that met; `bradley_terry` from three on."""
    met: dict[tuple[str, str], list[Compared]] = defaultdict(list)
    for each in some:
        if each.models[0] != each.models[1]:
            met[min(each.models), max(each.models)].append(each)
    names = {name for pair in met for name in pair}
    shown = sorted(sorted(met, key=lambda pair: -len(met[pair]))[:_MOST_PAIRS])
    return {
        "pairs": [{"models": list(pair)} | _against(pair[0], met[pair]) for pair in shown],
        "bradley_terry": strengths(some) if 2 < len(names) <= _MOST_MODELS else {},
    }


def _against(first: str, some: Sequence[Compared]) -> dict[str, Any]:
    points = [each.points if each.models[0] == first else 1 - each.points for each in some]
    longer_by = [each.longer_by if each.models[0] == first else -each.longer_by for each in some]
    prompts = [each.prompt for each in some]
    share, interval = length_controlled(points, longer_by, prompts)
    plain = vars(win_rate([_VERDICTS[point] for point in points], prompts))
    return plain | {"length_controlled": share, "length_controlled_ci95": interval}


def strengths(some: Sequence[Compared], *, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Bradley and Terry's strengths (1952), `{strength, ci95}`, log-odds around 0: P(a beats b) = 1 / (1 + e^(b - a)).

    A tie is half a win for each; half a vote either way between all that met keeps a model that never lost finite. The
    intervals are percentiles of a bootstrap over prompts, each with all of its comparisons.
    """
    apart = [each for each in some if each.models[0] != each.models[1]]
    names = sorted({name for each in apart for name in each.models})
    place = {name: at for at, name in enumerate(names)}
    first_N = np.array([place[each.models[0]] for each in apart])
    second_N = np.array([place[each.models[1]] for each in apart])
    points_N = np.array([each.points for each in apart])
    prompt_N = places_of([each.prompt for each in apart])
    n_prompts = int(prompt_N.max()) + 1
    drawn_RG = np.random.default_rng(seed).integers(n_prompts, size=(_RESAMPLES, n_prompts))
    wins_RMM = np.zeros((_RESAMPLES + 1, len(names), len(names)))
    for row, times_G in enumerate(
        [np.ones(n_prompts), *(np.bincount(drawn, minlength=n_prompts) for drawn in drawn_RG)]
    ):
        times_N = times_G[prompt_N]
        np.add.at(wins_RMM[row], (first_N, second_N), times_N * points_N)
        np.add.at(wins_RMM[row], (second_N, first_N), times_N * (1 - points_N))
    ever_MM = (wins_RMM[0] + wins_RMM[0].T) > 0
    found_RM = _maximum(wins_RMM + 0.5 * ever_MM)
    low_M, high_M = np.percentile(found_RM[1:], (2.5, 97.5), axis=0)
    return {
        name: {"strength": float(found_RM[0, at]), "ci95": (float(low_M[at]), float(high_M[at]))}
        for name, at in place.items()
    }


def _maximum(wins_RMM: Floats) -> Floats:
    """The likeliest strengths of each resample, (R, M), by Hunter's MM updates (2004, equation 3)."""
    met_RMM = wins_RMM + wins_RMM.transpose(0, 2, 1)
    won_RM = wins_RMM.sum(2)
    log_RM = np.zeros(won_RM.shape)
    for _ in range(_ROUNDS):
        strength_RM = np.exp(log_RM)
        shared_RM = (met_RMM / (strength_RM[:, :, None] + strength_RM[:, None, :])).sum(2)
        new_RM = np.log(won_RM / shared_RM)
        new_RM -= new_RM.mean(1, keepdims=True)
        moved = float(np.abs(new_RM - log_RM).max())
        log_RM = new_RM
        if moved < _CLOSE:
            break
    return log_RM
