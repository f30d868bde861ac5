"""Checkpoints of compressed-tensors (llm-compressor, vLLM): integers packed in words, and FP8.

compressed-tensors is not needed. `pack-quantized` packs the inputs of an output in a row of words as here, its integers
moved up by half their range, and zero points along the outputs. `float-quantized` has e4m3 as it is, with a scale for
the weight, for each output, or for each block. Formed weights are its own decompression's to the bit where the model
computes in the precision of the scales, or in fp32; in bf16 with other scales they are rounded once.

Shapes: N = outputs, K = inputs, G = groups of inputs, W = words.
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
from dpo_studio.frozen.scaled import Scaled
from dpo_studio.frozen.shards import Place

__all__ = ["read_compressed"]

_BITS = (4, 8)
_SCALES = (torch.bfloat16, torch.float16, torch.float32)
_ELSE = "use the model's GPTQ, AWQ or NF4 version, or its bf16 one"
_PARTS = ("weight_packed", "weight_shape", "weight", "weight_scale", "weight_zero_point", "input_scale", "bias")
_PACKED, _FLOAT = "pack-quantized", "float-quantized"


@dataclass(frozen=True)
class Compressed:
    """How a checkpoint says it was compressed."""

    form: str
    """pack-quantized or float-quantized."""
    bits: int
    symmetric: bool
    group_size: int | None
    """Inputs that share a scale in `pack-quantized`; None: all of a row's."""
    block: tuple[int, int] | None
    """Outputs and inputs that share a scale in `float-quantized`; None: the tensors say whether a row or all."""
    activations: bool
    """Whether activations are quantised where the model is served."""

    def reader(self, place: Place) -> CompressedReader:
        """What reads its layers."""
        if self.activations:
            place.say("its config quantises activations too; training and scoring quantise weights alone")
        return CompressedReader(place, self)


