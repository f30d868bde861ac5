"""Products in FP8 with weights that lose nothing: a GPTQ weight is a small integer times its group's scale.

Four bits less a zero point are an integer of at most 15 in size, which e4m3 holds exactly, and with groups of 128
inputs GPTQ's scales are the block scales of the hardware's own product. So only activations are rounded (each block of
128 has its scale). Hopper and later.

Shapes: M = rows of activations, K = inputs, N = outputs, G = groups of 128 inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from dpo_studio.models.packed import Block8, Packed

__all__ = ["FP8_BLOCK", "device_obstacle", "fp8_obstacle", "fp8_product", "fp8_rows", "fp8_weight"]

FP8_BLOCK = 128
"""Inputs that share a scale."""
_ROWS = 16
"""The product wants rows in multiples of it."""


def fp8_obstacle(inputs: int, outputs: int, bits: int, group_size: int, act_order: bool) -> str | None:
    """Why a layer's products cannot be formed in FP8 without loss, if so."""
    if bits > 4:
        return f"{bits} bits do not fit in e4m3"
    if act_order:
        return "act-order mixes the groups of neighbouring inputs"
    if group_size != FP8_BLOCK or inputs % FP8_BLOCK or outputs % _ROWS:
        return f"its groups of {group_size} of {inputs} inputs are not blocks of {FP8_BLOCK}"
    return None


def device_obstacle(device: torch.device) -> str | None:
    """Why this device has no such product, if so."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return "needs an NVIDIA GPU of the Hopper generation or later"
    return None


def fp8_rows(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """Activations as e4m3 and the scales of their blocks, rows filled up to what the product wants."""
    from dpo_studio.models.kernels import fp8_rows as rows_to_fp8

    missing = -len(x_MK) % _ROWS
    return rows_to_fp8(pad(x_MK, (0, 0, 0, missing)) if missing else x_MK)


def fp8_weight(weight: Packed) -> Block8:
    """The weight with a byte for each integer: twice the words, and no work before each product."""
    from dpo_studio.models.kernels import fp8_integers

    return Block8(fp8_integers(weight), weight.scales_NG.t().float().contiguous().t())


def fp8_product(x8_MK: Tensor, x_scales_MG: Tensor, weight: Block8) -> Tensor:
    """x W^T, (M, N) bfloat16, accumulated in fp32."""
    from torch.nn.functional import ScalingType, scaled_mm

    return scaled_mm(
        x8_MK,
        weight.integers_NK.t(),
        x_scales_MG,
        ScalingType.BlockWise1x128,
        weight.scales_NG,
        ScalingType.BlockWise1x128,
        output_dtype=torch.bfloat16,
    )
