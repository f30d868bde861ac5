"""Checks before a training begins, so that no long work is wasted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from accelerate.tracking import get_available_trackers

from dpo_studio.config import Recipe, RecipeFile
from dpo_studio.errors import RecipeError, RunError, install_hint
from dpo_studio.learning.checkpoints import newest_checkpoint
from dpo_studio.learning.schedule import learning_rate, warmup_steps
from dpo_studio.ranks import Ranks
from dpo_studio.runs.folder import RunFolder

__all__ = [
    "check_no_rounds",
    "check_not_shorter",
    "check_sharding",
    "check_tracker",
    "is_finished",
    "typed_model",
    "warn_of_length",
]


_OF_A_WHOLE_MODEL = 2e-5
"""A learning rate above it is warned of: the DPO paper has 1e-6, Zephyr 5e-7."""


def typed_model(loaded: RecipeFile) -> str:
    """The base as the recipe's author named it."""
    typed = loaded.typed.get("model")
    return str(typed["path"]) if isinstance(typed, dict) and "path" in typed else loaded.recipe.model.path


def check_no_rounds(recipe: Recipe) -> None:
    """Check that the recipe is of one run.

    Raises:
        RecipeError: it is of several rounds.
    """
    if recipe.rounds is not None:
        raise RecipeError("a recipe with rounds makes its pairs itself", hint="`dpo rounds` takes it")


def check_tracker(recipe: Recipe) -> None:
    """Check `run.tracker` first: accelerate only warns of a tracker that is not installed, and tracks nothing.

    Raises:
        RunError: `run.tracker` is not installed.
    """
    tracker = recipe.run.tracker
    if tracker is not None and tracker not in map(str, get_available_trackers()):
        raise RunError(f"run.tracker: {tracker} is not installed", hint=install_hint("trackers"))


def check_sharding(recipe: Recipe, ranks: Ranks) -> None:
    """Check that there are processes to shard over. A run that was trained so is used in one process like any other.

    Raises:
        RunError: there is one process.
    """
    if recipe.model.sharding == "full" and ranks.size == 1:
        raise RunError("model.sharding: full needs several processes", hint="dpo train RECIPE --gpus N")


def check_not_shorter(run: RunFolder, total: int) -> None:
    """`training.max_steps` may be set or removed if the run gets longer; this depends on the number of pairs.

    Raises:
        RunError: the run has finished more steps than it is asked for now.
    """
    checkpoint = newest_checkpoint(run.checkpoints)
    if checkpoint is not None and (done := int(checkpoint.name.removeprefix("step-"))) > total:
        raise RunError(
            f"{run.path} has finished {done} steps, and training.max_steps or epochs now ask for {total}",
            hint="a run can be made longer, not shorter: choose another folder (--set run.folder=NAME)",
        )


def warn_of_length(recipe: Recipe, pairs: int, total: int, warn: Callable[[str], None]) -> None:
    """Warn where `pairs` training pairs in `total` steps are too few for the recipe's settings, or the learning rate is
    not for what is trained."""
    section = recipe.training
    if pairs < section.pairs_per_step:
        warn(
            f"{pairs} training pairs are fewer than training.pairs_per_step, {section.pairs_per_step}: "
            f"every step learns from {pairs}, and is an epoch"
        )
    if recipe.adapter is None and section.learning_rate > _OF_A_WHOLE_MODEL:
        warn(
            f"training.learning_rate {section.learning_rate:g} is an adapter's: a whole model takes 1e-6 to 5e-6, "
            "and forgets what it could with ten times that"
        )
    warmup = warmup_steps(section, total)
    if warmup >= total:
        highest = learning_rate(section, total - 1, total)
        never = "so nothing is learned" if not highest else f"of training.learning_rate {section.learning_rate:g}"
        warn(
            f"training.warmup is {warmup} steps, and the run has {total}: the learning rate gets to {highest:g}, "
            f"{never}; a shorter warm-up (training.warmup: 0) or more training.epochs let it get there"
        )


def is_finished(run: RunFolder, recipe: Recipe, result: dict[str, Any]) -> bool:
    """Whether a run with this result has finished all the steps that the recipe asks for."""
    before = run.recipe()
    same_length = before is not None and (before.training.epochs, before.training.max_steps) == (
        recipe.training.epochs,
        recipe.training.max_steps,
    )
    return same_length and "steps" in result
