"""`dpo rounds`: one recipe, several rounds, each a run folder of its own beside rounds.json.

A round: the policy answers the prompts, the judge judges, pairs are chosen (`making`), a run is trained on them from
the policy of the round before, and it answers held-out prompts that no round is trained on. What is done is not done
again: the same command continues.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from dpo_studio.config import RecipeLike, SourceSection, load_recipe
from dpo_studio.console.progress import Progress
from dpo_studio.console.text import percent
from dpo_studio.disk import write_atomically
from dpo_studio.errors import DataError, RunError
from dpo_studio.preferences.pair import prompt_key
from dpo_studio.preferences.sources import read_pairs
from dpo_studio.preferences.turns import Turns
from dpo_studio.reading import read_json
from dpo_studio.reports.rounds import draw_rounds, rounds_table
from dpo_studio.runs.lock import LOCK, held
from dpo_studio.workflows.evaluating.run import REFERENCE, Evaluation, evaluate_run
from dpo_studio.workflows.judging import LLMOptions, judge_from
from dpo_studio.workflows.loading import find_any
from dpo_studio.workflows.making.choosing import Choice
from dpo_studio.workflows.making.run import Making, make_pairs
from dpo_studio.workflows.rounds.measuring import answers_of, gain_over, of_evaluation
from dpo_studio.workflows.rounds.plan import Round, RoundsPlan, divide, plan_rounds
from dpo_studio.workflows.training import run_training
from dpo_studio.writing import check_run_place

__all__ = ["run_rounds"]

SUMMARY = "rounds.json"
_LARGEST = 20_000_000
_MAY_CHANGE = ("run", "rounds.number", "training.save_every", "training.evaluate_every", "training.sample_every")


def run_rounds(
    recipe: RecipeLike,
    overrides: list[str] | None = None,
    *,
    number: int | None = None,
    llm: LLMOptions | None = None,
    anyway: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Go through the rounds of a recipe, at most `number` of them; return their folder, with rounds.json and a figure.

    They stop where a round gains nothing over the one before beyond its interval. `anyway`: train on pairs that make a
    run worthless, too.

    Raises:
        RecipeError: the recipe has no rounds, or impossible ones.
        DPOStudioError: what `dpo data make`, `dpo train` and `dpo eval` would stop at. What is done stays done.
    """
    plan = plan_rounds(load_recipe(recipe, overrides), number)
    options = llm or LLMOptions()
    data, sources = plan.recipe.data, [one.source for one in plan.recipe.data.sources]
    reads = [plan.start, plan.recipe.model.path, *sources, data.held_out.source, plan.section.prompts]
    check_run_place(plan.folder, reads)
    with progress or Progress() as shown:
        find_any(plan.start, say=shown.say)
        with held(plan.folder, shown.warn, doing="worked in", elsewhere="name another folder: --set run.folder=NAME"):
            summary = _begun(plan)
            if not (plan.prompts.is_file() and plan.held_out.is_file()):
                plan.write_prompts(*divide(plan))
            for one in plan.rounds():
                if one.number > len(summary["rounds"]) and summary["stopped"] is None:
                    shown.say(f"round {one.number} of {plan.section.number}")
                    _take(one, plan, summary, options, shown, anyway=anyway)
                    _write(plan, summary)
            shown.say(_closing(plan, summary))
    return plan.folder


def _begun(plan: RoundsPlan) -> dict[str, Any]:
    """rounds.json of an earlier start, or a new one.

    Raises:
        RunError: something else is in the folder, or the rounds were begun with other settings.
    """
    file, settings = plan.folder / SUMMARY, _settings(plan)
    if not file.exists():
        if [path.name for path in plan.folder.iterdir() if path.name not in (LOCK, "prompts.jsonl", "held_out.jsonl")]:
            raise RunError(f"{plan.folder} exists and has no rounds", hint="name another: --set run.folder=NAME")
        summary: dict[str, Any] = {"settings": settings, "judge": None, "start": {"model": plan.typed}}
        summary |= {"rounds": [], "planned": plan.section.number, "stopped": None, "best": None}
        _write(plan, summary)
        return summary
    known = read_json(file, what=SUMMARY, limit=_LARGEST, error=RunError)
    if not isinstance(known, dict) or not isinstance(known.get("rounds"), list):
        raise RunError(f"{file} is damaged", hint="name another folder: --set run.folder=NAME")
    before = known.get("settings")
    changed = [key for key in settings if not isinstance(before, dict) or before.get(key) != settings[key]]
    if changed:
        raise RunError(
            f"{plan.folder} was begun with other settings: {', '.join(changed)}",
            hint="name another folder (--set run.folder=NAME); rounds.number may grow",
        )
    return known | {"planned": plan.section.number}


