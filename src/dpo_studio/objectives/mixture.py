"""Several objectives at once.

Shapes: P = pairs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal, Self

from dpo_studio.objectives.formula import Formula, Positive
from dpo_studio.objectives.logps import PairLogps
from dpo_studio.objectives.margins import DPO
from dpo_studio.objectives.per_answer import BCO
from dpo_studio.objectives.reference_free import SFT
from dpo_studio.objectives.selection import ByKind

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Mixture"]


@dataclass(frozen=True)
class Mixture(Formula):
    """A weighted sum of objectives. As it stands: MPO (Wang et al. 2024, arXiv 2411.10442), which adds to DPO what each
    answer is worth by itself and the likelihood of the chosen one.

    Rewards in the metrics are those of the first term.
    """

    kind: Literal["mixture"] = "mixture"
    terms: tuple[Annotated[Formula, ByKind(without="mixture")], ...] = (DPO(), BCO(), SFT())
    """The objectives, each with its own parameters."""
    weights: tuple[Positive, ...] = (0.8, 0.2, 1.0)
    """What each counts, in the same order. TRL's `loss_weights`."""

    def __post_init__(self) -> None:
        if not len(self.terms) == len(self.weights) > 0:
            raise ValueError(
                f"a mixture of {len(self.terms)} terms with {len(self.weights)} weights: every term has one"
            )

    @property
    def beta(self) -> float:
        """The first term's: of the rewards in the metrics."""
        return self.terms[0].beta

    @property
    def needs_reference(self) -> bool:
        """If any term does."""
        return any(term.needs_reference for term in self.terms)

    @property
    def whole_step(self) -> bool:
        """If any term does."""
        return any(term.whole_step for term in self.terms)

    @property
    def needs_agreement(self) -> bool:
        """If any term does."""
        return any(term.needs_agreement for term in self.terms)

    @property
    def saturates(self) -> bool:
        """If the first term does, whose the rewards are."""
        return self.terms[0].saturates

    @property
    def log_odds(self) -> bool:
        """As the first term's."""
        return self.terms[0].log_odds

    def __call__(self, policy: PairLogps, reference: PairLogps | None) -> Tensor:
        """Loss of each pair, (P,)."""
        first, *others = (w * term(policy, reference) for term, w in zip(self.terms, self.weights, strict=True))
        return sum(others, first)

    def scores(self, policy: PairLogps, reference: PairLogps | None) -> tuple[Tensor, Tensor]:
        """The first term's."""
        return self.terms[0].scores(policy, reference)

    def with_running_mean(self, mean_log_ratio: float) -> Self:
        """Every term as it is after those steps."""
        return replace(self, terms=tuple(term.with_running_mean(mean_log_ratio) for term in self.terms))
