"""Requests to a server whose replies are kept: every reply is written, as it came, before it is used.

The file of JSON Lines is the memory: a request whose reply stands there is not made again, whatever stopped the command
before. A reply is found by its request's key, a digest of all that it depends on.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_studio.disk import append_line
from dpo_studio.errors import DataError, UsageError
from dpo_studio.evaluation.endpoint import Declined, Endpoint, run
from dpo_studio.reading import open_regular, parse_json

__all__ = ["Bill", "KeptReplies", "Request", "digest_of"]

_CHARACTERS_A_TOKEN = 4
"""English text in today's vocabularies; half as many in other languages."""
_LONGEST_LINE = 16 * 2**20
"""Bytes of a line of kept replies: a reply of the largest size, its characters escaped."""
_PER = 1_000_000
"""Prices are for so many tokens."""
_USED = ("prompt_tokens", "completion_tokens")


@dataclass(frozen=True)
class Request:
    """One request, and what the file says about it."""

    key: str
    """A digest of all that the reply depends on."""
    body: Mapping[str, Any]
    """Model, messages, parameters."""
    about: Mapping[str, str]
    """For readers of the file."""


@dataclass(frozen=True)
class Bill:
    """What requests cost, as the server reports it."""

    requests: int = 0
    read: int = 0
    """Tokens."""
    written: int = 0
    dollars: float | None = None
    """None without prices."""


@dataclass(frozen=True)
class Estimate:
    """The cost of the requests, before they are made."""

    requests: int
    """Still to be made: less what is known."""
    known: int
    """Replies that are in the file already."""
    tokens_in: int
    """About: four characters a token."""
    tokens_out: int | None
    """At most; None where the parameters set no limit."""
    dollars: float | None
    """At most; None without prices or without a limit."""

    def line(self, model: str) -> str:
        """The estimate in words."""
        known = f" ({self.known:,} more are known)" if self.known else ""
        out = "" if self.tokens_out is None else f", at most {self.tokens_out:,} written"
        money = "" if self.dollars is None else f", at most ${self.dollars:,.2f}"
        return f"{self.requests:,} requests to {model}{known}: about {self.tokens_in:,} tokens read{out}{money}"


@dataclass(frozen=True)
class KeptReplies:
    """A file of replies, and the server that gives those which are missing."""

    file: Path
    endpoint: Endpoint
    what: Mapping[str, str]
    """The beginning of every line: a file whose first line differs is not appended to."""
    price: tuple[float, float] | None
    """Dollars a million tokens, read and written."""
    say: Callable[[str], None]

    def known(self, keys: Collection[str]) -> dict[str, dict[str, Any]]:
        """The replies that the file has for these requests."""
        known = {}
        for record in _records(self.file):
            key = record.get("key")
            if isinstance(key, str) and key in keys and isinstance(record.get("reply"), dict):
                known[key] = self.endpoint.without_key(record)
        servers = Counter((str(record.get("base_url")), str(record.get("model"))) for record in known.values())
        for (server, model), count in servers.items():
            if server != self.endpoint.base_url:
                self.say(f"{count:,} of the known replies of {model} were given by {server}")
        return known

    def estimate(self, requests: Sequence[Request], known: int) -> Estimate:
        """What these requests, besides so many known ones, will cost."""
        characters = sum(len(turn["content"]) for request in requests for turn in request.body["messages"])
        tokens_in, tokens_out = characters // _CHARACTERS_A_TOKEN, 0
        for request in requests:
            limit = request.body.get("max_tokens", request.body.get("max_completion_tokens"))
            if not isinstance(limit, int):
                return Estimate(len(requests), known, tokens_in, None, None)
            tokens_out += limit
        return Estimate(len(requests), known, tokens_in, tokens_out, self._dollars(tokens_in, tokens_out))

    def ask(
        self, requests: Sequence[Request], known: dict[str, dict[str, Any]], answered: Callable[[str], None]
    ) -> None:
        """Make the requests; each reply is in the file before it is in `known`. `answered` receives its key.

        Raises:
            JudgeError: the server declines, or stops answering. Replies that came are in the file.
        """
        if requests:
            run(self._ask_all(requests, known, answered))
            self._tell_bill(self.bill([known[request.key] for request in requests]))

    def bill(self, replies: Sequence[Mapping[str, Any]]) -> Bill:
        """The tokens read and written, as the server reports them."""
        used: Counter[str] = Counter()
        for reply in replies:
            usage = reply["reply"].get("usage")
            if isinstance(usage, dict):
                used.update({name: n for name in _USED if type(n := usage.get(name)) is int and 0 <= n < 2**40})
        read, written = used["prompt_tokens"], used["completion_tokens"]
        return Bill(len(replies), read, written, self._dollars(read, written))

    def _dollars(self, read: int, written: int) -> float | None:
        return None if self.price is None else (read * self.price[0] + written * self.price[1]) / _PER

    def _tell_bill(self, bill: Bill) -> None:
        again = f" in {self.endpoint.retries:,} attempts more than that" if self.endpoint.retries else ""
        money = "" if bill.dollars is None else f", ${bill.dollars:,.4f}"
        self.say(f"{bill.requests:,} replies{again}: {bill.read:,} tokens read, {bill.written:,} written{money}")

    def _tell_time(self, seconds: float, left: int) -> None:
        """How many requests the server answers at a time is unknown: the estimate is from all of them to one."""
        least, most = seconds * left / self.endpoint.asking.concurrency / 60, seconds * left / 60
        if most >= 1:
            self.say(f"the first reply took {seconds:.1f} s: {left:,} more take {least:.0f} to {most:.0f} minutes")

    async def _ask_all(
        self, requests: Sequence[Request], known: dict[str, dict[str, Any]], answered: Callable[[str], None]
    ) -> None:
        """The first request is made alone: it shows whether the server can be asked, and how long a reply takes."""
        left = iter(requests)
        async with self.endpoint.client() as client:

            async def ask_one(request: Request) -> None:
                known[request.key] = self._keep(request, await self._reply(client, request))
                answered(request.key)

            async def work() -> None:
                for request in left:
                    await ask_one(request)

            started = time.monotonic()
            await ask_one(next(left))
            self._tell_time(time.monotonic() - started, len(requests) - 1)
            workers = [asyncio.create_task(work()) for _ in range(self.endpoint.asking.concurrency)]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)

    async def _reply(self, client: Any, request: Request) -> dict[str, Any]:
        try:
            return {"reply": await self.endpoint.complete(client, request.body)}
        except Declined as declined:
            return {"declined": declined.kind, "reply": declined.answer}

    def _keep(self, request: Request, reply: dict[str, Any]) -> dict[str, Any]:
        """Write one complete line to disk before the reply is used."""
        asked = {"key": request.key, "model": request.body["model"], "base_url": self.endpoint.base_url}
        record: dict[str, Any] = self.endpoint.without_key({**self.what, **asked, **request.about, **reply})
        append_line(self.file, json.dumps(record).encode())
        return record


def digest_of(what: object) -> str:
    """The key of a request: sha256 of all that its reply depends on, as JSON."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def _records(file: Path) -> Iterator[dict[str, Any]]:
    """The complete lines of the file; an incomplete one is not a reply."""
    if not file.exists():
        return
    with open_regular(file, what="kept replies", error=UsageError) as lines:
        while line := lines.readline(_LONGEST_LINE):
            try:
                record = parse_json(line, what="a kept reply")
            except DataError:
                continue
            if isinstance(record, dict):
                yield record
