"""DPO Studio: Direct Preference Optimization, measured.

The same functions the command line calls. Nothing heavy is imported until it is used. A recipe is a file's name, a
dict or a `Recipe`; a source of pairs is a name or a `SourceSection`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what a type checker sees; `_HOMES` is the same list, for the moment each is used
    from dpo_studio.config import Recipe, RecipeFile, SourceSection, load_recipe
    from dpo_studio.errors import DPOStudioError
    from dpo_studio.objectives import DPO
    from dpo_studio.preferences.pair import Message, Pair
    from dpo_studio.preferences.sources import read_pairs
    from dpo_studio.sampling.completion import Completion
    from dpo_studio.workflows.demo import run_demo
    from dpo_studio.workflows.evaluating.run import Evaluation, evaluate_run
    from dpo_studio.workflows.exporting.quantizing import Calibration, quantize_model
    from dpo_studio.workflows.exporting.run import Quantising, export_run
    from dpo_studio.workflows.judging import LLMOptions, check_judge
    from dpo_studio.workflows.making.run import Making, make_pairs
    from dpo_studio.workflows.pairs.checking import check_source
    from dpo_studio.workflows.pairs.data import convert_pairs, split_source
    from dpo_studio.workflows.scoring import score_pairs
    from dpo_studio.workflows.sweeping import run_sweep
    from dpo_studio.workflows.talking import Chat, Sampling, generate_answers
    from dpo_studio.workflows.training import check_recipe, train_recipe

__version__ = "0.1.0"

_HOMES = {
    "DPO": "objectives",
    "Calibration": "workflows.exporting.quantizing",
    "Chat": "workflows.talking",
    "Completion": "sampling.completion",
    "DPOStudioError": "errors",
    "Evaluation": "workflows.evaluating.run",
    "LLMOptions": "workflows.judging",
    "RecipeFile": "config",
    "Making": "workflows.making.run",
    "Message": "preferences.pair",
    "Pair": "preferences.pair",
    "Quantising": "workflows.exporting.run",
    "Recipe": "config",
    "Sampling": "workflows.talking",
    "SourceSection": "config",
    "check_judge": "workflows.judging",
    "check_recipe": "workflows.training",
    "check_source": "workflows.pairs.checking",
    "convert_pairs": "workflows.pairs.data",
    "evaluate_run": "workflows.evaluating.run",
    "export_run": "workflows.exporting.run",
    "generate_answers": "workflows.talking",
    "load_recipe": "config",
    "make_pairs": "workflows.making.run",
    "quantize_model": "workflows.exporting.quantizing",
    "read_pairs": "preferences.sources",
    "run_demo": "workflows.demo",
    "run_sweep": "workflows.sweeping",
    "score_pairs": "workflows.scoring",
    "split_source": "workflows.pairs.data",
    "train_recipe": "workflows.training",
}

__all__ = [
    "DPO",
    "Calibration",
    "Chat",
    "Completion",
    "DPOStudioError",
    "Evaluation",
    "LLMOptions",
    "Making",
    "Message",
    "Pair",
    "Quantising",
    "Recipe",
    "RecipeFile",
    "Sampling",
    "SourceSection",
    "__version__",
    "check_judge",
    "check_recipe",
    "check_source",
    "convert_pairs",
    "evaluate_run",
    "export_run",
    "generate_answers",
    "load_recipe",
    "make_pairs",
    "quantize_model",
    "read_pairs",
    "run_demo",
    "run_sweep",
    "score_pairs",
    "split_source",
    "train_recipe",
]


if not TYPE_CHECKING:  # a `__getattr__` that mypy sees would make every misspelt name an Any

    def __getattr__(name: str) -> Any:
        if name in _HOMES:
            return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
