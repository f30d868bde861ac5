"""Proof that what answers there is what was trained: the consumer's log-probs of held-out answers beside the run's.

For some prompts: the log-prob of the chosen answer in the merged model (transformers, fp32), in the consumer, and in
the base that was trained from; whether the consumer reads the chat as the same ids; whether it stops where a turn ends;
its first greedy tokens. The consumer passes if it is as near to the run as its type's rounding explains and at least
five times nearer to the run than to the base.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

__all__ = ["Parity", "PromptParity"]

_BOUNDS = {"f32": 0.002, "f16": 0.005, "bf16": 0.02, "q8_0": 0.05, "q4_k_m": 0.3}
"""Nats a token, pooled over the prompts, by the type of the file's matrices."""
_WORST = 4
"""How many times the bound a single prompt may be off."""
_NEARER = 5
"""How many times nearer to the run than to the base."""


@dataclass(frozen=True)
class PromptParity:
    """One held-out prompt and its chosen answer."""

    tokens: int
    """Of the answer."""
    run: float
    """The sum of the answer's log-probs, nats: in the run's merged model."""
    consumer: float
    base: float
    chat: str | None
    """How the consumer reads the chat otherwise; None if it is the same ids."""
    greedy: int
    """First tokens of the greedy answer that are the same."""


@dataclass(frozen=True)
class Parity:
    """A consumer beside the run."""

    consumer: str
    type: str
    prompts: list[PromptParity]
    stops: bool
    """Whether the consumer stops where a turn ends."""

    @property
    def apart(self) -> float:
        """Nats a token between consumer and run, pooled."""
        return self._pooled("run")

    @property
    def from_base(self) -> float:
        """Nats a token between consumer and base, pooled."""
        return self._pooled("base")

    @property
    def too_weak_to_tell(self) -> bool:
        """Whether run and base are so near each other that nobody could be five times nearer to one."""
        moved = sum(abs(one.run - one.base) for one in self.prompts) / self._tokens
        return moved <= (_NEARER + 1) * _BOUNDS[self.type]

    def misses(self) -> list[str]:
        """Why the export fails, each with its likely cause; empty if it passes."""
        found = []
        if others := [one.chat for one in self.prompts if one.chat is not None]:
            found.append(
                f"{self.consumer} reads {len(others)} of {len(self.prompts)} chats otherwise ({_cause(others)})"
            )
        if not self.stops:
            found.append(f"{self.consumer} does not stop at the end of a turn: another token ends generation there")
        worst = max(abs(one.run - one.consumer) / one.tokens for one in self.prompts)
        bound = _BOUNDS[self.type]
        near_base = not self.too_weak_to_tell and self.from_base < _NEARER * self.apart
        if near_base and self.from_base <= self.apart:
            found.append(
                f"{self.consumer} answers as the base does ({self.from_base:.3g} nats a token from it, "
                f"{self.apart:.3g} from the run): the adapter is not in the file"
            )
        elif self.apart > bound or worst > _WORST * bound or near_base:
            found.append(
                f"log-probs of the chosen answers are {self.apart:.3g} nats a token from the run's, {worst:.3g} for "
                f"one prompt, {self.from_base:.3g} from the base's; {self.type} explains {bound:g}: "
                "weights or settings differ"
            )
        return found

    def lines(self) -> list[str]:
        """The table for people."""
        same = sum(one.chat is None for one in self.prompts)
        head = f"{'answer tokens':>13} {'run':>9} {self.consumer:>9} {'base':>9}  same chat  same greedy tokens"
        rows = [
            f"{one.tokens:>13} {one.run:>9.2f} {one.consumer:>9.2f} {one.base:>9.2f}  "
            f"{'yes' if one.chat is None else 'no':>9}  {one.greedy}"
            for one in self.prompts
        ]
        weak = "; the adapter is too weak to tell run and base apart" if self.too_weak_to_tell else ""
        verdict = (
            f"{self.consumer}: {self.apart:.4f} nats a token from the run "
            f"({self.type} explains {_BOUNDS[self.type]:g}), {self.from_base:.3f} from the base{weak}; "
            f"{same} of {len(self.prompts)} chats read as the same ids; "
            f"{'stops' if self.stops else 'does not stop'} at the end of a turn"
        )
        return [head, *rows, verdict]

    def content(self) -> dict[str, Any]:
        """For export.json."""
        figures = {"nats_a_token": self.apart, "nats_a_token_from_base": self.from_base}
        return {**asdict(self), **figures, "too_weak_to_tell": self.too_weak_to_tell, "misses": self.misses()}

    @property
    def _tokens(self) -> int:
        return sum(one.tokens for one in self.prompts)

    def _pooled(self, side: Literal["run", "base"]) -> float:
        total = sum(abs((one.run if side == "run" else one.base) - one.consumer) for one in self.prompts)
        return total / self._tokens


def _cause(others: Sequence[str]) -> str:
    """The likely reason why chats are read otherwise."""
    first = others[0]
    numbers = [int(number) for number in re.findall(r"\d+", first)]
    if "tokens instead of" in first and numbers[0] == numbers[1] + 1 and numbers[2] <= 1:
        return f"{first}: BOS is doubled"
    return f"{first}: the chat template or the tokenizer is another one"
