"""The product with the frozen weights of many experts: y = W_e x + B_e A_e x, where e is the expert of x's row.

Rows are sorted by expert. On a GPU each product is one call of torch's grouped_mm, which waits for nothing; elsewhere,
and in precisions that it does not take, it is a loop over the experts that have rows. Like the product of one layer
(`frozen.products`) it is opaque to torch.compile and asks when it runs whether the adapter is disabled: then it is
W_e x by the same kernels, to the bit what a B of zeros gives.

Shapes: S = rows (a token once for each of its experts), E = experts, K = inputs, N = outputs, r = rank.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from dpo_studio.frozen.products import is_adapter_disabled

__all__ = ["expert_products"]

_ALIGNED = 8
"""Elements: rows of 16 bytes, which grouped_mm asks for in bf16."""


def expert_products(x_SK: Tensor, weight_EKN: Tensor, ends_E: Tensor, down_ErK: Tensor, up_ENr: Tensor) -> Tensor:
    """(S, N); `ends_E` are the rows where each expert's end, int32. Differentiable in all but the weights."""
    y_SN, _ = torch.ops.dpo_studio.experts(x_SK, weight_EKN, ends_E, down_ErK, up_ENr)
    found: Tensor = y_SN
    return found


@torch.library.custom_op("dpo_studio::experts", mutates_args=())
def _experts(x_SK: Tensor, weight_EKN: Tensor, ends_E: Tensor, down_ErK: Tensor, up_ENr: Tensor) -> list[Tensor]:
    """[y (S, N), and x A^T (S, r) for the backward pass; NaN if the adapter is disabled]."""
    rank, disabled = down_ErK.shape[1], is_adapter_disabled()
    if disabled:
        down_ErK, up_ENr = down_ErK[:, :0], up_ENr[:, :, :0]
    if in_groups(x_SK, weight_EKN):
        down_ErK, up_ENr = _padded(down_ErK, 1), _padded(up_ENr, 2)
        y_SN = nn.functional.grouped_mm(x_SK, weight_EKN, offs=ends_E)
        low_Sr = x_SK.new_zeros(len(x_SK), 0)
        if down_ErK.shape[1]:
            low_Sr = nn.functional.grouped_mm(x_SK, down_ErK.transpose(1, 2), offs=ends_E)
            y_SN += nn.functional.grouped_mm(low_Sr, up_ENr.transpose(1, 2), offs=ends_E)
    else:
        y_SN, low_Sr = x_SK.new_zeros(len(x_SK), weight_EKN.shape[2]), x_SK.new_zeros(len(x_SK), down_ErK.shape[1])
        for e, at in _groups(ends_E):
            torch.mm(x_SK[at], down_ErK[e].t(), out=low_Sr[at])
            y_SN[at] = (low_Sr[at] @ up_ENr[e].t()).addmm_(x_SK[at], weight_EKN[e])
    return [y_SN, x_SK.new_full((len(x_SK), rank), math.nan) if disabled else low_Sr[:, :rank].contiguous()]


@_experts.register_fake
def _(x_SK: Tensor, weight_EKN: Tensor, ends_E: Tensor, down_ErK: Tensor, up_ENr: Tensor) -> list[Tensor]:
    rows = x_SK.shape[0]
    return [x_SK.new_empty(rows, weight_EKN.shape[2]), x_SK.new_empty(rows, down_ErK.shape[1])]


