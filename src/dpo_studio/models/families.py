"""The properties of model families that neither config values nor module names show: one entry each.

A plain dense decoder needs no entry. Ropes, windows, kinds of layers, experts and routers are read off the config and
the modules, whatever the family (`models.unsupported`, `models.attention`, `models.targets`). A family of your own is
added with `add_family`, after its classes are registered with transformers' AutoConfig and AutoModelForCausalLM.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

from transformers import PreTrainedConfig

from dpo_studio.config import Layout

__all__ = ["FAMILIES", "Family", "add_family", "family_of", "is_gated"]


def _always(_config: PreTrainedConfig) -> bool:
    return True


@dataclass(frozen=True)
class Reason:
    """Why models of a family cannot be read in packs, or not at all."""

    words: str
    """Follows the model's name in the message: `is ...`, `has ...`."""
    applies: Callable[[PreTrainedConfig], bool] = _always
    """Whether it applies to a model of this config."""


@dataclass(frozen=True)
class Family:
    """One kind of model, by the `model_type` of its config; the defaults are those of a plain dense decoder."""

    model_type: str
    unpacked: Reason | None = None
    """Why its models are read in another layout than packs, where neither config nor layers say it."""
    layout: Layout = "apart"
    """The layout of those models."""
    dense_mask: bool = False
    """Whether its attention changes the mask on the way, and needs one with a place for every two tokens."""
    gated_mlp: str | None = None
    """The class of its `mlp`s, where that is exactly down(act_fn(gate_proj(x)) * up_proj(x))."""
    logits_divided_by: str | None = None
    """The key of the config that its forward divides logits by, or hidden states just before the head."""
    logits_multiplied_by: str | None = None
    logits_capped_by: str | None = None
    """The key of the config that its logits are bent by: cap * tanh(z / cap)."""
    refusal: Reason | None = None
    """Why its models can be read in no layout."""


_OWN_HEAD = Reason("has more than one product between its hidden states and its logits")
_ALIBI = Reason("counts distances in places of the row (ALiBi)")
_LOCAL = Reason(
    "counts its windows in places of the row (local attention)", lambda config: "local" in config.attention_layers
)
_CAP = "final_logit_softcapping"

FAMILIES: tuple[Family, ...] = (
    # dense decoders that have nothing of their own but a known MLP
    Family("llama", gated_mlp="LlamaMLP"),
    Family("mistral", gated_mlp="MistralMLP"),
    Family("qwen2", gated_mlp="Qwen2MLP"),
    Family("qwen3", gated_mlp="Qwen3MLP"),
    # what becomes of hidden @ head: per family, for `logits_scaling` divides in Granite and multiplies in HyperCLOVA X
    Family("granite", logits_divided_by="logits_scaling"),
    Family("granite_swa", logits_divided_by="logits_scaling"),
    Family("granitemoe", logits_divided_by="logits_scaling"),
    Family("granitemoe_swa", logits_divided_by="logits_scaling"),
    Family("granitemoehybrid", logits_divided_by="logits_scaling"),
    Family("granitemoeshared", logits_divided_by="logits_scaling"),
    Family("minicpm3", logits_divided_by="logits_scaling"),  # the hidden states, which is the same
    Family("inkling_text", logits_divided_by="logits_mup_width_multiplier"),
    Family("hyperclovax", logits_multiplied_by="logits_scaling"),
    Family("cohere", logits_multiplied_by="logit_scale"),
    Family("cohere2", logits_multiplied_by="logit_scale"),
    Family("cohere2_moe", logits_multiplied_by="logit_scale"),
    Family("cohere_compass_text", logits_multiplied_by="logit_scale"),
    Family("beam", logits_capped_by=_CAP),
    Family("gemma2", logits_capped_by=_CAP),
    Family("gemma3_text", logits_capped_by=_CAP, gated_mlp="Gemma3MLP"),
    # not `gemma3`, the wrapper: its forward ignores its text model's cap
    Family("gemma3n", logits_capped_by=_CAP),
    Family("gemma3n_text", logits_capped_by=_CAP),
    Family("gemma4", logits_capped_by=_CAP),
    Family("gemma4_text", logits_capped_by=_CAP),
    Family("gemma4_unified", logits_capped_by=_CAP),
    Family("gemma4_unified_text", logits_capped_by=_CAP),
    Family("nanochat", logits_capped_by=_CAP),
    Family("vaultgemma", logits_capped_by=_CAP),
    Family("recurrent_gemma", logits_capped_by="logits_soft_cap"),
    # adds what it has learned to the mask
    Family("doge", dense_mask=True),
    # read one sequence a row
    Family("bloom", unpacked=_ALIBI),
    Family("mpt", unpacked=_ALIBI),
    Family("gpt_neo", unpacked=_LOCAL),
    # what cannot be computed
    Family("dory", refusal=_OWN_HEAD),
    Family("modernbert-decoder", refusal=_OWN_HEAD),
)
"""Every family that has something of its own, as the package knows it."""

_by_type = {family.model_type: family for family in FAMILIES}


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a model with this config; a plain dense decoder where no entry has its `model_type`."""
    kind = getattr(config, "model_type", "")
    return _by_type.get(kind) or Family(kind)


def add_family(family: Family) -> None:
    """Make a family known for as long as this process lives, before a model of it is opened.

    Raises:
        ValueError: its `model_type` has an entry already, or its layout is not built.
    """
    if family.model_type in _by_type:
        raise ValueError(f"the model type {family.model_type!r} has a family already: {_by_type[family.model_type]}")
    if family.layout not in get_args(Layout):
        raise ValueError(
            f"{family.model_type}: the layout {family.layout!r} is not one of {', '.join(get_args(Layout))}"
        )
    _by_type[family.model_type] = family


def is_gated(mlp: type) -> bool:
    """Whether some family's `gated_mlp` is this class: others may have taken it over."""
    return any(family.gated_mlp == mlp.__name__ for family in _by_type.values())
