"""The result of a sweep: how much each setting gained, and how far it moved from the reference.

The axes say what they are. From the policy's own samples, where an evaluation has been: KL to the reference, and win
rate (Rafailov et al. 2023, arXiv 2305.18290, figure 2 left). From held-out pairs, always: accuracy, against how far the
log-probs of their answers have moved. That distance is not a KL: the answers are not the policy's own, and a policy may
leave its reference where no held-out answer is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from dpo_studio.console.text import count, percent, printable, significant
from dpo_studio.reports.drawing import PALETTE, save_figure, styled
from dpo_studio.runs.facts import RunFacts, finite, interval, read_run, share
from dpo_studio.runs.health import health_of

__all__ = ["Measured", "draw_frontier", "frontier_table", "measure"]

_SAMPLED_AT = 1.0
"""The temperature at which samples are the policy's own distribution, so that their log-ratios estimate its KL."""
_COLOURS = ("#1f5fbf", "#cd7b24", "#0f8a6a", "#a3281f", "#7b4fb5", "#5b6574", "#8f7a00", "#1f87a6")
_MARKERS = "osD^vPX*"
"""A run keeps its colour and its marker in both panels; the ninth begins again with dashes."""


@dataclass(frozen=True)
class Sampled:
    """A run against its reference, from its own samples."""

    temperature: float
    kl: float
    """Mean log-ratio of whole answers to the reference, in nats."""
    kl_ci95: tuple[float, float] | None
    win_rate: float | None
    """None where the run was compared with something else than its reference: that is another axis."""
    win_rate_ci95: tuple[float, float] | None


@dataclass(frozen=True)
class Measured:
    """The measurements of one run of a sweep."""

    name: str
    steps: int
    accuracy: float | None
    """On held-out pairs, at the end."""
    accuracy_ci95: tuple[float, float] | None
    margin: float | None
    """Mean reward margin on held-out pairs: in units of the run's own beta."""
    loss: float | None
    path: tuple[tuple[float, float, float], ...]
    """(step, distance, accuracy) of each held-out evaluation: mean |log-ratio| of an answer in nats."""
    sampled: Sampled | None
    health: tuple[str, ...]
    """Names of what the detectors found."""
    stopped: str | None = None
    """Why the run stopped itself, if it did."""

    def to_plain(self) -> dict[str, Any]:
        """The measurement as in sweep.json."""
        path = [{"step": step, "distance": distance, "accuracy": accuracy} for step, distance, accuracy in self.path]
        return vars(self) | {"path": path, "sampled": None if self.sampled is None else vars(self.sampled)}


def measure(folder: Path, name: str, stopped: str | None = None) -> Measured:
    """One run's numbers, from its result, its curve, and its evaluation where there is one."""
    facts = read_run(folder)
    return Measured(
        name=name,
        steps=int(max(facts.series("step")[1], default=0.0)),
        accuracy=share(facts.result, "accuracy"),
        accuracy_ci95=interval(facts.result, "accuracy_ci95"),
        margin=facts.number("margin"),
        loss=facts.number("held_out_loss"),
        path=tuple(_path(facts)),
        sampled=_sampled(facts),
        health=tuple(finding.name for finding in health_of(facts)),
        stopped=stopped,
    )


def _path(facts: RunFacts) -> list[tuple[float, float, float]]:
    found = []
    for row in facts.metrics:
        step, distance = finite(row, "step"), finite(row, "eval_log_ratios/size")
        accuracy = share(row, "eval_rewards/accuracies")
        if step is not None and distance is not None and accuracy is not None:
            found.append((step, distance, accuracy))
    return found


def _sampled(facts: RunFacts) -> Sampled | None:
    """Of the temperature nearest to 1."""
    known = []
    for row in facts.temperatures:
        temperature, kl = finite(row, "temperature"), finite(row, "kl")
        if temperature is None or kl is None:
            continue
        rate, ends = share(row, "win_rate"), interval(row, "win_rate_ci95")
        if not facts.against_reference:
            rate, ends = None, None
        known.append(Sampled(temperature, kl, interval(row, "kl_ci95"), rate, ends))
    return min(known, key=lambda sampled: abs(sampled.temperature - _SAMPLED_AT), default=None)


# The table

_COLUMNS = (
    "run",
    "steps",
    "held-out accuracy (95 %)",
    "held-out loss",
    "reward margin",
    "moved, nats an answer",
    "win rate (95 %)",
    "KL, nats",
    "run health",
)


