"""A frozen base sharded over the processes (FSDP2, Zhao et al. 2023, arXiv 2304.11277): each keeps its slice of every
layer's weights and collects a layer's as it is computed.

Nothing frozen has a gradient, so nothing but weights is exchanged; the adapter is whole on every process, and the
reference is cached log-probs, so no second model is sharded. Each process reads its own slices of the files: none ever
holds the whole model. Embedding, head and norms outside the layers are whole: log-probs read the head's weight itself.
All processes must compute the same number of rows, for each collects weights from the others.
"""

from __future__ import annotations

import math
import os
from copy import deepcopy
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import AutoModelForCausalLM, PreTrainedModel

from dpo_studio.errors import ModelError
from dpo_studio.frozen.linear import FrozenLinear
from dpo_studio.models.folder import ModelFolder
from dpo_studio.models.layers import causal_lm, decoder_layers
from dpo_studio.ranks import Ranks
from dpo_studio.sizes import check_model_size

__all__ = ["is_sharded", "load_sharded", "local", "shard_layers"]

_OF_A_GPU = 0.6
"""The share of a GPU that its slices may take for the model to stay within one machine."""


def is_sharded(model: nn.Module) -> bool:
    """Whether this model's layers are slices, which all processes have to collect together."""
    return any(isinstance(layer, FSDPModule) for layer in decoder_layers(model))


def local(tensor: Tensor) -> Tensor:
    """This process's slice of a sharded tensor; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_layers(model: nn.Module, ranks: Ranks, device: torch.device) -> None:
    """Shard every decoder layer, one after the other; weights on `meta` stay there.

    Of a packed layer its int32 words are sharded: one dtype a layer, and the rest of it is small.
    """
    for module in model.modules():
        if isinstance(module, FrozenLinear):
            module.words_as_parameters()
    mesh = _mesh(model, ranks, device)
    layers = list(decoder_layers(model))
    for layer in layers:
        words = [p for p in layer.parameters() if p.dtype == torch.int32]
        whole = {p for p in layer.parameters() if words and p.dtype != torch.int32}
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    body = causal_lm(model).base_model
    outside = set(body.parameters()) - {p for layer in layers for p in layer.parameters()}
    fully_shard(body, mesh=mesh, ignored_params=outside)  # no weights of its own: it orders those of the layers


def _mesh(model: nn.Module, ranks: Ranks, device: torch.device) -> DeviceMesh:
    """All processes; or, of several machines, those of each where its GPUs have room for the whole model (HSDP).

    Weights are collected with every layer: between machines that takes longer than a layer's products.
    """
    here = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.size))
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    room = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else math.inf
    if 1 < here < ranks.size and ranks.size % here == 0 and size / here < _OF_A_GPU * room:
        return init_device_mesh(device.type, (ranks.size // here, here), mesh_dim_names=("machine", "shard"))
    return init_device_mesh(device.type, (ranks.size,))


def load_sharded(
    folder: ModelFolder, dtype: torch.dtype, attention: str, device: torch.device, ranks: Ranks
) -> PreTrainedModel:
    """The model of `folder`, each process with its slices on `device`.

    Raises:
        ModelError: its files have other tensors than the model, as some families' have; or were changed.
    """
    config = deepcopy(folder.config)
    check_model_size(AutoModelForCausalLM, deepcopy(config), folder.shapes, folder.name)
    folder.check_unchanged()
    with init_empty_weights(include_buffers=False):  # rotary frequencies are buffers, computed as they are made
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
    model.requires_grad_(False)
    model.eval()
    shard_layers(model, ranks, device)
    buffers = {id(x): x.clone() for x in model.buffers()}
    places = [(m, name, id(x)) for m in model.modules() for name, x in m._buffers.items() if x is not None]
    model.to_empty(device=device)
    for module, name, before in places:
        module._buffers[name] = buffers[before].to(device)
    model.tie_weights()
    _fill(model, folder)
    return model


@torch.no_grad()
def _fill(model: PreTrainedModel, folder: ModelFolder) -> None:
    """Read every weight's slice, and no byte of the others'."""
    missing = dict(model.named_parameters())  # a tied head is its embedding, once
    tied = set(model.state_dict()) - set(missing)
    for file in folder.weights:
        missing = _fill_from(file, missing, tied, folder.name)
    if missing:
        raise _other_tensors(folder.name, next(iter(missing)), "is missing")


def _fill_from(file: Path, missing: dict[str, nn.Parameter], tied: set[str], name: str) -> dict[str, nn.Parameter]:
    with safe_open(file, framework="pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118 - safe_open is no dict
            if key not in missing and key not in tied:
                raise _other_tensors(name, key, "is left over")
        there = [key for key in tensors.keys() if key in missing]  # noqa: SIM118
        for key in there:
            p, kept = missing[key], tensors.get_slice(key)
            if tuple(kept.get_shape()) != tuple(p.shape):
                raise _other_tensors(name, key, "has another shape")
            if isinstance(p, DTensor):
                shape, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
                if shape[0]:
                    p.to_local()[: shape[0]].copy_(kept[offset[0] : offset[0] + shape[0]])
            else:
                p.copy_(kept[:])
    return {key: p for key, p in missing.items() if key not in there}


def _other_tensors(name: str, key: str, what: str) -> ModelError:
    return ModelError(
        f"{name}: the tensor {key} {what}: this family's files are not read by slices",
        hint="model.sharding: none, with the whole base on each GPU",
    )
