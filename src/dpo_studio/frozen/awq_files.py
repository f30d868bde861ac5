"""AWQ checkpoints in the gemm packing: their settings and layers, read into the packed integers that GPTQ has.

A weight is scale x (integer - zero point) as in GPTQ, and is formed by the same rule (`frozen/gptq.py`). Only the order
differs: AWQ packs eight outputs of one input in a word, of which nibble i is output 0, 2, 4, 6, 1, 3, 5, 7 (llm-awq,
AutoAWQ); here a row of words has the inputs of one output. No bit of an integer changes.

Shapes: N = outputs, K = inputs, G = groups of inputs, W = words of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpo_studio.errors import ModelError
from dpo_studio.frozen.dequantising import unpack
from dpo_studio.frozen.gptq import Packed
from dpo_studio.frozen.shards import Place

__all__ = ["read_awq"]

_BITS = 4
_PARTS = ("qweight", "qzeros", "scales", "bias")
_NIBBLE_OF_OUTPUT = (0, 4, 1, 5, 2, 6, 3, 7)
"""The nibble of a word in which each of its eight outputs is."""
_SCALES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Awq:
    """How a checkpoint says it was quantised."""

    group_size: int
    """Inputs that share a scale; -1: all of a layer's."""

    def reader(self, place: Place) -> AwqReader:
        """What reads its layers."""
        return AwqReader(place, self)


def read_awq(folder: Path, raw: Mapping[str, Any]) -> Awq:
    """The settings of a model folder, from what its config says.

    Raises:
        ModelError: another packing than gemm, or other settings than AWQ's.
    """
    form = str(raw.get("version") or raw.get("format") or raw.get("checkpoint_format") or "gemm").lower()
    if form != "gemm" or str(raw.get("backend", "auto")).lower() == "llm-awq":
        raise ModelError(
            f"{folder}: its AWQ weights are in another packing than gemm ({form})",
            hint="use the model's version in the gemm packing, which is the usual one",
        )
    bits, group_size = raw.get("bits", raw.get("w_bit")), raw.get("group_size", raw.get("q_group_size"))
    if bits != _BITS or raw.get("zero_point", True) is not True:
        raise ModelError(
            f"{folder}: AWQ of {bits!r:.40} bits, zero_point {raw.get('zero_point', True)!r:.40}; "
            "DPO Studio reads 4 bits with zero points",
            hint="use the model's GPTQ or NF4 version, or its bf16 one",
        )
    if isinstance(group_size, bool) or not isinstance(group_size, int) or (group_size != -1 and group_size < 8):
        raise ModelError(
            f"{folder}: its quantization_config has the group_size {group_size!r:.40}",
            hint="it may be -1 or a number of inputs, at least 8",
        )
    return Awq(group_size)


@dataclass(frozen=True)
class AwqReader:
    """Reads and checks one layer at a time."""

    place: Place
    quantization: Awq

    def layers(self) -> dict[str, list[str]]:
        """The quantised layers, and the tensors of each."""
        shards = self.place.shards
        return shards.of_layers(shards.with_ending(".qweight"), _PARTS)

    def linear(self, prefix: str, twin: nn.Linear) -> nn.Linear:
        """The layer on the device, in the place of `twin`, the model's own."""
        place, outputs, inputs = self.place, twin.out_features, twin.in_features
        size = inputs if self.quantization.group_size == -1 else self.quantization.group_size
        if inputs % size or size % 8 or outputs % 8:
            raise place.wrong(prefix, "qweight", f"cannot hold {outputs} x {inputs} weights in groups of {size}")
        words_KW = place.tensor(prefix, "qweight", [torch.int32], (inputs, outputs // 8))
        zeros_GW = place.tensor(prefix, "qzeros", [torch.int32], (inputs // size, outputs // 8))
        scales_GN = place.tensor(prefix, "scales", _SCALES, (inputs // size, outputs))
        bias = place.bias(prefix, twin)
        zeros_NG = _by_output(zeros_GW).contiguous()
        words_NW = _words(_by_output(words_KW))
        return place.linear(prefix, Packed(words_NW, scales_GN.t().contiguous(), zeros_NG, None, _BITS, size), bias)


def _by_output(words_KW: Tensor) -> Tensor:
    """The integers of each output, (N, K) uint8."""
    nibbles = unpack(words_KW, _BITS).view(len(words_KW), -1, 8)
    return nibbles[..., _NIBBLE_OF_OUTPUT].flatten(1).t()


def _words(integers_NK: Tensor) -> Tensor:
    """Eight inputs a word, the first in its lowest bits, (N, K / 8) int32."""
    bytes_NB = integers_NK[:, ::2] | integers_NK[:, 1::2] << _BITS
    return bytes_NB.contiguous().view(torch.int32)
