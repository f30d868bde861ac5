"""The loop: what an optimizer step is, top to bottom."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dpo_studio.config import ReferenceSection, TrainingSection
from dpo_studio.errors import NonFiniteError
from dpo_studio.learning.logprobs import pair_logps
from dpo_studio.learning.memory import Room, unless_out_of_memory
from dpo_studio.learning.reference import COLUMNS, batched_logps
from dpo_studio.models.adapters import in_eval
from dpo_studio.models.moving import move_reference
from dpo_studio.objectives import PairLogps, log_ratios, wins
from dpo_studio.tokens.encode import EncodedPair
from dpo_studio.tokens.pack import MicroBatch, Steps

__all__ = [
    "Reference",
    "StepReport",
    "TrainingState",
    "evaluate",
    "held_out_metrics",
    "learning_rate",
    "train",
    "whole",
]

ObjectiveFunction = Any
"""One of `dpo_studio.objectives`: (policy, reference) -> losses, and what its base class `Formula` says of it."""
Reference = Callable[[Sequence[MicroBatch]], list[PairLogps]]
"""The log-probs of a step's micro-batches: asked for together, because changing a model over to its reference takes
25 ms of a 7B's, a tenth of the pass itself."""
_FIXED = ReferenceSection()
SKIPS = 3
"""So many steps in a row with numbers that are not finite, and a run stops itself: one odd pair is passed over."""


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did."""

    step: int
    metrics: dict[str, float]
    """By TRL's names. Equal after a resume, bit for bit."""
    pairs: int
    tokens: int
    """Tokens read, each shared prompt once."""
    seconds: float
    skipped: str = ""
    """Why the step was not taken, with the rows of its pairs; empty if it was. Its metrics then are few."""


