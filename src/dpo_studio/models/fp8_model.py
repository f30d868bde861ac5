"""`model.compute: fp8`: linear layers rounded to e4m3 one at a time, while a dense base moves to the GPU, or from the
weights as a quantised one forms them (GPTQ has exact products of its own)."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from dpo_studio.errors import ModelError
from dpo_studio.frozen.linear import FrozenLinear, frozen_weight
from dpo_studio.frozen.row_scaled import MULTIPLE, RowScaled, row_scaled_obstacle
from dpo_studio.models.targets import all_linear

__all__ = ["into_fp8"]

_HINT = "compute: auto works everywhere"


def into_fp8(model: PreTrainedModel, device: torch.device, name: str) -> str:
    """Put FP8 layers on `device` in the place of the linear layers that `all-linear` means; returns a note for people.

    Each weight is freed before the next is rounded, so that the GPU never holds more than one of them. The head,
    the embedding and norms stay as they are.

    Raises:
        ModelError: the device has no such products, a layer's size is no multiple of 16, or the model has experts.
    """
    if obstacle := row_scaled_obstacle(device, model.dtype):
        raise ModelError(f"model.compute: fp8 {obstacle}", hint=_HINT)
    targets = all_linear(model)
    if targets.experts or targets.parameters:
        raise ModelError(
            f"model.compute: fp8 cannot be used for {name}: its experts would stay as they are",
            hint=_HINT,
        )
    for path in targets.names:
        layer = model.get_submodule(path)
        assert isinstance(layer, nn.Linear)
        if layer.in_features % MULTIPLE or layer.out_features % MULTIPLE:
            raise ModelError(
                f"model.compute: fp8 cannot be used for {path}: {layer.in_features} inputs and {layer.out_features} "
                f"outputs are not both multiples of {MULTIPLE}",
                hint=_HINT,
            )
        parent, _, child = path.rpartition(".")
        weight = RowScaled.of(frozen_weight(layer).dequantised(model.dtype).detach().to(device))
        bias = None if layer.bias is None else layer.bias.detach().to(device)
        setattr(model.get_submodule(parent), child, FrozenLinear(weight, bias))
    slow = "; on a CPU that is slow, and gives a GPU's arithmetic" if device.type == "cpu" else ""
    return f"{len(targets.names)} linear layers compute in FP8 (e4m3, a scale a row), forward and backward{slow}"
