"""What every section of the recipe is: frozen, strict about names, documented field by field."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, field_validator

__all__ = ["Section"]

_LARGEST_WHOLE = 2**53
"""Larger whole numbers are not meaningful counts of steps, tokens or rows, and JSON or float would round some."""


class Section(BaseModel):
    """A part of the recipe: frozen, strict about names, documented field by field."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _plain_value(cls, value: object) -> object:
        """Refuse booleans, which pydantic would read as 1 or 0, and numbers that are too large."""
        if isinstance(value, bool):
            raise ValueError("is not a boolean key (quote the value if it is text)")
        if isinstance(value, int) and abs(value) > _LARGEST_WHOLE:
            raise ValueError(f"is a number beyond {_LARGEST_WHOLE:,}")
        return value
