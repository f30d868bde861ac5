"""The layers that an adapter is on: their names, and that each is computed here, switched off and saved."""

from __future__ import annotations

from collections.abc import Mapping

from peft import LoraConfig, PeftModel
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers import PreTrainedModel

from dpo_studio.config import AdapterSection
from dpo_studio.errors import ModelError
from dpo_studio.models.adapter_settings import rank_of
from dpo_studio.models.dora import Dora
from dpo_studio.models.experts import LoraExperts, fused_experts, plain_name
from dpo_studio.models.lora import LoraLinear
from dpo_studio.models.targets import is_one_product, not_adaptable, short_names
from dpo_studio.models.trained_modules import TrainedModule

__all__ = ["adapted_names", "check_layers", "check_parameters", "check_patterns"]


def adapted_names(model: nn.Module) -> tuple[list[str], list[str]]:
    """Full names of the linear layers that are adapted, and of the projections of experts."""
    layers, parameters = [], []
    for name, module in model.named_modules():
        if isinstance(module, LoraExperts):
            parameters.append(f"{plain_name(name)}.{module.parameter_name}")
        elif isinstance(module, lora.LoraLayer):
            layers.append(name)
    return sorted(layers), sorted(parameters)


def check_layers(policy: PeftModel, what: str) -> None:
    """What is trained is computed, switched off for the reference, and saved: our own layers, A and B, nothing else.

    Log-probs are read off the head's own weight (`learning.logprobs`), so an adapter on it would never be trained.

    Raises:
        ModelError: something else is adapted.
    """
    under = policy.get_base_model()
    adapted = {name: module for name, module in under.named_modules() if isinstance(module, BaseTunerLayer)}
    if strange := not_adaptable(under, sorted(adapted)):
        raise ModelError(
            f"{what} adapts {strange[1]} ({strange[0]}), which DPO Studio cannot train",
            hint="remove it from the targets; `all-linear` does not include it",
        )
    for name, module in adapted.items():
        if not _is_computed(under, name, module):
            raise ModelError(
                f"{what} adapts {name} ({type(module).__name__}), a kind of layer that DPO Studio does not compute",
                hint="name linear layers only, or use `all-linear`",
            )
    named = ("lora_A", "lora_B", "lora_magnitude_vector")
    parts = [getattr(module, name) for module in adapted.values() for name in named]
    parts += [module.modules_to_save for module in under.modules() if isinstance(module, TrainedModule)]
    ours = {id(p) for part in parts for p in part.parameters()}
    if others := sorted(name for name, p in policy.named_parameters() if p.requires_grad and id(p) not in ours):
        raise ModelError(f"{what} would train {others[0]}, which no adapter's file would contain")


def check_parameters(model: PreTrainedModel, config: LoraConfig, rows: Mapping[str, int], what: str) -> None:
    """See that an adapter's target parameters are experts that are computed here, of the ranks that its tensors have;
    `rows` are those of each layer's A.

    The settings are then as PEFT makes them: names of transformers 4 are those of the fused experts.

    Raises:
        ModelError: they are not; PEFT would make tensors of any rank first.
    """
    try:
        convert_peft_config_for_transformers(config, model=model, conversions=None)
    except ValueError as error:
        raise ModelError(f"{what}: this adapter does not fit the model: {error}") from None
    fused = fused_experts(model)
    wanted = sorted(config.target_parameters or ())
    every = [name for names in fused.values() for name in names]
    named = {one: [name for name in every if name == one or name.endswith(f".{one}")] for one in wanted}
    if strange := [target for target, names in named.items() if not names]:
        raise ModelError(
            f"{what}: target_parameters has {strange[0]}, which is no projection of fused experts in this model",
            hint="was this adapter trained on another base?",
        )
    meant = {name for names in named.values() for name in names}
    experts = {plain_name(name): module for name, module in model.named_modules() if hasattr(module, "num_experts")}
    for place, names in fused.items():
        ranks = [rank_of(name, config.rank_pattern, config.r) for name in names if name in meant]
        found = [count / experts[place].num_experts for layer, count in rows.items() if plain_name(layer) == place]
        if sorted(ranks) != sorted(found):
            raise ModelError(
                f"{what}: adapter_config.json gives the experts of {place} the ranks {ranks}, its tensors have {found}",
                hint="was this adapter trained on another base? r and rank_pattern must be those of its training",
            )


def check_patterns(policy: PeftModel, section: AdapterSection) -> None:
    """Raises ModelError if a pattern fits no layer: its rank or alpha would be that of the others, and nothing said."""
    linear, parameters = adapted_names(policy.get_base_model())
    layers = [*linear, *parameters]
    for key in ("rank_pattern", "alpha_pattern"):
        for name in getattr(section, key):
            if not any(layer == name or layer.endswith(f".{name}") for layer in layers):
                raise ModelError(
                    f"adapter.{key}: no adapted layer is called {name}, or has a name that ends so",
                    hint=f"adapted are {', '.join(short_names(policy.get_base_model(), layers)[:20])}",
                )


def _is_computed(model: nn.Module, name: str, module: BaseTunerLayer) -> bool:
    """Whether a layer is one of ours, of a kind that we compute."""
    if isinstance(module, LoraExperts):
        place = plain_name(name)
        return f"{place}.{module.parameter_name}" in fused_experts(model).get(place, ())
    if type(module) is not LoraLinear or not is_one_product(module.base_layer):
        return False
    return all(isinstance(kind, Dora) for kind in module.lora_variant.values())
