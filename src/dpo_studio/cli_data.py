"""`dpo data ...`: look at pairs, convert them, split them. It routes and prints, as cli.py does."""

from __future__ import annotations

from typing import Annotated, Any, Optional

import typer

__all__ = ["Format", "Labels", "Map", "Source", "app", "source_section"]

app = typer.Typer(
    name="data",
    help="Look at preference pairs of any shape, convert them, split them by prompt.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Source = Annotated[str, typer.Argument(help="A file, a folder, bundled:everyday or a Hub dataset id.")]
Format = Annotated[str, typer.Option(help="Name of the shape of a row; auto looks at the first rows.")]
Map = Annotated[
    Optional[list[str]],  # noqa: UP045 - typer reads it at run time
    typer.Option("--map", metavar="NAME=COLUMN", help="Which column holds prompt, first, second, label, ..."),
]
Labels = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--label", metavar="MEANING=VALUE", help="What the label's values mean: first=1, second=2, tie=0."),
]


@app.callback()
def _data() -> None:
    """Keeps `data` a group of commands while it has only one."""


def source_section(
    source: str, format_: str = "auto", map_: list[str] | None = None, label: list[str] | None = None
) -> Any:
    """The source that these arguments describe, a `SourceSection`, as `data.train` of a recipe would."""
    from dpo_studio.config import SourceSection

    if not source:
        raise typer.BadParameter("the source is empty", param_hint="SOURCE")
    columns = {name: values[-1] for name, values in _assignments("--map", map_).items()}
    return SourceSection(source=source, format=format_, map=columns, label=_assignments("--label", label))


def _assignments(option: str, given: list[str] | None) -> dict[str, list[str]]:
    """`a=b a=c` -> {a: [b, c]}."""
    found: dict[str, list[str]] = {}
    for text in given or []:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise typer.BadParameter(f"{text!r} is not of the form name=value", param_hint=option)
        found.setdefault(name.strip(), []).append(value)
    return found
