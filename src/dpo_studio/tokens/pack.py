"""Pairs -> micro-batches: many pairs in one row, each prompt stored once for both its answers, no padding.

A pair is in its row as prompt, chosen, rejected. Position ids restart, so that the rejected answer has the positions of
the chosen one, right after the prompt; the attention mask (`models/attention.py`) separates pairs, and the two answers
of a pair. The last token of an answer predicts nothing and is left out.

Which pairs are in a step is a pure function of (seed, epoch); how they are packed into rows changes speed only.

Shapes: T = tokens of the row, N = scored answer tokens, P = pairs, A = answers (2 x P).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpo_studio.config import Layout
from dpo_studio.objectives import PairLogps
from dpo_studio.tokens.encode import EncodedAnswer, EncodedPair
from dpo_studio.tokens.padded import Span, Table, padded_tables, padded_tokens, similar_lengths

__all__ = [
    "MicroBatch",
    "Span",
    "Steps",
    "assign_to_rows",
    "empty_row",
    "in_tables",
    "lay_out",
    "micro_batches",
    "pack",
    "packed_tokens",
    "pair_order",
    "split_at_position",
    "split_to_fit",
    "tokens_in",
]


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """A row of pairs, and the position that predicts each answer token."""

    pairs: tuple[int, ...]
    """Positions of the pairs in their list."""
    spans: tuple[Span, ...]
    """The place of each pair in the row."""
    ids_1T: Tensor
    position_ids_1T: Tensor
    seen_until_T: Tensor
    """The end of the positions that see a token, itself included: q sees k when k <= q < seen_until[k]."""
    predictor_N: Tensor
    """The position in the row whose hidden state predicts each scored token."""
    target_N: Tensor
    """The scored token ids."""
    tokens_A: Tensor
    """How many scored tokens each answer has, in the order of `target_N`: chosen, rejected, chosen, ..."""
    shared_N: Tensor
    """Which scored tokens are within the length of the pair's shorter answer."""
    tables: tuple[Table, ...] = ()
    """The same pairs one sequence a row, for the layouts `rows` and `apart`; then it is these that the model reads."""
    token_budget: int = 0
    """The most tokens the row could have: rows of one run differ in length, and one kernel serves them all."""
    reference: PairLogps | None = None
    """The reference's log-probs of these pairs, when they are known before the step."""

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def tokens(self) -> int:
        """Tokens the model reads, padding included."""
        return sum(table.ids_BL.numel() for table in self.tables) or self.ids_1T.shape[1]

    def to(self, device: torch.device) -> MicroBatch:
        """The same micro-batch on `device`; a GPU copies it while it still computes."""

        def move(x: Tensor) -> Tensor:
            return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)

        moved: dict[str, Any] = {name: move(x) for name, x in vars(self).items() if isinstance(x, Tensor)}
        reference = self.reference.map(move) if self.reference is not None else None
        tables = tuple(Table(*map(move, table)) for table in self.tables)
        return replace(self, **moved, tables=tables, reference=reference)


def packed_tokens(pair: EncodedPair) -> int:
    """Tokens a pair takes in a row."""
    return len(pair.prompt) + len(pair.chosen.ids) + len(pair.rejected.ids) - 2


def tokens_in(layout: Layout, pair: EncodedPair) -> int:
    """The most tokens a pair takes in a micro-batch of this layout."""
    return packed_tokens(pair) if layout == "packed" else padded_tokens(pair)


def lay_out(layout: Layout, pairs: Sequence[EncodedPair], positions: Sequence[int] | None = None) -> MicroBatch:
    """The pairs as one micro-batch."""
    batch = pack(pairs, positions)
    return batch if layout == "packed" else in_tables(batch)


def in_tables(batch: MicroBatch) -> MicroBatch:
    """A pack as it is read one sequence a row."""
    tables = padded_tables(batch.spans, batch.ids_1T, batch.predictor_N, batch.tokens_A)
    return replace(batch, tables=tuple(Table(*(x.to(batch.ids_1T.device) for x in table)) for table in tables))


