"""Duplicate pairs, contradictory pairs, and prompts on both sides of a split."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dpo_studio.doctor.findings import EXAMPLES, Example, Finding, level_of
from dpo_studio.preferences.minhash import K, Signatures, filled, nearest, signature
from dpo_studio.preferences.pair import Message, Pair, prompt_key

__all__ = ["FEW_HELD_OUT", "Duplicates", "text_of_turns"]

REMEMBERED = 200_000
"""Pairs that are searched for near duplicates: 512 bytes for both answers and as much for a new prompt, 200 MB in all.
Exact ones are found among all pairs, at some 250 bytes each."""

FEW_HELD_OUT = 20
"""With fewer held-out pairs a share of them is too imprecise: 19 of 20 right is anything from 76 to 99 % (Wilson)."""

_SEEN_TWICE = "It counts once more for each copy: the run memorises it, and sees fewer preferences than there are rows."
_FLATTERED = "Held-out numbers then measure memorisation, and are too good."


@dataclass
class _Tally:
    """The rows of what was counted, and the first of it."""

    rows: array[int] = field(default_factory=lambda: array("Q"))
    examples: list[Example] = field(default_factory=list)

    @property
    def count(self) -> int:
        return len(self.rows)

    def add(self, row: int, text: str) -> None:
        self.rows.append(row)
        if len(self.examples) < EXAMPLES:
            self.examples.append(Example(row, text))


class Duplicates:
    """Reads every training pair, then every held-out pair, then returns its findings."""

    def __init__(self) -> None:
        self.pairs = 0
        self._row_of_pair: dict[bytes, int] = {}
        self._number_of_prompt: dict[bytes, int] = {}
        self._copies, self._opposites, self._leaked = _Tally(), _Tally(), _Tally()
        self._prompt_rows: list[int] = []
        self._prompt_signatures: list[Signatures] = []
        self._answer_rows: list[int] = []
        self._answer_prompts: list[int] = []
        """The number of each one's prompt."""
        self._answer_signatures: list[Signatures] = []
        """Of both answers together; pairs that are copies or opposites of another are left out."""
        self._held_out = 0
        self._held_out_rows: list[int] = []
        self._held_out_signatures: list[Signatures] = []

    @property
    def prompts(self) -> int:
        """Different prompts among the pairs to train on."""
        return len(self._number_of_prompt)

    @property
    def saw_all(self) -> bool:
        """Whether near duplicates were searched among all pairs."""
        return self.pairs <= REMEMBERED

    def see(self, pair: Pair) -> None:
        """A pair to train on."""
        self.pairs += 1
        prompt, chosen, rejected = (_key(turns) for turns in (pair.prompt, pair.chosen, pair.rejected))
        number = self._number_of_prompt.setdefault(prompt, len(self._number_of_prompt))
        same, opposite = _joined(prompt, chosen, rejected), _joined(prompt, rejected, chosen)
        if (row := self._row_of_pair.get(same)) is not None:
            self._copies.add(pair.row, f"the same pair as row {row}")
            return
        contradicted = self._row_of_pair.get(opposite)
        self._row_of_pair[same] = pair.row  # after looking: answers that differ in white space are their own opposite
        if contradicted is not None:
            self._opposites.add(pair.row, f"row {contradicted} prefers the other answer")
        elif self.saw_all:
            self._remember(pair, number)

    def _remember(self, pair: Pair, number: int) -> None:
        if number == len(self._prompt_rows):
            self._prompt_rows.append(pair.row)
            self._prompt_signatures.append(signature(text_of_turns(pair.prompt)))
        both = np.minimum(signature(text_of_turns(pair.chosen)), signature(text_of_turns(pair.rejected)))
        self._answer_rows.append(pair.row)
        self._answer_prompts.append(number)
        self._answer_signatures.append(both)

    def see_held_out(self, pair: Pair) -> None:
        """A pair to measure on."""
        self._held_out += 1
        if _key(pair.prompt) in self._number_of_prompt:
            self._leaked.add(pair.row, text_of_turns(pair.prompt))
        elif len(self._held_out_rows) < REMEMBERED:
            self._held_out_rows.append(pair.row)
            self._held_out_signatures.append(signature(text_of_turns(pair.prompt)))

    def findings(self) -> list[Finding]:
        """The findings, once all pairs were seen."""
        prompts_NK = _matrix(self._prompt_signatures)
        twins = nearest(prompts_NK)
        found = [self._same_twice(), self._contradictions(), self._near_pairs(twins), self._near_prompts(twins)]
        return [*found, self._leak(), self._near_leak(prompts_NK)] if self._held_out else found

    def _same_twice(self) -> Finding:
        copies = self._copies
        return Finding(
            "duplicate-pairs",
            "pairs that occur twice",
            copies.count,
            self.pairs,
            level_of(copies.count, self.pairs, warning=0.02),
            does=_SEEN_TWICE,
            todo="Keep one copy of each.",
            examples=tuple(copies.examples),
            rows=copies.rows,
        )

    def _contradictions(self) -> Finding:
        opposites = self._opposites
        return Finding(
            "opposite-pairs",
            "pairs that occur in both orders",
            opposites.count,
            self.pairs,
            level_of(opposites.count, self.pairs, warning=0.005, stop=0.1),
            does="The two pull in opposite directions: neither is learned, and accuracy on them cannot pass one half.",
            todo="Keep the one you trust or neither, and look for a source whose label is read the wrong way round.",
            examples=tuple(opposites.examples),
            rows=opposites.rows,
        )

    def _near_pairs(self, prompt_twins: NDArray[np.int64]) -> Finding:
        groups = _groups(prompt_twins)
        numbers = np.array(self._answer_prompts, np.int64)
        twins = nearest(_matrix(self._answer_signatures), groups_N=groups[numbers])
        rows = self._answer_rows
        examples = [Example(rows[at], f"nearly the same as row {rows[twins[at]]}") for at in _first(twins)]
        count = int((twins >= 0).sum())
        return Finding(
            "near-duplicate-pairs",
            "pairs that nearly repeat another",
            count,
            len(rows),
            level_of(count, len(rows), warning=0.05),
            does=f"Prompt and answers share four fifths of their text with an earlier pair. {_SEEN_TWICE}",
            todo="Keep one of each kind, unless the variations are meant.",
            examples=tuple(examples),
            rows=[rows[at] for at in np.flatnonzero(twins >= 0)],
        )

    def _near_prompts(self, twins: NDArray[np.int64]) -> Finding:
        rows = self._prompt_rows
        examples = [Example(rows[at], f"its prompt is nearly that of row {rows[twins[at]]}") for at in _first(twins)]
        count = int((twins >= 0).sum())
        return Finding(
            "near-duplicate-prompts",
            "prompts that nearly repeat another",
            count,
            len(rows),
            level_of(count, len(rows), warning=0.1),
            does=f"A split by prompt keeps exact repeats on one side, near ones it does not. {_FLATTERED}",
            todo="Hold out another source. Short questions in one long instruction look like this and may be meant.",
            examples=tuple(examples),
            rows=[rows[at] for at in np.flatnonzero(twins >= 0)],
        )

    def _leak(self) -> Finding:
        leaked = self._leaked
        return Finding(
            "held-out-leak",
            "held-out prompts that are trained on",
            leaked.count,
            self._held_out,
            level_of(leaked.count, self._held_out, warning=0.0, stop=0.5),
            does=f"{_FLATTERED} `dpo train` drops the training pairs it would share, and trains on fewer.",
            todo="Hold out other prompts, or a share of them: data.held_out.fraction.",
            examples=tuple(leaked.examples),
        )

    def _near_leak(self, prompts_NK: Signatures) -> Finding:
        both_NK = np.concatenate([prompts_NK, _matrix(self._held_out_signatures)])
        twins = nearest(both_NK, known=len(prompts_NK))[len(prompts_NK) :]
        rows = self._held_out_rows
        examples = [
            Example(rows[at], f"nearly the prompt of training row {self._prompt_rows[twins[at]]}")
            for at in _first(twins)
        ]
        count = int((twins >= 0).sum())
        return Finding(
            "held-out-near-leak",
            "held-out prompts that are nearly trained on",
            count,
            self._held_out,
            level_of(count, self._held_out, warning=0.05, stop=0.5 if self._held_out >= FEW_HELD_OUT else None),
            does=_FLATTERED,
            todo="Take them out of one of the two sides.",
            examples=tuple(examples),
        )


def text_of_turns(turns: Sequence[Message]) -> str:
    """The text of the turns, without roles."""
    return turns[0].content if len(turns) == 1 else "\n".join(turn.content for turn in turns)


def _key(turns: tuple[Message, ...]) -> bytes:
    return bytes.fromhex(prompt_key(turns))[:16]


def _joined(prompt: bytes, one: bytes, other: bytes) -> bytes:
    """(8 bytes) two of a million pairs get the same by chance once in 40 million times."""
    return hashlib.sha256(prompt + one + other).digest()[:8]


def _matrix(signatures: list[Signatures]) -> Signatures:
    return filled(np.array(signatures, np.uint32).reshape(-1, K))


def _groups(twins: NDArray[np.int64]) -> NDArray[np.int64]:
    """(N,) a number for each chain of twins, which all lead back to its first text."""
    groups = np.arange(len(twins))
    for at in np.flatnonzero(twins >= 0):
        groups[at] = groups[twins[at]]
    return groups


def _first(twins: NDArray[np.int64]) -> list[int]:
    return [int(at) for at in np.flatnonzero(twins >= 0)[:EXAMPLES]]
