"""Products in FP8 with weights that lose nothing: a GPTQ weight is a small integer times its group's scale.

Four bits less a zero point are an integer of at most 15 in size, which e4m3 holds exactly, and with groups of 128
inputs GPTQ's scales are the block scales of the hardware's own product. So only activations are rounded (each block of
128 has its scale). Hopper and later.

Shapes: M = rows of activations, K = inputs, N = outputs, G = groups of 128 inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from dpo_studio.frozen.gptq import Packed

__all__ = ["Block8", "device_obstacle", "fp8_obstacle", "fp8_rows", "fp8_weight"]

FP8_BLOCK = 128
"""Inputs that share a scale."""
_ROWS = 16
"""The product wants rows in multiples of it."""


@dataclass(frozen=True)
class Block8:
    """A weight for FP8 products, a byte each: e4m3 holds integer - zero point exactly, and the scales are by blocks."""

    tag: ClassVar[str] = "fp8"
    integers_NK: Tensor
    """float8_e4m3fn."""
    scales_NG: Tensor
    """float32, outputs next to each other in memory, as the product wants them."""

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.integers_NK.shape[0], self.integers_NK.shape[1]

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """(N, K), scale x integer, rounded once: the same as the packed weight's."""
        if self.integers_NK.is_cuda:
            from dpo_studio.frozen.kernels import scaled_integers

            return scaled_integers(self.integers_NK, self.scales_NG, dtype)
        return self.exact(dtype)

    def plain(self, dtype: torch.dtype) -> Tensor:
        """(N, K) by plain torch: what `dequantised` gives."""
        return self.exact(dtype)

    def exact(self, dtype: torch.dtype) -> Tensor:
        """(N, K) by plain torch, exact before it is rounded to `dtype`."""
        blocks = self.integers_NK.float().view(*self.scales_NG.shape, -1)
        return blocks.mul_(self.scales_NG[..., None]).to(dtype).view(self.integers_NK.shape)

    def product(self, x8_MK: Tensor, x_scales_MG: Tensor) -> Tensor:
        """x W^T, (M, N) bfloat16, accumulated in fp32; x as `fp8_rows` gives it."""
        from torch.nn.functional import ScalingType, scaled_mm

        return scaled_mm(
            x8_MK,
            self.integers_NK.t(),
            x_scales_MG,
            ScalingType.BlockWise1x128,
            self.scales_NG,
            ScalingType.BlockWise1x128,
            output_dtype=torch.bfloat16,
        )

    def rows(self, count: int) -> Block8:
        """The first outputs alone, for `exact`: the kernels want scales without gaps."""
        return Block8(self.integers_NK[:count], self.scales_NG[:count])

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that a layer keeps and an operator gets, in the order in which `taken` reads them."""
        return {"integers_NK": self.integers_NK, "scales_NG": self.scales_NG}

    def numbers(self) -> list[int]:
        """The numbers that an operator needs besides the tensors."""
        return []

    @classmethod
    def taken(cls, tensors: Iterator[Tensor], numbers: Iterator[int]) -> Block8:
        """The weight read from the next of `tensors`."""
        return cls(next(tensors), next(tensors))


def fp8_obstacle(inputs: int, outputs: int, bits: int, group_size: int, act_order: bool) -> str | None:
    """Why a layer's products cannot be computed in FP8 without loss; None if they can."""
    if bits > 4:
        return f"{bits} bits do not fit in e4m3"
    if act_order:
        return "act-order mixes the groups of neighbouring inputs"
    if group_size != FP8_BLOCK or inputs % FP8_BLOCK or outputs % _ROWS:
        return f"its groups of {group_size} of {inputs} inputs are not blocks of {FP8_BLOCK}"
    return None


def device_obstacle(device: torch.device) -> str | None:
    """Why this device cannot compute them; None if it can."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return "needs an NVIDIA GPU of the Hopper generation or later"
    return None


def fp8_rows(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """Activations as e4m3 and the scales of their blocks, rows filled up to what the product wants."""
    from dpo_studio.frozen.kernels import fp8_rows as rows_to_fp8

    missing = -len(x_MK) % _ROWS
    return rows_to_fp8(pad(x_MK, (0, 0, 0, missing)) if missing else x_MK, FP8_BLOCK)


def fp8_weight(weight: Packed) -> Block8:
    """The weight with a byte for each integer: twice the packed size, and no work before each product."""
    from dpo_studio.frozen.kernels import fp8_integers

    integers_NK = fp8_integers(
        weight.words_NW, weight.scales_NG, weight.zeros_NG, weight.group_K, weight.bits, weight.group_size
    )
    return Block8(integers_NK, weight.scales_NG.t().float().contiguous().t())