@dataclass
class TrainingState:
    """What changes from step to step besides the adapter's weights."""

    optimizer: torch.optim.Optimizer
    section: TrainingSection
    total_steps: int
    accelerator: Accelerator
    reference: ReferenceSection = _FIXED
    """When the reference moves, and how far."""
    step: int = 0
    mean_log_ratio: float = 0.0
    """Of all answers of a step, averaged over the steps taken, in nats: BCO's threshold is made of it."""
    skipped: int = 0
    """Steps that were not taken because a number in them was not finite."""
    skipped_in_a_row: int = 0
    last: dict[str, float] = field(default_factory=dict)
    """Gradient norm and learning rate of the last step, and what a move of the reference cut off."""

    @classmethod
    def fresh(
        cls,
        policy: nn.Module,
        section: TrainingSection,
        total_steps: int,
        accelerator: Accelerator,
        reference: ReferenceSection = _FIXED,
    ) -> TrainingState:
        """AdamW over what is trainable, at step 0."""
        parameters = [p for p in policy.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            parameters,
            lr=section.learning_rate,
            betas=section.betas,
            eps=section.eps,
            weight_decay=section.weight_decay,
            fused=True,  # one pass over all parameters; the plain loop took 4 % of a step on two cores
        )
        return cls(optimizer, section, total_steps, accelerator, reference)

    def advance(self, policy: nn.Module) -> None:
        """Clip, set the learning rate, let the optimizer step, forget the gradients, step += 1.

        Raises:
            NonFiniteError: the gradient is not finite; weights, averages and step are as they were.
        """
        parameters = [p for p in policy.parameters() if p.requires_grad]
        norm = float(self.accelerator.clip_grad_norm_(parameters, self.section.clip or math.inf))
        if not math.isfinite(norm):
            raise NonFiniteError("the gradient is not finite")
        rate = learning_rate(self.section, self.step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.skipped_in_a_row = 0
        self.last = {"grad_norm": norm, "learning_rate": rate}

    def skip(self) -> None:
        """Pass over a step: weights and averages stay, its gradients go, the schedule and the order of pairs go on."""
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.skipped += 1
        self.skipped_in_a_row += 1
        self.last = {"skipped": 1.0}

    def numbers(self) -> dict[str, Any]:
        """What a checkpoint keeps of all this besides the optimizer."""
        return {name: getattr(self, name) for name in _NUMBERS}

    def recall(self, numbers: dict[str, Any]) -> None:
        """Take back what `numbers` once returned; what an older checkpoint lacks stays as it is in a fresh state."""
        for name in _NUMBERS:
            setattr(self, name, type(getattr(self, name))(numbers.get(name, getattr(self, name))))

    def remember(self, log_ratio: float) -> None:
        """Take the mean log-ratio of the step just taken into the running one; every step counts the same."""
        self.mean_log_ratio += (log_ratio - self.mean_log_ratio) / (self.step - self.skipped)

    def move_reference(self, policy: Any) -> None:
        """Every `update_every` steps, let the reference take its share of the policy's weights; nothing by default."""
        every = self.reference.update_every
        if every is not None and self.step % every == 0:
            self.last["reference/cut"] = move_reference(policy, self.reference.update_share)

    def seed_dropout(self, micro_batch: int) -> None:
        """Dropout masks come from (seed, step, micro-batch): nothing to restore on a resume."""
        words = np.random.SeedSequence([self.section.seed, self.step, micro_batch]).generate_state(2)
        torch.manual_seed(int(words[0]) << 31 ^ int(words[1]))


_NUMBERS = ("step", "mean_log_ratio", "skipped", "skipped_in_a_row")


def train(
    policy: nn.Module,
    steps: Steps,
    objective: ObjectiveFunction,
    state: TrainingState,
    live_reference: Reference | None = None,
    room: Room | None = None,
) -> Iterator[StepReport]:
    """Fit the adapter to the pairs; yield what each optimizer step did.

    Every micro-batch brings its reference's log-probs, or `live_reference` computes them; an objective that needs none
    gets none. A step that runs out of memory is taken again with the same pairs in smaller micro-batches. A step with a
    number that is not finite is not taken: its report says which pairs it had.

    Raises:
        NonFiniteError: so many steps in a row were not taken, the last of them reported; or an update made weights or
            averages of numbers that are none (`whole` says whether they are).
        RunError: a single pair does not fit in memory.
    """
    room = room or Room(policy, steps)
    started = time.perf_counter()
    for micro_batches in steps(after=state.step):
        formula = objective.with_running_mean(
            state.mean_log_ratio
        )  # BCO's threshold moves; every other objective is itself
        seen = None
        while seen is None:
            micro_batches = room.packed(micro_batches, state.step + 1)
            attempt = partial(_learn_from, micro_batches, policy, formula, state, live_reference)
            seen = unless_out_of_memory(policy, attempt)
            if seen is None:
                state.optimizer.zero_grad(set_to_none=True)
                room.shrink(state.step + 1, max(batch.tokens for batch in micro_batches))
        means, log_ratio = seen.together()
        skipped = "" if _taken(policy, state, means, log_ratio) else seen.what_is_not_finite(steps.pairs)
        state.move_reference(policy)  # TR-DPO; without reference.update_every it stays where it is
        now = time.perf_counter()
        known = {} if skipped else means
        metrics = {"epoch": steps.epoch_at(state.step)} | known | state.last | {"pairs": len(seen.pairs)}
        tokens = sum(batch.tokens for batch in micro_batches)
        yield StepReport(state.step, metrics, len(seen.pairs), tokens, now - started, skipped)
        if state.skipped_in_a_row >= SKIPS:
            raise NonFiniteError(
                f"step {state.step}: {skipped}, and so it was in the {state.skipped_in_a_row - 1} steps before; "
                "the weights are those of the last step that was finite",
                hint="look at these rows, lower training.learning_rate, or use model.dtype: float32 to find the cause",
            )
        started = time.perf_counter()


def whole(policy: nn.Module, state: TrainingState) -> bool:
    """Whether weights that are trained, and the averages of their gradients, are finite: one look for all of them."""
    kept = [p.detach() for p in policy.parameters() if p.requires_grad]
    kept += [x for known in state.optimizer.state.values() for x in known.values() if isinstance(x, Tensor)]
    return bool(torch.isfinite(nn.utils.get_total_norm(kept, norm_type=math.inf)))


def _taken(policy: nn.Module, state: TrainingState, means: dict[str, float], log_ratio: float) -> bool:
    """Let the optimizer step, or pass the step over: no number that is not finite reaches weights or averages."""
    if all(map(math.isfinite, (*means.values(), log_ratio))):
        try:
            state.advance(policy)
        except NonFiniteError:
            pass  # of the gradient alone: nothing was moved
        else:
            if not whole(policy, state):  # the gradient was finite: it is the update, or its square, that is too large
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
    policy: nn.Module,
    objective: ObjectiveFunction,
    state: TrainingState,
    live_reference: Reference | None,
) -> _Seen:
    """The gradient of one step, added to what the parameters hold. Nothing in here waits for the device."""
    pairs_in_step = sum(len(batch) for batch in micro_batches)
    micro_batches = _on_device(micro_batches, state.accelerator.device, live_reference)
    slopes = _whole_step_slopes(policy, micro_batches, objective, state) if objective.whole_step else None
    seen = _Seen(objective)
    for number, batch in enumerate(micro_batches):
        state.seed_dropout(number)
        policy_logps = pair_logps(policy, batch, agreement=objective.needs_agreement)  # PairLogps: sums and counts
        if slopes is None:
            losses = values = objective(policy_logps, batch.reference)  # PairLogps in, (P,) out
        else:
            losses, values = slopes.losses_of(number, policy_logps), slopes.values[number]
        state.accelerator.backward(losses.sum() / pairs_in_step)  # over the step's pairs, never a mean of means
        seen.add(policy_logps, batch.reference, values, batch.pairs)
    return seen


