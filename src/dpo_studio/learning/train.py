"""The loop: what an optimizer step is, top to bottom."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from dpo_studio.errors import NonFiniteError
from dpo_studio.learning.batched_logps import COLUMNS, of_all_ranks
from dpo_studio.learning.logprobs import pair_logps
from dpo_studio.learning.memory import MemoryLimits, unless_out_of_memory
from dpo_studio.learning.metrics import StepMetrics
from dpo_studio.learning.state import TrainingState
from dpo_studio.models.sharding import is_sharded
from dpo_studio.objectives import Formula, PairLogps
from dpo_studio.policy.policy import Policy
from dpo_studio.ranks import Ranks
from dpo_studio.tokens.pack import MicroBatch, Steps

__all__ = ["LiveReference", "StepReport", "train"]

LiveReference = Callable[[Sequence[MicroBatch]], list[PairLogps]]
"""The log-probs of a step's micro-batches: requested together, because switching a 7B
to its reference takes 25 ms, a tenth of the pass itself."""
_T = TypeVar("_T")
SKIPS = 3
"""A run stops after this many steps in a row with numbers that are not finite: a single such step is skipped."""


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did."""

    step: int
    metrics: dict[str, float]
    """By TRL's names. Equal after a resume, bit for bit."""
    pairs: int
    tokens_of_ranks: tuple[int, ...]
    """Tokens that each process has read, each shared prompt once."""
    seconds: float
    skipped: str = ""
    """Why the step was not taken, with the rows of its pairs; empty if it was. It then has few metrics."""

    @property
    def tokens(self) -> int:
        """Tokens read by all processes."""
        return sum(self.tokens_of_ranks)

    @property
    def imbalance(self) -> float:
        """The busiest process's tokens over the mean: all of them wait for it. 1 is ideal."""
        return max(self.tokens_of_ranks) * len(self.tokens_of_ranks) / max(1, self.tokens)


def train(
    policy: Policy,
    steps: Steps,
    objective: Formula,
    state: TrainingState,
    live_reference: LiveReference | None = None,
    limits: MemoryLimits | None = None,
) -> Iterator[StepReport]:
    """Fit the policy to the pairs; yield what each optimizer step did.

    Every micro-batch has its reference's log-probs, or `live_reference` computes them; an objective that needs none
    gets none. A step that runs out of memory is repeated with the same pairs in smaller micro-batches. A step with a
    number that is not finite is skipped: its report names its pairs.

    Raises:
        NonFiniteError: `SKIPS` steps in a row were skipped, the last of them reported; or an update made weights or
            averages that are not finite (`TrainingState.is_finite` checks them).
        RunError: a single pair does not fit in memory.
    """
    limits = limits or MemoryLimits(policy.model, steps)
    started = time.perf_counter()
    for micro_batches in steps(after=state.step, token_budget=limits.token_budget):
        formula = objective.with_running_mean(state.mean_log_ratio)  # changes BCO's threshold only
        pairs_in_step = len(steps.pairs_of(state.step + 1))
        numbers = None
        while numbers is None:
            micro_batches = limits.packed(micro_batches, state.step + 1)
            numbers = _learn_from(micro_batches, pairs_in_step, policy, formula, state, live_reference)
            if numbers is None:
                state.optimizer.zero_grad(set_to_none=True)
                limits.shrink(state.step + 1, state.ranks.most(max(batch.tokens for batch in micro_batches)))
        numbers = numbers.of_all(state.ranks)
        means, log_ratio = numbers.means()
        skipped = "" if _taken(policy, state, means, log_ratio) else numbers.what_is_not_finite(steps.pairs)
        state.move_reference(policy)  # TR-DPO; without reference.update_every it does not move
        now = time.perf_counter()
        known = {} if skipped else means
        metrics = {"epoch": steps.epoch_at(state.step)} | known | state.last | {"pairs": len(numbers.pairs)}
        tokens = state.ranks.each(sum(batch.tokens for batch in micro_batches if len(batch)))
        yield StepReport(state.step, metrics, len(numbers.pairs), tuple(map(int, tokens)), now - started, skipped)
        if state.skipped_in_a_row >= SKIPS:
            raise NonFiniteError(
                f"step {state.step}: {skipped}, as in the {state.skipped_in_a_row - 1} steps before; "
                "the weights are those of the last step that was finite",
                hint="look at these rows, lower training.learning_rate, or use model.dtype: float32 to find the cause",
            )
        started = time.perf_counter()


def _taken(policy: Policy, state: TrainingState, means: dict[str, float], log_ratio: float) -> bool:
    """Step the optimizer, or skip the step: no number that is not finite reaches weights or averages."""
    finite = all(map(math.isfinite, (*means.values(), log_ratio)))
    if not state.ranks.any(not finite):
        try:
            state.advance(policy)
        except NonFiniteError:
            pass  # only the gradient is not finite: nothing was updated
        else:
            if not state.is_finite(
                policy
            ):  # the gradient was finite: it is the update, or its square, that is too large
                rate = state.last["learning_rate"]
                raise NonFiniteError(
                    f"step {state.step} made weights that are not finite, with a learning rate of {rate:.3g}",
                    hint="lower training.learning_rate; training.clip: 1.0 keeps gradients from being this large",
                )
            state.remember(log_ratio)
            return True
    state.skip()
    return False


