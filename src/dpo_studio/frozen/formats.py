"""The formats of quantised checkpoints: which one a folder's config names, and what reads its layers.

A further format is a branch in `read_quantization` and a module that has its settings (`reader`) and its reader.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from torch import nn

from dpo_studio.errors import ModelError
from dpo_studio.frozen.awq_files import read_awq
from dpo_studio.frozen.bnb_files import read_bnb
from dpo_studio.frozen.compressed_files import read_compressed
from dpo_studio.frozen.fp8_files import read_fp8
from dpo_studio.frozen.gptq_files import read_gptq
from dpo_studio.frozen.shards import Place
from dpo_studio.scan import read_json

__all__ = ["LayerReader", "Quantization", "read_quantization"]


class LayerReader(Protocol):
    """Reads and checks one quantised layer at a time."""

    def layers(self) -> dict[str, list[str]]:
        """The quantised layers, and the tensors of each."""

    def linear(self, prefix: str, twin: nn.Linear) -> nn.Linear:
        """The layer on the device, in the place of `twin`, the model's own."""


class Quantization(Protocol):
    """How a checkpoint says it was quantised."""

    def reader(self, place: Place) -> LayerReader:
        """What reads its layers."""


def read_quantization(folder: Path) -> Quantization | None:
    """The quantisation of a model folder, by its settings; None where it is not quantised.

    Raises:
        ModelError: quantised in a way that we do not train through.
    """
    raw = _settings(folder)
    if raw is None:
        return None
    method = str(raw.get("quant_method", "gptq" if "group_size" in raw else "unknown")).lower()
    if method == "gptq":
        return read_gptq(folder, raw)
    if method == "awq":
        return read_awq(folder, raw)
    if method == "compressed-tensors":
        return read_compressed(folder, raw)
    if method == "fp8":
        return read_fp8(folder, raw)
    if method == "bitsandbytes":
        return read_bnb(folder, raw)
    raise ModelError(
        f"{folder} is quantised with {method}, which DPO Studio does not train through",
        hint="use the model's GPTQ, AWQ or NF4 version, or its bf16 one",
    )


def _settings(folder: Path) -> dict[str, Any] | None:
    """The quantisation's config: in config.json, or, as older tools have it, in a file of its own."""
    for file, key in (("config.json", "quantization_config"), ("quantize_config.json", None)):
        path = folder / file
        if not path.is_file():
            continue
        raw = read_json(path)
        settings = raw.get(key) if key else raw
        if isinstance(settings, dict) and settings:
            return settings
        if settings and key:
            raise ModelError(f"{path}: its quantization_config is not an object")
    return None
