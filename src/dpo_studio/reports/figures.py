"""The figures of a run, shown inline in the page."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from matplotlib.ticker import FuncFormatter, MaxNLocator

from dpo_studio.console.text import count, percent, significant
from dpo_studio.reports.drawing import (
    PALETTE,
    blank,
    held_out_dots,
    label_ends,
    line_across,
    step_axes,
    training_curve,
)
from dpo_studio.runs.facts import RunFacts, finite, interval, share

__all__ = [
    "CHARTS",
]

MaybeFigure = Any
"""A matplotlib Figure, or None where the run has no such numbers (mypy does not look into matplotlib)."""


@dataclass(frozen=True)
class Chart:
    """A figure: its file name, its words, and how it is drawn (None where the run has no such numbers)."""

    name: str
    title: str
    caption: str
    draw: Callable[[RunFacts], MaybeFigure]
    summary: Callable[[RunFacts], str]
    """What the figure shows, for those who cannot see it."""


def _draw_loss(facts: RunFacts) -> MaybeFigure:
    train, held = facts.series("loss"), facts.series("eval_loss")
    if not train[0] and not held[0]:
        return None
    figure, axes = step_axes()
    ends = [(training_curve(axes, train, PALETTE["tuned"]), "training", "tuned")]
    ends += [(held_out_dots(axes, held, PALETTE["ink"]), "held-out", "ink")]
    objective = facts.recipe.get("objective")
    if isinstance(objective, dict) and objective.get("kind") == "dpo":
        ends += [(line_across(axes, math.log(2)), "ln 2: no\npreference", "muted")]
    label_ends(axes, ends)
    return figure


def _draw_rewards(facts: RunFacts) -> MaybeFigure:
    chosen, rejected = facts.series("rewards/chosen"), facts.series("rewards/rejected")
    held = facts.series("eval_rewards/chosen"), facts.series("eval_rewards/rejected")
    if not chosen[0] and not held[0][0]:
        return None
    figure, axes = step_axes()
    axes.axhline(0, color=PALETTE["axis"], linewidth=0.8, zorder=1)
    at_chosen = training_curve(axes, chosen, PALETTE["tuned"])
    at_rejected = training_curve(axes, rejected, PALETTE["base"], dashed=True)
    at_held = held_out_dots(axes, held[0], PALETTE["tuned"]), held_out_dots(axes, held[1], PALETTE["base"])
    ends = [(at_chosen or at_held[0], "chosen", "tuned"), (at_rejected or at_held[1], "rejected", "base-ink")]
    label_ends(axes, ends)
    return figure


def _draw_margin(facts: RunFacts) -> MaybeFigure:
    train, held = facts.series("rewards/margins"), facts.series("eval_rewards/margins")
    if not train[0] and not held[0]:
        return None
    figure, axes = step_axes()
    axes.axhline(0, color=PALETTE["axis"], linewidth=0.8, zorder=1)
    ends = [(training_curve(axes, train, PALETTE["tuned"]), "training", "tuned")]
    ends += [(held_out_dots(axes, held, PALETTE["ink"]), "held-out", "ink")]
    label_ends(axes, ends)
    return figure


def _draw_accuracy(facts: RunFacts) -> MaybeFigure:
    train, held = facts.series("rewards/accuracies"), facts.series("eval_rewards/accuracies")
    if not train[0] and not held[0]:
        return None
    figure, axes = step_axes()
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))
    ends = [(training_curve(axes, train, PALETTE["tuned"], faint=False), "training", "tuned")]
    ends += [(held_out_dots(axes, held, PALETTE["ink"]), "held-out", "ink")]
    if (longer := share(facts.result, "longer_wins")) is not None:
        ends += [(line_across(axes, longer), "longer wins", "muted")]
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0.45), min(max(high, 0.8), 1.03))
    label_ends(axes, ends)
    return figure


def _draw_log_probs(facts: RunFacts) -> MaybeFigure:
    chosen, rejected = facts.series("logps/chosen"), facts.series("logps/rejected")
    if not chosen[0] or not rejected[0]:
        return None
    figure, axes = step_axes()
    ends = [(training_curve(axes, chosen, PALETTE["tuned"]), "chosen", "tuned")]
    ends += [(training_curve(axes, rejected, PALETTE["base"], dashed=True), "rejected", "base-ink")]
    label_ends(axes, ends)
    return figure


def _histogram(facts: RunFacts) -> tuple[list[float], list[float], list[float]] | None:
    """Edges, counts before and counts after; None where result.json has no such numbers."""
    found = facts.result.get("log_prob_differences")
    lists = [found.get(key) for key in ("edges", "before", "after")] if isinstance(found, dict) else []
    numbers: list[list[float]] = []
    for one in lists:
        known = [finite({"x": value}, "x") for value in one] if isinstance(one, list) else []
        numbers.append([value for value in known if value is not None])
        if len(numbers[-1]) < len(known) or not known:
            return None
    if not numbers:
        return None
    edges, before, after = numbers
    fits = len(before) == len(after) == len(edges) - 1
    return (edges, before, after) if fits and all(low < high for low, high in pairwise(edges)) else None


def _draw_histogram(facts: RunFacts) -> MaybeFigure:
    if (found := _histogram(facts)) is None:
        return None
    edges, before, after = found
    figure, axes = blank()
    axes.grid(axis="y", color=PALETTE["grid"], linewidth=0.8)
    axes.axvline(0, color=PALETTE["axis"], linewidth=1)
    axes.stairs(before, edges, color=PALETTE["base"], linewidth=2, linestyle=(0, (5, 2)))
    axes.stairs(after, edges, color=PALETTE["tuned"], linewidth=2)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.text(1.075, -0.03, "nats", transform=axes.transAxes, va="top", fontsize=11, color=PALETTE["muted"])
    for at, (name, role) in enumerate((("before", "base-ink"), ("after", "tuned"))):
        axes.text(1.03, 0.9 - 0.1 * at, name, transform=axes.transAxes, va="center", fontsize=11, color=PALETTE[role])
    return figure


def _histogram_words(facts: RunFacts) -> str:
    if (found := _histogram(facts)) is None:
        return ""
    edges, *sides = found
    before, after = (sum(one for low, one in zip(edges[:-1], counts, strict=True) if low >= 0) for counts in sides)
    pairs = count(sum(sides[0]))
    return f"Of {pairs} held-out pairs {count(before)} are above zero before training, {count(after)} after."


_ROOM_FOR_TWO_NAMES = 0.21
"""Share of the bar that "tie" and "base wins" need side by side."""


def _draw_verdicts(facts: RunFacts) -> MaybeFigure:
    counts = [facts.number(key) for key in ("wins", "ties", "losses")]
    known = [0.0 if value is None else value for value in counts]
    if counts[0] is None or counts[2] is None or sum(known) <= 0:
        return None
    figure, axes = blank(height=190, left=22, right=22, top=34, bottom=34)
    looks = (
        ("tuned wins", "tuned", "surface", "tuned"),
        ("tie", "tie", "tie-text", "muted"),
        ("base wins", "base", "base-text", "base-ink"),
    )
    left = 0.0
    for value, (name, fill, inside, outside) in zip(known, looks, strict=True):
        part = value / sum(known)
        axes.barh(1, part, left=left, height=0.62, color=PALETTE[fill], edgecolor=PALETTE["surface"], linewidth=2)
        if part > 0.07:
            axes.text(left + part / 2, 1, count(value), ha="center", va="center", color=PALETTE[inside], weight="bold")
        _name_part(axes, name, left, part, PALETTE[outside])
        left += part
    _win_rate_mark(axes, facts)
    axes.set(xlim=(0, 1), ylim=(-0.75, 1.4), yticks=[], xticks=[0, 0.25, 0.5, 0.75, 1])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))
    return figure


def _name_part(axes: Any, name: str, left: float, part: float, colour: str) -> None:
    """A name above its part of the bar: at its left edge, the last part's at its right one."""
    if part <= 0 or (name == "tie" and 1 - left < _ROOM_FOR_TWO_NAMES):
        return
    at, align = (left + part, "right") if name == "base wins" else (left, "left")
    axes.text(at, 1.42, name, ha=align, va="bottom", fontsize=11, color=colour)


