"""Our systems under measurement, through the product's own functions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from peft import PeftModel
from torch import nn

from dpo_studio.config import AdapterSection, TrainingSection
from dpo_studio.frozen.fp8 import device_obstacle, fp8_obstacle, fp8_weight
from dpo_studio.frozen.gptq import Packed
from dpo_studio.frozen.linear import FrozenLinear
from dpo_studio.frozen.row_scaled import RowScaled, row_scaled_obstacle
from dpo_studio.learning.logprobs import pair_logps
from dpo_studio.learning.reference import reference_logps
from dpo_studio.learning.state import TrainingState
from dpo_studio.learning.train import train
from dpo_studio.models.adapters import as_reference, attach, train_mode
from dpo_studio.models.attention import FLEX, PAIRS
from dpo_studio.models.layers import compiled_layers, set_recompute
from dpo_studio.models.sharding import local, shard_layers
from dpo_studio.objectives import DPO, PairLogps
from dpo_studio.policy.policy import Policy
from dpo_studio.ranks import Ranks
from dpo_studio.tokens.encode import EncodedAnswer, EncodedPair
from dpo_studio.tokens.pack import MicroBatch, Steps, assign_to_rows, pack
from jobs import Job, check_system
from meter import Meter, synchronise
from shapes import (
    ALPHA,
    GPTQ_BITS,
    GPTQ_ZERO,
    MIXES,
    RANK,
    TARGETS,
    Shape,
    gptq_group,
    mean_unique_tokens,
    random_gptq,
    random_model,
    random_pairs,
    shaped,
    unique_tokens,
)

__all__ = ["gptq_linear", "our_policy", "run", "unshared_pack"]

_FORWARD, _BACKWARD = 2, 2
"""Floating-point operations a weight and token; the frozen weights need no gradient of their own."""


def our_policy(shape: Shape, device: torch.device, kind: str = "ours", sharded_over: Ranks | None = None) -> PeftModel:
    """A policy with random weights, ready for training: what `load_chat_model` and the run do for a real one.

    Its base is bf16 (`ours`), the same in FP8 (`rows8`), or GPTQ: `packed`, with `fp8` products, or dequantised once
    (`resident`). Sharded, a bf16 one is made slice by slice: a 70B never stands whole on a card.
    """
    attention = FLEX if device.type == "cuda" else PAIRS
    linear = {"ours": None, "rows8": in_fp8}.get(kind, partial(gptq_linear, kind=kind))
    if sharded_over is not None:
        base = random_sharded(shape, device, attention, sharded_over)
    else:
        base = random_model(shape, device, attention, linear)
    base.requires_grad_(False)
    base.eval()
    policy = attach(base, AdapterSection(rank=RANK, alpha=ALPHA, targets=list(TARGETS)), seed=0)
    train_mode(policy)
    if device.type == "cuda":
        set_recompute(policy, "nothing")
    return policy


def in_fp8(dense: nn.Linear) -> nn.Linear:
    """The layer in FP8, as `load_chat_model` makes it under `compute: fp8`."""
    if obstacle := row_scaled_obstacle(dense.weight.device, dense.weight.dtype):
        raise RuntimeError(f"FP8: {obstacle}")
    return FrozenLinear(RowScaled.of(dense.weight.detach()), dense.bias)


def random_sharded(shape: Shape, device: torch.device, attention: str, ranks: Ranks) -> Any:
    """The shape with random bf16 weights, sharded before any of them is there."""
    with init_empty_weights(include_buffers=False):
        model = random_model(shape, torch.device("cpu"), attention)
    model.requires_grad_(False)
    shard_layers(model, ranks, device)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.to_empty(device=device)
    draw = torch.Generator(device).manual_seed(ranks.rank)  # slices differ from each other
    whole = torch.Generator(device).manual_seed(0)  # what is whole is the same everywhere
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                local(p).fill_(1)
            else:
                local(p).normal_(0, 0.02, generator=draw if local(p) is not p else whole)
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    return model


def gptq_linear(dense: nn.Linear, kind: str) -> nn.Linear:
    """A GPTQ layer of this one's size with random weights, as `load_chat_model` makes one of a checkpoint's."""
    inputs, outputs, device = dense.in_features, dense.out_features, dense.weight.device
    group = gptq_group(inputs)
    if kind == "fp8":
        obstacle = device_obstacle(device) or fp8_obstacle(inputs, outputs, GPTQ_BITS, group, act_order=False)
        if obstacle:
            raise RuntimeError(f"FP8: {obstacle}")
    words_NW, scales_NG = random_gptq(dense)
    zeros_NG = torch.full(scales_NG.shape, GPTQ_ZERO, dtype=torch.uint8, device=device)
    weight = Packed(words_NW, scales_NG, zeros_NG, None, GPTQ_BITS, group)
    if kind == "fp8":
        return FrozenLinear(fp8_weight(weight))
    if kind != "resident":
        return FrozenLinear(weight)
    dense.weight.data = weight.dequantised(dense.weight.dtype)
    return dense


def run(job: Job, meter: Meter) -> dict[str, Any]:
    """Train until the meter has seen enough; layers are compiled on a GPU, as in any run long enough."""
    shape = shaped(job.shape, window=job.window, vocabulary=job.vocabulary)
    pairs = random_pairs(replace(MIXES[job.mix], scale=job.scale), job.pairs, shape.vocabulary)
    meter.say("making the model")
    policy = our_policy(shape, meter.device, job.system.partition("-")[0])
    with compiled_layers(policy) if meter.device.type == "cuda" else nullcontext():
        return _trained(job, meter, shape, pairs, policy)


def _trained(job: Job, meter: Meter, shape: Shape, pairs: Sequence[EncodedPair], policy: PeftModel) -> dict[str, Any]:
    cached = _Cached.of(policy, pairs, job, meter) if job.system.endswith("-cached") else None
    section = TrainingSection(pairs_per_step=job.pairs_per_step, schedule="constant", warmup=0)
    steps = (_Unshared if job.system == "ours-unshared" else Steps)(
        pairs,
        job.pairs_per_step,
        job.tokens_per_micro_batch,
        seed=0,
        epochs=1,
        max_steps=10**6,  # the meter ends it
        reference=cached.look_up if cached else None,
    )

    def live(batches: Sequence[MicroBatch]) -> list[PairLogps]:
        with as_reference(policy):
            return [pair_logps(policy, batch) for batch in batches]

    state = TrainingState.fresh(Policy(policy), section, steps.total)
    losses = []
    meter.begin()
    for report in train(Policy(policy), steps, DPO(), state, None if cached else live):
        losses.append(report.metrics["loss"])
        unique = sum(unique_tokens(pairs[position]) for position in steps.pairs_of(report.step))
        if meter.note(report.pairs, unique, report.tokens):
            break
    passes = _FORWARD + _BACKWARD + (0 if cached else _FORWARD)
    result = meter.result(mean_unique_tokens(pairs), passes * shape.layer_parameters)
    result |= {"setting": check_system(job.system), "first_loss": losses[0], "last_loss": losses[-1]}
    result["tokens_per_micro_batch"] = job.tokens_per_micro_batch
    return result | (cached.result(result["pairs_per_second"]) if cached else {})


@dataclass(frozen=True)
class _Cached:
    """The reference's log-probs of all pairs, and what they cost."""

    logps: PairLogps
    seconds: float
    """Of the second half: the first pays for the warm-up."""
    pairs: float
    """In units of the mean pair, as in `Meter.result`."""
    first_seconds: float

    @classmethod
    def of(cls, policy: PeftModel, pairs: Sequence[EncodedPair], job: Job, meter: Meter) -> _Cached:
        """Ask the reference, in two halves."""
        meter.say("the reference's log-probs")
        half = max(1, len(pairs) // 2)
        parts, spent = [], []
        with as_reference(policy):
            for some in (pairs[:half], pairs[half:]):
                start = time.perf_counter()
                parts.append(reference_logps(policy, some, token_budget=job.tokens_per_micro_batch, cache=None))
                synchronise(meter.device)
                spent.append(time.perf_counter() - start)
        rest = sum(map(unique_tokens, pairs[half:])) / mean_unique_tokens(pairs)
        return cls(PairLogps.cat(parts), spent[1], rest, spent[0])

    def look_up(self, positions: Sequence[int]) -> PairLogps:
        """What `Steps` asks for."""
        return self.logps.map(lambda logps_P: logps_P[list(positions)])

    def result(self, pairs_per_second: float) -> dict[str, float]:
        """The pass, and pairs/s of one epoch when it is counted."""
        rate = self.pairs / self.seconds
        return {
            "reference_seconds": self.first_seconds + self.seconds,
            "reference_pairs_per_second": rate,
            "pairs_per_second_with_reference": 1 / (1 / pairs_per_second + 1 / rate),
        }


class _Unshared(Steps):
    """The same pairs in the same steps, each answer behind its own copy of the prompt: what sharing saves."""

    def micro_batches_of(self, step: int, token_budget: int | None = None) -> list[MicroBatch]:
        """The micro-batches of step number `step`."""
        token_budget = token_budget or self.token_budget
        positions = self.pairs_of(step)
        lengths = [unique_tokens(self.pairs[place]) + len(self.pairs[place].prompt) - 2 for place in positions]
        rows = [[positions[item] for item in row] for row in assign_to_rows(lengths, token_budget)]
        return [
            replace(unshared_pack([self.pairs[place] for place in row], row), token_budget=token_budget) for row in rows
        ]


def unshared_pack(pairs: Sequence[EncodedPair], positions: Sequence[int]) -> MicroBatch:
    """A row in which nothing is shared: every pair laid down as two, each with one answer and a last token unscored."""
    nothing = EncodedAnswer(np.zeros(1, np.int32), np.zeros(1, np.bool_))
    halves = [
        replace(pair, chosen=answer, rejected=nothing) for pair in pairs for answer in (pair.chosen, pair.rejected)
    ]
    batch = pack(halves)
    return replace(batch, pairs=tuple(positions), tokens_A=batch.tokens_A[0::2])  # without the answers of nothing
