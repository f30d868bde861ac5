"""Checkpoints of bitsandbytes: NF4, with or without double quantisation, and INT8 (LLM.int8()), read as they are.

bitsandbytes is not needed. Beside an NF4 layer's `weight`, flat bytes in a precision of any size (`quant_storage`), lie
its scales, tables and a small JSON object written as bytes; beside an INT8 layer's rows lies the largest size of each
(`SCB`). All are held against the layer that the model has.

Shapes: N = outputs, K = inputs, B = blocks, C = blocks of scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpo_studio import reading
from dpo_studio.errors import ModelError
from dpo_studio.frozen.nf4 import NF4_LEVELS, Doubled, Nf4
from dpo_studio.frozen.scaled import Scaled
from dpo_studio.frozen.shards import Place

__all__ = ["read_bnb"]

_STATE = "weight.quant_state.bitsandbytes__nf4"
_PARTS = ("weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map", _STATE)
_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Weights that share a scale, and scales that do: what bitsandbytes makes."""
_STORAGE = (torch.uint8, torch.int8, torch.bfloat16, torch.float16, torch.float32)
"""What four-bit weights may be written as."""
_LARGEST_STATE = 4096
"""Bytes; a state has some 200."""


@dataclass(frozen=True)
class BitsAndBytes4:
    """A checkpoint in NF4. Everything else is in each layer's own state."""

    def reader(self, place: Place) -> Nf4Reader:
        """What reads its layers."""
        return Nf4Reader(place)


@dataclass(frozen=True)
class BitsAndBytes8:
    """A checkpoint in INT8."""

    def reader(self, place: Place) -> Int8Reader:
        """What reads its layers."""
        place.say("bitsandbytes rounds activations to INT8 too; training and scoring do not, weights are its own")
        return Int8Reader(place)


def read_bnb(folder: Path, raw: Mapping[str, Any]) -> BitsAndBytes4 | BitsAndBytes8:
    """The settings of a model folder, from what its config says.

    Raises:
        ModelError: another format of bitsandbytes than NF4 and INT8.
    """
    if raw.get("load_in_8bit") or raw.get("_load_in_8bit"):
        return BitsAndBytes8()
    if not (raw.get("load_in_4bit") or raw.get("_load_in_4bit")):
        raise ModelError(
            f"{folder} is quantised with bitsandbytes, and its config says neither load_in_4bit nor load_in_8bit",
            hint="is its config.json as its author saved it?",
        )
    kind = str(raw.get("bnb_4bit_quant_type", "fp4")).lower()
    if kind != "nf4":
        raise ModelError(
            f"{folder} is quantised with bitsandbytes to {kind} (bnb_4bit_quant_type), and DPO Studio reads NF4 only",
            hint="use the model's NF4 version, or its bf16 one",
        )
    return BitsAndBytes4()


