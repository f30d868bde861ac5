"""`dpo sweep`: its command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from dpo_studio.cli.options import Anyway, Overrides, RecipeFile

__all__ = ["sweep"]


def sweep(
    recipe: RecipeFile,
    overrides: Overrides = None,
    out: Annotated[Optional[Path], typer.Option(help="The sweep's folder; default: the run's, with -sweep.")] = None,  # noqa: UP045
    anyway: Anyway = False,
) -> None:
    """Train with every combination of `--set a.b=x,y,z`; runs share a reference, and one table and figure."""
    from dpo_studio.workflows.sweeping import run_sweep

    folder = run_sweep(recipe, overrides or [], out=out, anyway=anyway)
    print((folder / "sweep.md").read_text(encoding="utf-8"), end="")
