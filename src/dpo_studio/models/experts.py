"""LoRA on the experts of a mixture, which transformers keeps as one parameter of three dimensions for each projection.

To PEFT these are `target_parameters`: it forms W_e + s B_e A_e of every expert in each forward pass. Here the low-rank
products are taken of the rows that an expert is given, in the grouped product of the base. Names, shapes and files are
PEFT's. The router chooses as it did, and is never adapted.

Shapes: T = tokens, S = T times the experts of a token, E = experts, H = hidden size, K and N = inputs and outputs,
r = rank.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn

from dpo_studio.frozen.expert_products import expert_products

__all__ = ["LoraExperts", "adapts_experts", "factors", "fused_experts", "plain_name", "take_over_experts"]

_MARKS = ("num_experts", "has_gate", "has_bias", "is_transposed", "has_post_expert_norm", "_apply_gate")
"""What transformers' `use_experts_implementation` gives a module whose forward it may replace by a general one."""


class LoraExperts(lora.ParamWrapper):  # type: ignore[misc]
    """One adapted projection of all experts, around the module that has it or around another such layer."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The experts' output with the active adapter of each projection; what is unusual is computed by PEFT."""
        by_name: dict[str, LoraExperts] = {}
        experts: Any = self
        while isinstance(experts, LoraExperts):
            by_name[experts.parameter_name] = experts
            experts = experts.base_layer
        if any(layer.merged or layer.disable_adapters or len(layer._active()) > 1 for layer in by_name.values()):
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        index, weights = [*args, *kwargs.values()]
        return _mixture(experts, by_name, x, index, weights)

    def _active(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.lora_A]

    def now(self) -> tuple[Tensor, Tensor] | None:
        """A (E, r, K) and s B (E, N, r) of the active adapter, if there is one."""
        active = self._active()
        return factors(self, active[0]) if active else None


LoraExperts.__name__ = "ParamWrapper"  # by this name PEFT finds the layer again when it adds a second adapter


def factors(layer: Any, name: str) -> tuple[Tensor, Tensor]:
    """A (E, r, K) and s B (E, N, r) of a layer's adapter, fp32: PEFT keeps them as two matrices."""
    down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
    down_ErK = down.reshape(layer.num_experts, -1, down.shape[1])
    up_ENr = up.reshape(len(up), -1, layer.num_experts).permute(2, 0, 1)
    return down_ErK, layer.scaling[name] * up_ENr


def _mixture(experts: Any, adapted: dict[str, LoraExperts], x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The general forward of transformers' experts: rows sorted by expert, up, gate, down, weighed and added up."""
    x_TH, k = x.flatten(0, -2), index.shape[-1]
    expert_S, order_S = torch.sort(index.flatten(), stable=True)
    ends_E = torch.searchsorted(expert_S, torch.arange(experts.num_experts, device=x.device), right=True).int()

    def product(rows: Tensor, name: str) -> Tensor:
        weight = getattr(experts, name)
        weight_EKN = weight if experts.is_transposed else weight.transpose(1, 2)
        count, inputs, outputs = weight_EKN.shape
        found = adapted[name].now() if name in adapted else None
        down, up = found or (rows.new_empty(count, 0, inputs), rows.new_empty(count, outputs, 0))
        y = expert_products(rows, weight_EKN, ends_E, down.to(rows.dtype), up.to(rows.dtype).contiguous())
        return y + getattr(experts, f"{name}_bias")[expert_S] if experts.has_bias else y

    rows = product(x_TH[order_S // k], "gate_up_proj" if experts.has_gate else "up_proj")
    rows = product(experts._apply_gate(rows) if experts.has_gate else experts.act_fn(rows), "down_proj")
    if experts.has_post_expert_norm:
        rows = experts.post_expert_norm(rows)
    weighed_SH = (rows * weights.flatten()[order_S, None])[order_S.argsort()]
    return weighed_SH.view(len(x_TH), k, -1).sum(1).to(x.dtype).view(x.shape)


def fused_experts(model: nn.Module) -> dict[str, list[str]]:
    """Modules whose experts can be adapted -> the full names of their projections, in the order of the module.

    A module that is adapted already has the name that it had before.
    """
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, lora.ParamWrapper) or not all(hasattr(module, mark) for mark in _MARKS):
            continue
        wanted = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
        place = plain_name(name)
        ours = [f"{place}.{key}" for key, p in module.named_parameters(recurse=False) if key in wanted and p.ndim == 3]
        if len(ours) == len(wanted):
            found[place] = ours
    return found


def plain_name(layer: str) -> str:
    """The name in the base of what PEFT's wrappers are around: without their `.base_layer`."""
    while layer.endswith(".base_layer"):
        layer = layer.removesuffix(".base_layer")
    return layer


def take_over_experts(policy: nn.Module) -> None:
    """Compute adapted experts by these rules in the place of PEFT's own."""
    for module in policy.modules():
        if type(module) is lora.ParamWrapper:
            module.__class__ = LoraExperts


def adapts_experts(model: nn.Module) -> bool:
    """Whether experts of this model are computed here."""
    return any(isinstance(module, LoraExperts) for module in model.modules())
