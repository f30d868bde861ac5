"""Modules that are trained whole and saved with the adapter (PEFT's `modules_to_save`): the input embedding, the head.

What is trained is a copy, in fp32, of which each forward pass makes one in the base's precision; the base's own stays
as it was. So the reference computes with the original rows, on a tied head too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.func import functional_call

from dpo_studio.errors import ModelError
from dpo_studio.frozen.linear import FrozenLinear
from dpo_studio.frozen.products import is_adapter_disabled

__all__ = ["TrainedModule", "modules_named", "take_over"]


class TrainedModule(ModulesToSaveWrapper):  # type: ignore[misc]
    """An embedding or a head and its trained copy, by adapter."""

    original_module: nn.Module

    def now(self) -> nn.Module:
        """What computes now: the active adapter's copy, or the base's own where there is none or it is disabled."""
        names = [] if is_adapter_disabled() or self.disable_adapters else self.active_adapters
        copies = [copy for name, copy in self.modules_to_save.items() if name in names]
        module: nn.Module = copies[0] if copies else self.original_module
        return module

    def forward(self, x: Tensor, *, exact: torch.dtype | None = None) -> Tensor:
        """The module's output, in the base's precision; `exact`: in fp32, with weights rounded to that precision."""
        module = self.now()
        dtype = exact or next(self.original_module.parameters()).dtype
        weights = {name: p.to(dtype) for name, p in module.named_parameters()}
        if exact is not None:
            weights, x = {name: p.float() for name, p in weights.items()}, x.float() if x.is_floating_point() else x
        output: Tensor = functional_call(module, weights, (x,))
        return output


def take_over(policy: nn.Module) -> None:
    """Compute by these rules what PEFT has wrapped by its own."""
    for module in policy.modules():
        if type(module) is ModulesToSaveWrapper:
            module.__class__ = TrainedModule
            for p in module.modules_to_save.parameters():  # type: ignore[union-attr]
                p.data = p.data.float()


def modules_named(base: Any, names: Sequence[str], where: str) -> list[str]:
    """Full names of the modules that `names`, full names or their ends, stand for, sorted.

    Raises:
        ModelError: one is not the input embedding or the head, or is packed.
    """
    if not names:
        return []
    own = {"the input embedding": base.get_input_embeddings(), "the head": base.get_output_embeddings()}
    known = {name: module for name, module in base.named_modules() if any(module is one for one in own.values())}
    found = set()
    for wanted in names:
        fits = [name for name, _ in base.named_modules() if name == wanted or name.endswith(f".{wanted}")]
        if strange := [name for name in fits if name not in known] or ([] if fits else [wanted]):
            raise ModelError(
                f"{where}: {strange[0]} is not the input embedding or the head of this model, and only these can be "
                "trained whole",
                hint=f"name some of {', '.join(sorted(known))}, or adapt other layers by adapter.targets",
            )
        found |= set(fits)
    for name in found:
        module = getattr(known[name], "original_module", known[name])
        if isinstance(module, FrozenLinear):
            raise ModelError(f"{where}: {name} cannot be trained whole: its weight is packed", hint="leave it out")
    return sorted(found)
