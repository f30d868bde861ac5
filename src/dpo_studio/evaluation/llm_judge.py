"""An LLM as the judge: any chat model behind an OpenAI-compatible server, given every comparison in both orders.

Every reply is kept (`kept_replies`), found by model, template, parameters, prompt, both answers and their order.
Verdicts are read from the replies each time, so a better reader reads old replies better.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpo_studio.errors import DataError
from dpo_studio.evaluation.endpoint import Endpoint
from dpo_studio.evaluation.judges import Comparison, Opinion, Progress, Verdict, in_both_orders
from dpo_studio.evaluation.kept_replies import Estimate, KeptReplies, Request, digest_of
from dpo_studio.evaluation.llm_template import TEMPLATE, filled, opinion, separates
from dpo_studio.reading import parse_json
from dpo_studio.writing import check_continued

__all__ = ["LLMJudge", "check_replies"]

_OURS = {"dpo_studio": "judge reply"}
"""The beginning of every line; a file whose first line differs is not appended to."""
_BEFORE = frozenset({"key", "model", "base_url", "order", "reply"})
"""What a line had before that."""


def _nobody(text: str) -> None:
    """Receives progress messages."""


@dataclass(frozen=True)
class LLMJudge:
    """A chat model behind an OpenAI-compatible server."""

    model: str
    """As the server calls it."""
    endpoint: Endpoint
    replies: Path
    """JSON Lines: every reply as it came; known requests are not repeated."""
    template: str = TEMPLATE
    parameters: Mapping[str, Any] = field(default_factory=lambda: {"temperature": 0, "max_tokens": 512})
    """Sent with every request."""
    price: tuple[float, float] | None = None
    """Dollars a million tokens, read and written."""
    say: Callable[[str], None] = _nobody

    @property
    def name(self) -> str:
        """For tables."""
        return f"llm:{self.model}"

    @property
    def description(self) -> str:
        """For the report."""
        digest = hashlib.sha256(self.template.encode()).hexdigest()[:8]
        wording = "DPO Studio's own template" if self.template == TEMPLATE else f"a template of the user's ({digest})"
        return (
            f"The chat model {self.model}, asked with {wording} which of two answers is better, in both orders; where "
            "the orders disagree, or a reply has no verdict, it is a tie."
        )

    def estimate(self, comparisons: Sequence[Comparison]) -> Estimate:
        """The cost of the requests that `judge_all` would make."""
        asks = self._asks(comparisons)
        known = self._kept.known(asks)
        return self._kept.estimate([ask for key, ask in asks.items() if key not in known], len(known))

    def judge_all(self, comparisons: Sequence[Comparison], progress: Progress | None = None) -> list[Verdict]:
        """A verdict on each comparison, in order. Two answers of the same text are a tie without a request.

        Raises:
            JudgeError: the server declines, or stops answering. Replies that came are in the file.
        """
        asks = self._asks(comparisons)
        known = self._kept.known(asks)
        missing = [ask for key, ask in asks.items() if key not in known]
        self.say(self._kept.estimate(missing, len(known)).line(self.model))
        answered = _Answered([self._keys(comparison) for comparison in comparisons], progress)
        for key in known:
            answered(key)
        if missing and not separates(self.template):
            self.say("the template has no <tag> around each of its places: an answer may imitate where another begins")
        self._kept.ask(missing, known, answered)
        return [self._verdict(comparison, known) for comparison in comparisons]

    @property
    def _kept(self) -> KeptReplies:
        return KeptReplies(self.replies, self.endpoint, _OURS, self.price, self.say)

    def _asks(self, comparisons: Sequence[Comparison]) -> dict[str, Request]:
        """Every request to make, by its key: equal requests are made once."""
        asks: dict[str, Request] = {}
        for comparison in comparisons:
            keys = self._keys(comparison)
            for order, shown, key in zip(("ab", "ba"), _orders(comparison), keys, strict=False):
                if key not in asks:
                    turns = [{"role": "user", "content": filled(self.template, shown)}]
                    about = {"order": order, "prompt": comparison.prompt[-1].content[:200]}
                    asks[key] = Request(key, {"model": self.model, "messages": turns, **self.parameters}, about)
        return asks

    def _keys(self, comparison: Comparison) -> list[str]:
        """Of the two requests about a comparison; none where both answers are the same."""
        if comparison.a.text == comparison.b.text:
            return []
        return [self._key(shown) for shown in _orders(comparison)]

    def _key(self, shown: Comparison) -> str:
        turns = [[turn.role, turn.content] for turn in shown.prompt]
        return digest_of([self.model, self.template, dict(self.parameters), turns, shown.a.text, shown.b.text])

    def _verdict(self, comparison: Comparison, known: Mapping[str, Mapping[str, Any]]) -> Verdict:
        keys = self._keys(comparison)
        if not keys:
            return Verdict("tie", "Both answers are the same.")
        (said, reason), (said_swapped, _) = (opinion(known[key]) for key in keys)
        return in_both_orders(_of_answers(said, "a", "b"), _of_answers(said_swapped, "b", "a"), reason)


class _Answered:
    """Turns replies into comparisons done: one is when the last of its requests is answered."""

    def __init__(self, keys_of: Sequence[Sequence[str]], progress: Progress | None) -> None:
        self._left = [len(keys) for keys in keys_of]
        self._waiting: dict[str, list[int]] = {}
        for place, keys in enumerate(keys_of):
            for key in keys:
                self._waiting.setdefault(key, []).append(place)
        self._progress = progress or (lambda done: None)
        self._progress(self._left.count(0))

    def __call__(self, key: str) -> None:
        places = self._waiting.pop(key)
        for place in places:
            self._left[place] -= 1
        self._progress(sum(self._left[place] == 0 for place in places))


def check_replies(file: Path, reads: Iterable[str | Path | None] = ()) -> None:
    """Before any request: whether replies can be added to `file`, which is new or has replies of ours.

    Raises:
        UsageError: it is not a place for them.
        DataError: it is something else's.
    """
    check_continued(file, _is_of_replies, reads=reads, option="--judge-replies", what="a file of judge replies")


def _is_of_replies(line: bytes) -> bool:
    if line.startswith(json.dumps(_OURS).encode().removesuffix(b"}") + b","):  # though a full disk cut off its end
        return True
    try:
        first = parse_json(line, what="a kept reply")
    except DataError:
        return False
    return isinstance(first, dict) and first.keys() >= _BEFORE


def _orders(comparison: Comparison) -> tuple[Comparison, Comparison]:
    return comparison, comparison.swap()


def _of_answers(said: str, first: Opinion, second: Opinion) -> Opinion:
    """An opinion on the first and second answer, as one on A and B."""
    known: dict[str, Opinion] = {"1": first, "2": second, "tie": "tie", "refused": "refused", "too long": "too long"}
    return known.get(said, "unparsable")
