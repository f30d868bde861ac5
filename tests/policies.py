"""Tiny policies whose adapter is no longer the zero it starts as, their PEFT twins, and a few steps of training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from dpo_studio.config import AdapterSection, TrainingSection
from dpo_studio.learning.reference import reference_logps
from dpo_studio.learning.state import TrainingState
from dpo_studio.learning.train import StepReport, train
from dpo_studio.models.adapters import as_reference, attach, train_mode
from dpo_studio.policy.policy import Policy
from dpo_studio.tokens.encode import EncodedPair
from dpo_studio.tokens.pack import Steps
from tests.tiny_models import tiny_model

__all__ = ["SECTION", "moved", "plain_peft_on", "policy_on", "take_steps"]


SECTION = AdapterSection(rank=4, alpha=8)
"""The adapter of the tests: scale 2, on every linear layer but the head."""


def moved(policy: Any, *, seed: int = 0, size: float = 0.1) -> Any:
    """The same policy after its adapter has gone somewhere: every lora_B drawn at random."""
    draw = torch.Generator().manual_seed(seed)
    for name, p in policy.named_parameters():
        if "lora_B" in name:
            p.data = size * torch.randn(p.shape, generator=draw)
    return policy


def policy_on(architecture: str = "llama", *, size: float = 0.1, dropout: float = 0.0, **changes: Any) -> Any:
    """Our LoRA on a tiny model, in eval, its adapter moved by `size`."""
    model = tiny_model(architecture, **changes)
    model.requires_grad_(False)
    section = SECTION.model_copy(update={"dropout": dropout})
    return moved(attach(model, section, seed=0), size=size).eval()


def plain_peft_on(architecture: str = "llama", *, size: float = 0.1, **changes: Any) -> Any:
    """The oracle of `policy_on`: the same weights, PEFT's own LoRA layers, transformers' eager attention."""
    model = tiny_model(architecture, attn_implementation="eager", **changes)
    config = LoraConfig(r=SECTION.rank, lora_alpha=SECTION.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    policy = get_peft_model(model, config)
    ours = dict(policy_on(architecture, size=size, **changes).named_parameters())
    for name, p in policy.named_parameters():
        p.data = ours[name].data.clone()
    return policy.eval()


def take_steps(
    policy: Any,
    pairs: Sequence[EncodedPair],
    section: TrainingSection,
    objective: Any,
    *,
    steps: int,
    budget: int = 100,
) -> Iterator[StepReport]:
    """Our loop as `dpo train` runs it, the reference known beforehand."""
    with as_reference(policy):
        known = reference_logps(policy, pairs, token_budget=budget, cache=None)
    plan = Steps(
        pairs,
        section.pairs_per_step,
        budget,
        section.seed,
        section.epochs,
        steps,
        lambda places: known.map(lambda x_P: x_P[list(places)]),
    )
    train_mode(policy)
    state = TrainingState.fresh(Policy(policy), section, steps)
    return train(Policy(policy), plan, objective, state)
