"""`dpo judge`: its command line. The options of an LLM judge are named here, for every verb that takes a judge."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from dpo_studio.cli_choices import Dtype
from dpo_studio.cli_source import Format, Labels, Map, Overwrite, Revision, Rows, Split, source_section

__all__ = ["app", "llm_options"]

app = typer.Typer(name="judge", help="Judges: how far to trust them.", no_args_is_help=True, rich_markup_mode=None)

JUDGE_HELP = (
    "everyday, length, FILE.py:function (your own code), implicit:MODEL_OR_RUN, reward:MODEL, llm:MODEL@BASE_URL."
)
JudgeSpec = Annotated[str, typer.Option("--judge", metavar="JUDGE", help=JUDGE_HELP)]
Template = Annotated[
    Optional[Path],  # noqa: UP045 - typer reads it at run time
    typer.Option("--judge-template", metavar="FILE", help="What an LLM judge is asked instead of our own wording."),
]
KeyEnv = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--judge-key-env", metavar="NAME", help="Environment variable with the key; default OPENAI_API_KEY."),
]
Param = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--judge-param", metavar="NAME=VALUE", help="Sent with every request; null takes one out."),
]
Price = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--judge-price", metavar="IN,OUT", help="Dollars a million tokens, read and written."),
]
Replies = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--judge-replies", metavar="FILE", help="Where every reply is kept, and looked for first."),
]
Concurrency = Annotated[int, typer.Option("--judge-concurrency", min=1, help="Requests at a time.")]
Timeout = Annotated[float, typer.Option("--judge-timeout", help="Longest wait for one reply, in seconds.")]


@app.callback()
def _judge() -> None:
    """Judges: how far to trust them."""


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
    estimate: Annotated[bool, typer.Option("--estimate", help="Say what an LLM judge would cost, and stop.")] = False,
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
    """A judge against human labels: agreement, kappa, position bias, the longer answer, and what people reach."""
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


def llm_options(
    template: Path | None,
    key_env: str | None,
    param: list[str] | None,
    price: str | None,
    replies: Path | None,
    concurrency: int,
    timeout: float,
) -> Any:
    """The options above as `workflows.judging.LLMOptions`."""
    from dpo_studio.evaluation.endpoint import Asking
    from dpo_studio.workflows.judging import LLMOptions

    asking = Asking(key_variable=key_env, concurrency=concurrency, timeout_s=timeout)
    parameters = {name: _value(value) for name, value in _named("--judge-param", param).items()}
    return LLMOptions(template, parameters, _prices(price), replies, asking)


def _named(option: str, given: list[str] | None) -> dict[str, str]:
    pairs = [text.partition("=") for text in given or []]
    if wrong := next(("".join(parts) for parts in pairs if not parts[0] or not parts[1]), None):
        raise typer.BadParameter(f"{wrong!r} is not of the form NAME=VALUE", param_hint=option)
    return {name: value for name, _, value in pairs}


def _value(text: str) -> Any:
    """JSON where it is some, else the text."""
    try:
        return json.loads(text)
    except ValueError:
        return text
    except RecursionError:
        raise typer.BadParameter(f"{text[:20]!r}... is nested too deep", param_hint="--judge-param") from None


def _prices(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        read, written = map(float, text.split(","))
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not of the form IN,OUT, two prices in dollars", param_hint="--judge-price"
        ) from None
    return read, written


def _print(result: dict[str, Any]) -> None:
    from dpo_studio.reports.text import printable

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
    from dpo_studio.reports.text import percent

    return "-" if value is None else percent(value)


def _orders(verdicts: dict[str, Any]) -> list[str]:
    """Position bias, where answers were shown in an order; and what was not judged."""
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
