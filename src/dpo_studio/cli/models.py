"""`dpo models`: its command line."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

__all__ = ["models"]


def models(
    model: Annotated[
        Optional[str],  # noqa: UP045 - typer reads it at run time
        typer.Argument(help="A Hub id, a folder, or a bundled model; without it, all families that were tested."),
    ] = None,
    layout: Annotated[str, typer.Option(help="auto, packed, rows, apart: what the recipe's model.layout asks for.")] = (
        "auto"
    ),
) -> None:
    """What a model gets and why: layout, adapted layers, fast path; without MODEL, the families that were tested."""
    from dpo_studio.console.text import printable
    from dpo_studio.workflows.looking_up import model_lines, table_lines

    for line in table_lines() if model is None else model_lines(model, layout):
        print(printable(line))