def pack(pairs: Sequence[EncodedPair], positions: Sequence[int] | None = None) -> MicroBatch:
    """Pack pairs into one row."""
    ids, places, seen_until, predictors, targets = ([] for _ in range(5))
    counts: list[int] = []
    shared = []
    spans = []
    start = 0
    for pair in pairs:
        prompt_length = len(pair.prompt)
        ids.append(pair.prompt)
        places.append(np.arange(prompt_length))
        seen_until.append(np.full(prompt_length, start + packed_tokens(pair)))
        ends = [start + prompt_length]
        for answer in (pair.chosen, pair.rejected):
            length = len(answer.ids) - 1
            ids.append(answer.ids[:-1])
            places.append(np.arange(prompt_length, prompt_length + length))
            seen_until.append(np.full(length, ends[-1] + length))
            predictor = np.concatenate([[start + prompt_length - 1], np.arange(ends[-1], ends[-1] + length)])
            predictors.append(predictor[answer.scored])
            targets.append(answer.ids[answer.scored])
            counts.append(int(answer.scored.sum()))
            ends.append(ends[-1] + length)
        shared += [np.arange(count) < min(counts[-2:]) for count in counts[-2:]]
        spans.append(Span(start, *ends))
        start = ends[-1]

    def tensor(parts: Sequence[NDArray[Any]]) -> Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(np.int64))

    return MicroBatch(
        pairs=tuple(range(len(pairs)) if positions is None else positions),
        spans=tuple(spans),
        ids_1T=tensor(ids)[None],
        position_ids_1T=tensor(places)[None],
        seen_until_T=tensor(seen_until).int(),
        predictor_N=tensor(predictors),
        target_N=tensor(targets),
        tokens_A=torch.tensor(counts),
        shared_N=torch.from_numpy(np.concatenate(shared)),
    )


def split_at_position(batch: MicroBatch, limit: int) -> list[tuple[MicroBatch, Tensor]]:
    """Split the row into rows whose sequences (a prompt with one whole answer) are all within `limit` tokens, or all
    longer.

    For long rope: a model that chooses its factors by the longest position of a forward pass computes a sequence in
    either row as it does by itself. A pair that straddles the limit is in both, each answer with its prompt. With
    each row comes the place (n,) of its scored tokens among those of `batch`.
    """
    answers = [(span, side) for span in batch.spans for side in (0, 1)]
    over_A = [_whole_length(span, side) > limit for span, side in answers]
    answer_N = torch.repeat_interleave(batch.tokens_A)
    rows = []
    for over in sorted(set(over_A)):
        here_A = torch.tensor([o == over for o in over_A], device=answer_N.device)
        places = here_A[answer_N].nonzero()[:, 0]
        kept = list(zip(over_A[0::2], over_A[1::2], batch.spans, strict=True))
        row = _subset(batch, [(span, c == over, r == over) for c, r, span in kept if over in (c, r)], places)
        longest = max(_whole_length(*answer) for answer, o in zip(answers, over_A, strict=True) if o == over)
        # the last token of an answer is not in the row, but it counts for the length
        rows.append((_with_last_position(row, limit) if over and longest == limit + 1 else row, places))
    return rows


def split_to_fit(batch: MicroBatch, limit: int) -> list[tuple[MicroBatch, Tensor]]:
    """Split the row into rows of at most `limit` tokens; of a longer pair each answer has one, with the prompt.

    For models that count places in the row, and whose numbers do not depend on them below `limit`: a row of one answer
    has places that are positions. With each row comes the place (n,) of its scored tokens among those of `batch`.
    """
    groups: list[list[tuple[int, Span, bool, bool]]] = []
    room = 0
    for pair, span in enumerate(batch.spans):
        size = span.rejected_end - span.start
        if size > limit:
            groups += [[(pair, span, True, False)], [(pair, span, False, True)]]
            room = 0
            continue
        if size > room:
            groups.append([])
            room = limit
        groups[-1].append((pair, span, True, True))
        room -= size
    answer_N = torch.repeat_interleave(batch.tokens_A)
    rows = []
    for group in groups:
        here_A = torch.zeros(len(batch.tokens_A), dtype=torch.bool, device=answer_N.device)
        for pair, _, chosen, rejected in group:
            here_A[2 * pair], here_A[2 * pair + 1] = chosen, rejected
        places = here_A[answer_N].nonzero()[:, 0]
        rows.append((_subset(batch, [kept for _, *kept in group], places), places))  # type: ignore[misc]
    return rows


