"""The whole model as the policy (`adapter: null`); what it is held close to is the model before the first step.

The model computes in its own precision. What the optimizer changes are fp32 copies of its weights (an update of 1e-5 is
lost in bf16), in which the gradients of a step's micro-batches are added up, and which are rounded to the model after
each step (Micikevicius et al. 2018, arXiv 1710.03740, section 3.1). A model in fp32 needs no copies. In bf16 a weight
takes 18 bytes: 2, its copy 4, its gradient 4, AdamW's averages 8.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpo_studio.errors import ModelError
from dpo_studio.frozen.linear import FrozenLinear
from dpo_studio.models.adapters import in_eval
from dpo_studio.models.targets import all_linear
from dpo_studio.policy.policy import Policy

__all__ = ["WholePolicy"]


@dataclass(frozen=True, eq=False)
class WholePolicy(Policy):
    """Every weight of the model, its embeddings and its head too."""

    weights_file: ClassVar[str] = "weights.safetensors"
    masters: dict[str, nn.Parameter] = field(default_factory=dict)
    """What the optimizer changes, by name: fp32 copies, or the model's own parameters where those are fp32."""
    _moved: list[bool] = field(default_factory=lambda: [False])

    @classmethod
    def of(cls, base: PreTrainedModel) -> WholePolicy:
        """The model `base`, which is trained in place.

        Raises:
            ModelError: its weights are quantised or in fp16, or it has experts.
        """
        if any(isinstance(module, FrozenLinear) for module in base.modules()):
            raise ModelError("adapter: null trains the weights themselves, and those of a quantised base are integers")
        if base.dtype not in (torch.float32, torch.bfloat16, torch.float64):
            raise ModelError("a whole model is not trained in float16", hint="model.dtype: bfloat16 or float32")
        targets = all_linear(base)
        if targets.parameters or targets.experts or targets.routers:
            raise ModelError("adapter: null is not built for mixtures of experts", hint="train an adapter on this base")
        masters = {}
        for name, p in base.named_parameters():  # a tied head is its embedding, once
            p.requires_grad_(True)
            masters[name] = p
            if p.dtype == torch.bfloat16:
                masters[name] = nn.Parameter(p.detach().float())
                p.register_post_accumulate_grad_hook(partial(_add_gradient, masters[name]))
        return cls(base, masters)

    @cached_property
    def trained(self) -> dict[str, nn.Parameter]:
        """The fp32 weights by name, in the order of the model's modules."""
        return self.masters

    @torch.no_grad()
    def updated(self) -> None:
        """Round what the optimizer has changed into the model."""
        self._moved[0] = True
        for name, p in self.model.named_parameters():
            if p is not self.masters[name]:
                p.copy_(self.masters[name])

    def resolved_targets(self) -> list[str] | None:
        """All weights: there is nothing to name."""
        return None

    def train_mode(self) -> None:
        """No dropout: it would be the base's own."""
        self.model.eval()

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """Inside, `model` computes as the reference does, which it is until its first step.

        Raises:
            ModelError: it has changed.
        """
        if self._moved[0]:
            raise ModelError("the reference of a whole model is its start, which is gone after the first step")
        with in_eval(self.model):
            yield

    def state(self) -> dict[str, Tensor]:
        """The fp32 weights by name."""
        return {name: p.detach() for name, p in self.masters.items()}

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Restore the weights that `state` returned.

        Raises:
            KeyError, RuntimeError: a tensor is missing or has another shape.
        """
        super().restore(saved)
        self.updated()

    def save_weights(self, folder: Path, *, base: str) -> None:
        """What a checkpoint has of it."""
        save_file({name: p.cpu().contiguous() for name, p in self.state().items()}, folder / self.weights_file)

    def verify_trial_adapter(self, scratch: Path, *, base: str) -> None:
        """There is none."""

    def reference_state(self) -> dict[str, Tensor]:
        """The reference does not move."""
        return {}


def _add_gradient(master: nn.Parameter, p: Tensor) -> None:
    """Add a micro-batch's gradient in fp32: the bf16 one would lose what a few hundred of them add up to."""
    gradient, p.grad = p.grad, None
    if gradient is None:
        return
    if master.grad is None:
        master.grad = gradient.float()
    else:
        master.grad += gradient
