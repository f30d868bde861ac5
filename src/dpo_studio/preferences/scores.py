"""The scores that public sets keep beside their answers. Nothing is trained on them; the checks read them."""

from __future__ import annotations

import math

__all__ = ["scores_of"]

_COLUMNS = (
    ("score_chosen", "score_rejected"),  # HuggingFaceH4/ultrafeedback_binarized
    ("chosen_score", "rejected_score"),
    ("chosen-rating", "rejected-rating"),  # Argilla's binarized sets
    ("chosen_rating", "rejected_rating"),
)


def scores_of(row: object) -> tuple[float, float] | None:
    """The chosen and the rejected answer's score; None where the row has not both as finite numbers."""
    if not isinstance(row, dict):
        return None
    for names in _COLUMNS:
        chosen, rejected = (_number(row.get(name)) for name in names)
        if chosen is not None and rejected is not None:
            return chosen, rejected
    return None


def _number(value: object) -> float | None:
    """The value as a float; numbers come as text from CSV files."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):  # no number, or an integer of 400 digits
        return None
    return number if math.isfinite(number) else None
