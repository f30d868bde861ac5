"""What every objective is: a formula from log-probs to losses, and the properties that training reads.

Torch is imported when a formula is called, never before: a recipe must load without it.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Annotated, ClassVar, Self

from pydantic import ConfigDict, Field

from dpo_studio.objectives.logps import PairLogps, log_ratios

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Formula", "Positive", "Share"]

Positive = Annotated[float, Field(gt=0, strict=True)]
Share = Annotated[float, Field(ge=0, lt=0.5, strict=True)]


class Formula(ABC):
    """An objective: from the log-probs of P pairs to their losses, (P,), which training averages over the step's pairs.

    Each one is a frozen dataclass, which is also the recipe's `objective` section: its fields are the parameters, all
    with defaults. A property of this class is overridden by a field, a class variable or a property.
    """

    kind: str
    """Its name in a recipe."""
    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[object]]]
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    @property
    @abstractmethod
    def beta(self) -> float:
        """Reward units per nat: `scores` times this are the metrics' rewards."""

    @abstractmethod
    def __call__(self, policy: PairLogps, reference: PairLogps | None) -> Tensor:
        """Loss of each pair, (P,)."""

    def scores(self, policy: PairLogps, reference: PairLogps | None) -> tuple[Tensor, Tensor]:
        """Of the chosen and the rejected answers, (P,) each, in nats: beta times these are the metrics' rewards."""
        return log_ratios(policy, reference)

    @property
    def needs_reference(self) -> bool:
        """Whether the loss reads the reference; if not, none is computed for training pairs, and None is passed."""
        return True

    @property
    def whole_step(self) -> bool:
        """Whether a pair's loss depends on the step's other pairs."""
        return False

    @property
    def needs_agreement(self) -> bool:
        """Whether the loss reads `agreement_P`."""
        return False

    @property
    def saturates(self) -> bool:
        """Whether a pair's loss is flat once its reward margin in the metrics is wide, whatever widened it.

        From there on the margin only drifts. Not where the margin is of log-probs a token, is pulled to a target, or
        scores each answer by itself.
        """
        return False

    @property
    def log_odds(self) -> bool:
        """Whether beta times the margin is the log-odds that the chosen answer is the preferred one.

        The loss is then the log loss of sigmoid(beta x margin), and least where that is the share of people who prefer
        the chosen answer.
        """
        return False

    def with_running_mean(self, mean_log_ratio: float) -> Self:
        """The objective of the next step, after steps with a mean log-ratio of `mean_log_ratio`."""
        return self
