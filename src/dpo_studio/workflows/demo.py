"""`dpo demo`: train, answer, judge and report on the bundled model and pairs, on a CPU, in minutes."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from dpo_studio.config import RecipeFile, load_recipe
from dpo_studio.console.progress import Progress
from dpo_studio.disk import make_folder, write_atomically
from dpo_studio.evaluation.everyday import EverydayRule
from dpo_studio.evaluation.winrate import win_rate
from dpo_studio.preferences.pair import Message, Pair
from dpo_studio.reports.html import write_report
from dpo_studio.reports.side_by_side import render_answers
from dpo_studio.runs.folder import RunFolder
from dpo_studio.runs.health import lengthening
from dpo_studio.sampling.completion import Completion
from dpo_studio.workflows.loading import LoadedModel, load_any
from dpo_studio.workflows.talking import SHOWN_SAMPLING, answers
from dpo_studio.workflows.training import run_training
from dpo_studio.workflows.training.preparing import read_and_split

__all__ = ["SHOWCASE", "run_demo"]

SHOWCASE = "I have dropped my phone in water. Now it is not working what should I do now?"
"""The prompt of the tutorial this project grew from; its own tuned model rambled on into further questions."""
_PROMPTS = 120
"""Held-out prompts that both models answer."""

_CAUTION = (
    "No model was trained on these prompts, but the demo's pairs and settings were chosen with them and this rule in "
    "view: expect somewhat less on prompts of your own."
)

Outcome = Literal["win", "tie", "loss"]
_OUTCOMES: dict[str, Outcome] = {"b": "win", "a": "loss", "tie": "tie"}
_WINNERS = {"win": "tuned", "loss": "base", "tie": "tie"}


def run_demo(out: str | Path = "runs/demo", *, progress: Progress | None = None) -> dict[str, Any]:
    """Train on the bundled pairs, let base and tuned model answer held-out prompts, judge, report.

    Leaves a run folder at `out` with `result.json`, `report.html` and `adapter/`.
    """
    started = time.perf_counter()
    with progress or Progress() as shown:
        trained = run_training(demo_recipe(out), shown, {"kind": "demo"})
        if "win_rate" in trained.result:
            return trained.result
        if trained.base is None or trained.policy is None:  # trained by an earlier start that was interrupted
            loaded = load_any(str(trained.folder.path), say=shown.say)
            held_out: Sequence[Pair] = read_and_split(demo_recipe(out).recipe, shown)[1].held_out
        else:
            loaded = LoadedModel(trained.base, trained.policy.model, None, trained.folder.adapter)
            held_out = trained.held_out
        result = trained.result | _evaluate(trained.folder, held_out, loaded, shown)
        for finding in lengthening(result, result["steps"]):
            shown.warn(finding.words())
            result["health"] = [*result.get("health", ()), finding.to_plain()]
        result["seconds"] = round(time.perf_counter() - started, 1)
        trained.folder.write_json(RunFolder.RESULT, result)
        write_report(trained.folder.path)
        return result


def demo_recipe(out: str | Path) -> RecipeFile:
    """The shipped `demo.yaml`, run into `out`."""
    return load_recipe(Path(__file__).parent.parent / "recipes" / "demo.yaml", [f"run.folder={json.dumps(str(out))}"])


def _evaluate(run: RunFolder, held_out: Sequence[Pair], loaded: LoadedModel, progress: Progress) -> dict[str, Any]:
    prompts = [pair.prompt for pair in held_out[:_PROMPTS]]
    chats = [*prompts, (Message("user", SHOWCASE),)]
    base, tuned = (answers(loaded, chats, SHOWN_SAMPLING, tuned=side, progress=progress) for side in (False, True))
    judge = EverydayRule()
    outcomes: list[Outcome] = []
    lines = []
    for prompt, before, after in zip(prompts, base[:-1], tuned[:-1], strict=True):
        verdict = judge(prompt[-1].content, before, after)
        outcomes.append(_OUTCOMES[verdict.winner])
        lines.append(
            {
                "prompt": prompt[-1].content,
                "base": before.shown(),
                "tuned": after.shown(),
                "winner": _WINNERS[outcomes[-1]],
                "reason": verdict.reason,
            }
        )
    _write_answers(run, lines)
    rate = win_rate(outcomes)
    return (
        {
            "win_rate": rate.win_rate,
            "win_rate_ci95": list(rate.win_rate_ci95),
            "wins": rate.wins,
            "ties": rate.ties,
            "losses": rate.losses,
            "n": rate.n,
            "temperature": SHOWN_SAMPLING.temperature,
            "max_new_tokens": SHOWN_SAMPLING.max_new_tokens,
            "judge": judge.name,
            "judge_description": f"{judge.description} {_CAUTION}",
            "showcase_prompt": SHOWCASE,
        }
        | _answer_statistics("base", base)
        | _answer_statistics("tuned", tuned)
    )


def _answer_statistics(side: str, answered: Sequence[Completion]) -> dict[str, Any]:
    *held_out, showcase = answered
    return {
        f"stop_rate_{side}": sum(answer.ended for answer in held_out) / len(held_out),
        f"mean_tokens_{side}": sum(answer.tokens for answer in held_out) / len(held_out),
        f"{side}_answer": showcase.text,
        f"{side}_answer_ended": showcase.ended,
        f"{side}_answer_tokens": showcase.tokens,
    }


def _write_answers(folder: RunFolder, lines: list[dict[str, Any]]) -> None:
    make_folder(folder.evaluation)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_atomically(folder.evaluation / folder.ANSWERS, text)
    whole = render_answers(folder.path.resolve().name, lines, SHOWN_SAMPLING.max_new_tokens)
    write_atomically(folder.evaluation / folder.ALL_ANSWERS_PAGE, whole)
