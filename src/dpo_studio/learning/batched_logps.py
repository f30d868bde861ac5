"""Log-probs of many pairs without a gradient, in rows as large as memory allows.

Shapes: P = pairs, C = columns.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from dpo_studio.learning.logprobs import pair_logps
from dpo_studio.learning.memory import (
    CPU_TOKEN_BUDGET,
    tokens_without_gradient,
    too_long_for_memory,
    unless_out_of_memory,
)
from dpo_studio.models.layouts import layout_of
from dpo_studio.objectives import PairLogps
from dpo_studio.tokens.encode import EncodedPair
from dpo_studio.tokens.pack import micro_batches

__all__ = ["COLUMNS", "batched_logps", "from_columns"]

COLUMNS = ("chosen_P", "rejected_P", "chosen_shared_P", "rejected_shared_P")
"""The log-probs of a pair: what a loss is computed from, and what is stored. Token counts follow from its ids."""


@torch.no_grad()
def batched_logps(
    model: nn.Module,
    pairs: Sequence[EncodedPair],
    *,
    token_budget: int | None = None,
    agreement: bool = False,
    progress: Callable[[int], None] = lambda pairs: None,
) -> PairLogps:
    """Log-probs of `pairs` under `model` as it is, in order, on the CPU; `progress` receives how many more are done.

    `token_budget`: tokens of a row, by default enough to keep the device busy.

    Raises:
        RunError: a single pair does not fit in memory.
    """
    token_budget = token_budget or tokens_without_gradient(CPU_TOKEN_BUDGET, model)
    device = next(model.parameters()).device
    names = (*COLUMNS, "agreement_P") if agreement else COLUMNS
    done: list[int] = []
    columns: list[Tensor] = []
    layout = layout_of(model)
    rows = deque(micro_batches(pairs, range(len(pairs)), token_budget, layout=layout))
    while rows:
        batch = rows.popleft()
        logps = unless_out_of_memory(model, partial(pair_logps, model, batch.to(device), agreement=agreement))
        if logps is None:
            if len(batch) == 1:
                raise too_long_for_memory(batch.tokens)
            rows.extendleft(micro_batches(pairs, batch.pairs, batch.tokens // 2, layout=layout))
            continue
        done += batch.pairs
        columns.append(torch.stack([getattr(logps, name) for name in names]))
        progress(len(batch))
    # one transfer: no row waits for the device
    columns_CP = torch.cat(columns, 1).cpu() if columns else torch.zeros(len(names), 0)
    place = {position: index for index, position in enumerate(done)}
    return from_columns(names, columns_CP[:, [place[position] for position in range(len(pairs))]], pairs)


def from_columns(names: Sequence[str], columns_CP: Tensor, pairs: Sequence[EncodedPair]) -> PairLogps:
    """Log-probs from the columns of these names, and how many tokens of `pairs` are scored."""
    counts = [[int(pair.chosen.scored.sum()), int(pair.rejected.scored.sum())] for pair in pairs]
    chosen_tokens_P, rejected_tokens_P = torch.tensor(counts, dtype=torch.int64).reshape(-1, 2).T
    return PairLogps(
        chosen_tokens_P=chosen_tokens_P,
        rejected_tokens_P=rejected_tokens_P,
        **dict(zip(names, columns_CP, strict=True)),
    )
