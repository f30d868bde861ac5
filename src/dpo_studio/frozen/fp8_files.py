"""FP8 checkpoints in blocks, as DeepSeek writes them: e4m3, and a scale for each block in `weight_scale_inv`.

A weight is scale x value in fp32, rounded once to the precision of the product: the numbers that transformers forms.

Shapes: N = outputs, K = inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dpo_studio.errors import ModelError
from dpo_studio.frozen.scaled import Scaled
from dpo_studio.frozen.shards import Place

__all__ = ["read_fp8"]

_PARTS = ("weight", "weight_scale_inv", "bias")
_SCALES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Fp8Blocks:
    """How a checkpoint says it was quantised."""

    block: tuple[int, int]
    """Outputs and inputs that share a scale."""

    def reader(self, place: Place) -> Fp8Reader:
        """What reads its layers."""
        return Fp8Reader(place, self.block)


def read_fp8(folder: Path, raw: Mapping[str, Any]) -> Fp8Blocks:
    """The settings of a model folder, from what its config says.

    Raises:
        ModelError: no blocks, another format than e4m3, or static scales of activations.
    """
    block = raw.get("weight_block_size")
    if not (
        isinstance(block, list)
        and len(block) == 2
        and all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in block)
    ):
        raise ModelError(
            f"{folder}: its FP8 weights have the weight_block_size {block!r:.40}; two sizes, as [128, 128], are read",
            hint="use the model's bf16 version, with model.quantize: fp8",
        )
    form, scheme = raw.get("fmt", "e4m3"), raw.get("activation_scheme", "dynamic")
    if form not in ("e4m3", "float8_e4m3fn") or scheme != "dynamic":
        raise ModelError(
            f"{folder}: its FP8 weights are {form!r:.40}, activation_scheme {scheme!r:.40}; e4m3 and dynamic are read",
            hint="use the model's bf16 version, with model.quantize: fp8",
        )
    return Fp8Blocks((block[0], block[1]))


@dataclass(frozen=True)
class Fp8Reader:
    """Reads and checks one layer at a time."""

    place: Place
    block: tuple[int, int]

    def layers(self) -> dict[str, list[str]]:
        """The quantised layers, and the tensors of each."""
        shards = self.place.shards
        return shards.of_layers(shards.with_ending(".weight_scale_inv"), _PARTS)

    def linear(self, prefix: str, twin: nn.Linear) -> nn.Linear:
        """The layer on the device, in the place of `twin`, the model's own."""
        place, outputs, inputs = self.place, twin.out_features, twin.in_features
        height, width = block = min(self.block[0], outputs), min(self.block[1], inputs)
        shape = (-(-outputs // height), -(-inputs // width))
        values_NK = place.tensor(prefix, "weight", [torch.float8_e4m3fn], (outputs, inputs))
        scales_RC = place.tensor(prefix, "weight_scale_inv", _SCALES, shape).float()
        return place.linear(prefix, Scaled(values_NK, scales_RC, block), place.bias(prefix, twin))
