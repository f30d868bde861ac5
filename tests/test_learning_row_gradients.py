"""A row's gradients, with and without activation checkpointing, against plain PEFT's own."""

from __future__ import annotations

import pytest
import torch

from dpo_studio.learning.row_gradients import gradients
from dpo_studio.models.attention import PAIRS
from dpo_studio.models.layers import RUNGS
from dpo_studio.policy.policy import Policy
from dpo_studio.tokens.pack import pack
from tests.pairs_of_ids import random_pairs
from tests.policies import plain_peft_on, policy_on
from tests.textbook import plain_logps

SIX = random_pairs(6)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_gradients_are_plain_pefts_whatever_is_recomputed(architecture: str) -> None:
    """Law 2: 1e-4 relative, against one sequence at a time through PEFT's layers and eager attention."""
    oracle = plain_peft_on(architecture)
    logps_P2 = plain_logps(oracle, SIX)
    torch.autograd.backward((logps_P2[:, 0] - logps_P2[:, 1]).sum())
    policy = Policy(policy_on(architecture, attn_implementation=PAIRS))
    policy.train_mode()
    for recompute in RUNGS:
        found = gradients(policy, pack(SIX), recompute=recompute)
        plain = {name: p.grad for name, p in oracle.named_parameters() if p.requires_grad}
        assert found.keys() == plain.keys()
        for name, gradient in plain.items():
            assert gradient is not None
            largest = gradient.abs().max().item()
            assert largest > 0
            torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-4 * largest, msg=name)
    assert all(p.grad is None for p in policy.trained.values())
