"""Whether an export computes what was trained: both models' log-probs of the same pairs, and their differences.

Two questions. Does the export still prefer the same answer of each pair (the sign of log p(chosen) - log p(rejected))?
And does the training survive: of the reward margins that are larger than what the export's rounding does to margins,
how many keep their sign? That noise is measured on the same pairs, as the root mean square of the margins' change. A
training that moved margins by less than the noise has none to compare, and counts as not kept.

Shapes: P = pairs.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from torch import Tensor

from dpo_studio.evaluation.accuracy import finite_pairs
from dpo_studio.evaluation.winrate import share_ci95
from dpo_studio.objectives import PairLogps, margin, wins

__all__ = ["BARS", "Bar", "ExportCheck", "compare"]

Interval = tuple[float, float]


@dataclass(frozen=True)
class Bar:
    """What an export must keep."""

    signs: float
    """Share of the pairs whose preferred answer stays the same."""
    margins: float
    """Share of the reward margins beyond the noise that keep their sign."""


BARS = {"merged": Bar(0.99, 0.97), "gptq": Bar(0.95, 0.85), "gguf": Bar(0.99, 0.97)}
"""A GGUF's are those of the merged model that it is written from."""


@dataclass(frozen=True)
class ExportCheck:
    """The exported model compared with the run's own, on the same pairs."""

    pairs: int
    not_finite: int
    """Pairs left out because a log-prob is not finite; any is too far apart."""
    signs_kept: float
    noise: float
    """Root mean square of the change of the reward margins."""
    margins_beyond_noise: int
    """How many of the run's own margins are larger than the noise."""
    margins_kept: float
    """Of these, the share that keeps its sign; 0 where there are none."""
    accuracy_before: float
    accuracy_before_ci95: Interval
    accuracy: float
    accuracy_ci95: Interval
    accuracy_change: float
    accuracy_change_ci95: Interval
    """Of the difference pair by pair, which both accuracies' own intervals do not give."""
    margin_before: float
    margin_before_ci95: Interval
    margin: float
    margin_ci95: Interval
    nats_a_token: float
    """Mean size of the change of an answer's log-prob, a token."""

    def misses(self, bar: Bar) -> list[str]:
        """The criteria that the export fails, as text; empty if it is close enough."""
        found = []
        if self.not_finite:
            found.append(f"{self.not_finite} pairs have log-probs that are not finite")
        if self.signs_kept < bar.signs:
            found.append(
                f"{_share(self.signs_kept)} of the pairs keep their preferred answer ({_share(bar.signs)} asked for)"
            )
        if not self.margins_beyond_noise:
            found.append("no reward margin is larger than what the export's rounding does to margins")
        elif self.margins_kept < bar.margins:
            found.append(
                f"{_share(self.margins_kept)} of the reward margins beyond the noise keep their sign "
                f"({_share(bar.margins)} asked for)"
            )
        return found

    def lines(self) -> list[str]:
        """The figures for people."""
        return [
            f"preferred answer kept: {_share(self.signs_kept)} of {self.pairs} pairs",
            f"reward margins beyond the noise ({self.noise:.3g}): {self.margins_beyond_noise}, "
            f"{_share(self.margins_kept)} of them keep their sign",
            f"accuracy {self.accuracy_before:.3f} -> {self.accuracy:.3f} "
            f"(95 % interval {_interval(self.accuracy_ci95)}; "
            f"change {self.accuracy_change:+.3f}, {_interval(self.accuracy_change_ci95, '+')})",
            f"mean reward margin {self.margin_before:.2f} -> {self.margin:.2f} "
            f"(95 % intervals {_interval(self.margin_before_ci95)} and {_interval(self.margin_ci95)})",
        ]


def compare(
    before: PairLogps, after: PairLogps, reference: PairLogps, prompt_of: Sequence[Hashable], *, beta: float
) -> ExportCheck:
    """The export (`after`) against the run's policy (`before`), rewards of both against the run's reference."""
    prompts, (before, after, reference) = finite_pairs(prompt_of, before, after, reference)
    lost = len(prompt_of) - len(prompts)
    if not prompts:
        nothing = (0.0, 0.0)
        return ExportCheck(0, lost, 0, 0, 0, 0, 0, nothing, 0, nothing, 0, nothing, 0, nothing, 0, nothing, 0)
    old_P, new_P = (beta * margin(logps, reference).double() for logps in (before, after))
    noise = (new_P - old_P).square().mean().sqrt().item()
    beyond_P = old_P.abs() > noise
    right_P, now_right_P = wins(old_P), wins(new_P)
    tokens = (before.chosen_tokens_P + before.rejected_tokens_P).sum().item()
    moved = (after.chosen_P - before.chosen_P).abs() + (after.rejected_P - before.rejected_P).abs()
    return ExportCheck(
        pairs=len(prompts),
        not_finite=lost,
        signs_kept=_same_side(before.chosen_P - before.rejected_P, after.chosen_P - after.rejected_P),
        noise=noise,
        margins_beyond_noise=int(beyond_P.sum()),
        margins_kept=_same_side(old_P[beyond_P], new_P[beyond_P]),
        accuracy_before=right_P.mean().item(),
        accuracy_before_ci95=share_ci95(right_P.tolist(), prompts),
        accuracy=now_right_P.mean().item(),
        accuracy_ci95=share_ci95(now_right_P.tolist(), prompts),
        accuracy_change=(now_right_P - right_P).mean().item(),
        accuracy_change_ci95=_mean_ci95(now_right_P - right_P, prompts),
        margin_before=old_P.mean().item(),
        margin_before_ci95=_mean_ci95(old_P, prompts),
        margin=new_P.mean().item(),
        margin_ci95=_mean_ci95(new_P, prompts),
        nats_a_token=(moved.sum() / max(tokens, 1)).item(),
    )


def _same_side(old_P: Tensor, new_P: Tensor) -> float:
    """Share of the numbers on the same side of zero as before."""
    return (old_P.sign() == new_P.sign()).double().mean().item() if len(old_P) else 0.0


def _mean_ci95(values_P: Tensor, prompt_of: Sequence[Hashable]) -> Interval:
    """95 % interval of a mean, drawn over prompts like that of a share: the values are stretched to 0..1 and back."""
    least, width = values_P.min().item(), (values_P.max() - values_P.min()).item()
    if width == 0:
        return least, least
    low, high = share_ci95(((values_P - least) / width).tolist(), prompt_of)
    return least + width * low, least + width * high


def _share(share: float) -> str:
    return f"{100 * share:.1f} %"


def _interval(interval: Interval, sign: str = "") -> str:
    low, high = interval
    return f"{low:{sign}.3f} to {high:{sign}.3f}"
