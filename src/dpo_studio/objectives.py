"""Objectives: pure functions from the log-probs of a step's pairs to the loss of each pair.

Each is a small frozen dataclass, and that dataclass is also the recipe's `objective` section: the setting and the
formula are the same thing. Torch is imported when a formula is called, never before: a recipe must load without it.

Shapes: P = pairs. Log-probs are fp32 sums over the answer's tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["AOT", "DPO", "IPO", "Hinge", "Objective", "PairLogps"]

_SECTION = ConfigDict(extra="forbid", use_attribute_docstrings=True)
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

    def __len__(self) -> int:
        return len(self.chosen_P)

    def map(self, change: Callable[[Tensor], Tensor]) -> PairLogps:
        """Every tensor changed alike: `logps.map(Tensor.detach)`."""
        return PairLogps(*(change(getattr(self, field.name)) for field in fields(self)))

    @staticmethod
    def cat(parts: Sequence[PairLogps]) -> PairLogps:
        """The pairs of all `parts`, in order."""
        import torch

        columns = ([getattr(part, field.name) for part in parts] for field in fields(PairLogps))
        return PairLogps(*(torch.cat(column) for column in columns))


@dataclass(frozen=True)
class DPO:
    """The log-sigmoid of the reward margin (Rafailov et al. 2023, arXiv 2305.18290, Eq. 7)."""

    kind: Literal["dpo"] = "dpo"
    beta: Positive = 0.1
    """How dearly the policy pays for leaving its reference."""
    label_smoothing: Share = 0.0
    """Share of pairs assumed mislabelled (conservative DPO, Mitchell 2023, Eq. 3 of the note)."""
    needs_reference: ClassVar[bool] = True
    whole_step: ClassVar[bool] = False
    __pydantic_config__: ClassVar[ConfigDict] = _SECTION

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """Loss of each pair, (P,). Equal to ln 2 while policy and reference agree."""
        return _smoothed_logistic(self.beta * margin(policy, reference), self.label_smoothing)


@dataclass(frozen=True)
class IPO:
    """A squared loss that pulls the log-ratio to 1/(2 beta) (Azar et al. 2023, arXiv 2310.12036, Eq. 17).

    Log-ratios are averages per token, as the paper's own experiments (and TRL) have it; sums would tie the target to
    the answers' lengths.
    """

    kind: Literal["ipo"] = "ipo"
    beta: Positive = 0.1
    """The paper's tau."""
    needs_reference: ClassVar[bool] = True
    whole_step: ClassVar[bool] = False
    __pydantic_config__: ClassVar[ConfigDict] = _SECTION

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """Loss of each pair, (P,)."""
        chosen_P = (policy.chosen_P - reference.chosen_P) / policy.chosen_tokens_P.clamp(min=1)
        rejected_P = (policy.rejected_P - reference.rejected_P) / policy.rejected_tokens_P.clamp(min=1)
        return (chosen_P - rejected_P - 1 / (2 * self.beta)) ** 2


@dataclass(frozen=True)
class Hinge:
    """A margin of 1 is enough (SLiC-HF, Zhao et al. 2023, arXiv 2305.10425; on log-ratios: RSO, arXiv 2309.06657)."""

    kind: Literal["hinge"] = "hinge"
    beta: Positive = 0.1
    """Reward units per nat: the margin asked for is 1/beta nats."""
    needs_reference: ClassVar[bool] = True
    whole_step: ClassVar[bool] = False
    __pydantic_config__: ClassVar[ConfigDict] = _SECTION

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """Loss of each pair, (P,)."""
        return (1 - self.beta * margin(policy, reference)).relu()


@dataclass(frozen=True)
class AOT:
    """Align the whole distribution of log-ratios, not each pair (Melnyk et al. 2024, arXiv 2406.05882, Alg. 1, paired).

    The policy's and the reference's chosen-minus-rejected log-probs are sorted, each on its own, across all pairs of
    the step, and compared rank by rank.
    """

    kind: Literal["aot"] = "aot"
    beta: Positive = 0.1
    """How dearly the policy pays for leaving its reference."""
    label_smoothing: Share = 0.0
    """Share of pairs assumed mislabelled."""
    needs_reference: ClassVar[bool] = True
    whole_step: ClassVar[bool] = True
    __pydantic_config__: ClassVar[ConfigDict] = _SECTION

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """Loss of each rank, (P,)."""
        policy_P = (policy.chosen_P - policy.rejected_P).sort().values
        reference_P = (reference.chosen_P - reference.rejected_P).sort().values
        return _smoothed_logistic(self.beta * (policy_P - reference_P), self.label_smoothing)


def _kind(section: object) -> str:
    """Which objective a recipe's section means: plain DPO unless it says."""
    if isinstance(section, dict):
        return str(section.get("kind", "dpo"))
    return str(getattr(section, "kind", type(section).__name__))


Objective = Annotated[
    Annotated[DPO, Tag("dpo")]
    | Annotated[IPO, Tag("ipo")]
    | Annotated[Hinge, Tag("hinge")]
    | Annotated[AOT, Tag("aot")],
    Discriminator(_kind),
]


def margin(policy: PairLogps, reference: PairLogps) -> Tensor:
    """How much more than its reference the policy prefers the chosen answer, in nats, (P,)."""
    return (policy.chosen_P - reference.chosen_P) - (policy.rejected_P - reference.rejected_P)


def wins(difference_P: Tensor) -> Tensor:
    """1 where the chosen side is ahead, one half for a tie, 0 otherwise, (P,) float64."""
    return (difference_P > 0).double() + 0.5 * (difference_P == 0).double()


def _smoothed_logistic(margin_P: Tensor, label_smoothing: float) -> Tensor:
    from torch.nn.functional import logsigmoid

    return -(1 - label_smoothing) * logsigmoid(margin_P) - label_smoothing * logsigmoid(-margin_P)
