"""Small mixtures of experts, random weights, each with something of its own in how its experts are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.tiny_tokenizers import VOCABULARY, end_ids, tiny_tokenizer

__all__ = ["MIXTURES", "mixture_folder", "tiny_mixture"]

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts": 5,
    "num_local_experts": 5,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"sliding_window": None},
    "qwen2_moe": {},
    "qwen3_moe": {},
    "olmoe": {},
    "gpt_oss": {"layer_types": ["full_attention"] * 2},
    "deepseek_v3": {
        "num_experts": 4,
        "num_local_experts": 4,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
        "num_key_value_heads": 4,
    },
}
"""Model type -> what differs from the common shape. gpt-oss has transposed weights, biases and gates in turns, Qwen2 a
shared expert with a gate, DeepSeek a shared one without, a dense first layer and groups of experts."""


def tiny_mixture(kind: str = "qwen3_moe", *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random fp32 mixture of two layers, eager unless `attn_implementation` says otherwise."""
    attention = changes.pop("attn_implementation", "eager")
    config = AutoConfig.for_model(kind, **(_SHAPE | MIXTURES[kind] | changes))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    draw = torch.Generator().manual_seed(seed)
    for _, p in sorted(model.named_parameters()):
        if p.ndim == 3 or not p.any():  # experts are not always drawn, and sinks and biases begin at zero
            p.data = 0.3 * torch.randn(p.shape, generator=draw)
    model.requires_grad_(False)
    return model


def mixture_folder(folder: Path, kind: str = "qwen3_moe", **changes: Any) -> Path:
    """The mixture with a tokenizer, saved as a Hub repository would hold them."""
    tokenizer = tiny_tokenizer("chatml")
    model = tiny_mixture(kind, **changes)
    model.generation_config.eos_token_id = sorted(end_ids("chatml"))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
