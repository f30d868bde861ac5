"""The page's section on `dpo eval`: its figure, and the numbers of each temperature."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dpo_studio.console.text import count, percent, significant
from dpo_studio.reports.markup import clipped, esc, page_link, section, table
from dpo_studio.reports.svg import embedded_svg
from dpo_studio.runs.facts import RunFacts, finite, interval, share
from dpo_studio.runs.folder import RunFolder

__all__ = ["win_rates_section", "winrate_figure"]

Row = Mapping[str, Any]


def win_rates_section(facts: RunFacts) -> str:
    """Empty where nothing was sampled."""
    if not facts.temperatures:
        return ""
    other = "the reference" if facts.against_reference else clipped(str(facts.win_rates["against"]), 100)
    lead = (
        f"Answers to held-out prompts, sampled at each temperature and compared with those of {other}; "
        "a tie counts one half. 50 % is a coin toss."
    )
    page = RunFolder.ANSWERS_PAGE
    more = page_link(page, "Answers side by side, and what the judge said") if page in facts.pages else ""
    return section(
        "win-rates",
        "Win rate by temperature",
        winrate_figure(facts.win_rates_svg) + _terms(facts.win_rates) + _table(facts.temperatures) + more,
        lead,
    )


def winrate_figure(file: str) -> str:
    """The figure that `dpo eval` drew, from the text of its file; nothing if that is none."""
    svg = embedded_svg(file, "winrate", "Win rate by temperature", "The numbers are below.")
    return f'<figure class="panel wide">{svg}</figure>' if svg else ""


def _terms(result: Row) -> str:
    named = (("Judge", "judge"), ("Longest answer", "max_new_tokens"), ("Seed", "seed"))
    shown = [(name, result.get(key)) for name, key in named if isinstance(result.get(key), (str, int, float))]
    listed = "".join(f"<li>{name} <b>{esc(clipped(str(value), 200))}</b></li>" for name, value in shown)
    return f'<ul class="terms measured">{listed}</ul>' if listed else ""


def _table(rows: list[dict[str, Any]]) -> str:
    """One row a temperature; a column that no row can fill is left out."""
    filled = {name: [words(row) for row in rows] for name, words in _COLUMNS.items()}
    kept = {name: cells for name, cells in filled.items() if any(cells)}
    lines = zip(*kept.values(), strict=True)
    return table("Every number of the figure", [tuple(line) for line in lines], tuple(kept), kind="wide")


def _rate(key: str) -> Callable[[Row], str]:
    """`62 % (55–69 %)`."""

    def words(row: Row) -> str:
        rate, ends = share(row, key), interval(row, f"{key}_ci95")
        if rate is None:
            return ""
        return percent(rate) if ends is None else f"{percent(rate)} ({percent(ends[0])[:-2]}–{percent(ends[1])})"

    return words


def _beside(key: str, form: Callable[[float], str]) -> Callable[[Row], str]:
    """The tuned model's, and the reference's after a slash."""

    def words(row: Row) -> str:
        both = [finite(row, name) for name in (key, f"reference_{key}")]
        known = [form(value) for value in both if value is not None]
        return " / ".join(known) if both[0] is not None else ""

    return words


def _counts(row: Row) -> str:
    values = [finite(row, key) for key in ("wins", "ties", "losses")]
    return "" if None in values else " · ".join(count(value or 0) for value in values)


def _number(key: str) -> Callable[[Row], str]:
    return lambda row: "" if (value := finite(row, key)) is None else significant(value)


_COLUMNS: dict[str, Callable[[Row], str]] = {
    "temperature": lambda row: "?" if (value := finite(row, "temperature")) is None else f"{value:g}",
    "win rate (95 %)": _rate("win_rate"),
    "at equal length (95 %)": _rate("length_controlled"),
    "won · tied · lost": _counts,
    "ends itself, tuned / reference": _beside("stop_rate", percent),
    "tokens, tuned / reference": _beside("mean_tokens", count),
    "KL to the reference, nats": _number("kl"),
}
