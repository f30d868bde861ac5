"""The data doctor with a tokenizer: what the length rule and the chat template do to the pairs.

`Encoded.counts` of a training says the same with less: `rule_findings` reads either.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from dpo_studio.config import TooLong
from dpo_studio.doctor.findings import EXAMPLES, Example, Finding, Histogram, histogram_of, level_of
from dpo_studio.preferences.pair import Pair
from dpo_studio.tokens.chat import ChatEncoder, PairError, PairIds
from dpo_studio.tokens.encode import (
    ANSWER_CUT,
    CASE,
    CHOSEN_CUT,
    DROPPED,
    END_APPENDED,
    OVER,
    PROMPT_CUT,
    PROMPT_OVER,
    THOUGHT_LEFT_OUT,
    THOUGHTS_ALONE,
    TURN_LEFT_OUT,
    fit_pair,
)
from dpo_studio.tokens.split import CASES

__all__ = ["TokenChecks", "rule_findings"]

Examples = Mapping[str, Sequence[Example]]

_SPELLED = "special token spelt"
_TWO_BEGINNINGS = "begins twice"
_LOSING = {
    "drop": "They are dropped: the run learns from short answers alone.",
    "cut_answer_end": "Their answers are cut, without an end of turn to learn.",
    "cut_prompt_start": "Their oldest turns are cut; where that is not enough they are dropped.",
}


_CASES = {
    "1": "the whole chat begins with the served prompt",
    "3a": "the generation prompt differs",
    "3b": "the answer closes the thought that the served prompt opens",
    "3c": "the served prompt opens a thought that is never closed",
    "4": "a turn of the prompt is moved or rewritten",
}


class TokenChecks:
    """All checks that need the model's tokenizer and chat template. Add all pairs, then get the findings."""

    def __init__(self, encoder: ChatEncoder, *, max_length: int, too_long: TooLong) -> None:
        self._encoder, self._max_length, self._too_long = encoder, max_length, too_long
        self.pairs = self.usable = 0
        """`usable`: pairs that the length rule and the template leave."""
        self._counts: Counter[str] = Counter()
        self._examples: dict[str, list[Example]] = {}
        self._prompts, self._chosen, self._rejected = array("I"), array("I"), array("I")
        """Tokens of each pair that has any."""

    def see(self, pairs: Sequence[Pair]) -> None:
        """Some hundred pairs: one call of the tokenizer encodes them."""
        for pair, ids in zip(pairs, self._encoder.pairs(pairs), strict=True):
            self.pairs += 1
            if isinstance(ids, PairIds):
                self._measure(pair, ids)
            try:
                _, notes = fit_pair(pair, ids, self._encoder, self._max_length, self._too_long)
            except PairError as reason:
                self._note(DROPPED + reason.kind, pair, reason.message)
            else:
                self.usable += 1
                for note in notes:
                    self._note(note, pair, _sizes(ids) if isinstance(ids, PairIds) else "")

    def _measure(self, pair: Pair, ids: PairIds) -> None:
        for lengths, part in zip(
            (self._prompts, self._chosen, self._rejected), (ids.prompt, ids.chosen.ids, ids.rejected.ids), strict=True
        ):
            lengths.append(len(part))
        if self._encoder.begins_twice(ids.prompt):
            self._note(_TWO_BEGINNINGS, pair, self._encoder_start(ids))
        for turn in (*pair.prompt, *pair.chosen, *pair.rejected):
            if (spelled := self._encoder.spelled(turn.content)) is not None:
                self._note(_SPELLED, pair, f"{spelled} in the text of: {turn.role}")
                break

    def _encoder_start(self, ids: PairIds) -> str:
        return f"its first token ids: {', '.join(map(str, ids.prompt[:4]))}"

    def _note(self, what: str, pair: Pair, text: str) -> None:
        self._counts[what] += 1
        examples = self._examples.setdefault(what, [])
        if len(examples) < EXAMPLES:
            examples.append(Example(pair.row, text))

    def findings(self) -> list[Finding]:
        """The findings of all checks, in the order of the report."""
        found = rule_findings(self._counts, self.pairs, self._max_length, self._too_long, self._examples)
        found[0] = self._with_lengths(found[0])
        count = self._counts[_SPELLED]
        spelled = Finding(
            "special-tokens",
            "special tokens of this tokenizer written as text",
            count,
            self.pairs,
            level_of(count, self.pairs, warning=0.01),
            does="They are encoded as the text they are. The model learns to write them out, which no server stops at.",
            todo="Take them out of the text.",
            examples=tuple(self._examples.get(_SPELLED, ())),
        )
        count = self._counts[_TWO_BEGINNINGS]
        twice = Finding(
            "double-bos",
            "chats that begin twice (double BOS)",
            count,
            self.pairs,
            level_of(count, self.pairs, warning=0.0),
            does="Two tokens that begin a chat stand at its start, which the model never saw.",
            todo="The chat template writes both: give a mended one with model.chat_template.",
            examples=tuple(self._examples.get(_TWO_BEGINNINGS, ())),
        )
        return [*found, spelled, twice]

    def _with_lengths(self, over: Finding) -> Finding:
        """The finding about `max_length`, with how long pairs are and how many answers could be cut."""
        if not self._prompts:
            return over
        prompts, chosen, rejected = (np.frombuffer(part, np.uintc) for part in self._columns)
        longest = prompts + np.maximum(chosen, rejected)
        ends = sum(
            ((prompts + part > self._max_length) & (prompts < self._max_length)).sum() for part in (chosen, rejected)
        )
        half, most, whole = (int(value) for value in np.quantile(longest, [0.5, 0.95, 1.0]))
        detail = (
            f"prompt and longer answer: median {half:,} tokens, 95 % within {most:,}, longest {whole:,}; "
            f"{int(ends):,} answers would lose their end if they were cut"
        )
        numbers = {"median": half, "p95": most, "longest": whole, "answers_that_would_lose_their_end": int(ends)}
        return Finding(
            over.name, over.title, over.count, over.of, over.level, over.does, over.todo, detail, over.examples, numbers
        )

    def histograms(self) -> list[Histogram]:
        """How long the answers are."""
        if not self._prompts:
            return []
        _, chosen, rejected = (np.frombuffer(part, np.uintc).astype(np.float64) for part in self._columns)
        return [histogram_of("tokens", "Length of an answer in tokens", least=0.0, chosen=chosen, rejected=rejected)]

    @property
    def _columns(self) -> tuple[array[int], array[int], array[int]]:
        return self._prompts, self._chosen, self._rejected


