"""The pairs of a step dealt to the processes that train together, so that all of them end at the same time.

Rows filled to the token budget one after the other leave the last one half empty, and every process would wait for the
one that got a full row more. So with several processes the rows are made equally long, as many for each.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from functools import partial

from dpo_studio.tokens.pack import assign_to_rows

__all__ = ["dealt_rows", "rows_of_rank"]

Rows = Callable[[Sequence[int], int], list[list[int]]]


def rows_of_rank(rank: int, size: int) -> Rows:
    """What `Steps.rows` is for one of `size` processes."""
    return assign_to_rows if size == 1 else partial(_mine, rank=rank, size=size)


def _mine(lengths: Sequence[int], token_budget: int, *, rank: int, size: int) -> list[list[int]]:
    return dealt_rows(lengths, token_budget, size)[rank]


def dealt_rows(lengths: Sequence[int], token_budget: int, size: int) -> list[list[list[int]]]:
    """Rows of at most `token_budget` tokens for each of `size` processes, as many for each; a row may be empty.

    Longest first to the row with the fewest tokens (LPT, Graham 1969), then the longest row to the process with the
    fewest. As few rows as hold all items; an item over the token budget gets one of its own. Deterministic.
    """
    count = max(1, math.ceil(sum(lengths) / (size * token_budget)))
    while (rows := _filled(lengths, token_budget, count * size)) is None:
        count += 1
    loads = [sum(lengths[item] for item in row) for row in rows]
    hands: list[list[list[int]]] = [[] for _ in range(size)]
    held = [0] * size
    for row in sorted(range(len(rows)), key=lambda row: -loads[row]):
        rank = min((rank for rank in range(size) if len(hands[rank]) < count), key=held.__getitem__)
        hands[rank].append(rows[row])
        held[rank] += loads[row]
    return hands


def _filled(lengths: Sequence[int], token_budget: int, count: int) -> list[list[int]] | None:
    """`count` rows of about the same length; None where an item finds no room."""
    rows: list[list[int]] = [[] for _ in range(count)]
    emptiest = [(0, row) for row in range(count)]
    for item in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
        load, row = emptiest[0]
        if load and load + lengths[item] > token_budget:
            return None
        rows[row].append(item)
        heapq.heapreplace(emptiest, (load + lengths[item], row))
    return rows
