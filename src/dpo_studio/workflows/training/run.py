"""`dpo train`: a recipe in, a run folder out; the same command again continues what was not finished."""

from __future__ import annotations

import datetime
import shlex
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from typing import Any

from dpo_studio.config import RecipeFile, RecipeLike, load_recipe
from dpo_studio.console.progress import Progress, Silent
from dpo_studio.disk import remove_leftovers
from dpo_studio.learning.memory import CPU_TOKEN_BUDGET
from dpo_studio.models.bundled import published_name
from dpo_studio.models.layouts import choose_layout
from dpo_studio.models.load import ChatModel, load_chat_model
from dpo_studio.policy.policy import Policy
from dpo_studio.preferences.pair import Pair
from dpo_studio.ranks import Ranks
from dpo_studio.reports.html import write_report
from dpo_studio.reports.verdict import headline_of
from dpo_studio.runs.data_digests import check_same_data, digest_data, run_date, write_data
from dpo_studio.runs.facts import read_run
from dpo_studio.runs.folder import RunFolder
from dpo_studio.runs.location import check_place
from dpo_studio.runs.lock import Held, held
from dpo_studio.runs.status import write_status
from dpo_studio.tokens.dealing import rows_of_rank
from dpo_studio.workflows.opening import find_models, look_at_models
from dpo_studio.workflows.pairs.checking import look_at_lengths, look_at_pairs
from dpo_studio.workflows.training.compiling import accelerated
from dpo_studio.workflows.training.forecasting import forecast
from dpo_studio.workflows.training.preparing import (
    attach_policy,
    encode_both,
    fresh_state,
    read_and_split,
    resolve_model,
    resolve_targets,
    resolve_token_budget,
    steps_of,
    with_dtype_of_first,
)
from dpo_studio.workflows.training.run_log import RunLog
from dpo_studio.workflows.training.samples import Samples, sample_chats
from dpo_studio.workflows.training.saving import Saver
from dpo_studio.workflows.training.session import Session
from dpo_studio.workflows.training.starting import (
    check_no_rounds,
    check_not_shorter,
    check_sharding,
    check_tracker,
    is_finished,
    typed_model,
    warn_of_length,
)

__all__ = ["check_recipe", "run_training", "train_recipe"]


@dataclass(frozen=True)
class TrainedRun:
    """The result of a training, with what is still in memory."""

    folder: RunFolder
    result: dict[str, Any]
    base: ChatModel | None = None
    """None if the run was finished before and nothing was loaded."""
    policy: Policy | None = None
    held_out: Sequence[Pair] = ()
    """Empty in that case, too: a finished run does not read its data."""


