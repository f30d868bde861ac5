"""NF4 of bitsandbytes: four bits a weight that name one of sixteen levels, and a scale for each block of weights.

A weight is level x scale in fp32, rounded once to the precision of the product it is formed for, as in bitsandbytes'
own products (its `dequantize_4bit` alone rounds to the precision the weights once had, and goes on from there). The
levels are quantiles of a normal distribution (QLoRA, arXiv 2305.14314, appendix E). Blocks are of neighbours in the
flat weight: they may go over the end of a row. Under double quantisation a scale is itself an 8-bit name of one of 256
levels, times the scale of its own block (a product in fp32, rounded), plus the mean of all scales (a sum in fp32,
rounded).

Shapes: N = outputs, K = inputs, B = blocks, C = blocks of scales.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from dpo_studio.frozen.dequantising import has_triton, slices_at_once

__all__ = ["NF4_LEVELS", "Doubled", "Nf4", "quantise_nf4"]

NF4_LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)

_BLOCK = 64
"""Weights that share a scale where we quantise: bitsandbytes' own number."""
_SMALLEST = 1e-38
"""The smallest scale that is divided by: blocks of zeros stay zeros."""


@dataclass(frozen=True)
class Doubled:
    """What double quantisation needs besides the scales' own bytes."""

    scales_C: Tensor
    """float32."""
    levels_256: Tensor
    """float32."""
    mean: Tensor
    """float32, one number."""
    block: int
    """Scales that share a scale."""


@dataclass(frozen=True)
class Nf4:
    """A weight as bitsandbytes stores it: two names of levels a byte, the first in the high half."""

    tag: ClassVar[str] = "nf4"
    bytes_P: Tensor
    """uint8, N x K / 2 of them."""
    scales_B: Tensor
    """float32; the names of their levels, uint8, where they are quantised themselves."""
    doubled: Doubled | None
    shape: tuple[int, int]
    """(N, K), K even."""
    block: int
    """Weights that share a scale: a power of two."""

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """(N, K), in `dtype`."""
        if self.bytes_P.is_cuda and has_triton():
            from dpo_studio.frozen.kernels import dequantise_nf4

            return dequantise_nf4(
                self.bytes_P,
                _levels(self.bytes_P.device),
                self.scales_B,
                (self.doubled.scales_C, self.doubled.levels_256, self.doubled.mean) if self.doubled else None,
                self.doubled.block if self.doubled else 1,
                self.shape,
                self.block,
                dtype,
            )
        return self.exact(dtype)

    def plain(self, dtype: torch.dtype) -> Tensor:
        """(N, K) by plain torch: what `dequantised` gives."""
        return self.exact(dtype)

    def exact(self, dtype: torch.dtype) -> Tensor:
        """(N, K) by plain torch, level x scale in fp32 before it is rounded to `dtype`."""
        pairs = _levels(self.bytes_P.device)[_names_of_bytes(self.bytes_P.device)]
        out = torch.empty(self.count, dtype=dtype, device=self.bytes_P.device)
        scales_B = self._scales()
        for at in slices_at_once(out, self.block):
            values = pairs[self.bytes_P[at.start // 2 : at.stop // 2].int()].flatten()
            scales = scales_B[at.start // self.block : -(-at.stop // self.block)].repeat_interleave(self.block)
            values.mul_(scales[: len(values)])
            out[at] = values
        return out.view(self.shape)

    @property
    def count(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]

    def rows(self, count: int) -> Nf4:
        """The first outputs alone."""
        outputs = min(count, self.shape[0])
        weights = outputs * self.shape[1]
        bytes_P, scales_B = self.bytes_P[: weights // 2], self.scales_B[: -(-weights // self.block)]
        return replace(self, bytes_P=bytes_P, scales_B=scales_B, shape=(outputs, self.shape[1]))

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that a layer keeps and an operator gets, in the order in which `taken` reads them."""
        tensors = {"bytes_P": self.bytes_P, "scales_B": self.scales_B}
        if self.doubled:
            tensors |= {"scales_C": self.doubled.scales_C, "levels_256": self.doubled.levels_256}
            tensors["mean"] = self.doubled.mean
        return tensors

    def numbers(self) -> list[int]:
        """The numbers that an operator needs besides the tensors."""
        block = self.doubled.block if self.doubled else 0
        return [*self.shape, self.block, block]

    @classmethod
    def taken(cls, tensors: Iterator[Tensor], numbers: Iterator[int]) -> Nf4:
        """The weight read from the next of `tensors` and `numbers`."""
        outputs, inputs, block, nested = next(numbers), next(numbers), next(numbers), next(numbers)
        bytes_P, scales_B = next(tensors), next(tensors)
        doubled = Doubled(next(tensors), next(tensors), next(tensors), nested) if nested else None
        return cls(bytes_P, scales_B, doubled, (outputs, inputs), block)

    def _scales(self) -> Tensor:
        """(B,) float32."""
        if self.doubled is None:
            return self.scales_B
        by_block = self.doubled.scales_C.repeat_interleave(self.doubled.block)[: len(self.scales_B)]
        return self.doubled.levels_256[self.scales_B.int()] * by_block + self.doubled.mean


def quantise_nf4(weight_NK: Tensor) -> Nf4:
    """A weight in NF4, without double quantisation: the bits that bitsandbytes makes of it on a CPU.

    A block's scale is its largest size; each weight times the scale's reciprocal (in fp32, rounded; in a last block
    that is not full: divided by the scale) gets the level that is nearest, the lower one of two as near.

    Raises:
        ValueError: an odd number of inputs.
    """
    if weight_NK.shape[1] % 2:
        raise ValueError(f"NF4 has two weights a byte, and there are {weight_NK.shape[1]} inputs")
    flat = weight_NK.flatten()
    levels = _levels(flat.device)
    middles = ((levels[:-1] + levels[1:]) / 2).tolist()
    bytes_P = torch.empty(len(flat) // 2, dtype=torch.uint8, device=flat.device)
    scales_B = torch.empty(-(-len(flat) // _BLOCK), dtype=torch.float32, device=flat.device)
    for at in slices_at_once(flat, _BLOCK):
        part = flat[at].float()
        whole = len(part) // _BLOCK
        blocks = part[: whole * _BLOCK].view(whole, _BLOCK)
        scales = blocks.abs().amax(1)
        scaled = (blocks * (1 / scales.clamp(min=_SMALLEST))[:, None]).clamp_(-1, 1).flatten()
        if len(part) % _BLOCK:
            rest = part[whole * _BLOCK :]
            scale = rest.abs().amax().clamp(min=_SMALLEST)
            scales, scaled = torch.cat([scales, scale[None]]), torch.cat([scaled, (rest / scale).clamp_(-1, 1)])
        names = torch.zeros(len(scaled), dtype=torch.uint8, device=flat.device)
        for middle in middles:  # three times as fast on a CPU as torch.bucketize
            names += scaled > middle
        bytes_P[at.start // 2 : at.stop // 2] = names[::2] << 4 | names[1::2]
        scales_B[at.start // _BLOCK : -(-at.stop // _BLOCK)] = scales
    return Nf4(bytes_P, scales_B, None, (weight_NK.shape[0], weight_NK.shape[1]), _BLOCK)


@cache
def _levels(device: torch.device) -> Tensor:
    return torch.tensor(NF4_LEVELS, dtype=torch.float32, device=device)


@cache
def _names_of_bytes(device: torch.device) -> Tensor:
    """The two names in each byte, (256, 2)."""
    bytes_256 = torch.arange(256, device=device)
    return torch.stack([bytes_256 >> 4, bytes_256 & 15], 1)
