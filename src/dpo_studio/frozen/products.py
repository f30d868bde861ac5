"""The one product with frozen weights: y = W x + B A x for layers that read the same input, dense or packed.

Adding B A x to W x afterwards would read and write the widest tensors of a model once more. Here the narrow product is
written first and the base's product accumulates onto it inside the matrix product. A packed weight is dequantised for
the product and freed, and dequantised again in the backward pass: autograd keeps the packed integers only. Under
FP8 the forward products have e4m3 on both sides, each input rounded once for all its readers. So have the backward
ones of dense weights; those of GPTQ's do not, because they contract over the outputs, and GPTQ's scales change with
each of them.

The operator is opaque to torch.compile, which would otherwise turn each accumulation into a copy and an addition.
So a reference can be the policy's own compiled code with the adapter disabled inside it (`adapter_disabled`).

Shapes: T = tokens, K = inputs, N = outputs (a layer's own), R = ranks of the layers that read one input, in a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
from torch import Tensor

from dpo_studio.frozen import adapter_columns
from dpo_studio.frozen.fp8 import Block8, fp8_rows
from dpo_studio.frozen.row_scaled import RowScaled
from dpo_studio.frozen.weights import Frozen, flatten, unflatten

__all__ = ["adapter_disabled", "is_adapter_disabled", "products"]

_adapter_disabled = False


@contextmanager
def adapter_disabled() -> Iterator[None]:
    """Inside, `products` disables the adapter, as if its rank were 0: W x, to the bit what a B of zeros gives.

    Read when the operator runs, so compiled code does not change. Plain products would be 1.6 % of a step cheaper, and
    in bf16 some nats a pair off.
    """
    global _adapter_disabled
    before, _adapter_disabled = _adapter_disabled, True
    try:
        yield
    finally:
        _adapter_disabled = before


def is_adapter_disabled() -> bool:
    """Whether this is inside `adapter_disabled`. Compiled code asks by operators alone: it would keep one answer."""
    return _adapter_disabled


def products(x: Tensor, weights: Sequence[Frozen], down_RK: Tensor, ups_Nr: list[Tensor]) -> list[Tensor]:
    """W x + up down x for each of `weights`, x of any shape (..., K); differentiable in all but the weights."""
    *outputs, _ = torch.ops.dpo_studio.lora(x.flatten(0, -2), *flatten(weights), down_RK, ups_Nr)
    return [y_TN.view(*x.shape[:-1], -1) for y_TN in outputs]


@torch.library.custom_op("dpo_studio::lora", mutates_args=())
def _lora(
    x_TK: Tensor, kinds: str, weights: list[Tensor], numbers: list[int], down_RK: Tensor, ups_Nr: list[Tensor]
) -> list[Tensor]:
    """[y of each layer (T, N)], and x A^T (T, R) for the backward pass; NaN if the adapter is disabled."""
    rank = len(down_RK)
    frozen = list(unflatten(kinds, weights, numbers))
    if _all_row_scaled(frozen):
        low_TR = x_TK.new_full((len(x_TK), rank), math.nan) if _adapter_disabled else x_TK @ down_RK.t()
        return [*adapter_columns.outputs(x_TK, frozen, None if _adapter_disabled else low_TR, ups_Nr), low_TR]
    if _adapter_disabled:
        down_RK, ups_Nr = down_RK[:0], [up_Nr[:, :0] for up_Nr in ups_Nr]
    low_TR = x_TK @ down_RK.t()
    outputs = []
    in_fp8: tuple[Tensor, Tensor] | None = None  # the input, once for all its readers
    for weight, up_Nr, low_Tr in zip(frozen, ups_Nr, _by_layer(low_TR, ups_Nr), strict=True):
        if isinstance(weight, Block8):
            in_fp8 = in_fp8 or fp8_rows(x_TK)
            y_TN = weight.product(*in_fp8)[: len(x_TK)]
            outputs.append(y_TN.addmm_(low_Tr, up_Nr.t()) if up_Nr.shape[1] else y_TN)
        else:
            outputs.append((low_Tr @ up_Nr.t()).addmm_(x_TK, weight.dequantised(x_TK.dtype).t()))
    return [*outputs, x_TK.new_full((len(x_TK), rank), math.nan) if _adapter_disabled else low_TR]


@_lora.register_fake
def _(
    x_TK: Tensor, kinds: str, weights: list[Tensor], numbers: list[int], down_RK: Tensor, ups_Nr: list[Tensor]
) -> list[Tensor]:
    # shape[0], not len(): that would fix the row's length in compiled code
    return [x_TK.new_empty(x_TK.shape[0], matrix.shape[0]) for matrix in (*ups_Nr, down_RK)]


@torch.library.custom_op("dpo_studio::lora_backward", mutates_args=())
def _lora_backward(
    gradients_TN: list[Tensor],
    kinds: str,
    weights: list[Tensor],
    numbers: list[int],
    down_RK: Tensor,
    ups_Nr: list[Tensor],
    low_TR: Tensor,
    needs_input: bool,
) -> list[Tensor]:
    """[dL/d(x A^T) (T, R)], dL/dB of each layer, and dL/dx (T, K) if it is needed."""
    slope_TR = torch.empty_like(low_TR)
    ups_slopes = []
    for gradient_TN, up_Nr, slope_Tr, low_Tr in zip(
        gradients_TN, ups_Nr, _by_layer(slope_TR, ups_Nr), _by_layer(low_TR, ups_Nr), strict=True
    ):
        torch.mm(gradient_TN, up_Nr, out=slope_Tr)
        ups_slopes.append(gradient_TN.t() @ low_Tr)
    if not needs_input:
        return [slope_TR, *ups_slopes]
    frozen = list(unflatten(kinds, weights, numbers))
    if _all_row_scaled(frozen):
        return [slope_TR, *ups_slopes, adapter_columns.input_slopes(gradients_TN, frozen, slope_TR, down_RK)]
    x_slope_TK = slope_TR @ down_RK
    for gradient_TN, weight in zip(gradients_TN, frozen, strict=True):
        x_slope_TK.addmm_(gradient_TN, weight.dequantised(gradient_TN.dtype))
    return [slope_TR, *ups_slopes, x_slope_TK]


@_lora_backward.register_fake
def _(
    gradients_TN: list[Tensor],
    kinds: str,
    weights: list[Tensor],
    numbers: list[int],
    down_RK: Tensor,
    ups_Nr: list[Tensor],
    low_TR: Tensor,
    needs_input: bool,
) -> list[Tensor]:
    slopes = [torch.empty_like(low_TR), *(torch.empty_like(up_Nr) for up_Nr in ups_Nr)]
    return [*slopes, low_TR.new_empty(low_TR.shape[0], down_RK.shape[1])] if needs_input else slopes


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x_TK, kinds, weights, numbers, down_RK, ups_Nr = inputs
    ctx.save_for_backward(x_TK, down_RK, output[-1], *ups_Nr)
    ctx.kinds, ctx.weights, ctx.numbers = kinds, weights, numbers  # frozen, and part of the model: nothing to save
    ctx.needs_input = x_TK.requires_grad


def _slopes(ctx: Any, gradients: list[Tensor]) -> tuple[Any, ...]:
    x_TK, down_RK, low_TR, *ups_Nr = ctx.saved_tensors
    *outputs, _ = gradients
    count = len(ups_Nr)
    slope_TR, *rest = torch.ops.dpo_studio.lora_backward(
        [gradient_TN.contiguous() for gradient_TN in outputs],
        ctx.kinds,
        ctx.weights,
        ctx.numbers,
        down_RK,
        ups_Nr,
        low_TR,
        ctx.needs_input,
    )
    # outside the operator, where torch.compile may recompute x instead of keeping it
    down_slope_RK = slope_TR.t() @ x_TK
    x_slope_TK = rest[count] if ctx.needs_input else None
    # torch takes an empty list for one of tensors, and wants its like
    none: list[None] | None = None if ctx.numbers else []
    return x_slope_TK, None, [None] * len(ctx.weights), none, down_slope_RK, rest[:count]


torch.library.register_autograd("dpo_studio::lora", _slopes, setup_context=_keep)


def _all_row_scaled(weights: Sequence[Frozen]) -> TypeGuard[Sequence[RowScaled]]:
    """Layers that read one input are loaded alike."""
    return all(isinstance(weight, RowScaled) for weight in weights)


def _by_layer(stacked_TR: Tensor, ups_Nr: list[Tensor]) -> list[Tensor]:
    """The columns of each layer's own rank."""
    return list(torch.split(stacked_TR, [up_Nr.shape[1] for up_Nr in ups_Nr], dim=1))
