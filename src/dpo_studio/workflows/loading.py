"""A MODEL or RUN by name: a base, a run folder, or an adapter folder."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig
from torch import nn

from dpo_studio.config import ModelSection, Recipe
from dpo_studio.errors import RunError, UsageError
from dpo_studio.learning.checkpoints import newest_checkpoint
from dpo_studio.learning.reference import ReferenceChoice
from dpo_studio.models.adapter_settings import base_named_by
from dpo_studio.models.adapters import POLICY, REFERENCE, as_reference, attach_existing, in_eval, read_adapter_config
from dpo_studio.models.bundled import BUNDLED_ID, BUNDLED_MODEL
from dpo_studio.models.folder import open_model
from dpo_studio.models.load import ChatModel, load_chat_model
from dpo_studio.paths import user_path
from dpo_studio.policy.policy import Policy
from dpo_studio.runs.data_digests import date_of, recipe_of
from dpo_studio.runs.folder import RunFolder, is_run
from dpo_studio.scan import read_json

__all__ = ["LoadedModel", "adapter_of", "find_any", "load_any"]


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A policy and its reference in one loaded model."""

    base: ChatModel
    policy: nn.Module
    """With the adapter on; the base itself when there is none."""
    beta: float | None
    """The run's own, None outside a run."""
    adapter: Path | None
    other_reference: str | None = None
    """The run's reference model where that is not the policy's own base; it is not loaded here."""
    reference_adapter: Path | None = None
    """The run's reference adapter."""

    @property
    def adapters(self) -> dict[str, Path]:
        """The folders of the adapters in memory, by their names there."""
        folders = {POLICY: self.adapter, REFERENCE: self.reference_adapter}
        return {name: folder for name, folder in folders.items() if folder is not None}

    def check_reference(self) -> None:
        """Check that the reference can be computed.

        Raises:
            RunError: it is another model.
        """
        if self.other_reference is not None:
            raise _not_loaded(self.other_reference, self.adapter)

    @contextmanager
    def tuned(self, on: bool) -> Iterator[None]:
        """Inside, the model computes as the policy (on) or as its reference (off).

        Raises:
            RunError: its reference is another model.
        """
        if not on:
            self.check_reference()
        with in_eval(self.policy), nullcontext() if on else as_reference(self.policy):
            yield