def _whole_length(span: Span, side: int) -> int:
    """Tokens of a pair's prompt and one answer, its last token included; `side` 0 is the chosen answer."""
    answer = span.rejected_end - span.chosen_end if side else span.chosen_end - span.prompt_end
    return span.prompt_end - span.start + answer + 1


def _subset(batch: MicroBatch, kept: Sequence[tuple[Span, bool, bool]], places_n: Tensor) -> MicroBatch:
    """The row with no answers but the `kept` (span, chosen?, rejected?), and the scored tokens at `places_n` alone."""
    keep_T = torch.zeros(batch.tokens, dtype=torch.bool)
    spans = []
    start = 0
    for span, chosen, rejected in kept:
        keep_T[span.start : span.prompt_end] = True
        keep_T[span.prompt_end : span.chosen_end] = chosen
        keep_T[span.chosen_end : span.rejected_end] = rejected
        prompt_end = start + span.prompt_end - span.start
        chosen_end = prompt_end + chosen * (span.chosen_end - span.prompt_end)
        spans.append(Span(start, prompt_end, chosen_end, chosen_end + rejected * (span.rejected_end - span.chosen_end)))
        start = spans[-1].rejected_end
    before_T = torch.cat([torch.zeros(1, dtype=torch.int64), keep_T.cumsum(0)]).to(batch.ids_1T.device)
    keep_T = keep_T.to(batch.ids_1T.device)
    return replace(
        batch,
        spans=tuple(spans),
        ids_1T=batch.ids_1T[:, keep_T],
        position_ids_1T=batch.position_ids_1T[:, keep_T],
        seen_until_T=before_T[batch.seen_until_T[keep_T].long()].int(),
        predictor_N=before_T[batch.predictor_N[places_n]],
        target_N=batch.target_N[places_n],
        shared_N=batch.shared_N[places_n],
    )


def _with_last_position(row: MicroBatch, position: int) -> MicroBatch:
    """The row with one token more, at `position`, that sees itself alone and that no output depends on."""
    end = row.tokens
    return replace(
        row,
        spans=(*row.spans, Span(end, end + 1, end + 1, end + 1)),
        ids_1T=torch.cat([row.ids_1T, row.ids_1T[:, :1]], 1),
        position_ids_1T=torch.cat([row.position_ids_1T, torch.full_like(row.position_ids_1T[:, :1], position)], 1),
        seen_until_T=torch.cat([row.seen_until_T, torch.full_like(row.seen_until_T[:1], end + 1)]),
    )


