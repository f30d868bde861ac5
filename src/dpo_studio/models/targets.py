"""Which layers an adapter may be on: attention, dense MLPs and fused experts, never routers, the head or the embedding.

PEFT 0.21's own `all-linear` takes the routers of some mixtures along, and no expert of others. So `all-linear` is
resolved here, by name, to layers and parameters that plain PEFT finds again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.transformers_weight_conversion import (
    convert_peft_adapter_state_dict_for_transformers,
    convert_peft_config_for_transformers,
    get_model_conversion_mapping,
)
from torch import nn

from dpo_studio.errors import ModelError
from dpo_studio.frozen.linear import FrozenLinear
from dpo_studio.models.experts import fused_experts, plain_name

__all__ = [
    "all_linear",
    "is_one_product",
    "named_targets",
    "not_adaptable",
    "quantisable",
    "short_names",
    "short_parameters",
]

_EXPERTS = re.compile(r"(?!shared_)(\w+_)?experts")
"""A module of experts that a router selects from. Shared ones see every token, and are dense."""
_ROUTER = re.compile(r"gate|\w*router\w*|\w*expert_gate")
"""Of a mixture: what chooses the experts, or weighs the shared one."""
_SAME_PRODUCT = ("FalconLinear",)
"""Subclasses of `nn.Linear` whose forward says the same in other words."""
_READ_PAST = ("dt_proj",)
"""Of Mamba's layers: it multiplies by this one's weight itself, and would pass an adapter by."""
_FUSED_BY_KERNELS = ("out_proj", "conv1d")
_FUSING = frozenset({"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"})
"""Types of models in which PEFT 0.21 refuses an adapter on those: kernels may read their weights past the adapter."""


@dataclass(frozen=True)
class Targets:
    """What is adapted in one model."""

    names: list[str]
    """Linear layers: full names, sorted, of `all-linear`; of a list what it says."""
    parameters: Sequence[str] = ()
    """Projections of fused experts (PEFT's `target_parameters`): full names, sorted."""
    experts: int = 0
    """Layers of experts, left out."""
    routers: int = 0
    renamed: Sequence[str] = ()
    """Names of dense layers, left out too: PEFT would take them for the experts'."""
    lost: Sequence[str] = ()
    """Names of layers, left out too: PEFT would not find them again when it loads the adapter."""
    fused: Sequence[str] = ()
    """Names of layers, left out too: PEFT refuses them."""

    def words(self) -> str | None:
        """The note on experts and on layers that are not adapted; None where all-linear is all of them."""
        left_out = [
            f"{len(names)} dense layers ({', '.join(sorted({name.rpartition('.')[2] for name in names}))}) {why}"
            for names, why in (
                (self.renamed, "whose names PEFT gives to the experts"),
                (self.lost, "that PEFT would not find again when it loads the adapter"),
                (self.fused, "whose weights the model or a kernel may read past an adapter"),
            )
            if names
        ]
        if not (self.experts or self.routers):
            return f"all-linear leaves out {', and '.join(left_out)}" if left_out else None
        more = "".join(f", and {what}" for what in left_out)
        experts = f" and {len(self.parameters)} projections of experts" if self.parameters else ""
        left = f"{self.experts} layers of experts, " if self.experts else ""
        return (
            f"a mixture of experts: all-linear is {len(self.names)} layers of attention and dense MLPs{experts} here. "
            f"Left out: {left}{self.routers} routers{more}; the load-balancing loss is not added"
        )


def all_linear(model: nn.Module) -> Targets:
    """The linear layers of the text model that plain PEFT can name, and its experts' projections, not the routers.

    Raises:
        ModelError: there is none.
    """
    strange = _of_mixtures(model)
    head = _name_of(model, _called(model, "get_output_embeddings"))
    within = _name_of(model, _called(model, "get_decoder"))  # of a model that sees: its text model
    linear = [name for name, module in model.named_modules() if is_one_product(module) and name != head]
    linear = [name for name in linear if name.startswith(f"{within}.")] or linear
    renamed = _read_as_experts(model, linear)
    past = _read_by_kernels(model, linear)
    dense = [name for name in linear if name not in strange and name not in past]
    ours = [name for name in dense if name.rpartition(".")[2] not in renamed]
    lost = _lost(model, ours)
    names = sorted({*ours} - lost)
    if not names:
        raise ModelError("adapter.targets all-linear: this model has no linear layer that can be adapted")
    fused = _found_again(model)
    parameters = sorted(name for place, names in fused.items() if place.startswith(within or "") for name in names)
    kinds = [
        what
        for name, what in strange.items()
        if name not in fused and not any(strange.get(parent) == what for parent in _parents(name))
    ]
    renamed_ones = sorted({*dense} - {*ours})
    counts = kinds.count("expert"), kinds.count("router")
    return Targets(names, parameters, *counts, renamed_ones, sorted(lost), sorted(past))


def is_one_product(module: nn.Module) -> bool:
    """Whether a layer is W x + b and nothing else: DeepSeek V4 has a subclass that multiplies groups of its input."""
    own = type(module).forward
    return isinstance(module, nn.Linear) and (
        own is nn.Linear.forward or isinstance(module, FrozenLinear) or type(module).__name__ in _SAME_PRODUCT
    )


def quantisable(model: nn.Module) -> list[str]:
    """The linear layers that may be stored in fewer bits: no head, no router, no experts; sorted."""
    strange = {*_of_mixtures(model), _name_of(model, _called(model, "get_output_embeddings"))}
    return sorted(name for name, module in model.named_modules() if is_one_product(module) and name not in strange)


def named_targets(model: nn.Module, targets: Iterable[str]) -> Targets:
    """What the names of a recipe's list, full ones or their ends, stand for.

    Raises:
        ModelError: one names the head, the embedding, experts that are not fused, or a router, or nothing that PEFT
            would find.
    """
    layers, parameters = [], set()
    known = [name for name, _ in model.named_modules()]
    fused = _found_again(model)
    for target in sorted(set(targets)):
        fits = {
            name
            for place, names in fused.items()
            for name in names
            if any(one == target or one.endswith(f".{target}") for one in (name, place))
        }
        parameters |= fits
        elsewhere = [name for name in known if name == target or name.endswith(f".{target}")]
        if not fits or {*elsewhere} - {*fused}:
            layers.append(target)
    _refuse_targets(model, layers)
    return Targets(layers, sorted(parameters))


def _refuse_targets(model: nn.Module, targets: Iterable[str]) -> None:
    modules = [name for name, _ in model.named_modules()]
    parameters = [name for name, _ in model.named_parameters()]
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    renamed = _read_as_experts(model, [*linear, *targets])
    lost = _lost(model, linear)
    for target in sorted(targets):
        found = [name for name in (*modules, *parameters) if name == target or name.endswith(f".{target}")]
        if strange := not_adaptable(model, found):
            raise ModelError(
                f"adapter.targets: {target} is {strange[1]} ({strange[0]}), which DPO Studio does not adapt",
                hint="name the layers of attention and dense MLPs in full, or use `all-linear` without it",
            )
        if target.rpartition(".")[2] in renamed:
            raise ModelError(
                f"adapter.targets: {target} is a name that PEFT gives to this family's experts, "
                "and a dense layer has it too",
                hint="use `all-linear` without it",
            )
        if missed := sorted(lost.intersection(found)):
            raise ModelError(
                f"adapter.targets: {target} is {missed[0]} too, which PEFT would not find again when it loads the "
                "adapter: it renames that layer's tensors",
                hint="name the other layers in full, or use `all-linear` without it",
            )


def not_adaptable(model: nn.Module, names: Iterable[str]) -> tuple[str, str] | None:
    """The first module no adapter can be on, and what it is: "the head", "the embedding", "an expert" or "a router".

    Names that the model lacks are judged by what they say: earlier versions of transformers called things otherwise.
    """
    special = {
        _name_of(model, _called(model, "get_output_embeddings")): "the head",
        _name_of(model, _called(model, "get_input_embeddings")): "the embedding",
    }
    strange = _of_mixtures(model)
    fused = fused_experts(model) if strange else {}
    for name in names:
        if what := special.get(name):
            return name, what
        if plain_name(name) in fused:
            continue
        for place in (name, *_parents(name)) if strange else ():
            end = place.rpartition(".")[2]
            if strange.get(place) == "router" or _ROUTER.fullmatch(end):
                return name, "a router"
            if strange.get(place) == "expert" or _EXPERTS.fullmatch(end):
                return name, "an expert"
    return None


def short_names(model: nn.Module, names: Iterable[str]) -> list[str]:
    """The names' last parts if they mean the same layers among all of the model's modules, else the names; sorted."""
    names = set(names)
    short = {name.rpartition(".")[2] for name in names}
    meant = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in short}
    return sorted(short if meant == names else names)


