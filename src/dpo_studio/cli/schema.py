"""`dpo schema`: its command line."""

from __future__ import annotations

__all__ = ["schema"]


def schema() -> None:
    """The recipe's JSON Schema, for editors."""
    import json

    from dpo_studio.config import recipe_schema

    print(json.dumps(recipe_schema(), indent=2))
