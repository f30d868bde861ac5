"""Problems of a run that its curve shows: one pure function of the steps so far for each.

A step's numbers are averages over its pairs, and as noisy as these are few. So nothing is read off one step but a
gradient spike: "recent" means the latest steps that together hold `RECENT_PAIRS` pairs, and at least `RECENT_STEPS`.
docs/health.md says what each detector means, and what it said of real runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median, variance
from typing import Any

from dpo_studio.console.text import count, percent, significant
from dpo_studio.runs.facts import finite

__all__ = ["DETECTORS", "Curve", "Detector", "Row"]

Row = Mapping[str, Any]
"""A line of metrics.jsonl."""

RECENT_PAIRS, RECENT_STEPS = 64, 5
"""64 pairs know an accuracy of 0.9 to 4 points; five steps, so that one of 64 pairs is not a trend."""
FALL = 0.05
"""Nats a token that both answers must have lost: a twentieth of its likelihood at every token. Below it is noise."""
SHARED_FALL = 0.5
"""Share of the rejected answers' fall that chosen ones share. From one half on they fall further than they part."""
COLLAPSE = 0.5
"""Nats a token that the chosen answers have lost: each of their tokens 0.61 times as likely as it was."""
SATURATED = 0.98
"""Training accuracy from which no pair of 64 but one is wrong."""
EARLY = 0.2
"""Share of the planned steps: saturated before it, four fifths of the run have nothing to correct."""
BEHIND = 0.1
"""How far held-out accuracy may stay behind a saturated one: two standard errors of 0.85 on 50 held-out pairs."""
EXPLODED = 16.0
"""Mean reward margin. e^-16 is fp32's rounding of 1: the logistic loss of such a pair is flat to the last bit."""
SPIKE = 10.0
"""A gradient norm this many times its usual size. From pair to pair it varies by 2 or 3."""
USUAL_STEPS = 16
"""Steps from which the usual size is estimated: those before the spike, and those the run began with."""
MOVED = 0.02
"""Share of its first value that the loss must have lost by half of the run: DPO's goes from 0.693 to 0.679."""
HIDDEN = 0.1
"""Share of its first value which must exceed the noise (two standard errors): otherwise nothing is reported."""
MOST_STEPS = 256
"""Steps over which that is averaged, at most: a quarter of a night's run is more than is needed, at every step."""
TURNED = 0.05
"""How far above its lowest the held-out loss must have risen, twice in a row, as a share of the loss before training:
as a share of the lowest, small losses would turn with a single pair."""


@dataclass
class Curve:
    """The steps of a run so far, and the held-out evaluations between them."""

    total_steps: int
    """Steps that are planned."""
    steps: list[Row] = field(default_factory=list)
    held_out: list[Row] = field(default_factory=list)
    beginning: list[Row] = field(default_factory=list)
    latest: list[Row] = field(default_factory=list)
    """As many rows from either end as `_enough` asks for, looked up once a step."""

    def add(self, row: Row) -> None:
        """A line of metrics.jsonl; step 0's is an evaluation only."""
        if finite(row, "loss") is not None:
            self.steps.append(row)
            self.latest = _enough(reversed(self.steps))
            self.beginning = self.beginning or self.latest
        if finite(row, "eval_loss") is not None:
            self.held_out.append(row)

    @property
    def step(self) -> float:
        """The last step."""
        return finite(self.steps[-1], "step") or 0 if self.steps else 0

    def recent(self, *keys: str) -> tuple[float, ...] | None:
        """The recent mean of each key over pairs; None while there are too few steps, or none with these keys."""
        return _means(self.latest, keys)

    def first(self, *keys: str) -> tuple[float, ...] | None:
        """The same for the run's beginning."""
        return _means(self.beginning, keys)


def _enough(rows: Iterable[Row]) -> list[Row]:
    """As many rows from the front as make `RECENT_PAIRS` and `RECENT_STEPS`; none if there are not so many."""
    taken: list[Row] = []
    pairs = 0.0
    for row in rows:
        taken.append(row)
        pairs += _pairs(row)
        if pairs >= RECENT_PAIRS and len(taken) >= RECENT_STEPS:
            return taken
    return []


