"""A matplotlib figure as SVG that lives inside a page: no outside addresses, the page's fonts and colours."""

from __future__ import annotations

import io
import re
from html import escape

from matplotlib.figure import Figure

from dpo_studio.reports.drawing import PALETTE

__all__ = ["inline_svg"]

_NUMBER = re.compile(r"-?\d+\.\d{3,}")
_COORDINATES = re.compile(r' (?:d|x|y|transform|width|height)="[^"]*"')
_NOISE = re.compile(
    r"font-family: [^;\"]*; | transform=\"rotate\(-?0 [^\"]*\"|<style.*?</style>|<metadata>.*?</metadata>", re.DOTALL
)
"""The page's own fonts, turns by nothing, a style sheet that would reach the whole page, and outside addresses."""


def inline_svg(figure: Figure, name: str, title: str, summary: str) -> str:
    """The figure as an `<svg>` element; `name` keeps its ids apart from those of other figures in the page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    body = re.sub(r"\s+", " ", _NOISE.sub("", body)).replace("> <", "><")
    body = _COORDINATES.sub(lambda found: _NUMBER.sub(_rounded, found[0]), body)
    body = _own_ids(body, name).replace("xlink:href", "href")
    width, height = (72 * inches for inches in figure.get_size_inches())
    label = f"<title>{escape(title)}</title><desc>{escape(summary)}</desc>"
    return f'<svg class="chart" role="img" viewBox="0 0 {width:g} {height:g}">{label}{_themed(body.strip())}'


def _rounded(found: re.Match[str]) -> str:
    return f"{float(found[0]):.2f}".rstrip("0").rstrip(".")


def _own_ids(body: str, name: str) -> str:
    used = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', body))
    kept = {one or other for one, other in used}
    body = re.sub(r' id="([^"]+)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in kept else "", body)
    body = body.replace('href="#', f'href="#{name}-')
    return body.replace("url(#", f"url(#{name}-")


def _themed(body: str) -> str:
    """Colours by role, so that the page can give each another value in the dark."""
    for role, colour in PALETTE.items():
        body = body.replace(colour, f"var(--fig-{role}, {colour})")
    return body
