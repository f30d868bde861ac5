"""The data doctor's checks of text: one pass over pairs and refusals, then findings, their effect on a run, and advice.

What needs a tokenizer is in `doctor.token_checks`. Memory grows by some 300 bytes a pair, and by 1 KB for the first
200,000 (`duplicates`), never by their text.
"""

from __future__ import annotations

from array import array
from collections import Counter

import numpy as np
from numpy.typing import NDArray

from dpo_studio.doctor.duplicates import REMEMBERED, Duplicates
from dpo_studio.doctor.findings import EXAMPLES, Example, Finding, Histogram, Level, histogram_of, level_of
from dpo_studio.doctor.wording import WORDING
from dpo_studio.preferences.pair import Pair
from dpo_studio.preferences.refused_rows import Refusal, RefusedRows

__all__ = ["TextChecks"]

_OPENING_WORDS = 3
_OPENING_CHARACTERS = 24
_COMMON_OPENING = 0.1
_OPENING_APART = 0.05
"""The least difference in how often the two sides begin alike: a smaller one does not separate them."""
_LEAST_ROWS = 20
"""With fewer pairs a share is too imprecise."""
_LONGER_WINS = 0.7
"""PandaLM's three people chose the longer answer in 66 % of their pairs; more than that is worth a look."""
_SMALL_MARGIN = 0.05
"""Of the range of all scores: half a point on a scale of ten."""