def _means(rows: Sequence[Row], keys: Sequence[str]) -> tuple[float, ...] | None:
    pairs = sum(map(_pairs, rows))
    columns = [_values(rows, key) for key in keys]
    if not rows or any(len(column) < len(rows) for column in columns):
        return None
    return tuple(
        sum(value * _pairs(row) for value, row in zip(column, rows, strict=True)) / pairs for column in columns
    )


def _values(rows: Iterable[Row], key: str) -> list[float]:
    return [value for row in rows if (value := finite(row, key)) is not None]


def _pairs(row: Row) -> float:
    return finite(row, "pairs") or 1.0


@dataclass(frozen=True)
class Detector:
    """One problem, how it is detected, and what to do."""

    name: str
    title: str
    look: Callable[[Curve], str | None]
    """Its finding in the steps so far; None if there is none."""
    advice: str
    if_it_saturates: bool = False
    """Looked for only where the objective's loss is flat at wide margins (`Formula.saturates`)."""


def _both_rewards_fall(curve: Curve) -> str | None:
    known = curve.recent("log_ratios/chosen", "log_ratios/rejected", "tokens/chosen", "tokens/rejected")
    if known is None:
        return None
    chosen, rejected = known[0] / max(known[2], 1.0), known[1] / max(known[3], 1.0)
    if chosen > -FALL or rejected > -FALL or known[0] > SHARED_FALL * known[1]:
        return None
    return (
        f"chosen answers have lost {significant(-known[0])} nats against the reference and rejected ones "
        f"{significant(-known[1])}: the policy moves away from both more than it separates them"
    )


def _chosen_collapses(curve: Curve) -> str | None:
    per_token = _chosen_nats_a_token(curve)
    if per_token is None or per_token > -COLLAPSE:
        return None
    times = math.exp(per_token)
    return (
        f"chosen answers have lost {significant(-per_token)} nats per token: "
        f"each of their tokens is {significant(times)} times as likely as it was"
    )


def _chosen_nats_a_token(curve: Curve) -> float | None:
    """How far the chosen answers have moved: from the reference, else from where training found them."""
    if (known := curve.recent("log_ratios/chosen", "tokens/chosen")) is not None:
        return known[0] / max(known[1], 1.0)
    now, before = (at("logps/chosen", "tokens/chosen") for at in (curve.recent, curve.first))
    if now is None or before is None:
        return None
    return now[0] / max(now[1], 1.0) - before[0] / max(before[1], 1.0)


def _accuracy_saturates(curve: Curve) -> str | None:
    known = curve.recent("rewards/accuracies")
    if known is None or known[0] < SATURATED:
        return None
    said = f"training accuracy is {percent(known[0])} at step {count(curve.step)} of {count(curve.total_steps)}"
    held_out = finite(curve.held_out[-1], "eval_rewards/accuracies") if curve.held_out else None
    evaluated = finite(curve.held_out[-1], "step") if curve.held_out else None
    if held_out is not None and evaluated and held_out < known[0] - BEHIND:  # step 0's says nothing of training
        return f"{said}, held-out accuracy {percent(held_out)}: it memorised its pairs, not what they share"
    if curve.step <= EARLY * curve.total_steps:
        return f"{said}: something easy separates the answers, and the rest of the run only widens margins"
    return None


def _margins_explode(curve: Curve) -> str | None:
    known = curve.recent("rewards/margins")
    if known is None or known[0] < EXPLODED:
        return None
    return f"the mean reward margin is {significant(known[0])}, where a pair's loss is flat to fp32's last bit"


def _gradient_spikes(curve: Curve) -> str | None:
    first, latest = (
        _values(rows, "grad_norm") for rows in (curve.steps[:USUAL_STEPS], curve.steps[-USUAL_STEPS - 1 :])
    )
    if len(first) < USUAL_STEPS or len(latest) <= USUAL_STEPS:
        return None
    *before, now = latest
    usual = max(median(first), median(before))
    if now < SPIKE * usual or usual == 0:
        return None
    return (
        f"the gradient norm of step {count(curve.step)} is {significant(now)}, "
        f"{count(now / usual)} times its usual {significant(usual)}"
    )


