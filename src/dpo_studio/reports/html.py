"""The report of a run: one page without scripts that asks nothing of the network."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from dpo_studio.disk import write_atomically
from dpo_studio.reports.findings import health_section
from dpo_studio.reports.glossary import glossary_section
from dpo_studio.reports.markup import cell_words, clipped, esc
from dpo_studio.reports.sections import (
    answers_section,
    curves_section,
    details_section,
    evaluated_section,
    headline_panel,
    judging_section,
    key_figures,
    numbers_section,
    showcase_section,
)
from dpo_studio.reports.winrates_section import win_rates_section
from dpo_studio.runs.facts import RunFacts, read_run
from dpo_studio.runs.folder import RunFolder

__all__ = ["page", "write_report"]

_SECTION = re.compile(r'<section id="([\w-]+)"[^>]*><h2[^>]*>(.*?)</h2>')
"""Our own markup: text of a run is escaped and never matches."""
_FEW_SECTIONS = 4


def write_report(run_folder: Path) -> Path:
    """Write `report.html` into a run folder, whole or not at all; the same bytes for the same run."""
    page = render_report(read_run(run_folder)).encode("utf-8")
    path = run_folder / RunFolder.REPORT
    write_atomically(
        path, page, hint="make room or make the folder writable; the report can be written again at any time"
    )
    return path


def render_report(facts: RunFacts) -> str:
    """The page, top to bottom: the verdict, what shows it, what it was made from."""
    compared, training = curves_section(facts)
    parts = [
        headline_panel(facts),
        key_figures(facts),
        showcase_section(facts),
        win_rates_section(facts),
        evaluated_section(facts),
        compared,
        training,
        health_section(facts),
        answers_section(facts),
        judging_section(facts),
        numbers_section(facts),
        details_section(facts),
        glossary_section(facts),
    ]
    return page("run report", facts.name, _header_facts(facts), parts, _footer(facts))


def page(kind: str, name: str, about: Sequence[tuple[str, str]], sections: Sequence[str], footer: str) -> str:
    """A whole page. `sections` and `footer` are HTML, the rest is text; empty sections are left out."""
    return Template(_packaged("report.html")).substitute(
        title=f"{esc(name)} · DPO Studio",
        css=_packaged("report.css").rstrip(),
        kind=esc(kind),
        name=esc(name),
        about="".join(f"<li>{esc(what)} <b>{esc(clipped(value, 160))}</b></li>" for what, value in about),
        contents=_contents(sections),
        sections="\n".join(part for part in sections if part),
        footer=f"<p>{footer}</p>",
    )


def _contents(sections: Sequence[str]) -> str:
    """A list of links to the page's sections, where there are enough of them to be looked for."""
    found = [title for part in sections for title in _SECTION.findall(part)]
    if len(found) < _FEW_SECTIONS:
        return ""
    links = "".join(f'<a href="#{name}">{title}</a>' for name, title in found)
    return f'<nav class="contents" aria-label="Contents">{links}</nav>'


def _packaged(name: str) -> str:
    return resources.files("dpo_studio.reports").joinpath(name).read_text(encoding="utf-8")


def _header_facts(facts: RunFacts) -> list[tuple[str, str]]:
    """The model, the pairs, the objective, the day: what tells this run from its neighbours."""
    objective = " ".join(filter(None, (_at(facts.recipe, "objective", "kind"), _beta(facts))))
    found = [
        ("Model", _at(facts.recipe, "model", "path")),
        ("Pairs", _sources(facts.recipe)),
        ("Objective", objective),
        ("Date", _date(facts)),
    ]
    return [(name, value) for name, value in found if value]


def _sources(recipe: Mapping[str, Any]) -> str:
    """The training source, or several with their weights."""
    data = recipe.get("data")
    several = data.get("train") if isinstance(data, Mapping) else None
    if not isinstance(several, list):
        return _at(recipe, "data", "train", "source")
    named = [one for one in several if isinstance(one, Mapping)]
    return " + ".join(" ".join(filter(None, (_at(one, "source"), _at(one, "weight")))) for one in named)


def _at(values: Mapping[str, Any], *keys: str) -> str:
    """The text of a nested value, or nothing."""
    value: object = values
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return "" if value is None else cell_words(value)


def _beta(facts: RunFacts) -> str:
    beta = _at(facts.recipe, "objective", "beta")
    return f"(beta {beta})" if beta else ""


def _date(facts: RunFacts) -> str:
    """`2026-05-01T10:11:12+00:00` -> `2026-05-01 10:11`."""
    return _at(facts.environment, "date")[:16].replace("T", " ")


def _footer(facts: RunFacts) -> str:
    versions = facts.environment.get("versions", facts.environment)
    version = _at(versions, "dpo-studio") or _at(versions, "dpo_studio") if isinstance(versions, Mapping) else ""
    made = f"Made by DPO Studio {esc(clipped(version or importlib.metadata.version('dpo-studio'), 40))}"
    date = _date(facts)
    return (
        made
        + (f" from a run of {esc(date)}" if date else "")
        + ". This page contains everything it shows: no scripts, no requests."
    )
