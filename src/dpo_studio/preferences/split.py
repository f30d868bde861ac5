"""Pairs -> training pairs and held-out pairs, by prompt.

Rows about one prompt stay on one side: a prompt seen in training would make the held-out number flatter than it is.
The side is a hash of (seed, prompt) and of nothing else, so it is known for each row of a stream, and rows added to
a file move no row that was there. A prompt that nearly repeats an earlier one goes where that one goes: held out beside
its copy it would measure memory.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np

from dpo_studio.config import HeldOutSection
from dpo_studio.errors import DataError
from dpo_studio.preferences.minhash import K, filled, nearest, signature
from dpo_studio.preferences.pair import Pair, prompt_key
from dpo_studio.preferences.rows import sample
from dpo_studio.preferences.sources import read_pairs

__all__ = ["Split", "is_held_out", "split_pairs", "stratified"]

_SEARCHED = 200_000
"""Prompts that are searched for near copies: 512 bytes each, 100 MB in all. Later ones go by their own hash."""
_FEW_COPIES = 4
"""Prompts of a kind that are taken for copies of one another however small the set is."""
_MOST_PROMPTS = 10_000  # of an origin whose share is counted out; beyond, chance is within 1 % of a tenth


@dataclass(frozen=True)
class Split:
    """Two lists of pairs without a common prompt, each in source order."""

    train: list[Pair]
    """Pairs to learn from."""
    held_out: list[Pair]
    """Pairs to measure on."""
    shared_prompts_dropped: int
    """Training pairs dropped because an explicit held-out source has their prompt."""
    near_copies: int = 0
    """Pairs on the side of an earlier prompt that theirs nearly repeats."""


def is_held_out(key: str, *, seed: int, fraction: float) -> bool:
    """Whether the prompt with this key is on the held-out side, which a share `fraction` of all prompts is."""
    return _rank(key, seed) < fraction * 2**64


def _rank(key: str, seed: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:8], "big")


def stratified(prompts: Iterable[tuple[str, str]], *, seed: int, fraction: float) -> Callable[[str], bool]:
    """The rule that holds out the same share of each origin's prompts, from all the (origin, key) there are.

    The prompts of an origin whose hashes are lowest are held out, `fraction` of them to the nearest whole one, at least
    one and never all (of a single one none). Large origins go by the hash alone, as everything does where there is one
    origin. The rule asks for the key only, so a prompt of several origins is on one side. Memory: `_MOST_PROMPTS`
    numbers an origin.
    """
    strata: dict[str, set[int]] = {}
    for origin, key in prompts:
        stratum = strata.setdefault(origin, set())
        if len(stratum) <= _MOST_PROMPTS:
            stratum.add(_rank(key, seed))
    counted = [ranks for ranks in strata.values() if len(ranks) <= _MOST_PROMPTS] if len(strata) > 1 else []
    known = set[int]().union(*counted)
    held_out = {rank for ranks in counted for rank in sorted(ranks)[: _share(len(ranks), fraction)]}

    def rule(key: str) -> bool:
        rank = _rank(key, seed)
        return rank in held_out if rank in known else rank < fraction * 2**64

    return rule


def _share(count: int, fraction: float) -> int:
    return min(max(round(count * fraction), 1), count - 1)


def split_pairs(train: list[Pair], section: HeldOutSection, *, seed: int) -> Split:
    """Hold out a share of the prompts, or the pairs of a source of their own; `section.rows` of them if that is set.

    Pairs that the sample of `rows` leaves out are not trained on either: the training side does not depend on how
    many pairs measure it.

    Raises:
        DataError: the held-out source cannot be used, or nothing is left to train on.
    """
    if (source := section.as_source()) is None:
        split = _by_hash(train, seed=seed, fraction=section.fraction)
    else:
        # `rows` counts usable pairs here, so the source is read whole: a refused row must not make them fewer.
        apart = read_pairs(source.model_copy(update={"rows": None}), seed=seed).pairs
        split = _without_prompts_of(train, apart)
    if train and not split.train:
        raise DataError(
            "no pairs are left to train on: all their prompts are held out",
            hint="a smaller data.held_out.fraction, another data.split_seed, or a held-out source of other prompts",
        )
    if section.rows is None:
        return split
    chosen = sample(((pair.row, pair) for pair in split.held_out), section.rows, seed=seed)
    return replace(split, held_out=[pair for _, pair in chosen])


def _by_hash(pairs: list[Pair], *, seed: int, fraction: float) -> Split:
    keys = [prompt_key(pair.prompt) for pair in pairs]
    followed = _followed(pairs, keys, fraction)
    sides: tuple[list[Pair], list[Pair]] = ([], [])
    moved = 0
    for pair, key in zip(pairs, keys, strict=True):
        own, side = (is_held_out(each, seed=seed, fraction=fraction) for each in (key, followed.get(key, key)))
        moved += own != side
        sides[side].append(pair)
    return Split(*sides, shared_prompts_dropped=0, near_copies=moved)


def _followed(pairs: list[Pair], keys: list[str], fraction: float) -> dict[str, str]:
    """For each prompt that nearly repeats an earlier one, the first of its kind.

    A kind with more prompts than half of what is to be held out is not a set of copies but a form, such as short
    questions in one long instruction; on one side it would take everything along.
    """
    by_key: dict[str, Pair] = {}
    for pair, key in zip(pairs, keys, strict=True):
        by_key.setdefault(key, pair)
    different = list(itertools.islice(by_key.items(), _SEARCHED))
    texts = ("\n".join(turn.content for turn in pair.prompt) for _, pair in different)
    twins = nearest(filled(np.array([signature(text) for text in texts], np.uint32).reshape(-1, K)))
    first = np.arange(len(twins))
    for at in np.flatnonzero(twins >= 0):  # a twin stands before its copy, and has its own first by now
        first[at] = first[twins[at]]
    sizes = Counter(first.tolist())
    most = max(_FEW_COPIES, fraction * len(different) / 2)
    return {
        different[at][0]: different[first[at]][0]
        for at in np.flatnonzero(twins >= 0).tolist()
        if sizes[int(first[at])] <= most
    }


def _without_prompts_of(train: list[Pair], held_out: list[Pair]) -> Split:
    measured_on = {prompt_key(pair.prompt) for pair in held_out}
    kept = [pair for pair in train if prompt_key(pair.prompt) not in measured_on]
    return Split(kept, held_out, shared_prompts_dropped=len(train) - len(kept))
