"""Several objectives at once.

Shapes: P = pairs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Discriminator, Tag

from dpo_studio.objectives.alone import ORPO, SFT, SimPO
from dpo_studio.objectives.answers import BCO, NCA, SPPO, APODown, APOZero
from dpo_studio.objectives.logps import Formula, PairLogps, Positive
from dpo_studio.objectives.margins import DPO, EXO, FDPO, IPO, LDDPO, WPO, DiscoPOP, DPONorm, Hinge, Robust
from dpo_studio.objectives.ranks import AOT, AOTUnpaired

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Mixture", "Objective"]


def _kind(section: object) -> str:
    """Which objective a recipe's section means: plain DPO unless it says."""
    if isinstance(section, dict):
        return str(section.get("kind", "dpo"))
    return str(getattr(section, "kind", type(section).__name__))


_Term = (
    Annotated[DPO, Tag("dpo")]
    | Annotated[IPO, Tag("ipo")]
    | Annotated[Hinge, Tag("hinge")]
    | Annotated[EXO, Tag("exo")]
    | Annotated[NCA, Tag("nca")]
    | Annotated[Robust, Tag("robust")]
    | Annotated[BCO, Tag("bco")]
    | Annotated[SPPO, Tag("sppo")]
    | Annotated[AOT, Tag("aot")]
    | Annotated[AOTUnpaired, Tag("aot_unpaired")]
    | Annotated[APOZero, Tag("apo_zero")]
    | Annotated[APODown, Tag("apo_down")]
    | Annotated[DiscoPOP, Tag("discopop")]
    | Annotated[SFT, Tag("sft")]
    | Annotated[DPONorm, Tag("dpo_norm")]
    | Annotated[LDDPO, Tag("ld_dpo")]
    | Annotated[WPO, Tag("wpo")]
    | Annotated[FDPO, Tag("f_dpo")]
    | Annotated[SimPO, Tag("simpo")]
    | Annotated[ORPO, Tag("orpo")]
)


@dataclass(frozen=True)
class Mixture(Formula):
    """A weighted sum of objectives. As it stands: MPO (Wang et al. 2024, arXiv 2411.10442), which adds to DPO what each
    answer is worth by itself and the likelihood of the chosen one.

    Rewards in the metrics are those of the first term.
    """

    kind: Literal["mixture"] = "mixture"
    terms: tuple[Annotated[_Term, Discriminator(_kind)], ...] = (DPO(), BCO(), SFT())
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
    def needs_reference(self) -> bool:  # type: ignore[override]
        """If any term does."""
        return any(term.needs_reference for term in self.terms)

    @property
    def whole_step(self) -> bool:  # type: ignore[override]
        """If any term does."""
        return any(term.whole_step for term in self.terms)

    @property
    def needs_agreement(self) -> bool:  # type: ignore[override]
        """If any term does."""
        return any(term.needs_agreement for term in self.terms)

    @property
    def saturates(self) -> bool:  # type: ignore[override]
        """If the first term does, whose the rewards are."""
        return self.terms[0].saturates

    @property
    def log_odds(self) -> bool:  # type: ignore[override]
        """As the first term's."""
        return self.terms[0].log_odds

    def __call__(self, policy: PairLogps, reference: PairLogps | None) -> Tensor:
        """Loss of each pair, (P,)."""
        known: Any = reference  # None only where no term reads it
        first, *others = (weight * term(policy, known) for term, weight in zip(self.terms, self.weights, strict=True))
        return sum(others, first)

    def scores(self, policy: PairLogps, reference: PairLogps) -> tuple[Tensor, Tensor]:
        """The first term's."""
        return self.terms[0].scores(policy, reference)

    def given(self, mean_log_ratio: float) -> Self:
        """Every term as it is after those steps."""
        return replace(self, terms=tuple(term.given(mean_log_ratio) for term in self.terms))


Objective = Annotated[_Term | Annotated[Mixture, Tag("mixture")], Discriminator(_kind)]
"""A recipe's `objective` section."""
