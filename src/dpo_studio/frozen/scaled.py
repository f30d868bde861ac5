"""Weights of eight bits with a scale for each block of them: FP8 (e4m3) in blocks, by rows or whole, and int8 by rows.

A weight is scale x value in fp32, rounded once: to bfloat16 under bfloat16, else to the precision of the scales. int8
of bitsandbytes (LLM.int8(), arXiv 2208.07339) has the largest size of a row in the place of the scale: there the
product, rounded to fp32, is multiplied by 1/127, rounded once more, and then goes to the precision of the matrix
product.

Shapes: N = outputs, K = inputs, R = rows of blocks, C = columns of blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from dpo_studio.frozen.dequantising import has_triton, rows_at_once

__all__ = ["Scaled", "quantise_fp8"]

_BLOCK = 128
"""Outputs and inputs that share a scale where we quantise: DeepSeek's own number."""
_LARGEST = 448.0
"""Of e4m3."""
_OF_127 = 7.874015718698502e-3
"""1/127, as bitsandbytes writes it."""


@dataclass(frozen=True)
class Scaled:
    """A weight of eight bits, (N, K), and its scales."""

    tag: ClassVar[str] = "scaled"
    values_NK: Tensor
    """float8_e4m3fn or int8."""
    scales_RC: Tensor
    """float32, bfloat16 or float16."""
    block: tuple[int, int]
    """Outputs and inputs of a block; the last ones may be smaller."""
    of_127: bool = False
    """Whether a scale is the size that 127 stands for."""

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.values_NK.shape[0], self.values_NK.shape[1]

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """(N, K), in `dtype`."""
        rounded_to = self._rounded_to(dtype)
        if self.values_NK.is_cuda and has_triton() and self._has_kernel():
            from dpo_studio.frozen.kernels import dequantise_scaled

            factor = _OF_127 if self.of_127 else 1.0
            return dequantise_scaled(self.values_NK, self.scales_RC, self.block, factor, rounded_to).to(dtype)
        return self.plain(dtype)

    def plain(self, dtype: torch.dtype) -> Tensor:
        """(N, K) by plain torch: what `dequantised` gives."""
        return self.exact(self._rounded_to(dtype)).to(dtype)

    def exact(self, dtype: torch.dtype) -> Tensor:
        """(N, K) by plain torch, in fp32 before it is rounded to `dtype`."""
        height, width = self.block
        out_NK = torch.empty(self.shape, dtype=dtype, device=self.values_NK.device)
        for at in rows_at_once(out_NK):
            values = self.values_NK[at].float()
            row_blocks = torch.arange(at.start, at.start + len(values), device=values.device) // height
            scales = self.scales_RC[row_blocks].float()
            if scales.shape[1] > 1:
                scales = scales.repeat_interleave(width, 1)[:, : values.shape[1]]
            values.mul_(scales)
            out_NK[at] = values.mul_(_OF_127) if self.of_127 else values
        return out_NK

    def rows(self, count: int) -> Scaled:
        """The first outputs alone."""
        return replace(self, values_NK=self.values_NK[:count], scales_RC=self.scales_RC[: -(-count // self.block[0])])

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that a layer keeps and an operator gets, in the order in which `taken` reads them."""
        return {"values_NK": self.values_NK, "scales_RC": self.scales_RC}

    def numbers(self) -> list[int]:
        """The numbers that an operator needs besides the tensors."""
        return [*self.block, int(self.of_127)]

    @classmethod
    def taken(cls, tensors: Iterator[Tensor], numbers: Iterator[int]) -> Scaled:
        """The weight read from the next of `tensors` and `numbers`."""
        height, width, of_127 = next(numbers), next(numbers), next(numbers)
        return cls(next(tensors), next(tensors), (height, width), bool(of_127))

    def _rounded_to(self, dtype: torch.dtype) -> torch.dtype:
        """The precision that a weight is formed in for a product in `dtype`."""
        return torch.bfloat16 if dtype == torch.bfloat16 else self.scales_RC.dtype

    def _has_kernel(self) -> bool:
        """Triton reads e4m3 from Ada on."""
        return self.values_NK.dtype == torch.int8 or torch.cuda.get_device_capability(self.values_NK.device) >= (8, 9)


def quantise_fp8(weight_NK: Tensor) -> Scaled:
    """A weight in e4m3, in blocks of 128 x 128: the bits that transformers makes of it.

    The factor of a block is 448 times the reciprocal of its largest size (each rounded to fp32; 1 for zeros). Each
    weight times the factor (in fp32, rounded) becomes e4m3, nearest, ties to even; the scale is the factor's
    reciprocal. Blocks at the edges are of what is there.
    """
    outputs, inputs = weight_NK.shape
    values_NK = torch.empty(outputs, inputs, dtype=torch.float8_e4m3fn, device=weight_NK.device)
    scales = []
    for start in range(0, outputs, _BLOCK):  # a row of blocks at a time, so that fp32 is never the whole weight
        rows = weight_NK[start : start + _BLOCK].float()
        blocks = pad(rows, (0, -inputs % _BLOCK)).view(len(rows), -1, _BLOCK)
        largest_C = blocks.abs().amax((0, 2))
        factors_C = torch.where(largest_C > 0, _LARGEST / largest_C, 1.0)
        scaled = (blocks * factors_C[:, None]).clamp_(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
        values_NK[start : start + _BLOCK] = scaled.flatten(1)[:, :inputs]
        scales.append(1 / factors_C)
    return Scaled(values_NK, torch.stack(scales), (_BLOCK, _BLOCK))
