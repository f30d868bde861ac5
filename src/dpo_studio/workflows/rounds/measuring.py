"""What a round gained: its win rate over the start, from its evaluation, and over the round before, by its answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo_studio.console.progress import Progress
from dpo_studio.errors import DataError, RunError
from dpo_studio.evaluation.judges import Comparison, Judge
from dpo_studio.evaluation.length_control import length_controlled
from dpo_studio.evaluation.winrate import POINTS, win_rate
from dpo_studio.preferences.turns import Turns
from dpo_studio.reading import parse_json, read_text
from dpo_studio.runs.folder import RunFolder
from dpo_studio.sampling.completion import Completion

__all__ = ["answers_of", "gain_over", "of_evaluation"]

_LARGEST = 1 << 30
_OUTCOMES: dict[str, Any] = {"b": "win", "a": "loss", "tie": "tie"}
_RATES = ("win_rate", "win_rate_ci95", "length_controlled", "length_controlled_ci95", "n_prompts", "n")
_POLICY = ("kl", "kl_ci95", "mean_tokens", "stop_rate")


def of_evaluation(rates: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(a round's numbers against the start, the same of the start), of a winrate.json with one temperature."""
    row = rates["temperatures"][0]
    start = {name: row[f"reference_{name}"] for name in ("mean_tokens", "stop_rate")}
    return {name: row[name] for name in (*_RATES, *_POLICY)}, start


def answers_of(run: Path) -> list[Completion]:
    """The policy's answers to the judged prompts, as its evaluation has them.

    Raises:
        RunError: the evaluation's file is not there, or damaged.
    """
    file = RunFolder(run).evaluation / RunFolder.COMPARISONS
    found = []
    for line in read_text(file, what="comparisons", limit=_LARGEST, error=RunError).splitlines():
        row: Any = parse_json(line, what=file.name, error=RunError)
        try:
            said = row["tuned"]
            found.append(Completion(said["text"], said["ended"], said["tokens"]))
        except (TypeError, KeyError):
            raise RunError(f"{file} is damaged", hint="remove the run's evaluation: it is made again") from None
    return found


def gain_over(
    before: Sequence[Completion],
    after: Sequence[Completion],
    prompts: Sequence[Turns],
    judge: Judge,
    *,
    seed: int,
    progress: Progress,
) -> dict[str, Any]:
    """The win rate of one round's answers over those of the round before, to the same prompts.

    Raises:
        DataError: the two do not answer the same prompts.
    """
    if not len(before) == len(after) == len(prompts):
        raise DataError("the rounds were judged on different prompts", hint="remove the later round's evaluation")
    comparisons = [Comparison(prompt, a, b) for prompt, a, b in zip(prompts, before, after, strict=True)]
    with progress.task(f"judging: {judge.name}", len(comparisons), "comparisons") as advance:
        verdicts = judge.judge_all(comparisons, advance)
    outcomes = [_OUTCOMES[verdict.winner] for verdict in verdicts]
    rate = win_rate(outcomes, seed=seed)
    longer_by = [one.b.tokens - one.a.tokens for one in comparisons]
    controlled, ends = length_controlled(
        [POINTS[outcome] for outcome in outcomes], longer_by, list(range(len(outcomes))), seed=seed
    )
    return {
        "win_rate": rate.win_rate,
        "win_rate_ci95": list(rate.win_rate_ci95),
        "length_controlled": controlled,
        "length_controlled_ci95": list(ends),
    }