def _settings(plan: RoundsPlan) -> dict[str, Any]:
    """The recipe's keys with dots, but those that change nothing that is learned."""

    def flat(value: Any, name: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            return {name: value}
        return {key: one for part, inner in value.items() for key, one in flat(inner, f"{name}.{part}").items()}

    every = flat(plan.recipe.to_plain(), "")
    named = {key.removeprefix("."): value for key, value in every.items()}
    return {
        key: value
        for key, value in named.items()
        if not any(key == name or key.startswith(f"{name}.") for name in _MAY_CHANGE)
    }


def _take(
    one: Round, plan: RoundsPlan, summary: dict[str, Any], options: LLMOptions, progress: Progress, *, anyway: bool
) -> None:
    """A round, as far as an earlier start has not got; its numbers, and whether the rounds end with it."""
    made = _made(one, plan, options, progress)
    if made is None:
        summary["stopped"] = f"round {one.number} made no pair: no answer is better than another one"
        return
    run_training(plan.recipe_of(one), progress, anyway=anyway)
    gc.collect()  # a model has reference cycles, and the next one needs its memory
    judging = partial(judge_from, plan.judge, llm=options, say=progress.say)
    prompts = judged_prompts(plan)
    asked = Evaluation((plan.section.temperature,), 1, plan.section.max_new_tokens, len(prompts), _seed(plan))
    rates = evaluate_run(
        str(one.run), judging, against=plan.against(one) or REFERENCE, settings=asked, progress=progress
    )
    gc.collect()
    found, start = of_evaluation(rates)
    if one.number == 1:
        gain = {name: found[name] for name in ("win_rate", "win_rate_ci95", "length_controlled")}
        gain["length_controlled_ci95"] = found["length_controlled_ci95"]
    else:
        before, after = (answers_of(run) for run in (Round(one.number - 1, one.folder).run, one.run))
        gain = gain_over(before, after, prompts, judging(), seed=_seed(plan), progress=progress)
    pairs = {name: made[name] for name in ("pairs", "prompts_with_pairs", "without_a_pair", "lengths")}
    summary["start"] |= start
    summary["judge"] = rates["judge"]
    summary["rounds"].append({"round": one.number, "run": one.run.name, "made": pairs, **found, "gain": gain})
    low, high = gain["win_rate_ci95"]
    over = "the start" if one.number == 1 else f"round {one.number - 1}"
    said = f"win rate over {over} {percent(gain['win_rate'])} ({percent(low)} to {percent(high)})"
    progress.say(f"round {one.number}: {said}")
    if low > 0.5:
        summary["best"] = one.run.name
    else:
        summary["stopped"] = f"round {one.number} gained nothing beyond its interval: {said}"


def _seed(plan: RoundsPlan) -> int:
    return plan.recipe.training.seed


def _made(one: Round, plan: RoundsPlan, options: LLMOptions, progress: Progress) -> dict[str, Any] | None:
    """What was counted as the round's pairs were made, now or before; None: no pair, after a round that had some."""
    if one.pairs.is_file() and one.counts.is_file():
        known: dict[str, Any] = read_json(one.counts, what=one.counts.name, limit=_LARGEST, error=RunError)
        return known
    section = plan.section
    making = Making(
        section.samples,
        section.temperature,
        section.max_new_tokens,
        _seed(plan) + one.number,
        Choice(section.choose, section.margin, section.match_length),
        one.number,
    )
    try:
        counts = make_pairs(
            SourceSection(source=str(plan.prompts)),
            one.pairs,
            [plan.policy_before(one)],
            plan.judge,
            settings=making,
            held_out=SourceSection(source=str(plan.held_out)),
            llm=options,
            overwrite=True,  # pairs without their counts are of a start that was killed between the two
            progress=progress,
        )
    except DataError as error:
        if one.number > 1 and error.message.startswith("no pair was made"):
            progress.warn(error.message)
            return None
        raise
    gc.collect()
    write_atomically(one.counts, json.dumps(counts, indent=2, ensure_ascii=False) + "\n")
    return counts


def judged_prompts(plan: RoundsPlan) -> list[Turns]:
    """The held-out prompts that every round is judged on, as its evaluation takes them."""
    pairs = read_pairs(SourceSection(source=str(plan.held_out))).pairs
    return list({prompt_key(pair.prompt): pair.prompt for pair in pairs}.values())[: plan.section.judged_prompts]


def _write(plan: RoundsPlan, summary: Mapping[str, Any]) -> None:
    """rounds.json, the table and the figure of the rounds so far."""
    write_atomically(plan.folder / SUMMARY, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    if summary["rounds"]:
        write_atomically(plan.folder / "rounds.md", rounds_table(summary))
        draw_rounds(summary, plan.folder)


def _closing(plan: RoundsPlan, summary: Mapping[str, Any]) -> str:
    if summary["stopped"] is not None:
        return f"stopped: {summary['stopped']}"
    return f"{len(summary['rounds'])} rounds done, the best is {plan.folder / str(summary['best'])}"
