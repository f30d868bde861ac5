"""`dpo eval`: held-out accuracy and calibration, and win rate by sampling temperature, with intervals and pictures.

Answers are written and saved first, then judged: a restart writes none of them again, and another judge reads the same.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

import numpy as np

from dpo_studio.config import Recipe, SourceLike, as_source
from dpo_studio.console.progress import Progress
from dpo_studio.disk import make_folder, write_atomically
from dpo_studio.errors import DataError, NonFiniteError, RunError, UsageError
from dpo_studio.evaluation.accuracy import accuracy_summary, finite_pairs
from dpo_studio.evaluation.calibration import calibration
from dpo_studio.evaluation.diversity import distinct_n, repetition
from dpo_studio.evaluation.judges import Comparison, Judge, Verdict, as_text, judges_help, summary
from dpo_studio.evaluation.length_control import length_controlled
from dpo_studio.evaluation.winrate import mean_ci95, win_rate
from dpo_studio.objectives import Formula, margin
from dpo_studio.paths import user_path
from dpo_studio.preferences.pair import Message, Pair, prompt_key
from dpo_studio.preferences.sources import read_pairs
from dpo_studio.reports.html import write_report
from dpo_studio.reports.side_by_side import render_comparisons
from dpo_studio.reports.winrates import MOST_RUNS, figure_files, save_winrate_figure, winrate_markdown
from dpo_studio.runs.data_digests import recipe_of
from dpo_studio.runs.folder import RunFolder, is_run
from dpo_studio.sampling.completion import Completion
from dpo_studio.tokens.chat import ChatEncoder
from dpo_studio.tokens.encode import EncodedAnswer, EncodedPair, encode_pairs
from dpo_studio.workflows.evaluating.completions import Speaker
from dpo_studio.workflows.judging import judge_from
from dpo_studio.workflows.loading import LoadedModel, find_any, load_any
from dpo_studio.workflows.scoring import side_logps
from dpo_studio.workflows.training.preparing import read_and_split
from dpo_studio.writing import check_outputs

__all__ = ["REFERENCE", "Evaluation", "check_figure", "compare_runs", "default_judge", "evaluate_run", "judges_of"]

REFERENCE = "reference"
"""What a run is compared with unless another model is named: its own base, the adapter off."""
Chat = tuple[Message, ...]
Answers = dict[tuple[float, int], list[Completion]]
"""By temperature and sample."""
_IN_THE_RUN = "an evaluation is written into its run: copy the run to where you may write, and evaluate the copy"
_OUTCOMES = {"a": "loss", "b": "win", "tie": "tie"}
_WINNERS = {"a": "base", "b": "tuned", "tie": "tie"}
"""A is the other side's answer, B the policy's."""


@dataclass(frozen=True)
class Evaluation:
    """What is asked of both sides; `compute` as `load_any` takes it."""

    temperatures: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    samples: int = 1
    """Answers to a prompt at each temperature above 0, where there is only one."""
    max_new_tokens: int = 128
    prompts: int = 80
    """Held-out prompts, at most."""
    seed: int = 0
    compute: str | None = None

    def __post_init__(self) -> None:
        if not self.temperatures or len(set(self.temperatures)) < len(self.temperatures):
            raise UsageError("temperatures: at least one, and none twice", hint="--temperatures 0,0.25,0.5,0.75,1")
        if wrong := [t for t in self.temperatures if not 0 <= t < float("inf")]:
            raise UsageError(f"temperature {wrong[0]} is not 0 or more")
        if min(self.samples, self.max_new_tokens, self.prompts) < 1:
            raise UsageError("samples, new tokens and prompts are at least 1 each")

    def rounds(self) -> list[tuple[float, int]]:
        """(temperature, sample), in the order they are asked."""
        return [(t, s) for t in sorted(self.temperatures) for s in range(self.samples if t > 0 else 1)]


class JudgeFor(Protocol):
    """Makes the judge once the run is loaded: its own implicit reward may be the judge."""

    def __call__(self, *, loaded: LoadedModel) -> Judge: ...


def evaluate_run(
    run: str,
    judge: str | JudgeFor,
    *,
    against: str = REFERENCE,
    source: SourceLike | None = None,
    settings: Evaluation | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a run on prompts it was not trained on; leave everything in `RUN/evaluation` and return winrate.json.

    `judge`: its name, as `--judge` takes it, or what makes it. `source` names pairs to take instead of those the run
    held out; pairs about its training prompts are left out.

    Raises:
        RunError: not a run, or it holds nothing out.
        DPOStudioError: a model, a source or the judge cannot be used.
    """
    asked = settings or Evaluation()
    recipe, folder = _recipe(run), RunFolder(user_path(run))
    with progress or Progress() as shown:
        pairs = _pairs(recipe, source, run, shown)
        loaded = load_any(run, compute=asked.compute, with_reference=against == REFERENCE, say=shown.say)
        asked_judge = (
            judge(loaded=loaded) if callable(judge) else judge_from(judge, loaded=loaded, say=shown.say)
        )  # errors in it are reported before any long work
        if against != REFERENCE:
            find_any(against, say=shown.say)
        _make(folder.evaluation / folder.COMPLETIONS)
        chats = list({prompt_key(pair.prompt): pair.prompt for pair in pairs}.values())[: asked.prompts]
        held_out = _held_out(loaded, recipe.objective, pairs, shown)
        policy = Speaker(loaded, folder.evaluation / folder.COMPLETIONS, "policy", tuned=True)
        after = _ask(policy, chats, asked, shown)
        kl = _kl(policy, chats, after, shown)
        before = _other_side(folder, loaded, against, chats, asked, shown)
        places = [(t, s, i) for t, s in asked.rounds() for i in range(len(chats))]
        comparisons = [Comparison(chats[i], before[t, s][i], after[t, s][i]) for t, s, i in places]
        longer_by = _longer_by(comparisons, loaded.base.encoder)
        with shown.task(f"judging: {asked_judge.name}", len(comparisons), "comparisons") as advance:
            verdicts = asked_judge.judge_all(comparisons, advance)
        rates = {
            "judge": asked_judge.name,
            "judge_description": asked_judge.description,
            "judge_summary": summary(verdicts),
            "run": run,
            "against": against,
            "n_prompts": len(chats),
            **{key: value for key, value in asdict(asked).items() if key not in ("temperatures", "prompts")},
            "held_out": held_out,
            "temperatures": [
                _at_temperature(t, places, comparisons, verdicts, longer_by, kl if t == 1 else None, asked.seed)
                for t in sorted(asked.temperatures)
            ],
        }
        rows = [
            {"temperature": t, "sample": s} | _line(comparison, verdict)
            for (t, s, _), comparison, verdict in zip(places, comparisons, verdicts, strict=True)
        ]
        _leave(folder, rates, rows)
    return rates


