"""How much answers repeat themselves, and how much they are all alike. Words here are runs of letters and digits."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import chain
from statistics import fmean

__all__ = ["distinct_n", "repetition"]

_RUN = 4
"""Words in a row that count as said again: fewer recur in any prose ("a lot of", "one of the")."""


def repetition(texts: Sequence[str]) -> float | None:
    """Share of an answer's runs of four words that it had said before, averaged over the answers; None of none."""
    shares = [1 - len(set(runs)) / len(runs) if (runs := _runs(text, _RUN)) else 0.0 for text in texts]
    return fmean(shares) if shares else None


def distinct_n(texts: Iterable[str], n: int) -> float | None:
    """Different runs of n words over all of them, the answers taken together (Li et al., arXiv 1510.03055).

    It falls as there is more text, whatever is said: compare only sets of answers to the same prompts, and mind their
    lengths. None where no answer has n words.
    """
    runs = list(chain.from_iterable(_runs(text, n) for text in texts))
    return len(set(runs)) / len(runs) if runs else None


def _runs(text: str, n: int) -> list[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
