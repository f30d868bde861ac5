"""Rounds of made pairs: win rate over the start (raw and at equal length), KL, length and stop rate, by round."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from dpo_studio.console.text import one_line, percent, significant
from dpo_studio.reports.drawing import PALETTE, save_figure, styled

__all__ = ["draw_rounds", "rounds_table"]

_COLUMNS = (
    *("round", "pairs", "win rate over the start (95 %)", "at equal length (95 %)", "over the round before (95 %)"),
    *("KL, nats", "tokens", "ended"),
)
Rounds = Mapping[str, Any]
"""rounds.json."""


def rounds_table(summary: Rounds) -> str:
    """Markdown, the start in the first row; and why the rounds stopped, if they did."""
    start = summary["start"]
    rows = [("start", "", "", "", "", "", significant(start["mean_tokens"]), percent(start["stop_rate"]))]
    for row in summary["rounds"]:
        gain, first = row["gain"], row["round"] == 1
        rows.append(
            (
                str(row["round"]),
                f"{row['made']['pairs']:,}",
                _with_ends(row, "win_rate"),
                _with_ends(row, "length_controlled"),
                "the start" if first else _with_ends(gain, "win_rate"),
                "–" if row["kl"] is None else significant(row["kl"]),
                significant(row["mean_tokens"]),
                percent(row["stop_rate"]),
            )
        )
    lines = [_COLUMNS, tuple("---" for _ in _COLUMNS), *rows]
    text = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    ended = "" if summary["stopped"] is None else f"\n{one_line(summary['stopped'])}.\n"
    judge = f"\nJudged by {one_line(summary['judge'])}, on held-out prompts that no round was trained on.\n"
    return text + ended + judge


def _with_ends(row: Mapping[str, Any], name: str) -> str:
    value, ends = row[name], row[f"{name}_ci95"]
    if value is None:
        return "–"
    return f"{percent(value)} ({percent(ends[0])} to {percent(ends[1])})"


def draw_rounds(summary: Rounds, folder: Path) -> None:
    """Write rounds.png and rounds.svg: four panels by round, the start at 0."""
    with styled():
        figure = Figure(figsize=(9.4, 5.6), facecolor=PALETTE["surface"])
        FigureCanvasAgg(figure)
        figure.subplots_adjust(left=0.09, right=0.97, top=0.94, bottom=0.09, wspace=0.24, hspace=0.42)
        panels: list[Callable[[Any, Rounds], None]] = [_win_rates, _kl, _tokens, _stop_rate]
        for axes, draw in zip(figure.subplots(2, 2).ravel(), panels, strict=True):
            _plain(axes)
            draw(axes, summary)
            axes.set_xlim(-0.3, len(summary["rounds"]) + 0.3)
        save_figure(figure, [folder / "rounds.png", folder / "rounds.svg"], dpi=200, overwrite=True)


def _plain(axes: Any) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set(color=PALETTE["axis"], linewidth=0.8)
    axes.tick_params(length=0, labelcolor=PALETTE["muted"], labelsize=10, pad=5)
    axes.grid(axis="y", color=PALETTE["grid"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(y=0.15)


def _titled(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11.5, color=PALETTE["ink"])


def _win_rates(axes: Any, summary: Rounds) -> None:
    """Raw and at equal length, with their intervals, beside the line of no difference."""
    _titled(axes, "Win rate over the start")
    axes.axhline(0.5, color=PALETTE["muted"], linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    looks = (("win_rate", "tuned", "o", "raw", -0.04), ("length_controlled", "base-ink", "s", "at equal length", 0.04))
    for name, role, marker, label, aside in looks:
        rows = [row for row in summary["rounds"] if row[name] is not None]
        at = [row["round"] + aside for row in rows]
        for x, row in zip(at, rows, strict=True):
            axes.plot([x, x], row[f"{name}_ci95"], color=PALETTE[role], linewidth=1.4)
        axes.plot([0, *at], [0.5, *(row[name] for row in rows)], color=PALETTE[role], marker=marker, label=label)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))
    axes.legend(frameon=False, fontsize=9, loc="lower right")


def _kl(axes: Any, summary: Rounds) -> None:
    _titled(axes, "KL to the round's reference, nats an answer")
    rows = [row for row in summary["rounds"] if row["kl"] is not None]
    for row in rows:
        axes.plot([row["round"]] * 2, row["kl_ci95"], color=PALETTE["tuned"], linewidth=1.4)
    axes.plot(
        [0, *(row["round"] for row in rows)], [0, *(row["kl"] for row in rows)], color=PALETTE["tuned"], marker="o"
    )


def _tokens(axes: Any, summary: Rounds) -> None:
    _titled(axes, "Mean tokens of an answer")
    _from_start(axes, summary, "mean_tokens")
    axes.set_ylim(bottom=0)


def _stop_rate(axes: Any, summary: Rounds) -> None:
    _titled(axes, "Answers that ended")
    _from_start(axes, summary, "stop_rate")
    axes.set_ylim(0, 1.03)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))


def _from_start(axes: Any, summary: Rounds, name: str) -> None:
    values = [summary["start"][name], *(row[name] for row in summary["rounds"])]
    axes.plot(range(len(values)), values, color=PALETTE["tuned"], marker="o")