def load_any(
    name: str,
    *,
    dtype: str | None = None,
    compute: str | None = None,
    with_reference: bool = False,
    today: datetime.date | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> LoadedModel:
    """Load a Hub id, a model folder, a bundled model, a run or an adapter folder.

    `today`: the date that a template may write, None today's; a run has its own.

    Raises:
        ModelError, RunError: not found or unusable; or `with_reference`, a run whose reference is another model.
    """
    changes = {key: value for key, value in (("dtype", dtype), ("compute", compute)) if value is not None}
    folder = _folder(name)
    if is_run(folder):
        load = _load_whole if recipe_of(RunFolder(folder)).adapter is None else _load_run
        return load(RunFolder(folder), changes, with_reference, say)
    if (folder / "adapter_config.json").is_file():
        config = read_adapter_config(folder)
        run = _run_around(folder)
        base_name = _base_of(run, folder, config, name)
        today = today if run is None else date_of(run)
        base = load_chat_model(ModelSection(path=base_name, revision=config.revision, **changes), say=say, today=today)
        return LoadedModel(base, attach_existing(base.model, folder, trainable=False), None, folder)
    base = load_chat_model(ModelSection(path=name, **changes), say=say, today=today)
    return LoadedModel(base, base.model, None, None)


def find_any(name: str, *, with_reference: bool = False, say: Callable[[str], None] = lambda _: None) -> None:
    """Check a name that is loaded later; a Hub model is downloaded.

    Raises:
        ModelError, RunError: nothing is; or `with_reference`, a run whose reference is another model.
    """
    folder = _folder(name)
    if is_run(folder) and recipe_of(RunFolder(folder)).adapter is None:
        _model_of(RunFolder(folder), with_reference)
    elif is_run(folder):
        _look_at(RunFolder(folder), with_reference, lambda _: None)  # reported when it is loaded
    elif not (folder / "adapter_config.json").is_file():
        open_model(name, say=say)


def _model_of(run: RunFolder, with_reference: bool) -> Path:
    """The folder of a whole model that a run has trained.

    Raises:
        RunError: the run is not finished; or `with_reference`, which is another model.
    """
    if not run.result_file.is_file():
        raise RunError(
            f"{run.path} trains a whole model and is not finished: its checkpoints are no models",
            hint="`dpo train` continues it",
        )
    if with_reference:
        raise RunError(
            f"{run.path} has trained a whole model, whose reference is another model and is not loaded",
            hint=f"name {run.model}, a plain model folder; `dpo eval` has --against MODEL",
        )
    return run.model


def _folder(name: str) -> Path:
    if not name:  # as a path it would be the working directory
        raise UsageError("the name of a model is empty", hint="give a folder, a Hub id, or a run")
    return user_path(name)


def _load_run(run: RunFolder, changes: dict[str, Any], with_reference: bool, say: Callable[[str], None]) -> LoadedModel:
    recipe, adapter = _look_at(run, with_reference, say)
    base = load_chat_model(recipe.model.model_copy(update=changes), say=say, today=date_of(run))
    policy = Policy.saved(base.model, adapter, trainable=False)
    reference = ReferenceChoice.of(recipe)
    reference.load_beside(policy)
    return LoadedModel(base, policy.model, recipe.objective.beta, adapter, reference.model, reference.beside)


def _load_whole(
    run: RunFolder, changes: dict[str, Any], with_reference: bool, say: Callable[[str], None]
) -> LoadedModel:
    """Its reference is the model before the first step, which is another one now."""
    recipe, folder = recipe_of(run), _model_of(run, with_reference)
    section = recipe.model.model_copy(update={"path": str(folder), "revision": None, **changes})
    base = load_chat_model(section, say=say, today=date_of(run))
    return LoadedModel(base, base.model, recipe.objective.beta, None, recipe.reference.model or recipe.model.path)


def _look_at(run: RunFolder, with_reference: bool, say: Callable[[str], None]) -> tuple[Recipe, Path]:
    """(its recipe, its adapter).

    Raises:
        RunError: it has no adapter yet; or `with_reference`, its reference is another model.
    """
    recipe = recipe_of(run)
    adapter = adapter_of(run, say)
    other = ReferenceChoice.of(recipe).model
    if with_reference and other is not None:
        raise _not_loaded(other, adapter)
    return recipe, adapter


def adapter_of(run: RunFolder, say: Callable[[str], None]) -> Path:
    """The run's final adapter, else its newest checkpoint's.

    Raises:
        RunError: there is neither.
    """
    if recipe_of(run).adapter is None:
        raise RunError(
            f"{run.path} has trained a whole model: there is no adapter",
            hint=f"the result is {run.model}, a plain folder",
        )
    if run.result_file.is_file():  # without it, an adapter that is there is not the final one: the run was made longer
        return run.adapter
    checkpoint = newest_checkpoint(run.checkpoints, say)
    if checkpoint is None:
        raise RunError(f"{run.path} has no adapter and no checkpoint yet", hint="`dpo train` continues it")
    say(f"{run.path} is unfinished: using {checkpoint.name}")
    return checkpoint / "adapter"


def _not_loaded(reference: str, adapter: Path | None) -> RunError:
    return RunError(
        f"the run's reference is another model ({reference}), which is not loaded",
        hint=f"name {adapter} instead of the run, for then its base is the reference; `dpo eval` has --against MODEL",
    )


def _run_around(folder: Path) -> RunFolder | None:
    """The run that an adapter folder, perhaps a checkpoint's, belongs to."""
    return next((RunFolder(parent) for parent in list(folder.resolve().parents)[:3] if is_run(parent)), None)


def _base_of(run: RunFolder | None, folder: Path, config: LoraConfig, name: str) -> str:
    """The base an adapter names.

    A run or its checkpoint knows where that is, and an export whether it was the bundled model. Elsewhere a relative
    folder is looked for beside the adapter, then in the working directory.
    """
    if run is not None and (recipe := run.recipe()) is not None:
        return recipe.model.path
    named = base_named_by(config.base_model_name_or_path, config.revision, name)
    if named == BUNDLED_ID and read_json(folder / "export.json").get("trained_on") == BUNDLED_MODEL:
        return BUNDLED_MODEL
    beside = folder / named
    return str(beside) if named.startswith(".") and beside.is_dir() else named
