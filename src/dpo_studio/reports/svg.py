"""A matplotlib figure as SVG that lives inside a page: no outside addresses, the page's fonts and colours."""

from __future__ import annotations

import io
import re
from html import escape
from html.parser import HTMLParser

from matplotlib.figure import Figure

from dpo_studio.reports.drawing import PALETTE

__all__ = ["embedded_svg", "inline_svg"]

_NUMBER = re.compile(r"-?\d+\.\d{3,}")
_COORDINATES = re.compile(r' (?:d|x|y|transform|width|height)="[^"]*"')
_NOISE = re.compile(
    r"font-family: [^;\"]*; | transform=\"rotate\(-?0 [^\"]*\"|<style.*?</style>|<metadata>.*?</metadata>", re.DOTALL
)
"""The page's own fonts, turns by nothing, a style sheet that would reach the whole page, and outside addresses."""
_SHAPES = {"g", "defs", "path", "text", "tspan", "use", "clippath", "rect", "circle", "line", "polyline", "polygon"}
_ATTRIBUTES = {
    *("id", "d", "x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "r", "rx", "ry", "width", "height", "points", "style"),
    *("transform", "href", "clip-path", "fill", "stroke", "stroke-width", "opacity", "text-anchor"),
}
"""What a figure is made of, in lower case: HTML gives `clippath` its capital back inside an `<svg>`."""


def inline_svg(figure: Figure, name: str, title: str, summary: str) -> str:
    """The figure as an `<svg>` element; `name` keeps its ids apart from those of other figures in the page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    body = svg[svg.index(">", svg.index("<svg")) + 1 :].replace("xlink:href", "href")
    width, height = (72 * inches for inches in figure.get_size_inches())
    return _element(body, name, title, summary, f"{width:g} {height:g}")


def embedded_svg(svg: str, name: str, title: str, summary: str) -> str:
    """A figure from a file, in the same way: its shapes and texts, and nothing else that the file may contain.

    Empty if it is not an SVG with a size.
    """
    figure = _Shapes()
    figure.feed(svg)
    figure.close()
    if figure.size is None or not figure.body:
        return ""
    return _element("".join(figure.body) + "</svg>", name, title, summary, figure.size)


class _Shapes(HTMLParser):
    """Rewrites the known elements and attributes of a figure; unknown ones are dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.body: list[str] = []
        self.size: str | None = None
        self._open: list[str] = []
        self._silent = 0
        """How deep inside an element that is left out."""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "svg":
            box = re.fullmatch(r"0 0 (\d+(?:\.\d+)?) (\d+(?:\.\d+)?)", dict(attrs).get("viewbox") or "")
            self.size = f"{box[1]} {box[2]}" if box and self.size is None else self.size
            return
        self._open.append(tag)
        if self._silent or tag not in _SHAPES:
            self._silent += 1
            return
        known = [(key.removeprefix("xlink:"), value or "") for key, value in attrs]
        kept = [f" {key}={_quoted(value)}" for key, value in known if key in _ATTRIBUTES and _stays_here(key, value)]
        self.body.append(f"<{tag}{''.join(kept)}>")

    def handle_endtag(self, tag: str) -> None:
        if tag not in self._open:
            return
        while self._open:
            closed = self._open.pop()
            if self._silent:
                self._silent -= 1
            else:
                self.body.append(f"</{closed}>")
            if closed == tag:
                return

    def handle_data(self, data: str) -> None:
        if not self._silent and self._open:
            self.body.append(escape(data))

    def close(self) -> None:
        super().close()
        while self._open:
            self.handle_endtag(self._open[-1])


def _stays_here(key: str, value: str) -> bool:
    """Whether an attribute refers to nothing outside of the figure."""
    if key == "href":
        return value.startswith("#")
    return all(target.startswith("url(#") for target in re.findall(r"(?i:url)\(.?", value)) and "\\" not in value


def _quoted(value: str) -> str:
    """An apostrophe may stay: as `&#x27;` its semicolon would end the font's name that `_NOISE` looks for."""
    text = escape(value, quote=False).replace('"', "&quot;")
    return f'"{text}"'


def _element(body: str, name: str, title: str, summary: str, size: str) -> str:
    body = re.sub(r"\s+", " ", _NOISE.sub("", body)).replace("> <", "><")
    body = _COORDINATES.sub(lambda found: _NUMBER.sub(_rounded, found[0]), body)
    label = f"<title>{escape(title)}</title><desc>{escape(summary)}</desc>"
    body = _themed(_own_ids(body, name).strip())
    return f'<svg class="chart" role="img" viewBox="0 0 {size}">{label}{body}'


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
