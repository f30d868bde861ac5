"""GPTQ checkpoints: their settings and layers, checked tensor by tensor and read into our own linear.

Neither optimum nor gptqmodel is needed. What a layer is follows from its tensors and from what the model's config says
it reads and writes; the quantisation's own config is held against that, never trusted.

Shapes: N = outputs, K = inputs, W = words of a row, G = groups of inputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpo_studio.errors import ModelError
from dpo_studio.frozen.dequantising import unpack
from dpo_studio.frozen.fp8 import fp8_obstacle, fp8_weight
from dpo_studio.frozen.gptq import Packed
from dpo_studio.frozen.linear import FrozenLinear
from dpo_studio.frozen.shards import Place, look

__all__ = ["Gptq", "GptqReader", "read_gptq"]

BITS = (2, 3, 4, 8)
_FORMATS = ("gptq", "gptq_v2")
_PARTS = ("qweight", "qzeros", "scales", "g_idx", "bias")
_WORD_INPUTS = 32
"""Inputs are packed in thirty-twos, so that whole words are filled whatever the bits."""


@dataclass(frozen=True)
class Gptq:
    """How a checkpoint says it was quantised."""

    bits: int
    group_size: int
    """Inputs that share a scale; -1: all of a layer's."""
    sym: bool
    desc_act: bool
    checkpoint_format: str
    """gptq (zero points are stored less one) or gptq_v2."""
    by_gptqmodel: bool
    """Its gptq format subtracted one from whole words of zero points, with borrows; older tools from each field."""
    mixed: bool
    """Whether modules may differ from `bits` and `group_size` (`dynamic`)."""

    def reader(self, place: Place) -> GptqReader:
        """What reads its layers."""
        if self.checkpoint_format == "gptq" and not self.sym:
            place.say("asymmetric zero points in the old gptq format; tools have not agreed on it, gptq_v2 is safer")
        return GptqReader(place, self)


def read_gptq(folder: Path, raw: Mapping[str, Any]) -> Gptq:
    """The settings of a model folder, from what its config says.

    Raises:
        ModelError: a form of GPTQ that we do not train through.
    """
    form = str(raw.get("checkpoint_format") or raw.get("format") or "gptq").lower()
    if raw.get("is_marlin_format"):
        form = "marlin"
    if form not in _FORMATS:
        raise ModelError(
            f"{folder}: its GPTQ weights were repacked for one kernel ({form})",
            hint="use the same model in the plain format: checkpoint_format gptq or gptq_v2",
        )
    try:
        bits, group_size = int(raw["bits"]), int(raw["group_size"])
    except (KeyError, TypeError, ValueError):
        raise ModelError(f"{folder}: its quantization_config names no bits and group_size") from None
    if bits not in BITS or (group_size != -1 and group_size < 1):
        raise ModelError(
            f"{folder}: {bits} bits in groups of {group_size} are not GPTQ as DPO Studio knows it",
            hint=f"bits may be {', '.join(map(str, BITS))}, group_size -1 or a number of inputs",
        )
    if str(raw.get("pack_dtype", "int32")) not in ("int32", "torch.int32"):
        raise ModelError(f"{folder}: its words are {raw['pack_dtype']}; only int32 is known")
    meta = raw.get("meta") if isinstance(raw.get("meta"), dict) else {}
    tools = str(meta.get("quantizer", "")) if isinstance(meta, dict) else ""
    return Gptq(
        bits=bits,
        group_size=group_size,
        sym=bool(raw.get("sym", True)),
        desc_act=bool(raw.get("desc_act", False)),
        checkpoint_format=form,
        by_gptqmodel="gptqmodel" in tools.lower(),
        mixed=bool(raw.get("dynamic")),
    )


