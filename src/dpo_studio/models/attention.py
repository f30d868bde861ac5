"""Attention over a pack: pairs apart, both answers behind one prompt, windows counted in each answer's own places.

Three ways to the same numbers (`models.attention_functions`). `flex`, for GPUs: one FlexAttention kernel over the row
(arXiv 2412.05496) that skips fully masked blocks. `pairs`, for CPUs: each pair's attention on its own through SDPA,
nothing masked away and nothing computed in vain. `sdpa`: one dense bool mask over the row, the fallback that runs
everywhere. Models with an attention of their own written in (Falcon, XGLM) run that, under a dense mask that they add
to the scores.

A wrong mask raises nothing and costs nats: policy and reference err alike, so ln 2 at step 0 cannot see it. Hence the
list of what is refused, and `learning.packing_check`, run at the start of every training and evaluation.

Shapes: T = tokens of the row, B = blocks of 128 of them, H = heads, D = head size.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import pad
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

from dpo_studio.config import Layout
from dpo_studio.errors import ModelError
from dpo_studio.models.attention_functions import BLOCK, DENSE, FLEX, PAIRS, pack_note
from dpo_studio.models.families import family_of
from dpo_studio.models.head import head_law
from dpo_studio.tokens.pack import MicroBatch, Span

__all__ = [
    "BLOCK",
    "DENSE",
    "FLEX",
    "PAIRS",
    "block_mask",
    "can_compile",
    "check_architecture",
    "choose_attention",
    "dense_mask",
    "row_inputs",
]

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
_SMALLEST_FLEX_HEAD = 16
_LEAST_ROOM = 2048
"""Shorter rows share one kernel; unused blocks are skipped."""


def row_inputs(config: PreTrainedConfig, batch: MicroBatch) -> dict[str, Any]:
    """What the model's forward needs to read this row.

    Models whose config lists `layer_types` (Qwen2/3, Gemma-3, ...) take a mask for each kind of layer; the others one
    mask, with the window inside where the config has one (Mistral) and an answer is long enough to notice.
    """
    kind = config._attn_implementation
    if kind == FLEX:
        batch = _whole_blocks(batch)
    window, chunk = (getattr(config, key, None) for key in ("sliding_window", "attention_chunk_size"))
    longest = max(map(longest_read, batch.spans))
    window, chunk = (None if size is None or longest <= size else size for size in (window, chunk))
    makers: dict[str, Callable[..., Any]] = {
        PAIRS: _note,
        FLEX: block_mask,
        "eager": partial(_added_mask, getattr(config, "dtype", None) or torch.float32),
    }
    make = makers.get(kind, dense_mask)
    full, sliding = make(batch, None), make(batch, window)
    kinds = getattr(config, "layer_types", None)
    others = {SLIDING: sliding} | ({CHUNKED: make(batch, None, chunk)} if CHUNKED in (kinds or ()) else {})
    masks = sliding if kinds is None else {FULL: full} | {kind: others.get(kind, full) for kind in kinds}
    return {"input_ids": batch.ids_1T, "position_ids": batch.position_ids_1T, "attention_mask": masks}


def longest_read(span: Span) -> int:
    """Tokens of a pair's longer answer and its prompt: how far back a token could look."""
    return max(span.chosen_end, span.prompt_end + span.rejected_end - span.chosen_end) - span.start


def dense_mask(batch: MicroBatch, window: int | None = None, chunk: int | None = None) -> Tensor:
    """Same pair, not later, in the prompt or the same answer, within the window, in the same chunk of the answer's own
    positions: bool (1, 1, T, T), True = may look."""
    place_T = torch.arange(batch.ids_1T.shape[1], device=batch.ids_1T.device)
    visible = _visible(batch, window, chunk)
    return visible(None, None, place_T[:, None], place_T)[None, None]


def block_mask(batch: MicroBatch, window: int | None = None, chunk: int | None = None) -> BlockMask:
    """The same for FlexAttention. Which blocks it visits follows from their extremes; no T x T mask is built."""
    # a pair over its room is met rarely, and each length would have a kernel of its own
    room = batch.token_budget if batch.tokens <= batch.token_budget else 1 << (batch.tokens - 1).bit_length()
    batch = _whole_blocks(batch, max(room, BLOCK if batch.ids_1T.device.type == "cpu" else _LEAST_ROOM))
    until_BR, position_BR = batch.seen_until_T.view(-1, BLOCK), batch.position_ids_1T.view(-1, BLOCK)
    start_B = torch.arange(len(until_BR), device=until_BR.device) * BLOCK
    earlier_BB = start_B[:, None] > start_B
    some_BB = (earlier_BB & (until_BR.amax(1) > start_B[:, None])) | (start_B[:, None] == start_B)
    all_BB = earlier_BB & (until_BR.amin(1) >= start_B[:, None] + BLOCK)
    if window is not None:  # nearest and furthest two tokens of the blocks can be
        some_BB &= position_BR.amin(1)[:, None] - position_BR.amax(1) < window
        all_BB &= position_BR.amax(1)[:, None] - position_BR.amin(1) < window
    if chunk is not None:  # the first and the last chunk of each block
        first_B, last_B = position_BR.amin(1) // chunk, position_BR.amax(1) // chunk
        some_BB &= (first_B[:, None] <= last_B) & (first_B <= last_B[:, None])
        all_BB &= (first_B == last_B) & (first_B == last_B)[:, None] & (first_B[:, None] == first_B)
    partial, full = _listed(some_BB & ~all_BB), _listed(some_BB & all_BB)
    for tensor in (*partial, *full, batch.seen_until_T, batch.position_ids_1T):
        torch._dynamo.mark_static(tensor)
    return BlockMask.from_kv_blocks(
        *partial, *full, BLOCK, _visible(batch, window, chunk), (batch.tokens, batch.tokens)
    )


