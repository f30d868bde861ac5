"""Texts that nearly repeat one another, among hundreds of thousands, by MinHash.

The share of places at which two signatures agree estimates the Jaccard similarity of the texts' sets of 8-byte pieces,
J = |A and B| / |A or B|. Pieces of bytes need no words, so Chinese is searched like English. One hash a piece fills a
signature (one permutation hashing): it chooses a place, which keeps its least value, and a place that no piece chose
borrows from the next that has one (Shrivastava and Li 2014, arXiv 1406.4784). Two texts are compared when they agree
in all 6 places of one of 21 bands: with J = 0.8 that happens in 998 of 1,000 cases.

A signature of 700 words takes 0.06 ms. datasketch 2.0 takes 0.45 (64 places, crc32) to 1.15 (128, its own sha1): half a
minute to more than one for 60,000 pairs (benchmarks/data_check.py).

Shapes: N texts, K places of a signature.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["SIMILAR", "K", "Signatures", "filled", "nearest", "signature", "similarity"]

Signatures = NDArray[np.uint32]

K = 128
SIMILAR = 0.8
"""From which similarity on two texts are nearly the same. Its estimate has a standard error of 0.035 there."""

_ROWS = 6
_BANDS = K // _ROWS
_EMPTY = np.uint32(0xFFFFFFFF)
_PIECE = 8
_PLACE = np.uint64(64 - 7)  # the top 7 bits of a hash choose one of 128 places
_VALUE = np.uint64(20)
_HALF = np.uint64(32)
_ODD, _ODDER = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)
_FAR = np.uint32(0x9E3779B1)


def signature(text: str) -> Signatures:
    """(K,) the least hash at each place, 2^32 - 1 where no piece fell. Case and white space do not count.

    The signature of two texts together is the element-wise minimum of theirs. `filled` makes signatures comparable.
    """
    content = " ".join(text.lower().split()).encode("utf-8", "surrogatepass").ljust(_PIECE)
    pieces: NDArray[np.uint64] = np.ndarray((len(content) - _PIECE + 1,), "<u8", content, strides=(1,))
    hashes = pieces * _ODD
    hashes ^= hashes >> _HALF
    hashes *= _ODDER
    least = np.full(K, _EMPTY, np.uint32)
    np.minimum.at(least, (hashes >> _PLACE).astype(np.intp), (hashes >> _VALUE).astype(np.uint32))
    return least


def filled(signatures_NK: Signatures) -> Signatures:
    """(N, K) with each empty place filled from the next that is not, counted round, marked by how far that was."""
    for start in range(0, len(signatures_NK), 256):  # intermediate values take 8 KB a text
        part_NK = signatures_NK[start : start + 256]
        if (part_NK == _EMPTY).any():
            signatures_NK[start : start + 256] = _borrowed(part_NK)
    return signatures_NK


def _borrowed(part_NK: Signatures) -> Signatures:
    places = np.arange(2 * K)
    known_N2K = np.where(np.tile(part_NK, 2) != _EMPTY, places, 2 * K)
    source_NK = np.minimum.accumulate(known_N2K[:, ::-1], axis=1)[:, ::-1][:, :K]
    distance_NK = (source_NK - places[:K]).astype(np.uint32)
    return np.asarray(np.take_along_axis(part_NK, source_NK % K, axis=1) + distance_NK * _FAR, np.uint32)


def similarity(one_NK: Signatures, other_NK: Signatures) -> NDArray[np.float64]:
    """(N,) the estimated Jaccard similarity of each text with its counterpart, from filled signatures."""
    return np.asarray((one_NK == other_NK).mean(axis=-1), np.float64)


def nearest(
    signatures_NK: Signatures, *, known: int | None = None, groups_N: NDArray[np.int64] | None = None
) -> NDArray[np.int64]:
    """(N,) for each text the place of an earlier one that is nearly the same, or -1.

    With `known`, the texts from there on are looked up among the first `known` alone. With `groups_N`, texts are
    compared within their group. Of the texts that share a band, the first and the one before are compared: every text
    that repeats the first of its kind is found.
    """
    count = len(signatures_NK)
    best_N, twin_N = np.full(count, SIMILAR), np.full(count, -1, np.int64)
    for band in range(_BANDS if count > 1 else 0):
        keys_N = _band_keys(signatures_NK[:, band * _ROWS : (band + 1) * _ROWS], groups_N)
        order = np.argsort(keys_N, kind="stable")  # texts of equal keys stay in order
        starts = np.r_[True, keys_N[order][1:] != keys_N[order][:-1]]
        first = order[np.maximum.accumulate(np.where(starts, np.arange(count), 0))]
        before = np.where(starts, order, np.r_[order[:1], order[:-1]])
        for candidate in (first, before):
            asked = candidate < order if known is None else (candidate < known) & (order >= known)
            texts, others = order[asked], candidate[asked]
            alike = similarity(signatures_NK[texts], signatures_NK[others])
            better = (alike > best_N[texts]) | ((alike >= SIMILAR) & (twin_N[texts] < 0))
            best_N[texts[better]], twin_N[texts[better]] = alike[better], others[better]
    return twin_N


def _band_keys(band_NR: Signatures, groups_N: NDArray[np.int64] | None) -> NDArray[np.uint64]:
    """(N,) a number that is the same for the same places and group, and else but for one case in 2^64 another."""
    keys_N = np.zeros(len(band_NR), np.uint64) if groups_N is None else groups_N.astype(np.uint64) * _ODDER
    for column in range(_ROWS):
        keys_N = (keys_N ^ band_NR[:, column]) * _ODD
        keys_N ^= keys_N >> _HALF
    return keys_N
