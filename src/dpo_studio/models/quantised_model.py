"""A model with quantised layers: built from its config without weights, then filled from its files, entirely or not.

No format's own library is needed. A layer follows from its tensors (`frozen/gptq_files.py` and those beside it) and
from what the model's config says it reads and writes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from dpo_studio.errors import ModelError
from dpo_studio.frozen.formats import LayerReader, Quantization
from dpo_studio.frozen.fp8 import device_obstacle
from dpo_studio.frozen.quantising import QuantisingReader
from dpo_studio.frozen.shards import Place, Shards
from dpo_studio.models.targets import quantisable
from dpo_studio.sizes import check_model_size

__all__ = ["load_quantised"]

_STRANGE = "the weights are not this model's; nothing is ever filled in at random"
_OTHER_NAMES = "model.quantize reads tensors by the model's own names only: train without it, or a quantised checkpoint"


def load_quantised(
    folder: Path,
    config: PreTrainedConfig,
    quantization: Quantization | None,
    *,
    name: str,
    dtype: torch.dtype,
    attention: str,
    device: torch.device,
    quantize: str = "",
    residency: str = "packed",
    compute: str = "auto",
    say: Callable[[str], None] = lambda _: None,
) -> PreTrainedModel:
    """The model on `device`: quantised layers as `FrozenLinear`, or dense by `residency`; everything else in `dtype`.

    Without a `quantization` the checkpoint is dense, and its linear layers are put into the format `quantize` here.

    Raises:
        ModelError: a file or tensor is missing, left over, damaged, or not what the config says; nothing is filled in.
    """
    if compute == "fp8" and (obstacle := device_obstacle(device) or _not_in_fp8(residency, dtype)):
        raise ModelError(f"model.compute: fp8 {obstacle}", hint="compute: auto works everywhere")
    with Shards(folder, name) as shards:
        config.__dict__.pop("quantization_config", None)  # else transformers would build its own packed layers
        check_model_size(AutoModelForCausalLM, config, shards.shapes, name)
        model = _skeleton(config, dtype, attention, name)
        place = Place(shards, device, dtype, residency, compute, lambda words: say(f"{name}: {words}"))
        if quantization is None:
            reader: LayerReader = QuantisingReader(place, quantize, quantisable(model))
        else:
            reader = quantization.reader(place)
        layers = reader.layers()
        for prefix, keys in layers.items():
            twin = _dense_twin(model, prefix, shards.files[keys[0]].name, name)
            _place(model, prefix, reader.linear(prefix, twin))
        taken = {key for keys in layers.values() for key in keys}
        # old checkpoints kept what a config implies
        rest = [key for key in shards.files if key not in taken and not key.endswith("rotary_emb.inv_freq")]
        _fill_in_the_rest(model, shards, rest, device, name, _STRANGE if quantization else _OTHER_NAMES)
    return model.to(device)


def _not_in_fp8(residency: str, dtype: torch.dtype) -> str | None:
    if residency != "packed":
        return "reads the packed integers, so it needs model.residency: packed"
    return None if dtype == torch.bfloat16 else "needs model.dtype: bfloat16"


def _skeleton(config: PreTrainedConfig, dtype: torch.dtype, attention: str, name: str) -> PreTrainedModel:
    """The model without weights: what it computes from its config alone (rotations) is there."""
    try:
        with init_empty_weights(include_buffers=False):
            return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{name}: transformers cannot build this model: {error}") from None


def _dense_twin(model: nn.Module, prefix: str, file: str, name: str) -> nn.Linear:
    """The layer of the skeleton that the quantised tensors are for."""
    try:
        layer = model.get_submodule(prefix)
    except AttributeError:
        layer = None
    if not isinstance(layer, nn.Linear):
        raise ModelError(
            f"{name}: {file} has quantised weights for {prefix}, which is not a linear layer of this model",
            hint=_STRANGE,
        )
    return layer


def _place(model: nn.Module, name: str, part: nn.Module | nn.Parameter) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, part)


def _fill_in_the_rest(
    model: PreTrainedModel, shards: Shards, keys: Sequence[str], device: torch.device, name: str, hint: str
) -> None:
    """Embeddings, norms, head and whatever was left as it was: every tensor used, every parameter found."""
    places = dict(model.named_parameters(remove_duplicate=False))
    unexpected = []
    for key in keys:
        if key not in places:
            unexpected.append(key)
            continue
        wanted = places[key]
        tensor = shards.read_shaped(key, tuple(wanted.shape))
        value = nn.Parameter(tensor.to(device, wanted.dtype), requires_grad=False)
        _place(model, key, value)
    model.tie_weights()
    missing = sorted(key for key, p in model.named_parameters() if p.is_meta)
    for kind, keys in (("missing", missing), ("unexpected", sorted(unexpected))):
        if keys:
            raise ModelError(
                f"{name}: {len(keys)} {kind} tensors, the first is {keys[0]}",
                hint=hint,
            )
