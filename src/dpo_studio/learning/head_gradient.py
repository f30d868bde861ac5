"""The gradient of a head that is trained itself (`adapter.modules_to_save`), in memory that does not grow with the row.

`learning.logprobs` gives the gradient in the hidden states alone, as heads are frozen as a rule. Here the logits are
computed again, some rows at a time: d logp / d z = (onehot(target) - softmax) * the law's slope, d z / d head = hidden.

Shapes: N = scored answer tokens, H = hidden size, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from dpo_studio.models.head import HeadLaw

__all__ = ["with_head_gradient"]

_LOGITS_AT_ONCE = 2**24


def with_head_gradient(logps_N: Tensor, hidden_NH: Tensor, head: nn.Linear, target_N: Tensor, law: HeadLaw) -> Tensor:
    """The same log-probs, whose backward pass also reaches the weight (and bias) of `head`, in their own precision."""
    if not (head.weight.requires_grad and torch.is_grad_enabled()):
        return logps_N
    return _apply(logps_N, hidden_NH.detach(), head.weight, head.bias, target_N, law)


class _Context(Protocol):
    """The context that torch passes to forward and backward."""

    saved_tensors: tuple[Tensor, ...]
    law: HeadLaw

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...


class _HeadGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context,
        logps_N: Tensor,
        hidden_NH: Tensor,
        head_VH: Tensor,
        bias_V: Tensor | None,
        target_N: Tensor,
        law: HeadLaw,
    ) -> Tensor:
        ctx.save_for_backward(hidden_NH, head_VH, bias_V, target_N)
        ctx.law = law
        return logps_N.view_as(logps_N)

    @staticmethod
    def backward(ctx: _Context, gradient_N: Tensor) -> tuple[Tensor | None, ...]:
        hidden_NH, head_VH, maybe_V, target_N = ctx.saved_tensors
        bias_V: Tensor | None = maybe_V
        dtype = hidden_NH.dtype
        exact = torch.promote_types(torch.float32, dtype)  # sums of many slices, rounded once
        head_slope_VH = torch.zeros_like(head_VH, dtype=exact)
        bias_slope_V = None if bias_V is None else torch.zeros_like(bias_V, dtype=exact)
        rounded_VH, rounded_V = head_VH.to(dtype), None if bias_V is None else bias_V.to(dtype)
        rows = max(1, _LOGITS_AT_ONCE // len(head_VH))
        for start in range(0, len(hidden_NH), rows):
            at = slice(start, start + rows)
            logits_nV = ctx.law(nn.functional.linear(hidden_NH[at], rounded_VH, rounded_V))
            slope_nV = logits_nV.softmax(-1, dtype=exact).neg_()
            slope_nV.scatter_add_(1, target_N[at, None], torch.ones_like(target_N[at, None], dtype=exact))
            slope_nV *= ctx.law.slope(logits_nV)
            slope_nV *= gradient_N[at, None]
            head_slope_VH += slope_nV.to(dtype).t() @ hidden_NH[at]
            if bias_slope_V is not None:
                bias_slope_V += slope_nV.sum(0)
        bias_slope = None if bias_slope_V is None else bias_slope_V.to(head_VH.dtype)
        return gradient_N, None, head_slope_VH.to(head_VH.dtype), bias_slope, None, None


_apply: Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor, HeadLaw], Tensor] = _HeadGradient.apply
