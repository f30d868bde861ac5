"""How much answers repeat themselves, and how much they resemble each other. A word is a run of letters and digits."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import chain
from statistics import fmean

__all__ = ["distinct_n", "repetition"]

_N = 4
"""The n of the n-grams whose repetition counts: shorter ones recur in any prose ("a lot of", "one of the")."""


def repetition(texts: Sequence[str]) -> float | None:
    """Share of an answer's 4-grams that occurred in it before, averaged over the answers; None without answers."""
    shares = [1 - len(set(grams)) / len(grams) if (grams := _ngrams(text, _N)) else 0.0 for text in texts]
    return fmean(shares) if shares else None


def distinct_n(texts: Iterable[str], n: int) -> float | None:
    """Different n-grams over all n-grams, of all answers together (Li et al., arXiv 1510.03055).

    It falls as the text gets longer: compare only sets of answers to the same prompts, of similar lengths. None where
    no answer has n words.
    """
    grams = list(chain.from_iterable(_ngrams(text, n) for text in texts))
    return len(set(grams)) / len(grams) if grams else None


def _ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
