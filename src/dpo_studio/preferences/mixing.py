"""Several training sources as one: all their pairs, or each one's share of an epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dpo_studio.config import DataSection, WeightedSource
from dpo_studio.preferences.pair import Pair
from dpo_studio.preferences.rows import sample
from dpo_studio.preferences.sources import PairSource, read_pairs

__all__ = ["Part", "read_training", "shares"]


@dataclass(frozen=True)
class Part:
    """One of several sources, in the numbering that counts its rows on from those of the sources before it."""

    name: str
    first_row: int
    weight: float | None
    """Of the sum of all: its share of an epoch's pairs."""


def read_training(data: DataSection) -> tuple[PairSource, list[Part]]:
    """(all pairs of a recipe's training sources, the sources); rows of later ones are counted on.

    Raises:
        DataError: a source cannot be used.
    """
    read = [read_pairs(one, seed=data.split_seed) for one in data.sources]
    weights = [one.weight if isinstance(one, WeightedSource) else None for one in data.sources]
    whole = sum(weight for weight in weights if weight is not None)
    parts: list[Part] = []
    pairs: list[Pair] = []
    refused = []
    first = 0
    for source, weight in zip(read, weights, strict=True):
        parts.append(Part(source.name, first, None if weight is None else weight / whole))
        pairs += [replace(pair, row=pair.row + first) if first else pair for pair in source.pairs]
        refused += [replace(one, row=one.row + first) if first else one for one in source.refused]
        first = 1 + max([pair.row for pair in pairs] + [one.row for one in refused])
    if len(read) == 1:
        return read[0], parts
    name, shape = (" + ".join(dict.fromkeys(values)) for values in (map(_name, read), (one.format for one in read)))
    return PairSource(name, shape, sum(one.rows for one in read), pairs, refused), parts


def _name(source: PairSource) -> str:
    return source.name


def shares(pairs: Sequence[Pair], parts: Sequence[Part], *, seed: int) -> tuple[list[Pair], dict[str, int]]:
    """(the pairs of an epoch, how many of each source): as many as the weights allow without a pair twice.

    The source that is scarcest for its weight gives all its pairs, each other one a seeded sample of its own.
    """
    of_part: list[list[Pair]] = [[] for _ in parts]
    for pair in pairs:
        place = max(at for at, part in enumerate(parts) if part.first_row <= pair.row)
        of_part[place].append(pair)
    weights = [part.weight for part in parts if part.weight is not None]
    if weights:
        whole = min(len(found) / weight for found, weight in zip(of_part, weights, strict=True))
        counts = [min(len(found), round(whole * weight)) for found, weight in zip(of_part, weights, strict=True)]
        of_part = [
            [pair for _, pair in sample(enumerate(found), count, seed=seed)]
            for found, count in zip(of_part, counts, strict=True)
        ]
    kept = [pair for found in of_part for pair in found]
    return kept, {part.name: len(found) for part, found in zip(parts, of_part, strict=True)}