def _loss_does_not_move(curve: Curve) -> str | None:
    if 2 * curve.step < curve.total_steps:
        return None
    before = _values(curve.beginning, "loss")
    now = _values(curve.steps[-max(1, min(curve.total_steps // 4, MOST_STEPS)) :], "loss")
    if len(before) < RECENT_STEPS or len(now) < RECENT_STEPS:
        return None
    fallen = fmean(before) - fmean(now)
    if fallen >= MOVED * abs(fmean(before)):
        return None
    error = math.sqrt(variance(before) / len(before) + variance(now) / len(now))
    if fallen + 2 * error >= HIDDEN * abs(fmean(before)):
        return None
    return (
        f"the loss began at {significant(fmean(before))} and is {significant(fmean(now))} over the last "
        f"{count(len(now))} steps, at step {count(curve.step)} of {count(curve.total_steps)}"
    )


def _held_out_turns(curve: Curve) -> str | None:
    known = [(finite(row, "eval_loss"), row) for row in curve.held_out]
    losses = [(loss, row) for loss, row in known if loss is not None]
    if len(losses) < 3:
        return None
    best, at = min(losses, key=lambda found: found[0])
    limit = best + TURNED * abs(losses[0][0])
    if not all(loss > limit and row is not at for loss, row in losses[-2:]):
        return None
    turned = f"held-out loss was lowest at step {count(finite(at, 'step') or 0)} ({significant(best)}) and has risen to"
    accuracies = [finite(row, "eval_rewards/accuracies") for row in (at, losses[-1][1])]
    then, now = (percent(share) if share is not None else "not known" for share in accuracies)
    return f"{turned} {significant(losses[-1][0])}; held-out accuracy then {then}, now {now}"


DETECTORS = (
    Detector(
        "rewards_fall",
        "Both rewards fall",
        _both_rewards_fall,
        "raise objective.beta or lower training.learning_rate; add an sft term (objective.kind: mixture), which holds "
        "chosen answers up; look for pairs whose two answers are nearly the same",
    ),
    Detector(
        "chosen_collapses",
        "Chosen answers become unlikely",
        _chosen_collapses,
        "what takes their place is in no pair: read sampled answers before using this model; lower "
        "training.learning_rate, raise objective.beta, or add an sft term (objective.kind: mixture)",
    ),
    Detector(
        "accuracy_saturates",
        "Accuracy saturated",
        _accuracy_saturates,
        "look at what tells the answers apart (length, a phrase, a format); fewer steps or a lower "
        "training.learning_rate give the same; harder or more pairs give more",
    ),
    Detector(
        "margins_explode",
        "Margins explode",
        _margins_explode,
        "such margins are distance from the reference, not quality: stop earlier, lower training.learning_rate, or set "
        "objective.label_smoothing or objective.kind: ipo, which aim at a finite margin",
        if_it_saturates=True,
    ),
    Detector(
        "gradient_spikes",
        "The gradient spiked",
        _gradient_spikes,
        "clipping (training.clip) keeps one spike harmless; if they come back, lower training.learning_rate, lengthen "
        "training.warmup, and look at that step's pairs for broken text",
    ),
    Detector(
        "loss_still",
        "The loss does not move",
        _loss_does_not_move,
        "raise training.learning_rate (LoRA takes 5e-5 to 5e-4); check that chosen and rejected are not swapped in "
        "half of the rows, and that the two answers differ",
    ),
    Detector(
        "held_out_turns",
        "Held-out loss turned",
        _held_out_turns,
        "train again with training.max_steps at the lowest one, fewer epochs, or a lower training.learning_rate; more "
        "pairs put the turn later",
    ),
)
"""The detectors that run at every step. The length of answers is sampled after training: `health.lengthening`."""