def read_compressed(folder: Path, raw: Mapping[str, Any]) -> Compressed:
    """The settings of a model folder, from what its config says.

    Raises:
        ModelError: sparse, in another format, or of several schemes.
    """
    form = str(raw.get("format"))
    sparse = raw.get("sparsity_config")
    if isinstance(sparse, dict) and sparse.get("format", "dense") != "dense":
        raise _refused(folder, f"is sparse ({sparse.get('format')!r:.40})")
    if form not in (_PACKED, _FLOAT):
        raise _refused(folder, f"has the format {form!r:.40}; {_PACKED} and {_FLOAT} are read")
    if raw.get("kv_cache_scheme"):
        raise _refused(folder, "quantises keys and values (kv_cache_scheme)")
    groups = raw.get("config_groups")
    schemes = [group for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []
    weights = [scheme["weights"] for scheme in schemes if isinstance(scheme.get("weights"), dict)]
    if not weights or len(weights) != len(schemes) or any(other != weights[0] for other in weights):
        raise _refused(folder, "names no one scheme for all its weights (config_groups)")
    if any(scheme.get("format") not in (None, form) for scheme in schemes):
        raise _refused(folder, "has groups of several formats")
    activations = any(scheme.get("input_activations") or scheme.get("output_activations") for scheme in schemes)
    return _settings(folder, form, weights[0], activations)


def _settings(folder: Path, form: str, weights: Mapping[str, Any], activations: bool) -> Compressed:
    packed, strategy = form == _PACKED, weights.get("strategy")
    bits, kind = weights.get("num_bits", 8), weights.get("type")
    if kind != ("int" if packed else "float") or bits not in (_BITS if packed else (8,)):
        raise _refused(folder, f"has weights of {bits!r:.40} bits, type {kind!r:.40}")
    if weights.get("actorder") not in (None, False, "weight", "static"):
        raise _refused(folder, f"has activation ordering (actorder {weights['actorder']!r:.40})")
    if strategy not in (("group", "channel") if packed else ("tensor", "channel", "block")):
        raise _refused(folder, f"has scales by {strategy!r:.40} (strategy)")
    size, block = weights.get("group_size"), weights.get("block_structure")
    if strategy == "group" and not _is_size(size):
        raise _refused(folder, f"has the group_size {size!r:.40}")
    if strategy == "block" and not (isinstance(block, list) and len(block) == 2 and all(map(_is_size, block))):
        raise _refused(folder, f"has the block_structure {block!r:.40}")
    return Compressed(
        form,
        int(bits),
        weights.get("symmetric", True) is True,
        size if strategy == "group" else None,
        (block[0], block[1]) if strategy == "block" and block else None,
        activations,
    )


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _refused(folder: Path, what: str) -> ModelError:
    return ModelError(f"{folder}: its compressed-tensors checkpoint {what}", hint=_ELSE)


@dataclass(frozen=True)
class CompressedReader:
    """Reads and checks one layer at a time."""

    place: Place
    settings: Compressed

    def layers(self) -> dict[str, list[str]]:
        """The quantised layers, and the tensors of each."""
        shards = self.place.shards
        if self.settings.form == _PACKED:
            return shards.of_layers(shards.with_ending(".weight_packed"), _PARTS)
        return shards.of_layers(shards.with_ending(".weight_scale"), _PARTS)

    def linear(self, prefix: str, twin: nn.Linear) -> nn.Linear:
        """The layer on the device, in the place of `twin`, the model's own."""
        outputs, inputs = twin.out_features, twin.in_features
        made = self._packed if self.settings.form == _PACKED else self._float
        return self.place.linear(prefix, made(prefix, outputs, inputs), self.place.bias(prefix, twin))

    def _packed(self, prefix: str, outputs: int, inputs: int) -> Packed:
        place, bits = self.place, self.settings.bits
        if place.has(prefix, "weight_g_idx"):
            raise place.wrong(prefix, "weight_g_idx", "orders inputs by activation, which DPO Studio does not read")
        size = self.settings.group_size or inputs
        if inputs % size or inputs * bits % 32:
            raise place.wrong(
                prefix, "weight_packed", f"cannot hold {inputs} inputs of {bits} bits in groups of {size}"
            )
        shape = place.tensor(prefix, "weight_shape", [torch.int64, torch.int32], (2,)).tolist()
        if shape != [outputs, inputs]:
            raise place.wrong(prefix, "weight_shape", f"is {shape}, the model's is {[outputs, inputs]}")
        words_NW = place.tensor(prefix, "weight_packed", [torch.int32], (outputs, inputs * bits // 32))
        scales_NG = place.tensor(prefix, "weight_scale", _SCALES, (outputs, inputs // size))
        zeros_NG = self._zeros(prefix, outputs, inputs // size)
        return Packed(words_NW, scales_NG, zeros_NG, None, bits, size)

    def _zeros(self, prefix: str, outputs: int, groups: int) -> Tensor:
        """Zero points, (N, G) uint8: half the range where the scheme is symmetric."""
        bits = self.settings.bits
        if self.settings.symmetric:
            if self.place.has(prefix, "weight_zero_point"):
                raise self.place.wrong(prefix, "weight_zero_point", "is there, and the config says symmetric")
            return torch.full((outputs, groups), 2 ** (bits - 1), dtype=torch.uint8, device=self.place.device)
        per_group = -(-outputs * bits // 32)
        words_WG = self.place.tensor(prefix, "weight_zero_point", [torch.int32], (per_group, groups))
        return unpack(words_WG.t().contiguous(), bits)[:, :outputs].t().contiguous()

    def _float(self, prefix: str, outputs: int, inputs: int) -> Scaled:
        place = self.place
        values_NK = place.tensor(prefix, "weight", [torch.float8_e4m3fn], (outputs, inputs))
        scales = place.tensor(prefix, "weight_scale", _SCALES)
        height, width = self.settings.block or ((outputs, inputs) if scales.numel() == 1 else (1, inputs))
        block = min(height, outputs), min(width, inputs)
        shape = (-(-outputs // block[0]), -(-inputs // block[1]))
        if scales.shape != shape and not scales.numel() == shape[0] * shape[1] == 1:
            raise place.wrong(prefix, "weight_scale", f"is {tuple(scales.shape)}, not {shape}")
        if not self.settings.symmetric or place.has(prefix, "weight_zero_point"):
            raise place.wrong(prefix, "weight_zero_point", "is not read for FP8")
        return Scaled(values_NK, scales.view(shape), block)
