"""Names of hostile cases: their letters and digits, so that a case can be asked for on any command line."""

from __future__ import annotations

import re

__all__ = ["words_of"]


def words_of(case: object) -> str:
    """`{{ 'a' * 10 ** 9 }}` -> `a-10-9`; pytest numbers those that come out alike."""
    return re.sub(r"[^A-Za-z0-9]+", "-", ascii(case)).strip("-")[:50] or "signs"
