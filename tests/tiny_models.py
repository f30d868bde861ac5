"""Small real models in folders of the Hub's layout: random weights, every family whose attention differs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GraniteConfig,
    GraniteForCausalLM,
    GraniteSWAConfig,
    GraniteSWAForCausalLM,
    HyperCLOVAXConfig,
    HyperCLOVAXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)

from tests.tiny_tokenizers import VOCABULARY, end_ids, tiny_tokenizer

__all__ = ["ARCHITECTURES", "tiny_folder", "tiny_model"]

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,  # large enough that what a token sees changes its log-prob by whole nats
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MIXED = ["full_attention", "sliding_attention"] * 2

ARCHITECTURES: dict[str, tuple[type[PreTrainedModel], type[Any], dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "llama-tied": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
    "mistral-window": (MistralForCausalLM, MistralConfig, {"sliding_window": 9}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen2-mixed": (
        Qwen2ForCausalLM,
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 9, "layer_types": _MIXED},
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {}),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, {"sliding_window": 9, "layer_types": _MIXED}),
    "gemma2": (
        Gemma2ForCausalLM,
        Gemma2Config,
        {
            "sliding_window": 9,
            "layer_types": _MIXED,
            "query_pre_attn_scalar": 8,
            "final_logit_softcapping": 3.0,
            "attn_logit_softcapping": 2.0,
        },
    ),
    "granite": (GraniteForCausalLM, GraniteConfig, {"logits_scaling": 4.0, "embedding_multiplier": 3.0}),
    "granite-swa": (
        GraniteSWAForCausalLM,
        GraniteSWAConfig,
        {"sliding_window": 9, "layer_types": _MIXED, "logits_scaling": 2.0},
    ),
    "cohere": (CohereForCausalLM, CohereConfig, {"logit_scale": 0.25}),
    "hyperclovax": (HyperCLOVAXForCausalLM, HyperCLOVAXConfig, {"logits_scaling": 0.5}),
    "stablelm": (StableLmForCausalLM, StableLmConfig, {}),
}
"""Name -> model class, config class, what differs from the common shape. Windows of 9 cut into the pairs, caps of 2 and
3 into the scores and logits; Granite divides its logits by what HyperCLOVA X multiplies them by; StableLM hands its
attention the mask and nothing else."""


def tiny_model(architecture: str = "llama", *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random fp32 model of some 50,000 parameters."""
    model_class, config_class, own = ARCHITECTURES[architecture]
    torch.manual_seed(seed)
    model = model_class(config_class(**(_SHAPE | own | changes))).eval()
    for name, p in model.named_parameters():
        if name.endswith("sinks"):  # they begin at zero
            p.data = torch.randn(p.shape)
    return model


def tiny_folder(
    folder: Path, architecture: str = "llama", *, family: str = "chatml", seed: int = 0, **changes: Any
) -> Path:
    """The model with a tokenizer of `family`, saved as a Hub repository would hold them."""
    tokenizer = tiny_tokenizer(family)
    model = tiny_model(architecture, seed=seed, **changes)
    model.generation_config.eos_token_id = sorted(end_ids(family))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
