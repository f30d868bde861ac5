"""GPT-2's Conv1D, a linear layer whose weight is saved the other way round: computed as `nn.Linear`, saved as it was.

So adapters, merging and the reference treat it as any other layer; A and B have the same shapes on either.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from dpo_studio.models.layers import causal_lm

__all__ = ["as_conv1d", "as_linear", "has_conv1d"]


def as_linear(model: Any) -> None:
    """Put an `nn.Linear` of the same values in the place of each Conv1D."""
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, Conv1D)]
    model.dpo_studio_conv1d = tuple(name for name, _ in found)
    for name, layer in found:
        inputs, outputs = layer.weight.shape
        linear = nn.Linear(inputs, outputs, device="meta")
        linear.weight, linear.bias = nn.Parameter(layer.weight.detach().t().contiguous()), layer.bias
        model.set_submodule(name, linear)


def as_conv1d(model: Any) -> None:
    """Undo `as_linear`, before the model is saved."""
    for name in _names(model):
        linear: Any = model.get_submodule(name)
        with torch.device("meta"):
            layer = Conv1D(linear.out_features, linear.in_features)
        layer.weight, layer.bias = nn.Parameter(linear.weight.detach().t().contiguous()), linear.bias
        model.set_submodule(name, layer)


def has_conv1d(model: nn.Module) -> bool:
    """Whether `as_linear` found any in this model, or in the one under an adapter."""
    return bool(_names(causal_lm(model)))


def _names(model: nn.Module) -> tuple[str, ...]:
    names: tuple[str, ...] = getattr(model, "dpo_studio_conv1d", ())
    return names
