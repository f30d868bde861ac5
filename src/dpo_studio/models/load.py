"""Bases and tokenizers: checked before loading, and loaded completely or not at all."""

from __future__ import annotations

import datetime
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from dpo_studio.config import ModelSection, cache_folder
from dpo_studio.errors import ModelError, reason_of
from dpo_studio.frozen.gptq_files import Gptq
from dpo_studio.models.attention import choose_attention
from dpo_studio.models.conv1d import as_linear
from dpo_studio.models.folder import ModelFolder, open_model
from dpo_studio.models.fp8_model import into_fp8
from dpo_studio.models.layouts import LayoutChoice, choose_layout, set_layout
from dpo_studio.models.quantised_model import load_quantised
from dpo_studio.models.sharding import load_sharded, shard_layers
from dpo_studio.models.unsupported import auto_class
from dpo_studio.ranks import ALONE, Ranks
from dpo_studio.sizes import check_model_size
from dpo_studio.tokens.chat import ChatEncoder

__all__ = ["ChatModel", "choose_dtype", "load_chat_model", "load_weights", "put_on_gpu"]

_OF_A_GPU = 0.6
"""A base whose weights take a larger share of one GPU is sharded: activations and the adapter need the rest."""
_AS_GPTQ = "model.quantize: nf4 or a GPTQ base takes a quarter (`dpo quantize` makes one)"
_MORE_ROOM = "choose a smaller model, or a GPU with more free memory: `nvidia-smi` shows what else is on this one"


@dataclass(frozen=True, eq=False)
class ChatModel:
    """A base model with its tokenizer, ready to compute."""

    model: PreTrainedModel
    encoder: ChatEncoder
    files: ModelFolder
    """What it was loaded from."""
    typed: str
    """What its user called it."""
    dtype_reason: str
    """Why it computes in this precision."""
    layout: LayoutChoice
    """How it reads pairs, and why not in packs."""

    @property
    def folder(self) -> Path:
        """Where its files are on this machine."""
        return self.files.path

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return torch.device(self.model.device)


def load_chat_model(
    section: ModelSection,
    *,
    folder: ModelFolder | None = None,
    typed: str | None = None,
    say: Callable[[str], None] = lambda _: None,
    today: datetime.date | None = None,
    ranks: Ranks = ALONE,
) -> ChatModel:
    """Load a base and its tokenizer onto the best device there is.

    `ranks` are the processes that it may be sharded over. `folder` is the section's, if it was opened before, and
    `today` the date its chat template may write, None today's.

    Raises:
        ModelError: not found, unsafe, unsupported, changed since it was opened, or with tensors missing or left over.
    """
    folder = folder or open_model(section.path, section.revision, say)
    encoder = folder.look_over(section, today=today)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "compiled"))  # its own is emptied on a reboot
    dtype, reason = choose_dtype(section.dtype, device)
    text = folder.config.get_text_config()
    layout = choose_layout(text, section.layout, folder.name)
    attention = choose_attention(section.attention, text, device, layout.layout)
    if section.sharding == "full" and ranks.size > 1 and not _can_be_sharded(folder, layout):
        raise ModelError("model.sharding: full is built for text models in packs", hint="model.sharding: none")
    if _to_be_sharded(section, folder, device, ranks) and _can_be_sharded(folder, layout):
        say(f"each of {ranks.size} processes reads and holds a slice of every layer's weights (model.sharding)")
        model = load_sharded(folder, dtype, attention, device, ranks)
    elif folder.quantization is None and section.quantize is None:
        model = load_weights(auto_class(folder.config), folder, dtype, attention)
        with put_on_gpu(model.get_memory_footprint(), folder.name, hint=f"{_AS_GPTQ}, or {_MORE_ROOM}"):
            if section.compute == "fp8":
                say(into_fp8(model, device, folder.name))
            model = model.to(device)
    else:
        model = _load_packed(folder, section, dtype, attention, device, say)
        if section.sharding == "full" and ranks.size > 1:
            shard_layers(model, ranks, device)
    model.requires_grad_(False)
    model.eval()
    set_layout(model, layout.layout)
    return ChatModel(model, encoder, folder, typed or section.path, reason, layout)


def _can_be_sharded(folder: ModelFolder, layout: LayoutChoice) -> bool:
    """Whether every process computes the same layers in the same order: packs, and no tower beside the text model."""
    return layout.layout == "packed" and auto_class(folder.config) is AutoModelForCausalLM


