"""Objectives with a term for each answer by itself, not only for the margin between the two.

Shapes: P = pairs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field

from dpo_studio.objectives.formula import Formula, Positive
from dpo_studio.objectives.logps import PairLogps, log_ratios, log_sigmoid, margin

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["BCO", "NCA", "SPPO", "APODown", "APOZero"]


@dataclass(frozen=True)
class NCA(Formula):
    """Noise contrastive: the chosen answer is classified against noise, and neither answer drifts (Chen et al. 2024,
    arXiv 2402.05369, section 4.1). Unlike DPO it keeps the chosen answer's likelihood from falling."""

    kind: Literal["nca"] = "nca"
    beta: Positive = 0.01
    """The paper's alpha."""

    def __call__(self, policy: PairLogps, reference: PairLogps | None) -> Tensor:
        """Loss of each pair, (P,)."""
        chosen_P, rejected_P = _rewards(self.beta, policy, reference)
        return -log_sigmoid(chosen_P) - 0.5 * log_sigmoid(-chosen_P) - 0.5 * log_sigmoid(-rejected_P)


@dataclass(frozen=True)
class BCO(Formula):
    """A binary classifier: the chosen answer's reward is over a threshold, the rejected one's under it (Jung et al.
    2024, arXiv 2404.04656, section 4).

    The threshold is the mean reward so far, a running average over the steps before this one. TRL 1.16's `bco_pair` has
    none: `shift: 0`.
    """

    kind: Literal["bco"] = "bco"
    beta: Positive = 0.1
    """As DPO's."""
    shift: Annotated[float, Field(strict=True)] | Literal["running"] = "running"
    """The threshold, in reward units, or `running`: the mean reward of the steps before."""

    def __call__(self, policy: PairLogps, reference: PairLogps | None) -> Tensor:
        """Loss of each pair, (P,). Before any step the running mean is 0."""
        shift = 0.0 if self.shift == "running" else self.shift
        chosen_P, rejected_P = _rewards(self.beta, policy, reference)
        return -log_sigmoid(chosen_P - shift) - log_sigmoid(shift - rejected_P)

    def with_running_mean(self, mean_log_ratio: float) -> Self:
        """With the running mean as a number."""
        return replace(self, shift=self.beta * mean_log_ratio) if self.shift == "running" else self


@dataclass(frozen=True)
class SPPO(Formula):
    """Squared distances: the chosen answer half a 1/beta up, the rejected one as much down (Wu et al. 2024, arXiv
    2405.00675, Eq. 4.7, with probabilities 1 and 0 for winner and loser)."""

    kind: Literal["sppo"] = "sppo"
    beta: Positive = 0.1
    """One over the paper's eta."""

    def __call__(self, policy: PairLogps, reference: PairLogps | None) -> Tensor:
        """Loss of each pair, (P,)."""
        chosen_P, rejected_P = log_ratios(policy, reference)
        return (chosen_P - 0.5 / self.beta) ** 2 + (rejected_P + 0.5 / self.beta) ** 2


@dataclass(frozen=True)
class APOZero(Formula):
    """The chosen answer likelier, the rejected one less (D'Oosterlinck et al. 2024, arXiv 2408.06266, Eq. 7): for
    chosen answers better than what the model writes."""

    kind: Literal["apo_zero"] = "apo_zero"
    beta: Positive = 0.1
    """As DPO's."""

    def __call__(self, policy: PairLogps, reference: PairLogps | None) -> Tensor:
        """Loss of each pair, (P,), between 0 and 2."""
        chosen_P, rejected_P = _rewards(self.beta, policy, reference)
        return (-chosen_P).sigmoid() + rejected_P.sigmoid()


@dataclass(frozen=True)
class APODown(Formula):
    """Both answers less likely, the rejected one more so (D'Oosterlinck et al. 2024, arXiv 2408.06266, Eq. 8): for
    chosen answers worse than what the model writes."""

    kind: Literal["apo_down"] = "apo_down"
    beta: Positive = 0.1
    """As DPO's."""

    def __call__(self, policy: PairLogps, reference: PairLogps | None) -> Tensor:
        """Loss of each pair, (P,), between 0 and 2."""
        chosen_P, _ = _rewards(self.beta, policy, reference)
        return chosen_P.sigmoid() + (-self.beta * margin(policy, reference)).sigmoid()


def _rewards(beta: float, policy: PairLogps, reference: PairLogps | None) -> tuple[Tensor, Tensor]:
    chosen_P, rejected_P = log_ratios(policy, reference)
    return beta * chosen_P, beta * rejected_P
