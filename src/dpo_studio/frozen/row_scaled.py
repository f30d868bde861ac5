"""Frozen dense weights in FP8, forward and backward: e4m3 with one fp32 scale a row.

Both sides of a product are rounded: activations (and, backward, gradients) with a scale for each row, weights with a
scale for each output, and, transposed for dL/dx = g W, with a scale for each input. e4m3's own exponent covers 2^15
between the smallest normal value and the largest of a row, so a few large values do not push the others to zero, as
they would in int8. Two bytes a weight with both orientations, as in bf16, which is not kept.

On a GPU the adapter's part is computed by the same product: `adapter_columns` puts x A^T behind x and B behind W.

Shapes: M = rows of activations, K = inputs, N = outputs, E = room for an adapter's columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["MULTIPLE", "ROOM", "RowScaled", "row_scaled", "row_scaled_obstacle", "scaled_product"]

MULTIPLE = 16
"""The product wants inputs and outputs in multiples of it."""
ROOM = 256
"""Columns behind each row of a weight on a GPU, 5 % of a 7B: three for each rank of the layers that read one input, so
q, k and v of rank 28. Wider adapters are added in a pass of their own. With 192 the product is a fifth slower."""
_LARGEST = 448.0
"""Of e4m3."""
_SMALLEST = 1e-12
"""Of a row's largest value: a row of zeros has a scale, too."""
_SPREAD = 64
"""A weight's scales are at most so many times apart. Smaller rows still have 500 times their smallest normal value, and
an adapter's columns, in units of the scales, never make an almost empty row decide for the whole layer."""


@dataclass(frozen=True)
class RowScaled:
    """A weight for FP8 products, and its transpose for those of the backward pass."""

    tag: ClassVar[str] = "fp8-rows"
    weight_NX: Tensor
    """float8_e4m3fn, K columns and on a GPU `ROOM` more, where an adapter's are written before each product."""
    scales_N: Tensor
    """float32."""
    transposed_KX: Tensor
    """float8_e4m3fn: the weight again, N columns and the same room, rounded with the scales of its inputs."""
    scales_K: Tensor
    """float32."""

    @classmethod
    def of(cls, weight_NK: Tensor) -> RowScaled:
        """Both orientations, rounded from a dense weight."""
        room = ROOM if weight_NK.is_cuda else 0
        least = max(weight_NK.abs().amax().item() / _SPREAD, _SMALLEST)
        rounded_NK, scales_N = row_scaled(weight_NK, least)
        transposed_KN, scales_K = row_scaled(weight_NK.t().contiguous(), least)
        return cls(_with_room(rounded_NK, room), scales_N, _with_room(transposed_KN, room), scales_K)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.scales_N.shape[0], self.scales_K.shape[0]

    @property
    def weight_NK(self) -> Tensor:
        """e4m3, without the room."""
        return self.weight_NX[:, : self.shape[1]]

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """(N, K), scale x e4m3, rounded once."""
        return self.exact(dtype)

    def plain(self, dtype: torch.dtype) -> Tensor:
        """(N, K) by plain torch: what `dequantised` gives."""
        return self.exact(dtype)

    def exact(self, dtype: torch.dtype) -> Tensor:
        """(N, K), exact in fp32 and rounded once to `dtype`."""
        return self.weight_NK.float().mul_(self.scales_N[:, None]).to(dtype)

    def product(self, x8_MK: Tensor, x_scales_M: Tensor) -> Tensor:
        """x W^T, (M, N) bfloat16; x as `row_scaled` gives it."""
        return scaled_product(x8_MK, x_scales_M, self.weight_NX, self.scales_N)

    def input_slope(self, gradient_MN: Tensor) -> Tensor:
        """dL/dx = g W, (M, K) bfloat16, of dL/dy."""
        return scaled_product(*row_scaled(gradient_MN), self.transposed_KX, self.scales_K)

    def rows(self, count: int) -> RowScaled:
        """The first outputs alone, for `exact`."""
        return RowScaled(self.weight_NX[:count], self.scales_N[:count], self.transposed_KX, self.scales_K)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that a layer keeps and an operator gets, in the order in which `taken` reads them."""
        return {
            "weight_NX": self.weight_NX,
            "scales_N": self.scales_N,
            "transposed_KX": self.transposed_KX,
            "scales_K": self.scales_K,
        }

    def numbers(self) -> list[int]:
        """The numbers that an operator needs besides the tensors."""
        return []

    @classmethod
    def taken(cls, tensors: Iterator[Tensor], numbers: Iterator[int]) -> RowScaled:
        """The weight read from the next of `tensors`."""
        return cls(next(tensors), next(tensors), next(tensors), next(tensors))


def row_scaled(x_MK: Tensor, least: float = _SMALLEST) -> tuple[Tensor, Tensor]:
    """e4m3, (M, K), and the scale of each row, (M,) fp32: its largest value, or `least`, becomes e4m3's largest."""
    if x_MK.is_cuda:
        from dpo_studio.frozen.kernels_fp8 import fp8_by_row

        return fp8_by_row(x_MK, least=least)
    wide_MK = x_MK.float()
    scales_M = wide_MK.abs().amax(1).clamp_min_(least).div_(_LARGEST)
    return (wide_MK / scales_M[:, None]).to(torch.float8_e4m3fn), scales_M


def scaled_product(x8_MK: Tensor, x_scales_M: Tensor, weight_NX: Tensor, scales_N: Tensor) -> Tensor:
    """x W^T, (M, N) bfloat16, over as many of the weight's columns as x has.

    Accumulated fast, in some 14 bits: at 14,336 inputs that takes 0.04 % off the result, where the rounding of both
    sides to e4m3 moves it by 3.7 %, and is 1.05 to 1.3 times as fast as exact accumulation (docs/log.md, 2026-11-27).
    """
    from torch.nn.functional import ScalingType, scaled_mm

    return scaled_mm(
        x8_MK,
        weight_NX[:, : x8_MK.shape[1]].t(),
        x_scales_M[:, None],
        ScalingType.RowWise,
        scales_N[None],
        ScalingType.RowWise,
        output_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


def row_scaled_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why products of such weights cannot be computed on this device in this precision; None if they can."""
    if device.type == "cpu":
        return None
    if dtype != torch.bfloat16:
        return "needs model.dtype: bfloat16"
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        return "needs an NVIDIA GPU of the Ada generation or later, or a CPU"
    tile = torch.ones(MULTIPLE, MULTIPLE, device=device, dtype=dtype)
    try:  # what a build of torch has kernels for shows only when it is asked
        RowScaled.of(tile).product(*row_scaled(tile))
    except RuntimeError as error:
        return f"has no product with a scale a row in this torch ({str(error).splitlines()[0]})"
    return None


def _with_room(rounded: Tensor, room: int) -> Tensor:
    return pad(rounded.view(torch.uint8), (0, room)).view(torch.float8_e4m3fn) if room else rounded
