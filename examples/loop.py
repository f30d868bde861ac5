"""DPO from a JSONL file to a saved adapter, with the loop written out: for whoever wants to change the algorithm.

    python examples/loop.py MODEL PAIRS.jsonl OUT

`dpo train` does the same and more: it checks data and masks, survives interruptions, fits the GPU and measures.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch.nn.functional import logsigmoid

from dpo_studio.config import AdapterSection, ModelSection, as_source
from dpo_studio.learning.logprobs import pair_logps
from dpo_studio.learning.reference import reference_logps
from dpo_studio.models.load import load_chat_model
from dpo_studio.policy.policy import Policy
from dpo_studio.preferences.sources import read_pairs
from dpo_studio.tokens.encode import encode_pairs
from dpo_studio.tokens.pack import Steps

BETA, LEARNING_RATE, PAIRS_PER_STEP, EPOCHS, SEED = 0.1, 5e-5, 32, 1, 0
TOKEN_BUDGET = 2048
"""Tokens of a micro-batch: what is in memory at once. It changes speed, never what is learned."""


def main(model: str, source: str, out: str) -> list[float]:
    """Train a LoRA adapter on the pairs and save it to the folder `out`; returns the loss of every step."""
    base = load_chat_model(ModelSection(path=model, dtype="float32"))
    pairs = encode_pairs(read_pairs(as_source(source)).pairs, base.encoder, max_length=1024).pairs
    policy = Policy.fresh(base.model, AdapterSection(rank=16, alpha=32), seed=SEED)

    with policy.as_reference():  # the adapter off: what the policy is held close to
        known = reference_logps(policy.model, pairs, token_budget=TOKEN_BUDGET, cache=None)
    steps = Steps(
        pairs,
        PAIRS_PER_STEP,
        TOKEN_BUDGET,
        SEED,
        EPOCHS,
        reference=lambda positions: known.map(lambda x_P: x_P[list(positions)]),
    )
    optimizer = torch.optim.AdamW(policy.trained.values(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    policy.train_mode()
    losses: list[float] = []
    for micro_batches in steps(after=0):
        pairs_in_step = sum(len(batch) for batch in micro_batches)
        total = 0.0
        for batch in (batch.to(policy.device) for batch in micro_batches):
            logps, reference = pair_logps(policy.model, batch), batch.reference
            assert reference is not None
            # Rafailov et al. 2023, arXiv 2305.18290, Eq. 7; every tensor has one number a pair, (P,)
            margin_P = (logps.chosen_P - reference.chosen_P) - (logps.rejected_P - reference.rejected_P)
            loss = -logsigmoid(BETA * margin_P).sum() / pairs_in_step  # over the step, never a mean of means
            torch.autograd.backward(loss)
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(policy.trained.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(total)
        print(f"step {len(losses)} of {steps.total}: loss {total:.4f}", file=sys.stderr)

    policy.save(Path(out), base=model)
    return losses


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: python examples/loop.py MODEL PAIRS.jsonl OUT")
    main(*sys.argv[1:])