class TextChecks:
    """All checks that read only text. Add all rows, then all held-out pairs, then get the findings."""

    def __init__(self) -> None:
        self.duplicates = Duplicates()
        self.refused = RefusedRows()
        self._counts = [0] * len(WORDING)
        self._examples: list[list[Example]] = [[] for _ in WORDING]
        self._worded: list[array[int]] = [array("Q") for _ in WORDING]
        """The rows of each."""
        self._lengths = array("I"), array("I")
        """Characters of every chosen and every rejected answer."""
        self._scores = array("d"), array("d")
        self._scored = array("I")
        """Which pairs, by their place, the scores are of."""
        self._rows = array("Q")
        self._paired_rows = 0
        """Rows that are a pair or several (`nectar-all`)."""
        self._openings: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
        self._opened_at: dict[str, list[Example]] = {}

    @property
    def pairs(self) -> int:
        """Pairs seen."""
        return len(self._rows)

    @property
    def rows(self) -> int:
        """Rows seen."""
        return self._paired_rows + self.refused.counts.total()

    def refuse(self, refusal: Refusal) -> None:
        """A row that is not a pair."""
        self.refused.add(refusal)

    def see(self, pair: Pair) -> None:
        """A pair to train on."""
        self.duplicates.see(pair)
        for number, check in enumerate(WORDING):
            if (seen := check.look(pair)) is not None:
                self._counts[number] += 1
                self._worded[number].append(pair.row)
                if len(self._examples[number]) < EXAMPLES:
                    self._examples[number].append(Example(pair.row, seen))
        if pair.scores is not None:
            self._scored.append(self.pairs)
            for scores, score in zip(self._scores, pair.scores, strict=True):
                scores.append(score)
        for lengths, turns in zip(self._lengths, (pair.chosen, pair.rejected), strict=True):
            lengths.append(sum(len(turn.content) for turn in turns))
        if self.pairs < REMEMBERED:
            self._note_openings(pair)
        self._paired_rows += not self._rows or self._rows[-1] != pair.row
        self._rows.append(pair.row)

    def see_held_out(self, pair: Pair) -> None:
        """A pair to measure on."""
        self.duplicates.see_held_out(pair)

    def _note_openings(self, pair: Pair) -> None:
        for counts, turns in zip(self._openings, (pair.chosen, pair.rejected), strict=True):
            if opening := _opening(turns[-1].content):
                counts[opening] += 1
                examples = self._opened_at.setdefault(opening, [])
                if len(examples) < EXAMPLES:
                    examples.append(Example(pair.row, turns[-1].content[:120]))

    def findings(self) -> list[Finding]:
        """The findings of all checks, in the order of the report."""
        found = [self._refused_rows()] if self.rows else []
        if not self.pairs:
            return found
        found += self.duplicates.findings()
        found += [self._length_bias(), self._same_opening()]
        found += [self._wording(number) for number in range(len(WORDING))]
        return found + (self._score_findings() if len(self._scored) else [])

    def histograms(self) -> list[Histogram]:
        """Lengths of the answers, and margins of the scores where there are some."""
        if not self.pairs:
            return []
        chosen, rejected = map(_floats, self._lengths)
        title = "Length of an answer in characters"
        found = [histogram_of("characters", title, least=0.0, chosen=chosen, rejected=rejected)]
        if len(self._scored):
            found.append(histogram_of("margins", "Score of chosen minus rejected", margin=self._margins()))
        return found

    def _refused_rows(self) -> Finding:
        """Ties are no reason to warn: such rows are valid, and have no preference."""
        counts, first = self.refused.counts, self.refused.first
        count = counts.total()
        reasons = [f"{number:,} x {reason}" for reason, number in counts.most_common(3)]
        more = len(counts) - len(reasons)
        level = level_of(count, self.rows, warning=1.0 if self.refused.only_ties else 0.1)
        shown = [first[reason] for reason, _ in counts.most_common(EXAMPLES)]
        return Finding(
            "refused-rows",
            "rows that are not a pair",
            count,
            self.rows,
            "stop" if count == self.rows else level,
            does="They are left out. Nothing in them is guessed.",
            todo=self.refused.advice(),
            detail="; ".join(reasons) + (f"; {more} reasons more" if more > 0 else ""),
            examples=tuple(Example(one.row, f"{one.reason}: {one.seen}" if one.seen else one.reason) for one in shown),
        )

    def _wording(self, number: int) -> Finding:
        check, count = WORDING[number], self._counts[number]
        level = level_of(count, self.pairs, warning=check.warning)
        examples, rows = tuple(self._examples[number]), self._worded[number]
        return Finding(
            check.name, check.title, count, self.pairs, level, check.does, check.todo, examples=examples, rows=rows
        )

    def _length_bias(self) -> Finding:
        chosen, rejected = map(_floats, self._lengths)
        longer = int((chosen > rejected).sum())
        wins = (longer + (chosen == rejected).sum() / 2) / self.pairs
        correlation = self._length_score_correlation()
        much = self.pairs >= _LEAST_ROWS
        level: Level = (
            "warning" if much and wins > _LONGER_WINS else "note" if much and wins < 1 - _LONGER_WINS else "fine"
        )
        detail = (
            f"picking the longer answer is right in {100 * wins:.0f} %; "
            f"median {np.median(chosen):,.0f} characters chosen, {np.median(rejected):,.0f} rejected"
        )
        if correlation is not None:
            detail += f"; correlation of length and score within a pair {correlation:+.2f}"
        widest = np.argsort(rejected - chosen, kind="stable")[: EXAMPLES if level == "warning" else 0]
        return Finding(
            "length-bias",
            "pairs whose chosen answer is longer",
            longer,
            self.pairs,
            level,
            does="Where length alone tells chosen from rejected, length is what the run learns first: longer answers.",
            todo="Judge with length controlled; pairs of like length, or an objective that divides by length, help.",
            detail=detail,
            examples=tuple(
                Example(self._rows[at], f"{chosen[at]:,.0f} characters chosen, {rejected[at]:,.0f} rejected")
                for at in widest
            ),
            numbers={"longer_wins": round(float(wins), 6), "length_score_correlation": correlation},
            rows=[self._rows[at] for at in np.flatnonzero(chosen > rejected)],
        )

    def _length_score_correlation(self) -> float | None:
        """Pearson's, of length and score over the scored answers, each centred on its pair's mean.

        With two answers a pair that is the sum of products of their differences over the root of the sums of squares.
        """
        if not len(self._scored):
            return None
        at = np.frombuffer(self._scored, np.uintc)
        lengths = _floats(self._lengths[0])[at] - _floats(self._lengths[1])[at]
        margins = self._margins()
        scale = float(np.sqrt((lengths**2).sum() * (margins**2).sum()))
        return round(float((lengths * margins).sum()) / scale, 6) if scale else None

    def _same_opening(self) -> Finding:
        """The opening whose share among chosen answers is furthest from its share among rejected ones."""
        chosen, rejected = self._openings
        seen = min(self.pairs, REMEMBERED)
        common = [opening for counts in self._openings for opening, _ in counts.most_common(8)]
        opening = max(common, key=lambda words: abs(chosen[words] - rejected[words]), default="")
        apart = abs(chosen[opening] - rejected[opening]) / seen
        most = max(common, key=lambda words: chosen[words] + rejected[words], default="")
        shown = opening if apart > _COMMON_OPENING else most
        count = max(chosen[shown], rejected[shown])
        tells = seen >= _LEAST_ROWS and apart > _COMMON_OPENING
        some = seen >= _LEAST_ROWS and count > _COMMON_OPENING * seen and apart > _OPENING_APART
        level: Level = "warning" if tells else "note" if some else "fine"
        shares = (
            f"{100 * chosen[shown] / seen:.0f} % of the chosen and {100 * rejected[shown] / seen:.0f} % of the rejected"
        )
        return Finding(
            "same-opening",
            "answers that open alike",
            count,
            seen,
            level,
            does="An opening that only one side has is the easiest thing to learn: every answer gets it, or none.",
            todo="Take the phrase out of the answers, or make them with more than one template.",
            detail=f'"{shown} …" opens {shares} answers' if shown else "",
            examples=tuple(self._opened_at.get(shown, ())) if level != "fine" else (),
            numbers={"chosen": chosen[shown] / seen, "rejected": rejected[shown] / seen},
        )

    def _margins(self) -> NDArray[np.float64]:
        return np.frombuffer(self._scores[0]) - np.frombuffer(self._scores[1])

    def _score_findings(self) -> list[Finding]:
        margins, of = self._margins(), len(self._scored)
        scores = np.concatenate([np.frombuffer(side) for side in self._scores])
        threshold = _SMALL_MARGIN * float(scores.max() - scores.min())
        reversed_, small = margins < 0, (margins >= 0) & (margins <= threshold)
        numbers = {"threshold": threshold, "median_margin": float(np.median(margins))}
        return [
            Finding(
                "reversed-scores",
                "pairs whose rejected answer has the higher score",
                int(reversed_.sum()),
                of,
                level_of(int(reversed_.sum()), of, warning=0.01, stop=0.5),
                does="The run learns the answer that the judge liked less.",
                todo="Over a half: the label is read the wrong way round, swap the two. A few: drop them.",
                examples=self._scored_examples(reversed_),
                rows=self._scored_rows(reversed_),
            ),
            Finding(
                "small-margins",
                "pairs whose scores hardly differ",
                int(small.sum()),
                of,
                level_of(int(small.sum()), of, warning=0.25),
                does="The judge could as well have chosen the other: noise that DPO takes as seriously as the rest.",
                todo="Drop them, or say how many labels may be wrong: objective.label_smoothing.",
                detail=f"a margin of {threshold:.3g} or less, a twentieth of the range of the scores",
                examples=self._scored_examples(small),
                rows=self._scored_rows(small),
                numbers=numbers,
            ),
        ]

    def _scored_rows(self, which: NDArray[np.bool_]) -> list[int]:
        return [self._rows[self._scored[at]] for at in np.flatnonzero(which)]

    def _scored_examples(self, which: NDArray[np.bool_]) -> tuple[Example, ...]:
        chosen, rejected = self._scores
        return tuple(
            Example(self._rows[self._scored[at]], f"chosen {chosen[at]:g}, rejected {rejected[at]:g}")
            for at in np.flatnonzero(which)[:EXAMPLES]
        )


def _opening(text: str) -> str:
    """The first three words, cut at 24 characters for texts without spaces."""
    return " ".join(text[:120].lower().split()[:_OPENING_WORDS])[:_OPENING_CHARACTERS]


def _floats(values: array[int]) -> NDArray[np.float64]:
    return np.frombuffer(values, np.uintc).astype(np.float64)