def _make(completions: Path) -> None:
    """The folder of the answers, before the first of them takes its time."""
    try:
        make_folder(completions)
    except OSError as error:
        raise RunError(f"{completions} cannot be made: {error.strerror or error}", hint=_IN_THE_RUN) from None
    if not os.access(completions, os.W_OK):
        raise RunError(f"{completions} cannot be written", hint=_IN_THE_RUN)


def default_judge(run: str) -> str:
    """The rule that the bundled pairs were written to; other pairs have no default judge.

    Raises:
        RunError: not a run.
        UsageError: a run on other pairs.
    """
    if all(one.source.startswith("bundled:everyday") for one in _recipe(run).data.sources):
        return "everyday"
    raise UsageError(f"{run}: name a judge of its answers with --judge", hint=f"one of {judges_help()}")


def _recipe(run: str) -> Recipe:
    if not is_run(user_path(run)):
        raise RunError(f"{run} is not a run folder", hint="give the folder that `dpo train` or `dpo demo` made")
    return recipe_of(RunFolder(user_path(run)))


def judges_of(runs: Sequence[str], judge: str | None, against: str = REFERENCE) -> list[str]:
    """The name of each run's judge: `judge` or its own default; all runs are to be compared with `against`.

    Each run takes its hours, so what may be wrong with the last one is looked for before the first begins.

    Raises:
        UsageError: more runs than a figure can tell apart, one that occurs twice, or one without a default judge.
        RunError: one is not a run, or cannot be loaded.
    """
    if len(runs) > MOST_RUNS:
        raise UsageError(f"{len(runs)} runs in one figure: more than {MOST_RUNS} cannot be told apart")
    folders = [user_path(run).resolve() for run in runs]
    for place, run in enumerate(runs):
        _recipe(run)
        find_any(run, with_reference=against == REFERENCE)
        if folders[place] in folders[:place]:
            raise UsageError(f"{run} occurs twice")
    return [judge or default_judge(run) for run in runs]