def frontier_table(runs: Sequence[Measured]) -> str:
    """Markdown: a row a run, and what the columns mean."""
    rows = [_COLUMNS, ("---",) * len(_COLUMNS), *map(_cells, runs)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    temperatures = sorted({run.sampled.temperature for run in runs if run.sampled is not None})
    sampled = (
        f"Win rate and KL to the reference are of the policy's own answers at temperature "
        f"{', '.join(f'{heat:g}' for heat in temperatures)}."
        if temperatures
        else "Win rate and KL need samples: `dpo eval` on a run, then the same sweep again."
    )
    meaning = (
        "Moved: the mean |policy - reference log-prob| of a held-out answer, a distance on given answers, not the KL "
        "to the reference. Loss and reward margin are in units of each run's own beta: compare them at one beta only."
    )
    return f"{table}\n\n{meaning} {sampled}\n"


def _cells(run: Measured) -> tuple[str, ...]:
    sampled = run.sampled
    moved = run.path[-1][1] if run.path else None
    return (
        printable(run.name).replace("|", "\\|").replace("\n", " "),
        count(run.steps) if run.stopped is None else f"{count(run.steps)}, then stopped itself",
        _with_interval(run.accuracy, run.accuracy_ci95),
        _or_dash(run.loss),
        _or_dash(run.margin),
        _or_dash(moved),
        _with_interval(sampled.win_rate, sampled.win_rate_ci95) if sampled else "–",
        _or_dash(sampled.kl if sampled else None),
        ", ".join(run.health) or "nothing found",
    )


def _with_interval(value: float | None, ends: tuple[float, float] | None) -> str:
    if value is None:
        return "–"
    return percent(value) if ends is None else f"{percent(value)} ({percent(ends[0])[:-2]}–{percent(ends[1])})"


def _or_dash(value: float | None) -> str:
    return "–" if value is None else significant(value)


# The figure


def draw_frontier(runs: Sequence[Measured], folder: Path) -> list[Path]:
    """Write frontier.png and frontier.svg; nothing if no run has been evaluated."""
    panels: list[Callable[..., None]] = []
    panels += [_draw_sampled] if any(run.sampled and run.sampled.win_rate is not None for run in runs) else []
    panels += [_draw_held_out] if any(run.path for run in runs) else []
    if not panels:
        return []
    with styled():
        figure = _figure(runs, panels)
        files = [folder / "frontier.png", folder / "frontier.svg"]
        save_figure(figure, files, dpi=200, overwrite=True)
    return files


def _figure(runs: Sequence[Measured], panels: Sequence[Callable[..., None]]) -> Any:
    width = 4.7 * len(panels)
    longest = max(len(_label(run)) for run in runs)
    columns = max(1, min(len(runs), int(width / (0.6 + 0.095 * longest))))  # inches: a line with its marker, a letter
    legend = 0.24 * -(-len(runs) // columns)
    height = 3.5 + legend
    figure = Figure(figsize=(width, height), facecolor=PALETTE["surface"])
    FigureCanvasAgg(figure)
    figure.subplots_adjust(
        left=0.8 / width, right=1 - 0.2 / width, top=1 - 0.4 / height, bottom=(0.66 + legend) / height, wspace=0.28
    )
    for axes, draw in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _plain(axes)
        for number, run in enumerate(runs):
            draw(axes, run, _look(number))
        axes.axhline(0.5, color=PALETTE["muted"], linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
        axes.set_ylim(top=min(1.02, axes.get_ylim()[1]))
    named = axes.get_legend_handles_labels()
    figure.legend(*named, loc="lower center", ncols=columns, frameon=False, fontsize=10)
    return figure


def _label(run: Measured) -> str:
    """`objective.beta=0.1` -> `beta=0.1`: the sections are in the table."""
    return printable(re.sub(r"(^|,)[\w.]*\.(?=\w+=)", r"\1", run.name).replace(",", ", "))


def _plain(axes: Any) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set(color=PALETTE["axis"], linewidth=0.8)
    axes.tick_params(length=0, labelcolor=PALETTE["muted"], labelsize=10, pad=5)
    axes.grid(axis="y", color=PALETTE["grid"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))
    axes.margins(x=0.06, y=0.12)


def _look(number: int) -> dict[str, Any]:
    again = number // len(_COLOURS)
    return {
        "color": _COLOURS[number % len(_COLOURS)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "linestyle": "solid" if again == 0 else (0, (4 - min(again, 3), 2)),
        "markersize": 7,
        "markeredgecolor": PALETTE["surface"],
    }


def _draw_held_out(axes: Any, run: Measured, look: dict[str, Any]) -> None:
    """A line through the evaluations of one run, with the interval of its last."""
    axes.set_title("On held-out pairs", loc="left", fontsize=11.5, color=PALETTE["ink"])
    axes.set_xlabel("mean |log-ratio| of a held-out answer, nats (not a KL)", fontsize=10, color=PALETTE["muted"])
    axes.set_ylabel("accuracy", fontsize=10, color=PALETTE["muted"])
    if not run.path:
        axes.plot([], [], label=_label(run), **look)
        return
    _, far, right = zip(*run.path, strict=True)
    axes.plot(far, right, linewidth=1.4, clip_on=False, **(look | {"markersize": 4}))
    axes.plot(far[-1:], right[-1:], linewidth=1.4, label=_label(run), clip_on=False, zorder=4, **look)
    if run.accuracy_ci95 is not None and run.accuracy is not None:
        low, high = run.accuracy_ci95
        axes.plot([far[-1]] * 2, [low, high], color=look["color"], linewidth=1.2, alpha=0.55)


def _draw_sampled(axes: Any, run: Measured, look: dict[str, Any]) -> None:
    """One point a run: its final adapter."""
    axes.set_title("From the policy's own answers", loc="left", fontsize=11.5, color=PALETTE["ink"])
    axes.set_xlabel("KL to the reference, nats an answer", fontsize=10, color=PALETTE["muted"])
    axes.set_ylabel("win rate against the reference", fontsize=10, color=PALETTE["muted"])
    sampled = run.sampled
    if sampled is None or sampled.win_rate is None:
        axes.plot([], [], label=_label(run), **look)
        return
    if sampled.win_rate_ci95 is not None:
        axes.plot([sampled.kl] * 2, sampled.win_rate_ci95, color=look["color"], linewidth=1.4)
    if sampled.kl_ci95 is not None:
        axes.plot(sampled.kl_ci95, [sampled.win_rate] * 2, color=look["color"], linewidth=1.4)
    axes.plot([sampled.kl], [sampled.win_rate], label=_label(run), **look)
