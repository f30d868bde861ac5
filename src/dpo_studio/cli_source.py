"""How a source of pairs is named on the command line: the same options on every verb that reads one."""

from __future__ import annotations

from typing import Annotated, Any, Optional

import typer

__all__ = [
    "Format",
    "Labels",
    "Map",
    "Overwrite",
    "Revision",
    "Rows",
    "Source",
    "Split",
    "source_section",
    "source_section_of",
]

Source = Annotated[str, typer.Argument(help="A file, a folder, bundled:everyday or a Hub dataset id.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
Format = Annotated[str, typer.Option("--format", help="Name of the shape of a row; auto looks at the first rows.")]
Map = Annotated[
    Optional[list[str]],  # noqa: UP045 - typer reads it at run time
    typer.Option("--map", metavar="NAME=COLUMN", help="Which column holds prompt, first, second, label, ..."),
]
Labels = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--label", metavar="MEANING=VALUE", help="What the label's values mean: first=1, second=2, tie=0."),
]
Split = Annotated[Optional[str], typer.Option("--split", help="Which split of a folder or Hub dataset.")]  # noqa: UP045
Rows = Annotated[Optional[int], typer.Option("--rows", min=1, help="A seeded sample of so many rows.")]  # noqa: UP045
Revision = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--revision", help="Branch, tag or commit of a Hub dataset."),
]


def source_section(
    source: str,
    format_: str = "auto",
    map_: list[str] | None = None,
    label: list[str] | None = None,
    split: str | None = None,
    rows: int | None = None,
    revision: str | None = None,
) -> Any:
    """The source that these arguments describe, a `SourceSection`, as `data.train` of a recipe would."""
    from dpo_studio.config import SourceSection

    if not source:
        raise typer.BadParameter("the source is empty", param_hint="SOURCE")
    columns = {name: values[-1] for name, values in _assignments("--map", map_).items()}
    return SourceSection(
        source=source,
        format=format_,
        map=columns,
        label=_assignments("--label", label),
        split=split,
        rows=rows,
        revision=revision,
    )


def source_section_of(option: str, source: str | None, *how: Any) -> Any:
    """The same for a source that is an option; None where it is not given, and then nothing may say how to read it.

    `how`: the arguments of `source_section` that follow the source.
    """
    if source:
        return source_section(source, *how)
    if any(value not in (None, "auto", []) for value in how):
        raise typer.BadParameter(
            "they say how a source is read",
            param_hint=f"--map, --label, --format, --split, --rows or --revision without {option}",
        )
    return None


def _assignments(option: str, given: list[str] | None) -> dict[str, list[str]]:
    """`a=b a=c` -> {a: [b, c]}."""
    found: dict[str, list[str]] = {}
    for text in given or []:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise typer.BadParameter(f"{text!r} is not of the form name=value", param_hint=option)
        found.setdefault(name.strip(), []).append(value)
    return found