def _win_rate_mark(axes: Any, facts: RunFacts) -> None:
    """The win rate with its interval, against the line of a coin toss."""
    axes.plot([0.5, 0.5], [-0.75, 0.55], color=PALETTE["muted"], linewidth=1, linestyle=(0, (4, 3)))
    win_rate, ends = share(facts.result, "win_rate"), interval(facts.result, "win_rate_ci95")
    if win_rate is None:
        return
    y, dark = -0.25, {"color": PALETTE["ink"]}
    if ends is not None:
        axes.plot(ends, [y, y], linewidth=2, solid_capstyle="butt", **dark)
        axes.plot(ends, [y, y], linestyle="none", marker="|", markersize=11, markeredgewidth=2, **dark)
    axes.plot(
        [win_rate], [y], marker="o", markersize=9, markeredgecolor=PALETTE["surface"], markeredgewidth=1.5, **dark
    )
    halo = {"facecolor": PALETTE["surface"], "edgecolor": "none", "pad": 1.5}
    at = min(max(win_rate, 0.13), 0.87)
    axes.text(at, y + 0.42, f"win rate {percent(win_rate)}", ha="center", va="center", bbox=halo, **dark)


def _draw_answers(facts: RunFacts) -> MaybeFigure:
    panels: list[tuple[str, tuple[float, float], float, Callable[[float], str]]] = []
    base, tuned = share(facts.result, "stop_rate_base"), share(facts.result, "stop_rate_tuned")
    if base is not None and tuned is not None:
        panels.append(("ended by the model itself", (base, tuned), 1.0, percent))
    base, tuned = facts.number("mean_tokens_base"), facts.number("mean_tokens_tuned")
    if base is not None and tuned is not None:
        panels.append(("average length in tokens", (base, tuned), max(base, tuned, 1.0), count))
    if not panels:
        return None
    figure, axes = blank(height=190, left=52, right=56, top=8, bottom=8)
    for i, (name, values, full, words) in enumerate(panels):
        top = 5.0 - 3.2 * i
        axes.text(0, top, name, va="center", fontsize=11, color=PALETTE["muted"])
        _bar_pair(axes, top, values, full, words)
    axes.set(xlim=(0, 1), ylim=(5.0 - 3.2 * len(panels) + 0.6, 5.5), yticks=[], xticks=[])
    axes.spines["bottom"].set_visible(False)
    return figure