def _learn_from(
    micro_batches: Sequence[MicroBatch],
    pairs_in_step: int,
    policy: Policy,
    objective: Formula,
    state: TrainingState,
    live_reference: LiveReference | None,
) -> StepMetrics | None:
    """The gradient of this process's part of a step, accumulated in the parameters, and its numbers.

    None: a process ran out of memory, and all of them have to try again. `pairs_in_step` are those of all processes.
    """

    def unless_one_cannot(compute: Callable[[], _T]) -> _T | None:
        result = unless_out_of_memory(policy.model, compute)
        return None if state.ranks.any(result is None) else result

    on_device = partial(_on_device, micro_batches, policy.device, live_reference)
    if not objective.whole_step:
        return unless_one_cannot(lambda: _backward(on_device(), pairs_in_step, policy, objective, state))
    first = unless_one_cannot(lambda: _first_pass(on_device(), policy, objective, state))
    if first is None:
        return None
    slopes = _whole_step_slopes(*first, objective, state.ranks)
    return unless_one_cannot(lambda: _backward(first[0], pairs_in_step, policy, objective, state, slopes))


def _backward(
    micro_batches: list[MicroBatch],
    pairs_in_step: int,
    policy: Policy,
    objective: Formula,
    state: TrainingState,
    slopes: _Slopes | None = None,
) -> StepMetrics:
    """Nothing in here waits for the device."""
    sharded = is_sharded(policy.model)
    numbers = StepMetrics(objective)
    for number, batch in enumerate(micro_batches):
        if not len(batch) and not sharded:
            continue
        state.seed_dropout(number)
        policy_logps = pair_logps(policy.model, batch, agreement=objective.needs_agreement)
        if not len(batch):  # the other processes need this one's slices of the weights, forward and backward
            torch.autograd.backward(0.0 * (policy_logps.chosen_P + policy_logps.rejected_P).sum())
            continue
        if slopes is None:
            losses = values = objective(policy_logps, batch.reference)  # PairLogps in, (P,) out
        else:
            losses, values = slopes.losses_of(number, policy_logps), slopes.values[number]
        torch.autograd.backward(losses.sum() / pairs_in_step)  # over the step's pairs, never a mean of means
        numbers.add(policy_logps, batch.reference, values, batch.pairs)
    return numbers


@dataclass(frozen=True)
class _Slopes:
    """dL/dlogp of a whole-step objective, micro-batch by micro-batch."""

    slopes: list[Tensor]
    """With respect to each of the log-probs in `COLUMNS`, (C, P)."""
    values: list[Tensor]
    """The losses themselves, for the metrics."""

    def losses_of(self, number: int, policy: PairLogps) -> Tensor:
        """(P,) whose sum has the objective's gradient: the chain rule, with the outer factor already known."""
        sums = torch.stack([getattr(policy, name) for name in COLUMNS])
        return (self.slopes[number] * sums).sum(0)


def _first_pass(
    micro_batches: list[MicroBatch], policy: Policy, objective: Formula, state: TrainingState
) -> tuple[list[MicroBatch], list[PairLogps]]:
    """The first of two passes: log-probs of this process's pairs, without a graph."""
    parts, sharded = [], is_sharded(policy.model)
    with torch.no_grad():
        for number, batch in enumerate(micro_batches):
            if len(batch) or sharded:
                state.seed_dropout(number)
                logps = pair_logps(policy.model, batch, agreement=objective.needs_agreement)
                parts += [logps] if len(batch) else []
    return micro_batches, parts


def _whole_step_slopes(
    micro_batches: list[MicroBatch], parts: list[PairLogps], objective: Formula, ranks: Ranks
) -> _Slopes:
    """dL/dlogp from the log-probs of all the step's pairs, those of the other processes too."""
    logps, before = of_all_ranks(ranks, parts)
    known = [batch.reference for batch in micro_batches if batch.reference is not None and len(batch)]
    reference = of_all_ranks(ranks, known)[0] if objective.needs_reference else None
    sums = [getattr(logps, name).requires_grad_() for name in COLUMNS]
    losses = objective(logps, reference)
    slopes_CP = torch.stack(torch.autograd.grad(losses.sum(), sums, materialize_grads=True))
    sizes = [len(batch) for batch in micro_batches]
    mine = slice(before, before + sum(sizes))
    return _Slopes(list(torch.split(slopes_CP[:, mine], sizes, dim=1)), list(torch.split(losses.detach()[mine], sizes)))


def _on_device(
    batches: Sequence[MicroBatch], device: torch.device, live_reference: LiveReference | None
) -> list[MicroBatch]:
    batches = [batch.to(device) for batch in batches]
    if live_reference is None:
        return batches
    with torch.no_grad():
        known = live_reference(batches)
    return [replace(batch, reference=one) for batch, one in zip(batches, known, strict=True)]