@dataclass(frozen=True)
class Nf4Reader:
    """Reads and checks one layer in NF4 at a time."""

    place: Place

    def layers(self) -> dict[str, list[str]]:
        """The quantised layers, and the tensors of each."""
        shards = self.place.shards
        found = {*shards.with_ending(".weight.absmax"), *shards.with_ending(f".{_STATE}")}
        return shards.of_layers(sorted(found), [*_PARTS, "bias"])

    def linear(self, prefix: str, twin: nn.Linear) -> nn.Linear:
        """The layer on the device, in the place of `twin`, the model's own."""
        place, outputs, inputs = self.place, twin.out_features, twin.in_features
        state = self._state(prefix)
        if state.get("shape") != [outputs, inputs]:
            raise place.wrong(prefix, "weight", f"is of {state.get('shape')}, the model's is {(outputs, inputs)}")
        if inputs % 2:
            raise place.wrong(prefix, "weight", f"is of {inputs} inputs a row, and a byte has two")
        block = self._block(prefix, state, "blocksize")
        bytes_P = place.tensor(prefix, "weight", _STORAGE, numbers=False).flatten().view(torch.uint8)
        if 2 * len(bytes_P) != outputs * inputs:
            raise place.wrong(prefix, "weight", f"has {2 * len(bytes_P):,} weights, not {outputs} x {inputs}")
        levels = place.tensor(prefix, "weight.quant_map", [torch.float32], (16,))
        if levels.tolist() != torch.tensor(NF4_LEVELS).tolist():
            raise place.wrong(prefix, "weight.quant_map", "has other levels than NF4's")
        scales_B, doubled = self._scales(prefix, state, -(-outputs * inputs // block))
        bias = place.bias(prefix, twin)
        return place.linear(prefix, Nf4(bytes_P, scales_B, doubled, (outputs, inputs), block), bias)

    def _scales(self, prefix: str, state: Mapping[str, Any], blocks: int) -> tuple[Tensor, Doubled | None]:
        place = self.place
        if not place.has(prefix, "weight.nested_absmax"):
            return place.tensor(prefix, "weight.absmax", [torch.float32], (blocks,)), None
        nested = self._block(prefix, state, "nested_blocksize")
        mean = state.get("nested_offset")
        if not isinstance(mean, float | int) or abs(mean) > torch.finfo(torch.float32).max:
            raise place.wrong(prefix, _STATE, f"has the nested_offset {mean!r:.40}")
        if state.get("nested_dtype") != "float32":
            raise place.wrong(prefix, _STATE, f"has the nested_dtype {state.get('nested_dtype')!r:.40}, not float32")
        scales_C = place.tensor(prefix, "weight.nested_absmax", [torch.float32], (-(-blocks // nested),))
        levels = place.tensor(prefix, "weight.nested_quant_map", [torch.float32], (256,))
        names_B = place.tensor(prefix, "weight.absmax", [torch.uint8], (blocks,))
        offset = torch.tensor(float(mean), dtype=torch.float32, device=place.device)
        return names_B, Doubled(scales_C, levels, offset, nested)

    def _state(self, prefix: str) -> dict[str, Any]:
        """The JSON object that lies among the tensors."""
        raw = self.place.tensor(prefix, _STATE, [torch.uint8])
        if raw.ndim != 1 or len(raw) > _LARGEST_STATE:
            raise self.place.wrong(prefix, _STATE, f"is no state of NF4: {len(raw):,} bytes")
        state = reading.parse_json(
            bytes(raw.tolist()), what=f"tensor {prefix}.{_STATE} is not valid JSON", finite=True, error=ModelError
        )
        if not isinstance(state, dict) or state.get("quant_type") != "nf4":
            raise self.place.wrong(prefix, _STATE, "is not the state of a weight in NF4")
        return state

    def _block(self, prefix: str, state: Mapping[str, Any], key: str) -> int:
        block = state.get(key)
        if isinstance(block, bool) or block not in _BLOCKS:
            raise self.place.wrong(prefix, _STATE, f"has the {key} {block!r:.40}, which bitsandbytes does not make")
        return int(block)


@dataclass(frozen=True)
class Int8Reader:
    """Reads and checks one layer in INT8 at a time."""

    place: Place

    def layers(self) -> dict[str, list[str]]:
        """The quantised layers, and the tensors of each."""
        shards = self.place.shards
        return shards.of_layers(shards.with_ending(".SCB"), ["weight", "SCB", "weight_format", "bias"])

    def linear(self, prefix: str, twin: nn.Linear) -> nn.Linear:
        """The layer on the device, in the place of `twin`, the model's own."""
        place, outputs, inputs = self.place, twin.out_features, twin.in_features
        if place.has(prefix, "weight_format") and place.tensor(prefix, "weight_format").flatten().tolist() != [0]:
            raise place.wrong(prefix, "weight_format", "names another order than rows, that of one GPU's kernel")
        values_NK = place.tensor(prefix, "weight", [torch.int8], (outputs, inputs))
        largest_N = place.tensor(prefix, "SCB", [torch.float32], (outputs,))
        weight = Scaled(values_NK, largest_N[:, None], (1, inputs), of_127=True)
        return place.linear(prefix, weight, place.bias(prefix, twin))
