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
from dpo_studio.models.sharding import is_sharded
from dpo_studio.objectives import PairLogps
from dpo_studio.ranks import Ranks
from dpo_studio.tokens.encode import EncodedPair
from dpo_studio.tokens.pack import empty_row, micro_batches, packed_tokens

__all__ = ["COLUMNS", "batched_logps", "from_columns", "logps_over_ranks", "of_all_ranks"]

COLUMNS = ("chosen_P", "rejected_P", "chosen_shared_P", "rejected_shared_P")
"""The log-probs of a pair: what a loss is computed from, and what is stored. Token counts follow from its ids."""
_ALL = (
    *("chosen_P", "rejected_P", "chosen_tokens_P", "rejected_tokens_P"),
    *("chosen_shared_P", "rejected_shared_P", "agreement_P"),
)


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


def logps_over_ranks(
    ranks: Ranks,
    model: nn.Module,
    pairs: Sequence[EncodedPair],
    *,
    token_budget: int | None = None,
    agreement: bool = False,
    progress: Callable[[int], None] = lambda pairs: None,
) -> PairLogps:
    """What `batched_logps` returns, each rank computing a share of the pairs; every rank gets all, in their order.

    Raises:
        RunError: as `batched_logps`, on the rank that has the pair.
    """
    mine = ranks.share([packed_tokens(pair) for pair in pairs])
    some = [pairs[place] for place in mine]
    token_budget = token_budget or tokens_without_gradient(CPU_TOKEN_BUDGET, model)
    short = _rows_short(ranks, model, some, token_budget)
    own = batched_logps(model, some, token_budget=token_budget, agreement=agreement, progress=progress)
    if ranks.size == 1:
        return own
    with torch.no_grad():
        for _ in range(short):
            pair_logps(model, empty_row(pairs[0], token_budget).to(next(model.parameters()).device))
    names = (*COLUMNS, "agreement_P") if agreement else COLUMNS
    columns = [getattr(own, name).double() for name in names]
    all_CP = ranks.all_columns(torch.stack([*columns, torch.tensor(mine, dtype=torch.float64)]))
    progress(len(pairs) - len(mine))
    columns_CP = all_CP[:-1, all_CP[-1].argsort()]
    return from_columns(names, columns_CP.to(own.chosen_P.dtype), pairs)


def _rows_short(ranks: Ranks, model: nn.Module, mine: Sequence[EncodedPair], token_budget: int) -> int:
    """How many rows more another process computes than this one, whose slices of the weights it needs for them.

    Asked before the first row: a process that asks while another collects weights gets the wrong answer.
    """
    if not is_sharded(model):
        return 0
    rows = sum(1 for _ in micro_batches(mine, range(len(mine)), token_budget))
    return ranks.most(rows) - rows


def of_all_ranks(ranks: Ranks, parts: Sequence[PairLogps]) -> tuple[PairLogps, int]:
    """The log-probs of all ranks' pairs, those of rank 0 first, and how many are before this rank's own.

    At least one rank has some.
    """
    if ranks.size == 1:
        return PairLogps.cat(parts), 0
    own = PairLogps.cat(parts) if parts else None
    columns = [] if own is None else [getattr(own, name) for name in _ALL]
    known = [column for column in columns if column is not None]
    mine_CP = torch.stack([column.double() for column in known]) if known else torch.zeros(0, 0)
    counts = ranks.each(mine_CP.shape[1])
    rows = list(ranks.all_columns(mine_CP))
    # a rank without pairs learns from the number of columns whether agreement is there
    device = None if own is None else own.chosen_P.device
    dtype = torch.float32 if own is None else own.chosen_P.dtype
    values = {
        name: row.to(device, torch.int64 if "tokens" in name else dtype) for name, row in zip(_ALL, rows, strict=False)
    }
    return PairLogps(**values), int(sum(counts[: ranks.rank]))


def from_columns(names: Sequence[str], columns_CP: Tensor, pairs: Sequence[EncodedPair]) -> PairLogps:
    """Log-probs from the columns of these names, and how many tokens of `pairs` are scored."""
    counts = [[int(pair.chosen.scored.sum()), int(pair.rejected.scored.sum())] for pair in pairs]
    chosen_tokens_P, rejected_tokens_P = torch.tensor(counts, dtype=torch.int64).reshape(-1, 2).T
    return PairLogps(
        chosen_tokens_P=chosen_tokens_P,
        rejected_tokens_P=rejected_tokens_P,
        **dict(zip(names, columns_CP, strict=True)),
    )
