"""GPU memory: how many tokens fit, and what happens after an out-of-memory.

The token budget changes speed only: an out-of-memory halves it, and the step is repeated with the same pairs. When a
single pair is too large, the backward pass recomputes more activations instead of keeping them (activation
checkpointing).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from torch import nn

from dpo_studio.config import Layout
from dpo_studio.errors import RunError
from dpo_studio.frozen.linear import weight_count
from dpo_studio.learning.logprobs import pair_logps
from dpo_studio.models.layers import RUNGS, Recompute, is_compiled, set_recompute
from dpo_studio.models.layouts import layout_of
from dpo_studio.models.lora import free_shared_outputs
from dpo_studio.models.sharding import is_sharded
from dpo_studio.tokens.encode import EncodedPair
from dpo_studio.tokens.pack import MicroBatch, Steps, lay_out, packed_tokens, tokens_in

__all__ = [
    "CPU_TOKEN_BUDGET",
    "MemoryLimit",
    "MemoryLimits",
    "plan_limit",
    "tokens_without_gradient",
    "too_long_for_memory",
    "unless_out_of_memory",
]

CPU_TOKEN_BUDGET = 2048
"""Tokens of a micro-batch on a CPU: two cores are busy from 512 on; a step of eight short pairs then is one row."""
_GPU_WORK = 6e13
"""Weights x tokens that keep a GPU busy: 8,192 tokens of a 7B. On an H200 twice as many were 1 % faster."""
_GPU_TOKENS = (8192, 65536)
"""The smallest and the largest token budget that is tried, whatever the model's size."""
_SPARE = 0.9
"""Share of the free memory that is used for planning: fragments, other lengths, and the loss take the rest."""
_LESS = 0.9
"""Share of a token budget that did not fit which is tried next."""
_T = TypeVar("_T")


@dataclass(frozen=True)
class MemoryLimit:
    """The token budget and the activation checkpointing from one step on."""

    step: int
    tokens: int
    """The token budget of a micro-batch; a single longer pair has one of its own."""
    recompute: Recompute = "nothing"
    """What the backward pass recomputes (activation checkpointing)."""

    @property
    def recomputing(self) -> str:
        """What is recomputed, as the end of a sentence; empty where nothing is."""
        return "" if self.recompute == "nothing" else f", each {self.recompute} recomputed in the backward pass"


