"""A plain transformers folder as a GGUF for llama.cpp and Ollama: config, tokenizer and tensors, nothing approximated.

What llama.cpp would compute otherwise is refused by name: a family, an activation, a bias or a rotary scaling that its
graph of that family does not have. Matrices are f16, bf16 or q8_0; vectors are fp32, as in llama.cpp's own files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from dpo_studio.errors import ModelError
from dpo_studio.export.gguf_tokenizer import read_tokenizer

__all__ = ["GgufType", "gguf_family", "write_gguf"]

GgufType = Literal["f16", "bf16", "q8_0"]
_TYPES = {
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
_Q8_BLOCK = 32
_F16_LARGEST = 65504.0
_HINT = "--to merged is what vLLM and transformers read; llama.cpp's own converter may know this model"


@dataclass(frozen=True)
class _Family:
    """How llama.cpp's graph of a family differs from others."""

    architecture: gguf.MODEL_ARCH
    pairs_neighbours: bool = False
    """Its rotations turn neighbouring values, where transformers turns halves: rows of q and k are reordered."""
    norm_plus_one: bool = False
    """Its norms multiply with the weight, where transformers multiplies with 1 + weight."""
    activation: str = "silu"


_FAMILIES = {
    "llama": _Family(gguf.MODEL_ARCH.LLAMA, pairs_neighbours=True),
    "mistral": _Family(gguf.MODEL_ARCH.LLAMA, pairs_neighbours=True),
    "qwen2": _Family(gguf.MODEL_ARCH.QWEN2),
    "qwen3": _Family(gguf.MODEL_ARCH.QWEN3),
    "gemma": _Family(gguf.MODEL_ARCH.GEMMA, norm_plus_one=True, activation="gelu_pytorch_tanh"),
    "gemma2": _Family(gguf.MODEL_ARCH.GEMMA2, norm_plus_one=True, activation="gelu_pytorch_tanh"),
    "gemma3_text": _Family(gguf.MODEL_ARCH.GEMMA3, norm_plus_one=True, activation="gelu_pytorch_tanh"),
}


def gguf_family(config: PreTrainedConfig) -> _Family:
    """What llama.cpp calls the model.

    Raises:
        ModelError: it would compute another one.
    """
    family = _FAMILIES.get(config.model_type)
    if family is None:
        raise ModelError(f"{config.model_type} models are not written as GGUF", hint=_HINT)
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", family.activation)
    if activation != family.activation:
        raise ModelError(
            f"llama.cpp computes {config.model_type} with {family.activation}, not {activation}", hint=_HINT
        )
    for bias in ("attention_bias", "mlp_bias"):
        if getattr(config, bias, False):
            raise ModelError(f"llama.cpp computes {config.model_type} without {bias}", hint=_HINT)
    split = config.hidden_size // config.num_attention_heads
    if config.model_type == "qwen2" and _head_size(config) != split:
        raise ModelError(f"llama.cpp gives qwen2 heads of {split}, not {config.head_dim}", hint=_HINT)
    for parameters in _ropes(config):
        if parameters.get("rope_type", "default") not in ("default", "linear", "llama3"):
            raise ModelError(f"a rotary scaling of type {parameters['rope_type']} is not written as GGUF", hint=_HINT)
    if config.model_type in ("gemma2", "gemma3_text"):
        _check_gemma(config)
    return family


