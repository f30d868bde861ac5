"""A page of answers side by side, by temperature, with what the judge said: what any win rate should be read beside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from dpo_studio.reports.html import page
from dpo_studio.reports.markup import block, section
from dpo_studio.reports.sections import comparison_card
from dpo_studio.reports.text import count, percent

__all__ = ["render_comparisons"]

_SHOWN = 40
"""Comparisons a temperature: the page stays below a megabyte."""


def render_comparisons(name: str, rates: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """The page; `rows` are the lines of comparisons.jsonl, in their order: nobody picks them."""
    by_temperature = {row["temperature"]: row for row in rates["temperatures"]}
    parts = [
        section("judging", "How it was judged", f'<div class="panel judged">{block(rates["judge_description"])}</div>')
    ]
    for place, (temperature, group) in enumerate(groupby(rows, key=lambda row: row["temperature"])):
        found, figures = list(group), by_temperature[temperature]
        cards = "".join(comparison_card(i, row, rates["max_new_tokens"]) for i, row in enumerate(found[:_SHOWN], 1))
        low, high = figures["win_rate_ci95"]
        shown = "all" if len(found) <= _SHOWN else f"the first {_SHOWN} of"
        lead = (
            f"Win rate {percent(figures['win_rate'])} ({percent(low)} to {percent(high)}); "
            f"{shown} {count(len(found))} comparisons, in the order they were made."
        )
        parts.append(section(f"temperature-{place}", f"Temperature {temperature:g}", cards, lead))
    about = [("Against", str(rates["against"])), ("Judge", rates["judge"]), ("Prompts", count(rates["n_prompts"]))]
    footer = "This page holds everything it shows: no scripts, no requests."
    return page("answers side by side", name, about, parts, footer)
