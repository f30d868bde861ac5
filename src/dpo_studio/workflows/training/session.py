"""One start of a training: its reference, its checks, every step, and its result."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from dpo_studio.config import Recipe, cache_folder
from dpo_studio.console.progress import Progress
from dpo_studio.errors import ModelError, NonFiniteError, RunError
from dpo_studio.learning.batched_logps import batched_logps
from dpo_studio.learning.checkpoints import ranks_of, restore
from dpo_studio.learning.logprobs import pair_logps
from dpo_studio.learning.memory import MemoryLimit, MemoryLimits, tokens_without_gradient, unless_out_of_memory
from dpo_studio.learning.packing_check import check_packing
from dpo_studio.learning.reference import Reference, ReferenceChoice
from dpo_studio.learning.state import TrainingState
from dpo_studio.learning.train import LiveReference, StepReport, train
from dpo_studio.models.adapters import POLICY, REFERENCE
from dpo_studio.models.folder import ModelFolder
from dpo_studio.models.load import ChatModel
from dpo_studio.models.sharding import is_sharded
from dpo_studio.objectives import PairLogps, margin
from dpo_studio.policy.policy import Policy
from dpo_studio.runs.folder import RunFolder, environment
from dpo_studio.tokens.encode import EncodedPair
from dpo_studio.tokens.pack import MicroBatch, Steps, assign_to_rows
from dpo_studio.workflows.training.held_out import HeldOut
from dpo_studio.workflows.training.preparing import RunData, make_reference
from dpo_studio.workflows.training.run_log import RunLog, figures
from dpo_studio.workflows.training.samples import Samples
from dpo_studio.workflows.training.saving import Saver, find_checkpoint
from dpo_studio.workflows.training.signals import interrupted, stopping_signals

__all__ = ["Session"]

_LOOKED_AT = 8
"""Training pairs on which a result without held-out pairs is checked."""


@dataclass
class Session:
    """The values that all steps of one training share."""

    recipe: Recipe
    base: ChatModel
    policy: Policy
    data: RunData
    steps: Steps
    """Within the run's token budget; without the cached reference's log-probs yet."""
    state: TrainingState
    saver: Saver
    log: RunLog
    progress: Progress
    samples: Samples
    reference_folder: ModelFolder | None = None
    """The folder of `reference.model`, opened before."""

    def fit(self, stop_after: int | None = None) -> HeldOut:
        """Compute the reference, run the checks, then every step; stop at a step's end after a signal."""
        reference = make_reference(self.recipe, self.base, self.policy, self.reference_folder, ranks=self.state.ranks)
        if is_sharded(self.policy.model) and self.samples.chats:
            raise RunError(
                "run.sample_prompts is not built for a sharded base", hint="remove it, and ask the finished run"
            )
        self._check_packing(reference)
        with nullcontext() if reference.cache is None else reference.cache.held():  # no process removes it meanwhile
            return self._fit(reference, stop_after)

    def _fit(self, reference: Reference, stop_after: int | None) -> HeldOut:
        state, objective = self.state, self.recipe.objective
        at_once = tokens_without_gradient(self.steps.token_budget, self.policy.model)
        held_out = HeldOut(
            self.policy,
            self.data,
            objective,
            self._logps(reference, self.data.held_out.pairs, at_once, "held-out"),
            at_once,
            self.progress,
            state.ranks,
        )
        steps, live = self.steps, None
        if objective.needs_reference and reference.cache is None:
            live = reference.of_step
        elif objective.needs_reference:
            known = self._logps(reference, self.data.train.pairs, at_once, "training")
            steps = replace(steps, reference=lambda positions: known.map(lambda x_P: x_P[list(positions)]))
        self._warn_if_the_reference_never_moves()
        self._resume_or_begin(steps, live, held_out)
        self.log.begin(steps.total, saturates=objective.saturates)
        limits = MemoryLimits(self.policy.model, steps, self.log.limits(), self._report_limit)
        with stopping_signals(self.progress) as asked, self.progress.task("train", steps.total, "steps") as advance:
            advance(state.step)
            reports = self._kept(train(self.policy, steps, objective, state, live, limits))
            for report in islice(reports, stop_after):
                last = report.step in (steps.total, stop_after)
                due = report.step % self.recipe.training.evaluate_every == 0 or last
                numbers = held_out.measure(state.mean_log_ratio) if due else {}
                self.log.write(report, numbers)
                advance(1, figures=figures(report, numbers))
                if self.samples.is_due(report.step, evaluated=due) or (last and self.samples.chats):
                    self.samples.write(report.step)
                stopping = state.ranks.most(asked.signal)  # whichever process has received it
                if self.saver.is_due(report.step) or last or stopping:
                    self.saver.save(self.policy, state, numbers.get("eval_loss"))
                if stopping and report.step < steps.total:
                    raise interrupted(stopping, report.step, self.saver.run)
        self.log.end()
        return held_out

    def finish(self, held_out: HeldOut, seconds: float) -> dict[str, Any]:
        """Write the adapter, the environment and the numbers of the whole run.

        Raises:
            NonFiniteError: the policy has no finite log-prob; no result is written.
        """
        self._check_finite(held_out.logps)
        self.saver.save_result(self.policy)
        device = self.base.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        self.saver.run.write_json(RunFolder.ENVIRONMENT, environment(name, precision=self.base.dtype_reason))
        result: dict[str, Any] = {
            "kind": "train",
            "steps": self.state.step,
            "pairs": len(self.data.train.pairs),
            "held_out_pairs": len(self.data.held_out.pairs),
            "seconds": round(seconds, 2),
            "refused": self.data.source.refused_by_reason(),
            "encoding": _summed(self.data.train.counts, self.data.held_out.counts),
            "shared_prompts_dropped": self.data.shared_prompts_dropped,
        }
        return result | self.log.numbers() | held_out.summary()

    def _check_finite(self, logps: PairLogps | None) -> None:
        """Check the result: weights may be finite, but so large that no log-prob is."""
        if logps is None:
            with self.policy.in_eval():
                some = self.data.train.pairs[:_LOOKED_AT]
                budget = tokens_without_gradient(self.steps.token_budget, self.policy.model)
                logps = batched_logps(self.policy.model, some, token_budget=budget)
        if not self.state.is_finite(self.policy):
            what = "the weights are not finite"
        elif self.state.skipped == self.state.step > 0:
            what = f"none of the {self.state.step} steps could be taken; nothing was learned"
        elif not (logps.chosen_P.isfinite() & logps.rejected_P.isfinite()).any():
            what = f"no log-prob of {len(logps)} pairs is finite"
        else:
            return
        raise NonFiniteError(
            f"{self.saver.run.path} has no result: after the last step {what}",
            hint="start again, in another run.folder, with a lower training.learning_rate",
        )

    def _check_packing(self, reference: Reference) -> None:
        """Check that the policy, and its reference where that is another model, compute as the plain model does."""
        folders = {POLICY: self.recipe.model.adapter, REFERENCE: ReferenceChoice.of(self.recipe).beside}
        adapters = {name: Path(folder) for name, folder in folders.items() if folder is not None}
        pairs, texts = self.data.train.pairs, self.data.source.pairs
        check = partial(check_packing, pairs=pairs, token_budget=self.steps.token_budget)
        difference = check(self.policy.model, texts=texts, encoder=self.base.encoder, adapters=adapters)
        if reference.model is not self.policy.model:
            difference = max(difference, check(reference.model))
        self.progress.say(
            f"log-probs differ from plain transformers' by {difference:.2g} nats per token, adapter off and on"
        )

    def _logps(self, reference: Reference, pairs: Sequence[EncodedPair], token_budget: int, what: str) -> PairLogps:
        try:
            with self.progress.task(f"reference, {what} pairs", len(pairs), "pairs") as advance:
                return reference.logps(pairs, token_budget=token_budget, progress=advance)
        except (OSError, sqlite3.Error) as error:
            raise RunError(
                f"the cache of reference log-probs in {cache_folder()} cannot be used: {error}",
                hint="free some space, point DPO_STUDIO_CACHE elsewhere, or set reference.mode: live",
            ) from None

    def _resume_or_begin(self, steps: Steps, live: LiveReference | None, held_out: HeldOut) -> None:
        run, state = self.saver.run, self.state
        checkpoint = self._newest_checkpoint()
        if checkpoint is not None:
            restore(checkpoint, self.policy, state)
            self.progress.say(f"continuing {run.path} after step {state.step} of {steps.total}")
            if (ranks := ranks_of(checkpoint)) != state.ranks.size:
                self._say_that_bits_differ(ranks)
        state.ranks.as_first(self.policy.trained.values())
        run.truncate_after(state.step if checkpoint is not None else -1)
        if checkpoint is None:
            is_reference = ReferenceChoice.of(self.recipe).is_start
            if is_reference and self.recipe.objective.needs_reference:
                whole = replace(steps, rows=assign_to_rows)  # every process checks the same row
                first = min(whole.micro_batches_of(1), key=len)  # the smallest: if it does not fit, none does
                unless_out_of_memory(self.policy.model, partial(self._check_start, first, live))
            if numbers := held_out.at_start(is_reference=is_reference, mean_log_ratio=state.mean_log_ratio):
                self.log.write_start(numbers)
            if self.samples.chats:
                self.samples.write(0)
        elif state.step >= steps.total:
            held_out.measure(state.mean_log_ratio)

    def _newest_checkpoint(self) -> Path | None:
        """The one that the first process finds whole, on every process."""
        run, ranks = self.saver.run, self.state.ranks
        found = find_checkpoint(run, self.progress.warn) if ranks.leads else None
        name = ranks.text_of_first("" if found is None else found.name)
        return run.checkpoints / name if name else None

    def _say_that_bits_differ(self, ranks: int) -> None:
        masks = ", and so do dropout's masks" if self.recipe.adapter is not None and self.recipe.adapter.dropout else ""
        self.progress.warn(
            f"the checkpoint is of {ranks} process{'es' * (ranks > 1)}, and now there are {self.state.ranks.size}: "
            f"the pairs are the same, but from here on the bits of every number may differ{masks}"
        )

    def _check_start(self, batch: MicroBatch, live: LiveReference | None) -> None:
        """A fresh adapter computes what its reference does: margin 0, DPO's loss ln 2.

        Raises:
            ModelError: it differs by more than rounding explains.
        """
        batch = batch.to(self.base.device)
        with torch.no_grad(), self.policy.in_eval():
            policy = pair_logps(self.policy.model, batch)
            reference = live([batch])[0] if live is not None else batch.reference
        assert reference is not None
        tokens = (policy.chosen_tokens_P + policy.rejected_tokens_P).float()
        off = (margin(policy, reference).abs() / tokens).max().item()
        limit = 1e-4 if self.base.model.dtype == torch.float32 else 0.05
        if not off <= limit:
            raise ModelError(
                f"before the first step the policy differs from its reference by {off:.3g} nats a token "
                f"(limit {limit}): the loss would not start at ln 2",
                hint=f"is the cache stale? remove {cache_folder() / 'reference'}, or set reference.mode: live",
            )

    def _warn_if_the_reference_never_moves(self) -> None:
        every, total = self.recipe.reference.update_every, self.steps.total
        if every is not None and every >= total:
            self.progress.warn(
                f"reference.update_every is {every}, and the run has {total} steps: the reference never moves"
            )

    def _report_limit(self, limit: MemoryLimit) -> None:
        self.log.write_limit(limit)
        self.progress.warn(
            f"step {limit.step} ran out of GPU memory: {limit.tokens} tokens a micro-batch from here on"
            f"{limit.recomputing}; the step is repeated with the same pairs"
        )

    def _kept(self, reports: Iterator[StepReport]) -> Iterator[StepReport]:
        """The same reports; if the training stops itself, its state is saved first."""
        run = self.saver.run
        try:
            yield from reports
        except NonFiniteError:
            if not self.state.is_finite(self.policy):
                last = find_checkpoint(run, self.progress.warn)
                self.progress.say(f"the last checkpoint before that: {last}" if last else "no checkpoint was written")
                raise
            self.saver.save(self.policy, self.state)
            self.progress.say(f"the steps before are saved in {run.checkpoints}/step-{self.state.step}")
            raise


def _summed(*counts: dict[str, int]) -> dict[str, int]:
    names = dict.fromkeys(name for part in counts for name in part)
    return {name: sum(part.get(name, 0) for part in counts) for name in names}
