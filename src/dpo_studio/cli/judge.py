"""`dpo judge`: its command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from dpo_studio.cli.options import (
    Concurrency,
    Dtype,
    Format,
    JudgeSpec,
    KeyEnv,
    Labels,
    Map,
    Overwrite,
    Param,
    Price,
    Replies,
    Revision,
    Rows,
    Split,
    Template,
    Timeout,
    llm_options,
    source_section,
)

__all__ = ["app"]

app = typer.Typer(
    name="judge", help="Judges: how well they agree with people.", no_args_is_help=True, rich_markup_mode=None
)


@app.callback()
def _judge() -> None:
    """Judges: how well they agree with people."""


@app.command()
def check(
    source: Annotated[str, typer.Argument(help="Labelled comparisons: any SOURCE of pairs, or PandaLM's shape.")],
    judge: JudgeSpec,
    format_: Format = "auto",
    map_: Map = None,
    label: Labels = None,
    split: Split = None,
    rows: Rows = None,
    revision: Revision = None,
    annotators: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="COLUMN,COLUMN", help="The columns of the labels, one an annotator."),
    ] = None,
    out: Annotated[Optional[Path], typer.Option(help="Write every verdict with its reason, as JSON Lines.")] = None,  # noqa: UP045
    overwrite: Overwrite = False,
    estimate: Annotated[bool, typer.Option("--estimate", help="Print what an LLM judge would cost, and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The numbers as JSON.")] = False,
    seed: Annotated[int, typer.Option(help="Of the sample, and of which answer is shown as A.")] = 0,
    dtype: Dtype = None,
    template: Template = None,
    key_env: KeyEnv = None,
    param: Param = None,
    price: Price = None,
    replies: Replies = None,
    concurrency: Concurrency = 8,
    timeout: Timeout = 120.0,
) -> None:
    """A judge against human labels: agreement, kappa, position bias, the longer answer, and people's own agreement."""
    from dpo_studio.workflows.judging import check_judge

    section = source_section(source, format_, map_, label, split, rows, revision)
    result = check_judge(
        section,
        judge,
        annotators=[name.strip() for name in (annotators or "").split(",") if name.strip()],
        dtype=dtype,
        llm=llm_options(template, key_env, param, price, replies, concurrency, timeout),
        estimate_only=estimate,
        out=out,
        overwrite=overwrite,
        seed=seed,
    )
    if as_json:
        print(json.dumps(result))
    else:
        _print(result)


def _print(result: dict[str, Any]) -> None:
    from dpo_studio.console.text import printable

    if "agreement" not in result:
        print("\n".join(f"{name}: {value}" for name, value in result.items()))
        return
    lines = [printable(f"{result['judge']} on {result['source']}"), *_counts(result), "", *_table(result), ""]
    lines += _orders(result["verdicts"])
    sys.stdout.write("\n".join(lines).rstrip() + "\n")


def _counts(result: dict[str, Any]) -> list[str]:
    refused = sum(result["refused"].values())
    parts = [f"{result['n']} comparisons on {result['prompts']} prompts, {result['n_preferred']} with a preference"]
    parts += [f"{refused} rows refused"] if refused else []
    parts += [f"{result['split_labels']} without a majority"] if result["split_labels"] else []
    return ["; ".join(parts)]


def _table(result: dict[str, Any]) -> list[str]:
    """Judge, baseline, people; and what each number is."""
    rows = [("the judge", result), ("the longer answer", result["longer_wins"])]
    if (apart := result["leave_one_out"]) is not None:
        rows += [("one annotator against the others", apart["people"]), ("the judge against the same", apart["judge"])]
    lines = [f"{'':34}agreement     95 % interval    exact   kappa"]
    for name, numbers in rows:
        low, high = numbers["agreement_ci95"] or (None, None)
        interval = f"{_share(low)} to {_share(high)}"
        kappa = "-" if numbers["kappa"] is None else f"{numbers['kappa']:.2f}"
        lines.append(
            f"{name:34}{_share(numbers['agreement']):>9}  {interval:>16}  {_share(numbers['exact']):>7}  {kappa:>6}"
        )
    return lines


def _share(value: float | None) -> str:
    from dpo_studio.console.text import percent

    return "-" if value is None else percent(value)


def _orders(verdicts: dict[str, Any]) -> list[str]:
    """Position bias, where answers were shown in an order; and comparisons that were not judged."""
    lines = []
    if verdicts["asked_in_both_orders"]:
        first = _share(verdicts["first_shown_preferred"])
        lines.append(
            f"the answer shown first was preferred in {first} (50 %: no position bias); the orders disagree on "
            f"{verdicts['orders_disagree']} of {verdicts['asked_in_both_orders']} comparisons"
        )
    if verdicts["not_judged"]:
        kinds = [f"{verdicts[kind]} {kind.replace('_', ' ')}" for kind in ("unparsable", "refused", "too_long")]
        lines.append(f"not judged: {verdicts['not_judged']} comparisons (replies: {', '.join(kinds)})")
    return lines
