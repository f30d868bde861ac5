"""`dpo train`: its command line."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from dpo_studio.cli.options import Anyway, Overrides, RecipeFile, Tracker, talks

if TYPE_CHECKING:
    from dpo_studio.config import RecipeFile as Loaded

__all__ = ["train"]


def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    tracker: Tracker = None,
    save_every: Annotated[Optional[str], typer.Option(help="Steps between checkpoints, or minutes: 10min.")] = None,  # noqa: UP045
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check recipe, data and model; train nothing.")] = False,
    anyway: Anyway = False,
    gpus: Annotated[Optional[int], typer.Option(help="Train on so many GPUs of this machine together.")] = None,  # noqa: UP045
    verify: Annotated[bool, typer.Option("--verify", help="Train a few steps twice; exit 3 if they differ.")] = False,
) -> None:
    """Train a recipe; the same command again continues an unfinished run."""
    from dpo_studio.config import load_recipe

    given = {"run.tracker": tracker, "training.save_every": save_every}
    changes = [*(overrides or []), *(f"{key}={value}" for key, value in given.items() if value)]
    loaded = load_recipe(recipe, changes)  # mistakes are reported before torch is imported, which takes five seconds
    launched = os.environ.get("WORLD_SIZE", "1") != "1"  # a process of several: its launcher has decided how many
    if gpus is not None and not launched and not dry_run:
        _several(gpus, loaded)
    from dpo_studio.workflows.training import check_recipe, train_recipe

    if dry_run:
        check_recipe(loaded, anyway=anyway)
        return
    if verify:
        from dpo_studio.workflows.training.verifying import verify_recipe

        found = verify_recipe(recipe, changes, anyway=anyway)
        if talks():
            print(found.text)
        sys.exit(0 if found.deterministic else 3)
    from dpo_studio.console.text import percent

    result = train_recipe(loaded, anyway=anyway)
    if talks() and {"accuracy", "accuracy_ci95", "accuracy_before", "longer_wins"} <= result.keys():
        low, high = result["accuracy_ci95"]
        print(
            f"held-out accuracy {percent(result['accuracy'])} (95 % interval {percent(low)} to {percent(high)}), "
            f"before {percent(result['accuracy_before'])}, longer answer wins {percent(result['longer_wins'])}"
        )


def _several(gpus: int, loaded: Loaded) -> None:
    """Check the number, and where it is more than one train in so many processes and leave with their exit code."""
    from dpo_studio.console.progress import Progress
    from dpo_studio.runs.folder import RunFolder
    from dpo_studio.workflows.launching import check_gpus, launch

    progress = Progress()
    check_gpus(gpus, progress.say)
    if gpus > 1:
        sys.exit(launch(gpus, sys.argv[1:], RunFolder(loaded.run_folder), progress.say))