def assign_to_rows(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Which items share a row of at most `token_budget` tokens: best assign_to_rows, longest first.

    An item over the token budget gets a row of its own. Deterministic: equal lengths keep their order.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        best = min((row for row in range(len(rows)) if room[row] >= lengths[item]), key=room.__getitem__, default=None)
        if best is None:
            rows.append([])
            room.append(token_budget)
            best = len(rows) - 1
        rows[best].append(item)
        room[best] -= lengths[item]
    return rows


def pair_order(count: int, *, seed: int, epoch: int) -> list[int]:
    """The order of an epoch: a permutation drawn from (seed, epoch) alone.

    Sorted raw draws rather than `Generator.permutation`: NumPy keeps bit streams stable between versions, not methods.
    """
    draws = np.random.PCG64([seed, epoch]).random_raw(count)
    return [int(i) for i in np.argsort(draws, kind="stable")]


@dataclass(frozen=True, eq=False)
class Steps:
    """The micro-batches of every optimizer step, from any step on."""

    pairs: Sequence[EncodedPair]
    pairs_per_step: int
    token_budget: int
    """Tokens of a micro-batch: it decides how a step's pairs are packed into rows, never which pairs they are."""
    seed: int
    epochs: float
    max_steps: int | None = None
    reference: Callable[[Sequence[int]], PairLogps] | None = None
    """Looks up the cached log-probs of pairs by position."""
    rows: Callable[[Sequence[int], int], list[list[int]]] = assign_to_rows
    """Which of a step's pairs, by their lengths, share a row of a token budget; one of several processes packs only its
    own rows (`tokens.dealing`)."""
    layout: Layout = "packed"

    @property
    def per_epoch(self) -> int:
        """Steps an epoch; the last one may have fewer pairs."""
        return math.ceil(len(self.pairs) / self.pairs_per_step)

    @property
    def total(self) -> int:
        """Steps of the whole run. Rounded before it is rounded up: 1.1 x 10 is 11.000000000000002 to a float."""
        if self.max_steps is not None:
            return self.max_steps
        return max(1, math.ceil(round(self.epochs * self.per_epoch, 6)))

    def epoch_at(self, step: int) -> float:
        """Epochs done after `step` steps."""
        return step / self.per_epoch

    def pairs_of(self, step: int) -> list[int]:
        """Positions of the pairs that step number `step` (from 1) learns from."""
        epoch, slot = divmod(step - 1, self.per_epoch)
        order = pair_order(len(self.pairs), seed=self.seed, epoch=epoch)
        return order[slot * self.pairs_per_step : (slot + 1) * self.pairs_per_step]

    def micro_batches_of(self, step: int, token_budget: int | None = None) -> list[MicroBatch]:
        """The micro-batches of step number `step`, within another token budget where one is given."""
        budget = token_budget or self.token_budget
        positions = self.pairs_of(step)
        return list(micro_batches(self.pairs, positions, budget, self.reference, self.rows, layout=self.layout))

    def __call__(self, *, after: int, token_budget: Callable[[int], int] | None = None) -> Iterator[list[MicroBatch]]:
        """The micro-batches of step after+1, after+2, ... to the end; a thread packs the next while one is used.

        `token_budget` of a step's number is asked for when it is packed. A thread, not a process: a row of 8,192 tokens
        takes it 2 ms, and a GPU some 600.
        """

        def pack_step(step: int) -> list[MicroBatch]:
            return self.micro_batches_of(step, None if token_budget is None else token_budget(step))

        with ThreadPoolExecutor(max_workers=1) as packer:
            coming = packer.submit(pack_step, after + 1)
            for step in range(after + 1, self.total + 1):
                here, coming = coming, packer.submit(pack_step, step + 1)
                yield here.result()


def micro_batches(
    pairs: Sequence[EncodedPair],
    positions: Sequence[int],
    token_budget: int,
    reference: Callable[[Sequence[int]], PairLogps] | None = None,
    rows: Callable[[Sequence[int], int], list[list[int]]] = assign_to_rows,
    *,
    layout: Layout = "packed",
) -> Iterator[MicroBatch]:
    """The pairs at `positions` in micro-batches of at most `token_budget` tokens.

    A row of `rows` without pairs is a micro-batch of no pairs: one token, of which nothing is learned.
    """
    tokens = [tokens_in(layout, pairs[position]) for position in positions]
    if layout == "packed" or rows is not assign_to_rows:
        assigned = rows(tokens, token_budget)
    else:
        assigned = similar_lengths([_longest(pairs[position]) for position in positions], tokens, token_budget)
    for row in assigned:
        if not row:
            yield empty_row(pairs[positions[0]], token_budget, layout)
            continue
        chosen = [positions[item] for item in row]
        batch = replace(lay_out(layout, [pairs[position] for position in chosen], chosen), token_budget=token_budget)
        yield replace(batch, reference=reference(chosen)) if reference is not None else batch


def empty_row(pair: EncodedPair, token_budget: int, layout: Layout = "packed") -> MicroBatch:
    """The first token of a pair's prompt and two answers of one token, whose own last token is in no row: it computes
    what every row does, and counts for nothing."""
    answer = EncodedAnswer(pair.prompt[:1], np.ones(1, np.bool_))
    return replace(
        lay_out(layout, [replace(pair, prompt=pair.prompt[:1], chosen=answer, rejected=answer)], [0]),
        pairs=(),
        token_budget=token_budget,
    )


def _longest(pair: EncodedPair) -> int:
    return len(pair.prompt) + max(len(pair.chosen.ids), len(pair.rejected.ids))
