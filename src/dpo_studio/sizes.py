"""Sizes in a config, checked against the weights before anything of that size is allocated.

A config of a hundred bytes can ask for a thousand gigabytes. The headers of the safetensors files say what there is,
and the library that reads them has checked that against the files' lengths. First the numbers one by one, for
transformers makes lists and labels of them already while it reads a config; then the whole model, built without memory
(`meta`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig

from dpo_studio.errors import ModelError, reason_of

__all__ = ["Shapes", "check_model_size", "check_numbers", "shapes_in", "tensor_shapes"]

Shapes = Mapping[str, tuple[str, tuple[int, ...]]]
"""(dtype by its name in safetensors, shape) of every tensor by its name."""
_LAYERS = re.compile(r"layers?$|^n_layer|depths?$|blocks$|stages$")
"""Keys whose number is one of modules that are made one by one."""
_COUNTS = re.compile(r"^n_|^num_|experts$|labels$|heads$|groups$|beams$|branches$")
"""Keys whose number is one of things that are listed."""
_WHOLE = re.compile(r"(^|_)(size|heads?|experts|labels|dim|rank|embd|inner|width|groups)$|^n_|^num_")
_NO_SIZES = re.compile(
    r"token|theta|base|seed|position|length|factor|context|ctx|window|scal|step|freq|limit|_id$|vers"
)
"""Keys whose number is a place, a token or a factor: nothing is made of that size."""
_FEWEST_LAYERS, _FEWEST = 128, 1 << 14
"""Counts that every config may have: many name defaults that their model has no use for (max_window_layers; Doge's
16,384 experts)."""
_LARGEST = 1 << 24
"""A size that every config may have, for the same reason; its list takes a tenth of a second."""
_UNSEEN = (1 << 20, 1 << 20, 1 << 40)
"""Layers, counts and sizes where the weights are not there to be looked at, and only the tokenizer is wanted."""
_PER_WORD = {"I32": 16, "U32": 16, "I64": 16, "U8": 4, "I8": 4}
"""The most weights that one packed element may contain: two bits each."""
_FOUR_BITS = {"U8": 2, "I8": 2, "BF16": 4, "F16": 4, "F32": 8}
"""Weights in one element of a tensor that has a table of levels beside it (NF4)."""
_ROOM = 1 << 26
"""Numbers that a model may have besides its weights: masks and tables that are computed (a quarter of a gigabyte)."""
_AGAIN = "is the download complete?"


def tensor_shapes(files: Sequence[Path], name: str) -> Shapes:
    """Of every tensor in these safetensors files, by their headers alone: 20 ms for a 7B model.

    Raises:
        ModelError: a file is damaged, or not there.
    """
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                shapes |= shapes_in(tensors)
        except FileNotFoundError:
            raise ModelError(f"{name} cannot be loaded: the weight file {file.name} is missing", hint=_AGAIN) from None
        except (SafetensorError, OSError, MemoryError) as error:  # a sparse file larger than any memory
            raise ModelError(f"{name} cannot be loaded: {file.name} is damaged: {error}", hint=_AGAIN) from None
    return shapes


def shapes_in(tensors: Any) -> Shapes:
    """Of every tensor in a safetensors file that is open (`safe_open`)."""
    found = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118 - safe_open is no dict
    return {key: (part.get_dtype(), tuple(part.get_shape())) for key, part in found.items()}


def check_numbers(config: Mapping[str, Any], shapes: Shapes | None, name: str) -> None:
    """Check every number of a config.json, however deep; `shapes` is None where there are no weights to compare with.

    Raises:
        ModelError: a size that is not a whole number, or one that needs more weights than there are.
    """
    layers, counts, sizes = _UNSEEN if shapes is None else _limits(shapes)
    for key, value in _leaves(config):
        if value is None or value == "auto" or _NO_SIZES.search(key):
            continue
        if not isinstance(value, int):
            if _WHOLE.search(key):
                raise _refused(name, key, value, "which is not a whole number")
            continue
        limit = layers if _LAYERS.search(key) else counts if _COUNTS.search(key) else sizes
        if abs(value) > limit:  # some count layers from the end
            raise _refused(name, key, value, f"and the weights that are there allow {limit:,} at most")


def _limits(shapes: Shapes) -> tuple[int, int, int]:
    """Layers, other counts, and sizes: each layer has a tensor, each count a row or column."""
    widest = max((size for _, shape in shapes.values() for size in shape), default=0)
    return (
        max(_FEWEST_LAYERS, len(shapes)),
        max(_FEWEST, len(shapes), widest),
        max(_LARGEST, _numbers_in(shapes)),
    )


def check_model_size(kind: Any, config: PreTrainedConfig, shapes: Shapes, name: str) -> None:
    """Build the model of a config without memory and count what it would take; `kind` is one of transformers' classes.

    Raises:
        ModelError: it cannot be built, or takes more than twice what the weights have.
    """
    try:
        with torch.device("meta"):
            model = kind.from_config(config)
    except Exception as error:
        raise ModelError(f"{name}: transformers cannot build this model: {reason_of(error)}") from None
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    wanted, there = sum(tensor.numel() for tensor in tensors.values()), _numbers_in(shapes)
    if wanted > 2 * there + _ROOM:
        raise ModelError(
            f"{name}: config.json describes a model of {wanted:,} numbers, and its weights have {there:,}",
            hint="the config is not that of these weights; nothing is ever filled in at random",
        )


def _numbers_in(shapes: Shapes) -> int:
    """Number of weights; packed ones as many as a word can contain, and bitsandbytes' four bits in any precision."""
    return sum(
        math.prod(shape) * (_FOUR_BITS.get(dtype, 1) if f"{key}.quant_map" in shapes else _PER_WORD.get(dtype, 1))
        for key, (dtype, shape) in shapes.items()
    )


def _leaves(value: Any) -> Iterator[tuple[str, Any]]:
    """Every value that is not an object or list, with the nearest key above it."""
    waiting = [("", value)]
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, dict):
            waiting += [(str(inner), held) for inner, held in value.items()]
        elif isinstance(value, list):
            waiting += [(key, held) for held in value]
        else:
            yield key, value


def _refused(name: str, key: str, value: Any, why: str) -> ModelError:
    shown = f"{value:,}" if isinstance(value, int) else f"{value!r:.40}"
    return ModelError(
        f"{name}: config.json has {key:.60}: {shown:.60}, {why}",
        hint="the config is not that of these weights, or damaged",
    )
