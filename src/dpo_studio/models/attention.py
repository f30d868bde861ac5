"""Attention over a pack: pairs apart, both answers behind one prompt, windows counted in each answer's own places.

Three ways to the same numbers. `flex`, for GPUs: one FlexAttention kernel over the row (arXiv 2412.05496) that skips
the blocks nobody may see. `pairs`, for CPUs: each pair's attention on its own through SDPA, nothing masked away and
nothing computed in vain. `sdpa`: one dense bool mask over the row, the fallback that runs everywhere.

A wrong mask raises nothing and costs nats: policy and reference err alike, so ln 2 at step 0 cannot see it. Hence the
list of what is refused, and `learning.packing_check`, run at the start of every training and evaluation.

Shapes: T = tokens of the row, B = blocks of 128 of them, H = heads, D = head size.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache, lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dpo_studio.errors import ModelError
from dpo_studio.tokens.pack import MicroBatch, Span

__all__ = [
    "FLEX",
    "PAIRS",
    "block_mask",
    "can_compile",
    "check_architecture",
    "choose_attention",
    "dense_mask",
    "longest_read",
    "row_inputs",
]

FULL, SLIDING = "full_attention", "sliding_attention"
PAIRS, FLEX = "dpo_studio_pairs", "dpo_studio_flex"
"""Names of our attentions in transformers' registry; without a pack they are plain SDPA."""
_SMALLEST_FLEX_HEAD = 16
_LEAST_ROOM = 2048
"""Shorter rows share one kernel; what they leave empty is skipped."""
BLOCK = 128
"""Rows and columns of a block that FlexAttention computes or skips; a row's length is made a multiple of it."""


def row_inputs(config: Any, batch: MicroBatch) -> dict[str, Any]:
    """What the model's forward needs to read this row.

    Models whose config lists `layer_types` (Qwen2/3, Gemma-3, ...) take a mask for each kind of layer; the others one
    mask, with the window inside where the config has one (Mistral) and an answer is long enough to notice.
    """
    kind = config._attn_implementation
    if kind == FLEX:
        batch = _whole_blocks(batch)
    window = getattr(config, "sliding_window", None)
    if window is not None and all(longest_read(span) <= window for span in batch.spans):
        window = None
    makers: dict[str, Callable[[MicroBatch, int | None], Any]] = {PAIRS: _window_note, FLEX: block_mask}
    make = makers.get(kind, dense_mask)
    full, sliding = make(batch, None), make(batch, window)
    kinds = getattr(config, "layer_types", None)
    masks = sliding if kinds is None else {FULL: full} | {k: sliding if k == SLIDING else full for k in kinds}
    return {
        "input_ids": batch.ids_1T,
        "position_ids": batch.position_ids_1T,
        "attention_mask": masks,
    } | ({"pack_spans": batch.spans} if kind == PAIRS else {})


def longest_read(span: Span) -> int:
    """Tokens of a pair's longer answer and its prompt: how far back a token could look."""
    return max(span.chosen_end, span.prompt_end + span.rejected_end - span.chosen_end) - span.start


def dense_mask(batch: MicroBatch, window: int | None = None) -> Tensor:
    """Same pair, not later, in the prompt or the same answer, within the window: bool (1, 1, T, T), True = may look."""
    place_T = torch.arange(batch.ids_1T.shape[1], device=batch.ids_1T.device)
    visible = _visible(batch, window)
    return visible(None, None, place_T[:, None], place_T)[None, None]


def block_mask(batch: MicroBatch, window: int | None = None) -> BlockMask:
    """The same for FlexAttention. Which blocks it visits follows from their extremes; no T x T mask is formed."""
    # a pair over its room is met rarely, and each length would have a kernel of its own
    room = batch.room if batch.tokens <= batch.room else 1 << (batch.tokens - 1).bit_length()
    batch = _whole_blocks(batch, max(room, _LEAST_ROOM))
    until_BR, position_BR = batch.seen_until_T.view(-1, BLOCK), batch.position_ids_1T.view(-1, BLOCK)
    start_B = torch.arange(len(until_BR), device=until_BR.device) * BLOCK
    earlier_BB = start_B[:, None] > start_B
    some_BB = (earlier_BB & (until_BR.amax(1) > start_B[:, None])) | (start_B[:, None] == start_B)
    all_BB = earlier_BB & (until_BR.amin(1) >= start_B[:, None] + BLOCK)
    if window is not None:  # nearest and furthest two tokens of the blocks can be
        some_BB &= position_BR.amin(1)[:, None] - position_BR.amax(1) < window
        all_BB &= position_BR.amax(1)[:, None] - position_BR.amin(1) < window
    partial, full = _listed(some_BB & ~all_BB), _listed(some_BB & all_BB)
    for tensor in (*partial, *full, batch.seen_until_T, batch.position_ids_1T):
        torch._dynamo.mark_static(tensor)
    return BlockMask.from_kv_blocks(*partial, *full, BLOCK, _visible(batch, window), (batch.tokens, batch.tokens))


