"""GPTQ checkpoints: looked over tensor by tensor and loaded straight into our own linear, whole or not at all.

Neither optimum nor gptqmodel is needed. What a module is follows from its tensors and from what the model's config says
it reads and writes; the quantisation's own config is held against that, never trusted.

Shapes: N = outputs, K = inputs, W = words of a row, G = groups of inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from dpo_studio.errors import ModelError
from dpo_studio.models.fp8 import device_obstacle, fp8_obstacle
from dpo_studio.models.gptq import FP8Linear, GPTQLinear
from dpo_studio.models.packed import unpack
from dpo_studio.models.scan import read_json, weights_of
from dpo_studio.models.sizes import Shapes, check_model_size, shapes_in

__all__ = ["Quantization", "load_gptq", "read_quantization"]

BITS = (2, 3, 4, 8)
_FORMATS = ("gptq", "gptq_v2")
_PARTS = ("qweight", "qzeros", "scales", "g_idx", "bias")
_WORD_INPUTS = 32
"""Inputs are packed in thirty-twos, so that whole words are filled whatever the bits."""


@dataclass(frozen=True)
class Quantization:
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


def read_quantization(folder: Path) -> Quantization | None:
    """The GPTQ settings of a model folder; None where it is not quantised.

    Raises:
        ModelError: quantised in a way that we do not train through.
    """
    raw = _settings(folder)
    if raw is None:
        return None
    method = str(raw.get("quant_method", "gptq" if "group_size" in raw else "unknown")).lower()
    if method != "gptq":
        raise ModelError(
            f"{folder} is quantised with {method}, and DPO Studio trains through GPTQ only",
            hint="use the model's GPTQ version, or its bf16 one; `dpo quantize` makes a GPTQ version of that",
        )
    form = str(raw.get("checkpoint_format") or raw.get("format") or "gptq").lower()
    if raw.get("is_marlin_format"):
        form = "marlin"
    if form not in _FORMATS:
        raise ModelError(
            f"{folder}: its GPTQ weights were packed anew for one kernel ({form})",
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
    return Quantization(
        bits=bits,
        group_size=group_size,
        sym=bool(raw.get("sym", True)),
        desc_act=bool(raw.get("desc_act", False)),
        checkpoint_format=form,
        by_gptqmodel="gptqmodel" in tools.lower(),
        mixed=bool(raw.get("dynamic")),
    )


def load_gptq(
    folder: Path,
    config: Any,
    quantization: Quantization,
    *,
    name: str,
    dtype: torch.dtype,
    attention: str,
    device: torch.device,
    residency: str = "packed",
    compute: str = "auto",
    say: Callable[[str], None] = lambda _: None,
) -> PreTrainedModel:
    """The model on `device`: quantised layers as `GPTQLinear`, or dense by `residency`; everything else in `dtype`.

    Raises:
        ModelError: a file or tensor is missing, left over, damaged, or not what the config says; nothing is filled in.
    """
    if compute == "fp8" and (obstacle := device_obstacle(device) or _not_in_fp8(residency, dtype)):
        raise ModelError(f"model.compute: fp8 {obstacle}", hint="compute: auto works everywhere")
    if quantization.checkpoint_format == "gptq" and not quantization.sym:
        say(f"{name}: asymmetric zero points in the old gptq format; tools have not agreed on it, gptq_v2 is safer")
    with _Shards(folder, name) as shards:
        config.__dict__.pop("quantization_config", None)  # else transformers would build its own packed layers
        check_model_size(AutoModelForCausalLM, config, shards.shapes, name)
        model = _skeleton(config, dtype, attention, name)
        reader = _Reader(shards, quantization, device, dtype, residency, compute, say)
        for prefix in sorted(key.removesuffix(".qweight") for key in shards.files if key.endswith(".qweight")):
            _place(model, prefix, reader.linear(prefix, _dense_twin(model, prefix, name, shards)))
        _fill_in_the_rest(model, shards, reader, name)
    return model.to(device)


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


def _not_in_fp8(residency: str, dtype: torch.dtype) -> str | None:
    if residency != "packed":
        return "reads the packed integers, so it needs model.residency: packed"
    return None if dtype == torch.bfloat16 else "needs model.dtype: bfloat16"


class _Shards:
    """The tensors of a folder's safetensors files, opened once and read one by one."""

    def __init__(self, folder: Path, name: str) -> None:
        self._name = name
        self._open: dict[Path, Any] = {}
        self.files: dict[str, Path] = {}
        """Where each tensor is: of the files that are fingerprinted, whatever an index says of any one tensor."""
        for file in weights_of(folder, name):
            self.files |= dict.fromkeys(self._opened(file).keys(), file)

    def __enter__(self) -> _Shards:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.clear()

    @property
    def shapes(self) -> Shapes:
        """Of every tensor, by the headers that are open already."""
        return {key: shape for file in self._open.values() for key, shape in shapes_in(file).items()}

    def read(self, key: str) -> Tensor:
        """A tensor, on the CPU.

        Raises:
            ModelError: its file is missing or damaged, or does not hold it.
        """
        file = self.files[key]
        try:
            tensor: Tensor = self._opened(file).get_tensor(key)
        except SafetensorError as error:
            raise ModelError(f"{self._name}: {file.name} has no readable tensor {key}: {error}", hint=_AGAIN) from None
        return tensor

    def _opened(self, file: Path) -> Any:
        if file not in self._open:
            if not file.is_file():
                raise ModelError(f"{self._name}: the weight file {file.name} is missing", hint=_AGAIN)
            try:
                self._open[file] = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{self._name}: {file.name} is damaged: {error}", hint=_AGAIN) from None
        return self._open[file]


