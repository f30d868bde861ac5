"""Pairs of token ids, chosen by hand or drawn at random."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dpo_studio.tokens.encode import EncodedAnswer, EncodedPair
from tests.tiny_tokenizers import VOCABULARY

__all__ = ["encoded", "random_pairs"]


def encoded(
    prompt: Sequence[int],
    chosen: Sequence[int],
    rejected: Sequence[int],
    *,
    unscored: Sequence[int] = (),
    row: int = 0,
) -> EncodedPair:
    """A pair from plain ids; the places in `unscored` are not scored in either answer."""

    def answer(ids: Sequence[int]) -> EncodedAnswer:
        scored = np.array([place not in unscored for place in range(len(ids))])
        return EncodedAnswer(np.array(ids, np.int32), scored)

    return EncodedPair(row, np.array(prompt, np.int32), answer(chosen), answer(rejected))


def random_pairs(
    count: int, *, seed: int = 0, prompt: tuple[int, int] = (2, 20), answer: tuple[int, int] = (1, 24)
) -> list[EncodedPair]:
    """Pairs of random ids, lengths drawn from the two ranges, both ends included."""
    draw = np.random.default_rng(seed)

    def ids(lengths: tuple[int, int]) -> list[int]:
        return [int(i) for i in draw.integers(3, VOCABULARY, draw.integers(lengths[0], lengths[1] + 1))]

    return [encoded(ids(prompt), ids(answer), ids(answer), row=row) for row in range(count)]
