"""Sequences side by side, one a row, filled up at their ends: the layouts `rows` and `apart`.

A model whose layers carry a state, or that counts places in its row, cannot read a pack: there each answer stands
behind its own copy of the prompt, and the model's own forward reads it. What is filled up comes last, so a causal
model's numbers do not depend on it. A micro-batch is cut into tables of sequences of nearly one length, longest first.

Shapes: T = tokens of a pack's row, N = its scored tokens, A = answers, B = sequences of a table, L = tokens of its
longest, n = scored tokens in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpo_studio.tokens.encode import EncodedPair

__all__ = ["Span", "Table", "padded_tables", "padded_tokens", "similar_lengths"]

MOST_PADDING = 0.15
"""Of a table. At 0.05 a step of eight short pairs was cut into tables of one or two sequences."""


class Span(NamedTuple):
    """A pair's place in its row: the prompt from `start`, each part up to, not including, its end."""

    start: int
    prompt_end: int
    chosen_end: int
    rejected_end: int


class Table(NamedTuple):
    """Sequences of nearly one length, one a row."""

    ids_BL: Tensor
    predictor_n: Tensor
    """The place among the B * L that predicts each scored token."""
    place_n: Tensor
    """The scored tokens' places among those of the micro-batch."""


@dataclass(frozen=True, eq=False, slots=True)
class _Sequence:
    ids: NDArray[np.int64]
    predictor: NDArray[np.int64]
    """The place of each scored token's predictor in this sequence."""
    first: int
    """The place of its first scored token in the micro-batch."""


def padded_tokens(pair: EncodedPair) -> int:
    """The most tokens that a pair takes: both answers with a prompt each, and their share of the padding."""
    tokens = 2 * len(pair.prompt) + len(pair.chosen.ids) + len(pair.rejected.ids) - 2
    return int(tokens / (1 - MOST_PADDING)) + 1


def padded_tables(spans: Sequence[Span], ids_1T: Tensor, predictor_N: Tensor, tokens_A: Tensor) -> tuple[Table, ...]:
    """The answers of a pack's pairs, each behind its prompt, in tables: its `spans`, ids, predictors and counts."""
    places_N = np.split(predictor_N.cpu().numpy(), np.cumsum(tokens_A.tolist())[:-1])
    sequences = sorted(_sequences(spans, ids_1T[0].cpu().numpy(), places_N), key=lambda one: -len(one.ids))
    ends = _table_ends([len(sequence.ids) for sequence in sequences])
    return tuple(_table(sequences[start:end]) for start, end in zip([0, *ends], ends, strict=False))


def similar_lengths(lengths: Sequence[int], tokens: Sequence[int], token_budget: int) -> list[list[int]]:
    """Which items share a micro-batch of at most `token_budget` tokens: neighbours by length, longest first.

    An item over the token budget gets a micro-batch of its own. Deterministic: equal lengths keep their order.
    """
    batches: list[list[int]] = []
    room = 0
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or tokens[item] > room:
            batches.append([])
            room = token_budget
        batches[-1].append(item)
        room -= tokens[item]
    return batches


def _sequences(
    spans: Sequence[Span], ids_T: NDArray[np.int64], places_N: Sequence[NDArray[np.int64]]
) -> list[_Sequence]:
    found: list[_Sequence] = []
    first = 0
    for number, places_n in enumerate(places_N):
        span = spans[number // 2]
        begin, end = span[1:3] if number % 2 == 0 else span[2:4]
        prompt_T = ids_T[span.start : span.prompt_end]
        # the prompt's last token predicts an answer's first
        predictor = np.where(places_n < span.prompt_end, places_n - span.start, places_n - begin + len(prompt_T))
        found.append(_Sequence(np.concatenate([prompt_T, ids_T[begin:end]]), predictor, first))
        first += len(places_n)
    return found


def _table_ends(lengths: Sequence[int]) -> list[int]:
    """Where each table ends, of lengths that fall."""
    ends: list[int] = []
    start, tokens = 0, 0
    for place, length in enumerate(lengths):
        if tokens + length < (1 - MOST_PADDING) * lengths[start] * (place - start + 1):
            ends.append(place)
            start, tokens = place, 0
        tokens += length
    return [*ends, len(lengths)]


def _table(sequences: Sequence[_Sequence]) -> Table:
    length = len(sequences[0].ids)
    ids_BL = np.zeros((len(sequences), length), np.int64)
    for row_L, sequence in zip(ids_BL, sequences, strict=True):
        row_L[: len(sequence.ids)] = sequence.ids
    predictors = [row * length + sequence.predictor for row, sequence in enumerate(sequences)]
    places = [sequence.first + np.arange(len(sequence.predictor)) for sequence in sequences]
    return Table(
        torch.from_numpy(ids_BL), torch.from_numpy(np.concatenate(predictors)), torch.from_numpy(np.concatenate(places))
    )