_AGAIN = "is the download complete? fetch the model again"


def _skeleton(config: Any, dtype: torch.dtype, attention: str, name: str) -> PreTrainedModel:
    """The model without weights: what it computes from its config alone (rotations) is there."""
    try:
        with init_empty_weights(include_buffers=False):
            return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{name}: transformers cannot build this model: {error}") from None


def _dense_twin(model: nn.Module, prefix: str, name: str, shards: _Shards) -> nn.Linear:
    """The layer of the skeleton that the quantised tensors are for."""
    try:
        layer = model.get_submodule(prefix)
    except AttributeError:
        layer = None
    if not isinstance(layer, nn.Linear):
        file = shards.files[f"{prefix}.qweight"].name
        raise ModelError(
            f"{name}: {file} has quantised weights for {prefix}, which is no linear layer of this model",
            hint="the weights are not this model's; nothing is ever filled in at random",
        )
    return layer


def _place(model: nn.Module, prefix: str, layer: nn.Module) -> None:
    parent, _, child = prefix.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


@dataclass(frozen=True)
class _Reader:
    """Reads and checks one quantised layer at a time."""

    shards: _Shards
    quantization: Quantization
    device: torch.device
    dtype: torch.dtype
    residency: str
    compute: str
    say: Callable[[str], None]

    def linear(self, prefix: str, twin: nn.Linear) -> nn.Linear:
        """The layer, on the device; dense where the recipe says so, and for the head, whose weight is read as it is."""
        inputs, outputs = twin.in_features, twin.out_features
        head = prefix.rpartition(".")[2] == "lm_head"
        tensors = {part: self._read(prefix, part) for part in _PARTS if f"{prefix}.{part}" in self.shards.files}
        for part in ("qweight", "qzeros", "scales"):
            if part not in tensors:
                raise self._wrong(prefix, part, "is missing")
        bits = self._bits(prefix, tensors["qweight"], inputs, outputs)
        scales_NG = self._scales(prefix, tensors["scales"], outputs)
        groups = scales_NG.shape[1]
        group_size, group_K = self._groups(prefix, tensors.get("g_idx"), inputs, groups)
        fp8 = self.compute == "fp8" and not head
        if fp8 and (obstacle := fp8_obstacle(inputs, outputs, bits, group_size, group_K is not None)):
            raise ModelError(f"model.compute: fp8 cannot be used for {prefix}: {obstacle}", hint="use compute: auto")
        bias = self._bias(prefix, tensors.get("bias"), twin)
        layer = GPTQLinear(
            inputs,
            outputs,
            bits,
            group_size,
            bias=bias is not None,
            act_order=group_K is not None,
            device=torch.device("meta"),
            dtype=self.dtype,
        )
        layer.words_NW = tensors["qweight"].to(self.device).t().contiguous()
        layer.scales_NG = scales_NG.to(self.device)
        layer.zeros_NG = self._zeros(prefix, tensors["qzeros"], bits, outputs, groups).to(self.device)
        layer.group_K = None if group_K is None else group_K.to(self.device)
        if bias is not None:
            layer.bias = nn.Parameter(bias.to(self.device), requires_grad=False)
        if fp8:
            return FP8Linear(layer)
        return layer if self.residency == "packed" and not head else _dense(layer, self.dtype)

    def _read(self, prefix: str, part: str) -> Tensor:
        return self.shards.read(f"{prefix}.{part}")

    def _wrong(self, prefix: str, part: str, what: str) -> ModelError:
        file = self.shards.files.get(f"{prefix}.{part}") or self.shards.files[f"{prefix}.qweight"]
        return ModelError(f"{file.name}: tensor {prefix}.{part} {what}", hint=_AGAIN)

    def _bits(self, prefix: str, words: Tensor, inputs: int, outputs: int) -> int:
        """Bits by what the words hold, which must be what the config says unless its modules differ."""
        if words.dtype != torch.int32 or words.ndim != 2 or words.shape[1] != outputs:
            raise self._wrong(prefix, "qweight", f"is {_look(words)}, not int32 ({inputs} x bits / 32, {outputs})")
        bits, rest = divmod(words.shape[0] * 32, inputs)
        if rest or inputs % _WORD_INPUTS or bits not in BITS:
            raise self._wrong(prefix, "qweight", f"is {_look(words)}: that is no known number of bits a weight")
        if bits != self.quantization.bits and not self.quantization.mixed:
            raise self._wrong(prefix, "qweight", f"has {bits} bits a weight, the config says {self.quantization.bits}")
        return bits

    def _scales(self, prefix: str, scales: Tensor, outputs: int) -> Tensor:
        if not scales.is_floating_point() or scales.ndim != 2 or scales.shape[1] != outputs or not len(scales):
            raise self._wrong(prefix, "scales", f"is {_look(scales)}, not float16 (groups, {outputs})")
        scales_NG = scales.half().t().contiguous()
        if not scales_NG.isfinite().all():
            raise self._wrong(prefix, "scales", "has values that are not finite")
        if (scales_NG < 0).any():
            self.say(f"{prefix}.scales has negative values: used as they are")
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
            raise self._wrong(prefix, "g_idx", f"is {_look(g_idx)}, not int32 ({inputs},)")
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
            raise self._wrong(prefix, "qzeros", f"is {_look(words_GW)}, not int32 ({groups}, {per_row})")
        old = self.quantization.checkpoint_format == "gptq"
        if old and self.quantization.by_gptqmodel and bits != 3:  # its three bits are taken field by field
            ones = sum(1 << at for at in range(0, 32, bits))
            words_GW = ((words_GW.long() + ones) & 0xFFFFFFFF).to(torch.int64)
            words_GW = torch.where(words_GW >= 1 << 31, words_GW - (1 << 32), words_GW).int()
        zeros_GN = unpack(words_GW, bits)[:, :outputs] if bits != 3 else _three_bit_fields(words_GW, outputs)
        if old and (bits == 3 or not self.quantization.by_gptqmodel):
            zeros_GN = (zeros_GN.int() + 1 & 2**bits - 1).to(torch.uint8)
        return zeros_GN.t().contiguous()

    def _bias(self, prefix: str, bias: Tensor | None, twin: Any) -> Tensor | None:
        """AutoGPTQ wrote zeros for every layer: a bias the model has no place for is kept only if it says something."""
        if bias is None:
            if twin.bias is not None:
                raise self._wrong(prefix, "bias", "is missing")
            return None
        if bias.shape != (twin.out_features,):
            raise self._wrong(prefix, "bias", f"is {_look(bias)}, not ({twin.out_features},)")
        if not bias.isfinite().all():
            raise self._wrong(prefix, "bias", "has values that are not finite")
        return bias.to(self.dtype) if twin.bias is not None or bias.any() else None


