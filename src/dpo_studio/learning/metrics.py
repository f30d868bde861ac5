"""The numbers of a step, by the names that TRL's trainers log.

Shapes: P = pairs, C = columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dpo_studio.objectives import Formula, PairLogps, log_ratios, wins
from dpo_studio.ranks import Ranks
from dpo_studio.tokens.encode import EncodedPair

__all__ = ["StepMetrics"]

_ROWS_SHOWN = 64


@dataclass
class StepMetrics:
    """Collects a step's numbers on the device; they are transferred once, together."""

    objective: Formula
    columns: list[Tensor] = field(default_factory=list)
    pairs: list[int] = field(default_factory=list)

    def add(self, policy: PairLogps, reference: PairLogps | None, losses: Tensor, pairs: Sequence[int]) -> None:
        scores = self.objective.scores(policy, reference)
        rows = [losses, *scores, scores[0] - scores[1], policy.chosen_P, policy.rejected_P]
        rows += [policy.chosen_tokens_P.to(losses.dtype), policy.rejected_tokens_P.to(losses.dtype)]
        rows += log_ratios(policy, reference) if reference is not None else []
        self.columns.append(torch.stack(rows).detach())
        self.pairs += pairs

    def of_all(self, ranks: Ranks) -> StepMetrics:
        """The numbers of all ranks' pairs, on every rank."""
        if ranks.size == 1:
            return self
        mine_CP = torch.zeros(0, 0)
        if self.columns:
            columns_CP = torch.cat(self.columns, 1).double().cpu()
            mine_CP = torch.cat([columns_CP, torch.tensor([self.pairs], dtype=torch.float64)])
        all_CP = ranks.all_columns(mine_CP)
        return StepMetrics(self.objective, [all_CP[:-1]], [int(place) for place in all_CP[-1].tolist()])

    def means(self) -> tuple[dict[str, float], float]:
        """Means over the pairs, by TRL's names (a tied margin counts one half), and over all answers' log-ratios."""
        rows = torch.cat(self.columns, 1).double().cpu()
        loss, chosen, rejected, margins, chosen_logp, rejected_logp, chosen_tokens, rejected_tokens = rows[:8]
        ratios = rows[8:]  # none without a reference
        beta = self.objective.beta
        metrics = {
            "loss": loss.mean().item(),
            "rewards/chosen": beta * chosen.mean().item(),
            "rewards/rejected": beta * rejected.mean().item(),
            "rewards/margins": beta * margins.mean().item(),
            "rewards/accuracies": wins(margins).mean().item(),
            "logps/chosen": chosen_logp.mean().item(),
            "logps/rejected": rejected_logp.mean().item(),
            "tokens/chosen": chosen_tokens.mean().item(),
            "tokens/rejected": rejected_tokens.mean().item(),
        }
        if not len(ratios):
            return metrics, 0.0
        metrics |= {
            "log_ratios/chosen": ratios[0].mean().item(),
            "log_ratios/rejected": ratios[1].mean().item(),
            "log_ratios/size": ratios.abs().mean().item(),
        }
        return metrics, ratios.mean().item()

    def what_is_not_finite(self, pairs: Sequence[EncodedPair]) -> str:
        """Which pairs have a non-finite number, by source row; all of the step's where only the gradient has one."""
        finite_CP = torch.cat(self.columns, 1).isfinite()
        for fine_P in (finite_CP[1:].all(0), finite_CP[0]):  # AOT's losses are by rank, and name the wrong pairs
            odd = [pairs[place].row for place, fine in zip(self.pairs, fine_P.tolist(), strict=True) if not fine]
            if odd:
                return f"the loss of {_rows(odd)} is not finite"
        return f"the gradient of {_rows([pairs[place].row for place in self.pairs])} together is not finite"


def _rows(rows: Sequence[int]) -> str:
    """`row 7`, or `rows 7, 9, 12 and 30 more`."""
    shown = ", ".join(map(str, sorted(rows)[:_ROWS_SHOWN]))
    more = f" and {len(rows) - _ROWS_SHOWN} more" if len(rows) > _ROWS_SHOWN else ""
    return f"row{'s' * (len(rows) > 1)} {shown}{more}"
