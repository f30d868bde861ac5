"""The policy's implicit reward as the judge: beta x how much likelier the policy finds an answer than its reference.

DPO trains exactly this number (arXiv 2305.18290, Eq. 5), so it says what the policy has learned to prefer, not what is
better: a policy that judges its own answers agrees with itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from dpo_studio.evaluation.judges import Comparison, Progress, Verdict, check_some_finite, higher_wins, not_judged
from dpo_studio.learning.batched_logps import batched_logps
from dpo_studio.learning.packing_check import check_packing
from dpo_studio.models.adapters import as_reference, in_eval
from dpo_studio.objectives import PairLogps
from dpo_studio.preferences.pair import Message, Pair
from dpo_studio.sampling.completion import Completion
from dpo_studio.tokens.chat import ChatEncoder
from dpo_studio.tokens.encode import EncodedAnswer, EncodedPair, encode_pairs

__all__ = ["ImplicitReward"]


@dataclass(frozen=True)
class ImplicitReward:
    """A policy with its adapter; the reference is the same model without it."""

    typed: str
    """The name that the user gave."""
    policy: nn.Module
    encoder: ChatEncoder
    beta: float
    """Scales the rewards; no verdict depends on it."""
    fingerprint: str = ""
    """What tells its weights from others."""

    @property
    def name(self) -> str:
        """For tables."""
        return f"implicit:{self.typed}"

    @property
    def description(self) -> str:
        """For the report."""
        return (
            f"The implicit reward of {self.typed}, {self.beta:g} x (log-prob under the policy - log-prob under its "
            "reference): the answer with the higher one wins. It is what the policy was trained to prefer."
        )

    def judge_all(self, comparisons: Sequence[Comparison], progress: Progress | None = None) -> list[Verdict]:
        """A verdict on each comparison, in order; a tie where the answers do not differ or cannot be rendered as a
        chat.

        Raises:
            ModelError: log-probs are not the plain model's.
        """
        rewards = self._rewards(comparisons, progress)
        verdicts = []
        for both in rewards:
            if isinstance(both, str):
                verdicts.append(not_judged(both))
            else:
                a, b = both
                verdicts.append(higher_wins(a, b, f"The implicit reward of A is {a:.2f}, that of B {b:.2f}."))
        return verdicts

    def score_all(
        self, answers: Sequence[tuple[Sequence[Message], Completion]], progress: Progress | None = None
    ) -> list[float | None]:
        """The implicit reward of each (prompt, answer); None where it cannot be rendered, or is not finite."""
        comparisons = [Comparison(tuple(prompt), answer, answer) for prompt, answer in answers]
        rewards = self._rewards(comparisons, progress)
        return [None if isinstance(both, str) or not math.isfinite(both[0]) else both[0] for both in rewards]

    def _rewards(self, comparisons: Sequence[Comparison], progress: Progress | None) -> list[tuple[float, float] | str]:
        """The rewards of A and of B, or why there are none."""
        pairs = [Pair(c.prompt, _turn(c.a), _turn(c.b), row) for row, c in enumerate(comparisons)]
        encoded = encode_pairs(pairs, self.encoder, max_length=None)
        rewards: dict[int, tuple[float, float] | str] = dict(encoded.refused)
        if progress is not None:
            progress(len(rewards))
        kept = [self._as_generated(pair, comparisons[pair.row]) for pair in encoded.pairs]
        if kept:
            with in_eval(self.policy):
                check_packing(self.policy, kept, texts=pairs, encoder=self.encoder)
                policy = self._logps(kept, None)
            with as_reference(self.policy):
                reference = self._logps(kept, progress)
            chosen_P = self.beta * (policy.chosen_P - reference.chosen_P)
            rejected_P = self.beta * (policy.rejected_P - reference.rejected_P)
            check_some_finite([*chosen_P.tolist(), *rejected_P.tolist()], self.name)
            for pair, a, b in zip(kept, chosen_P.tolist(), rejected_P.tolist(), strict=True):
                rewards[pair.row] = (a, b)
        return [rewards[row] for row in range(len(comparisons))]

    def _as_generated(self, pair: EncodedPair, comparison: Comparison) -> EncodedPair:
        """The sampled tokens themselves, where they are this model's: their text could be encoded otherwise.

        Ids of another vocabulary are other words, or none at all: then both answers are read as text, as where there is
        no more than text. An answer that never ended goes without the end of turn that the template writes.
        """
        a, b = comparison.a, comparison.b
        if a.ids and b.ids and a.vocabulary == b.vocabulary == self.encoder.vocabulary_digest:
            prompt = np.array(self.encoder.prompt_ids(comparison.prompt), np.int32)
            return EncodedPair(pair.row, prompt, _sampled(a), _sampled(b))
        return replace(pair, chosen=_as_ended(pair.chosen, a.ended), rejected=_as_ended(pair.rejected, b.ended))

    def _logps(self, pairs: Sequence[EncodedPair], progress: Progress | None) -> PairLogps:
        return batched_logps(self.policy, pairs, progress=progress or (lambda done: None))


def _turn(answer: Completion) -> tuple[Message, ...]:
    return (Message("assistant", answer.text),)


def _sampled(answer: Completion) -> EncodedAnswer:
    return EncodedAnswer(np.array(answer.ids, np.int32), np.ones(len(answer.ids), bool))


def _as_ended(answer: EncodedAnswer, ended: bool) -> EncodedAnswer:
    return answer if ended or len(answer.ids) < 2 else EncodedAnswer(answer.ids[:-1], answer.scored[:-1])
