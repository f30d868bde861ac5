"""An LLM as the judge: any chat model behind an OpenAI-compatible server, given every comparison in both orders.

Every reply is written, as it came, to a file of JSON Lines before it is used, and the file is the memory: a comparison
whose reply stands there is not asked again, whatever stopped the run before. A reply is found by what it depends on:
model, template, parameters, prompt, both answers and their order. Verdicts are read from the replies each time, so a
better reader reads old replies better.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpo_studio.disk import append_line
from dpo_studio.errors import DataError, UsageError
from dpo_studio.evaluation.endpoint import Declined, Endpoint, run
from dpo_studio.evaluation.judges import Comparison, Opinion, Progress, Verdict, in_both_orders
from dpo_studio.evaluation.llm_template import TEMPLATE, filled, opinion, separates
from dpo_studio.reading import open_regular, parse_json
from dpo_studio.writing import check_continued

__all__ = ["LLMJudge", "check_replies"]

_OURS = {"dpo_studio": "judge reply"}
"""The beginning of every line; a file whose first line differs is not appended to."""
_BEFORE = frozenset({"key", "model", "base_url", "order", "reply"})
"""What a line had before that."""
_CHARACTERS_A_TOKEN = 4
"""English text in today's vocabularies; half as many in other languages."""
_LONGEST_LINE = 16 * 2**20
"""Bytes of a line of kept replies: a reply of the largest size, its characters escaped."""
_PER = 1_000_000
"""Prices are for so many tokens."""
_USED = ("prompt_tokens", "completion_tokens")


def _nobody(text: str) -> None:
    """Receives progress messages."""


@dataclass(frozen=True)
class Estimate:
    """The cost of the requests, before they are made."""

    requests: int
    """Still to be made: two a comparison, less what is known."""
    known: int
    """Replies that are in the file already."""
    tokens_in: int
    """About: four characters a token."""
    tokens_out: int | None
    """At most; None where `parameters` sets no limit."""
    dollars: float | None
    """At most; None without prices or without a limit."""


