"""Objectives of the margin alone: how much more than its reference the policy prefers the chosen answer.

Shapes: P = pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log, log1p
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from dpo_studio.objectives.formula import Formula, Positive, Share
from dpo_studio.objectives.logps import (
    PairLogps,
    log_ratios,
    log_sigmoid,
    margin,
    per_token,
    required,
    smoothed_logistic,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["DPO", "EXO", "FDPO", "IPO", "LDDPO", "WPO", "DPONorm", "DiscoPOP", "Hinge", "Robust"]

_LARGEST_EXPONENT = 80.0
"""e^80 is 5.5e34: fp32 can represent it, and a thousand times it. TRL stops there too."""


@dataclass(frozen=True)
class DPO(Formula):
    """The log-sigmoid of the reward margin (Rafailov et al. 2023, arXiv 2305.18290, Eq. 7)."""

    kind: Literal["dpo"] = "dpo"
    beta: Positive = 0.1
    """How strongly the policy is kept close to its reference: the larger, the closer."""
    label_smoothing: Share = 0.0
    """Share of pairs assumed mislabelled (conservative DPO, Mitchell 2023, Eq. 3 of the note)."""

    log_odds: ClassVar[bool] = True

    @property
    def saturates(self) -> bool:
        """True without label smoothing: with it, a wider margin raises the loss of the swapped share."""
        return self.label_smoothing == 0

    def __call__(self, policy: PairLogps, reference: PairLogps | None) -> Tensor:
        """Loss of each pair, (P,). Equal to ln 2 while policy and reference agree."""
        return smoothed_logistic(self.beta * margin(policy, reference), self.label_smoothing)


@dataclass(frozen=True)
class DPONorm(Formula):
    """DPO on log-ratios per token, so that a long answer weighs no more than a short one (Tülu 3, Lambert et al. 2024,
    arXiv 2411.15124; TRL's `sigmoid_norm`)."""

    kind: Literal["dpo_norm"] = "dpo_norm"
    beta: Positive = 5.0
    """As DPO's, for log-ratios about a hundred times smaller: Tülu 3 takes 5."""

    def __call__(self, policy: PairLogps, reference: PairLogps | None) -> Tensor:
        """Loss of each pair, (P,)."""
        return -log_sigmoid(self.beta * _margin_per_token(policy, reference))


@dataclass(frozen=True)
class IPO(Formula):
    """A squared loss that pulls the log-ratio to 1/(2 beta) (Azar et al. 2023, arXiv 2310.12036, Eq. 17).

    Log-ratios are averages per token, as the paper's own experiments (and TRL) have it; sums would tie the target to
    the answers' lengths.
    """

    kind: Literal["ipo"] = "ipo"
    beta: Positive = 0.1
    """The paper's tau."""

    def __call__(self, policy: PairLogps, reference: PairLogps | None) -> Tensor:
        """Loss of each pair, (P,)."""
        return (_margin_per_token(policy, reference) - 1 / (2 * self.beta)) ** 2


@dataclass(frozen=True)
class Hinge(Formula):
    """A margin of 1 is enough (SLiC-HF, Zhao et al. 2023, arXiv 2305.10425; on log-ratios: RSO, arXiv 2309.06657)."""

    kind: Literal["hinge"] = "hinge"
    beta: Positive = 0.1
    """Reward units per nat: the margin asked for is 1/beta nats."""
    saturates: ClassVar[bool] = True

    def __call__(self, policy: PairLogps, reference: PairLogps | None) -> Tensor:
        """Loss of each pair, (P,)."""
        return (1 - self.beta * margin(policy, reference)).relu()


@dataclass(frozen=True)
class Robust(Formula):
    """DPO whose average over mislabelled pairs is the loss of the right labels (Ray Chowdhury et al. 2024, arXiv
    2403.00409, section 3.1). Unlike conservative DPO it has no margin at which the loss is least."""

    kind: Literal["robust"] = "robust"
    beta: Positive = 0.1
    """As DPO's."""
    label_smoothing: Share = 0.1
    """Share of pairs known to be mislabelled; at 0 this is DPO."""

    log_odds: ClassVar[bool] = True

    @property
    def saturates(self) -> bool:
        """True where this is DPO; otherwise the loss falls without bound."""
        return self.label_smoothing == 0

    def __call__(self, policy: PairLogps, reference: PairLogps | None) -> Tensor:
        """Loss of each pair, (P,); below 0 where the margin is large."""
        reward_P, flipped = self.beta * margin(policy, reference), self.label_smoothing
        return (flipped * log_sigmoid(-reward_P) - (1 - flipped) * log_sigmoid(reward_P)) / (1 - 2 * flipped)


@dataclass(frozen=True)
class EXO(Formula):
    """The reverse KL from the policy's preference to the (smoothed) label (Ji et al. 2024, arXiv 2402.00856, Eq. 16).

    DPO's is the forward KL. This one has a minimum: the margin at which the policy's preference equals the label's.
    """

    kind: Literal["exo"] = "exo"
    beta: Positive = 0.1
    """The paper's beta_pi."""
    label_smoothing: Annotated[float, Field(gt=0, lt=0.5, strict=True)] = 1e-3
    """Probability the label gives to the rejected answer. At 0 the divergence would be infinite."""
    saturates: ClassVar[bool] = True

    def __call__(self, policy: PairLogps, reference: PairLogps | None) -> Tensor:
        """Loss of each pair, (P,): KL(q || p) with q = sigmoid(reward margin) and p = 1 - label_smoothing."""
        reward_P = self.beta * margin(policy, reference)
        for_chosen_P = reward_P.sigmoid() * (log_sigmoid(reward_P) - log1p(-self.label_smoothing))
        for_rejected_P = (-reward_P).sigmoid() * (log_sigmoid(-reward_P) - log(self.label_smoothing))
        return for_chosen_P + for_rejected_P


@dataclass(frozen=True)
class DiscoPOP(Formula):
    """The logistic loss where the margin is negative, the exponential one where it is positive, blended around 0 (found
    by a language model: Lu et al. 2024, arXiv 2406.08414, Eq. 5)."""

    kind: Literal["discopop"] = "discopop"
    beta: Positive = 0.05
    """As DPO's."""
    tau: Annotated[float, Field(gt=0, le=1, strict=True)] = 0.05
    """Width of the blend, in reward units. Beyond 1 the exponential would grow where the policy is wrong."""
    saturates: ClassVar[bool] = True

    def __call__(self, policy: PairLogps, reference: PairLogps | None) -> Tensor:
        """Loss of each pair, (P,)."""
        reward_P = self.beta * margin(policy, reference)
        logistic_P = -log_sigmoid(reward_P) * (-reward_P / self.tau).sigmoid()
        exponential_P = (log_sigmoid(reward_P / self.tau) - reward_P).exp()  # one exponent: e^1000 x 0 is not a number
        return logistic_P + exponential_P


@dataclass(frozen=True)
class FDPO(Formula):
    """DPO with another divergence from the reference (Wang et al. 2023, arXiv 2309.16240).

    The reward is f'(policy / reference), where DPO's (reverse KL) is the logarithm of that ratio.
    """

    kind: Literal["f_dpo"] = "f_dpo"
    beta: Positive = 0.1
    """As DPO's."""
    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "js"
    """How distance from the reference is measured."""
    alpha: Annotated[float, Field(ge=0, le=1, strict=True)] = 0.5
    """Of `divergence: alpha`: 0 is the forward KL, 1 the reverse."""

    @property
    def saturates(self) -> bool:
        """True where this is DPO; the rewards of other divergences are not beta times the log-ratio."""
        return self.divergence == "reverse_kl"

    @property
    def log_odds(self) -> bool:
        """As above."""
        return self.divergence == "reverse_kl"

    def __call__(self, policy: PairLogps, reference: PairLogps | None) -> Tensor:
        """Loss of each pair, (P,)."""
        chosen_P, rejected_P = map(self._slope_of_f, log_ratios(policy, reference))
        return -log_sigmoid(self.beta * (chosen_P - rejected_P))

    def _slope_of_f(self, ratio_P: Tensor) -> Tensor:
        """f'(t) at t = e^ratio; for js less its log 2, which cancels between the answers."""
        if self.divergence == "js":
            return log_sigmoid(ratio_P)
        power = {"reverse_kl": 1.0, "forward_kl": 0.0, "alpha": self.alpha}[self.divergence] - 1
        if abs(power) < 1e-6:
            return ratio_P
        return (power * ratio_P).clamp(max=_LARGEST_EXPONENT).expm1() / power


@dataclass(frozen=True)
class LDDPO(Formula):
    """DPO in which tokens beyond the shorter answer's length count less (Liu et al. 2024, arXiv 2409.06411)."""

    kind: Literal["ld_dpo"] = "ld_dpo"
    beta: Positive = 0.1
    """As DPO's."""
    alpha: Annotated[float, Field(ge=0, le=1, strict=True)] = 0.5
    """Weight of those tokens: 1 is DPO, 0 ignores them. TRL's `ld_alpha`."""
    saturates: ClassVar[bool] = True

    def __call__(self, policy: PairLogps, reference: PairLogps | None) -> Tensor:
        """Loss of each pair, (P,)."""
        chosen_P, rejected_P = self.scores(policy, reference)
        return -log_sigmoid(self.beta * (chosen_P - rejected_P))

    def scores(self, policy: PairLogps, reference: PairLogps | None) -> tuple[Tensor, Tensor]:
        """Log-ratios in which the longer answer's further tokens count `alpha`, (P,) each."""
        return log_ratios(self._desensitised(policy), self._desensitised(required(reference)))

    def _desensitised(self, logps: PairLogps) -> PairLogps:
        assert logps.chosen_shared_P is not None
        assert logps.rejected_shared_P is not None
        chosen_P = logps.chosen_shared_P + self.alpha * (logps.chosen_P - logps.chosen_shared_P)
        rejected_P = logps.rejected_shared_P + self.alpha * (logps.rejected_P - logps.rejected_shared_P)
        return PairLogps(chosen_P, rejected_P, logps.chosen_tokens_P, logps.rejected_tokens_P)


@dataclass(frozen=True)
class WPO(Formula):
    """DPO weighted by how likely the policy would write the pair itself (Zhou et al. 2024, arXiv 2406.11827,
    Eq. 2, the weights normalised by those of tokens sampled from the policy)."""

    kind: Literal["wpo"] = "wpo"
    beta: Positive = 0.1
    """As DPO's."""
    needs_agreement: ClassVar[bool] = True
    saturates: ClassVar[bool] = True
    log_odds: ClassVar[bool] = True

    def __call__(self, policy: PairLogps, reference: PairLogps | None) -> Tensor:
        """Loss of each pair, (P,). The weight is 1 where every token is as likely as a sampled one is on average."""
        assert policy.agreement_P is not None
        return -log_sigmoid(self.beta * margin(policy, reference)) * policy.agreement_P.exp()


def _margin_per_token(policy: PairLogps, reference: PairLogps | None) -> Tensor:
    chosen_P, rejected_P = per_token(policy, *log_ratios(policy, reference))
    return chosen_P - rejected_P