def _bar_pair(axes: Any, top: float, values: tuple[float, float], full: float, words: Callable[[float], str]) -> None:
    """Base above tuned, each on the track of what there could be."""
    for row, (who, ink, value) in enumerate(zip(("base", "tuned"), ("base-ink", "tuned"), values, strict=True), 1):
        y = top - 0.95 * row
        axes.barh(y, 1, height=0.62, color=PALETTE["grid"])
        axes.barh(y, value / full, height=0.62, color=PALETTE[who])
        axes.text(-0.03, y, who, ha="right", va="center", fontsize=11, color=PALETTE[ink])
        axes.text(1.03, y, words(value), va="center", weight="bold", color=PALETTE["ink"])


# Words


def _from_to(facts: RunFacts, *named: tuple[str, str]) -> str:
    """`Training from 0.69 to 0.51; held-out from ...`, for each series there is."""
    parts = []
    for name, key in named:
        values = facts.series(key)[1]
        if values:
            parts.append(f"{name} from {significant(values[0])} to {significant(values[-1])}")
    return "; ".join(parts) + "."


def _verdict_words(facts: RunFacts) -> str:
    wins, ties, losses = (count(facts.number(key) or 0) for key in ("wins", "ties", "losses"))
    return f"{wins} comparisons won by the tuned model, {ties} ties, {losses} won by the base model."


def _answer_words(facts: RunFacts) -> str:
    stop = [share(facts.result, f"stop_rate_{who}") for who in ("base", "tuned")]
    tokens = [facts.number(f"mean_tokens_{who}") for who in ("base", "tuned")]
    parts = []
    if stop[0] is not None and stop[1] is not None:
        parts.append(f"share of answers ended by the model itself: base {percent(stop[0])}, tuned {percent(stop[1])}")
    if tokens[0] is not None and tokens[1] is not None:
        parts.append(f"average length: base {count(tokens[0])} tokens, tuned {count(tokens[1])} tokens")
    return "; ".join(parts) + "."


CHARTS = (
    Chart(
        "loss",
        "Loss",
        "What training minimises; lower is better. DPO’s is ln 2 while the model tells chosen from rejected no better "
        "than a coin.",
        _draw_loss,
        lambda facts: _from_to(facts, ("Training loss", "loss"), ("held-out loss", "eval_loss")),
    ),
    Chart(
        "margin",
        "Margin",
        "How much further apart the two answers’ rewards are than in the reference; above zero means learned.",
        _draw_margin,
        lambda facts: _from_to(
            facts, ("Training margin", "rewards/margins"), ("held-out margin", "eval_rewards/margins")
        ),
    ),
    Chart(
        "accuracy",
        "Accuracy",
        "Share of pairs whose chosen answer has the higher reward. It begins at 50 %, a coin toss: at step 0 model and "
        "reference are the same, and every margin is zero.",
        _draw_accuracy,
        lambda facts: _from_to(
            facts, ("Training accuracy", "rewards/accuracies"), ("held-out accuracy", "eval_rewards/accuracies")
        ),
    ),
    Chart(
        "rewards",
        "Rewards",
        "Chosen answers should end above rejected ones. Both may fall: only their distance is trained.",
        _draw_rewards,
        lambda facts: _from_to(facts, ("Chosen reward", "rewards/chosen"), ("rejected reward", "rewards/rejected")),
    ),
    Chart(
        "log-probs",
        "Log-probabilities",
        "Of the whole chosen and rejected answers of each step’s pairs, in nats: lower is less likely. A fall of both "
        "is common; a fall of the chosen ones alone is not.",
        _draw_log_probs,
        lambda facts: _from_to(facts, ("Chosen", "logps/chosen"), ("rejected", "logps/rejected")),
    ),
    Chart(
        "differences",
        "Held-out pairs before and after",
        "How many held-out pairs have which log-probability of chosen minus rejected. Right of zero the model finds "
        "the chosen answer likelier; training moves the curve to the right.",
        _draw_histogram,
        _histogram_words,
    ),
    Chart(
        "verdicts",
        "Verdicts",
        "Tuned against base, answer by answer. The bar under the dot is the 95 % interval; 50 % is a coin toss.",
        _draw_verdicts,
        _verdict_words,
    ),
    Chart(
        "answers",
        "Answers",
        "An answer that the model does not end itself is cut off at the token limit.",
        _draw_answers,
        _answer_words,
    ),
)
"""In the order of the page: those of the training, then two of the answers."""
