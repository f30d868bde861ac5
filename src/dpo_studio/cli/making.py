"""`dpo data make`: its command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, Optional

import typer

from dpo_studio.cli.options import (
    Concurrency,
    Format,
    JudgeSpec,
    KeyEnv,
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
    parameters_of,
    prices_of,
    source_section,
)

__all__ = ["make"]

_SERVERS = "Servers that answer: "
Prompts = Annotated[str, typer.Argument(help="Pairs or prompts: a file, a folder, bundled:everyday, a Hub id.")]
Out = Annotated[Path, typer.Argument(metavar="OUT.jsonl", help="The file to make; OUT.work keeps what it got.")]
Models = Annotated[
    list[str],
    typer.Option("--model", metavar="MODEL", help="Who answers: a model, a run or server:NAME@URL; several may."),
]
Samples = Annotated[int, typer.Option(min=1, help="Answers of each model to a prompt.")]
Warmth = Annotated[float, typer.Option(help="1 samples as the model says.")]
Longest = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens; a cut one loses.")]
Choose = Annotated[
    Literal["best-worst", "best-second", "all"],
    typer.Option(help="The best answer against the worst, against the next lower score; or every two."),
]
Margin = Annotated[float, typer.Option(min=0, help="Drop pairs whose scores are nearer than this.")]
MatchLength = Annotated[
    Optional[float],  # noqa: UP045 - typer reads it at run time
    typer.Option(min=1, help="Pair answers whose token counts are within this factor of each other."),
]
HeldOut = Annotated[Optional[str], typer.Option(help="A source whose prompts make no pair.")]  # noqa: UP045
Json = Annotated[bool, typer.Option("--json", help="What was counted, as JSON on stdout.")]
ServerKey = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(metavar="NAME", help=f"{_SERVERS}environment variable with the key; default OPENAI_API_KEY."),
]
ServerParam = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(metavar="NAME=VALUE", help=f"{_SERVERS}sent with every request; null removes one."),
]
ServerPrice = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(metavar="IN,OUT", help=f"{_SERVERS}dollars a million tokens, read and written."),
]
ServerAtOnce = Annotated[int, typer.Option(min=1, help=f"{_SERVERS}requests at a time.")]
ServerTimeout = Annotated[float, typer.Option(help=f"{_SERVERS}longest wait for one reply, in seconds.")]


def make(
    prompts: Prompts,
    out: Out,
    models: Models,
    judge: JudgeSpec,
    samples: Samples = 4,
    temperature: Warmth = 1.0,
    max_new_tokens: Longest = 512,
    seed: Seed = 0,
    choose: Choose = "best-worst",
    margin: Margin = 0.0,
    match_length: MatchLength = None,
    held_out: HeldOut = None,
    format_: Format = "auto",
    map_: Map = None,
    split: Split = None,
    rows: Rows = None,
    revision: Revision = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    template: Template = None,
    key_env: KeyEnv = None,
    param: Param = None,
    price: Price = None,
    replies: Replies = None,
    concurrency: Concurrency = 8,
    timeout: Timeout = 120.0,
    server_key_env: ServerKey = None,
    server_param: ServerParam = None,
    server_price: ServerPrice = None,
    server_concurrency: ServerAtOnce = 8,
    server_timeout: ServerTimeout = 120.0,
) -> None:
    """Make pairs: answer every prompt several times, judge the answers, choose pairs. The same command continues."""
    section = source_section(prompts, format_, map_, None, split, rows, revision)
    llm = llm_options(template, key_env, param, price, replies, concurrency, timeout)
    from dpo_studio.evaluation.endpoint import Asking
    from dpo_studio.workflows.making.choosing import Choice
    from dpo_studio.workflows.making.run import Making, make_pairs
    from dpo_studio.workflows.making.servers import ServerOptions

    server = ServerOptions(
        parameters_of("--server-param", server_param),
        prices_of("--server-price", server_price),
        Asking("--server", server_key_env, server_concurrency, server_timeout),
    )
    making = Making(samples, temperature, max_new_tokens, seed, Choice(choose, margin, match_length))
    more: dict[str, Any] = {"held_out": held_out, "llm": llm, "server": server, "overwrite": overwrite}
    made = make_pairs(section, out, models, judge, settings=making, **more)
    _report(made, out, models[0], held_out, as_json=as_json)


def _report(made: dict[str, Any], out: Path, model: str, held_out: str | None, *, as_json: bool) -> None:
    """What was counted, and what the doctor says of the pairs; the names of the files on stdout."""
    from dpo_studio.console.text import one_line
    from dpo_studio.reports.data_table import plain_report
    from dpo_studio.workflows.making.looking import look_at_made

    report = look_at_made(out, model, held_out)
    if as_json:
        print(json.dumps(made | {"report": report.to_plain()}))
        return
    for line in _counts(made):
        print(one_line(line), file=sys.stderr)
    sys.stderr.write(plain_report(report))
    print(made["out"])
    print(made["card"])


def _counts(made: dict[str, Any]) -> list[str]:
    lines = []
    for label, model in made["models"].items():
        lines.append(
            f"{label}: {model['answers']:,} answers, {model['cut']:,} cut, {model['empty']:,} empty"
            + "".join(f"; {count:,} x {reason}" for reason, count in model["no_answer"].items())
        )
    lines.append(f"{made['identical']:,} answers repeat another one to the same prompt")
    lines.append(f"{made['verdicts'].get('not_judged', 0):,} verdicts of {made['judge']} could not be had")
    lines += [f"{count:,} prompts without a pair: {reason}" for reason, count in made["without_a_pair"].items()]
    lines.append(f"{made['pairs']:,} pairs on {made['prompts_with_pairs']:,} prompts")
    return lines
