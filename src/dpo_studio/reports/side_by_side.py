"""Pages of answers side by side, with the judge's verdicts, to be read together with a win rate.

The verdict and the figure come first. Won, lost and tied ones can be shown alone, by style sheet: there are no scripts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from dpo_studio.console.text import count, percent
from dpo_studio.reports.html import page
from dpo_studio.reports.markup import block, clipped, esc, section, table
from dpo_studio.reports.sections import comparison_card, headline_html
from dpo_studio.reports.verdict import evaluation_headline
from dpo_studio.reports.winrates_section import winrate_figure
from dpo_studio.runs.folder import RunFolder

__all__ = ["render_answers", "render_comparisons"]

Row = Mapping[str, Any]

_SHOWN = 40
"""Comparisons a temperature on the first page, which stays below a megabyte; the others have a page each."""
_FOOTER = "This page contains everything it shows: no scripts, no requests. Links lead to the other files of the run."
_NAMES = {"tuned": "won by the tuned model", "tie": "tied", "base": "lost"}
_REPORT = ((f"../{RunFolder.REPORT}", "The run's report"),)


def render_comparisons(name: str, rates: Row, rows: Sequence[Row], svg: str) -> dict[str, str]:
    """File name -> page, `answers.html` first; `rows` are the lines of comparisons.jsonl, in their order, without
    selecting them. `svg` is the figure of the win rates."""
    by_temperature = {row["temperature"]: row for row in rates["temperatures"]}
    against = str(rates["against"])
    sides = None if against == "reference" else (f"{clipped(against, 60)} (A)", "Tuned model (B)")
    groups = [(temperature, list(found)) for temperature, found in groupby(rows, key=lambda row: row["temperature"])]
    longest = rates["max_new_tokens"]
    about = [("Against", against), ("Judge", rates["judge"]), ("Prompts", count(rates["n_prompts"]))]
    pages: dict[str, str] = {}
    parts = [
        headline_html(evaluation_headline(rates["temperatures"], against)),
        section("figure", "Win rate by temperature", winrate_figure(svg)),
        _links(_REPORT),
        _filter(rows),
        _by_prompt(rows),
    ]
    for place, (temperature, found) in enumerate(groups):
        title, figures = f"Temperature {temperature:g}", by_temperature[temperature]
        low, high = figures["win_rate_ci95"]
        won = f"Win rate {percent(figures['win_rate'])} ({percent(low)} to {percent(high)}); "
        more = ""
        if len(found) > _SHOWN:
            other = f"answers-{place}.html"
            pages[other] = _rest(name, title, about, found, longest, sides)
            more = _links([(other, f"All {count(len(found))} comparisons at this temperature")])
        shown = "all" if len(found) <= _SHOWN else f"the first {_SHOWN} of"
        lead = f"{won}{shown} {count(len(found))} comparisons, in the order they were made."
        cards = _cards(found[:_SHOWN], longest, sides)
        parts.append(section(f"temperature-{place}", title, cards + more, lead))
    judged = f'<div class="panel judged">{block(rates["judge_description"])}</div>'
    parts.append(section("judging", "How it was judged", judged))
    return {RunFolder.ANSWERS_PAGE: page("answers side by side", name, about, parts, _FOOTER)} | pages


def render_answers(name: str, rows: Sequence[Row], longest: float | None) -> str:
    """One page of all these comparisons, the lines of answers.jsonl."""
    parts = [_links(_REPORT), _filter(rows), section("answers", "Every comparison", _cards(rows, longest, None))]
    return page("answers side by side", name, [("Comparisons", count(len(rows)))], parts, _FOOTER)


def _rest(
    name: str,
    title: str,
    about: Sequence[tuple[str, str]],
    rows: Sequence[Row],
    longest: float,
    sides: tuple[str, str] | None,
) -> str:
    """The page of one temperature."""
    back = _links([*_REPORT, (RunFolder.ANSWERS_PAGE, "Every temperature")])
    parts = [back, _filter(rows), section("answers", title, _cards(rows, longest, sides))]
    return page("answers side by side", name, about, parts, _FOOTER)


def _cards(rows: Sequence[Row], longest: float | None, sides: tuple[str, str] | None) -> str:
    return "".join(comparison_card(i, row, longest, sides) for i, row in enumerate(rows, 1))


def _links(links: Sequence[tuple[str, str]]) -> str:
    return f'<p class="links">{" ".join(f"""<a href="{esc(to)}">{esc(text)}</a>""" for to, text in links)}</p>'


def _filter(rows: Sequence[Row]) -> str:
    """Radio buttons that the style sheet reads."""
    counts = Counter(str(row.get("winner")) for row in rows)
    choices = [("all", f"all {count(len(rows))}"), *((key, f"{count(counts[key])} {_NAMES[key]}") for key in _NAMES)]
    buttons = "".join(
        f'<label><input type="radio" name="show" id="show-{key}"{" checked" if key == "all" else ""}> {words}</label>'
        for key, words in choices
    )
    return f'<fieldset class="filter"><legend>Show</legend>{buttons}</fieldset>'


def _by_prompt(rows: Sequence[Row]) -> str:
    """Which prompts are won and which lost, where each was asked more than once."""
    asked: dict[str, Counter[str]] = {}
    for row in rows:
        asked.setdefault(str(row.get("prompt")), Counter())[str(row.get("winner"))] += 1
    if len(asked) == len(rows):
        return ""
    ordered = sorted(asked.items(), key=lambda one: one[1]["tuned"] + one[1]["tie"] / 2, reverse=True)
    lines = [
        (clipped(" ".join(prompt.split()), 100), *(count(found[key]) for key in ("tuned", "tie", "base")))
        for prompt, found in ordered
    ]
    listed = table("Every prompt, the most won first", lines, ("prompt", "won", "tied", "lost"), kind="numbers")
    return f"<details><summary>Wins by prompt</summary>{listed}</details>"
