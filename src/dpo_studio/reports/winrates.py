"""Win rate by sampling temperature: the DPO paper's figure (arXiv 2305.18290, figure 2 right), and its table."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.ticker import FuncFormatter

from dpo_studio.console.text import one_line, percent
from dpo_studio.reports.drawing import PALETTE, blank, label_ends, save_figure, styled

__all__ = ["MOST_RUNS", "save_winrate_figure", "winrate_markdown"]

Rates = Mapping[str, Any]
"""A run's winrate.json."""

_LOOKS = (("tuned", "o", "solid"), ("base-ink", "s", (0, (6, 2))), ("ink", "^", (0, (2, 1.5))), ("muted", "D", "solid"))
"""Colour, marker and line of each run: apart in lightness and in shape, for grey paper and colour-blind readers."""
MOST_RUNS = len(_LOOKS)
_TERMS_WIDTH = 62
"""Characters of a line above the figure: 5.9 units each, of the 384 that are there; three lines fit."""


def figure_files(file: Path) -> list[Path]:
    """What `save_winrate_figure` writes: a `.png` or `.svg` that `file` ends in is not written twice."""
    stem = file.with_suffix("") if file.suffix in (".png", ".svg") else file
    return [stem.with_name(f"{stem.name}.png"), stem.with_name(f"{stem.name}.svg")]


