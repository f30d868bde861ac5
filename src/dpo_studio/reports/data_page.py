"""The data doctor's report as one page without scripts or network requests."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import FuncFormatter, MaxNLocator

from dpo_studio.console.text import count, percent, significant
from dpo_studio.doctor.findings import DataReport, Finding, Histogram
from dpo_studio.reports.data_table import reported
from dpo_studio.reports.drawing import PALETTE, blank, styled
from dpo_studio.reports.html import page
from dpo_studio.reports.markup import block, clipped, esc, section, table
from dpo_studio.reports.svg import inline_svg
from dpo_studio.writing import check_outputs, write_output

__all__ = ["render_data_page", "write_data_page"]

_TONES = {"stop": "worse", "warning": "unclear", "note": "none"}
_LABELS = {"stop": "stop", "warning": "warning", "note": "note"}
_SERIES = {
    "chosen": ("tuned", "tuned", "solid"),
    "rejected": ("base", "base-ink", "dashed"),
    "margin": ("tuned", "tuned", "solid"),
}
"""Colour of the line, colour of its name, style of the line: apart without colour too."""


def write_data_page(report: DataReport, file: Path, *, overwrite: bool = False) -> None:
    """Write the page, completely or not at all; the same bytes for the same report.

    Raises:
        DPOStudioError: as `writing.check_outputs` and `writing.write_output`.
    """
    check_outputs({"--html": file}, overwrite=overwrite)
    write_output(file, render_data_page(report), overwrite=overwrite)


def render_data_page(report: DataReport) -> str:
    """The page, top to bottom: the verdict, what was found, how long and how far apart the answers are."""
    about = [("Read as", report.format), ("Tokenizer", report.model or "none asked"), ("Checked", report.looked_at)]
    sections = [_verdict(report), _cards(report), _findings(report), _figures(report), _rest(report)]
    footer = (
        f"Made by DPO Studio {esc(importlib.metadata.version('dpo-studio'))}. "
        "This page contains everything it shows: no scripts, no requests. Rows count from 0."
    )
    return page("data report", report.source, [(name, value) for name, value in about if value], sections, footer)


def _verdict(report: DataReport) -> str:
    if not report.usable or report.at("stop"):
        tone, label = "worse", "Not ready"
    elif report.at("warning"):
        tone, label = "unclear", "Usable"
    else:
        tone, label = "better", "Ready"
    sentence = esc(report.verdict).replace(" %", "&nbsp;%")
    return f'<div class="verdict {tone}"><span class="label">{label}</span><p class="sentence">{sentence}</p></div>'


def _cards(report: DataReport) -> str:
    cards = [
        ("Rows", report.rows, "read"),
        ("Pairs", report.pairs, f"{count(report.rows - report.pairs)} rows refused"),
        ("Prompts", report.prompts, "different ones"),
        ("Usable", report.usable, "under the length rule" if report.model else "lengths not checked"),
    ]
    shown = "".join(
        f'<div><dt>{name}</dt><dd class="value">{count(value)}</dd><dd class="note">{esc(note)}</dd></div>'
        for name, value, note in cards
    )
    return f'<dl class="cards" style="--columns: {len(cards)}">{shown}</dl>'


def _findings(report: DataReport) -> str:
    found = reported(report)
    body = "".join(_panel(finding) for finding in found)
    lead = "The worst first. A stop would make a run worthless, a warning costs it something, a note is worth knowing."
    return section("findings", "What was found", body, lead)


def _panel(finding: Finding) -> str:
    share = f"{count(finding.count)} of {count(finding.of)}, {percent(finding.share)}"
    seen = f'<p class="muted">{esc(finding.detail)}</p>' if finding.detail else ""
    examples = "".join(
        f'<tr><th scope="row">row {example.row}</th><td>{block(clipped(example.text, 400))}</td></tr>'
        for example in finding.examples
    )
    shown = f'<div class="table"><table><caption>Examples</caption><tbody>{examples}</tbody></table></div>'
    return (
        f'<article class="panel verdict {_TONES[finding.level]}"><span class="label">{_LABELS[finding.level]}</span>'
        f"<h3>{esc(finding.title)}: {esc(share)}</h3>{seen}<p>{esc(finding.does)}</p>"
        f"<p><b>What to do.</b> {esc(finding.todo)}</p>{shown if examples else ''}</article>"
    )


def _figures(report: DataReport) -> str:
    figures = ""
    with styled():
        for histogram in report.histograms:
            svg = inline_svg(_figure_of(histogram), f"data-{histogram.name}", histogram.title, _in_words(histogram))
            caption = f"<figcaption><h3>{esc(histogram.title)}</h3><p>{esc(_CAPTIONS[histogram.name])}</p></figcaption>"
            figures += f"<figure>{caption}{svg}</figure>"
    return section("figures", "Lengths and margins", f'<div class="charts">{figures}</div>' if figures else "")


_CAPTIONS = {
    "characters": "Where the curves part, length tells chosen from rejected. The last bin contains all that is longer.",
    "tokens": "The same in tokens of the model. The last bin contains all that is longer.",
    "margins": "Left of zero the judge liked the rejected answer more; near zero it could have chosen either.",
}


_UNITS = {"characters": "characters", "tokens": "tokens", "margins": "points"}
"""The unit of the axis, by histogram."""


def _figure_of(histogram: Histogram) -> Any:
    figure, axes = blank(top=26)
    axes.grid(axis="y", color=PALETTE["grid"], linewidth=0.8)
    edges = np.asarray(histogram.edges)
    if edges[0] < 0 < edges[-1]:
        axes.axvline(0, color=PALETTE["axis"], linewidth=0.8)
    for at, (name, counts) in enumerate(histogram.counts.items()):
        colour, ink, style = _SERIES[name]
        axes.stairs(counts, edges, color=PALETTE[colour], linewidth=2, linestyle=style)
        if len(histogram.counts) > 1:
            axes.text(
                1.03, 0.9 - 0.1 * at, name, transform=axes.transAxes, va="center", fontsize=11, color=PALETTE[ink]
            )
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    counted = "answers" if len(histogram.counts) > 1 else "pairs"
    muted = {"transform": axes.transAxes, "fontsize": 11, "color": PALETTE["muted"]}
    axes.text(-0.1, 1.04, counted, va="bottom", **muted)
    axes.text(1.03, -0.03, _UNITS[histogram.name], va="top", **muted)
    return figure


def _in_words(histogram: Histogram) -> str:
    """The median of each series, for readers who cannot see the figure."""
    return "; ".join(
        f"{name}: half of {count(sum(counts))} lie below {significant(_median(histogram.edges, counts))}"
        for name, counts in histogram.counts.items()
    )


def _median(edges: Any, counts: Any) -> float:
    """The upper edge of the bin with the median."""
    at = int(np.searchsorted(np.cumsum(counts), sum(counts) / 2))
    return float(edges[min(at + 1, len(edges) - 1)])


def _rest(report: DataReport) -> str:
    refused = table("Rows refused, by reason", [(name, count(n)) for name, n in report.refused.items()], kind="numbers")
    fine = table(
        "Nothing found",
        [
            (finding.title, f"0 of {count(finding.of)}" if not finding.count else percent(finding.share))
            for finding in report.at("fine")
        ],
        kind="numbers",
    )
    return section("rest", "The rest", f'<div class="tables">{refused}{fine}</div>')