@torch.library.custom_op("dpo_studio::experts_backward", mutates_args=())
def _experts_backward(
    gradient_SN: Tensor,
    x_SK: Tensor,
    weight_EKN: Tensor,
    ends_E: Tensor,
    down_ErK: Tensor,
    up_ENr: Tensor,
    low_Sr: Tensor,
    needs_input: bool,
) -> list[Tensor]:
    """[dL/dA (E, r, K), dL/dB (E, N, r), and dL/dx (S, K) if it is needed]."""
    rank = down_ErK.shape[1]
    if in_groups(x_SK, weight_EKN):
        down_ErK, up_ENr, low_Sr = _padded(down_ErK, 1), _padded(up_ENr, 2), _padded(low_Sr, 1)
        slope_Sr = nn.functional.grouped_mm(gradient_SN, up_ENr, offs=ends_E)
        there_E = ends_E.diff(prepend=ends_E.new_zeros(1)) > 0
        slopes = [
            nn.functional.grouped_mm(left.t(), right, offs=ends_E).masked_fill_(~there_E[:, None, None], 0)
            for left, right in ((slope_Sr, x_SK), (gradient_SN, low_Sr))
        ]
        slopes = [slopes[0][:, :rank].contiguous(), slopes[1][:, :, :rank].contiguous()]
        if needs_input:
            x_slope_SK = nn.functional.grouped_mm(gradient_SN, weight_EKN.transpose(1, 2), offs=ends_E)
            slopes.append(x_slope_SK.add_(nn.functional.grouped_mm(slope_Sr, down_ErK, offs=ends_E)))
        return slopes
    slopes = [torch.zeros_like(down_ErK), torch.zeros_like(up_ENr), *([torch.zeros_like(x_SK)] if needs_input else [])]
    for e, at in _groups(ends_E):
        slope_sr = gradient_SN[at] @ up_ENr[e]
        slopes[0][e] = slope_sr.t() @ x_SK[at]
        slopes[1][e] = gradient_SN[at].t() @ low_Sr[at]
        if needs_input:
            slopes[2][at] = (slope_sr @ down_ErK[e]).addmm_(gradient_SN[at], weight_EKN[e].t())
    return slopes


@_experts_backward.register_fake
def _(
    gradient_SN: Tensor,
    x_SK: Tensor,
    weight_EKN: Tensor,
    ends_E: Tensor,
    down_ErK: Tensor,
    up_ENr: Tensor,
    low_Sr: Tensor,
    needs_input: bool,
) -> list[Tensor]:
    slopes = [x_SK.new_empty(down_ErK.shape), x_SK.new_empty(up_ENr.shape)]
    return [*slopes, x_SK.new_empty(x_SK.shape)] if needs_input else slopes


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: list[Tensor]) -> None:
    x_SK, weight_EKN, ends_E, down_ErK, up_ENr = inputs
    ctx.save_for_backward(x_SK, ends_E, down_ErK, up_ENr, output[1])
    ctx.weight_EKN = weight_EKN  # frozen, and part of the model: nothing to save
    ctx.needs_input = x_SK.requires_grad


def _slopes(ctx: Any, gradients: list[Tensor]) -> tuple[Tensor | None, ...]:
    x_SK, ends_E, down_ErK, up_ENr, low_Sr = ctx.saved_tensors
    down_slope, up_slope, *x_slope = torch.ops.dpo_studio.experts_backward(
        gradients[0].contiguous(), x_SK, ctx.weight_EKN, ends_E, down_ErK, up_ENr, low_Sr, ctx.needs_input
    )
    return x_slope[0] if x_slope else None, None, None, down_slope, up_slope


torch.library.register_autograd("dpo_studio::experts", _slopes, setup_context=_keep)


def in_groups(x_SK: Tensor, weight_EKN: Tensor) -> bool:
    """Whether grouped_mm takes these: bf16, rows of whole 16 bytes, an Ampere GPU or a later one."""
    return (
        x_SK.is_cuda
        and x_SK.dtype == weight_EKN.dtype == torch.bfloat16
        and not (weight_EKN.shape[1] % _ALIGNED or weight_EKN.shape[2] % _ALIGNED)
        and torch.cuda.get_device_capability(x_SK.device) >= (8, 0)
    )


def _padded(x: Tensor, dim: int) -> Tensor:
    """The rank, a tensor's dimension `dim`, up to what is aligned, with zeros."""
    missing = -x.shape[dim] % _ALIGNED
    return x if not missing else nn.functional.pad(x, [0, 0] * (x.ndim - 1 - dim) + [0, missing])


def _groups(ends_E: Tensor) -> list[tuple[int, slice]]:
    """(expert, its rows) of those that have some."""
    ends = ends_E.tolist()
    return [(e, slice(start, end)) for e, (start, end) in enumerate(zip([0, *ends], ends, strict=False)) if end > start]
