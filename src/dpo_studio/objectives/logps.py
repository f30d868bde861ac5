"""Log-probs of a step's pairs, and the arithmetic that several objectives share.

Torch is imported when a formula is called, never before: a recipe must load without it.

Shapes: P = pairs. Log-probs are fp32 sums over the answer's tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PairLogps", "log_ratios", "log_sigmoid", "margin", "per_token", "required", "smoothed_logistic", "wins"]


@dataclass(frozen=True)
class PairLogps:
    """Log-probs of both answers of P pairs under one model."""

    chosen_P: Tensor
    """fp32 sums over the chosen answers' tokens, (P,)."""
    rejected_P: Tensor
    chosen_tokens_P: Tensor
    """How many tokens each sum runs over, (P,)."""
    rejected_tokens_P: Tensor
    chosen_shared_P: Tensor | None = None
    """The sums over the first tokens only, as many as the pair's shorter answer has."""
    rejected_shared_P: Tensor | None = None
    agreement_P: Tensor | None = None
    """How likely the model would write this pair itself, in nats: log p - log of the sum of p^2 over the vocabulary,
    averaged over each answer's tokens, both answers added. Computed for objectives that need it; has no gradient."""

    def __len__(self) -> int:
        return len(self.chosen_P)

    def map(self, change: Callable[[Tensor], Tensor]) -> PairLogps:
        """Apply a function to every tensor: `logps.map(Tensor.detach)`."""

        def of(column: Tensor | None) -> Tensor | None:
            return None if column is None else change(column)

        return PairLogps(
            change(self.chosen_P),
            change(self.rejected_P),
            change(self.chosen_tokens_P),
            change(self.rejected_tokens_P),
            of(self.chosen_shared_P),
            of(self.rejected_shared_P),
            of(self.agreement_P),
        )

    @staticmethod
    def cat(parts: Sequence[PairLogps]) -> PairLogps:
        """The pairs of all `parts`, in order."""
        import torch

        def joined(columns: list[Tensor | None]) -> Tensor | None:
            known = [column for column in columns if column is not None]
            return torch.cat(known) if len(known) == len(columns) else None

        return PairLogps(
            torch.cat([part.chosen_P for part in parts]),
            torch.cat([part.rejected_P for part in parts]),
            torch.cat([part.chosen_tokens_P for part in parts]),
            torch.cat([part.rejected_tokens_P for part in parts]),
            joined([part.chosen_shared_P for part in parts]),
            joined([part.rejected_shared_P for part in parts]),
            joined([part.agreement_P for part in parts]),
        )


def required(reference: PairLogps | None) -> PairLogps:
    """The reference of an objective that reads one.

    Raises:
        ValueError: there is none.
    """
    if reference is None:
        raise ValueError("this objective compares the policy with a reference, but its log-probs are None")
    return reference


def log_ratios(policy: PairLogps, reference: PairLogps | None) -> tuple[Tensor, Tensor]:
    """How much likelier than its reference the policy finds the chosen and the rejected answers, in nats, (P,) each.

    Raises:
        ValueError: there is no reference.
    """
    reference = required(reference)
    return policy.chosen_P - reference.chosen_P, policy.rejected_P - reference.rejected_P


def margin(policy: PairLogps, reference: PairLogps | None) -> Tensor:
    """How much more than its reference the policy prefers the chosen answer, in nats, (P,)."""
    chosen_P, rejected_P = log_ratios(policy, reference)
    return chosen_P - rejected_P


def per_token(logps: PairLogps, chosen_P: Tensor, rejected_P: Tensor) -> tuple[Tensor, Tensor]:
    """Both columns divided by their answers' tokens; an answer without scored tokens counts one."""
    return chosen_P / logps.chosen_tokens_P.clamp(min=1), rejected_P / logps.rejected_tokens_P.clamp(min=1)


def wins(difference_P: Tensor) -> Tensor:
    """1 where the chosen side is ahead, one half for a tie, 0 otherwise, (P,) float64."""
    return (difference_P > 0).double() + 0.5 * (difference_P == 0).double()


def log_sigmoid(x_P: Tensor) -> Tensor:
    """log(1 / (1 + e^-x)), finite for any finite x."""
    from torch.nn.functional import logsigmoid

    return logsigmoid(x_P)


def smoothed_logistic(margin_P: Tensor, label_smoothing: float) -> Tensor:
    """The logistic loss with label smoothing: this share of the pairs is assumed to be swapped."""
    return -(1 - label_smoothing) * log_sigmoid(margin_P) - label_smoothing * log_sigmoid(-margin_P)