def evaluate(
    policy: nn.Module,
    pairs: Sequence[EncodedPair],
    reference: PairLogps,
    objective: ObjectiveFunction,
    *,
    budget: int,
    progress: Callable[[int, int], None] = lambda pairs, tokens: None,
) -> tuple[dict[str, float], PairLogps]:
    """Loss, rewards, accuracy and margin on held-out pairs, and the policy's log-probs of them."""
    with in_eval(policy):
        policy_logps = batched_logps(
            policy, pairs, range(len(pairs)), budget=budget, agreement=objective.needs_agreement, progress=progress
        )
    return held_out_metrics(policy_logps, reference, objective), policy_logps


def held_out_metrics(policy: PairLogps, reference: PairLogps, objective: ObjectiveFunction) -> dict[str, float]:
    """A step's metrics for pairs that were not trained on, by TRL's names."""
    seen = _Seen(objective)
    seen.add(policy, reference, objective(policy, reference), range(len(policy)))
    return {f"eval_{name}": value for name, value in seen.together()[0].items()}


def warmup_steps(section: TrainingSection, total_steps: int) -> int:
    """How many updates `training.warmup`, a share or a number of steps, is of the whole run's."""
    share = math.ceil(round(section.warmup * total_steps, 6))  # 0.07 x 100 is 7.000000000000001 to a float
    return share if section.warmup < 1 else int(section.warmup)


def learning_rate(section: TrainingSection, step: int, total_steps: int) -> float:
    """The rate of the update after `step` updates: linear warm-up from 0, then as `schedule` says, down to 0.

    The same numbers as transformers' `get_scheduler`, as a function of the step alone.
    """
    warmup = warmup_steps(section, total_steps)
    if step < warmup:
        return section.learning_rate * step / warmup
    done = (step - warmup) / max(1, total_steps - warmup)
    shape = {
        "constant": 1.0,
        "linear": max(0.0, 1 - done),
        "cosine": max(0.0, 0.5 * (1 + math.cos(math.pi * done))),
    }
    return section.learning_rate * shape[section.schedule]


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


