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
from dpo_studio.models.lora import LoraLinear
from dpo_studio.scan import read_json

__all__ = ["Delta", "adapter_deltas", "copy_tokenizer", "forget_where_from", "merge", "rounded", "save_plain"]

_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "vocab.txt", "chat_template.jinja", "generation_config.json", "*.model"),
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

    def added_to(self, weight_NK: Tensor) -> Tensor:
        """fp32."""
        up_Nr, down_rK = (side.to(weight_NK.device) for side in (self.up_Nr, self.down_rK))
        return torch.addmm(weight_NK.float(), up_Nr, down_rK, alpha=self.scale)


def adapter_deltas(policy: nn.Module) -> dict[str, Delta]:
    """What the policy's adapter adds, by the name that the layer has in the base, on the CPU."""
    return {
        name.removeprefix("base_model.model."): Delta(
            layer.lora_A[POLICY].weight.detach().float().cpu(),
            layer.lora_B[POLICY].weight.detach().float().cpu(),
            float(layer.scaling[POLICY]),
        )
        for name, layer in policy.named_modules()
        if isinstance(layer, LoraLinear) and POLICY in layer.lora_A
    }


def merge(model: nn.Module, deltas: Mapping[str, Delta], dtype: torch.dtype = torch.bfloat16) -> None:
    """Make `model` dense, with the deltas in it, every tensor rounded once to `dtype`; a layer at a time.

    Raises:
        ModelError: a delta is for a layer that the model has not, or the sum is not finite.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, FrozenLinear) or name in deltas}
    if strange := sorted(deltas.keys() - layers.keys()):
        raise ModelError(f"the adapter is for {strange[0]}, which the base has not")
    for name, layer in layers.items():
        weight_NK = layer.dense_weight(torch.float32) if isinstance(layer, FrozenLinear) else layer.weight
        with torch.no_grad():
            if name in deltas:
                merged_NK = rounded(deltas[name].added_to(weight_NK), dtype, seed=_seed(name))
            else:
                merged_NK = weight_NK.to(dtype)
        if not torch.isfinite(merged_NK).all():
            raise ModelError(f"{name}: the merged weights are not finite in {dtype}")
        model.set_submodule(name, _linear(merged_NK, layer.bias))
    model.to(dtype)


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
