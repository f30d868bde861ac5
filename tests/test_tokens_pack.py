"""Rows worked by hand, and which pairs a step learns from."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_studio.objectives import PairLogps
from dpo_studio.tokens.pack import (
    MicroBatch,
    Span,
    Steps,
    assign_to_rows,
    micro_batches,
    pack,
    packed_tokens,
    pair_order,
)
from tests.pairs_of_ids import encoded, random_pairs

TWO = [encoded([11, 12], [21, 22, 23], [31, 32]), encoded([13], [24, 25], [33])]


def test_a_row_by_hand() -> None:
    """place         0  1  2  3  4   5  6
    ids          11 12 21 22 31  13 24     23, 32, 25 and 33 come last in their answers and predict nothing
    position      0  1  2  3  2   0  1     31 stands where 21 does, behind the prompt
    seen until   5  5  4  4  5   7  7      a prompt by all of its pair, an answer by itself
    predicts     both 21 22 23 32 both 25  12 predicts 21 and 31; 13 predicts 24 and 33
    """
    row = pack(TWO, [7, 3])
    assert row.pairs == (7, 3)
    assert len(row) == 2
    assert row.tokens == 7
    assert row.spans == (Span(0, 2, 4, 5), Span(5, 6, 7, 7))
    assert row.ids_1T.tolist() == [[11, 12, 21, 22, 31, 13, 24]]
    assert row.position_ids_1T.tolist() == [[0, 1, 2, 3, 2, 0, 1]]
    assert row.seen_until_T.tolist() == [5, 5, 4, 4, 5, 7, 7]
    assert row.predictor_N.tolist() == [1, 2, 3, 1, 4, 5, 6, 5]
    assert row.target_N.tolist() == [21, 22, 23, 31, 32, 24, 25, 33]
    assert row.tokens_A.tolist() == [3, 2, 2, 1]
    assert {tensor.dtype for tensor in (row.ids_1T, row.target_N, row.tokens_A)} == {torch.int64}


def test_tokens_that_are_not_scored_are_read_but_not_predicted() -> None:
    """Places 0 and 2 are another speaker's: of 21 22 23 only 22 is scored, of 31 32 only 32. The row is as before."""
    row = pack([encoded([11, 12], [21, 22, 23], [31, 32], unscored=(0, 2))])
    assert row.ids_1T.tolist() == [[11, 12, 21, 22, 31]]
    assert row.predictor_N.tolist() == [2, 4]
    assert row.target_N.tolist() == [22, 32]
    assert row.tokens_A.tolist() == [1, 1]


def test_a_pair_of_one_token_answers_is_its_prompt() -> None:
    row = pack([encoded([5, 6], [7], [8])])
    assert row.ids_1T.tolist() == [[5, 6]]
    assert row.predictor_N.tolist() == [1, 1]
    assert row.target_N.tolist() == [7, 8]


def test_an_answer_of_which_nothing_is_scored_has_no_entry() -> None:
    row = pack([encoded([5], [6], [7], unscored=(0,)), TWO[0]])
    assert row.tokens_A.tolist() == [0, 0, 3, 2]


@pytest.mark.parametrize("count", [1, 2, 9])
def test_every_pair_takes_as_many_tokens_as_said(count: int) -> None:
    pairs = random_pairs(count)
    assert pack(pairs).tokens == sum(map(packed_tokens, pairs))


def test_moving_to_a_device_takes_the_reference_along() -> None:
    """`meta` is a device that every machine has."""
    row = next(micro_batches(TWO, [0, 1], 100, lambda places: PairLogps(*(torch.zeros(len(places)) for _ in range(4)))))
    there = row.to(torch.device("meta"))
    assert there.reference is not None
    assert there.reference.chosen_P.device.type == there.ids_1T.device.type == there.target_N.device.type == "meta"
    assert there.pairs == row.pairs


@given(st.lists(st.integers(0, 300), max_size=60), st.integers(1, 200))
def test_rows_hold_every_item_once_and_keep_to_the_budget(lengths: list[int], budget: int) -> None:
    """Or hold a single item that is over it."""
    rows = assign_to_rows(lengths, budget)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    for row in rows:
        assert row
        assert sum(lengths[item] for item in row) <= budget or len(row) == 1
    assert rows == assign_to_rows(lengths, budget)


@given(st.lists(st.integers(1, 100), min_size=1, max_size=60))
def test_no_two_rows_could_be_one(lengths: list[int]) -> None:
    """Best assign_to_rows opens a row only when no open one has room: at most one row is half empty."""
    rows = assign_to_rows(lengths, 100)
    filled = sorted(sum(lengths[item] for item in row) for row in rows)
    assert all(a + b > 100 for a, b in pairwise(filled))


def test_best_fit_by_hand() -> None:
    """Budget 10. Longest first: 7 opens a row (room 3), 6 another (room 4), 4 fits the second (room 0), 3 the first
    (room 0), 2 opens a third. Equal lengths keep their order."""
    assert assign_to_rows([3, 6, 2, 7, 4], 10) == [[3, 0], [1, 4], [2]]
    assert assign_to_rows([5, 5, 5], 10) == [[0, 1], [2]]
    assert assign_to_rows([], 10) == []


def test_the_order_of_an_epoch_is_written_in_stone() -> None:
    """A golden permutation: a run continued under another NumPy must see its pairs in the same order."""
    assert pair_order(10, seed=0, epoch=0) == [3, 2, 1, 8, 6, 0, 7, 4, 5, 9]
    assert pair_order(10, seed=0, epoch=1) == [7, 4, 5, 1, 9, 8, 6, 2, 0, 3]
    assert pair_order(10, seed=1, epoch=0) == [9, 2, 4, 7, 5, 0, 8, 6, 3, 1]


