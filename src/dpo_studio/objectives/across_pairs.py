"""Objectives that compare distributions across all pairs of the step: sorted, then rank by rank.

Shapes: P = pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from dpo_studio.objectives.formula import Formula, Positive, Share
from dpo_studio.objectives.logps import PairLogps, log_ratios, required, smoothed_logistic

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["AOT", "AOTUnpaired"]


@dataclass(frozen=True)
class AOT(Formula):
    """Align the whole distribution of log-ratios, not each pair (Melnyk et al. 2024, arXiv 2406.05882, Alg. 1, paired).

    The policy's and the reference's chosen-minus-rejected log-probs are sorted, each on its own, across all pairs of
    the step, and compared rank by rank.
    """

    kind: Literal["aot"] = "aot"
    beta: Positive = 0.1
    """How strongly the policy is kept close to its reference: the larger, the closer."""
    label_smoothing: Share = 0.0
    """Share of pairs assumed mislabelled."""
    whole_step: ClassVar[bool] = True

    @property
    def saturates(self) -> bool:
        """True without label smoothing: with it, a wider margin raises the loss of the swapped share."""
        return self.label_smoothing == 0

    def __call__(self, policy: PairLogps, reference: PairLogps | None) -> Tensor:
        """Loss of each rank, (P,)."""
        policy_P = (policy.chosen_P - policy.rejected_P).sort().values
        reference = required(reference)
        reference_P = (reference.chosen_P - reference.rejected_P).sort().values
        return smoothed_logistic(self.beta * (policy_P - reference_P), self.label_smoothing)


@dataclass(frozen=True)
class AOTUnpaired(Formula):
    """AOT that need not know which rejected answer belongs to which chosen one (arXiv 2406.05882, section 3).

    The log-ratios of all chosen answers of the step are sorted, those of all rejected ones too, and compared.
    """

    kind: Literal["aot_unpaired"] = "aot_unpaired"
    beta: Positive = 0.1
    """How strongly the policy is kept close to its reference: the larger, the closer."""
    label_smoothing: Share = 0.0
    """Share of pairs assumed mislabelled."""
    whole_step: ClassVar[bool] = True

    @property
    def saturates(self) -> bool:
        """True without label smoothing: with it, a wider margin raises the loss of the swapped share."""
        return self.label_smoothing == 0

    def __call__(self, policy: PairLogps, reference: PairLogps | None) -> Tensor:
        """Loss of each rank, (P,)."""
        chosen_P, rejected_P = (ratios_P.sort().values for ratios_P in log_ratios(policy, reference))
        return smoothed_logistic(self.beta * (chosen_P - rejected_P), self.label_smoothing)
