"""The base and the adapter as one plain model: W + scale B A computed in fp32, rounded once, saved without PEFT.

Rounding matters here. A bf16 base is on bf16's grid, an adapter moves most weights by less than half a
step of it, and rounding to the nearest puts those back: of the demo run's mean reward margin 7.56 it left 6.43. So an
adapted weight goes to one of its two neighbours by a seeded draw, the nearer one the likelier, its mean where it was.
Single weights are further off, but what they add up to in a product is not: margin 7.55, the same bytes every time.

Shapes: N = outputs, K = inputs, r = rank.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.utils import logging as transformers_logging

from dpo_studio.errors import ModelError, reason_of
from dpo_studio.frozen.linear import FrozenLinear
from dpo_studio.models.adapters import POLICY
from dpo_studio.models.conv1d import as_conv1d
from dpo_studio.models.dora import is_dora
from dpo_studio.models.experts import LoraExperts, factors, plain_name
from dpo_studio.models.lora import LoraLinear
from dpo_studio.models.trained_modules import TrainedModule
from dpo_studio.scan import read_json

__all__ = [
    "AnyDelta",
    "Delta",
    "adapter_deltas",
    "copy_tokenizer",
    "forget_where_from",
    "merge",
    "rounded",
    "save_plain",
]

_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "vocab.txt", "chat_template.jinja", "generation_config.json", "*.model"),
    # of a wrapper, what its frozen parts need
    *("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"),
)
_TEMPLATE = "chat_template.jinja"
_WHERE_FROM = ("_name_or_path", "_model_name_or_path", "name_or_path")
"""Keys in which configs record paths of the machine they were made on."""


@dataclass(frozen=True, eq=False)
class Delta:
    """The adapter's delta of one layer."""

    down_rK: Tensor
    """LoRA's A, fp32."""
    up_Nr: Tensor
    """LoRA's B, fp32."""
    scale: float
    magnitude_N: Tensor | None = None
    """DoRA's, fp32: the norm that each row of the sum is given."""

    def added_to(self, weight_NK: Tensor) -> Tensor:
        """fp32."""
        up_Nr, down_rK = (side.to(weight_NK.device) for side in (self.up_Nr, self.down_rK))
        sum_NK = torch.addmm(weight_NK.float(), up_Nr, down_rK, alpha=self.scale)
        if self.magnitude_N is None:
            return sum_NK
        return sum_NK.mul_((self.magnitude_N.to(sum_NK.device) / torch.linalg.vector_norm(sum_NK, dim=1))[:, None])


@dataclass(frozen=True, eq=False)
class ExpertsDelta:
    """The adapter's delta of one projection of all experts."""

    down_ErK: Tensor
    """LoRA's A of each expert, fp32."""
    up_ENr: Tensor
    """LoRA's B of each, with the scale, fp32."""
    transposed: bool
    """Whether the base has (E, K, N) in the place of (E, N, K)."""

    def added_to(self, weight: Tensor, expert: int) -> Tensor:
        """One expert's weight, in the base's shape, fp32."""
        delta_NK = (self.up_ENr[expert] @ self.down_ErK[expert]).to(weight.device)
        return weight[expert].float() + (delta_NK.t() if self.transposed else delta_NK)


@dataclass(frozen=True, eq=False)
class Whole:
    """What was trained in the place of an embedding or a head."""

    tensors: dict[str, Tensor]
    """By the names they have in their module, fp32."""


AnyDelta = Delta | ExpertsDelta | Whole


def adapter_deltas(policy: nn.Module) -> dict[str, AnyDelta]:
    """What the policy's adapter changes, by the name that the layer has in the base, on the CPU."""
    found: dict[str, AnyDelta] = {}
    for name, layer in policy.named_modules():
        name = name.removeprefix("base_model.model.")
        if isinstance(layer, LoraLinear) and POLICY in layer.lora_A:
            magnitude_N = layer.lora_magnitude_vector[POLICY].weight if is_dora(layer, POLICY) else None
            found[name] = Delta(
                layer.lora_A[POLICY].weight.detach().float().cpu(),
                layer.lora_B[POLICY].weight.detach().float().cpu(),
                float(layer.scaling[POLICY]),
                None if magnitude_N is None else magnitude_N.detach().float().cpu(),
            )
        elif isinstance(layer, LoraExperts) and POLICY in layer.lora_A:
            down_ErK, up_ENr = (part.detach().float().cpu() for part in factors(layer, POLICY))
            transposed = bool(layer.get_base_layer().is_transposed)
            found[f"{plain_name(name)}.{layer.parameter_name}"] = ExpertsDelta(down_ErK, up_ENr, transposed)
        elif isinstance(layer, TrainedModule) and POLICY in layer.modules_to_save:
            named = layer.modules_to_save[POLICY].named_parameters()
            found[name] = Whole({key: p.detach().float().cpu() for key, p in named})
    return found