def test_the_order_is_a_function_of_seed_and_epoch_alone() -> None:
    np.random.seed(0)
    first = pair_order(1000, seed=5, epoch=2)
    np.random.seed(1)
    torch.manual_seed(1)
    pair_order(1000, seed=9, epoch=9)
    assert pair_order(1000, seed=5, epoch=2) == first
    assert sorted(first) == list(range(1000))
    orders = [pair_order(1000, seed=seed, epoch=epoch) for seed in range(5) for epoch in range(5)]
    assert len({tuple(order) for order in orders}) == 25


def test_every_place_is_equally_likely() -> None:
    """Of 3 pairs, over 3,000 epochs, each of the 6 orders about 500 times: within five standard deviations, 102."""
    counts: dict[tuple[int, ...], int] = {}
    for epoch in range(3000):
        order = tuple(pair_order(3, seed=0, epoch=epoch))
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 6
    assert all(abs(count - 500) < 102 for count in counts.values())


def steps(count: int, size: int, **changes: float | None) -> Steps:
    given_ = {"token_budget": 60, "seed": 3, "epochs": 1.0, "max_steps": None} | changes
    return Steps(random_pairs(count), size, **given_)  # type: ignore[arg-type]


def content(batches: list[MicroBatch]) -> list[tuple[tuple[int, ...], list[list[int]], list[int]]]:
    return [(batch.pairs, batch.ids_1T.tolist(), batch.target_N.tolist()) for batch in batches]


def test_an_epoch_has_every_pair_once_and_its_last_step_is_smaller() -> None:
    """22 pairs in steps of 5: ceil(22 / 5) = 5 steps, of 5, 5, 5, 5 and 2 pairs; each epoch in another order."""
    plan = steps(22, 5, epochs=3)
    assert (plan.per_epoch, plan.total) == (5, 15)
    epochs = []
    for epoch in range(3):
        taken = [plan.pairs_of(5 * epoch + slot) for slot in range(1, 6)]
        assert [len(pairs) for pairs in taken] == [5, 5, 5, 5, 2]
        epochs.append([pair for pairs in taken for pair in pairs])
        assert sorted(epochs[-1]) == list(range(22))
    assert epochs[0] != epochs[1] != epochs[2]
    assert [len(list(plan(after=after))) for after in (0, 4, 14, 15)] == [15, 11, 1, 0]


@pytest.mark.parametrize("budget", [1, 60, 10**6])
def test_a_step_s_micro_batches_hold_its_pairs_whatever_the_budget(budget: int) -> None:
    plan = steps(22, 5, token_budget=budget)
    for number, batches in enumerate(plan(after=0), 1):
        assert sorted(pair for batch in batches for pair in batch.pairs) == sorted(plan.pairs_of(number))
        assert all(batch.tokens <= budget or len(batch) == 1 for batch in batches)
        if budget == 1:
            assert len(batches) == len(plan.pairs_of(number))
        if budget == 10**6:
            assert len(batches) == 1


@pytest.mark.parametrize(
    ("epochs", "max_steps", "total"),
    [(1, None, 10), (2, None, 20), (0.5, None, 5), (0.41, None, 5), (0.01, None, 1), (1.1, None, 11), (0.7, None, 7),
     (2.3, None, 23), (1, 3, 3), (1, 25, 25), (0.5, 1, 1)],
)  # fmt: skip
def test_how_many_steps_there_are(epochs: float, max_steps: int | None, total: int) -> None:
    """100 pairs in steps of 10. Shares of an epoch are rounded up to a step (4.1 -> 5), but 1.1 x 10 is 11 although
    floating point has 11.000000000000002; max_steps wins, also where it is more than the epochs."""
    assert steps(100, 10, epochs=epochs, max_steps=max_steps).total == total


@given(st.integers(1, 30), st.integers(1, 12), st.floats(0.1, 3), st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_going_on_after_any_step_is_never_having_stopped(count: int, size: int, epochs: float, after: int) -> None:
    """The same micro-batches, tensor by tensor."""
    plan = steps(count, size, epochs=epochs)
    whole = [content(batches) for batches in plan(after=0)]
    assert len(whole) == plan.total
    assert [content(batches) for batches in plan(after=after)] == whole[after:]


@given(st.integers(1, 40), st.integers(1, 50))
@settings(max_examples=30, deadline=None)
def test_steps_an_epoch_are_rounded_up(count: int, size: int) -> None:
    plan = steps(count, size)
    assert plan.per_epoch == math.ceil(count / size)
    assert sorted(pair for step in range(1, plan.total + 1) for pair in plan.pairs_of(step)) == list(range(count))


def test_epochs_done_are_counted_in_steps() -> None:
    """22 pairs in steps of 5 are 5 steps an epoch: after 7 steps 1.4 epochs."""
    assert steps(22, 5, epochs=3).epoch_at(7) == pytest.approx(1.4)


def test_each_micro_batch_brings_the_reference_of_its_own_pairs() -> None:
    known = torch.arange(22.0)
    plan = Steps(random_pairs(22), 5, 60, 3, 1, None, lambda places: PairLogps(*[known[list(places)]] * 4))
    for batches in plan(after=0):
        for batch in batches:
            assert batch.reference is not None
            assert batch.reference.chosen_P.tolist() == [float(pair) for pair in batch.pairs]