def _whole_step_slopes(
    policy: nn.Module, micro_batches: list[MicroBatch], objective: ObjectiveFunction, state: TrainingState
) -> _Slopes:
    """First pass of two: log-probs of all the step's pairs without a graph, then dL/dlogp."""
    parts = []
    with torch.no_grad():
        for number, batch in enumerate(micro_batches):
            state.seed_dropout(number)
            parts.append(pair_logps(policy, batch, agreement=objective.needs_agreement))
    logps = PairLogps.cat(parts)
    sums = [getattr(logps, name).requires_grad_() for name in COLUMNS]
    known = [batch.reference for batch in micro_batches if batch.reference is not None]
    losses = objective(logps, PairLogps.cat(known) if known else None)
    slopes_CP = torch.stack(torch.autograd.grad(losses.sum(), sums, materialize_grads=True))
    sizes = [len(batch) for batch in micro_batches]
    return _Slopes(list(torch.split(slopes_CP, sizes, dim=1)), list(torch.split(losses.detach(), sizes)))


def _on_device(
    batches: Sequence[MicroBatch], device: torch.device, live_reference: Reference | None
) -> list[MicroBatch]:
    batches = [batch.to(device) for batch in batches]
    if live_reference is None:
        return batches
    with torch.no_grad():
        known = live_reference(batches)
    return [replace(batch, reference=reference) for batch, reference in zip(batches, known, strict=True)]


@dataclass
class _Seen:
    """Collects a step's numbers on the device; they leave it once, together."""

    objective: ObjectiveFunction
    columns: list[Tensor] = field(default_factory=list)
    pairs: list[int] = field(default_factory=list)

    def add(self, policy: PairLogps, reference: PairLogps | None, losses: Tensor, pairs: Sequence[int]) -> None:
        scores = self.objective.scores(policy, reference)
        rows = [losses, *scores, scores[0] - scores[1], policy.chosen_P, policy.rejected_P]
        rows += [policy.chosen_tokens_P.to(losses.dtype), policy.rejected_tokens_P.to(losses.dtype)]
        rows += log_ratios(policy, reference) if reference is not None else []
        self.columns.append(torch.stack(rows).detach())
        self.pairs += pairs

    def together(self) -> tuple[dict[str, float], float]:
        """Means over the pairs, by TRL's names (a tied margin counts one half), and over all answers' log-ratios."""
        rows = torch.cat(self.columns, 1).double().cpu()
        loss, chosen, rejected, margins, chosen_logp, rejected_logp, chosen_tokens, rejected_tokens = rows[:8]
        ratios = rows[8:]  # none without a reference
        beta = self.objective.beta
        metrics = {
            "loss": loss.mean().item(),
            "rewards/chosen": beta * chosen.mean().item(),
            "rewards/rejected": beta * rejected.mean().item(),
            "rewards/margins": beta * margins.mean().item(),
            "rewards/accuracies": wins(margins).mean().item(),
            "logps/chosen": chosen_logp.mean().item(),
            "logps/rejected": rejected_logp.mean().item(),
            "tokens/chosen": chosen_tokens.mean().item(),
            "tokens/rejected": rejected_tokens.mean().item(),
        }
        if not len(ratios):
            return metrics, 0.0
        metrics |= {
            "log_ratios/chosen": ratios[0].mean().item(),
            "log_ratios/rejected": ratios[1].mean().item(),
            "log_ratios/size": ratios.abs().mean().item(),
        }
        return metrics, ratios.mean().item()

    def what_is_not_finite(self, pairs: Sequence[EncodedPair]) -> str:
        """The pairs whose own numbers are not; all of the step's where only the gradient shows it. By source row."""
        finite_CP = torch.cat(self.columns, 1).isfinite()
        for fine_P in (finite_CP[1:].all(0), finite_CP[0]):  # AOT's losses are by rank, and name the wrong pairs
            odd = [pairs[place].row for place, fine in zip(self.pairs, fine_P.tolist(), strict=True) if not fine]
            if odd:
                return f"the loss of {_rows(odd)} is not finite"
        return f"the gradient of {_rows([pairs[place].row for place in self.pairs])} together is not finite"


def _rows(rows: Sequence[int]) -> str:
    """`row 7`, or `rows 7, 9, 12 and 30 more`."""
    shown = ", ".join(map(str, sorted(rows)[:_ROWS_SHOWN]))
    more = f" and {len(rows) - _ROWS_SHOWN} more" if len(rows) > _ROWS_SHOWN else ""
    return f"row{'s' * (len(rows) > 1)} {shown}{more}"


_ROWS_SHOWN = 64
