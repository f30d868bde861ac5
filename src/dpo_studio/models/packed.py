"""Frozen weights, dense or packed: what a product with them needs, and how packed ones are formed.

A packed weight is GPTQ's: integers of a few bits in a row of int32 words, and for every group of inputs an fp16 scale
and a zero point. The weight is scale x (integer - zero point), formed exactly in fp32 and rounded once: to bfloat16
under bfloat16, else to float16, the precision of the checkpoint.

Operators take flat lists of tensors and numbers; `flatten` and `unflatten` turn weights into those and back.

Shapes: N = outputs, K = inputs, W = words of a row (K x bits / 32), G = groups of inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

__all__ = ["Block8", "Dense", "Frozen", "Packed", "flatten", "unflatten", "unpack"]

_ELEMENTS_AT_ONCE = 1 << 19
"""Of a weight formed on a CPU: what is between integers and result stays in a core's cache (2 MB in fp32)."""
_NUMBERS = 3
"""Numbers that say what a flattened weight is."""


@dataclass(frozen=True)
class Dense:
    """A weight as it is."""

    weight_NK: Tensor

    def formed(self, dtype: torch.dtype) -> Tensor:
        """(N, K)."""
        return self.weight_NK

    def tensors(self) -> list[Tensor]:
        """What an operator is given."""
        return [self.weight_NK]

    def numbers(self) -> list[int]:
        """What it must know besides."""
        return [1, 0, 0]


@dataclass(frozen=True)
class Packed:
    """A weight as GPTQ keeps it, rows of words along the inputs."""

    words_NW: Tensor
    """int32. Input k of output n is `bits` bits of row n, from bit k x bits on, the lowest bit of a word first."""
    scales_NG: Tensor
    """float16."""
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

    def formed(self, dtype: torch.dtype) -> Tensor:
        """(N, K), scale x (integer - zero point), rounded once; float32 stays as exact as float16 is."""
        rounded = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
        if self.words_NW.is_cuda and _has_triton():
            from dpo_studio.models.kernels import dequantise

            return dequantise(self, rounded).to(dtype)
        return self.exact(rounded).to(dtype)

    def exact(self, dtype: torch.dtype) -> Tensor:
        """(N, K) by plain torch, exact before it is rounded to `dtype`; float32 is not rounded."""
        outputs, inputs = self.shape
        out_NK = torch.empty(outputs, inputs, dtype=dtype, device=self.words_NW.device)
        rows = max(1, _ELEMENTS_AT_ONCE // inputs) if out_NK.device.type == "cpu" else outputs
        for start in range(0, outputs, rows):
            at = slice(start, start + rows)
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

    def tensors(self) -> list[Tensor]:
        """What an operator is given."""
        group = [] if self.group_K is None else [self.group_K]
        return [self.words_NW, self.scales_NG, self.zeros_NG, *group]

    def numbers(self) -> list[int]:
        """What it must know besides."""
        return [3 if self.group_K is None else 4, self.bits, self.group_size]


@dataclass(frozen=True)
class Block8:
    """A weight for FP8 products, a byte each: e4m3 holds integer - zero point exactly, and the scales are by blocks."""

    integers_NK: Tensor
    """float8_e4m3fn."""
    scales_NG: Tensor
    """float32, outputs next to each other in memory, as the product wants them."""

    def formed(self, dtype: torch.dtype) -> Tensor:
        """(N, K), scale x integer, rounded once: the same as the packed weight's."""
        if self.integers_NK.is_cuda:
            from dpo_studio.models.kernels import scaled_integers

            return scaled_integers(self, dtype)
        blocks = self.integers_NK.float().view(*self.scales_NG.shape, -1)
        return blocks.mul_(self.scales_NG[..., None]).to(dtype).view(self.integers_NK.shape)

    def tensors(self) -> list[Tensor]:
        """What an operator is given."""
        return [self.integers_NK, self.scales_NG]

    def numbers(self) -> list[int]:
        """What it must know besides."""
        return [2, 0, 0]


Frozen = Dense | Packed | Block8
"""What a frozen weight may be."""


def flatten(weights: Sequence[Frozen]) -> tuple[list[Tensor], list[int]]:
    """Weights as an operator takes them."""
    tensors = [tensor for weight in weights for tensor in weight.tensors()]
    return tensors, [number for weight in weights for number in weight.numbers()]


def unflatten(tensors: Sequence[Tensor], numbers: Sequence[int]) -> Iterator[Frozen]:
    """The weights that were flattened, in their order."""
    rest = list(tensors)
    for at in range(0, len(numbers), _NUMBERS):
        count, bits, group_size = numbers[at : at + _NUMBERS]
        mine, rest = rest[:count], rest[count:]
        if bits:
            yield Packed(mine[0], mine[1], mine[2], mine[3] if count > 3 else None, bits, group_size)
        else:
            yield Dense(mine[0]) if count == 1 else Block8(mine[0], mine[1])


def unpack(words_NW: Tensor, bits: int) -> Tensor:
    """The integers of each row of words, uint8, (N, W x 32 / bits): a stream of fields, the lowest bits first.

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
def _has_triton() -> bool:
    return find_spec("triton") is not None
