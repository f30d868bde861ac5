"""Several processes are one: the same numbers however many there are, and together or not at all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dpo_studio.config import TrainingSection
from dpo_studio.learning.logprobs import pair_logps
from dpo_studio.learning.reference import reference_logps
from dpo_studio.learning.state import TrainingState
from dpo_studio.learning.train import train
from dpo_studio.models.adapters import as_reference, train_mode
from dpo_studio.models.attention import PAIRS
from dpo_studio.objectives import AOT, BCO, DPO, IPO, SFT, WPO, Formula
from dpo_studio.policy.policy import Policy
from dpo_studio.ranks import Ranks
from dpo_studio.tokens.dealing import dealt_rows, rows_of_rank
from dpo_studio.tokens.pack import Steps
from tests.pairs_of_ids import random_pairs
from tests.policies import policy_on
from tests.rank_processes import on_ranks

# Dealing


def test_rows_are_equally_long_and_as_many_for_each() -> None:
    """By hand: 7+5+4+3+3+2 = 24 tokens, a budget of 8, two processes: ceil(24 / 16) = 2 rows each, longest first to the
    emptiest of four: 7 | 5 | 4 | 3, then 3 to the 3, 2 to the 4. The longest, 7, goes to the first; 6 and 6 to the
    second, and 5 to the first: 12 tokens each."""
    assert dealt_rows([7, 5, 4, 3, 3, 2], 8, 2) == [[[0], [1]], [[2, 5], [3, 4]]]


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("budget", [30, 100, 10_000])
def test_every_pair_is_dealt_once_within_the_budget(size: int, budget: int) -> None:
    lengths = [int(n) for n in np.random.default_rng(0).integers(3, 60, 50)]
    hands = dealt_rows(lengths, budget, size)
    assert len({len(hand) for hand in hands}) == 1
    rows = [row for hand in hands for row in hand]
    assert sorted(item for row in rows for item in row) == list(range(50))
    assert all(len(row) < 2 or sum(lengths[item] for item in row) <= budget for row in rows)


def test_sixty_four_pairs_a_rank_end_together() -> None:
    """What the slowest rank has over the mean: the rest of a step is lost by waiting for it."""
    lengths = [int(n) for n in np.random.default_rng(0).lognormal(6.2, 0.5, 256).clip(30, 2000)]
    loads = [sum(lengths[i] for row in hand for i in row) for hand in dealt_rows(lengths, 8192, 4)]
    assert max(loads) * 4 / sum(loads) < 1.005


def test_more_processes_than_pairs_leave_rows_empty() -> None:
    assert dealt_rows([5, 3], 8, 4) == [[[0]], [[1]], [[]], [[]]]


# Numbers

STEPS, PAIRS_PER_STEP = 20, 7
"""Seven pairs are not dealt evenly; thirty pairs in steps of seven: the fifth step of an epoch has two, fewer than four
processes."""
CASES: dict[str, tuple[Formula, bool, int]] = {
    "dpo": (DPO(), False, STEPS),
    "dpo-live": (DPO(), True, STEPS),
    "ipo": (IPO(), False, 5),
    "bco": (BCO(), False, 5),
    "aot": (AOT(), False, 5),
    "aot-live": (AOT(), True, 5),
    "sft-token": (SFT(average="token"), False, 5),
    "wpo": (WPO(), False, 5),
}


def learned(dtype: str, cases: list[str], dropout: float = 0.0) -> dict[str, tuple[list[float], dict[str, Any]]]:
    """Losses and the adapter of each case, by our own loop, on this process's share."""
    ranks = Ranks.of_environment()
    with ranks.together():
        return {case: _learned(ranks, getattr(torch, dtype), case, dropout) for case in cases}


def _learned(ranks: Ranks, dtype: torch.dtype, case: str, dropout: float) -> tuple[list[float], dict[str, Any]]:
    objective, live, steps = CASES[case]
    pairs = random_pairs(30)
    model = policy_on(attn_implementation=PAIRS, dropout=dropout).to(dtype)
    section = TrainingSection(pairs_per_step=PAIRS_PER_STEP, learning_rate=3e-3, warmup=0, schedule="constant")
    with as_reference(model):
        known = reference_logps(model, pairs, token_budget=100, cache=None, ranks=ranks)

    def of_step(batches: Any) -> Any:
        with as_reference(model):
            return [pair_logps(model, batch) for batch in batches]

    plan = Steps(
        pairs,
        PAIRS_PER_STEP,
        100,
        seed=0,
        epochs=9,
        max_steps=steps,
        reference=None if live or not objective.needs_reference else lambda at: known.map(lambda x_P: x_P[list(at)]),
        rows=rows_of_rank(ranks.rank, ranks.size),
    )
    train_mode(model)
    state = TrainingState.fresh(Policy(model), section, steps, ranks=ranks)
    reports = list(train(Policy(model), plan, objective, state, of_step if live else None))
    return [r.metrics["loss"] for r in reports], {name: t.numpy() for name, t in Policy(model).state().items()}


@pytest.mark.parametrize(
    ("size", "cases", "dtype", "loss_limit", "weight_limit"),
    [
        (2, ["dpo", "bco", "aot-live", "sft-token", "wpo"], "float64", 1e-10, 1e-10),
        (4, ["dpo-live", "aot"], "float64", 1e-10, 1e-10),
        (2, ["dpo"], "float32", 1e-5, 1e-4),
        pytest.param(4, list(CASES), "float64", 1e-10, 1e-10, marks=pytest.mark.slow),
        pytest.param(4, list(CASES), "float32", 1e-5, 1e-4, marks=pytest.mark.slow),
    ],
)
def test_several_processes_learn_what_one_does(
    size: int, cases: list[str], dtype: str, loss_limit: float, weight_limit: float
) -> None:
    """Losses relative, weights by their largest difference over the largest weight of their tensor."""
    one, every = learned(dtype, cases), on_ranks(size, learned, dtype, cases)
    for case in cases:
        losses, weights = every[0][case]
        assert np.allclose(losses, one[case][0], rtol=loss_limit, atol=0), case
        assert max(losses) - min(losses) > 1e-3  # it moved
        for name, tensor in weights.items():
            off = np.abs(tensor - one[case][1][name]).max() / np.abs(one[case][1][name]).max()
            assert off < weight_limit, (case, name, off)
            assert all((other[case][1][name] == tensor).all() for other in every[1:])  # the ranks agree to the bit


def test_with_dropout_the_same_number_of_processes_gives_the_same_bytes() -> None:
    """And another number other masks: the micro-batches are others."""
    first, again = (on_ranks(2, learned, "float32", ["dpo"], 0.3)[0]["dpo"] for _ in range(2))
    assert first[0] == again[0]
    assert all((first[1][name] == again[1][name]).all() for name in first[1])
    alone, _ = learned("float32", ["dpo"], 0.3)["dpo"]
    assert abs(alone[-1] - first[0][-1]) > 1e-4