def check_figure(
    figure: Path,
    reads: Iterable[str | Path | None] = (),
    *,
    replies: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Before the runs are measured: whether the figure of all can be written, as .png and .svg.

    Raises:
        DPOStudioError: as `writing.check_outputs`.
    """
    files = [("--figure", file) for file in figure_files(figure)]
    check_outputs(files, reads=reads, continued={"--judge-replies": replies}, overwrite=overwrite)


def compare_runs(measured: Sequence[tuple[str, dict[str, Any]]], figure: Path, *, overwrite: bool = False) -> Path:
    """One figure of several runs, of which `judges_of` knows; its .png, beside which there is an .svg.

    Raises:
        DPOStudioError: it cannot be written, or is there and nobody said `overwrite`.
    """
    check_figure(figure, overwrite=overwrite)
    named = [(user_path(run).resolve().name, rates) for run, rates in measured]
    return save_winrate_figure(named, figure, overwrite=overwrite)[0]


def _pairs(recipe: Recipe, source: SourceLike | None, run: str, progress: Progress) -> list[Pair]:
    """Pairs of prompts that were not trained on."""
    _, split = read_and_split(recipe, progress)
    if source is None:
        if not split.held_out:
            raise RunError(f"{run} has no held-out pairs", hint="name pairs it was not trained on: --source SOURCE")
        return split.held_out
    trained_on = {prompt_key(pair.prompt) for pair in split.train}
    found = read_pairs(as_source(source))
    apart = [pair for pair in found.pairs if prompt_key(pair.prompt) not in trained_on]
    if len(apart) < len(found.pairs):
        progress.warn(
            f"{found.name}: {len(found.pairs) - len(apart)} pairs left out, {run} was trained on their prompts"
        )
    if not apart:
        raise DataError(f"{found.name}: no pair is left", hint="every prompt is one that the run was trained on")
    return apart


def _ask(speaker: Speaker, chats: Sequence[Chat], asked: Evaluation, progress: Progress) -> Answers:
    shared: dict[str, Any] = {"max_new_tokens": asked.max_new_tokens, "seed": asked.seed, "progress": progress}
    return {(t, s): speaker.answers(chats, temperature=t, sample=s, **shared) for t, s in asked.rounds()}


def _other_side(
    folder: RunFolder, loaded: LoadedModel, against: str, chats: Sequence[Chat], asked: Evaluation, progress: Progress
) -> Answers:
    """The answers of what the run is compared with."""
    completions = folder.evaluation / folder.COMPLETIONS
    if against == REFERENCE:
        return _ask(Speaker(loaded, completions, REFERENCE, tuned=False), chats, asked, progress)
    other = load_any(against, say=progress.say)
    return _ask(Speaker(other, completions, "against", tuned=True), chats, asked, progress)


def _held_out(loaded: LoadedModel, objective: Formula, pairs: Sequence[Pair], progress: Progress) -> dict[str, Any]:
    """Accuracy and margin on the labelled pairs, and whether the margins mean what they say, if they say anything."""
    if loaded.other_reference is not None:
        progress.warn(f"no margins and no KL: the run's reference, {loaded.other_reference}, is not loaded")
        return {}
    encoded = encode_pairs(pairs, loaded.base.encoder, max_length=None).pairs
    if not encoded:
        return {}
    policy, reference = (
        side_logps(loaded, encoded, "held-out pairs", progress, tuned=tuned, texts=pairs) for tuned in (True, False)
    )
    keys = {pair.row: prompt_key(pair.prompt) for pair in pairs}
    prompts, (policy, reference) = finite_pairs([keys[pair.row] for pair in encoded], policy, reference)
    if not prompts:
        raise NonFiniteError(
            f"no log-prob of the {len(encoded)} held-out pairs is finite", hint="a diverged adapter: train it again"
        )
    beta = loaded.beta if loaded.beta is not None else 0.1
    margins = (beta * margin(policy, reference)).tolist()
    summed = accuracy_summary(policy, reference, prompts, beta=beta)
    found = calibration(margins if objective.log_odds else [])
    if not objective.log_odds:
        found["left_out"] = f"{objective.kind} does not train margins to be log-odds, so they claim no probability"
    return {"pairs": len(prompts), "beta": beta} | summed | {"calibration": found}


def _kl(policy: Speaker, chats: Sequence[Chat], answers: Answers, progress: Progress) -> list[float] | None:
    """log-prob under the policy minus under the reference of each answer drawn at temperature 1, in nats.

    Their mean estimates KL(policy || reference) over answers of at most `max_new_tokens`. Answers drawn at another
    temperature are from another distribution, so this number is missing for those.
    """
    drawn = [answer for (t, _), found in answers.items() if t == 1 for answer in found]
    if not drawn or policy.loaded.adapter is None or policy.loaded.other_reference is not None:
        return None
    prompts = policy.prompt_ids(chats) * (len(drawn) // len(chats))
    pairs = []
    for row, (prompt, answer) in enumerate(zip(prompts, drawn, strict=True)):
        side = EncodedAnswer(np.array(answer.ids, np.int32), np.ones(len(answer.ids), bool))
        pairs.append(EncodedPair(row, np.array(prompt, np.int32), side, side))
    tuned, base = (
        side_logps(policy.loaded, pairs, "KL to the reference", progress, tuned=side) for side in (True, False)
    )
    ratios: list[float] = (tuned.chosen_P - base.chosen_P).tolist()
    if not all(map(math.isfinite, ratios)):
        progress.warn("no KL: the reference finds answers of the policy impossible, or their log-probs are not finite")
        return None
    return ratios


def _longer_by(comparisons: Sequence[Comparison], encoder: ChatEncoder) -> list[int]:
    """By how many tokens the policy's answer is the longer one.

    As drawn where both sides have one vocabulary. Counts of two tokenizers are two units, so with another one on the
    other side both texts are counted by the policy's `encoder`, with one more for an end of turn.
    """
    if all(one.a.vocabulary == one.b.vocabulary for one in comparisons):
        return [one.b.tokens - one.a.tokens for one in comparisons]
    others, own = (encoder.token_counts([getattr(one, side).text for one in comparisons]) for side in ("a", "b"))
    return [
        after + one.b.ended - before - one.a.ended for one, before, after in zip(comparisons, others, own, strict=True)
    ]


def _at_temperature(
    temperature: float,
    places: Sequence[tuple[float, int, int]],
    comparisons: Sequence[Comparison],
    verdicts: Sequence[Verdict],
    longer_by: Sequence[int],
    kl: list[float] | None,
    seed: int,
) -> dict[str, Any]:
    """One row of winrate.json."""
    here = [place for place, (t, _, _) in enumerate(places) if t == temperature]
    prompt_of = [places[place][2] for place in here]
    outcomes: list[Any] = [_OUTCOMES[verdicts[place].winner] for place in here]
    before, after = ([getattr(comparisons[place], side) for place in here] for side in ("a", "b"))
    rate = win_rate(outcomes, prompt_of, seed=seed)
    points = [{"win": 1.0, "tie": 0.5, "loss": 0.0}[outcome] for outcome in outcomes]
    controlled, controlled_ends = length_controlled(points, [longer_by[place] for place in here], prompt_of, seed=seed)
    return {
        "temperature": temperature,
        "win_rate": rate.win_rate,
        "win_rate_ci95": list(rate.win_rate_ci95),
        "length_controlled": controlled,
        "length_controlled_ci95": list(controlled_ends),
        "wins": rate.wins,
        "ties": rate.ties,
        "losses": rate.losses,
        "n_prompts": rate.n_prompts,
        "n": rate.n,
        **_answer_statistics(after, ""),
        **_answer_statistics(before, "reference_"),
        "kl": None if kl is None else fmean(kl),
        "kl_ci95": None if kl is None else list(mean_ci95(kl, prompt_of, seed=seed)),
    }


def _answer_statistics(answers: Sequence[Completion], prefix: str) -> dict[str, Any]:
    texts = [answer.text for answer in answers]
    found = {
        "stop_rate": fmean(answer.ended for answer in answers),
        "mean_tokens": fmean(answer.tokens for answer in answers),
        "repetition": repetition(texts),
        "distinct_1": distinct_n(texts, 1),
        "distinct_2": distinct_n(texts, 2),
    }
    return {f"{prefix}{name}": value for name, value in found.items()}


def _line(comparison: Comparison, verdict: Verdict) -> dict[str, Any]:
    """A comparison as comparisons.jsonl has it."""
    shown = {"base": comparison.a.shown(), "tuned": comparison.b.shown()}
    about = {"winner": _WINNERS[verdict.winner], "reason": verdict.reason}
    return {"prompt": as_text(comparison.prompt)} | shown | about


def _leave(folder: RunFolder, rates: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """Everything the evaluation found, the numbers last: a reader of winrate.json finds the rest beside it."""
    name = folder.path.resolve().name
    there = folder.evaluation
    make_folder(there)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(there / folder.COMPARISONS, lines)
    write_atomically(there / folder.WIN_RATES_TABLE, winrate_markdown(name, rates))
    save_winrate_figure([(name, rates)], (there / folder.WIN_RATES_FIGURE).with_suffix(""), overwrite=True)
    svg = (there / folder.WIN_RATES_FIGURE).read_text(encoding="utf-8")
    pages = render_comparisons(name, rates, rows, svg)
    for file, html in pages.items():
        write_atomically(there / file, html)
    for earlier in there.glob("answers-*.html"):  # of an evaluation with more temperatures
        if earlier.name not in pages:
            earlier.unlink()
    write_atomically(there / folder.WIN_RATES, json.dumps(rates, indent=2, ensure_ascii=False) + "\n")
    write_report(folder.path)
