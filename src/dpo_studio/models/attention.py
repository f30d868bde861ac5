"""Attention over a pack: pairs apart, both answers behind one prompt, windows counted in each answer's own places.

Two ways to the same numbers. `pairs`: each pair's attention on its own through SDPA, nothing masked away and nothing
computed in vain. `sdpa`: one dense bool mask over the row, for where many small products cost more than one large one.

A wrong mask raises nothing and costs nats: policy and reference err alike, so ln 2 at step 0 cannot see it. Hence the
list of what is refused, and `learning.logprobs.check_packing`, run once at the start of every command that packs.

Shapes: T = tokens of the row, H = heads, D = head size.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dpo_studio.errors import ModelError
from dpo_studio.tokens.pack import PROMPT, MicroBatch, Span

__all__ = ["PAIRS", "attention_arguments", "check_architecture", "dense_mask"]

FULL, SLIDING = "full_attention", "sliding_attention"
PAIRS = "dpo_studio_pairs"
"""Name of the pair-by-pair attention in transformers' registry; without a pack it is plain SDPA."""


def attention_arguments(config: Any, batch: MicroBatch) -> dict[str, Any]:
    """What the model's forward needs besides ids and positions to read this row.

    Models whose config lists `layer_types` (Qwen2/3, Gemma-3, ...) take a mask for each kind of layer; the others one
    mask, with the window inside where the config has one (Mistral).
    """
    pairwise = config._attn_implementation == PAIRS
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)

    def mask(window: int | None) -> Tensor:
        return _window_note(window) if pairwise else dense_mask(batch, window)

    if kinds is None:
        masks: Tensor | dict[str, Tensor] = mask(window)
    else:
        masks = {kind: mask(window if kind == SLIDING else None) for kind in {FULL, *kinds}}
    return {"attention_mask": masks} | ({"pack_spans": batch.spans} if pairwise else {})


def dense_mask(batch: MicroBatch, window: int | None = None) -> Tensor:
    """Same pair, not later, in the prompt or the same answer, within the window: bool (1, 1, T, T), True = may look."""
    pair_T, part_T, position_T = batch.pair_T, batch.part_T, batch.position_ids_1T[0]
    place_T = torch.arange(len(pair_T), device=pair_T.device)
    visible_TT = (pair_T[:, None] == pair_T) & (place_T[:, None] >= place_T)
    visible_TT &= (part_T == PROMPT) | (part_T[:, None] == part_T)
    if window is not None:
        visible_TT &= position_T[:, None] - position_T < window
    return visible_TT[None, None]


def _window_note(window: int | None) -> Tensor:
    """A layer's window as a (1, 1, 1, 1) tensor: 4-D masks reach the attention function as they are."""
    return torch.full((1, 1, 1, 1), window or 0)


