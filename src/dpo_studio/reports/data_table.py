"""The data doctor's report, for a terminal (coloured, at its width) or for a file (plain lines)."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING

from dpo_studio.console.text import count, one_line, percent
from dpo_studio.doctor.findings import DataReport, Finding, Level

if TYPE_CHECKING:  # rich costs 50 ms
    from rich.table import Table

__all__ = ["plain_report", "print_report", "reported"]

_COLOURS = {"stop": "bold red", "warning": "yellow", "note": "cyan"}
"""The level is also printed as a word: colour alone is not enough."""
_TOLD: tuple[Level, ...] = ("stop", "warning", "note")
_LONGEST = 160
"""Characters of an example."""


def print_report(report: DataReport) -> None:
    """The report on stdout."""
    if not sys.stdout.isatty():
        sys.stdout.write(plain_report(report))
        return
    from rich.console import Console
    from rich.text import Text

    console = Console()
    grave = report.at("stop") or not report.usable
    console.print(Text(one_line(report.verdict), style="bold red" if grave else "bold"), highlight=False)
    console.print(Text(_source_line(report), style="dim"), highlight=False)
    if found := reported(report):
        console.print(_table(found))
    console.print(Text(_nothing_found(report), style="dim"), highlight=False)


def plain_report(report: DataReport) -> str:
    """The report as lines of text: the verdict first."""
    lines = [one_line(report.verdict), _source_line(report), ""]
    for finding in reported(report):
        lines.append(f"{finding.level:8}{percent(finding.share):>7}{count(finding.count):>9}  {finding.title}")
        for name, text in _particulars(finding):
            lines += textwrap.wrap(
                f"{name}: {text}", 110, initial_indent=" " * 26, subsequent_indent=" " * 28, break_on_hyphens=False
            )
    return "\n".join([*lines, *([""] if reported(report) else []), _nothing_found(report)]) + "\n"


def reported(report: DataReport) -> list[Finding]:
    """The findings, the worst first."""
    return [finding for level in _TOLD for finding in report.at(level)]


def _table(findings: list[Finding]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_lines=False)
    table.add_column("")
    table.add_column("share", justify="right")
    table.add_column("count", justify="right")
    table.add_column("what was found, what it does to a run, what to do", overflow="fold")
    for finding in findings:
        said = Text(finding.title, style="bold")
        for name, text in _particulars(finding):
            said.append(f"\n{name}: ", style="dim")
            said.append(text, style="dim" if name.startswith("row ") else "not bold")
        table.add_row(
            Text(finding.level, style=_COLOURS[finding.level]), percent(finding.share), count(finding.count), said
        )
    return table


def _particulars(finding: Finding) -> Iterator[tuple[str, str]]:
    if finding.detail:
        yield "seen", one_line(finding.detail)
    yield "does", finding.does
    yield "do", finding.todo
    for example in finding.examples:
        text = one_line(example.text)
        yield f"row {example.row}", text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _source_line(report: DataReport) -> str:
    parts = [f"read as {report.format}", f"{count(report.rows)} rows", f"{count(report.pairs)} pairs"]
    parts += [f"{count(report.prompts)} prompts"] + ([f"tokenizer of {report.model}"] if report.model else [])
    parts += [report.looked_at] if report.looked_at else []
    return one_line(f"{report.source}: {', '.join(parts)}")


def _nothing_found(report: DataReport) -> str:
    fine = [finding.name for finding in report.at("fine")]
    if not report.pairs:
        return "The other checks are of pairs, and there are none."
    return f"Nothing found by {', '.join(fine)}." if fine else "Every check found something."