def _to_be_sharded(section: ModelSection, folder: ModelFolder, device: torch.device, ranks: Ranks) -> bool:
    """Whether a dense base is read by slices: where the section asks for it, or its weights alone would fill most of
    one GPU; never in one process. A packed base is read whole and then sharded.

    Raises:
        ModelError: it asks for what is not built.
    """
    if ranks.size == 1 or section.sharding == "none":
        return False
    if section.sharding == "full" and section.compute == "fp8":
        raise ModelError("model.sharding: full is not built for compute: fp8", hint="model.sharding: none")
    dense = folder.quantization is None and section.quantize is None and section.compute != "fp8"
    if section.sharding == "full" and not dense and not isinstance(folder.quantization, Gptq):
        raise ModelError("model.sharding: full is built for dense and GPTQ bases", hint="model.sharding: none")
    if section.sharding == "full" or not dense or device.type != "cuda":
        return section.sharding == "full" and dense
    size = 2 * sum(math.prod(shape) for _, shape in folder.shapes.values())
    return size > _OF_A_GPU * torch.cuda.get_device_properties(device).total_memory


def _load_packed(
    folder: ModelFolder,
    section: ModelSection,
    dtype: torch.dtype,
    attention: str,
    device: torch.device,
    say: Callable[[str], None],
) -> PreTrainedModel:
    folder.check_unchanged()
    there = [file for file in folder.weights if file.is_file()]
    packed = sum(file.stat().st_size for file in there) if section.quantize is None else None
    hint = _MORE_ROOM if section.residency == "packed" else f"model.residency: packed takes that much; or {_MORE_ROOM}"
    exact = isinstance(folder.quantization, Gptq)  # its products in FP8 round no weight
    with put_on_gpu(packed, folder.name, hint=hint):
        model = load_quantised(
            folder.path,
            deepcopy(folder.config.get_text_config()),
            folder.quantization,
            name=folder.name,
            dtype=dtype,
            attention=attention,
            device=device,
            quantize=section.quantize or "",
            residency=section.residency,
            compute=section.compute if exact else "auto",
            say=say,
        )
        if section.compute == "fp8" and not exact:
            say(into_fp8(model, device, folder.name))
        return model


@contextmanager
def put_on_gpu(size: int | None, name: str, *, hint: str | None = None) -> Iterator[None]:
    """Inside, a model of `size` bytes, if that is known, goes to the GPU.

    Raises:
        ModelError: the GPU has no room for it.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise ModelError(
            f"{name} does not fit in the GPU's memory"
            + ("" if size is None else f": its weights take {size / 2**30:.1f} GiB"),
            hint=hint or _MORE_ROOM,
        ) from None


def choose_dtype(wanted: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The precision of the frozen base, and why.

    On a CPU a timed product decides: with AMX bfloat16 is four times as fast as float32, without it 30 times slower.
    """
    if wanted != "auto":
        return getattr(torch, wanted), "as the recipe says"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported():
            return torch.bfloat16, "the GPU's own"
        return torch.float16, "this GPU has no bfloat16"
    seconds = {dtype: _time_product(dtype) for dtype in (torch.float32, torch.bfloat16)}
    ratio = seconds[torch.float32] / seconds[torch.bfloat16]
    dtype = torch.bfloat16 if ratio > 1.2 else torch.float32
    times, than = (ratio, "as fast as") if ratio > 1 else (1 / ratio, "slower than")
    return dtype, f"on this CPU a matrix product in bfloat16 is {times:.3g} times {than} one in float32"


def load_weights(kind: Any, folder: ModelFolder, dtype: torch.dtype, attention: str | None) -> PreTrainedModel:
    """All tensors of the model from the folder, each used; transformers only warns and fills in random ones.

    `kind` is one of its auto classes.

    Raises:
        ModelError: tensors are missing or left over, or the files cannot be read or were changed since they were
            looked at.
    """
    name, config = folder.name, folder.config
    if type(config) not in kind._model_mapping:
        raise ModelError(f"{name} ({config.model_type}) is not a model of this kind ({kind.__name__})")
    if getattr(config, "quantization_config", None):
        raise ModelError(f"{name} is quantised, and is only read so as a base to train")
    check_model_size(kind, deepcopy(config), folder.shapes, name)
    folder.check_unchanged()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        model, info = kind.from_pretrained(
            folder.path,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # to get their names; they are refused below like the others
            output_loading_info=True,
        )
    except Exception as error:
        raise ModelError(f"{name} cannot be loaded: {reason_of(error)}", hint="is the download complete?") from None
    finally:
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.enable_progress_bar()
    as_linear(model)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(str(key) for key in info[kind]):
            raise ModelError(
                f"{name}: {len(keys)} {kind.replace('_keys', '')} tensors, the first is {keys[0]}",
                hint="the weights are not this model's; nothing is ever filled in at random",
            )
    return model


def _time_product(dtype: torch.dtype) -> float:
    left, right = torch.ones(256, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - start)
    return best