def train_recipe(
    recipe: RecipeLike, overrides: Sequence[str] = (), *, anyway: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Train the recipe; return the content of `result.json`. `anyway`: even on pairs that make the training worthless.

    Raises:
        DPOStudioError: with a hint; what was computed so far stays in the run folder and the caches.
    """
    loaded = load_recipe(recipe, list(overrides))
    ranks = Ranks.of_environment()
    shown = (progress or Progress()) if ranks.leads else Progress(Silent())
    with shown, ranks.together(partial(write_status, RunFolder(loaded.run_folder))):
        trained = run_training(loaded, shown, anyway=anyway, ranks=ranks)
        for line in _closing(trained) if ranks.leads else ():
            shown.say(line)
    return trained.result


def _closing(trained: TrainedRun) -> list[str]:
    """The last lines of a training: how many pairs, the report's verdict, and the next commands."""
    verdict, name = headline_of(read_run(trained.folder.path)), shlex.quote(str(trained.folder.path))
    pairs, held_out = (trained.result.get(key, 0) for key in ("pairs", "held_out_pairs"))
    return [
        f"{pairs:,} pairs learned from, {held_out:,} held out",
        f"{verdict.label}: {verdict.sentence} {verdict.meaning}",
        f"chat with it:   dpo chat {name}",
        f"measure it:     dpo eval {name} --judge JUDGE",
        f"export it:      dpo export {name} OUT --to adapter",
    ]


def check_recipe(
    recipe: RecipeLike, overrides: Sequence[str] = (), *, anyway: bool = False, progress: Progress | None = None
) -> None:
    """`--dry-run`: check recipe, data, model and adapter files and token counts; load no weights, write nothing.

    Raises:
        DPOStudioError: the error at which `dpo train` would stop before it loads any weights.
    """
    loaded = load_recipe(recipe, list(overrides))
    check_no_rounds(loaded.recipe)
    check_place(loaded)
    with progress or Progress() as shown:
        run = RunFolder(loaded.run_folder)
        resolved = run.resolve(loaded.recipe)
        check_tracker(resolved)
        found = find_models(resolved)
        source, split = read_and_split(resolved, shown)
        look_at_pairs(resolved, split, shown, anyway=anyway)
        sample_chats(resolved, split.held_out or split.train)
        date = run_date(run)
        models = look_at_models(resolved, found, date, shown.say)
        encoder = models.encoder
        data = encode_both(resolved, source, split, encoder, shown)
        if (done := run.result()) is None or not is_finished(run, resolved, done):
            check_same_data(run, digest_data(data.train.pairs, data.held_out.pairs, encoder, date), shown.warn)
        look_at_lengths(resolved, data.train, shown, anyway=anyway)
        layout = choose_layout(models.base.config.get_text_config(), resolved.model.layout, models.base.name)
        shown.say(layout.told(data.train.pairs))
        steps = steps_of(resolved, data.train.pairs, CPU_TOKEN_BUDGET, layout.layout)
        warn_of_length(resolved, len(data.train.pairs), steps.total, shown.warn)
        taken = min(
            steps.total * resolved.training.pairs_per_step, round(len(data.train.pairs) * resolved.training.epochs)
        )
        shown.say(forecast(resolved, models.base, steps, taken))
        shown.say(f"{steps.total} steps of {resolved.training.pairs_per_step} pairs would be trained into {run.path}")


def run_training(
    loaded: RecipeFile,
    progress: Progress,
    result_extra: dict[str, Any] | None = None,
    *,
    anyway: bool = False,
    stop_after: int | None = None,
    today: datetime.date | None = None,
    ranks: Ranks | None = None,
) -> TrainedRun:
    """Train from a loaded recipe to a finished run folder, or only the first `stop_after` steps.

    `today`: the date of a new run, by default today's; a run that has trained a step keeps its own. `ranks`: the
    processes that train together, and call this alike; only the first writes.
    """
    ranks = ranks or Ranks.one()
    check_no_rounds(loaded.recipe)
    check_place(loaded)
    run = RunFolder(loaded.run_folder, writes=ranks.leads)
    recipe = run.resolve(loaded.recipe)
    if (done := run.result()) is not None and is_finished(run, recipe, done):
        progress.say(f"{run.path} is finished: {done['steps']} steps; nothing to do")
        if run.writes and not (run.path / RunFolder.REPORT).exists():  # the report is the last file that is written
            remove_leftovers(run.path)
            progress.say(f"report: {write_report(run.path)}")
        return TrainedRun(run, done)
    check_tracker(recipe)
    check_sharding(recipe, ranks)
    with held(run.path, progress.warn) if run.writes else nullcontext(Held(run.path, -1)) as hold:
        ranks.wait()  # until the first has the folder
        return _train_in(run, hold, loaded, progress, result_extra or {}, anyway, stop_after, today, ranks)


def _train_in(
    run: RunFolder,
    hold: Held,
    loaded: RecipeFile,
    progress: Progress,
    result_extra: dict[str, Any],
    anyway: bool,
    stop_after: int | None,
    today: datetime.date | None,
    ranks: Ranks,
) -> TrainedRun:
    started = time.perf_counter()
    recipe = with_dtype_of_first(run.resolve(loaded.recipe), ranks)  # again: it may have changed before the lock
    with ranks.first():  # a download is one process's
        found = find_models(recipe)
    source, split = read_and_split(recipe, progress)
    look_at_pairs(recipe, split, progress, anyway=anyway)
    chats = sample_chats(recipe, split.held_out or split.train)
    date = datetime.date.fromisoformat(ranks.text_of_first(run_date(run, today).isoformat()))
    models = look_at_models(recipe, found, date, progress.say)
    with ThreadPoolExecutor(max_workers=1) as meanwhile:  # 60,000 pairs take half a minute, as long as the weights
        encoding = meanwhile.submit(encode_both, recipe, source, split, models.encoder, progress)
        base = load_chat_model(
            recipe.model, folder=models.base, typed=typed_model(loaded), say=progress.say, today=date, ranks=ranks
        )
        data = encoding.result()
    kept = digest_data(data.train.pairs, data.held_out.pairs, models.encoder, date)
    ranks.check_same(sha256(f"{kept}".encode()).digest(), "pairs")
    check_same_data(run, kept, progress.warn)
    look_at_lengths(recipe, data.train, progress, anyway=anyway)
    recipe = resolve_model(recipe, base)
    steps = steps_of(recipe, data.train.pairs, CPU_TOKEN_BUDGET, base.layout.layout)
    progress.say(base.layout.told(data.train.pairs))
    check_not_shorter(run, steps.total)
    warn_of_length(recipe, len(data.train.pairs), steps.total, progress.warn)
    policy = attach_policy(base, recipe, progress.say)
    recipe = resolve_targets(recipe, policy)
    saver = Saver(run, hold, published_name(base.typed), recipe, base.folder)
    saver.check_room(policy, recipe.reference)
    saver.save_trial(policy)
    policy.train_mode()
    with accelerated(base, policy, steps, progress, ranks.size):
        recipe, limit = resolve_token_budget(recipe, policy, data.train.pairs, base.device, progress, ranks)
        run.start(loaded, recipe)
        if run.writes:
            write_data(run, kept)
            run.result_file.unlink(missing_ok=True)
        log = RunLog(run, hold, base.device, progress, recipe.run.tracker, ranks)
        if limit.recompute != "nothing":
            log.write_limit(limit)
        state = fresh_state(recipe, policy, steps.total, ranks)
        steps = replace(steps, token_budget=limit.tokens, rows=rows_of_rank(ranks.rank, ranks.size))
        samples = Samples(policy, models.encoder, chats, recipe.training.sample_every or 0, run, progress)
        session = Session(recipe, base, policy, data, steps, state, saver, log, progress, samples, models.reference)
        held_out = session.fit(stop_after)
    result = session.finish(held_out, time.perf_counter() - started) | result_extra
    run.write_json(RunFolder.RESULT, result)
    if run.writes:
        progress.say(f"report: {write_report(run.path)}")
    return TrainedRun(run, result, base, policy, split.held_out)
