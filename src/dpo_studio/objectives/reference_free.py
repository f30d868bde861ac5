"""Objectives without a reference: what keeps the policy in place is the likelihood of the answers itself.

Their rewards, for the metrics, are beta times the log-prob a token, as TRL's CPO and ORPO trainers log them.

Shapes: P = pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from dpo_studio.objectives.formula import Formula, Positive
from dpo_studio.objectives.logps import PairLogps, log_sigmoid, per_token

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ORPO", "SFT", "SimPO"]


class _Alone(Formula):
    needs_reference: ClassVar[bool] = False

    def scores(self, policy: PairLogps, reference: PairLogps | None = None) -> tuple[Tensor, Tensor]:
        """Log-probs a token, (P,) each."""
        return per_token(policy, policy.chosen_P, policy.rejected_P)


@dataclass(frozen=True)
class SFT(_Alone):
    """The chosen answer made likelier, the rejected one not looked at: a term for mixtures that keeps the chosen
    answer's likelihood from falling (RPO, Pang et al. 2024, arXiv 2404.19733; MPO, arXiv 2411.10442)."""

    kind: Literal["sft"] = "sft"
    average: Literal["answer", "token"] = "answer"
    """Every answer counts the same, or every token of the step does (TRL's `sft`; takes two forward passes)."""
    beta: ClassVar[float] = 1.0

    @property
    def whole_step(self) -> bool:
        """How many tokens a token shares its weight with, only the step knows."""
        return self.average == "token"

    def __call__(self, policy: PairLogps, reference: PairLogps | None = None) -> Tensor:
        """Loss of each pair, (P,), in nats a token."""
        if self.average == "token":
            return -policy.chosen_P * len(policy) / policy.chosen_tokens_P.sum().clamp(min=1)
        return -self.scores(policy)[0]


@dataclass(frozen=True)
class SimPO(_Alone):
    """The log-sigmoid of the difference in log-prob a token, less a margin to reach (Meng et al. 2024, arXiv
    2405.14734)."""

    kind: Literal["simpo"] = "simpo"
    beta: Positive = 2.0
    """Reward units per nat a token; the paper takes 2 to 2.5, far more than DPO's."""
    gamma: Annotated[float, Field(ge=0, strict=True)] = 0.5
    """The reward margin asked for; a good one is about half of beta. TRL's `simpo_gamma`."""
    saturates: ClassVar[bool] = True

    def __call__(self, policy: PairLogps, reference: PairLogps | None = None) -> Tensor:
        """Loss of each pair, (P,)."""
        chosen_P, rejected_P = self.scores(policy)
        return -log_sigmoid(self.beta * (chosen_P - rejected_P) - self.gamma)


@dataclass(frozen=True)
class ORPO(_Alone):
    """Fine-tuning on the chosen answer, and the log-sigmoid of the log odds ratio of the two (Hong et al. 2024, arXiv
    2403.07691, Eqs. 4 and 7). The likelihood is of the answer's tokens; TRL's takes the prompt's with them."""

    kind: Literal["orpo"] = "orpo"
    beta: Positive = 0.1
    """Weight of the odds ratio beside the likelihood, the paper's lambda."""

    def __call__(self, policy: PairLogps, reference: PairLogps | None = None) -> Tensor:
        """Loss of each pair, (P,). Odds are p / (1 - p), p the geometric mean of the tokens' probabilities."""
        chosen_P, rejected_P = self.scores(policy)
        return -chosen_P - self.beta * log_sigmoid(_log_odds(chosen_P) - _log_odds(rejected_P))


def _log_odds(logp_P: Tensor) -> Tensor:
    logp_P = logp_P.clamp(max=-1e-6)  # the odds of what is certain are infinite
    return logp_P - (-logp_P.expm1()).log()