@dataclass(frozen=True)
class _Ask:
    """One request: a comparison in one order."""

    key: str
    order: str
    """`ab`: A is shown first."""
    text: str
    prompt: str
    """The beginning of the prompt, for readers of the file."""


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
        """The requests that `judge_all` would make."""
        asks = self._asks(comparisons)
        known = self._known(asks)
        return self._estimate([ask for key, ask in asks.items() if key not in known], len(known))

    def judge_all(self, comparisons: Sequence[Comparison], progress: Progress | None = None) -> list[Verdict]:
        """A verdict on each comparison, in order. Two answers of the same text are a tie without a request.

        Raises:
            JudgeError: the server declines, or stops answering. Replies that came are in the file.
        """
        asks = self._asks(comparisons)
        known = self._known(asks)
        missing = [ask for key, ask in asks.items() if key not in known]
        self.say(cost_line(self._estimate(missing, len(known)), self.model))
        answered = _Answered([self._keys(comparison) for comparison in comparisons], progress)
        for key in known:
            answered(key)
        if missing and not separates(self.template):
            self.say("the template has no <tag> around each of its places: an answer may imitate where another begins")
        if missing:
            run(self._ask_all(missing, known, answered))
            self._tell_bill([known[ask.key] for ask in missing])
        return [self._verdict(comparison, known) for comparison in comparisons]

    # What is asked

    def _asks(self, comparisons: Sequence[Comparison]) -> dict[str, _Ask]:
        """Every request to make, by its key: equal requests are made once."""
        asks: dict[str, _Ask] = {}
        for comparison in comparisons:
            keys = self._keys(comparison)
            for order, shown, key in zip(("ab", "ba"), _orders(comparison), keys, strict=False):
                ask = _Ask(key, order, filled(self.template, shown), comparison.prompt[-1].content[:200])
                asks.setdefault(key, ask)
        return asks

    def _keys(self, comparison: Comparison) -> list[str]:
        """Of the two requests about a comparison; none where both answers are the same."""
        if comparison.a.text == comparison.b.text:
            return []
        return [self._key(shown) for shown in _orders(comparison)]

    def _key(self, shown: Comparison) -> str:
        turns = [[turn.role, turn.content] for turn in shown.prompt]
        what = [self.model, self.template, dict(self.parameters), turns, shown.a.text, shown.b.text]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()

    # What it costs

    def _estimate(self, missing: Sequence[_Ask], known: int) -> Estimate:
        tokens_in = sum(len(ask.text) for ask in missing) // _CHARACTERS_A_TOKEN
        limit = self.parameters.get("max_tokens", self.parameters.get("max_completion_tokens"))
        tokens_out = limit * len(missing) if isinstance(limit, int) else None
        dollars = self._dollars(tokens_in, tokens_out) if tokens_out is not None else None
        return Estimate(len(missing), known, tokens_in, tokens_out, dollars)

    def _dollars(self, read: int, written: int) -> float | None:
        return None if self.price is None else (read * self.price[0] + written * self.price[1]) / _PER

    def _tell_time(self, seconds: float, left: int) -> None:
        """How many requests the server answers at a time is unknown: the estimate is from all of them to one."""
        least, most = seconds * left / self.endpoint.asking.concurrency / 60, seconds * left / 60
        if most >= 1:
            self.say(f"the first reply took {seconds:.1f} s: {left:,} more take {least:.0f} to {most:.0f} minutes")

    def _tell_bill(self, replies: Sequence[Mapping[str, Any]]) -> None:
        """The tokens read and written, as the server reports them."""
        used: Counter[str] = Counter()
        for reply in replies:
            usage = reply["reply"].get("usage")
            if isinstance(usage, dict):
                used.update({name: n for name in _USED if type(n := usage.get(name)) is int and 0 <= n < 2**40})
        read, written = used["prompt_tokens"], used["completion_tokens"]
        again = f" in {self.endpoint.retries:,} attempts more than that" if self.endpoint.retries else ""
        dollars = self._dollars(read, written)
        money = "" if dollars is None else f", ${dollars:,.4f}"
        self.say(f"{len(replies):,} replies{again}: {read:,} tokens read, {written:,} written{money}")

    # Asking

    async def _ask_all(
        self, missing: Sequence[_Ask], known: dict[str, dict[str, Any]], answered: Callable[[str], None]
    ) -> None:
        """Request what is missing; each reply is in the file before it is in `known`.

        The first request is made alone: it shows whether the server can be asked at all, and how long a reply takes.
        """
        left = iter(missing)
        async with self.endpoint.client() as client:

            async def ask_one(ask: _Ask) -> None:
                known[ask.key] = self._keep(ask, await self._reply(client, ask))
                answered(ask.key)

            async def work() -> None:
                for ask in left:
                    await ask_one(ask)

            started = time.monotonic()
            await ask_one(next(left))
            self._tell_time(time.monotonic() - started, len(missing) - 1)
            workers = [asyncio.create_task(work()) for _ in range(self.endpoint.asking.concurrency)]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)

    async def _reply(self, client: Any, ask: _Ask) -> dict[str, Any]:
        request = {"model": self.model, "messages": [{"role": "user", "content": ask.text}], **self.parameters}
        try:
            return {"reply": await self.endpoint.complete(client, request)}
        except Declined as declined:
            return {"declined": declined.kind, "reply": declined.answer}

    # The file of replies

    def _keep(self, ask: _Ask, reply: dict[str, Any]) -> dict[str, Any]:
        """Write one complete line to disk before the reply is used."""
        about = {**_OURS, "key": ask.key, "model": self.model, "base_url": self.endpoint.base_url, "order": ask.order}
        record: dict[str, Any] = self.endpoint.without_key(about | {"prompt": ask.prompt} | reply)
        append_line(self.replies, json.dumps(record).encode())
        return record

    def _known(self, asks: Mapping[str, _Ask]) -> dict[str, dict[str, Any]]:
        """The replies that the file has for these requests."""
        known = {}
        for record in _records(self.replies):
            key = record.get("key")
            if isinstance(key, str) and key in asks and isinstance(record.get("reply"), dict):
                known[key] = self.endpoint.without_key(record)
        servers = Counter(str(record.get("base_url")) for record in known.values())
        for server, count in servers.items():
            if server != self.endpoint.base_url:
                self.say(f"{count:,} of the known replies of {self.model} were given by {server}")
        return known

    # From replies to verdicts

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


def cost_line(cost: Estimate, model: str) -> str:
    """The estimate in words."""
    known = f" ({cost.known:,} more are known)" if cost.known else ""
    out = "" if cost.tokens_out is None else f", at most {cost.tokens_out:,} written"
    money = "" if cost.dollars is None else f", at most ${cost.dollars:,.2f}"
    return f"{cost.requests:,} requests to {model}{known}: about {cost.tokens_in:,} tokens read{out}{money}"


def _orders(comparison: Comparison) -> tuple[Comparison, Comparison]:
    return comparison, comparison.swap()


def _of_answers(said: str, first: Opinion, second: Opinion) -> Opinion:
    """An opinion on the first and second answer, as one on A and B."""
    known: dict[str, Opinion] = {"1": first, "2": second, "tie": "tie", "refused": "refused", "too long": "too long"}
    return known.get(said, "unparsable")


def _records(file: Path) -> Iterator[dict[str, Any]]:
    """The complete lines of the file; an incomplete one is not a reply."""
    if not file.exists():
        return
    with open_regular(file, what="--judge-replies", error=UsageError) as lines:
        while line := lines.readline(_LONGEST_LINE):
            try:
                record = parse_json(line, what="a kept reply")
            except DataError:
                continue
            if isinstance(record, dict):
                yield record
