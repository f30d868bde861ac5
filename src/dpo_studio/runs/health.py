"""The health of a run: problems that its curve shows and its final number hides, and what to do about them.

Training writes facts (metrics.jsonl); this room alone judges them, the same way while the run goes, in result.json and
on the page.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import mean
from typing import Any

from dpo_studio.console.text import count
from dpo_studio.runs.detectors import DETECTORS, Curve, Detector, Row
from dpo_studio.runs.facts import RunFacts, finite

__all__ = ["HealthFinding", "HealthWatch", "detectors_of", "health_of", "judge", "lengthening"]

LONGER = 1.2
"""Tokens of a sampled answer, tuned over base. Two standard errors are 0.07 on 120 answers as uneven as the demo's."""
_LENGTH_ADVICE = (
    "read the length-controlled win rate, not the raw one; if chosen answers are the longer ones (longer_wins in "
    "result.json), balance the pairs, or train with objective.kind: ld_dpo, dpo_norm or simpo"
)


@dataclass(frozen=True)
class HealthFinding:
    """A detector's finding in a run."""

    name: str
    title: str
    first_step: int
    last_step: int
    """The last step at which it was detected."""
    saw: str
    """At the last of these steps."""
    advice: str

    def to_plain(self) -> dict[str, Any]:
        """The finding as in result.json."""
        return dict(vars(self))

    def words(self) -> str:
        """The text of the warning during the run."""
        return f"step {self.first_step}: {self.title[0].lower()}{self.title[1:]}: {self.saw}\n  hint: {self.advice}"


class HealthWatch:
    """All detectors over a run, line by line: new findings are returned once, and all are kept."""

    def __init__(self, total_steps: int, *, saturates: bool = True) -> None:
        """`saturates`: as the objective's property."""
        self._curve = Curve(total_steps)
        self._detectors = detectors_of(saturates)
        self._findings: dict[str, HealthFinding] = {}

    @property
    def findings(self) -> list[HealthFinding]:
        """In the order in which they were first seen."""
        return list(self._findings.values())

    def see(self, row: Row) -> list[HealthFinding]:
        """Add the next line of metrics.jsonl; returns the findings that are new."""
        self._curve.add(row)
        if not self._curve.steps:
            return []
        step, new = int(self._curve.step), []
        for detector in self._detectors:
            saw = detector.look(self._curve)
            if saw is None:
                continue
            before = self._findings.get(detector.name)
            first = before.first_step if before is not None else step
            finding = HealthFinding(detector.name, detector.title, first, step, saw, detector.advice)
            self._findings[detector.name] = finding
            new += [finding] if before is None else []
        return new


def detectors_of(saturates: bool) -> tuple[Detector, ...]:
    """The detectors for a run whose objective `saturates`, or does not."""
    return tuple(detector for detector in DETECTORS if saturates or not detector.if_it_saturates)


def judge(rows: Iterable[Row], total_steps: int, *, saturates: bool = True) -> list[HealthFinding]:
    """What the lines of a metrics.jsonl show, in order: the same findings that were reported during the run."""
    watch = HealthWatch(total_steps, saturates=saturates)
    for row in rows:
        watch.see(row)
    return watch.findings


def health_of(facts: RunFacts) -> list[HealthFinding]:
    """Everything the files of a run show: its curve, and the length of its answers where some were sampled."""
    steps = int(facts.number("steps") or max(facts.series("step")[1], default=0.0))
    return [*judge(facts.metrics, steps, saturates=facts.saturates), *_lengths_sampled(facts, steps)]


def _lengths_sampled(facts: RunFacts, steps: int) -> list[HealthFinding]:
    """By an evaluation at several temperatures, or by the demo."""
    before, after = (
        [finite(row, key) for row in facts.temperatures] for key in ("reference_mean_tokens", "mean_tokens")
    )
    known = [pair for pair in zip(before, after, strict=True) if None not in pair]
    if not known or not facts.against_reference:
        return lengthening(facts.result, steps)
    means = [mean(value or 0.0 for value in side) for side in zip(*known, strict=True)]
    return lengthening({"mean_tokens_base": means[0], "mean_tokens_tuned": means[1]}, steps)


def lengthening(result: Row, step: int) -> list[HealthFinding]:
    """Whether sampled answers got longer: `mean_tokens_base` and `mean_tokens_tuned`, after `step` steps."""
    base, tuned = finite(result, "mean_tokens_base"), finite(result, "mean_tokens_tuned")
    if not base or not tuned or tuned < LONGER * base:
        return []
    saw = f"sampled answers went from {count(base)} to {count(tuned)} tokens on average"
    return [HealthFinding("answers_lengthen", "Answers got longer", step, step, saw, _LENGTH_ADVICE)]