def short_parameters(model: nn.Module, names: Iterable[str]) -> list[str]:
    """The names' last two parts if they mean the same projections of the model's experts, else the names; sorted."""
    names = set(names)
    short = {".".join(name.split(".")[-2:]) for name in names}
    every = [name for ones in fused_experts(model).values() for name in ones]
    meant = {name for name in every if ".".join(name.split(".")[-2:]) in short}
    return sorted(short if meant == names else names)


def _found_again(model: nn.Module) -> dict[str, list[str]]:
    """`fused_experts`, without those whose tensors PEFT would give other names when it loads them."""
    fused = fused_experts(model)
    layers = {layer: place for place in fused for layer in (place, f"{place}.base_layer")}
    lost = {layers[layer] for layer in _lost(model, layers)}
    return {place: names for place, names in fused.items() if place not in lost}


def _of_mixtures(model: nn.Module) -> dict[str, str]:
    """Modules of a mixture's experts and routers -> which of the two; empty for a dense model."""
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        parts = name.split(".")
        kind = type(module).__name__
        if any(map(_EXPERTS.fullmatch, parts)) or kind.endswith("Experts"):
            found[name] = "router" if any(map(_ROUTER.fullmatch, parts)) else "expert"
    if not found:
        return {}
    for name, module in model.named_modules():
        if any(map(_ROUTER.fullmatch, name.split("."))) or "Router" in type(module).__name__:
            found[name] = "router"
    return found