def _sizes(ids: PairIds) -> str:
    return f"{len(ids.prompt)} tokens of prompt, {len(ids.chosen.ids)} chosen, {len(ids.rejected.ids)} rejected"


def rule_findings(
    counts: Mapping[str, int], pairs: int, max_length: int, too_long: TooLong, examples: Examples | None = None
) -> list[Finding]:
    """What encoding did to so many pairs, from its counts (`Encoded.counts`); the first is about `max_length`."""
    shown = examples or {}
    return [
        _over(counts, pairs, max_length, too_long, shown),
        _lost_ends(counts, pairs, shown),
        _not_encoded(counts, pairs, shown),
        _by_case(counts, pairs, shown),
        _shorter(counts, pairs, shown),
        _thoughts(counts, pairs, shown),
        _turns(counts, pairs, shown),
        _without_end(counts, pairs, shown),
    ]


def _over(counts: Mapping[str, int], pairs: int, max_length: int, too_long: TooLong, examples: Examples) -> Finding:
    kinds = (DROPPED + OVER, DROPPED + PROMPT_OVER, ANSWER_CUT, PROMPT_CUT)
    count = sum(counts.get(kind, 0) for kind in kinds)
    prompts = counts.get(DROPPED + PROMPT_OVER, 0)
    return Finding(
        "over-length",
        f"pairs over max_length ({max_length:,} tokens)",
        count,
        pairs,
        level_of(count, pairs, warning=1.0 if too_long == "cut_answer_end" else 0.1),  # lost ends are reported below
        does=_LOSING[too_long],
        todo="A larger data.max_length costs memory and time in proportion; see what is lost first.",
        detail=f"{prompts:,} by their prompt alone" if prompts else "",
        examples=_some(examples, *kinds),
    )


def _lost_ends(counts: Mapping[str, int], pairs: int, examples: Examples) -> Finding:
    count = counts.get(CHOSEN_CUT, 0)
    return Finding(
        "lost-ends",
        "pairs whose chosen answer loses its end",
        count,
        pairs,
        level_of(count, pairs, warning=0.01, stop=0.1),
        does="A cut answer has no end of turn. From such chosen ones the model does not learn to stop: it rambles on.",
        todo="A larger data.max_length, or another data.too_long: drop, or cut_prompt_start for long chats.",
        examples=_some(examples, CHOSEN_CUT),
    )


