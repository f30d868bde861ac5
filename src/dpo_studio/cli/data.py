"""`dpo data ...`: pairs are checked, converted and split; `make` is in a file of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from dpo_studio.cli.making import make
from dpo_studio.cli.options import (
    Format,
    Labels,
    Map,
    Overwrite,
    Revision,
    Rows,
    Source,
    Split,
    TooLong,
    source_section,
)

__all__ = ["app"]

app = typer.Typer(
    name="data",
    help="Preference pairs of any shape: check them, convert them, split them by prompt.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

app.command()(make)

Json = Annotated[bool, typer.Option("--json", help="The counts as JSON on stdout.")]


@app.command()
def convert(
    source: Source,
    out: Annotated[Path, typer.Argument(metavar="OUT.jsonl", help="The file to make.")],
    format_: Format = "auto",
    map_: Map = None,
    label: Labels = None,
    split_name: Split = None,
    rows: Rows = None,
    revision: Revision = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Convert any known shape, or one that --map describes, to TRL's conversational JSON Lines."""
    section = source_section(source, format_, map_, label, split_name, rows, revision)
    from dpo_studio.workflows.pairs.data import convert_pairs

    _report(convert_pairs(section, out, overwrite=overwrite), as_json)


@app.command()
def split(
    source: Source,
    train: Annotated[Path, typer.Option(metavar="OUT.jsonl", help="The file of pairs to learn from.")],
    held_out: Annotated[Path, typer.Option(metavar="OUT.jsonl", help="The file of pairs to measure on.")],
    fraction: Annotated[float, typer.Option(help="Share of prompts that is held out.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Another seed selects other held-out prompts.")] = 0,
    format_: Format = "auto",
    map_: Map = None,
    label: Labels = None,
    split_name: Split = None,
    rows: Rows = None,
    revision: Revision = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write two files without a common prompt."""
    section = source_section(source, format_, map_, label, split_name, rows, revision)
    from dpo_studio.workflows.pairs.data import split_source

    _report(split_source(section, train, held_out, fraction=fraction, seed=seed, overwrite=overwrite), as_json)


def _report(summary: dict[str, Any], as_json: bool) -> None:
    """The names of the files (or everything, as JSON) on stdout, the counts on stderr."""
    from dpo_studio.console.text import one_line
    from dpo_studio.writing import stream_of

    if as_json:
        print(json.dumps(summary))
        return

    def say(text: str) -> None:
        print(one_line(text), file=sys.stderr)

    say(f"{summary['source']}: {summary['rows']:,} rows ({summary['format']}), {summary['pairs']:,} pairs")
    for reason, count in summary["refused"].items():
        first = summary["refused_first"][reason]
        say(f"{count:,} rows refused: {reason}; the first is row {first['row']}{_seen(first['seen'])}")
    if summary["refused"]:
        say("(rows count from 0)")
    if "train" in summary:
        say(f"{summary['train']:,} pairs to learn from, {summary['held_out']:,} held out")
    for origin, sides in summary.get("by_source", {}).items():
        say(f"{origin}: {sides['train']:,} and {sides['held_out']:,}")
    outs = summary["out"]
    for name in [outs] if isinstance(outs, str) else outs:
        if stream_of(Path(name)) is None:
            print(name)


def _seen(value: str) -> str:
    return f", {value}" if value else ""


@app.command()
def check(
    source: Source,
    held_out: Annotated[str | None, typer.Option(help="Held-out pairs: are their prompts new?")] = None,
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="A folder, a Hub id or bundled:NAME: check lengths and chat template too (no weights read)."),
    ] = None,
    max_length: Annotated[int, typer.Option(min=8, help="With --model: longest prompt and answer, in tokens.")] = 1024,
    too_long: TooLong = "drop",
    chat_template: Annotated[str | None, typer.Option(help="With --model: a Jinja file in place of its own.")] = None,
    format_: Format = "auto",
    map_: Map = None,
    label: Labels = None,
    split_name: Split = None,
    rows: Rows = None,
    revision: Revision = None,
    as_json: Annotated[bool, typer.Option("--json", help="All findings, as JSON.")] = False,
    all_rows: Annotated[bool, typer.Option("--all-rows", help="With --json: every row of each finding.")] = False,
    html: Annotated[Optional[Path], typer.Option(metavar="FILE", help="Write a page with figures here too.")] = None,  # noqa: UP045
    overwrite: Overwrite = False,
) -> None:
    """Report problems of these pairs, their effect on a run, and advice. Exit 1 if nothing is usable."""
    from dpo_studio.config import ModelSection, SourceSection
    from dpo_studio.workflows.pairs.checking import check_source

    if chat_template is not None and model is None:
        raise typer.BadParameter("goes with --model", param_hint="--chat-template")
    if all_rows and not as_json:
        raise typer.BadParameter("goes with --json", param_hint="--all-rows")
    if html is not None:
        _check_page(html, [source, held_out, model, chat_template], overwrite=overwrite)
    section = source_section(source, format_, map_, label, split_name, rows, revision)
    report = check_source(
        section,
        held_out=SourceSection(source=held_out) if held_out else None,
        model=ModelSection(path=model, chat_template=chat_template) if model else None,
        max_length=max_length,
        too_long=too_long,
    )
    if as_json:
        print(json.dumps(report.to_plain(all_rows=all_rows)))
    else:
        from dpo_studio.reports.data_table import print_report

        print_report(report)
    if html is not None:
        from dpo_studio.reports.data_page import write_data_page

        write_data_page(report, html, overwrite=overwrite)
    if not report.usable:
        sys.exit(1)  # typer.Exit ends as 0 where `main` calls the commands


def _check_page(file: Path, reads: list[str | None], *, overwrite: bool) -> None:
    """Check the outputs before a large source is read; a page never replaces the pairs."""
    from dpo_studio.writing import check_outputs, stream_of

    stream = stream_of(file)
    if stream == "stdout":
        raise typer.BadParameter("stdout has the findings; a page is a file", param_hint="--html")
    if stream is None and file.suffix.lower() not in (".html", ".htm"):
        raise typer.BadParameter(f"{file} does not end in .html", param_hint="--html")
    check_outputs({"--html": file}, reads=reads, overwrite=overwrite)
