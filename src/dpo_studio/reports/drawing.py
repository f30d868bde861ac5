"""How our figures look: colours, axes, curves, and names at the ends of curves.

Colours carry no meaning alone: series are named where they end and differ in line style and in lightness,
so that they stay apart for colour-blind readers and on grey paper.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dpo_studio.runs.facts import Series
from dpo_studio.writing import write_output

__all__ = [
    "PALETTE",
    "blank",
    "held_out_dots",
    "label_ends",
    "line_across",
    "save_figure",
    "step_axes",
    "styled",
    "training_curve",
]

PALETTE = {
    "ink": "#1c2530",
    "muted": "#5b6574",
    "grid": "#e4e8ed",
    "surface": "#fefefe",
    "tuned": "#1f5fbf",
    "base": "#cd7b24",
    "base-ink": "#9a5600",
    "tie": "#8893a1",
    "tie-text": "#1c2531",
    "base-text": "#1c2532",
    "axis": "#b3bcc7",
}
"""Every colour a figure may use, by role; bars and curves have a contrast of 3 or more on the page. The page gives each
role another value in the dark."""

_WIDTH, _HEIGHT = 440, 250  # SVG user units; the page scales them, so text is 12 of 440 wide
_POINTS = 400  # more than this and a curve is thinned: the difference is invisible, and the page stays small

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "dpo-studio",
    "font.family": "DejaVu Sans",
    "font.size": 12,
    "text.color": PALETTE["ink"],
    "axes.unicode_minus": True,
    "path.simplify": True,
}


def save_figure(figure: Figure, files: Sequence[Path], *, dpi: int, overwrite: bool) -> None:
    """Write a .png and an .svg, or one of them; the same bytes for the same figure.

    Raises:
        DPOStudioError: as `writing.write_output`.
    """
    metadata: dict[str, dict[str, Any]] = {".png": {"Software": None}, ".svg": {"Date": None, "Creator": None}}
    drawn = []
    for file in files:
        buffer = io.BytesIO()
        figure.savefig(buffer, format=file.suffix[1:], dpi=dpi, metadata=metadata[file.suffix])
        drawn.append(buffer.getvalue())
    for file, content in zip(files, drawn, strict=True):
        write_output(file, content, overwrite=overwrite)


@contextmanager
def styled() -> Iterator[None]:
    """Our settings over matplotlib's own defaults, whatever the user's matplotlibrc says."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def blank(height: float = _HEIGHT, left: float = 48, right: float = 84, top: float = 12, bottom: float = 34) -> Any:
    """An empty figure with one pair of axes, margins in the units of the figure."""
    figure = Figure(figsize=(_WIDTH / 72, height / 72), facecolor="none")
    FigureCanvasAgg(figure)
    box = (left / _WIDTH, bottom / height, (_WIDTH - left - right) / _WIDTH, (height - top - bottom) / height)
    axes = figure.add_axes(box, facecolor="none")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set(color=PALETTE["axis"], linewidth=0.8)
    axes.tick_params(length=0, labelcolor=PALETTE["muted"], labelsize=11, pad=6)
    axes.set_axisbelow(True)
    return figure, axes


def step_axes() -> Any:
    figure, axes = blank()
    axes.grid(axis="y", color=PALETTE["grid"], linewidth=0.8)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    axes.margins(x=0.02, y=0.08)
    axes.text(1.075, -0.03, "step", transform=axes.transAxes, va="top", fontsize=11, color=PALETTE["muted"])
    return figure, axes


def _smooth(series: Series) -> Series:
    """A Gaussian average over a fortieth of the run, at least two steps; thinned to what can be seen."""
    steps, values = np.asarray(series[0]), np.asarray(series[1])
    at = steps if len(steps) <= _POINTS else np.linspace(steps[0], steps[-1], _POINTS)
    length = float(steps[-1] - steps[0])
    width = max(length / 40, min(2.0, length / 8), 1e-9)
    smoothed = []
    for step in at:
        weights = np.exp(-0.5 * ((steps - step) / width) ** 2)
        smoothed.append(float(weights @ values / weights.sum()))
    return at.tolist(), smoothed


def _thinned(series: Series) -> Series:
    every = -(-len(series[0]) // _POINTS)
    return series[0][::every], series[1][::every]


def training_curve(axes: Any, series: Series, colour: str, *, dashed: bool = False, faint: bool = True) -> list[float]:
    """The training curve: every step faint, their moving average in front. Its last value says where to label it."""
    if not series[0]:
        return []
    if faint:
        axes.plot(*_thinned(series), color=colour, linewidth=0.9, alpha=0.28, solid_joinstyle="round")
    style = (0, (5, 2)) if dashed else "solid"
    at, smoothed = _smooth(series)
    axes.plot(at, smoothed, color=colour, linewidth=2, linestyle=style, marker="o" if len(at) == 1 else None)
    return smoothed[-1:]


def held_out_dots(axes: Any, series: Series, colour: str) -> list[float]:
    """Held-out values: dots with a halo, joined by a thin line."""
    if not series[0]:
        return []
    axes.plot(*series, color=colour, linewidth=0.9, linestyle=(0, (1, 2)))
    axes.plot(*series, color=colour, linestyle="none", marker="o", markersize=7, markeredgecolor=PALETTE["surface"],
              markeredgewidth=1.5, zorder=4, clip_on=False)  # fmt: skip
    return series[1][-1:]


def label_ends(axes: Any, ends: list[tuple[list[float], str, str]]) -> None:
    """Name the series at the right edge, pushed apart where they would touch."""
    first, last = axes.get_xlim()
    if last - first < 1:  # a single step
        axes.set_xlim(first - 1, last + 1)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)  # names follow the curves, they do not move them
    found = [((at[0] - low) / (high - low), text, PALETTE[role]) for at, text, role in ends if at]
    names = sorted(found, key=lambda name: name[0])
    heights = [name[0] for name in names]
    gap = 0.085
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    overshoot = max(0.0, heights[-1] - 1.0) if heights else 0.0
    for height, (_, text, colour) in zip(heights, names, strict=True):
        axes.text(1.03, height - overshoot, text, transform=axes.transAxes, va="center", fontsize=11, color=colour)


def line_across(axes: Any, value: float) -> list[float]:
    axes.axhline(value, color=PALETTE["muted"], linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    return [value]
