"""Asking an OpenAI-compatible server: many requests at once, each tried again while that can help.

The key comes from an environment variable and from nowhere else. It goes to the server that was named, and is cut out
of whatever comes back before anybody sees it: servers quote keys in their errors.

What is tried again: a dropped connection, no answer within the time, 408, 409, 425, 429, any 5xx, and a reply that is
no chat completion (a proxy's page, an error sent as 200). What is not: everything else a server says no to, because
the next request would be told the same.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from dpo_studio.errors import JudgeError, UsageError, install_hint

if TYPE_CHECKING:
    from openai import AsyncOpenAI

__all__ = ["DEFAULT_KEY_VARIABLE", "Asking", "Declined", "Endpoint", "run"]

DEFAULT_KEY_VARIABLE = "OPENAI_API_KEY"
_NO_KEY = "none"
"""What is sent where there is no key: local servers want a header, and look at nothing in it."""
_SECRET = 8
"""Shorter keys are no secrets but words such as `EMPTY`, which a reply may well hold."""
_AGAIN = frozenset({408, 409, 425, 429})
_LONGEST_WAIT = 600.0
"""Seconds. A server may ask for more; ten minutes later it is asked whether it meant it."""
_LOCAL = ("localhost", "127.0.0.1", "::1")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Asking:
    """How requests are made."""

    key_variable: str | None = None
    """The environment variable that holds the key; None: OPENAI_API_KEY, which is not sent in clear text to others."""
    concurrency: int = 8
    """Requests at a time."""
    timeout_s: float = 120.0
    """Longest wait for a whole reply."""
    attempts: int = 6
    """How often one request is made before the judge gives up."""
    first_wait_s: float = 1.0
    """Seconds before the second attempt; twice as many before each further one, unless the server names a time."""

    def __post_init__(self) -> None:
        if self.concurrency < 1 or self.attempts < 1:
            raise UsageError("a judge needs at least one request at a time and one attempt")
        if not 0 < self.timeout_s < float("inf") or self.first_wait_s < 0:
            raise UsageError(f"a judge cannot wait {self.timeout_s} seconds")


class Declined(Exception):
    """The server will not answer this request, while it would answer others."""

    def __init__(self, kind: str, answer: dict[str, Any]) -> None:
        super().__init__(kind)
        self.kind = kind
        """`refused` or `too long`."""
        self.answer = answer
        """Status and what the server said."""


class _Again(Exception):
    """An attempt that failed for a reason that may pass."""

    def __init__(self, why: str, wait_s: float | None = None) -> None:
        super().__init__(why)
        self.why = why
        self.wait_s = wait_s


class Endpoint:
    """One server, and how it is asked."""

    def __init__(self, base_url: str, asking: Asking, say: Callable[[str], None]) -> None:
        """
        Raises:
            UsageError: the address cannot be one, or holds a password; or the key cannot be a key.
        """
        self.base_url = _checked_url(base_url)
        self.asking, self._say = asking, say
        self._key = self._find_key()
        self._told: set[str] = set()
        self.retries = 0
        """Attempts that were not the first of their request."""

    def _find_key(self) -> str:
        variable = self.asking.key_variable or DEFAULT_KEY_VARIABLE
        key = os.environ.get(variable, "").strip()
        if not key and self.asking.key_variable is not None:
            raise UsageError(f"the environment variable {variable} holds no key", hint="export it, or name another")
        if not all("!" <= character <= "~" for character in key):
            raise UsageError(f"the key in {variable} holds a character that no key has", hint="was it copied whole?")
        url = urlsplit(self.base_url)
        if key and self.asking.key_variable is None and url.scheme == "http" and url.hostname not in _LOCAL:
            self._say(
                f"{url.hostname} gets no key: it would go there in clear text (--judge-key-env {variable} sends it)"
            )
            return ""
        return key

    def without_key(self, text: str) -> str:
        """The text with the key cut out, as it is and as JSON and Python write it."""
        if len(self._key) < _SECRET:
            return text
        for written in (self._key, json.dumps(self._key)[1:-1], repr(self._key)[1:-1]):
            text = text.replace(written, "[key]")
        return text

    @asynccontextmanager
    async def client(self) -> AsyncIterator[AsyncOpenAI]:
        """A connection to the server, closed on leaving.

        Raises:
            JudgeError: the openai package is not installed.
        """
        try:
            from openai import AsyncOpenAI
        except ImportError:
            raise JudgeError("an LLM judge needs the openai package", hint=install_hint("judge")) from None
        key = self._key or _NO_KEY
        async with AsyncOpenAI(
            base_url=self.base_url, api_key=key, timeout=self.asking.timeout_s, max_retries=0
        ) as client:
            yield client

    async def complete(self, client: AsyncOpenAI, request: Mapping[str, Any]) -> dict[str, Any]:
        """The server's chat completion, as it sent it, less the key.

        Raises:
            Declined: the server declines this one request.
            JudgeError: it declines all, or gave no answer in `attempts` attempts.
        """
        for attempt in range(1, self.asking.attempts + 1):
            try:
                return await self._attempt(client, request)
            except _Again as again:
                why = _short(self.without_key(again.why))  # in this order: half a key is a key, too
                if attempt == self.asking.attempts:
                    raise JudgeError(
                        f"{self.base_url} gave no answer in {attempt} attempts: {why}",
                        hint="replies so far are kept: the same command asks only for the others",
                    ) from None
                wait = self._wait(attempt, again.wait_s)
                self._tell(why, wait)
            self.retries += 1
            await asyncio.sleep(wait)
        raise AssertionError("the last attempt returns or raises")

    def _wait(self, attempt: int, asked_for: float | None) -> float:
        """Seconds; never the same for two workers, or they would all come back at once."""
        seconds = asked_for if asked_for is not None else self.asking.first_wait_s * 2 ** (attempt - 1)
        return min(seconds, _LONGEST_WAIT) * random.uniform(1.0, 1.25)

    def _tell(self, why: str, wait: float) -> None:
        """Each reason once; the rest is counted."""
        if why not in self._told:
            self._told.add(why)
            self._say(f"{why}: trying again in {wait:.0f} s")

    async def _attempt(self, client: AsyncOpenAI, request: Mapping[str, Any]) -> dict[str, Any]:
        import openai

        try:
            async with asyncio.timeout(self.asking.timeout_s):  # the client's own limit is for each piece of a reply
                reply = await client.chat.completions.with_raw_response.create(**request)
        except (TimeoutError, openai.APITimeoutError):
            raise _Again(f"no answer within {self.asking.timeout_s:g} s") from None
        except openai.APIConnectionError as error:
            raise _Again(f"no connection ({_cause(error)})") from None
        except openai.APIStatusError as error:
            raise self._refusal(error) from None
        return self._completion(reply.text)

    def _completion(self, text: str) -> dict[str, Any]:
        try:
            whole = json.loads(self.without_key(text))
        except (ValueError, RecursionError):
            raise _Again("a reply that is not JSON") from None
        choices = whole.get("choices") if isinstance(whole, dict) else None
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise _Again(f"a reply without choices ({_short(json.dumps(whole))})")
        return dict(whole)

    def _refusal(self, error: Any) -> Exception:
        """What a status of 400 and more means for the request, and for those after it."""
        status, said = error.status_code, _short(self.without_key(error.message))
        about = f"{error.code or ''} {said}".lower()
        if (status in _AGAIN or status >= 500) and "insufficient_quota" not in about:
            return _Again(f"status {status}", _seconds(error.response.headers.get("retry-after")))
        answer = {"status": status, "said": said}
        if status in (400, 413, 422):
            if "content_filter" in about or "content management policy" in about:
                return Declined("refused", answer)
            if any(words in about for words in ("context length", "context_length", "context window", "too long")):
                return Declined("too long", answer)
        return JudgeError(f"{self.base_url} says no (status {status}): {said}", hint=_hint(status))


def _hint(status: int) -> str:
    if status in (401, 403):
        return f"the key is read from {DEFAULT_KEY_VARIABLE}, or from the variable that --judge-key-env names"
    if status == 404:
        return "is the model's name the server's own, and does the address end in /v1?"
    return "--judge-param changes what is asked for, such as temperature=null"


def _checked_url(base_url: str) -> str:
    try:
        url = urlsplit(base_url)
        fine = url.scheme in ("http", "https") and bool(url.hostname) and (url.port is None or url.port > 0)
    except ValueError:
        fine = False
    if not fine:
        raise UsageError(f"{base_url!r} is no address of a server", hint="such as http://localhost:8000/v1")
    if url.username or url.password or url.query or url.fragment:  # it is written into files and reports
        raise UsageError(
            "the judge's address holds more than a server and a path",
            hint="a key belongs in an environment variable, never in an address",
        )
    return base_url.rstrip("/")


def _seconds(header: str | None) -> float | None:
    """A Retry-After header in seconds; a date in it is left to our own waiting."""
    try:
        seconds = float(header or "")
    except ValueError:
        return None
    return seconds if 0 <= seconds < float("inf") else None


def _cause(error: BaseException) -> str:
    cause = error.__cause__ or error
    return str(cause) or type(cause).__name__


def _short(text: str) -> str:
    return " ".join(text.split())[:200]


def run(work: Coroutine[Any, Any, _T]) -> _T:
    """The result of asynchronous work, from where a loop runs already (a notebook) as well as from where none does."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()
