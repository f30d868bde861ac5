"""`dpo rounds`: its command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from dpo_studio.cli.options import (
    Anyway,
    Concurrency,
    KeyEnv,
    Overrides,
    Param,
    Price,
    RecipeFile,
    Replies,
    Template,
    Timeout,
    llm_options,
)

__all__ = ["rounds"]


def rounds(
    recipe: RecipeFile,
    overrides: Overrides = None,
    number: Annotated[Optional[int], typer.Option("--rounds", min=1, help="Instead of the recipe's number.")] = None,  # noqa: UP045
    anyway: Anyway = False,
    template: Template = None,
    key_env: KeyEnv = None,
    param: Param = None,
    price: Price = None,
    replies: Replies = None,
    concurrency: Concurrency = 8,
    timeout: Timeout = 120.0,
) -> None:
    """Answer, judge, choose pairs, train, evaluate, and again; the same command continues, one without gain ends it."""
    llm = llm_options(template, key_env, param, price, replies, concurrency, timeout)
    from dpo_studio.config import load_recipe

    loaded = load_recipe(recipe, overrides or [])  # mistakes are reported before torch is imported
    from dpo_studio.workflows.rounds.run import run_rounds

    folder: Path = run_rounds(loaded, number=number, llm=llm, anyway=anyway)
    table = folder / "rounds.md"
    if table.exists():
        print(table.read_text(encoding="utf-8"), end="")
