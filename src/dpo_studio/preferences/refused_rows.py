"""Refused rows: counted by reason, the first of each kept as an example, with advice for each reason."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

__all__ = [
    "Refusal",
    "RefusedRows",
]

_TIES = ("tie", "both bad")
_ADVICE = (  # the first whose words are in the reason
    ("identical", "The two answers are the same: drop these rows."),
    ("no label setting names", "Say what each value means: --label first=VALUE (second, tie, both_bad)."),
    ("prompt differs", "The answers repeat another prompt than the column has: mend the rows, or leave prompt out."),
    ("no prompt", "Name the column of the prompt with --map prompt=COLUMN."),
    ("more fields than the header", "A comma, quote or line break in a field is not quoted: write the CSV file again."),
    ("JSON object", "Every line or element is to be one JSON object: mend these rows."),
    ("longer than", "One row this long is rarely a pair: look whether a line break is missing."),
    ("weight", "weight is 1 (learned) or 0 (context), and an answer needs a turn of weight 1."),
    ("tool", "What a run cannot learn is refused: take it out of the rows, or leave these out."),
    ("is empty", "Fill the column in, or drop these rows."),
    ("is missing", "Fill the column in, or drop these rows; if another column contains it, name that with --map."),
    ("is not a number", "Ratings and scores are numbers: mend the rows, or name another column with --map."),
)
_ELSE = "Name the columns with --map, or the shape with --format, if the reason is not what you expect."


@dataclass(frozen=True, slots=True)
class Refusal:
    """A row that is not a pair, and why."""

    row: int
    """Where it stood in its source, from 0."""
    reason: str
    """The same text for the same kind of problem."""
    seen: str = field(default="", compare=False)
    """The value that stood there, as Python writes it, shortened; empty where the reason says it all."""


class RefusedRows:
    """Refusals by reason; of each reason the first is kept, so that memory does not grow with the source."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.first: dict[str, Refusal] = {}

    def add(self, refusal: Refusal) -> None:
        """Add a refused row."""
        self.counts[refusal.reason] += 1
        self.first.setdefault(refusal.reason, refusal)

    def lines(self, most: int | None = None) -> list[str]:
        """`3 x label is missing (row 17)`, the most frequent first; a row's number counts from 0."""
        return [f"{count:,} x {self.described(reason)}" for reason, count in self.counts.most_common(most)]

    def described(self, reason: str) -> str:
        """The reason with the first row it refused and what stood there."""
        first = self.first[reason]
        return f"{reason} (row {first.row}{': ' + first.seen if first.seen else ''})"

    @property
    def only_ties(self) -> bool:
        """Whether nothing but ties was refused: such rows are as they should be, and hold no preference."""
        return bool(self.counts) and all(map(is_tie, self.counts))

    def advice(self) -> str:
        """What to do about the reason that refused the most rows, ties apart."""
        reasons = [reason for reason, _ in self.counts.most_common()]
        grave = [reason for reason in reasons if not is_tie(reason)]
        return advice((grave or reasons or [""])[0])


def is_tie(reason: str) -> bool:
    """Whether people found neither answer better: no mistake in the row or in its mapping."""
    return reason.startswith(_TIES)


def advice(reason: str) -> str:
    """What to do about rows refused for this reason."""
    if is_tie(reason):
        return "Nothing: a tie has no preference to learn. `dpo judge check` counts ties in."
    return next((todo for words, todo in _ADVICE if words in reason), _ELSE)
