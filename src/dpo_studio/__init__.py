"""DPO Studio: Direct Preference Optimization, measured.

The same functions the command line calls. Nothing heavy is imported until it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "DPO": "objectives",
    "DPOStudioError": "errors",
    "Message": "preferences.pair",
    "Pair": "preferences.pair",
    "Recipe": "config",
    "SourceSection": "config",
    "check_source": "workflows.checking",
    "load_recipe": "config",
    "read_pairs": "preferences.sources",
    "Chat": "workflows.talking",
    "generate_answers": "workflows.talking",
    "run_demo": "workflows.demo",
    "score_pairs": "workflows.scoring",
    "train_recipe": "workflows.training",
}

__all__ = sorted([*_HOMES, "__version__"])


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
