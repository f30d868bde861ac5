"""What sampling returns for one prompt."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["Completion"]


@dataclass(frozen=True)
class Completion:
    """What generation returns for one prompt."""

    text: str
    """The answer, without its end-of-turn token."""
    ended: bool
    """The model ended its turn itself within the token limit."""
    tokens: int
    """New tokens, the end-of-turn token included."""
    ids: tuple[int, ...] = field(default=(), compare=False, repr=False)
    """The tokens themselves, where a model wrote them: the same text has other encodings."""
    vocabulary: str = field(default="", compare=False, repr=False)
    """Which tokens `ids` are (`ChatEncoder.vocabulary_digest`); empty if unknown."""

    def shown(self) -> dict[str, Any]:
        """The fields in answers.jsonl, for people to read."""
        return {"text": self.text, "ended": self.ended, "tokens": self.tokens}
