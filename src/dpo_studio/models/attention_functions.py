"""Attention functions for transformers' registry: a row of pairs, or plain sequences when there is no pack.

A model's arguments to its attention besides q, k and v are computed or refused, never ignored: sinks (an extra
logit that nothing is read from: gpt-oss, Granite) and a soft-cap of the scores (Gemma 2) change every number, and SDPA
would drop the one in silence.

Shapes: T = tokens of the row, B = blocks of 128 of them, H = heads, D = head size, Q = queries, K = keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dpo_studio.errors import ModelError
from dpo_studio.tokens.pack import Span

__all__ = ["BLOCK", "DENSE", "FLEX", "PAIRS", "pack_note"]

PAIRS, FLEX, DENSE = "dpo_studio_pairs", "dpo_studio_flex", "dpo_studio_dense"
"""Names of our attentions in transformers' registry; without a pack they are plain SDPA."""
BLOCK = 128
"""Rows and columns of a block that FlexAttention computes or skips; a row's length is made a multiple of it."""
_CHANGE_NOTHING = {
    *("cache", "cache_position", "dropout", "max_length_k", "max_length_q", "past_key_values", "position_embeddings"),
    *("position_ids", "sliding_window", "cu_seq_lens_k", "cu_seq_lens_q", "cu_seqlens"),
}
"""Arguments of models that are in q, k, the mask or the pack already."""


class _Reach(NamedTuple):
    """How far back a token sees, in tokens; None: to the start."""

    window: int | None
    chunk: int | None
    """Tokens see back to the last multiple of it."""

    def is_all(self, length: int) -> bool:
        """Whether in a sequence of this length every token sees all before it."""
        return all(size is None or length <= size for size in self)


def pack_note(spans: Sequence[Span], window: int | None, chunk: int | None = None) -> Tensor:
    """Where the pairs lie and how far a token sees, in the place of a mask: int64 (1, 1, 1 + P, 4), window and chunk
    first.

    4-D masks reach the attention function as they are, even in models that hand on nothing else (StableLM, Nemotron),
    and when a layer is recomputed in the backward pass.
    """
    return torch.tensor([[[[window or 0, chunk or 0, 0, 0], *spans]]])


def _read_note(note: Tensor, length: int) -> tuple[_Reach, tuple[Span, ...]]:
    (window, chunk, *_), *rows = note[0, 0].tolist()
    spans = tuple(Span(*row) for row in rows)
    if not spans or spans[-1].rejected_end != length:
        raise ModelError("this model changes its attention mask on the way to the attention: packs cannot be computed")
    return _Reach(window or None, chunk or None), spans


def _extras(module: nn.Module, given: dict[str, Any]) -> tuple[float | None, Tensor | None]:
    """(soft-cap of the scores, a sink for each head), of what a model hands to its attention.

    Raises:
        ModelError: something else that may change what comes out.
    """
    softcap, sink_H = given.get("softcap"), given.get("s_aux")
    if softcap is not None and sink_H is not None:
        raise ModelError(f"{type(module).__name__} has attention sinks and capped scores: both at once are not built")
    for name, value in given.items():
        if name in _CHANGE_NOTHING or name in ("softcap", "s_aux") or isinstance(value, bool):
            continue
        if isinstance(value, Tensor | int | float):
            raise ModelError(
                f"{type(module).__name__} passes `{name}` to its attention, which ours would ignore: DPO Studio "
                "cannot train or score it yet"
            )
    if given.get("is_causal") is False:
        raise ModelError(f"{type(module).__name__} looks at later tokens (is_causal=False)")
    return softcap, sink_H