class MemoryLimits:
    """The memory limits of a run, by step: known ones from earlier starts, and new ones from out-of-memory errors."""

    def __init__(
        self,
        model: nn.Module,
        steps: Steps,
        known: Iterable[MemoryLimit] = (),
        report: Callable[[MemoryLimit], None] = lambda limit: None,
    ) -> None:
        self._model, self._steps, self._report = model, steps, report
        self._limits = [MemoryLimit(0, steps.token_budget)]
        self._now: MemoryLimit | None = None
        for limit in known:
            self._learn(limit)

    def token_budget(self, step: int) -> int:
        """Tokens of a micro-batch in that step."""
        return self._at(step).tokens

    def packed(self, micro_batches: list[MicroBatch], step: int) -> list[MicroBatch]:
        """The step's micro-batches within its limit: these, or repacked ones."""
        limit = self._at(step)
        if self._now is None or limit.recompute != self._now.recompute:
            set_recompute(self._model, limit.recompute)
        self._now = limit
        if all(batch.token_budget == limit.tokens for batch in micro_batches):
            return micro_batches
        return self._steps.micro_batches_of(step, limit.tokens)

    def shrink(self, step: int, largest: int) -> None:
        """After an out-of-memory: half the `largest` row's tokens from `step` on; once that is the longest pair's, more
        is recomputed.

        Raises:
            RunError: a single pair does not fit although the backward pass keeps next to nothing.
        """
        longest = max(tokens_in(self._steps.layout, pair) for pair in self._steps.pairs)
        now = self._at(step)
        if largest > longest:
            limit = MemoryLimit(step, max(longest, min(now.tokens, largest) // 2), now.recompute)
        elif now.recompute != RUNGS[-1]:
            limit = MemoryLimit(step, now.tokens, RUNGS[RUNGS.index(now.recompute) + 1])
        else:
            raise too_long_for_memory(longest)
        self._learn(limit)
        self._report(limit)

    def _at(self, step: int) -> MemoryLimit:
        return [limit for limit in self._limits if limit.step <= step][-1]

    def _learn(self, limit: MemoryLimit) -> None:
        """A new limit replaces the earlier ones of its step and of later steps."""
        self._limits = [known for known in self._limits if known.step < limit.step] + [limit]


def unless_out_of_memory(model: nn.Module, compute: Callable[[], _T]) -> _T | None:
    """The result of `compute` with `model`, or None after an out-of-memory; the memory of the attempt is freed."""
    try:
        return compute()
    except torch.OutOfMemoryError:
        if is_sharded(model):  # the others wait for this process's slices, and no one can begin anew alone
            raise RunError(
                "a process of this sharded run ran out of memory",
                hint="lower training.tokens_per_micro_batch, or use more GPUs",
            ) from None
    # out of the handler: while it runs, the traceback holds the attempt's tensors
    free_shared_outputs(model)
    gc.collect()
    torch.cuda.empty_cache()
    return None


def tokens_without_gradient(tokens: int, model: nn.Module) -> int:
    """The token budget of passes without a backward pass: a GPU has room for more where no activations are kept.

    Compiled layers keep as many as in training: they run the same code (`models.layers.as_compiled_for_training`).
    """
    on_gpu = next(model.parameters()).device.type == "cuda"
    return max(tokens, _GPU_TOKENS[0]) if on_gpu and not is_compiled(model) else tokens


class Card:
    """A GPU's memory, as planning asks for it."""

    def allocated(self) -> int:
        """Bytes that tensors take now."""
        return torch.cuda.memory_allocated()

    def usable(self) -> float:
        """Bytes that this process has or could have."""
        free, total = torch.cuda.mem_get_info()
        share = torch.cuda.get_per_process_memory_fraction()
        return min(free + torch.cuda.memory_reserved(), share * total)

    def peak(self, policy: nn.Module, row: MicroBatch) -> int:
        """Most bytes allocated while a row is learned from, the second time: the first also chooses kernels.

        That took 64 MiB of a small model's first row and made what a token costs, the difference of two rows, 5 times
        too little.
        """
        batch = row.to(next(policy.parameters()).device)
        for _ in range(2):
            policy.zero_grad(set_to_none=True)
            torch.cuda.reset_peak_memory_stats()
            logps = pair_logps(policy, batch)
            torch.autograd.backward(logps.chosen_P.sum() - logps.rejected_P.sum())
            del logps
        return torch.cuda.max_memory_allocated()


def plan_limit(
    policy: nn.Module,
    pairs: Sequence[EncodedPair],
    pairs_per_step: int,
    device: torch.device,
    card: Card | None = None,
) -> MemoryLimit:
    """As many tokens as keep the device busy, or as fit: two short rows forward and backward say what a token costs,
    and a row of the size planned whether that is true.

    The policy's gradients are gone afterwards.

    Raises:
        RunError: the longest pair does not fit.
    """
    if device.type != "cuda":
        return MemoryLimit(0, CPU_TOKEN_BUDGET)
    if is_sharded(policy):  # a try that runs out of memory would end the run: next to nothing is kept
        return MemoryLimit(0, max(_GPU_TOKENS[0], *map(packed_tokens, pairs)), RUNGS[-1])
    card = card or Card()
    size = partial(tokens_in, layout_of(policy))
    by_length = sorted(pairs, key=size, reverse=True)
    longest = size(by_length[0])
    weights = weight_count(policy)
    step_tokens = pairs_per_step * sum(map(size, pairs)) / len(pairs)
    wanted = _in_whole_blocks(
        min(max(_GPU_WORK / weights, _GPU_TOKENS[0]), _GPU_TOKENS[1], 1.25 * step_tokens), longest
    )
    for recompute in RUNGS:
        set_recompute(policy, recompute)
        if recompute == RUNGS[0] and _fits(card, policy, _row(by_length, wanted, layout_of(policy))):
            return MemoryLimit(0, wanted)
        fitting = min(wanted, _tokens_that_fit(card, policy, by_length))
        while fitting >= longest:
            tokens = _in_whole_blocks(fitting, longest)
            if tokens == longest or _fits(card, policy, _row(by_length, tokens, layout_of(policy))):
                return MemoryLimit(0, tokens, recompute)
            fitting = max(longest, _LESS * fitting)  # short rows waste parts of torch's blocks: the slope is too small
    raise too_long_for_memory(longest)


def _fits(card: Card, policy: nn.Module, row: MicroBatch) -> bool:
    """Whether a row leaves the spare memory free: on a large card one try is enough."""
    before = card.allocated()
    peak = unless_out_of_memory(policy, partial(card.peak, policy, row))
    policy.zero_grad(set_to_none=True)
    return peak is not None and peak - before <= _SPARE * (card.usable() - before)


def _tokens_that_fit(card: Card, policy: nn.Module, by_length: Sequence[EncodedPair]) -> float:
    """By a straight line through the peaks of two rows; 0 where even the longest pair is too much."""
    layout = layout_of(policy)
    longest = tokens_in(layout, by_length[0])
    before = card.allocated()
    peaks: list[int] = []
    for tokens in (longest, 2 * longest):
        peak = unless_out_of_memory(policy, partial(card.peak, policy, _row(by_length[:1], tokens, layout)))
        policy.zero_grad(set_to_none=True)
        if peak is None:
            return longest if peaks else 0
        peaks.append(peak - before)
    a_token = max(1.0, (peaks[1] - peaks[0]) / longest)
    return (_SPARE * (card.usable() - before) - peaks[0]) / a_token + longest


def _row(by_length: Sequence[EncodedPair], tokens: int, layout: Layout) -> MicroBatch:
    """A row of that many tokens or a few less: the longest pairs that still fit, the same ones again and again."""
    chosen: list[EncodedPair] = []
    left = tokens
    while (pair := next((pair for pair in by_length if tokens_in(layout, pair) <= left), None)) is not None:
        chosen.append(pair)
        left -= tokens_in(layout, pair)
    return replace(lay_out(layout, chosen), token_budget=tokens)


def _in_whole_blocks(tokens: float, longest: int) -> int:
    return max(longest, int(tokens) // 128 * 128)


def too_long_for_memory(longest: int) -> RunError:
    """The error for a pair that does not fit by itself."""
    return RunError(
        f"the longest pair, {longest} tokens, does not fit in the GPU's memory",
        hint="lower data.max_length, or choose a smaller or quantised base",
    )