def write_gguf(
    folder: Path,
    out: Path,
    *,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    template: str | None,
    end_of_turn: int | None,
    name: str,
    type_: GgufType,
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Write the merged model in `folder` to the file `out`; `progress` gets the number of tensors written.

    Raises:
        ModelError: llama.cpp would compute another model, or a value has no room in f16.
    """
    family = gguf_family(config)
    kind, file_type = _TYPES[type_]
    names = gguf.get_tensor_name_map(family.architecture, config.num_hidden_layers)
    writer = gguf.GGUFWriter(out, gguf.MODEL_ARCH_NAMES[family.architecture])
    try:
        _write_settings(writer, config, name)
        writer.add_file_type(file_type)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        read_tokenizer(tokenizer, config.vocab_size, end_of_turn).write(writer)
        if template is not None:
            writer.add_chat_template(template)
        if (factors := _llama3_factors(config)) is not None:
            writer.add_tensor("rope_freqs.weight", factors)
        for key, tensor in _tensors(folder):
            if config.tie_word_embeddings and key == "lm_head.weight":
                continue
            called = names.get_name(key, (".weight", ".bias"))
            if called is None:
                raise ModelError(
                    f"llama.cpp has no place for the tensor {key} in a {config.model_type} model", hint=_HINT
                )
            values, own = _as_stored(_as_computed(key, tensor, config, family), kind, key)
            writer.add_tensor(called, values, raw_dtype=own)
            progress(1)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - safe_open is no dict
                yield key, tensors.get_tensor(key)


def _as_computed(key: str, tensor: Tensor, config: PreTrainedConfig, family: _Family) -> Tensor:
    """The values that llama.cpp's graph wants, fp32."""
    tensor = tensor.float()
    if family.norm_plus_one and key.endswith("norm.weight"):
        return tensor + 1
    for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
        if family.pairs_neighbours and f".{part}." in key:
            return tensor.view(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
    return tensor


def _as_stored(
    tensor: Tensor, kind: gguf.GGMLQuantizationType, key: str
) -> tuple[np.ndarray[Any, Any], gguf.GGMLQuantizationType]:
    """(a tensor's bytes in its own type, that type): vectors stay fp32."""
    if tensor.ndim < 2:
        return tensor.numpy(), gguf.GGMLQuantizationType.F32
    if kind == gguf.GGMLQuantizationType.Q8_0 and tensor.shape[-1] % _Q8_BLOCK:
        kind = gguf.GGMLQuantizationType.F16
    if kind == gguf.GGMLQuantizationType.F16 and tensor.abs().amax() > _F16_LARGEST:
        raise ModelError(f"{key} has values beyond fp16's range", hint="--type bf16")
    if kind == gguf.GGMLQuantizationType.BF16:
        return tensor.bfloat16().view(torch.uint8).numpy(), kind
    if kind == gguf.GGMLQuantizationType.F16:
        return tensor.half().numpy(), kind
    return gguf.quants.quantize(tensor.numpy(), kind), kind


def _write_settings(writer: gguf.GGUFWriter, config: PreTrainedConfig, name: str) -> None:
    size = _head_size(config)
    window = getattr(config, "sliding_window", None) if _has_window(config) else None
    full = _ropes(config)[0]
    length = config.max_position_embeddings
    if config.model_type == "mistral" and window:  # llama.cpp's graph has no window: text beyond it would differ
        length, window = min(length, window), None
    writer.add_name(name)
    writer.add_context_length(length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(full["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if full.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(full["factor"])
    if window:
        writer.add_sliding_window(window)
    if cap := getattr(config, "attn_logit_softcapping", None):
        writer.add_attn_logit_softcapping(cap)
    if cap := getattr(config, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(cap)


def _check_gemma(config: PreTrainedConfig) -> None:
    """llama.cpp has Gemma's scale of the scores and its pattern of windows in its graph, not in the file.

    Raises:
        ModelError: this model has others.
    """
    by_width = config.num_hidden_layers in (46, 62)
    expected_scale = config.hidden_size // config.num_attention_heads if by_width else _head_size(config)
    if config.query_pre_attn_scalar != expected_scale:
        raise ModelError(
            f"llama.cpp scales this model's scores by {expected_scale}, not {config.query_pre_attn_scalar}", hint=_HINT
        )
    every = 2 if config.model_type == "gemma2" else 6
    pattern = [
        "full_attention" if (at + 1) % every == 0 else "sliding_attention" for at in range(config.num_hidden_layers)
    ]
    if list(config.layer_types) != pattern:
        raise ModelError(
            f"llama.cpp gives every {every}th layer of this family full attention; here it is another", hint=_HINT
        )
    local = _ropes(config)[-1]
    if config.model_type == "gemma3_text" and local["rope_theta"] != 10000.0:
        raise ModelError("llama.cpp computes Gemma 3's window layers with a rope_theta of 10000", hint=_HINT)


def _head_size(config: PreTrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _has_window(config: PreTrainedConfig) -> bool:
    kinds = getattr(config, "layer_types", None)
    return "sliding_attention" in kinds if kinds else bool(getattr(config, "use_sliding_window", True))


def _ropes(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """The rotary settings: of full attention, then of window layers where these have their own."""
    given = config.rope_parameters
    if "rope_theta" in given:
        return [given]
    return [given[kind] for kind in ("full_attention", "sliding_attention") if kind in given]


def _llama3_factors(config: PreTrainedConfig) -> np.ndarray[Any, Any] | None:
    """What llama.cpp divides each frequency by, (head size / 2,) fp32, for Llama 3.1's rotary scaling; else None.

    Wavelengths longer than the old context / low_freq_factor are stretched by `factor`, those shorter than it /
    high_freq_factor not at all, and between them it is interpolated (Llama 3.1's published code).
    """
    rope = _ropes(config)[0]
    if rope.get("rope_type") != "llama3":
        return None
    size = _head_size(config)
    old, low, high = (rope[key] for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"))
    factors = []
    for at in range(0, size, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (at / size)
        smooth = min(1.0, max(0.0, (old / wavelength - low) / (high - low)))
        factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, dtype=np.float32)
