"""The run in a sentence: what was measured, how sure that is, and what it does not show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dpo_studio.console.text import count, percent
from dpo_studio.runs.facts import RunFacts, interval, share
from dpo_studio.runs.health import health_of

__all__ = ["Headline", "cautions", "evaluation_headline", "headline_of", "interval_words"]

Tone = Literal["better", "unclear", "worse", "none"]

_FEW = 50
"""Below this many comparisons or held-out pairs an interval is wider than 27 points around one half."""

_BEFORE, _LONGER = "the model before training", "picking the longer answer"


@dataclass(frozen=True)
class Headline:
    """A headline, what it means, and which way it points."""

    tone: Tone
    label: str
    sentence: str
    meaning: str


def headline_of(facts: RunFacts) -> Headline:
    """By win rate where answers were compared, else by held-out accuracy, else none."""
    if (win_rate := share(facts.result, "win_rate")) is not None:
        return _by_win_rate(facts, win_rate)
    if (accuracy := share(facts.result, "accuracy")) is not None:
        return _by_accuracy(facts, accuracy)
    steps = max(facts.series("step")[1], default=0.0)
    if steps == 0:
        return Headline("none", "No result yet", "Nothing has been measured yet.", "The run has not taken a step.")
    plural = "s" * (steps != 1)
    meaning = "This page shows what is known so far; a finished run says here whether the model got better."
    return Headline("none", "No result yet", f"{count(steps)} step{plural} recorded, no held-out result yet.", meaning)


def interval_words(ends: tuple[float, float] | None) -> str:
    """`95 % interval 66–80 %`, or that there is none."""
    return "no interval recorded" if ends is None else f"95 % interval {_from_to(*ends)}"


def _from_to(low: float, high: float) -> str:
    return f"{percent(low).removesuffix(' %')}–{percent(high)}"


def _by_win_rate(facts: RunFacts, win_rate: float) -> Headline:
    ends = interval(facts.result, "win_rate_ci95")
    comparisons = facts.number("n")
    of = "its comparisons" if comparisons is None else f"{count(comparisons)} comparisons"
    sentence = (
        f"The tuned model’s answers won {percent(win_rate)} of {of} with the base model’s ({interval_words(ends)})."
    )
    low, high = ends or (0.0, 1.0)
    if low > 0.5:
        meaning = "The whole interval lies above 50 %: more than a coin toss explains."
        return Headline("better", "Better", sentence, _counted(facts) + meaning)
    if high < 0.5:
        meaning = "The whole interval lies below 50 %: training made the answers worse."
        return Headline("worse", "Worse", sentence, _counted(facts) + meaning)
    return Headline("unclear", "Not shown to be better", sentence, _counted(facts) + _why_unclear(ends))


def evaluation_headline(temperatures: Sequence[Mapping[str, Any]], against: str) -> Headline:
    """What `dpo eval` found, over all its temperatures; `against` is what the policy was compared with."""
    other = "the reference" if against == "reference" else against
    rates = [row["win_rate"] for row in temperatures]
    ends = [row["win_rate_ci95"] for row in temperatures]
    if len(rates) == 1:
        won, at = percent(rates[0]), interval_words(tuple(ends[0]))
    else:
        won, at = f"{percent(min(rates))} to {percent(max(rates))}", f"by temperature, of {len(rates)}"
    sentence = f"The tuned model’s answers won {won} of the comparisons with those of {other} ({at})."
    above, below = sum(low > 0.5 for low, _ in ends), sum(high < 0.5 for _, high in ends)
    lies = "lies" if len(rates) == 1 else f"lies at {above or below} of {len(rates)} temperatures"
    equal = [row["length_controlled"] for row in temperatures]
    length = f" At equal length: {percent(min(equal))}" + (f" to {percent(max(equal))}." if len(rates) > 1 else ".")
    sides: tuple[tuple[int, str, Tone, str], ...] = (
        (above, "above", "better", "Better"),
        (below, "below", "worse", "Worse"),
    )
    for found, side, tone, label in sides:
        if found and found == above + below:
            meaning = f"The 95 % interval {lies} {side} 50 %.{length}"
            if found < len(rates):
                return Headline("unclear", f"{label} at some temperatures", sentence, meaning)
            return Headline(tone, label, sentence, meaning)
    return Headline("unclear", "Not shown to be better", sentence, _why_unclear((0.0, 1.0)) + length)


def _counted(facts: RunFacts) -> str:
    wins, ties, losses = (facts.number(key) for key in ("wins", "ties", "losses"))
    if wins is None or losses is None:
        return ""
    tied = f"{count(ties)} tied (each counting one half)" if ties else "no ties"
    return f"{count(wins)} won, {tied}, {count(losses)} lost. "


def _why_unclear(ends: tuple[float, float] | None) -> str:
    if ends is None:
        return "Without an interval this may be chance."
    return "The interval includes 50 %, so this may be a coin toss: more comparisons or more training would tell."


def _by_accuracy(facts: RunFacts, accuracy: float) -> Headline:
    ends = interval(facts.result, "accuracy_ci95")
    before = share(facts.result, "accuracy_before")
    longer = share(facts.result, "longer_wins")
    held_out = facts.number("held_out_pairs")
    sentence = (
        f"On {'the' if held_out is None else count(held_out)} held-out pairs the tuned model prefers the chosen answer "
        f"in {percent(accuracy)} ({interval_words(ends)})"
    )
    sentence += "" if before is None else f", before training {percent(before)}"
    sentence += "." if longer is None else f"; picking the longer answer would give {percent(longer)}."
    low, high = ends or (0.0, 1.0)
    if high < 0.5:
        return Headline(
            "worse", "Worse", sentence, "The whole interval lies below 50 %: it prefers the rejected answers."
        )
    if low <= 0.5:
        return Headline("unclear", "Not shown to be better", sentence, _why_unclear(ends))
    return _above_chance(sentence, accuracy, low, before, longer)


def _above_chance(sentence: str, accuracy: float, low: float, before: float | None, longer: float | None) -> Headline:
    """Better than a coin; now against the two rivals that know nothing of the training."""
    if longer is not None and accuracy <= longer:
        meaning = "That is better than a coin toss but does not beat simply picking the longer answer."
        return Headline("unclear", "Not better than length alone", sentence, meaning)
    if before is not None and accuracy <= before:
        meaning = "That is better than a coin toss but no better than before training."
        return Headline("unclear", "Not shown to be better", sentence, meaning)
    within = [name for name, rival in ((_LONGER, longer), (_BEFORE, before)) if rival is not None and low <= rival]
    if within:
        meaning = f"Better than a coin toss; but the interval still includes the score of {' and of '.join(within)}."
        return Headline("unclear", "Better than chance", sentence, meaning)
    return Headline("better", "Better", sentence, _beaten(before, longer))


def _beaten(before: float | None, longer: float | None) -> str:
    rivals = ["a coin toss"]
    rivals += [] if before is None else [_BEFORE]
    rivals += [] if longer is None else [_LONGER]
    last = f" and {rivals[-1]}" if len(rivals) > 1 else ""
    return f"That beats {', '.join(rivals[: max(1, len(rivals) - 1)])}{last}."


def cautions(facts: RunFacts) -> list[str]:
    """What a fair reader should know before quoting the number."""
    said = [_few(facts), _length(facts), *_health(facts)]
    return [caution for caution in said if caution]


def _few(facts: RunFacts) -> str:
    compared = "win_rate" in facts.result
    measured = facts.number("n" if compared else "held_out_pairs")
    if measured is None or measured >= _FEW:
        return ""
    what = "comparisons" if compared else "held-out pairs"
    return f"Only {count(measured)} {what}: the interval is wide, and a second run may look different."


def _length(facts: RunFacts) -> str:
    accuracy, longer = share(facts.result, "accuracy"), share(facts.result, "longer_wins")
    if accuracy is None or longer is None or "win_rate" not in facts.result or accuracy > longer:
        return ""  # without a win rate the headline itself says it
    return (
        f"Held-out accuracy ({percent(accuracy)}) does not beat picking the longer answer ({percent(longer)}): "
        "part of what it learned may be length."
    )


def _health(facts: RunFacts) -> list[str]:
    """What the run's curve showed, in a line; the section on health says more."""
    found = health_of(facts)
    longer = [f"{finding.saw}; many judges favour length." for finding in found if finding.name == "answers_lengthen"]
    others = [finding.title for finding in found if finding.name != "answers_lengthen"]
    named = f"Run health, below: {'; '.join(others)}." if others else ""
    return [line[0].upper() + line[1:] for line in (*longer, named) if line]