@dataclass(frozen=True)
class GptqReader:
    """Reads and checks one quantised layer at a time."""

    place: Place
    quantization: Gptq

    def layers(self) -> dict[str, list[str]]:
        """The quantised layers, and the tensors of each."""
        shards = self.place.shards
        return shards.of_layers(shards.with_ending(".qweight"), _PARTS)

    def linear(self, prefix: str, twin: nn.Linear) -> nn.Linear:
        """The layer on the device, in the place of `twin`, the model's own."""
        place = self.place
        inputs, outputs = twin.in_features, twin.out_features
        tensors = {part: self._read(prefix, part) for part in _PARTS if place.has(prefix, part)}
        for part in ("qweight", "qzeros", "scales"):
            if part not in tensors:
                raise self._wrong(prefix, part, "is missing")
        bits = self._bits(prefix, tensors["qweight"], inputs, outputs)
        scales_NG = self._scales(prefix, tensors["scales"], outputs)
        groups = scales_NG.shape[1]
        group_size, group_K = self._groups(prefix, tensors.get("g_idx"), inputs, groups)
        fp8 = place.compute == "fp8" and prefix.rpartition(".")[2] != "lm_head"
        if fp8 and (obstacle := fp8_obstacle(inputs, outputs, bits, group_size, group_K is not None)):
            raise ModelError(f"model.compute: fp8 cannot be used for {prefix}: {obstacle}", hint="use compute: auto")
        bias = self._bias(prefix, tensors.get("bias"), twin)
        words_NW = tensors["qweight"].to(place.device).t().contiguous()
        zeros_NG = self._zeros(prefix, tensors["qzeros"], bits, outputs, groups).to(place.device)
        group_K = None if group_K is None else group_K.to(place.device)
        weight = Packed(words_NW, scales_NG.to(place.device), zeros_NG, group_K, bits, group_size)
        bias = None if bias is None else bias.to(place.device)
        if fp8:
            return FrozenLinear(fp8_weight(weight), bias)
        return place.linear(prefix, weight, bias)

    def _read(self, prefix: str, part: str) -> Tensor:
        return self.place.shards.read(f"{prefix}.{part}")

    def _wrong(self, prefix: str, part: str, what: str) -> ModelError:
        return self.place.wrong(prefix, part, what)

    def _bits(self, prefix: str, words: Tensor, inputs: int, outputs: int) -> int:
        """Bits by the shape of the packed integers, which must match the config unless its modules differ."""
        if words.dtype != torch.int32 or words.ndim != 2 or words.shape[1] != outputs:
            raise self._wrong(prefix, "qweight", f"is {look(words)}, not int32 ({inputs} x bits / 32, {outputs})")
        bits, rest = divmod(words.shape[0] * 32, inputs)
        if rest or inputs % _WORD_INPUTS or bits not in BITS:
            raise self._wrong(prefix, "qweight", f"is {look(words)}: that is an unsupported number of bits a weight")
        if bits != self.quantization.bits and not self.quantization.mixed:
            raise self._wrong(prefix, "qweight", f"has {bits} bits a weight, the config says {self.quantization.bits}")
        return bits

    def _scales(self, prefix: str, scales: Tensor, outputs: int) -> Tensor:
        if not scales.is_floating_point() or scales.ndim != 2 or scales.shape[1] != outputs or not len(scales):
            raise self._wrong(prefix, "scales", f"is {look(scales)}, not float16 (groups, {outputs})")
        scales_NG = scales.half().t().contiguous()
        if not scales_NG.isfinite().all():
            raise self._wrong(prefix, "scales", "has values that are not finite")
        if (scales_NG < 0).any():
            self.place.say(f"{prefix}.scales has negative values: used as they are")
        return scales_NG

    def _groups(self, prefix: str, g_idx: Tensor | None, inputs: int, groups: int) -> tuple[int, Tensor | None]:
        """(group size, the group of each input where it is not k // size)."""
        size = self._group_size(prefix, inputs, groups)
        in_order = torch.arange(inputs) // size
        if g_idx is None:
            if self.quantization.desc_act and self.quantization.group_size != -1:
                raise self._wrong(prefix, "g_idx", "is missing, though the config says desc_act")
            return (size, None) if inputs % size == 0 else (size, in_order.int())
        if g_idx.shape != (inputs,) or g_idx.is_floating_point() or g_idx.dtype == torch.bool:
            raise self._wrong(prefix, "g_idx", f"is {look(g_idx)}, not int32 ({inputs},)")
        low, high = int(g_idx.min()), int(g_idx.max())
        if low < 0 or high >= groups:
            odd = low if low < 0 else high
            raise self._wrong(prefix, "g_idx", f"names group {odd}, and there are {groups}")
        regular = inputs % size == 0 and torch.equal(g_idx.long(), in_order)
        return size, None if regular else g_idx.int()

    def _group_size(self, prefix: str, inputs: int, groups: int) -> int:
        said = self.quantization.group_size
        said = inputs if said == -1 else said
        if -(-inputs // said) == groups:
            return said
        if self.quantization.mixed and inputs % groups == 0:
            return inputs // groups
        raise self._wrong(
            prefix, "scales", f"has {groups} groups for {inputs} inputs, the config says {said} inputs a group"
        )

    def _zeros(self, prefix: str, words_GW: Tensor, bits: int, outputs: int, groups: int) -> Tensor:
        """Zero points, (N, G) uint8."""
        per_row = math.ceil(outputs * bits / 32)
        if words_GW.dtype != torch.int32 or words_GW.shape != (groups, per_row):
            raise self._wrong(prefix, "qzeros", f"is {look(words_GW)}, not int32 ({groups}, {per_row})")
        old = self.quantization.checkpoint_format == "gptq"
        if old and self.quantization.by_gptqmodel and bits != 3:  # its three bits are taken field by field
            ones = sum(1 << at for at in range(0, 32, bits))
            words_GW = ((words_GW.long() + ones) & 0xFFFFFFFF).to(torch.int64)
            words_GW = torch.where(words_GW >= 1 << 31, words_GW - (1 << 32), words_GW).int()
        zeros_GN = unpack(words_GW, bits)[:, :outputs] if bits != 3 else _three_bit_fields(words_GW, outputs)
        if old and (bits == 3 or not self.quantization.by_gptqmodel):
            zeros_GN = (zeros_GN.int() + 1 & 2**bits - 1).to(torch.uint8)
        return zeros_GN.t().contiguous()

    def _bias(self, prefix: str, bias: Tensor | None, twin: nn.Linear) -> Tensor | None:
        """AutoGPTQ wrote zeros for every layer: a bias the model has no place for is kept only if it is not zero."""
        has_bias = twin._parameters["bias"] is not None
        if bias is None:
            if has_bias:
                raise self._wrong(prefix, "bias", "is missing")
            return None
        if bias.shape != (twin.out_features,):
            raise self._wrong(prefix, "bias", f"is {look(bias)}, not ({twin.out_features},)")
        if not bias.isfinite().all():
            raise self._wrong(prefix, "bias", "has values that are not finite")
        return bias.to(self.place.dtype) if has_bias or bias.any() else None


def _three_bit_fields(words_GW: Tensor, outputs: int) -> Tensor:
    """Three-bit fields of rows whose last words may be filled in part."""
    missing = -words_GW.shape[1] % 3
    return unpack(nn.functional.pad(words_GW, (0, missing)), 3)[:, :outputs]
