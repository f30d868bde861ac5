"""How often a model prefers the chosen answer, beside what it must beat: its reference, and the longer answer."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

import torch

from dpo_studio.evaluation.winrate import share_ci95
from dpo_studio.objectives import PairLogps, margin, wins

__all__ = ["accuracy_summary", "finite_pairs", "finite_summary"]


def accuracy_summary(
    policy: PairLogps, reference: PairLogps, prompt_of: Sequence[Hashable], *, beta: float
) -> dict[str, Any]:
    """Accuracy and mean reward margin with intervals clustered by prompt, and the baselines.

    `accuracy_before` asks the reference's own log-probs, as a sum and per token; `longer_wins` picks the longer answer.
    """
    margin_P = margin(policy, reference)
    correct_P = wins(margin_P)  # whatever beta is: it may make them all infinite, or 0
    per_token_P = reference.chosen_P / reference.chosen_tokens_P.clamp(
        min=1
    ) - reference.rejected_P / reference.rejected_tokens_P.clamp(min=1)
    return {
        "accuracy": correct_P.mean().item(),
        "accuracy_ci95": list(share_ci95(correct_P.tolist(), prompt_of)),
        "margin": _finite((beta * margin_P).double().mean().item()),
        "accuracy_before": wins(reference.chosen_P - reference.rejected_P).mean().item(),
        "accuracy_before_per_token": wins(per_token_P).mean().item(),
        "longer_wins": wins((policy.chosen_tokens_P - policy.rejected_tokens_P).float()).mean().item(),
    }


def _finite(number: float) -> float | None:
    """The number, or None: a beta of 1e308 makes a mean that JSON has no word for."""
    return number if math.isfinite(number) else None


def finite_summary(
    policy: PairLogps, reference: PairLogps, prompt_of: Sequence[Hashable], *, beta: float
) -> dict[str, Any]:
    """`accuracy_summary` of the pairs whose log-probs are finite, if any, and how many are `not_finite`."""
    prompts, (policy, reference) = finite_pairs(prompt_of, policy, reference)
    left_out = {"not_finite": len(prompt_of) - len(prompts)}
    return left_out | accuracy_summary(policy, reference, prompts, beta=beta) if prompts else left_out


def finite_pairs(prompt_of: Sequence[Hashable], *sides: PairLogps) -> tuple[list[Hashable], list[PairLogps]]:
    """Prompts and log-probs of the pairs whose log-probs are finite on all sides."""
    good = torch.stack([x_P.isfinite() for logps in sides for x_P in (logps.chosen_P, logps.rejected_P)]).all(dim=0)
    prompts = [prompt for prompt, fine in zip(prompt_of, good.tolist(), strict=True) if fine]
    return prompts, [logps.map(lambda x_P: x_P[good]) for logps in sides]
