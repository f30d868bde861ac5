"""Tiny random models of every layout, each with its own kind of what a pack's mask does not reach."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dpo_studio.config import Layout
from dpo_studio.models.attention import choose_attention
from dpo_studio.models.conv1d import as_linear
from dpo_studio.models.layouts import choose_layout, set_layout
from tests.families import SIZES

__all__ = ["CASES", "base_of"]

CPU = torch.device("cpu")
STATE: dict[str, Any] = {"layer_types": ["linear_attention", "full_attention"]}
CASES: dict[str, tuple[Layout, str, dict[str, Any]]] = {
    "llama": ("packed", "llama", {}),
    "llama4": (
        "packed",
        "llama4_text",
        {"attention_chunk_size": 16, "no_rope_layers": [1, 0], "floor_scale": 30, "intermediate_size_mlp": 80},
    ),
    "gpt2": ("packed", "gpt2", {}),
    "llama, asked for apart": ("apart", "llama", {}),
    "mistral with a window, asked for apart": ("apart", "mistral", {"sliding_window": 9}),
    "bloom": ("apart", "bloom", {}),
    "gpt_neo": ("apart", "gpt_neo", {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}),
    "qwen3_next": ("rows", "qwen3_next", {**STATE, "linear_num_key_heads": 2, "linear_num_value_heads": 4}),
    "bamba": ("rows", "bamba", {"attn_layer_indices": [1], "mamba_n_heads": 6, "mamba_d_head": 16}),
    "mamba2": ("rows", "mamba2", {"num_heads": 6, "head_dim": 16, "state_size": 8, "chunk_size": 16}),
    "lfm2": ("rows", "lfm2", {"layer_types": ["conv", "full_attention"]}),
}
"""A model of each layout, and of each kind of state: a delta rule, Mamba 2 beside attention and alone, convolutions.
Llama 4's chunks and the places by which it scales its queries are shorter than the pairs."""
SMALLER = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "n_groups": 1}


def base_of(case: str, attention: str | None = None) -> tuple[Any, Layout]:
    """A random model of the case, with the layout that is asked for set."""
    wanted, kind, own = CASES[case]
    config_class = type(AutoConfig.for_model(kind))
    known = set(getattr(config_class, "__dataclass_fields__", {}))
    sizes = {key: value for key, value in (SIZES | SMALLER).items() if key in known}
    config = config_class(**(sizes | own))
    layout = choose_layout(config, wanted).layout
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation=attention or choose_attention("auto", config, CPU, layout), dtype=torch.float32
    )
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p += 0.1 * torch.randn(p.shape, generator=draw)
    as_linear(model)
    set_layout(model, layout)
    return model.requires_grad_(False).eval(), layout
