"""A 7B on a card made small: what the memory plan chooses, and what training then takes.

    python benchmarks/small_card.py --gib 24
    python benchmarks/small_card.py --gib 12 --base gptq

Random weights in the true shape, bf16 or GPTQ's four bits in groups of 128, the ultrafeedback mix (max_length 1024),
live reference. `--gib` limits what torch may allocate: weights, activations, optimizer and cache, not the CUDA context.
The last line is the peak.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import nullcontext

import torch

from dpo_studio.config import TrainingSection
from dpo_studio.learning.logprobs import pair_logps
from dpo_studio.learning.memory import MemoryLimits, plan_limit
from dpo_studio.learning.state import TrainingState
from dpo_studio.learning.train import train
from dpo_studio.models.adapters import as_reference
from dpo_studio.models.layers import compiled_layers
from dpo_studio.objectives import DPO, PairLogps
from dpo_studio.policy.policy import Policy
from dpo_studio.tokens.pack import MicroBatch, Steps
from ours import our_policy
from shapes import MIXES, SHAPES, random_pairs, shaped

_BASES = {"bf16": "ours", "gptq": "packed", "gptq-fp8": "fp8"}
"""As `our_policy` calls them."""


def main() -> None:
    """Plan, train, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=24)
    parser.add_argument("--base", choices=_BASES, default="bf16")
    parser.add_argument("--shape", choices=SHAPES, default="mistral-7b")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--pairs-per-step", type=int, default=32)
    parser.add_argument("--tokens", type=int, help="tokens a micro-batch, instead of what is planned")
    parser.add_argument("--eager", action="store_true", help="layers not compiled")
    options = parser.parse_args()
    device = torch.device("cuda")
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(options.gib * 2**30 / total)
    shape = shaped(options.shape)
    pairs = random_pairs(MIXES["ultrafeedback"], 256, shape.vocabulary)
    policy = our_policy(shape, device, _BASES[options.base])

    def live(batches: Sequence[MicroBatch]) -> list[PairLogps]:
        with as_reference(policy):
            return [pair_logps(policy, batch) for batch in batches]

    with nullcontext() if options.eager else compiled_layers(policy):
        limit = plan_limit(policy, pairs, options.pairs_per_step, device)
        print(f"planned for {options.gib} GiB: {limit}", flush=True)
        steps = Steps(pairs, options.pairs_per_step, options.tokens or limit.tokens, 0, 1, options.steps)
        section = TrainingSection(pairs_per_step=options.pairs_per_step)
        state = TrainingState.fresh(Policy(policy), section, options.steps)
        torch.cuda.reset_peak_memory_stats()
        known = [] if options.tokens else [limit]
        room = MemoryLimits(policy, steps, known, lambda met: print(f"out of memory: {met}", flush=True))
        for report in train(Policy(policy), steps, DPO(), state, live, room):
            rate = report.pairs / report.seconds
            print(f"step {report.step}: loss {report.metrics['loss']:.4f}, {rate:.2f} pairs/s", flush=True)
    print(f"peak {torch.cuda.max_memory_reserved() / 2**30:.1f} GiB reserved of {options.gib}")


if __name__ == "__main__":
    main()