def _not_encoded(counts: Mapping[str, int], pairs: int, examples: Examples) -> Finding:
    known = {DROPPED + OVER, DROPPED + PROMPT_OVER}
    reasons = {kind: number for kind, number in counts.items() if kind.startswith(DROPPED) and kind not in known}
    count = sum(reasons.values())
    return Finding(
        "not-encoded",
        "pairs that this chat template or tokenizer cannot take",
        count,
        pairs,
        level_of(count, pairs, warning=0.05),
        does="They are dropped.",
        todo="Mend the rows, or give another template with model.chat_template.",
        detail="; ".join(f"{number:,} x {kind.removeprefix(DROPPED)}" for kind, number in reasons.items()),
        examples=_some(examples, *reasons),
    )


def _by_case(counts: Mapping[str, int], pairs: int, examples: Examples) -> Finding:
    others = {case: counts.get(CASE + case, 0) for case in CASES[1:]}
    count = sum(others.values())
    kept = pairs - sum(number for kind, number in counts.items() if kind.startswith(DROPPED))
    numbers = {"1": kept - count} | others
    return Finding(
        "prompt-cases",
        "pairs whose whole chat does not begin with the prompt that a server sends",
        count,
        pairs,
        "note" if count else "fine",
        does="The prompt is the served one (3c: a shorter one), and the answer what the template writes for it.",
        todo="Nothing, unless your server writes prompts in another way than this template.",
        detail="; ".join(f"{numbers[case]:,} x {_CASES[case]} ({case})" for case in CASES if numbers[case]),
        examples=_some(examples, *(CASE + case for case in others)),
        numbers=numbers,
    )


def _shorter(counts: Mapping[str, int], pairs: int, examples: Examples) -> Finding:
    count = counts.get(CASE + "3c", 0)
    return Finding(
        "shorter-prompts",
        "pairs whose prompt ends before the thought that a server's prompt opens",
        count,
        pairs,
        level_of(count, pairs, warning=0.0),
        does="A server's prompt opens a thought that the template never closes for an answer: it is asked with other "
        "tokens than it is trained with.",
        todo="Give a template that writes the answers' thoughts, or opens none, with model.chat_template.",
        examples=_some(examples, CASE + "3c"),
    )


def _thoughts(counts: Mapping[str, int], pairs: int, examples: Examples) -> Finding:
    kinds = (THOUGHT_LEFT_OUT, DROPPED + THOUGHTS_ALONE)
    count = sum(counts.get(kind, 0) for kind in kinds)
    return Finding(
        "unwritten-thoughts",
        "pairs with thoughts that the chat template does not write",
        count,
        pairs,
        level_of(count, pairs, warning=0.0),
        does="Their answers are learned without their thoughts; where nothing else differs the pair is dropped.",
        todo="Give a template that writes the thoughts of answers with model.chat_template.",
        examples=_some(examples, *kinds),
    )


def _turns(counts: Mapping[str, int], pairs: int, examples: Examples) -> Finding:
    count = counts.get(TURN_LEFT_OUT, 0)
    return Finding(
        "unwritten-turns",
        "pairs with a prompt turn that the chat template does not write as it is",
        count,
        pairs,
        level_of(count, pairs, warning=0.0),
        does="The model never sees that turn, or sees it changed: a server leaves it out in the same way.",
        todo="If it matters (a system prompt, a tool's result), give model.chat_template: FILE that writes it.",
        examples=_some(examples, TURN_LEFT_OUT),
    )


def _without_end(counts: Mapping[str, int], pairs: int, examples: Examples) -> Finding:
    count = counts.get(END_APPENDED, 0)
    return Finding(
        "no-end-of-turn",
        "answers for which the template writes no end of turn",
        count,
        pairs,
        level_of(count, pairs, warning=0.0),
        does="EOS is put after them and learned. A server must stop there, or the model goes on as the user.",
        todo="Is it the right template? generation_config.json must name the template's own end of turn as an EOS.",
        examples=_some(examples, END_APPENDED),
    )


def _some(examples: Examples, *kinds: str) -> tuple[Example, ...]:
    return tuple([example for kind in kinds for example in examples.get(kind, ())][:EXAMPLES])
