"""How a run measures its held-out pairs: before the first step, during the run, and after the last step."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from dpo_studio.console.progress import Progress
from dpo_studio.evaluation.accuracy import finite_summary, log_prob_differences
from dpo_studio.learning.held_out import evaluate, held_out_metrics
from dpo_studio.objectives import Formula, PairLogps
from dpo_studio.policy.policy import Policy
from dpo_studio.ranks import ALONE, Ranks
from dpo_studio.workflows.training.preparing import RunData

__all__ = ["HeldOut"]


@dataclass
class HeldOut:
    """A run's held-out pairs, with the reference's log-probs of them."""

    policy: Policy
    data: RunData
    objective: Formula
    reference: PairLogps
    token_budget: int
    progress: Progress
    ranks: Ranks = ALONE
    logps: PairLogps | None = None
    """The policy's log-probs in the last measurement; None before it and where no pairs are held out."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The metrics of the last measurement, by TRL's names."""

    def measure(self, mean_log_ratio: float) -> dict[str, float]:
        """Compute the policy's log-probs and return the metrics; empty where no pairs are held out."""
        pairs = self.data.held_out.pairs
        if not pairs:
            return {}
        with self.progress.task("held-out", len(pairs), "pairs") as advance:
            self.metrics, self.logps = evaluate(
                self.policy,
                pairs,
                self.reference,
                self.objective.with_running_mean(mean_log_ratio),
                token_budget=self.token_budget,
                ranks=self.ranks,
                progress=advance,
            )
        return self.metrics

    def at_start(self, *, is_reference: bool, mean_log_ratio: float) -> dict[str, float]:
        """The metrics before the first step. While the policy equals its reference, no pass is needed."""
        if not self.data.held_out.pairs:
            return {}
        if not is_reference or self.objective.needs_agreement:
            return self.measure(mean_log_ratio)
        return held_out_metrics(self.reference, self.reference, self.objective)

    def summary(self) -> dict[str, Any]:
        """What `result.json` says of the last measurement: accuracy and margin with intervals, and the loss."""
        if self.logps is None:
            return {}
        prompts, beta = self.data.held_out_prompts, self.objective.beta
        summary: dict[str, Any] = finite_summary(self.logps, self.reference, prompts, beta=beta)
        if (found := log_prob_differences(self.logps, self.reference)) is not None:
            summary["log_prob_differences"] = found
        loss = self.metrics["eval_loss"]  # a mean over all pairs: it is not finite if one of them is not
        summary["held_out_loss"] = loss if math.isfinite(loss) else None
        return summary
