"""The policy: the model that is trained. A LoRA adapter on a frozen base, with a frozen reference adapter if named."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from peft import PeftModel
from torch import Tensor, nn

from dpo_studio.config import AdapterSection
from dpo_studio.models.adapted_layers import adapted_names
from dpo_studio.models.adapters import (
    REFERENCE,
    adapter_state,
    as_reference,
    attach,
    attach_existing,
    in_eval,
    save_adapter,
    saved_tensors,
    train_mode,
)
from dpo_studio.policy.adapter_check import verify_adapter, verify_trial_adapter
from dpo_studio.policy.moving_reference import check_movable, move_reference, put_reference, reference_state

__all__ = ["Policy"]


@dataclass(frozen=True, eq=False)
class Policy:
    """The trained adapter and the model that computes it. Loop, checkpoints and reports use only these members."""

    model: PeftModel
    """Computes log-probs as the policy does when it is called."""
    weights_file: ClassVar[str] = "adapter/adapter_model.safetensors"
    """Where a checkpoint has what is trained."""

    @classmethod
    def fresh(
        cls, base: nn.Module, section: AdapterSection, *, seed: int, say: Callable[[str], None] = lambda _: None
    ) -> Policy:
        """A fresh adapter on `base`: A random from `seed`, B zero, so the policy starts as the base.

        Raises:
            ModelError: a target names no linear layer, or one that cannot be adapted.
        """
        return cls(attach(base, section, seed=seed, say=say))

    @classmethod
    def saved(cls, base: nn.Module, folder: Path, *, trainable: bool) -> Policy:
        """The adapter saved in `folder` on `base`.

        Raises:
            ModelError: the folder contains no LoRA adapter in safetensors, or one made for other layers.
        """
        return cls(attach_existing(base, folder, trainable=trainable))

    def load_reference(self, folder: Path) -> None:
        """Load the adapter saved in `folder` as the frozen reference.

        Raises:
            ModelError: as `saved`.
        """
        attach_existing(self.model, folder, trainable=False, name=REFERENCE)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return torch.device(next(self.model.parameters()).device)

    @cached_property
    def trained(self) -> dict[str, nn.Parameter]:
        """The tensors that the optimizer changes, fp32, by name, in the order of the model's modules: a norm over all
        of them adds in this order."""
        return adapter_state(self.model)

    def by_learning_rate(self, ratio: float | None) -> list[tuple[float, list[nn.Parameter]]]:
        """What is trained in groups, each with the ratio of its learning rate to the recipe's.

        LoRA+ (Hayou et al. 2024, arXiv 2402.12354): B learns faster than A, by `ratio`; as in PEFT so do tensors of one
        dimension, DoRA's magnitudes. None: one group.
        """
        if ratio is None:
            return [(1.0, list(self.trained.values()))]
        fast = {name for name, p in self.trained.items() if ".lora_B." in name or p.ndim == 1}
        groups = [(ratio, [p for name, p in self.trained.items() if name in fast])]
        groups.append((1.0, [p for name, p in self.trained.items() if name not in fast]))
        return [group for group in groups if group[1]]

    def resolved_targets(self) -> list[str] | None:
        """Full names of what is adapted, where experts are; None of a dense model, whose `all-linear` says it all."""
        layers, parameters = adapted_names(self.model.get_base_model())
        return sorted([*layers, *parameters]) if parameters else None

    def train_mode(self) -> None:
        """Turn on dropout, in the adapter only."""
        train_mode(self.model)

    def in_eval(self) -> AbstractContextManager[None]:
        """Inside, dropout is off."""
        return in_eval(self.model)

    def as_reference(self) -> AbstractContextManager[None]:
        """Inside, `model` computes as the reference does: adapter off, or the reference's adapter on; no dropout."""
        return as_reference(self.model)

    def state(self) -> dict[str, Tensor]:
        """The trained tensors by the names they have in their file."""
        return saved_tensors(self.model)

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Restore the trained tensors that `state` returned.

        Raises:
            KeyError, RuntimeError: a tensor is missing or has another shape.
        """
        for name, tensor in self.state().items():
            tensor.copy_(saved[name])

    def updated(self) -> None:
        """After a step of the optimizer: the model computes with what is trained itself."""

    def save_weights(self, folder: Path, *, base: str) -> None:
        """Write into a checkpoint's folder what is trained."""
        self.save(folder / "adapter", base=base)

    def save(self, folder: Path, *, base: str) -> None:
        """Write an adapter folder that plain PEFT loads; `base` is the model as its user named it."""
        save_adapter(self.model, folder, base=base)

    def prove(self, folder: Path) -> None:
        """Check that plain PEFT loads the adapter in `folder` as this policy.

        Raises:
            ModelError: it does not.
        """
        verify_adapter(self.model, folder)

    def verify_trial_adapter(self, scratch: Path, *, base: str) -> None:
        """The same before training, with noise in every tensor, saved to `scratch`; the policy is unchanged.

        Raises:
            ModelError: plain PEFT would not compute with what this training saves.
        """
        verify_trial_adapter(self.model, scratch, base=base)

    def check_movable(self) -> None:
        """See that a reference can be moved towards this policy.

        Raises:
            ModelError: the adapter is more than products B A, which are all that is mixed.
        """
        check_movable(self.model)

    def move_reference(self, share: float) -> float:
        """Move the reference by `share` towards the policy (TR-DPO); returns the truncation error."""
        return move_reference(self.model, share)

    def reference_state(self) -> dict[str, Tensor]:
        """The reference adapter's tensors by name, on the CPU; none while the reference is the base itself."""
        return reference_state(self.model)

    def restore_reference(self, saved: dict[str, Tensor]) -> None:
        """Restore the reference that `reference_state` returned."""
        put_reference(self.model, saved)