def _attend_pairs(
    module: nn.Module,
    query_1HTD: Tensor,
    key_1HTD: Tensor,
    value_1HTD: Tensor,
    attention_mask: Tensor | None,
    pack_spans: tuple[Span, ...] | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Every pair of the row on its own: prompt and chosen answer causally, then the rejected answer behind the prompt.

    A dense mask over a row of four pairs spends most of its products on what it then masks: on two cores a step took
    1.4 times as long. On a CPU the scores are formed in fp32, nearer to the textbook and, strangely, faster: torch's
    bf16 kernel takes twice as long for answers of a hundred tokens, and a step 1.2 times.
    """
    if pack_spans is None:
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query_1HTD, key_1HTD, value_1HTD, attention_mask, scaling=scaling, **kwargs
        )
    assert attention_mask is not None
    window = int(attention_mask) or None
    dtype = query_1HTD.dtype
    if query_1HTD.device.type == "cpu":
        query_1HTD, key_1HTD, value_1HTD = query_1HTD.float(), key_1HTD.float(), value_1HTD.float()
    # split, not slices: the backward of a slice fills a tensor of the whole row with zeros
    seen = [length for s in pack_spans for length in (s.chosen_end - s.start, s.rejected_end - s.chosen_end)]
    parts = [
        n
        for s in pack_spans
        for n in (s.prompt_end - s.start, s.chosen_end - s.prompt_end, s.rejected_end - s.chosen_end)
    ]
    queries = torch.split(query_1HTD, seen, 2)
    keys, values = torch.split(key_1HTD, parts, 2), torch.split(value_1HTD, parts, 2)
    outputs = []
    for pair in range(len(pack_spans)):
        q_chosen, q_rejected = queries[2 * pair : 2 * pair + 2]
        k_prompt, k_chosen, k_rejected = keys[3 * pair : 3 * pair + 3]
        v_prompt, v_chosen, v_rejected = values[3 * pair : 3 * pair + 3]
        k, v = torch.cat([k_prompt, k_chosen], 2), torch.cat([v_prompt, v_chosen], 2)
        mask = _answer_mask(0, k.shape[2], window, k.dtype) if window is not None and k.shape[2] > window else None
        outputs.append(_attend(q_chosen, k, v, mask, scaling))
        if q_rejected.shape[2]:
            k, v = torch.cat([k_prompt, k_rejected], 2), torch.cat([v_prompt, v_rejected], 2)
            mask = _answer_mask(k_prompt.shape[2], k_rejected.shape[2], window, k.dtype)
            outputs.append(_attend(q_rejected, k, v, mask, scaling))
    return torch.cat(outputs, 2).transpose(1, 2).to(dtype).contiguous(), None


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    gqa = q.shape[1] != k.shape[1]
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=gqa)


@lru_cache(maxsize=256)
def _answer_mask(prompt: int, answer: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """What an answer's tokens see of [prompt, answer], added to the scores; the same for all layers, so kept."""
    row, column = torch.arange(prompt, prompt + answer)[:, None], torch.arange(prompt + answer)
    visible = row >= column
    if window is not None:
        visible &= row - column < window
    return torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, float("-inf"))


AttentionInterface.register(PAIRS, _attend_pairs)
AttentionMaskInterface.register(PAIRS, sdpa_mask)


def check_architecture(config: Any, name: str) -> None:
    """Refuse models for which `hidden @ head` is not the logits, or a pack's mask means nothing.

    Raises:
        ModelError: with the property that stands in the way.
    """
    for reason in _obstacles(config):
        raise ModelError(
            f"{name} ({getattr(config, 'model_type', 'unknown')}) {reason}: DPO Studio cannot train or score it yet",
            hint="Llama, Mistral, Qwen2, Qwen3, Gemma-3 and models built like them work",
        )


def _obstacles(config: Any) -> list[str]:
    """What makes a model unfit for packs, in words."""
    reasons = []
    for key in ("final_logit_softcapping", "attn_logit_softcapping"):
        if getattr(config, key, None):
            reasons.append(f"caps its logits ({key})")
    for key in ("logit_scale", "logits_scaling"):
        if getattr(config, key, None) not in (None, 1, 1.0):
            reasons.append(f"scales its logits ({key})")
    kinds = set(getattr(config, "layer_types", None) or [FULL])
    if strange := sorted(kinds - {FULL, SLIDING}):
        reasons.append(f"has layers a pack's mask does not reach ({', '.join(strange)})")
    for key in ("ssm_state_size", "mamba_d_state", "rwkv_hidden_size", "state_size", "attention_chunk_size"):
        if getattr(config, key, None):
            reasons.append(f"is not a plain attention model ({key})")
    if getattr(config, "model_type", "") in ("gpt_oss", "bloom", "mpt", "falcon", "gpt2", "opt"):
        reasons.append("computes positions or attention in a way a pack's mask does not reach")
    if getattr(config, "is_encoder_decoder", False):
        reasons.append("is an encoder-decoder")
    return reasons