def _visible(batch: MicroBatch, window: int | None, chunk: int | None) -> Callable[[Any, Any, Tensor, Tensor], Tensor]:
    """Whether the token at place q of the row may look at the one at place k, in FlexAttention's signature."""
    until_T, position_T = batch.seen_until_T, batch.position_ids_1T[0]

    def visible(_batch: Any, _head: Any, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (q < until_T[k])

    if chunk is not None:
        size = chunk

        def visible_in_chunk(_batch: Any, _head: Any, q: Tensor, k: Tensor) -> Tensor:
            return visible(_batch, _head, q, k) & (position_T[q] // size == position_T[k] // size)

        return visible_in_chunk
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
    """The row filled up to whole blocks with tokens that see only themselves and that no output depends on."""
    length = batch.tokens
    missing = -(-max(length, at_least) // BLOCK) * BLOCK - length
    alone = torch.arange(length + 1, length + missing + 1, device=batch.seen_until_T.device)
    return replace(
        batch,
        ids_1T=pad(batch.ids_1T, (0, missing)),
        position_ids_1T=pad(batch.position_ids_1T, (0, missing)),
        seen_until_T=torch.cat([batch.seen_until_T, alone]),
    )


def _note(batch: MicroBatch, window: int | None, chunk: int | None = None) -> Tensor:
    return pack_note(batch.spans, window, chunk)


def _added_mask(dtype: torch.dtype, batch: MicroBatch, window: int | None, chunk: int | None = None) -> Tensor:
    """The dense mask in the form that the models' own eager attention adds to its scores."""
    mask = dense_mask(batch, window, chunk)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


def choose_attention(
    wanted: str,
    config: PreTrainedConfig,
    device: torch.device,
    layout: Layout = "packed",
    *,
    compiles: bool | None = None,
) -> str:
    """The implementation for `model.attention`, by transformers' name for it; one of its own outside packs.

    `compiles`: whether kernels can be made; None asks this machine.
    """
    if layout != "packed":
        model = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
        return "sdpa" if _takes_ours(config) and model is not None and model._supports_sdpa else "eager"
    if not _takes_ours(config):
        return "eager"
    if wanted == "sdpa" or family_of(config).dense_mask:
        return DENSE
    smallest = min(_head_sizes(config))
    compiles = device.type == "cuda" and (can_compile() if compiles is None else compiles)
    return FLEX if compiles and smallest >= _SMALLEST_FLEX_HEAD else PAIRS


def _takes_ours(config: PreTrainedConfig) -> bool:
    """Whether the model uses the configured attention; XGLM and GPT-NeoX-Japanese have their own hard-coded."""
    model = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return model is None or model._can_set_attn_implementation()


def _head_sizes(config: PreTrainedConfig) -> list[int]:
    """Of every layer: Gemma 4's layers with full attention have wider heads than those with a window."""
    layers = config.per_layer_config if getattr(config, "is_heterogeneous", False) else [config]
    return [getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads for layer in layers]


def can_compile() -> bool:
    """Whether kernels can be made on this machine: Triton, and the C compiler that it calls."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return compiler is not None and find_spec("triton") is not None


def check_architecture(config: PreTrainedConfig, name: str) -> None:
    """Refuse models with unknown changes of the logits, and those that no layout makes right.

    Raises:
        ModelError: with the property that prevents it.
    """
    for reason in _obstacles(config):
        raise ModelError(
            f"{name} ({getattr(config, 'model_type', 'unknown')}) {reason}: DPO Studio cannot train or score it yet",
            hint="models that write one token after the other, each seeing only what precedes it, work",
        )
    head_law(config)


def _obstacles(config: PreTrainedConfig) -> list[str]:
    reasons = []
    if getattr(config, "use_bidirectional_attention", None) in (True, "all"):
        reasons.append("looks at later tokens (use_bidirectional_attention)")
    if getattr(config, "is_encoder_decoder", False):
        reasons.append("is an encoder-decoder")
    refusal = family_of(config).refusal
    if refusal is not None and refusal.applies(config):
        reasons.append(refusal.words)
    return reasons
