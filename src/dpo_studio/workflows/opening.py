"""The models that a recipe names: each folder is opened once, checked before weights are loaded, and loaded from."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dpo_studio.config import ModelSection, Recipe
from dpo_studio.errors import ModelError
from dpo_studio.models.adapters import read_adapter_config
from dpo_studio.models.find import is_on_disk
from dpo_studio.models.folder import ModelFolder, open_model
from dpo_studio.policy.moving_reference import check_movable_settings
from dpo_studio.tokens.chat import ChatEncoder

__all__ = ["check_same_vocabulary", "find_models", "look_at_models", "reference_section"]


@dataclass(frozen=True)
class RecipeModels:
    """The checked folders of a recipe's models."""

    base: ModelFolder
    encoder: ChatEncoder
    """The folder of the base."""
    reference: ModelFolder | None
    """The folder of `reference.model`, where the recipe has one."""


def find_models(recipe: Recipe) -> dict[str, ModelFolder]:
    """Open the models that are on this disk, by the recipe's names for them, before any data is read.

    A name on the Hub is looked up after the data: what it names may take an hour to fetch.

    Raises:
        ModelError: one is missing, unsafe or unsupported; or an adapter is, or cannot move with the reference.
    """
    for adapter in (recipe.model.adapter, recipe.reference.adapter):
        if adapter is not None:
            config = read_adapter_config(Path(adapter))
            if recipe.reference.update_every is not None:
                check_movable_settings(config)
    found: dict[str, ModelFolder] = {}
    for section in _sections(recipe):
        if is_on_disk(section.path):
            folder = found.get(section.path) or open_model(section.path)
            folder.check_base(section)
            found[section.path] = folder
    return found


def look_at_models(
    recipe: Recipe,
    found: Mapping[str, ModelFolder],
    today: datetime.date,
    say: Callable[[str], None] = lambda _: None,
) -> RecipeModels:
    """Every model that the recipe names, checked before weights are loaded; those in `found` are open already.

    `today` is the run's date, which a chat template may write.

    Raises:
        ModelError: one is missing, unsafe or unsupported, or the reference has another vocabulary.
    """
    looked = []
    for section in _sections(recipe):
        folder = found.get(section.path) or open_model(section.path, section.revision, say)
        looked.append((folder, folder.look_over(section, today=today)))
    (base, encoder), *others = looked
    for _, other in others:
        check_same_vocabulary(recipe, encoder, other)
    return RecipeModels(base, encoder, others[0][0] if others else None)


def reference_section(recipe: Recipe, path: str) -> ModelSection:
    """How `reference.model` is loaded: in the base's precision, with its attention."""
    return ModelSection(path=path, dtype=recipe.model.dtype, attention=recipe.model.attention)


def check_same_vocabulary(recipe: Recipe, base: ChatEncoder, other: ChatEncoder) -> None:
    """Check that the reference reads the same ids as the base.

    Raises:
        ModelError: it has another vocabulary.
    """
    if other.vocabulary() != base.vocabulary():
        raise ModelError(f"reference.model {recipe.reference.model} has another vocabulary than {recipe.model.path}")


def _sections(recipe: Recipe) -> list[ModelSection]:
    """The base's, and `reference.model`'s where there is one."""
    other = recipe.reference.model
    return [recipe.model] if other is None else [recipe.model, reference_section(recipe, other)]
