"""`dpo eval`: its command line."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from dpo_studio.cli.options import (
    JUDGE_HELP,
    Compute,
    Concurrency,
    Format,
    KeyEnv,
    Labels,
    Map,
    Overwrite,
    Param,
    Price,
    Replies,
    Revision,
    Rows,
    Seed,
    Split,
    Template,
    Timeout,
    llm_options,
    source_section_of,
)

__all__ = ["evaluate"]


def evaluate(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run folders; several share one figure.")],
    judge: Annotated[
        Optional[str],  # noqa: UP045 - typer reads it at run time
        typer.Option(metavar="JUDGE", help=f"{JUDGE_HELP} Default: everyday, for runs on the bundled pairs."),
    ] = None,
    against: Annotated[str, typer.Option(help="The run's own reference, or a model or run.")] = "reference",
    temperatures: Annotated[str, typer.Option(help="Sampling temperatures, with commas.")] = "0,0.25,0.5,0.75,1",
    prompts: Annotated[int, typer.Option(min=1, help="Held-out prompts, at most.")] = 80,
    samples: Annotated[int, typer.Option(min=1, help="Answers to a prompt at each temperature above 0.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 128,
    seed: Seed = 0,
    compute: Compute = None,
    source: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Pairs to measure on instead of the run's held-out pairs."),
    ] = None,
    format_: Format = "auto",
    map_: Map = None,
    label: Labels = None,
    split: Split = None,
    rows: Rows = None,
    revision: Revision = None,
    figure: Annotated[Path, typer.Option(help="Where the figure of several runs goes, as .png and .svg.")] = Path(
        "winrates"
    ),
    overwrite: Overwrite = False,
    template: Template = None,
    key_env: KeyEnv = None,
    param: Param = None,
    price: Price = None,
    replies: Replies = None,
    concurrency: Concurrency = 8,
    timeout: Timeout = 120.0,
) -> None:
    """Win rate by temperature against the reference, held-out accuracy, calibration, KL; a figure and a page."""
    llm = llm_options(template, key_env, param, price, replies, concurrency, timeout)
    section = source_section_of("--source", source, format_, map_, label, split, rows, revision)
    asked = _numbers(temperatures)
    from dpo_studio.console.progress import Progress
    from dpo_studio.evaluation.llm_judge import check_replies
    from dpo_studio.workflows.evaluating.run import Evaluation, check_figure, compare_runs, evaluate_run, judges_of
    from dpo_studio.workflows.judging import judge_from

    reads = [source, template, *runs]
    if replies is not None:
        check_replies(replies, reads)
    if len(runs) > 1:
        check_figure(figure, reads, replies=replies, overwrite=overwrite)
    settings = Evaluation(asked, samples, max_new_tokens, prompts, seed, compute)
    measured: list[tuple[str, dict[str, Any]]] = []
    for run, named in zip(runs, judges_of(runs, judge, against), strict=True):
        with Progress() as progress:
            judging = partial(judge_from, named, llm=llm, say=progress.say)
            rates = evaluate_run(run, judging, against=against, source=section, settings=settings, progress=progress)
        measured.append((run, rates))
        _print_rates(run, rates)
    if len(measured) > 1:
        print(compare_runs(measured, figure, overwrite=overwrite))


def _print_rates(run: str, rates: dict[str, Any]) -> None:
    """The win rates of a run, and where its answers are."""
    from dpo_studio.console.text import percent, printable
    from dpo_studio.paths import user_path
    from dpo_studio.runs.folder import RunFolder

    for row in rates["temperatures"]:
        low, high = row["win_rate_ci95"]
        print(
            f"temperature {row['temperature']:g}: win rate {percent(row['win_rate'])} "
            f"({percent(low)} to {percent(high)}), at equal length {percent(row['length_controlled'])}"
        )
    print(printable(str(RunFolder(user_path(run)).evaluation / RunFolder.ANSWERS_PAGE)))


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not numbers with commas", param_hint="--temperatures") from None
