"""Where a run may be: in a folder of its own, outside everything that it reads and outside other runs."""

from __future__ import annotations

from dpo_studio.cache import limit_bytes
from dpo_studio.config import RecipeFile
from dpo_studio.writing import check_run_place

__all__ = ["check_place"]


def check_place(loaded: RecipeFile) -> None:
    """Before anything is read or made.

    Raises:
        UsageError: `$DPO_STUDIO_CACHE_GIB` is not a number.
        RunError: `run.folder` is in the model's, an adapter's or a source's folder, in any other model or in a run.
    """
    recipe = loaded.recipe
    check_run_place(
        loaded.run_folder,
        [
            recipe.model.path,
            recipe.model.adapter,
            recipe.model.chat_template,
            recipe.reference.model,
            recipe.reference.adapter,
            *(one.source for one in recipe.data.sources),
            recipe.data.held_out.source,
        ],
    )
    limit_bytes()  # an invalid value is reported now, not when the model is loaded
