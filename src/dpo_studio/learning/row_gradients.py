"""A row's gradients by themselves, for whoever compares two ways of computing them."""

from __future__ import annotations

import torch
from torch import Tensor

from dpo_studio.learning.logprobs import pair_logps
from dpo_studio.models.layers import Recompute, set_recompute
from dpo_studio.policy.policy import Policy
from dpo_studio.tokens.pack import MicroBatch

__all__ = ["gradients"]


def gradients(policy: Policy, batch: MicroBatch, *, recompute: Recompute = "nothing") -> dict[str, Tensor]:
    """Gradients of the row's log-prob differences (chosen minus rejected, summed) in every trained tensor, by name.

    `recompute` is what the backward pass recomputes (activation checkpointing); the policy's model keeps this setting.
    The policy has no gradients afterwards, those that it had before included.
    """
    set_recompute(policy.model, recompute)
    policy.model.zero_grad(set_to_none=True)
    logps = pair_logps(policy.model, batch.to(policy.device))
    torch.autograd.backward((logps.chosen_P - logps.rejected_P).sum())
    found = {name: p.grad for name, p in policy.trained.items() if p.grad is not None}
    policy.model.zero_grad(set_to_none=True)
    return found
