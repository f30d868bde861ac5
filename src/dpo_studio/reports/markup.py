"""The HTML elements of a page. All text is escaped here."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping

from dpo_studio.console.text import printable

__all__ = ["block", "cell_words", "clipped", "esc", "flattened", "page_link", "section", "table"]

_LONGEST = 3000
"""Characters of one text from data or model; ten answers of two models stay far below the page's 600 KB."""
_ROWS = 300


def esc(text: object) -> str:
    """Text for HTML, inside an element or a quoted attribute, with what cannot be seen shown."""
    return html.escape(printable(str(text)), quote=True)


def clipped(text: str, longest: int = _LONGEST) -> str:
    """At most so many characters, and how many there were."""
    return text if len(text) <= longest else f"{text[:longest]}… (the first {longest:,} of {len(text):,} characters)"


def block(text: str) -> str:
    """A text of a person or a model, its lines kept and its direction its own."""
    return f'<div class="text" dir="auto">{esc(clipped(text))}</div>'


def page_link(name: str, text: str) -> str:
    """A link from a report to a page of its run's evaluation."""
    return f'<p class="links"><a href="evaluation/{esc(name)}">{esc(text)}</a></p>'


def section(name: str, title: str, body: str, lead: str = "") -> str:
    """A section with its heading; nothing if there is nothing in it."""
    if not body:
        return ""
    said = f'<p class="lead">{esc(lead)}</p>' if lead else ""
    heading = f'<h2 id="{name}-title">{esc(title)}</h2>'
    return f'<section id="{name}" aria-labelledby="{name}-title">{heading}{said}{body}</section>'


def table(caption: str, rows: Iterable[tuple[object, ...]], columns: tuple[str, ...] = (), *, kind: str = "") -> str:
    """A table whose first column names the row; numbers are right-aligned. Nothing if it has no rows."""
    known = list(rows)
    if not known:
        return ""
    head = "".join(f'<th scope="col"{_place(i, kind)}>{esc(name)}</th>' for i, name in enumerate(columns))
    body = "".join(_row(row, kind) for row in known[:_ROWS])
    if len(known) > _ROWS:
        body += f'<tr><th scope="row">and {len(known) - _ROWS:,} more</th></tr>'
    thead = f"<thead><tr>{head}</tr></thead>" if head else ""
    return (
        f'<div class="table {kind}"><table><caption>{esc(caption)}</caption>{thead}<tbody>{body}</tbody></table></div>'
    )


def _place(column: int, kind: str) -> str:
    return ' class="n"' if column and kind == "numbers" else ""


def _row(row: tuple[object, ...], kind: str) -> str:
    name, *cells = row
    shown = "".join(f"<td{_place(1, kind)}>{esc(clipped(cell_words(cell), 600))}</td>" for cell in cells)
    return f'<tr><th scope="row">{esc(clipped(str(name), 200))}</th>{shown}</tr>'


def cell_words(value: object) -> str:
    """A value of JSON or YAML as one would type it; text as it is."""
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False, default=str)
    except (TypeError, ValueError, RecursionError):  # a date as a key, a value that contains itself
        return str(value)


def flattened(values: Mapping[object, object], under: str = "") -> list[tuple[str, object]]:
    """`{a: {b: 1}}` -> `[("a.b", 1)]`."""
    rows: list[tuple[str, object]] = []
    for key, value in values.items():
        name = f"{under}{key}"
        rows += flattened(value, f"{name}.") if isinstance(value, Mapping) and value else [(name, value)]
    return rows