def merge(model: nn.Module, deltas: Mapping[str, AnyDelta], dtype: torch.dtype = torch.bfloat16) -> None:
    """Make `model` dense, with the deltas in it, every tensor rounded once to `dtype`; a layer at a time.

    Raises:
        ModelError: a delta is for a layer that the model has not, or the sum is not finite.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, FrozenLinear) or name in deltas}
    experts = {name: p for name, p in model.named_parameters() if isinstance(deltas.get(name), ExpertsDelta)}
    if strange := sorted(deltas.keys() - layers.keys() - experts.keys()):
        raise ModelError(f"the adapter is for {strange[0]}, which the base has not")
    if any(isinstance(delta, Whole) for delta in deltas.values()):
        _untie(model)
    for name, p in experts.items():
        _merge_experts(p, deltas[name], name, dtype)
    for name, layer in layers.items():
        if isinstance(whole := deltas.get(name), Whole):
            for key, tensor in whole.tensors.items():  # to the nearest, as every forward pass of the run rounded it
                setattr(layer, key, nn.Parameter(_finite(tensor.to(dtype), name, dtype), requires_grad=False))
            continue
        weight_NK = layer.dense_weight(torch.float32) if isinstance(layer, FrozenLinear) else layer.weight
        with torch.no_grad():
            if isinstance(delta := deltas.get(name), Delta):
                merged_NK = rounded(delta.added_to(weight_NK), dtype, seed=_seed(name))
            else:
                merged_NK = weight_NK.to(dtype)
        model.set_submodule(name, _linear(_finite(merged_NK, name, dtype), layer.bias))
    model.to(dtype)


@torch.no_grad()
def _merge_experts(p: nn.Parameter, delta: object, name: str, dtype: torch.dtype) -> None:
    assert isinstance(delta, ExpertsDelta)
    merged = torch.empty(p.shape, dtype=dtype, device=p.device)
    for expert in range(len(p)):  # one at a time: of all together 30B's layers have 2 GiB in fp32
        merged[expert] = rounded(delta.added_to(p, expert), dtype, seed=_seed(f"{name}.{expert}"))
    p.data = _finite(merged, name, dtype)


def _finite(merged: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    if not torch.isfinite(merged).all():
        raise ModelError(f"{name}: the merged weights are not finite in {dtype}")
    return merged


def _untie(model: Any) -> None:
    """Give the head a weight of its own where it shares the embedding's: only one of the two may have been trained."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False


def rounded(exact: Tensor, dtype: torch.dtype, *, seed: int) -> Tensor:
    """fp32 numbers in `dtype`; in bf16 each one of its two neighbours, so that on average nothing is lost.

    bf16 is fp32 without its last 16 bits: adding a number below 2^16 and cutting them off rounds away from zero as
    often as it should. Drawn on the CPU: the same on every device.
    """
    if dtype != torch.bfloat16:
        return exact.to(dtype)
    draw = torch.Generator().manual_seed(seed)
    dither = torch.randint(1 << 16, exact.shape, generator=draw, dtype=torch.int32).to(exact.device)
    return ((exact.view(torch.int32) + dither) & -(1 << 16)).view(torch.float32).to(dtype)


def _seed(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")


def _linear(weight_NK: Tensor, bias: Any) -> nn.Linear:
    outputs, inputs = weight_NK.shape
    linear = nn.Linear(inputs, outputs, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight_NK, requires_grad=False)
    linear.bias = bias
    return linear


def save_plain(model: Any, folder: Path, *, source: Path, template: str | None) -> None:
    """A model folder as transformers wants it, with the tokenizer and generation config of `source`.

    transformers saves no generation config that it would find fault with, and some of the best known have a fault (a
    temperature beside `do_sample: false`). The source's own is copied anyway.

    Raises:
        ModelError: transformers would not save what the source's config.json says.
    """
    model.config.__dict__.pop("quantization_config", None)
    as_conv1d(model)
    if (source / "generation_config.json").is_file():
        model.generation_config = GenerationConfig()
    transformers_logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = reason_of(error)
        raise ModelError(f"{source}: transformers does not save a model with this config: {reason}") from None
    finally:
        transformers_logging.enable_progress_bar()
    copy_tokenizer(source, folder, template)
    forget_where_from(folder)


def copy_tokenizer(source: Path, folder: Path, template: str | None) -> None:
    """Tokenizer, chat template and generation config of `source`, byte for byte; `template` replaces its own.

    Saved again by transformers a tokenizer may come out under another class, which older versions do not know.
    """
    for pattern in _TOKENIZER_FILES:
        for file in source.glob(pattern):
            shutil.copyfile(file, folder / file.name)
    if template is None:
        return
    (folder / _TEMPLATE).write_text(template, encoding="utf-8")
    config = read_json(folder / "tokenizer_config.json")
    if config.pop("chat_template", None) is not None:
        _write_json(folder / "tokenizer_config.json", config)


def forget_where_from(folder: Path) -> None:
    """Take paths of this machine out of the configs."""
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        config = read_json(folder / name)
        if known := [key for key in _WHERE_FROM if key in config]:
            for key in known:
                del config[key]
            _write_json(folder / name, config)


def _write_json(file: Path, config: dict[str, Any]) -> None:
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
