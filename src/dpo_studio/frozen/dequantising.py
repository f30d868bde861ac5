"""What the kinds of frozen weight share for dequantising: unpacked fields, rows that fit a cache, Triton or not.

Shapes: N = outputs, K = inputs, W = packed int32 words of a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

__all__ = ["has_triton", "rows_at_once", "slices_at_once", "unpack"]

_ELEMENTS_AT_ONCE = 1 << 19
"""Elements that a CPU dequantises at a time: the intermediate values stay in a core's cache (2 MB in fp32)."""


_ELEMENTS_OF_A_GPU = 1 << 26
"""A quarter of a gigabyte in fp32, where a weight of a 70B would take a whole one, some times over."""


def rows_at_once(out_NK: Tensor) -> Iterator[slice]:
    """The rows of a weight to dequantise together: some at a time on a CPU, all at once elsewhere."""
    outputs, inputs = out_NK.shape
    rows = max(1, _ELEMENTS_AT_ONCE // inputs) if out_NK.device.type == "cpu" else outputs
    yield from (slice(start, start + rows) for start in range(0, outputs, rows))


def slices_at_once(flat: Tensor, block: int) -> Iterator[slice]:
    """Slices of a flat weight to work on together, each of which begins with a block."""
    count = len(flat)
    at_once = _ELEMENTS_AT_ONCE if flat.device.type == "cpu" else _ELEMENTS_OF_A_GPU
    at_once = max(block, at_once // block * block)
    yield from (slice(start, min(start + at_once, count)) for start in range(0, count, at_once))


def unpack(words_NW: Tensor, bits: int) -> Tensor:
    """The integers packed in each row of words, uint8, (N, W x 32 / bits): a stream of fields, the lowest bits first.

    Three bits do not divide a word: eight fields fill three bytes, and cross the words' ends where they must.
    """
    bytes_NB = words_NW.contiguous().view(torch.uint8)
    if bits == 8:
        return bytes_NB
    if bits == 3:
        thrice = bytes_NB.view(len(bytes_NB), -1, 3).int()
        together = thrice[..., 0] | thrice[..., 1] << 8 | thrice[..., 2] << 16
        shifts = torch.arange(0, 24, 3, dtype=torch.int32, device=words_NW.device)
        return (together[..., None] >> shifts & 7).to(torch.uint8).flatten(1)
    fields = torch.empty(*bytes_NB.shape, 8 // bits, dtype=torch.uint8, device=words_NW.device)
    for field in range(8 // bits):
        torch.bitwise_right_shift(bytes_NB, field * bits, out=fields[..., field])
    return fields.bitwise_and_(2**bits - 1).flatten(1)


@cache
def has_triton() -> bool:
    """Whether Triton kernels can dequantise a weight."""
    return find_spec("triton") is not None