def _three_bit_fields(words_GW: Tensor, outputs: int) -> Tensor:
    """Three-bit fields of rows whose last words may be filled in part."""
    missing = -words_GW.shape[1] % 3
    return unpack(nn.functional.pad(words_GW, (0, missing)), 3)[:, :outputs]


def _dense(layer: GPTQLinear, dtype: torch.dtype) -> nn.Linear:
    """A plain layer that holds the weights, formed once."""
    dense = nn.Linear(layer.in_features, layer.out_features, bias=False, device=torch.device("meta"))
    dense.weight = nn.Parameter(layer.packed.formed(dtype), requires_grad=False)
    dense.bias = layer.bias
    return dense


def _fill_in_the_rest(model: PreTrainedModel, shards: _Shards, reader: _Reader, name: str) -> None:
    """Embeddings, norms, head and whatever was left as it was: every tensor used, every parameter found."""
    prefixes = [key.removesuffix(".qweight") for key in shards.files if key.endswith(".qweight")]
    quantised = {f"{prefix}.{part}" for prefix in prefixes for part in _PARTS}
    places = dict(model.named_parameters(remove_duplicate=False))
    unexpected = []
    for key in shards.files:
        if key in quantised or key.endswith("rotary_emb.inv_freq"):  # old checkpoints kept what a config implies
            continue
        if key not in places:
            unexpected.append(key)
            continue
        tensor, wanted = shards.read(key), places[key]
        if tensor.shape != wanted.shape:
            file = shards.files[key].name
            raise ModelError(
                f"{file}: tensor {key} is {_look(tensor)}, the model's is {tuple(wanted.shape)}", hint=_AGAIN
            )
        value = nn.Parameter(tensor.to(reader.device, wanted.dtype), requires_grad=False)
        parent, _, child = key.rpartition(".")
        setattr(model.get_submodule(parent), child, value)
    model.tie_weights()
    missing = sorted(key for key, p in model.named_parameters() if p.is_meta)
    for kind, keys in (("missing", missing), ("unexpected", sorted(unexpected))):
        if keys:
            raise ModelError(
                f"{name}: {len(keys)} {kind} tensors, the first is {keys[0]}",
                hint="the weights are not this model's; nothing is ever filled in at random",
            )


def _look(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