def _read_as_experts(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Last parts of names that PEFT, loading onto this model, would take for parameters of its experts.

    Full names do not help: it looks at their last part too.
    """
    ends = {name.rpartition(".")[2] for name in names}
    conversions = get_model_conversion_mapping(model) if hasattr(model, "config") else None
    taken = set()
    for end in ends:
        config = LoraConfig(target_modules=[end])
        try:
            convert_peft_config_for_transformers(config, model=model, conversions=deepcopy(conversions))
        except ValueError:  # one half of what is fused
            taken.add(end)
            continue
        if end not in (config.target_modules or ()):
            taken.add(end)
    return taken


def _lost(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Layers whose tensors PEFT, loading them onto this model, would give other names.

    Laguna's `shared_expert` was renamed to `shared_experts`; the expression that says so finds the new name as well.
    """
    keys = {f"base_model.model.{name}.lora_A.weight": name for name in names}
    config = LoraConfig(target_modules=sorted(keys.values()))
    tensors = {key: torch.empty(1, 1) for key in keys}
    loaded = convert_peft_adapter_state_dict_for_transformers(model, config, tensors)
    return {name for key, name in keys.items() if key not in loaded}


def _read_by_kernels(model: nn.Module, names: Iterable[str]) -> set[str]:
    fuses = getattr(getattr(model, "config", None), "model_type", None) in _FUSING
    ends = {*_READ_PAST, *(_FUSED_BY_KERNELS if fuses else ())}
    return {name for name in names if name.rpartition(".")[2] in ends}


def _called(model: nn.Module, method: str) -> Any:
    """What one of transformers' own getters says, None where a model has none."""
    try:
        return getattr(model, method)()
    except (AttributeError, NotImplementedError, TypeError):
        return None


def _name_of(model: nn.Module, wanted: Any) -> str | None:
    if wanted is None or wanted is model:
        return None
    return next((name for name, module in model.named_modules() if module is wanted), None)


def _parents(name: str) -> Iterable[str]:
    """a.b.c -> a.b, a."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name
