"""`dpo train`: a recipe in, a run folder out; the same command again continues what was not finished."""

from __future__ import annotations

import datetime
import math
import resource
import shlex
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel

from dpo_studio.config import LoadedRecipe, Recipe, RecipeLike, cache_folder, load_recipe
from dpo_studio.errors import ModelError, NonFiniteError, RunError
from dpo_studio.evaluation.accuracy import finite_summary, log_prob_differences
from dpo_studio.learning.checkpoints import restore
from dpo_studio.learning.logprobs import pair_logps
from dpo_studio.learning.memory import CPU_TOKENS, Limit, Room, tokens_without_gradient, unless_out_of_memory
from dpo_studio.learning.packing_check import check_packing
from dpo_studio.learning.reference import ReferenceCache, batched_logps, reference_logps
from dpo_studio.learning.train import Reference, StepReport, TrainingState, evaluate, held_out_metrics, train, whole
from dpo_studio.lock import Held, held
from dpo_studio.models.adapters import POLICY, REFERENCE, in_eval, train_mode
from dpo_studio.models.bundled import published_name
from dpo_studio.models.folder import ModelFolder
from dpo_studio.models.load import ChatModel, load_chat_model
from dpo_studio.objectives import PairLogps, margin
from dpo_studio.preferences.pair import Pair
from dpo_studio.reports.facts import read_run
from dpo_studio.reports.health import HealthWatch
from dpo_studio.reports.html import write_report
from dpo_studio.reports.progress import Progress
from dpo_studio.reports.text import percent
from dpo_studio.reports.verdict import pass_verdict
from dpo_studio.runs import RunFolder, environment
from dpo_studio.tokens.encode import EncodedPair
from dpo_studio.tokens.pack import MicroBatch, Steps
from dpo_studio.workflows.checking import look_at_lengths, look_at_pairs
from dpo_studio.workflows.compiling import accelerated
from dpo_studio.workflows.forecasting import forecast
from dpo_studio.workflows.kept import check_same_data, digest_data, run_date, write_data
from dpo_studio.workflows.opening import find_models, look_at_models
from dpo_studio.workflows.place import check_place
from dpo_studio.workflows.preparing import (
    RunData,
    attach_policy,
    encode_both,
    read_and_split,
    reference_model,
    settle_dtype,
    settle_tokens,
    steps_of,
)
from dpo_studio.workflows.saving import Saver, find_checkpoint
from dpo_studio.workflows.signals import interrupted, stopping_signals
from dpo_studio.workflows.starting import check_not_shorter, check_tracker, is_finished, typed_model, warn_of_length

__all__ = ["TrainedRun", "check_recipe", "run_training", "train_recipe"]

_LOOKED_AT = 8
"""Training pairs that a result without held-out ones is looked at with."""


@dataclass(frozen=True)
class TrainedRun:
    """What a training left behind, still in memory."""

    folder: RunFolder
    result: dict[str, Any]
    base: ChatModel | None = None
    """None when the run was finished before and nothing was loaded."""
    policy: PeftModel | None = None
    held_out: Sequence[Pair] = ()
    """Empty then, too: a finished run needs none of its data to say so."""


