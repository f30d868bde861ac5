"""From hidden states to logits: how a model scales them or caps them, by its family and its config.

The product with the head's weight is not all of it: Granite divides the logits, Cohere multiplies them, Gemma 2 bends
them by a tanh. Which key of the config decides it is in `models.families`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from dpo_studio.errors import ModelError
from dpo_studio.models.families import family_of
from dpo_studio.models.trained_modules import TrainedModule

__all__ = ["HeadLaw", "body_of", "head_law", "head_of"]


@dataclass(frozen=True)
class HeadLaw:
    """logits = cap * tanh(scale * z / cap), z = hidden @ head; without a cap scale * z."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, product_nV: Tensor) -> Tensor:
        """The logits, in fp32 unless nothing is to do: in bf16 those near a cap of 30 would be 0.125 apart."""
        if self.scale != 1:
            product_nV = product_nV.float() * self.scale
        return product_nV if self.cap is None else self.cap * torch.tanh(product_nV.float() / self.cap)

    def slope(self, logits_nV: Tensor) -> Tensor | float:
        """d logits / d z, from the logits: scale * (1 - (y / cap)^2)."""
        return self.scale if self.cap is None else self.scale * (1 - (logits_nV / self.cap) ** 2)


_SMELLS = re.compile(r"(?=.*(logit|lm_head|output))(?=.*(scal|mult|cap|temper|divis))")
"""Keys that may change the logits, unless `_INNER` matches: attention and routers have logits, too."""
_INNER = re.compile(r"attn|attention|query|key|value|router|expert|moe|mlp|ssm|gate|contrastive|init|vision|audio")


def head_law(config: PreTrainedConfig) -> HeadLaw:
    """What a model of this config does to `hidden @ head`.

    Raises:
        ModelError: the config has a key that may change logits, and its effect in this model is unknown.
    """
    kind = getattr(config, "model_type", "")
    text = config.get_text_config()
    family = family_of(config)
    divided, multiplied, capped = family.logits_divided_by, family.logits_multiplied_by, family.logits_capped_by
    law = HeadLaw(
        _number(text, multiplied, 1.0) / _number(text, divided, 1.0),
        _number(text, capped, None),
    )
    if law.scale == 0 or law.cap == 0:
        raise ModelError(f"{kind} makes all logits equal: {divided or multiplied or capped} in config.json")
    for key, value in vars(text).items():
        if key in (divided, multiplied, capped) or not _SMELLS.search(key) or _INNER.search(key):
            continue
        if isinstance(value, int | float) and value is not False and (value is True or value != 1 or "cap" in key):
            raise ModelError(
                f"{kind} has {key}: {value} in its config: whether it changes the logits, and how, is not known here",
                hint="please report the model",
            )
    if (real := getattr(text, "unpadded_vocab_size", None)) is not None and real < text.vocab_size:
        raise ModelError(f"{kind} cuts its logits off at {real} of {text.vocab_size} tokens (unpadded_vocab_size)")
    return law


def _number(config: PreTrainedConfig, key: str | None, otherwise: Any) -> Any:
    value = getattr(config, key, None) if key is not None else None
    return otherwise if value is None else float(value)


def body_of(base: Any) -> Any:
    """The part of a causal model that ends in hidden states; Llama 4's misnames it, and would be its own body."""
    return base.base_model if base.base_model is not base else base.model


def head_of(base: Any) -> Any:
    """The linear layer that makes a model's logits of its body's hidden states; the trained copy where that computes.

    Raises:
        ModelError: there is more between the two than one product.
    """
    wrapper = base.get_output_embeddings()
    head = wrapper.now() if isinstance(wrapper, TrainedModule) else wrapper
    if not isinstance(head, nn.Linear) or "bias" not in head._parameters or set(_own(head)) - {"weight", "bias"}:
        raise ModelError(f"{base.config.model_type} makes its logits by a {type(head).__name__}, not by one product")
    for name, child in base.named_children():
        if child is not body_of(base) and child is not wrapper and any(True for _ in child.parameters()):
            raise ModelError(
                f"{base.config.model_type} has a {type(child).__name__} ({name}) between its hidden states and its head"
            )
    return head


def _own(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters(recurse=False)]
