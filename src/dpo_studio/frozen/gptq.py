"""GPTQ's packed integers: a few bits each in a row of int32 words, and for every group of inputs an fp16 scale and a
zero point. Other formats' integers are put in the same order when they are loaded (AWQ).

The weight is scale x (integer - zero point), dequantised exactly in fp32 and rounded once: to bfloat16 under bfloat16,
else to the precision of the checkpoint's scales, which is float16.

Shapes: N = outputs, K = inputs, W = words of a row (K x bits / 32), G = groups of inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from dpo_studio.frozen.dequantising import has_triton, rows_at_once, unpack

__all__ = ["Packed"]


@dataclass(frozen=True)
class Packed:
    """A weight as GPTQ stores it, rows of packed int32 words along the inputs."""

    tag: ClassVar[str] = "gptq"
    words_NW: Tensor
    """int32. Input k of output n is `bits` bits of row n, from bit k x bits on, the lowest bit of a word first."""
    scales_NG: Tensor
    """float16; of some AWQ checkpoints bfloat16."""
    zeros_NG: Tensor
    """uint8, the zero points themselves."""
    group_K: Tensor | None
    """int32, the group of each input where that is not k // group_size (act-order)."""
    bits: int
    group_size: int

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.words_NW.shape[0], self.words_NW.shape[1] * 32 // self.bits

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """(N, K), scale x (integer - zero point), rounded once; float32 stays as exact as float16 is."""
        if self.words_NW.is_cuda and has_triton():
            from dpo_studio.frozen.kernels import dequantise

            return dequantise(
                self.words_NW,
                self.scales_NG,
                self.zeros_NG,
                self.group_K,
                self.bits,
                self.group_size,
                self._rounded_to(dtype),
            ).to(dtype)
        return self.plain(dtype)

    def plain(self, dtype: torch.dtype) -> Tensor:
        """(N, K) by plain torch: what `dequantised` gives."""
        return self.exact(self._rounded_to(dtype)).to(dtype)

    def exact(self, dtype: torch.dtype) -> Tensor:
        """(N, K) by plain torch, exact before it is rounded to `dtype`; float32 is not rounded."""
        outputs, inputs = self.shape
        out_NK = torch.empty(outputs, inputs, dtype=dtype, device=self.words_NW.device)
        for at in rows_at_once(out_NK):
            steps = unpack(self.words_NW[at], self.bits).float()
            scales, zeros = self.scales_NG[at].float(), self.zeros_NG[at].float()
            if self.group_K is None:
                steps = steps.view(len(scales), -1, self.group_size)
                values = steps.sub_(zeros[..., None]).mul_(scales[..., None])
            else:
                group_K = self.group_K.long()
                values = steps.sub_(zeros[:, group_K]).mul_(scales[:, group_K])
            out_NK[at] = values.view(-1, inputs)
        return out_NK

    def rows(self, count: int) -> Packed:
        """The first outputs alone."""
        words_NW, scales_NG, zeros_NG = self.words_NW[:count], self.scales_NG[:count], self.zeros_NG[:count]
        return replace(self, words_NW=words_NW, scales_NG=scales_NG, zeros_NG=zeros_NG)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that a layer keeps and an operator gets, in the order in which `taken` reads them."""
        tensors = {"words_NW": self.words_NW, "scales_NG": self.scales_NG, "zeros_NG": self.zeros_NG}
        if self.group_K is not None:
            tensors["group_K"] = self.group_K
        return tensors

    def numbers(self) -> list[int]:
        """The numbers that an operator needs besides the tensors."""
        return [self.bits, self.group_size, int(self.group_K is not None)]

    @classmethod
    def taken(cls, tensors: Iterator[Tensor], numbers: Iterator[int]) -> Packed:
        """The weight read from the next of `tensors` and `numbers`."""
        bits, group_size, act_order = next(numbers), next(numbers), next(numbers)
        words_NW, scales_NG, zeros_NG = next(tensors), next(tensors), next(tensors)
        return cls(words_NW, scales_NG, zeros_NG, next(tensors) if act_order else None, bits, group_size)

    def _rounded_to(self, dtype: torch.dtype) -> torch.dtype:
        """The precision that a weight is formed in for a product in `dtype`."""
        return torch.bfloat16 if dtype == torch.bfloat16 else self.scales_NG.dtype