def train_recipe(
    recipe: RecipeLike, overrides: Sequence[str] = (), *, anyway: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Train what the recipe says; return `result.json`'s content. `anyway`: on pairs that make it worthless, too.

    Raises:
        DPOStudioError: with a hint; what was computed before is kept in the run folder and the caches.
    """
    loaded = load_recipe(recipe, list(overrides))
    with progress or Progress() as shown:
        trained = run_training(loaded, shown, anyway=anyway)
        for line in _closing(trained):
            shown.say(line)
    return trained.result


def _closing(trained: TrainedRun) -> list[str]:
    """What a finished training ends with: how many pairs, the report's own verdict, and what to type next."""
    verdict, name = pass_verdict(read_run(trained.folder.path)), shlex.quote(str(trained.folder.path))
    pairs, held_out = (trained.result.get(key, 0) for key in ("pairs", "held_out_pairs"))
    return [
        f"{pairs:,} pairs learned from, {held_out:,} held out",
        f"{verdict.label}: {verdict.sentence} {verdict.meaning}",
        f"talk with it:   dpo chat {name}",
        f"measure it:     dpo eval {name} --judge JUDGE",
        f"take it along:  dpo export {name} OUT --to adapter",
    ]


def check_recipe(
    recipe: RecipeLike, overrides: Sequence[str] = (), *, anyway: bool = False, progress: Progress | None = None
) -> None:
    """`--dry-run`: look at recipe, data, model and adapter files and token counts; load no weights, write nothing.

    Raises:
        DPOStudioError: what `dpo train` would stop at before it loads any weights.
    """
    loaded = load_recipe(recipe, list(overrides))
    check_place(loaded)
    with progress or Progress() as shown:
        run = RunFolder(loaded.run_folder)
        settled = run.settle(loaded.recipe)
        check_tracker(settled)
        found = find_models(settled)
        source, split = read_and_split(settled, shown)
        look_at_pairs(settled, split, shown, anyway=anyway)
        date = run_date(run)
        models = look_at_models(settled, found, date, shown.say)
        encoder = models.encoder
        data = encode_both(settled, source, split, encoder, shown)
        if (done := run.result()) is None or not is_finished(run, settled, done):
            check_same_data(run, digest_data(data.train.pairs, data.held_out.pairs, encoder, date), shown.warn)
        look_at_lengths(settled, data.train, shown, anyway=anyway)
        steps = steps_of(settled, data.train.pairs, budget=CPU_TOKENS)
        warn_of_length(settled, len(data.train.pairs), steps.total, shown.warn)
        taken = min(
            steps.total * settled.training.pairs_per_step, round(len(data.train.pairs) * settled.training.epochs)
        )
        shown.say(forecast(settled, models.base, data.train.pairs, taken))
        shown.say(f"{steps.total} steps of {settled.training.pairs_per_step} pairs would be trained into {run.path}")


def run_training(
    loaded: LoadedRecipe,
    progress: Progress,
    result_extra: dict[str, Any] | None = None,
    *,
    anyway: bool = False,
    stop_after: int | None = None,
    today: datetime.date | None = None,
) -> TrainedRun:
    """The whole of a training, from a loaded recipe to a finished run folder; or its first `stop_after` steps.

    `today`: the date of a run that begins, None today's; one that has learned something keeps its own.
    """
    check_place(loaded)
    run = RunFolder(loaded.run_folder)
    recipe = run.settle(loaded.recipe)
    if (done := run.result()) is not None and is_finished(run, recipe, done):
        progress.say(f"{run.path} is finished: {done['steps']} steps; nothing to do")
        if not (run.path / "report.html").exists():  # it is the last thing that is written
            run.sweep()
            progress.say(f"report: {write_report(run.path)}")
        return TrainedRun(run, done)
    check_tracker(recipe)
    with held(run.path, progress.warn) as hold:
        return _train_in(run, hold, loaded, progress, result_extra or {}, anyway, stop_after, today)


def _train_in(
    run: RunFolder,
    hold: Held,
    loaded: LoadedRecipe,
    progress: Progress,
    result_extra: dict[str, Any],
    anyway: bool,
    stop_after: int | None,
    today: datetime.date | None,
) -> TrainedRun:
    started = time.perf_counter()
    recipe = run.settle(loaded.recipe)  # again: another process may just have left
    found = find_models(recipe)
    source, split = read_and_split(recipe, progress)
    look_at_pairs(recipe, split, progress, anyway=anyway)
    date = run_date(run, today)
    models = look_at_models(recipe, found, date, progress.say)
    encoder = models.encoder
    with ThreadPoolExecutor(max_workers=1) as meanwhile:  # 60,000 pairs take half a minute, and so do weights
        encoding = meanwhile.submit(encode_both, recipe, source, split, encoder, progress)
        base = load_chat_model(
            recipe.model, folder=models.base, typed=typed_model(loaded), say=progress.say, today=date
        )
        data = encoding.result()
    kept = digest_data(data.train.pairs, data.held_out.pairs, encoder, date)
    check_same_data(run, kept, progress.warn)
    look_at_lengths(recipe, data.train, progress, anyway=anyway)
    recipe = settle_dtype(recipe, base)
    total = steps_of(recipe, data.train.pairs, CPU_TOKENS).total
    check_not_shorter(run, total)
    warn_of_length(recipe, len(data.train.pairs), total, progress.warn)
    policy = attach_policy(base, recipe, progress.say)
    saver = Saver(run, hold, published_name(base.typed), recipe.training.save_every)
    saver.check_room(policy, recipe.reference)
    saver.save_trial(policy)
    train_mode(policy)
    with accelerated(recipe, base, policy, data, progress):
        recipe, limit = settle_tokens(recipe, policy, data.train.pairs, base.device, progress)
        run.start(loaded, recipe)
        write_data(run, kept)
        run.result_file.unlink(missing_ok=True)
        if limit.recompute != "nothing":
            run.append("memory.jsonl", asdict(limit))
        accelerator = Accelerator(cpu=base.device.type == "cpu")
        session = _Session(run, recipe, base, policy, data, progress, accelerator, saver, models.reference)
        session.fit(stop_after)
    result = session.finish(time.perf_counter() - started) | result_extra
    run.write_json("result.json", result)
    progress.say(f"report: {write_report(run.path)}")
    return TrainedRun(run, result, base, policy, split.held_out)


@dataclass
class _Session:
    """A training under way: everything `fit` and `finish` share."""

    run: RunFolder
    recipe: Recipe
    base: ChatModel
    policy: PeftModel
    data: RunData
    progress: Progress
    accelerator: Accelerator
    saver: Saver
    reference_folder: ModelFolder | None
    """Of `reference.model`."""
    state: TrainingState | None = None
    """From the moment there are steps to take."""
    held_out_reference: PairLogps | None = None
    last_evaluation: dict[str, float] = field(default_factory=dict)
    held_out_logps: PairLogps | None = None
    health: HealthWatch = field(default_factory=lambda: HealthWatch(0))
    holding: ExitStack = field(default_factory=ExitStack)
    """What nobody may remove while the run goes on: its entries in the cache."""

    def fit(self, stop_after: int | None = None) -> None:
        """Reference, checks, then every step; stops at a step's end when a signal asked for it."""
        with self.holding:
            self._fit(stop_after)

    def _fit(self, stop_after: int | None) -> None:
        if self.accelerator.num_processes > 1:
            raise RunError("training on several devices is not built yet", hint="start it with one process")
        budget = int(self.recipe.training.tokens_per_micro_batch)
        at_once = tokens_without_gradient(budget, self.policy)
        live, cached = self._references(budget, at_once)
        steps = steps_of(self.recipe, self.data.train.pairs, budget, cached)
        self.state = state = TrainingState.fresh(
            self.policy, self.recipe.training, steps.total, self.accelerator, self.recipe.reference
        )
        self._warn_if_the_reference_never_moves(steps.total)
        self._resume_or_begin(state, steps, live, at_once)
        self._track()
        self.health = HealthWatch(steps.total, saturates=self.recipe.objective.saturates)
        for line in self.run.lines("metrics.jsonl"):  # whatever these show was told of before the run was stopped
            self.health.see(line)
        room = self._room(steps)
        with stopping_signals(self.progress) as asked, self.progress.task("train", steps.total, "steps") as advance:
            advance(state.step)
            reports = self._kept(train(self.policy, steps, self.recipe.objective, state, live, room))
            for report in islice(reports, stop_after):
                last = report.step in (steps.total, stop_after)
                held_out = self._maybe_evaluate(report.step, last, at_once)
                self._write(report, held_out)
                advance(1, figures=_figures(report, held_out))
                if self.saver.is_due(report.step) or last or asked.signal:
                    self.saver.save(self.policy, state, held_out.get("eval_loss"))
                if asked.signal and report.step < steps.total:
                    raise interrupted(asked.signal, report.step, self.run)
        self.accelerator.end_training()

    def finish(self, seconds: float) -> dict[str, Any]:
        """Write the adapter, the environment and the numbers of the whole run.

        Raises:
            NonFiniteError: the policy has no finite log-prob: then there is no result.
        """
        self._check_finite()
        self.saver.save_result(self.policy)
        self.run.write_json(
            "environment.json", environment(_device_name(self.base.device), precision=self.base.dtype_reason)
        )
        timing = list(self.run.lines("timing.jsonl"))
        trained_seconds = sum(line["seconds"] for line in timing)
        result: dict[str, Any] = {
            "kind": "train",
            "steps": self.state.step if self.state is not None else 0,
            "skipped_steps": sum("skipped" in line for line in self.run.lines("metrics.jsonl")),
            "pairs": len(self.data.train.pairs),
            "held_out_pairs": len(self.data.held_out.pairs),
            "seconds": round(seconds, 2),
            "training_seconds": round(trained_seconds, 2),
            "pairs_per_second": _rate(sum(line["pairs"] for line in timing), trained_seconds),
            "tokens_per_second": _rate(sum(line["tokens"] for line in timing), trained_seconds),
            "refused": self.data.source.refused_by_reason(),
            "encoding": _summed(self.data.train.counts, self.data.held_out.counts),
            "shared_prompts_dropped": self.data.shared_prompts_dropped,
            "health": [finding.to_plain() for finding in self.health.findings],
        }
        if self.held_out_logps is not None and self.held_out_reference is not None:
            beta = self.recipe.objective.beta
            prompts = self.data.held_out_prompts
            result |= finite_summary(self.held_out_logps, self.held_out_reference, prompts, beta=beta)
            if (found := log_prob_differences(self.held_out_logps, self.held_out_reference)) is not None:
                result["log_prob_differences"] = found
            loss = self.last_evaluation["eval_loss"]  # a mean over all pairs: one that is not finite makes it none
            result["held_out_loss"] = loss if math.isfinite(loss) else None
        return result

    def _check_finite(self) -> None:
        """A last look at what will be the result. Weights may be finite, and so large that nothing they give is."""
        logps = self.held_out_logps
        if logps is None:
            pairs = self.data.train.pairs[:_LOOKED_AT]
            budget = tokens_without_gradient(int(self.recipe.training.tokens_per_micro_batch), self.policy)
            with in_eval(self.policy):
                logps = batched_logps(self.policy, pairs, range(len(pairs)), budget=budget)
        if self.state is not None and not whole(self.policy, self.state):
            what = "the weights are not finite"
        elif self.state is not None and self.state.skipped == self.state.step > 0:
            what = f"none of the {self.state.step} steps could be taken, and nothing was learned"
        elif not (logps.chosen_P.isfinite() & logps.rejected_P.isfinite()).any():
            what = f"no log-prob of {len(logps)} pairs is finite"
        else:
            return
        raise NonFiniteError(
            f"{self.run.path} has no result: after the last step {what}",
            hint="start again, in another run.folder, with a lower training.learning_rate",
        )

    def _check(self, model: Any, budget: int, reference_adapter: str | None) -> None:
        """See that the policy, and its reference where that is another model, compute as the plain model does."""
        names = {POLICY: self.recipe.model.adapter, REFERENCE: reference_adapter}
        adapters = {name: Path(folder) for name, folder in names.items() if folder is not None}
        pairs, texts = self.data.train.pairs, self.data.source.pairs
        check = partial(check_packing, pairs=pairs, budget=budget)
        difference = check(self.policy, texts=texts, encoder=self.base.encoder, adapters=adapters)
        if model is not self.policy:
            difference = max(difference, check(model))
        self.progress.say(
            f"log-probs differ from plain transformers' by {difference:.2g} nats per token, adapter off and on"
        )

    def _references(self, budget: int, at_once: int) -> tuple[Reference | None, Callable[..., PairLogps] | None]:
        """(how to compute the reference in the step, how to look it up): one of the two is None.

        Both are where the objective needs no reference: then only held-out pairs have one, for their accuracy.
        """
        model, context, computes = reference_model(self.recipe, self.base, self.policy, self.reference_folder)
        of_run = self.recipe.reference
        self._check(model, budget, None if of_run.model else of_run.adapter or self.recipe.model.adapter)
        cache = (
            ReferenceCache(cache_folder() / "reference", context) if self.recipe.reference.mode == "cached" else None
        )
        if cache is not None:
            self.holding.enter_context(cache.held())
        with computes():
            self.held_out_reference = self._reference_of(model, self.data.held_out.pairs, at_once, cache, "held-out")
        if not self.recipe.objective.needs_reference:
            return None, None
        if cache is None:

            def live(batches: Sequence[MicroBatch]) -> list[PairLogps]:
                with computes():
                    return [pair_logps(model, batch) for batch in batches]

            return live, None
        with computes():
            whole = self._reference_of(model, self.data.train.pairs, at_once, cache, "training")
        return None, lambda positions: whole.map(lambda x_P: x_P[list(positions)])

    def _reference_of(
        self, model: Any, pairs: Sequence[EncodedPair], budget: int, cache: ReferenceCache | None, what: str
    ) -> PairLogps:
        try:
            with self.progress.task(f"reference, {what} pairs", len(pairs), "pairs") as advance:
                return reference_logps(
                    model, pairs, budget=budget, cache=cache, progress=lambda done, tokens: advance(done)
                )
        except (OSError, sqlite3.Error) as error:
            raise RunError(
                f"the cache of reference log-probs in {cache_folder()} cannot be used: {error}",
                hint="free some space, point DPO_STUDIO_CACHE elsewhere, or set reference.mode: live",
            ) from None

    def _resume_or_begin(self, state: TrainingState, steps: Steps, live: Reference | None, budget: int) -> None:
        checkpoint = find_checkpoint(self.run, self.progress.warn)
        if checkpoint is not None:
            restore(checkpoint, self.policy, state)
            self.progress.say(f"continuing {self.run.path} after step {state.step} of {steps.total}")
        self.run.cut_back(state.step if checkpoint is not None else -1)
        if checkpoint is None:
            first = min(steps.micro_batches_of(1), key=len)  # whatever else does not fit, this row does or none will
            unless_out_of_memory(self.policy, partial(self._check_start, first, live))
            if self.data.held_out.pairs:
                self.run.append("metrics.jsonl", {"step": 0} | self._evaluate_start(budget))
        elif state.step >= steps.total and self.data.held_out.pairs:
            self._evaluate(budget)

    def _check_start(self, batch: MicroBatch, live: Reference | None) -> None:
        """A fresh adapter computes what its reference does: margin 0, DPO's loss ln 2.

        Raises:
            ModelError: it does not, by more than rounding explains.
        """
        if self._has_other_reference() or not self.recipe.objective.needs_reference:
            return
        batch = batch.to(self.base.device)
        with torch.no_grad(), in_eval(self.policy):
            policy = pair_logps(self.policy, batch)
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

    def _maybe_evaluate(self, step: int, last: bool, budget: int) -> dict[str, float]:
        due = step % self.recipe.training.evaluate_every == 0 or last
        if not due or not self.data.held_out.pairs:
            return {}
        return self._evaluate(budget)

    def _evaluate_start(self, budget: int) -> dict[str, float]:
        """Held-out numbers before the first step: the policy still is its reference, so no pass over them is needed."""
        if self._has_other_reference() or self.recipe.objective.needs_agreement:
            return self._evaluate(budget)
        assert self.held_out_reference is not None
        return held_out_metrics(self.held_out_reference, self.held_out_reference, self.recipe.objective)

    def _warn_if_the_reference_never_moves(self, total: int) -> None:
        every = self.recipe.reference.update_every
        if every is not None and every >= total:
            self.progress.warn(
                f"reference.update_every is {every}, and the run has {total} steps: the reference never moves"
            )

    def _has_other_reference(self) -> bool:
        return self.recipe.reference.model is not None or self.recipe.reference.adapter is not None

    def _evaluate(self, budget: int) -> dict[str, float]:
        assert self.held_out_reference is not None
        assert self.state is not None
        pairs = self.data.held_out.pairs
        with self.progress.task("held-out", len(pairs), "pairs") as advance:
            numbers, self.held_out_logps = evaluate(
                self.policy,
                pairs,
                self.held_out_reference,
                self.recipe.objective.given(self.state.mean_log_ratio),
                budget=budget,
                progress=lambda done, tokens: advance(done),
            )
        self.last_evaluation = numbers
        return numbers

    def _room(self, steps: Steps) -> Room:
        """The run's memory limits: this start's, and what it ran into before."""
        known = [Limit(**line) for line in self.run.lines("memory.jsonl")]

        def tell(limit: Limit) -> None:
            self.run.append("memory.jsonl", asdict(limit))
            again = f", each {limit.recompute} formed anew in the backward pass" if limit.recompute != "nothing" else ""
            self.progress.warn(
                f"step {limit.step} ran out of GPU memory: {limit.tokens} tokens a micro-batch from here on{again}; "
                "the step is taken again with the same pairs"
            )

        return Room(self.policy, steps, known, tell)

    def _kept(self, reports: Iterator[StepReport]) -> Iterator[StepReport]:
        """The same reports; when the training stops itself, what it had learned is saved first."""
        try:
            yield from reports
        except NonFiniteError:
            assert self.state is not None
            if not whole(self.policy, self.state):
                last = find_checkpoint(self.run, self.progress.warn)
                self.progress.say(f"the last checkpoint before that: {last}" if last else "no checkpoint was written")
                raise
            self.saver.save(self.policy, self.state)
            self.progress.say(f"what was learned before is kept in {self.run.checkpoints}/step-{self.state.step}")
            raise

    def _write(self, report: StepReport, held_out: dict[str, float]) -> None:
        self.saver.held.check()
        if report.skipped:
            self.progress.warn(f"step {report.step} was not taken: {report.skipped}; the weights stay as they were")
        line = {"step": report.step} | report.metrics | held_out
        self.run.append("metrics.jsonl", line)
        for finding in self.health.see(line):
            self.progress.warn(finding.words())
        timing = {
            "step": report.step,
            "seconds": round(report.seconds, 4),
            "pairs": report.pairs,
            "tokens": report.tokens,
            "pairs_per_second": _rate(report.pairs, report.seconds),
            "tokens_per_second": _rate(report.tokens, report.seconds),
            "memory_gib": round(_peak_memory(self.base.device), 3),
        }
        self.run.append("timing.jsonl", timing)
        if self.recipe.run.tracker is not None:
            self.accelerator.log(report.metrics | held_out, step=report.step)

    def _track(self) -> None:
        if (tracker := self.recipe.run.tracker) is None:
            return
        self.accelerator = Accelerator(cpu=self.base.device.type == "cpu", log_with=tracker, project_dir=self.run.path)
        self.accelerator.init_trackers("dpo-studio", config={})


def _figures(report: StepReport, held_out: dict[str, float]) -> str:
    m = report.metrics
    learned = (
        "not taken  "
        if report.skipped
        else f"loss {m['loss']:.3f}  margin {m['rewards/margins']:.2f}  accuracy {percent(m['rewards/accuracies'])}  "
    )
    text = f"{learned}{report.pairs / report.seconds:.1f} pairs/s  {report.tokens / report.seconds:.0f} tokens/s"
    return text + (f"  held-out accuracy {percent(held_out['eval_rewards/accuracies'])}" if held_out else "")


def _rate(count: float, seconds: float) -> float:
    return round(count / seconds, 3) if seconds > 0 else 0.0


def _summed(*counts: dict[str, int]) -> dict[str, int]:
    names = dict.fromkeys(name for part in counts for name in part)
    return {name: sum(part.get(name, 0) for part in counts) for name in names}


def _peak_memory(device: torch.device) -> float:
    """GiB: of the GPU's memory where there is one, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