def _attend_plainly(
    module: nn.Module,
    query_1HTD: Tensor,
    key_1HTD: Tensor,
    value_1HTD: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Sequences side by side, as `generate` has them, or a row under one dense mask; sinks and soft-cap computed."""
    bias = kwargs.pop("position_bias", None)
    softcap, sink_H = _extras(module, kwargs)
    if softcap is None and sink_H is None:
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query_1HTD, key_1HTD, value_1HTD, attention_mask, scaling=scaling, position_bias=bias, **kwargs
        )
    if bias is not None:
        raise ModelError(f"{type(module).__name__} has a position bias and sinks or capped scores: both are not built")
    if attention_mask is None:
        queries, keys = query_1HTD.shape[2], key_1HTD.shape[2]
        attention_mask = torch.ones(queries, keys, dtype=torch.bool, device=query_1HTD.device).tril(keys - queries)
    attention_mask = attention_mask[..., : key_1HTD.shape[2]]
    out_1HTD = _attend(query_1HTD, key_1HTD, value_1HTD, attention_mask, scaling, softcap, sink_H)
    return out_1HTD.transpose(1, 2).contiguous(), None


@cache
def _compiled_flex() -> Any:
    """FlexAttention as a kernel: without compilation it computes every score, and so it does beyond torch's own limit
    of eight kernels."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    return torch.compile(flex_attention, dynamic=False)


def _attend_flex(
    module: nn.Module,
    query_1HTD: Tensor,
    key_1HTD: Tensor,
    value_1HTD: Tensor,
    attention_mask: BlockMask | Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """All pairs of the row in one kernel, made for the mask's length: the row is filled up with tokens it skips.

    A kernel for any length checks bounds everywhere and takes 1.6 times as long (8,192 tokens, H200).
    """
    if not isinstance(attention_mask, BlockMask):
        return _attend_plainly(module, query_1HTD, key_1HTD, value_1HTD, attention_mask, scaling=scaling, **kwargs)
    softcap, sink_H = _extras(module, kwargs)
    length = query_1HTD.shape[2]
    missing = attention_mask.kv_indices.shape[-1] * BLOCK - length
    query_1HTD, key_1HTD, value_1HTD = (pad(x, (0, 0, 0, missing)) for x in (query_1HTD, key_1HTD, value_1HTD))
    more: dict[str, Any] = {}
    if softcap is not None:
        more["score_mod"] = _capping(softcap)
    if sink_H is not None:
        more["return_aux"] = AuxRequest(lse=True)
    gqa = query_1HTD.shape[1] != key_1HTD.shape[1]
    alone = query_1HTD.is_cuda and not torch.compiler.is_compiling()
    attend = _compiled_flex() if alone else flex_attention
    out_1HTD = attend(
        query_1HTD, key_1HTD, value_1HTD, block_mask=attention_mask, scale=scaling, enable_gqa=gqa, **more
    )
    if sink_H is not None:  # e^lse / (e^lse + e^sink) of what there would be without it
        out_1HTD, aux = out_1HTD
        out_1HTD = (out_1HTD * (aux.lse - sink_H.float()[:, None]).sigmoid()[..., None]).to(value_1HTD.dtype)
    return out_1HTD[:, :, :length].transpose(1, 2).contiguous(), None


@cache
def _capping(softcap: float) -> Callable[..., Tensor]:
    """The same function for the same cap: a new one would be compiled again."""

    def capped(score: Tensor, _batch: Any, _head: Any, _q: Any, _k: Any) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped


def _attend_pairs(
    module: nn.Module,
    query_1HTD: Tensor,
    key_1HTD: Tensor,
    value_1HTD: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Every pair of the row on its own: prompt and chosen answer causally, then the rejected answer behind the prompt.

    A dense mask over a row of four pairs spends most of its products on what it then masks: on two cores a step took
    1.4 times as long. On a CPU the scores are computed in fp32, nearer to the textbook and, strangely, faster: torch's
    bf16 kernel takes twice as long for answers of a hundred tokens, and a step 1.2 times.
    """
    if attention_mask is None or attention_mask.dtype != torch.int64:
        return _attend_plainly(module, query_1HTD, key_1HTD, value_1HTD, attention_mask, scaling=scaling, **kwargs)
    softcap, sink_H = _extras(module, kwargs)
    reach, spans = _read_note(attention_mask, query_1HTD.shape[2])
    dtype = query_1HTD.dtype
    if query_1HTD.device.type == "cpu":
        query_1HTD, key_1HTD, value_1HTD = query_1HTD.float(), key_1HTD.float(), value_1HTD.float()
    # split, not slices: the backward of a slice fills a tensor of the whole row with zeros
    seen = [length for s in spans for length in (s.chosen_end - s.start, s.rejected_end - s.chosen_end)]
    parts = [
        n for s in spans for n in (s.prompt_end - s.start, s.chosen_end - s.prompt_end, s.rejected_end - s.chosen_end)
    ]
    queries = torch.split(query_1HTD, seen, 2)
    keys, values = torch.split(key_1HTD, parts, 2), torch.split(value_1HTD, parts, 2)
    by_kernel = softcap is None and sink_H is None  # whose is_causal says it all
    masks = _answer_masks(spans, reach, by_kernel, query_1HTD.dtype, query_1HTD.device)
    outputs = []
    for pair in range(len(spans)):
        q_chosen, q_rejected = queries[2 * pair : 2 * pair + 2]
        k_prompt, k_chosen, k_rejected = keys[3 * pair : 3 * pair + 3]
        v_prompt, v_chosen, v_rejected = values[3 * pair : 3 * pair + 3]
        k, v = torch.cat([k_prompt, k_chosen], 2), torch.cat([v_prompt, v_chosen], 2)
        outputs.append(_attend(q_chosen, k, v, masks[pair][0], scaling, softcap, sink_H))
        if q_rejected.shape[2]:
            k, v = torch.cat([k_prompt, k_rejected], 2), torch.cat([v_prompt, v_rejected], 2)
            outputs.append(_attend(q_rejected, k, v, masks[pair][1], scaling, softcap, sink_H))
    return torch.cat(outputs, 2).transpose(1, 2).to(dtype).contiguous(), None


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float | None,
    softcap: float | None = None,
    sink_H: Tensor | None = None,
) -> Tensor:
    """(1, H, Q, D); the mask is bool or added to the scores, and None only where causality is all there is to it."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if softcap is not None:
        assert mask is not None
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # the scores are recomputed, not kept
            return checkpoint(_attend_capped, q, k, v, mask, scale, softcap, use_reentrant=False)  # type: ignore[no-any-return]
        return _attend_capped(q, k, v, mask, scale, softcap)
    if sink_H is not None:
        assert mask is not None
        q, k, v = _with_sink(q, k, v, sink_H / scale)
        mask = pad(mask, (1, 0), value=mask.dtype == torch.bool)
    gqa = q.shape[1] != k.shape[1]
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=gqa)


def _with_sink(q: Tensor, k: Tensor, v: Tensor, sink_H: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A key before all others whose product with head h's queries is sink_H[h], and whose value is nothing.

    The sink is in columns of the query that other keys do not have. As the mask's own column it would need a mask
    for every head. Two columns, the second for what the first rounds off in 16 bits; eight, for kernels want that.
    """
    high_H = sink_H.to(q.dtype)
    low_H = (sink_H.float() - high_H.float()).to(q.dtype)
    columns_H8 = pad(torch.stack([high_H, low_H], -1), (0, 6))
    q = torch.cat([q, columns_H8[None, :, None].expand(q.shape[0], -1, q.shape[2], -1)], -1)
    first = torch.zeros(k.shape[-1] + 8, dtype=k.dtype, device=k.device)
    first[-8:-6] = 1
    k = torch.cat([first.expand(*k.shape[:2], 1, -1), pad(k, (0, 8))], 2)
    return q, k, pad(v, (0, 0, 1, 0))


def _attend_capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float) -> Tensor:
    """softmax(softcap * tanh(q k scale / softcap)) v: no kernel of torch's but FlexAttention caps its scores."""
    groups = q.shape[1] // k.shape[1]
    scores = q @ repeat_kv(k, groups).transpose(2, 3) * scale
    scores = softcap * torch.tanh(scores / softcap)
    # not -inf: a padded row of `generate` sees nothing at all, and its softmax would be nan
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
    shares = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
    return torch.matmul(shares, repeat_kv(v, groups))


@lru_cache(maxsize=4)
def _answer_masks(
    spans: tuple[Span, ...], reach: _Reach, by_kernel: bool, dtype: torch.dtype, device: torch.device
) -> list[tuple[Tensor | None, Tensor]]:
    """For each pair, what the chosen answer and its prompt see, None if causality says it, and what the rejected sees.

    The same for all layers of a kind, so kept; of a few rows only, for a pair of 4,000 tokens has 40 MB of them.
    """

    def mask(prompt: int, answer: int) -> Tensor:
        return _answer_mask(prompt, answer, reach, dtype, device)

    made = []
    for s in spans:
        prompt, whole = s.prompt_end - s.start, s.chosen_end - s.start
        plain = by_kernel and reach.is_all(whole)
        made.append((None if plain else mask(0, whole), mask(prompt, s.rejected_end - s.chosen_end)))
    return made


def _answer_mask(prompt: int, answer: int, reach: _Reach, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What an answer's tokens see of [prompt, answer], added to the scores: (answer, prompt + answer)."""
    column = torch.arange(prompt + answer, device=device)
    row = column[prompt:, None]
    visible = row >= column
    if reach.window is not None:
        visible &= row - column < reach.window
    if reach.chunk is not None:
        visible &= row // reach.chunk == column // reach.chunk
    return torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill_(~visible, float("-inf"))


for _name, _attention in ((PAIRS, _attend_pairs), (FLEX, _attend_flex), (DENSE, _attend_plainly)):
    AttentionInterface.register(_name, _attention)
    AttentionMaskInterface.register(_name, sdpa_mask)
