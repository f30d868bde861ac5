"""The recipe: its sections, the one reader of recipe files and `--set`, and its error messages.

Importing it imports neither torch nor numpy.
"""

from dpo_studio.config.load import (
    RecipeFile,
    RecipeLike,
    cache_folder,
    load_recipe,
    parse_override,
    validate_recipe,
)
from dpo_studio.config.rounds_section import RoundsSection
from dpo_studio.config.sections import (
    BUNDLED,
    MINUTES,
    AdapterSection,
    DataSection,
    HeldOutSection,
    Layout,
    ModelSection,
    Recipe,
    ReferenceSection,
    SourceLike,
    SourceSection,
    TemplateValue,
    TooLong,
    TrainingSection,
    WeightedSource,
    add_objective,
    as_source,
    recipe_schema,
)
from dpo_studio.config.yaml_text import parse_yaml

__all__ = [
    "BUNDLED",
    "MINUTES",
    "AdapterSection",
    "DataSection",
    "HeldOutSection",
    "Layout",
    "ModelSection",
    "Recipe",
    "RecipeFile",
    "RecipeLike",
    "ReferenceSection",
    "RoundsSection",
    "SourceLike",
    "SourceSection",
    "TemplateValue",
    "TooLong",
    "TrainingSection",
    "WeightedSource",
    "add_objective",
    "as_source",
    "cache_folder",
    "load_recipe",
    "parse_override",
    "parse_yaml",
    "recipe_schema",
    "validate_recipe",
]
