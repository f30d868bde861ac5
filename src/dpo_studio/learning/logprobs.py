"""Log-probs of answers. The only place that touches hidden states and the language-model head.

Shapes: T = tokens of a row, N = scored answer tokens, H = hidden size, V = vocabulary, P = pairs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dpo_studio.models.attention import attention_arguments
from dpo_studio.objectives import PairLogps
from dpo_studio.tokens.encode import EncodedPair
from dpo_studio.tokens.pack import MicroBatch, pack

__all__ = ["check_packing", "pair_logps", "plain_token_logps", "token_logps"]

_LOGITS_AT_ONCE = 2**23
"""Logits in memory at a time (32 MB in fp32). On a CPU with 49k words 170 rows was as fast as any; more only takes memory."""


def pair_logps(model: nn.Module, batch: MicroBatch) -> PairLogps:
    """Summed log-probs of both answers of every pair of a row, fp32, (P,) each; differentiable in `model`."""
    logps_N = token_logps(model, batch)
    sums_A = logps_N.new_zeros(2 * len(batch)).index_add(0, batch.answer_N, logps_N)
    tokens_A = torch.bincount(batch.answer_N, minlength=2 * len(batch))
    return PairLogps(sums_A[0::2], sums_A[1::2], tokens_A[0::2], tokens_A[1::2])


def token_logps(model: nn.Module, batch: MicroBatch) -> Tensor:
    """Log-prob of every scored token of a row given what precedes it, fp32, (N,)."""
    causal_lm = _causal_lm(model)
    hidden_TH = causal_lm.base_model(
        input_ids=batch.ids_1T,
        position_ids=batch.position_ids_1T,
        use_cache=False,
        **attention_arguments(causal_lm.config, batch),
    ).last_hidden_state[0]
    head = causal_lm.get_output_embeddings()
    return _HeadLogps.apply(hidden_TH[batch.predictor_N], head.weight, head.bias, batch.target_N)  # type: ignore[no-any-return]


def _causal_lm(model: nn.Module) -> Any:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") else model  # type: ignore[operator]


class _HeadLogps(torch.autograd.Function):
    """log softmax(hidden @ head)[target], a slice of rows at a time, logits never kept.

    d logp / d hidden = (onehot(target) - softmax) @ head does not depend on what comes back from the loss but for a
    factor a row, so it is formed while the logits are at hand: two products instead of the three that recomputing the
    logits in the backward pass takes, and N x H saved values instead of N x V. The head is frozen and gets no gradient.
    """

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, head_VH: Tensor, bias_V: Tensor | None, target_N: Tensor) -> Tensor:
        needs_gradient = ctx.needs_input_grad[0]
        slope_NH = torch.empty_like(hidden_NH) if needs_gradient else None
        logps_N = torch.empty(len(hidden_NH), dtype=torch.float32, device=hidden_NH.device)
        rows = max(1, _LOGITS_AT_ONCE // len(head_VH))
        for start in range(0, len(hidden_NH), rows):
            at = slice(start, start + rows)
            logits_nV = nn.functional.linear(hidden_NH[at], head_VH, bias_V).float()
            logits_nV -= logits_nV.logsumexp(-1, keepdim=True)
            logps_N[at] = logits_nV.gather(1, target_N[at, None])[:, 0]
            if slope_NH is not None:
                minus_softmax_nV = logits_nV.exp_().neg_()
                minus_softmax_nV[torch.arange(len(minus_softmax_nV), device=hidden_NH.device), target_N[at]] += 1
                slope_NH[at] = minus_softmax_nV.to(head_VH.dtype) @ head_VH
        ctx.save_for_backward(slope_NH)
        return logps_N

    @staticmethod
    def backward(ctx: Any, gradient_N: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        (slope_NH,) = ctx.saved_tensors
        return (slope_NH * gradient_N[:, None]).to(slope_NH.dtype), None, None, None