def save_winrate_figure(runs: Sequence[tuple[str, Rates]], file: Path, *, overwrite: bool = False) -> list[Path]:
    """Draw the runs' win rates by temperature as `file`.png (3x) and .svg; the same bytes for the same numbers.

    Any end of `file` but `.png` and `.svg`, as of `beta-0.1`, is part of its name.
    One run shows its length-controlled win rate next to the plain one; several show the plain one alone, by name.
    """
    with styled():
        figure, axes = blank(height=280, left=56, right=112, top=52, bottom=46)
        axes.grid(axis="y", color=PALETTE["grid"], linewidth=0.8)
        axes.axhline(0.5, color=PALETTE["muted"], linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        ends = [([0.5], "as good as\nthe reference" if len(runs) == 1 else "reference", "muted")]
        if len(runs) == 1:
            rows = runs[0][1]["temperatures"]
            ends += [(_curve(axes, rows, "win_rate", _LOOKS[0], shift=-1), "win rate", "tuned")]
            controlled = _curve(axes, rows, "length_controlled", _LOOKS[1], shift=1, hollow=True)
            ends += [(controlled, "at equal\nlength", "base-ink")]
        else:
            for place, ((name, rates), look) in enumerate(zip(runs, _LOOKS, strict=False)):
                shift = 2 * place - len(runs) + 1
                at = _curve(axes, rates["temperatures"], "win_rate", look, shift=shift)
                ends += [(at, _short(name), look[0])]
        _frame(axes, [row["temperature"] for _, rates in runs for row in rates["temperatures"]])
        label_ends(axes, ends)
        terms = textwrap.fill(_terms(runs), _TERMS_WIDTH)
        axes.text(0, 1.04, terms, transform=axes.transAxes, fontsize=10, color=PALETTE["muted"], va="bottom")
        figure.set_facecolor(PALETTE["surface"])
        files = figure_files(file)
        save_figure(figure, files, dpi=216, overwrite=overwrite)
    return files


def _curve(
    axes: Any, rows: Sequence[Mapping[str, Any]], key: str, look: tuple[Any, ...], *, shift: int, hollow: bool = False
) -> list[float]:
    """One series with its intervals, moved aside a little so that intervals do not cover each other."""
    role, marker, line = look
    span = max((row["temperature"] for row in rows), default=0) or 1.0
    at = [row["temperature"] + 0.008 * shift * span for row in rows]
    values = [row[key] for row in rows]
    ends = [row[f"{key}_ci95"] for row in rows]
    colour, fill = PALETTE[role], PALETTE["surface"] if hollow else PALETTE[role]
    for x, (low, high) in zip(at, ends, strict=True):
        axes.plot([x, x], [low, high], color=colour, linewidth=1.4, solid_capstyle="butt", zorder=3)
        axes.plot([x, x], [low, high], color=colour, linestyle="none", marker="_", markersize=7, markeredgewidth=1.4)
    axes.plot(at, values, color=colour, linewidth=1.8, linestyle=line, marker=marker, markersize=6.5,
              markerfacecolor=fill, markeredgecolor=colour, markeredgewidth=1.6, zorder=4)  # fmt: skip
    return values[-1:]


def _frame(axes: Any, temperatures: Sequence[float]) -> None:
    low, high = axes.get_ylim()
    axes.set_ylim(max(0.0, min(low, 0.4)), min(1.0, max(high, 0.6)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))
    ticks = sorted(set(temperatures))
    if len(ticks) <= 8:
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.margins(x=0.06)
    axes.set_xlabel("sampling temperature", fontsize=11, color=PALETTE["muted"], labelpad=6)


def _terms(runs: Sequence[tuple[str, Rates]]) -> str:
    """What the figure cannot be read without: who judged, against what, on how many prompts."""
    shared = [{_short(str(rates[key]), 28) for _, rates in runs} for key in ("against", "judge", "n_prompts")]
    against, judge, prompts = (" or ".join(sorted(one)) for one in shared)
    return f"win rate against {against}, judged by {judge}, {prompts} prompts"


def _short(name: str, longest: int = 16) -> str:
    shown = one_line(name)
    return shown if len(shown) <= longest else f"{shown[: longest - 1]}…"


_COLUMNS = ("temperature", "win rate", "at equal length", "won / tied / lost", "ended", "tokens", "repetition", "KL")


def winrate_markdown(name: str, rates: Rates) -> str:
    """The table of a run, with its sample sizes in a line above; the reference's number after each `/`."""
    lines = [
        f"# Win rate of {_cell(name)} against {_cell(rates['against'])}",
        "",
        f"Judge: {_cell(rates['judge'])}. {rates['n_prompts']} held-out prompts, at most {rates['max_new_tokens']} new "
        f"tokens, seed {rates['seed']}; 95 % intervals over prompts. What each number means: docs/evaluation.md.",
        "",
        f"| {' | '.join(_COLUMNS)} |",
        f"|{'---|' * len(_COLUMNS)}",
    ]
    lines += [f"| {' | '.join(_row(row))} |" for row in rates["temperatures"]]
    held_out = rates.get("held_out") or {}
    if held_out:
        low, high = held_out["accuracy_ci95"]
        lines += [
            "",
            f"Held-out accuracy {_with_ends(held_out['accuracy'], (low, high))} on {held_out['pairs']} pairs; "
            f"before training {percent(held_out['accuracy_before'])}, the longer answer "
            f"{percent(held_out['longer_wins'])}. " + _calibration(held_out["calibration"]),
        ]
    return "\n".join(lines) + "\n"


def _calibration(found: Mapping[str, Any]) -> str:
    why_not = found.get("left_out")
    return f"No calibration: {why_not}." if why_not else f"Calibration error {found['error']:.3f}."


def _row(row: Mapping[str, Any]) -> list[str]:
    return [
        f"{row['temperature']:g}",
        _with_ends(row["win_rate"], row["win_rate_ci95"]),
        _with_ends(row["length_controlled"], row["length_controlled_ci95"]),
        f"{row['wins']} / {row['ties']} / {row['losses']}",
        f"{percent(row['stop_rate'])} / {percent(row['reference_stop_rate'])}",
        f"{row['mean_tokens']:.0f} / {row['reference_mean_tokens']:.0f}",
        f"{row['repetition']:.3f} / {row['reference_repetition']:.3f}",
        "" if row["kl"] is None else f"{row['kl']:.2f} ({row['kl_ci95'][0]:.2f} to {row['kl_ci95'][1]:.2f})",
    ]


def _with_ends(value: float, ends: Sequence[float]) -> str:
    return f"{percent(value)} ({percent(ends[0])} to {percent(ends[1])})"


def _cell(text: str) -> str:
    return one_line(text).replace("|", "\\|").replace("<", "&lt;")
