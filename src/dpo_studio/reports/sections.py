"""The sections of the page, each a function of the run's facts; a section without facts is empty."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from dpo_studio.console.text import count, duration, percent, significant
from dpo_studio.reports.drawing import styled
from dpo_studio.reports.figures import CHARTS
from dpo_studio.reports.markup import block, cell_words, clipped, esc, flattened, page_link, section, table
from dpo_studio.reports.svg import inline_svg
from dpo_studio.reports.verdict import Headline, cautions, headline_of, interval_words
from dpo_studio.runs.facts import RunFacts, finite, interval, share
from dpo_studio.runs.folder import RunFolder

__all__ = [
    "answers_section",
    "comparison_card",
    "curves_section",
    "details_section",
    "evaluated_section",
    "headline_html",
    "headline_panel",
    "judging_section",
    "key_figures",
    "numbers_section",
    "showcase_section",
]

Card = tuple[str, str, str]
"""Name, value (HTML made of numbers only), note."""

_SHOWN = 10
_TITLES = {"base": "Before: base model", "tuned": "After: tuned model"}
_VERDICTS = {"tuned": "tuned wins", "base": "base wins", "tie": "tie"}


def headline_panel(facts: RunFacts) -> str:
    """The headline."""
    return headline_html(headline_of(facts), [*cautions(facts), *facts.notes])


def headline_html(headline: Headline, said: Sequence[str] = ()) -> str:
    """A headline, and what a reader should know before quoting it."""
    notes = "".join(f"<li>{_unbroken(note)}</li>" for note in said)
    return (
        f'<div class="verdict {headline.tone}"><span class="label">{esc(headline.label)}</span>'
        f'<p class="sentence">{_unbroken(headline.sentence)}</p><p class="meaning">{_unbroken(headline.meaning)}</p>'
        f"{f'<ul>{notes}</ul>' if notes else ''}</div>"
    )


def _unbroken(text: str) -> str:
    """Our own sentence, no line ending between a number and its percent sign."""
    return esc(text).replace(" %", "&nbsp;%")


# Key figures


def key_figures(facts: RunFacts) -> str:
    """The numbers one looks for first, as cards."""
    results = (_win_rate(facts), _stops(facts), _length(facts), _accuracy(facts), _margin(facts))
    cards = [card for card in (*results, *_work(facts)) if card]
    shown = "".join(
        f'<div><dt>{name}</dt><dd class="value">{value}</dd><dd class="note">{esc(note)}</dd></div>'
        for name, value, note in cards
    )
    columns = len(cards) if len(cards) <= 5 else -(-len(cards) // 2)
    return f'<dl class="cards" style="--columns: {columns}">{shown}</dl>' if shown else ""


def _win_rate(facts: RunFacts) -> Card | None:
    win_rate = share(facts.result, "win_rate")
    if win_rate is None:
        return None
    return "Win rate", percent(win_rate), interval_words(interval(facts.result, "win_rate_ci95"))


def _before_after(facts: RunFacts, before: str, after: str, words: Any) -> str:
    """`34 % → 93 %`, or what is known of it."""
    old, new = facts.number(before), facts.number(after)
    shown = [
        f"<small>{words(old)} →</small> " if old is not None else "",
        words(new) if new is not None else "not known",
    ]
    return "" if old is None and new is None else "".join(shown)


def _stops(facts: RunFacts) -> Card | None:
    value = _before_after(facts, "stop_rate_base", "stop_rate_tuned", percent)
    limit = facts.number("max_new_tokens")
    note = "instead of being cut off" if limit is None else f"within {count(limit)} tokens, base to tuned"
    return ("Answers it ends itself", value, note) if value else None


def _length(facts: RunFacts) -> Card | None:
    value = _before_after(facts, "mean_tokens_base", "mean_tokens_tuned", count)
    return ("Average answer", f"{value} <small>tokens</small>", "base to tuned") if value else None


def _accuracy(facts: RunFacts) -> Card | None:
    value = _before_after(facts, "accuracy_before", "accuracy", percent)
    said = interval_words(interval(facts.result, "accuracy_ci95"))
    if share(facts.result, "accuracy_before") is not None:
        said += "; before: which answer the base finds likelier"
    return ("Held-out accuracy", value, said) if value else None


def _margin(facts: RunFacts) -> Card | None:
    margin, loss = facts.number("margin"), facts.number("held_out_loss")
    if margin is None:
        return None
    return "Held-out margin", significant(margin), "" if loss is None else f"held-out loss {significant(loss)}"


def _work(facts: RunFacts) -> list[Card]:
    """Steps, time, speed."""
    cards: list[Card] = []
    steps = facts.number("steps") or max(facts.series("step")[1], default=0.0)
    pairs, seconds = facts.number("pairs"), facts.number("seconds")
    if steps:
        cards.append(("Steps", count(steps), "" if pairs is None else f"on {count(pairs)} training pairs"))
    if seconds is not None:
        trained = facts.number("training_seconds")  # over all starts, where `seconds` knows of the last one only
        steps_took = "" if trained is None else f"; steps of all starts: {duration(trained)}"
        cards.append(("Time", duration(seconds), f"since the last start{steps_took}"))
    speed = facts.number("pairs_per_second") or _typical(facts, "pairs_per_second")
    if speed is not None:
        tokens = facts.number("tokens_per_second") or _typical(facts, "tokens_per_second")
        memory = max(facts.timings("memory_gib"), default=None)
        notes = [] if tokens is None else [f"{count(tokens)} tokens/s"]
        notes += [] if memory is None else [f"peak {significant(memory)} GiB"]
        cards.append(("Training speed", f"{significant(speed)} <small>pairs/s</small>", ", ".join(notes)))
    return cards


def _typical(facts: RunFacts, key: str) -> float | None:
    values = facts.timings(key)
    return median(values) if values else None


# Answers


def showcase_section(facts: RunFacts) -> str:
    """One prompt, before and after."""
    prompt, base, tuned = (facts.words(key) for key in ("showcase_prompt", "base_answer", "tuned_answer"))
    if base is None and tuned is None:
        return ""
    answers = [
        _answer(who, _known_answer(facts, who, text), facts.number("max_new_tokens"), _TITLES[who])
        for who, text in (("base", base), ("tuned", tuned))
    ]
    asked = f'<h3 class="prompt" dir="auto">{esc(clipped(prompt))}</h3>' if prompt else ""
    body = f'{asked}<div class="compare">{"".join(answers)}</div>'
    return section("showcase", "Before and after", f'<div class="panel">{body}</div>')


def _known_answer(facts: RunFacts, who: str, text: str | None) -> dict[str, Any]:
    return {
        "text": text or "",
        "ended": facts.result.get(f"{who}_answer_ended"),
        "tokens": facts.result.get(f"{who}_answer_tokens"),
    }


def answers_section(facts: RunFacts) -> str:
    """The first comparisons of the file, whichever side won."""
    rows = facts.answers[:_SHOWN]
    cards = "".join(comparison_card(i, row, facts.number("max_new_tokens")) for i, row in enumerate(rows, 1))
    lead = (
        f"The first {len(rows)} of {count(len(facts.answers))} comparisons, in the order they were made: "
        "they were not selected. Prompts were held out of training."
    )
    more = ""
    if len(facts.answers) > len(rows) and RunFolder.ALL_ANSWERS_PAGE in facts.pages:
        more = page_link(RunFolder.ALL_ANSWERS_PAGE, f"All {count(len(facts.answers))} comparisons")
    return section("answers", f"{_words_for(len(rows))} before and after", cards + more, lead)


def evaluated_section(facts: RunFacts) -> str:
    """The first comparisons of `dpo eval` at its lowest temperature, whichever side won."""
    if not facts.comparisons:
        return ""
    temperature = facts.comparisons[0].get("temperature")
    here = [row for row in facts.comparisons if row.get("temperature") == temperature]
    against = clipped(str(facts.win_rates.get("against", "")), 60)
    sides = None if facts.against_reference else (f"{against} (A)", "Tuned model (B)")
    longest = finite(facts.win_rates, "max_new_tokens")
    cards = "".join(comparison_card(i, row, longest, sides) for i, row in enumerate(here[:_SHOWN], 1))
    at = "?" if (known := finite(here[0], "temperature")) is None else f"{known:g}"
    lead = (
        f"The first {len(here[:_SHOWN])} of {count(len(here))} comparisons at temperature {at}, "
        "in the order they were made: they were not selected."
    )
    return section("evaluated", "The evaluation’s answers, side by side", cards, lead)


def _words_for(shown: int) -> str:
    return {1: "One answer", _SHOWN: "Ten answers"}.get(shown, f"{shown} answers")


def comparison_card(
    number: int, row: Mapping[str, Any], longest: float | None, sides: tuple[str, str] | None = None
) -> str:
    """A line of answers.jsonl: prompt, both answers, verdict; `longest` is the limit they were written under.

    `sides` names the two where they are not before and after. Answers that are the same text are printed once. A judge
    calls them A and B, in this order.
    """
    base, tuned = sides or (f"{_TITLES['base']} (A)", f"{_TITLES['tuned']} (B)")
    asked = esc(clipped(_as_text(row.get("prompt"))))
    prompt = f'<h3 class="prompt" dir="auto"><span class="number">{number}</span>{asked}</h3>'
    if (same := _same_text(row)) is not None:
        answers = _answer("tuned", same, longest, "Both, A and B: the same answer")
    else:
        answers = _answer("base", row.get("base"), longest, base) + _answer("tuned", row.get("tuned"), longest, tuned)
    winner = str(row.get("winner"))
    kind = winner if winner in _VERDICTS else "tie"
    reason = f'<span class="text" dir="auto">{esc(clipped(_as_text(row.get("reason"))))}</span>'
    ruling = (
        f'<div class="ruling {kind}"><span class="chip">{esc(_VERDICTS.get(winner, "no verdict"))}</span>{reason}</div>'
    )
    return f'<article class="panel ruled {kind}">{prompt}<div class="compare">{answers}</div>{ruling}</article>'


def _same_text(row: Mapping[str, Any]) -> object:
    """The answer, where both sides gave the same text and ended it alike."""
    base, tuned = row.get("base"), row.get("tuned")
    if not isinstance(base, dict) or not isinstance(tuned, dict) or not base.get("text"):
        return None
    alike = base.get("text") == tuned.get("text") and base.get("ended") == tuned.get("ended")
    return tuned if alike else None


def _answer(who: str, answer: object, longest: float | None, title: str) -> str:
    known = answer if isinstance(answer, dict) else {"text": _as_text(answer)}
    cut = known.get("ended") is False
    torn = ' <span class="torn">[cut off]</span>' if cut else ""
    text = esc(clipped(_as_text(known.get("text")))) or '<span class="muted">(an empty answer)</span>'
    return (
        f'<div class="answer {who}"><div class="who"><h4>{esc(title)}</h4>{_length_note(known, cut, longest)}</div>'
        f'<div class="text" dir="auto">{text}{torn}</div></div>'
    )


def _length_note(known: Mapping[str, Any], cut: bool, longest: float | None) -> str:
    tokens = finite(known, "tokens")
    if cut:
        limit = tokens if tokens is not None else longest
        return f'<span class="length cut">cut at {"the limit" if limit is None else f"{count(limit)} tokens"}</span>'
    return "" if tokens is None else f'<span class="length">{count(tokens)} tokens</span>'


def _as_text(value: object) -> str:
    """A text, or the turns of a dialogue, as text."""
    if isinstance(value, list) and all(isinstance(turn, dict) for turn in value):
        return "\n".join(f"{turn.get('role', '?')}: {cell_words(turn.get('content'))}" for turn in value)
    return "" if value is None else cell_words(value)


# Figures and tables


def curves_section(facts: RunFacts) -> tuple[str, str]:
    """The figures: of the training, and of the answers."""
    drawn: dict[str, str] = {}
    with styled():
        for chart in CHARTS:
            figure = chart.draw(facts)
            if figure is not None:
                svg = inline_svg(figure, chart.name, chart.title, chart.summary(facts))
                caption = f"<figcaption><h3>{esc(chart.title)}</h3><p>{esc(chart.caption)}</p></figcaption>"
                drawn[chart.name] = f"<figure>{caption}{svg}</figure>"
    answers = "".join(drawn.pop(name, "") for name in ("verdicts", "answers"))
    training = "".join(drawn.values())
    lead = (
        "Each step learns from a few training pairs; the held-out pairs only test it. Faint: single steps. "
        "Line: moving average. Dots: held-out pairs."
    )
    return (
        section("compared", "Tuned against base", f'<div class="charts">{answers}</div>' if answers else ""),
        section("training", "Training", f'<div class="charts">{training}</div>' if training else "", lead),
    )


def judging_section(facts: RunFacts) -> str:
    """Who judged, how, and on what terms."""
    judge, description = facts.words("judge"), facts.words("judge_description")
    if description is None and judge is None:
        return ""
    terms = [("Judge", judge), ("Comparisons", facts.number("n")), ("Temperature", facts.number("temperature"))]
    terms.append(("Longest answer", facts.number("max_new_tokens")))
    shown = [(name, f"{value:g}" if isinstance(value, float) else value) for name, value in terms if value is not None]
    listed = "".join(f"<li>{name} <b>{esc(clipped(value, 200))}</b></li>" for name, value in shown)
    body = f'<div class="panel judged"><ul class="terms">{listed}</ul>{block(description or "")}</div>'
    return section("judging", "How it was judged", body)


def numbers_section(facts: RunFacts) -> str:
    """The pairs, and every number exactly."""
    pairs = [("training pairs", facts.number("pairs")), ("held-out pairs", facts.number("held_out_pairs"))]
    tables = table("Pairs", [(name, count(value)) for name, value in pairs if value is not None], kind="numbers")
    tables += table("Refused", _counts(facts.result.get("refused")), ("reason", "pairs"), kind="numbers")
    tables += table("Encoding", _counts(facts.result.get("encoding")), ("what", "count"), kind="numbers")
    body = f'<div class="tables">{tables}</div>' if tables else ""
    every = table(RunFolder.RESULT, _scalars(facts.result), ("key", "value"), kind="settings")
    every += table(RunFolder.METRICS, _metrics(facts), ("metric", "first", "last"), kind="settings")
    if every:
        body += f"<details><summary>Every number, exactly as recorded</summary>{every}</details>"
    return section("data", "Data and numbers", body)


def _counts(values: object) -> list[tuple[object, ...]]:
    if not isinstance(values, dict):
        return []
    numbers = {key: finite(values, key) for key in values}
    return [(key, values[key] if number is None else count(number)) for key, number in numbers.items()]


def _scalars(result: Mapping[str, Any]) -> list[tuple[object, ...]]:
    short = {key: value for key, value in result.items() if not isinstance(value, dict)}
    return [(key, value) for key, value in short.items() if len(cell_words(value)) <= 80]


def _metrics(facts: RunFacts) -> list[tuple[object, ...]]:
    keys = dict.fromkeys(key for row in facts.metrics for key in row if key not in {"step", "pairs"})
    return [(key, values[0], values[-1]) for key in keys if (values := facts.series(key)[1])]


def details_section(facts: RunFacts) -> str:
    """The recipe and the machine."""
    settings = _grouped(facts.recipe)
    if not settings and facts.recipe_text.strip():
        settings = f'<div class="table"><pre>{esc(clipped(facts.recipe_text))}</pre></div>'
    machine = _grouped(facts.environment)
    return section("recipe", "Settings", f'<div class="tables">{settings}</div>' if settings else "") + section(
        "environment", "Environment", f'<div class="tables">{machine}</div>' if machine else ""
    )


def _grouped(values: Mapping[str, Any]) -> str:
    """A table for each nested part, the rest in one before them."""
    loose = [(key, value) for key, value in values.items() if not isinstance(value, dict)]
    parts = [table("General", loose, kind="settings")]
    parts += [
        table(str(key), flattened(value), kind="settings") for key, value in values.items() if isinstance(value, dict)
    ]
    return "".join(parts)
