"""Log-probs of a step's pairs, and what every objective is besides its own formula.

Torch is imported when a formula is called, never before: a recipe must load without it.

Shapes: P = pairs. Log-probs are fp32 sums over the answer's tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import ConfigDict, Field

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Formula", "PairLogps", "Positive", "Share", "log_ratios", "log_sigmoid", "margin", "per_token", "wins"]

Positive = Annotated[float, Field(gt=0, strict=True)]
Share = Annotated[float, Field(ge=0, lt=0.5, strict=True)]


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
    """The sums again, over no more tokens than the pair's shorter answer has."""
    rejected_shared_P: Tensor | None = None
    agreement_P: Tensor | None = None
    """How far the pair is the model's own text, in nats: log p - log of the sum of p^2 over the vocabulary, averaged
    over each answer's tokens, both answers added. Computed for objectives that ask; carries no gradient."""

    def __len__(self) -> int:
        return len(self.chosen_P)

    def map(self, change: Callable[[Tensor], Tensor]) -> PairLogps:
        """Every tensor changed alike: `logps.map(Tensor.detach)`."""
        columns = (getattr(self, field.name) for field in fields(self))
        changed: list[Any] = [None if column is None else change(column) for column in columns]
        return PairLogps(*changed)

    @staticmethod
    def cat(parts: Sequence[PairLogps]) -> PairLogps:
        """The pairs of all `parts`, in order."""
        import torch

        columns = ([getattr(part, field.name) for part in parts] for field in fields(PairLogps))
        joined: list[Any] = [None if column[0] is None else torch.cat(column) for column in columns]
        return PairLogps(*joined)


class Formula:
    """What an objective may say of itself. Each is a frozen dataclass, also the recipe's section, and callable:
    (policy, reference) -> the loss of each pair, (P,), averaged over the step's pairs."""

    needs_reference: ClassVar[bool] = True
    """Whether the loss reads the reference; where not, none is computed for training pairs and None is given."""
    whole_step: ClassVar[bool] = False
    """Whether a pair's loss depends on the step's other pairs."""
    needs_agreement: ClassVar[bool] = False
    """Whether the loss reads `agreement_P`."""
    saturates: ClassVar[bool] = False
    """Whether a pair's loss is flat once its reward margin in the metrics is wide, however that came about: from there
    on it only drifts. Not where the margin is of log-probs a token, is pulled to a target, or counts each answer by
    itself."""
    log_odds: ClassVar[bool] = False
    """Whether beta times the margin is the log-odds that the chosen answer is the preferred one: the loss is the log
    loss of sigmoid(beta x margin), and least where that is the share of people who prefer it."""
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    def scores(self, policy: PairLogps, reference: PairLogps) -> tuple[Tensor, Tensor]:
        """Of the chosen and the rejected answers, (P,) each, in nats: beta times these are the metrics' rewards."""
        return log_ratios(policy, reference)

    def given(self, mean_log_ratio: float) -> Self:
        """The objective of the next step, after steps whose log-ratios were `mean_log_ratio` on average."""
        return self


def log_ratios(policy: PairLogps, reference: PairLogps) -> tuple[Tensor, Tensor]:
    """How much likelier than its reference the policy finds the chosen and the rejected answers, in nats, (P,) each."""
    return policy.chosen_P - reference.chosen_P, policy.rejected_P - reference.rejected_P


def margin(policy: PairLogps, reference: PairLogps) -> Tensor:
    """How much more than its reference the policy prefers the chosen answer, in nats, (P,)."""
    chosen_P, rejected_P = log_ratios(policy, reference)
    return chosen_P - rejected_P


def per_token(logps: PairLogps, chosen_P: Tensor, rejected_P: Tensor) -> tuple[Tensor, Tensor]:
    """Both columns divided by their answers' tokens; an answer of which nothing is scored counts one."""
    return chosen_P / logps.chosen_tokens_P.clamp(min=1), rejected_P / logps.rejected_tokens_P.clamp(min=1)


def wins(difference_P: Tensor) -> Tensor:
    """1 where the chosen side is ahead, one half for a tie, 0 otherwise, (P,) float64."""
    return (difference_P > 0).double() + 0.5 * (difference_P == 0).double()


def log_sigmoid(x_P: Tensor) -> Tensor:
    """log(1 / (1 + e^-x)), finite for any finite x."""
    from torch.nn.functional import logsigmoid

    return logsigmoid(x_P)


def smoothed_logistic(margin_P: Tensor, label_smoothing: float) -> Tensor:
    """The logistic loss where this share of the pairs is taken to be the other way round."""
    return -(1 - label_smoothing) * log_sigmoid(margin_P) - label_smoothing * log_sigmoid(-margin_P)