def _visible(batch: MicroBatch, window: int | None) -> Callable[[Any, Any, Tensor, Tensor], Tensor]:
    """Whether the token at place q of the row may look at the one at place k, in FlexAttention's signature."""
    until_T, position_T = batch.seen_until_T, batch.position_ids_1T[0]

    def visible(_batch: Any, _head: Any, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (q < until_T[k])

    if window is None:
        return visible
    width = window

    def visible_in_window(_batch: Any, _head: Any, q: Tensor, k: Tensor) -> Tensor:
        return visible(_batch, _head, q, k) & (position_T[q] - position_T[k] < width)

    return visible_in_window


def _listed(chosen_BB: Tensor) -> tuple[Tensor, Tensor]:
    """(how many, which) blocks of each row of blocks, as FlexAttention takes them: (1, 1, B) and (1, 1, B, B)."""
    order_BB = chosen_BB.int().argsort(dim=1, descending=True, stable=True)
    return chosen_BB.sum(1, dtype=torch.int32)[None, None], order_BB.int()[None, None]


def _whole_blocks(batch: MicroBatch, at_least: int = 0) -> MicroBatch:
    """The row filled up to whole blocks with tokens that see themselves alone and that nobody reads."""
    length = batch.tokens
    missing = -(-max(length, at_least) // BLOCK) * BLOCK - length
    alone = torch.arange(length + 1, length + missing + 1, device=batch.seen_until_T.device)
    return replace(
        batch,
        ids_1T=pad(batch.ids_1T, (0, missing)),
        position_ids_1T=pad(batch.position_ids_1T, (0, missing)),
        seen_until_T=torch.cat([batch.seen_until_T, alone]),
    )


def _window_note(_batch: MicroBatch, window: int | None) -> Tensor:
    """A layer's window as a (1, 1, 1, 1) tensor: 4-D masks reach the attention function as they are."""
    return torch.full((1, 1, 1, 1), window or 0)


@cache
def _compiled_flex() -> Any:
    """FlexAttention as a kernel: without compilation it forms every score, and so it does beyond torch's own limit of
    eight kernels."""
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
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query_1HTD, key_1HTD, value_1HTD, attention_mask, scaling=scaling, **kwargs
        )
    length = query_1HTD.shape[2]
    missing = attention_mask.kv_indices.shape[-1] * BLOCK - length
    query_1HTD, key_1HTD, value_1HTD = (pad(x, (0, 0, 0, missing)) for x in (query_1HTD, key_1HTD, value_1HTD))
    gqa = query_1HTD.shape[1] != key_1HTD.shape[1]
    alone = query_1HTD.is_cuda and not torch.compiler.is_compiling()
    attend = _compiled_flex() if alone else flex_attention
    out_1HTD = attend(query_1HTD, key_1HTD, value_1HTD, block_mask=attention_mask, scale=scaling, enable_gqa=gqa)
    return out_1HTD[:, :, :length].transpose(1, 2).contiguous(), None


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
        cut = window is not None and k.shape[2] > window
        mask = _answer_mask(0, k.shape[2], window, k.dtype, k.device) if cut else None
        outputs.append(_attend(q_chosen, k, v, mask, scaling))
        if q_rejected.shape[2]:
            k, v = torch.cat([k_prompt, k_rejected], 2), torch.cat([v_prompt, v_rejected], 2)
            mask = _answer_mask(k_prompt.shape[2], k_rejected.shape[2], window, k.dtype, k.device)
            outputs.append(_attend(q_rejected, k, v, mask, scaling))
    return torch.cat(outputs, 2).transpose(1, 2).to(dtype).contiguous(), None


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    gqa = q.shape[1] != k.shape[1]
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=gqa)


@lru_cache(maxsize=256)
def _answer_mask(prompt: int, answer: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What an answer's tokens see of [prompt, answer], added to the scores; the same for all layers, so kept."""
    column = torch.arange(prompt + answer, device=device)
    row = column[prompt:, None]
    visible = row >= column
    if window is not None:
        visible &= row - column < window
    return torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill_(~visible, float("-inf"))


for _name, _attention in ((PAIRS, _attend_pairs), (FLEX, _attend_flex)):
    AttentionInterface.register(_name, _attention)
    AttentionMaskInterface.register(_name, sdpa_mask)


def choose_attention(wanted: str, config: Any, device: torch.device) -> str:
    """The implementation for `model.attention`, by transformers' name for it."""
    if wanted != "auto":
        return wanted
    heads = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return FLEX if device.type == "cuda" and heads >= _SMALLEST_FLEX_HEAD and can_compile() else PAIRS


def can_compile() -> bool:
    """Whether kernels can be made on this machine: Triton, and the C compiler that it calls."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return compiler is not None and find_spec("triton") is not None


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
