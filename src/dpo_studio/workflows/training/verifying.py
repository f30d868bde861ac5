"""`dpo train --verify`: train the first steps twice to see whether this machine is deterministic with this recipe."""

from __future__ import annotations

import datetime
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from dpo_studio.config import RecipeLike, load_recipe
from dpo_studio.console.progress import Progress, Silent
from dpo_studio.learning.checkpoints import newest_checkpoint
from dpo_studio.ranks import Ranks
from dpo_studio.runs.folder import RunFolder
from dpo_studio.workflows.training import run_training

__all__ = ["verify_recipe"]

_CHANGES = ("reference.mode=live", "data.held_out.rows=8", "run.tracker=null")
"""The reference is computed in every step, where trainings can differ in it; a few held-out pairs are enough."""
_TENSORS = ("adapter/adapter_model.safetensors", "optimizer.safetensors")


@dataclass(frozen=True)
class Determinism:
    """Whether two trainings gave the same bits."""

    deterministic: bool
    text: str
    """One line: the setting, and where they first differ if they do."""


def verify_recipe(
    recipe: RecipeLike,
    overrides: Sequence[str] = (),
    *,
    steps: int = 3,
    anyway: bool = False,
    progress: Progress | None = None,
) -> Determinism:
    """Train the recipe's first `steps` steps twice, including loading the model, into temporary folders.

    `anyway`: even on pairs that make a training worthless.

    Raises:
        DPOStudioError: the error at which `dpo train` would stop.
    """
    ranks = Ranks.of_environment()
    shown = (progress or Progress()) if ranks.leads else Progress(Silent())
    with tempfile.TemporaryDirectory(prefix="dpo-verify-") as own, shown, ranks.together():
        scratch = ranks.text_of_first(own)
        today = datetime.date.today()  # one date for both, even across midnight
        runs = [RunFolder(Path(scratch) / name) for name in ("first", "second")]
        for run in runs:
            shown.say(f"training the first {steps} steps, the {run.path.name} time")
            changes = [*overrides, *_CHANGES, f"run.folder={json.dumps(str(run.path))}"]
            loaded = load_recipe(recipe, changes)
            run_training(loaded, shown, anyway=anyway, stop_after=steps, today=today, ranks=ranks)
            ranks.wait()
        return _verdict(*runs)


def _verdict(first: RunFolder, second: RunFolder) -> Determinism:
    environment = json.loads((first.path / RunFolder.ENVIRONMENT).read_text(encoding="utf-8"))
    recipe = first.recipe()
    assert recipe is not None
    setting = f"{environment['device']}, {recipe.model.dtype}, {torch.get_num_threads()} threads"
    steps = sum(line["step"] > 0 for line in first.lines(RunFolder.METRICS))
    one, other = (newest_checkpoint(run.checkpoints) for run in (first, second))
    assert one is not None and other is not None and one.name == other.name  # both stopped after the same step
    weights = _first_tensor(one, other)
    where = _first_number(first, second, unless=weights)
    if not where and not weights:
        same = "every number and every weight is the same bits"
        return Determinism(True, f"deterministic ({setting}): {steps} steps trained twice, {same}")
    return Determinism(False, f"not deterministic ({setting}): the two trainings first differ in {where or weights}")


def _first_number(first: RunFolder, second: RunFolder, *, unless: str) -> str:
    """The first number that differs, by time: held-out pairs before training, then losses and gradient by step.

    Empty if that is a held-out number after training and `unless` names weights that differ: they explain it.
    """
    for one, other in zip_longest(*(run.lines(RunFolder.METRICS) for run in (first, second)), fillvalue={}):
        for key in one | other:
            if one.get(key) != other.get(key):
                if unless and key.startswith("eval_") and one.get("step"):
                    return ""
                step, numbers = one.get("step", other.get("step")), f"{one.get(key)} and {other.get(key)}"
                return f"step {step}, {key}: {numbers} ({_stage(key)})"
    return ""


def _stage(key: str) -> str:
    if key in ("grad_norm", "skipped"):
        return "the backward pass"
    return "a forward pass without gradients" if key.startswith("eval_") else "the forward pass"


def _first_tensor(first: Path, second: Path) -> str:
    for name in _TENSORS:
        tensors: list[dict[str, Any]] = [load_file(folder / name) for folder in (first, second)]
        unlike = [key for key in tensors[0] if not torch.equal(tensors[0][key], tensors[1][key])]
        if unlike:
            furthest = max((tensors[0][key] - tensors[1][key]).abs().max().item() for key in unlike)
            many = f"{len(unlike)} of {len(tensors[0])} tensors, by up to {furthest:.2g}"
            return f"{name} after {first.name}: {unlike[0]} ({many}; no loss differs: backward pass or optimizer)"
    return ""
