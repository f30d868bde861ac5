"""Held-out pairs measured as a step's are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dpo_studio.learning.batched_logps import logps_over_ranks
from dpo_studio.learning.metrics import StepMetrics
from dpo_studio.objectives import Formula, PairLogps
from dpo_studio.policy.policy import Policy
from dpo_studio.ranks import ALONE, Ranks
from dpo_studio.tokens.encode import EncodedPair

__all__ = ["evaluate", "held_out_metrics"]


def evaluate(
    policy: Policy,
    pairs: Sequence[EncodedPair],
    reference: PairLogps,
    objective: Formula,
    *,
    token_budget: int,
    ranks: Ranks = ALONE,
    progress: Callable[[int], None] = lambda pairs: None,
) -> tuple[dict[str, float], PairLogps]:
    """Loss, rewards, accuracy and margin on held-out pairs, and the policy's log-probs of them.

    Each of several processes computes a share, and all get everything.
    """
    with policy.in_eval():
        logps = logps_over_ranks(
            ranks,
            policy.model,
            pairs,
            token_budget=token_budget,
            agreement=objective.needs_agreement,
            progress=progress,
        )
    return held_out_metrics(logps, reference, objective), logps


def held_out_metrics(policy: PairLogps, reference: PairLogps, objective: Formula) -> dict[str, float]:
    """A step's metrics for pairs that were not trained on, by TRL's names."""
    metrics = StepMetrics(objective)
    metrics.add(policy, reference, objective(policy, reference), range(len(policy)))
    return {f"eval_{name}": value for name, value in metrics.means()[0].items()}
