"""Log-probs of answers. The only place that touches hidden states and the language-model head.

Shapes: T = tokens of a row, N = scored answer tokens, H = hidden size, V = vocabulary, P = pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpo_studio.learning.head_gradient import with_head_gradient
from dpo_studio.models.attention import row_inputs
from dpo_studio.models.head import HeadLaw, body_of, head_law, head_of
from dpo_studio.models.layers import as_compiled_for_training, causal_lm
from dpo_studio.models.layouts import layout_of
from dpo_studio.models.unsupported import long_rope_limit, row_limit
from dpo_studio.objectives import PairLogps
from dpo_studio.tokens.pack import MicroBatch, in_tables, split_at_position, split_to_fit

__all__ = ["pair_logps", "token_logps"]

_LOGITS_AT_ONCE = {"cpu": 2**24, "cuda": 2**26}
"""Logits in memory at a time, whatever the vocabulary: 340 rows of 49k on a CPU (64 MB in fp32), 1,365 on a GPU."""
_PLAIN = HeadLaw()


def pair_logps(model: nn.Module, batch: MicroBatch, *, agreement: bool = False) -> PairLogps:
    """Summed log-probs of both answers of every pair of a row, fp32, (P,) each; differentiable in `model`.

    With `agreement`, `agreement_P` too.
    """
    dtype = _precision(next(model.parameters()))
    collision_N = torch.empty(len(batch.target_N), dtype=dtype, device=batch.target_N.device) if agreement else None
    logps_N = token_logps(model, batch, collision_N)
    tokens_A = batch.tokens_A
    sums_A, shared_A = _sums(logps_N, batch), _sums(logps_N.where(batch.shared_N, 0), batch)
    agreement_A = None
    if collision_N is not None:
        agreement_A = _sums(logps_N.detach() - collision_N, batch) / tokens_A.clamp(min=1)
    return PairLogps(
        *(sums_A[0::2], sums_A[1::2], tokens_A[0::2], tokens_A[1::2], shared_A[0::2], shared_A[1::2]),
        agreement_A[0::2] + agreement_A[1::2] if agreement_A is not None else None,
    )


def _sums(x_N: Tensor, batch: MicroBatch) -> Tensor:
    """Of each answer, (A,). On a GPU index_add would add in whatever order threads arrive: other bits each time."""
    return torch.segment_reduce(x_N, "sum", lengths=batch.tokens_A, unsafe=True)


def token_logps(model: nn.Module, batch: MicroBatch, collision_N: Tensor | None = None) -> Tensor:
    """Log-prob of every scored token of a row given what precedes it, fp32, (N,).

    `collision_N`, if given, is filled with the log-prob that two tokens drawn there are the same.
    """
    base = causal_lm(model)
    head, law = head_of(base), head_law(base.config)
    if layout_of(model) != "packed" and not batch.tables:  # a pack made by one who did not ask
        batch = in_tables(batch)
    with as_compiled_for_training(model):
        hidden_NH = _padded_hidden(base, batch) if batch.tables else _packed_hidden(base, batch)
    if not torch.is_grad_enabled():
        hidden_NH = hidden_NH.detach()
    weight = head.weight.detach().to(hidden_NH.dtype)
    bias = None if head.bias is None else head.bias.detach().to(hidden_NH.dtype)
    logps_N = _head_logps(hidden_NH, weight, bias, batch.target_N, collision_N, law)
    return with_head_gradient(logps_N, hidden_NH, head, batch.target_N, law)


def _packed_hidden(base: PreTrainedModel, batch: MicroBatch) -> Tensor:
    """The hidden states that predict the scored tokens, (N, H)."""
    config = base.config.get_text_config()
    limit, most = long_rope_limit(config), row_limit(config)
    rows = [] if limit is None else split_at_position(batch, limit)
    if most is not None and batch.tokens > most:
        rows = split_to_fit(batch, most)
    hidden = [
        body_of(base)(**row_inputs(config, row), use_cache=False).last_hidden_state[0].index_select(0, row.predictor_N)
        for row in [row for row, _ in rows] or [batch]
    ]
    return _in_order(hidden, [place_n for _, place_n in rows]) if rows else hidden[0]


def _padded_hidden(base: PreTrainedModel, batch: MicroBatch) -> Tensor:
    """The same from sequences side by side. Without a mask: what is filled up comes last, and no one looks ahead."""
    body = body_of(base)
    hidden = [
        body(input_ids=table.ids_BL, use_cache=False).last_hidden_state.flatten(0, 1).index_select(0, table.predictor_n)
        for table in batch.tables
    ]
    return _in_order(hidden, [table.place_n for table in batch.tables])


def _in_order(hidden: list[Tensor], places: list[Tensor]) -> Tensor:
    return torch.cat(hidden).index_select(0, torch.cat(places).argsort())


def _precision(x: Tensor) -> torch.dtype:
    """Of log-probs: fp32, or fp64 where the model computes in it."""
    return torch.promote_types(torch.float32, x.dtype)


class _Context(Protocol):
    """The context that torch passes to forward and backward."""

    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Tensor, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...


class _HeadLogps(torch.autograd.Function):
    """log softmax(law(hidden @ head))[target], a slice of rows at a time, logits never kept.

    d logp / d hidden = ((onehot(target) - softmax) * the law's slope) @ head depends on the
    loss only by a factor a row, so it is computed while the logits are in memory: two products instead of the three
    that recomputing the logits in the backward pass takes, and N x H saved values instead of N x V. The head is frozen
    and gets no gradient.
    """

    @staticmethod
    def forward(
        ctx: _Context,
        hidden_NH: Tensor,
        head_VH: Tensor,
        bias_V: Tensor | None,
        target_N: Tensor,
        collision_N: Tensor | None = None,
        law: HeadLaw = _PLAIN,
    ) -> Tensor:
        slope_NH = torch.empty_like(hidden_NH) if ctx.needs_input_grad[0] else None
        logps_N = torch.empty(len(hidden_NH), dtype=_precision(hidden_NH), device=hidden_NH.device)
        # compiled, the two kinds of pass would be two kernels that sum in different orders: one kernel serves both
        terms: _Terms = _compiled_head_terms(law) if hidden_NH.is_cuda else partial(_head_terms, law)
        with_slope = hidden_NH.is_cuda or slope_NH is not None
        rows = max(1, _LOGITS_AT_ONCE[hidden_NH.device.type] // len(head_VH))
        for start in range(0, len(hidden_NH), rows):
            at = slice(start, start + rows)
            logits_nV = _logits(hidden_NH[at], head_VH, bias_V)
            logps_N[at], off_nV = terms(logits_nV, target_N[at, None], head_VH.dtype if with_slope else None)
            if collision_N is not None:  # at least -log V: no underflow
                collision_N[at] = 2 * law(logits_nV).softmax(-1, dtype=collision_N.dtype).norm(dim=-1).log()
            if slope_NH is not None and off_nV is not None:
                slope_NH[at] = (off_nV @ head_VH).neg_()
        ctx.save_for_backward(slope_NH)
        return logps_N

    @staticmethod
    def backward(ctx: _Context, gradient_N: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (slope_NH,) = ctx.saved_tensors
        return (slope_NH * gradient_N[:, None]).to(slope_NH.dtype), None, None, None, None, None


_head_logps: Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor | None, HeadLaw], Tensor] = _HeadLogps.apply
_Terms = Callable[[Tensor, Tensor, torch.dtype | None], tuple[Tensor, Tensor | None]]


def _logits(hidden_nH: Tensor, head_VH: Tensor, bias_V: Tensor | None) -> Tensor:
    """hidden @ head, (n, V), in fp32 where the device's product can leave its fp32 sums unrounded."""
    if not hidden_nH.is_cuda or hidden_nH.dtype == torch.float32:
        return nn.functional.linear(hidden_nH, head_VH, bias_V)
    logits_nV = torch.mm(hidden_nH, head_VH.t(), out_dtype=torch.float32)
    return logits_nV if bias_V is None else logits_nV + bias_V


def _head_terms(
    law: HeadLaw, logits_nV: Tensor, target_n1: Tensor, slope_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None]:
    """log softmax at the targets, (n,) fp32; and -d logp / d (hidden @ head), (n, V), where it is needed."""
    logits_nV = law(logits_nV)
    # log_softmax, although only one column is read: torch's logsumexp takes four times as long on a CPU
    logps_nV = logits_nV.log_softmax(-1, dtype=_precision(logits_nV))
    logps_n = logps_nV.gather(1, target_n1)[:, 0]
    if slope_dtype is None:
        return logps_n, None
    softmax_nV = logps_nV.exp_()
    softmax_nV.scatter_add_(1, target_n1, torch.full_like(target_n1, -1, dtype=softmax_nV.dtype))
    if law != _PLAIN:
        softmax_nV *= law.slope(logits_nV)
    return logps_n, softmax_nV.to(slope_dtype)


@cache
def _compiled_head_terms(law: HeadLaw) -> _Terms:
    """The same for a GPU in two passes over the logits: 7.4 ms for 5,700 rows of 49k on an H200, the above 8.9.

    Liger's fused head took 12.2 ms there, cut-cross-entropy 13.7; at a vocabulary of 128k 20 against 33 and 32.
    """

    def terms(logits_nV: Tensor, target_n1: Tensor, slope_dtype: torch.dtype | None) -> tuple[Tensor, Tensor | None]:
        logits_nV = law(logits_nV.float())
        logsumexp_n1 = logits_nV.logsumexp(-1, keepdim=True)
        logps_n = (logits_nV.gather(1, target_n1) - logsumexp_n1)[:, 0]
        hot_nV = torch.arange(logits_nV.shape[1], device=logits_nV.device) == target_n1
        off_nV = (logits_nV - logsumexp_n1).exp() - hot_nV.float()
        return logps_n, (off_nV if law == _PLAIN else off_nV * law.slope(logits_nV)).to(dtype=slope_dtype)

    return torch.compile(terms, dynamic=True)
