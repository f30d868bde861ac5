"""Requests to an OpenAI-compatible server: many at once, each retried while that can help.

The key comes from an environment variable and from nowhere else. It goes to the server that was named and to no other
that this one names, and is cut out of whatever comes back before anybody sees it: servers quote keys in their errors.

What is tried again: a dropped connection, no answer within the time, 408, 409, 425, 429, any 5xx, and a reply that is
no chat completion (a proxy's page, an error sent as 200). What is not: everything else a server says no to, because the
next request would get the same answer. All attempts at a request together have a limit, too: a server that answers a
byte at a time costs twice `timeout_s`, one that asks for patience ten minutes.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from dpo_studio.errors import DataError, JudgeError, UsageError, install_hint
from dpo_studio.evaluation.secret import Secret
from dpo_studio.reading import parse_json

if TYPE_CHECKING:
    from openai import AsyncOpenAI

__all__ = ["Asking", "Declined", "Endpoint", "run"]

DEFAULT_KEY_VARIABLE = "OPENAI_API_KEY"
_NO_KEY = "none"
"""The key that is sent if there is none: local servers need the header, and ignore its value."""
_AGAIN = frozenset({408, 409, 425, 429})
_LONGEST_WAIT = 600.0
"""The most seconds of pauses between the attempts at one request. If a server asks for more, it is given up."""
_TIMEOUTS = 2
"""The most time of all attempts at one request, without pauses, in multiples of `timeout_s`."""
_DEPTH = 60
"""Levels of a reply; a chat completion with log-probs has nine."""
_LEAST = 0.01
"""Seconds: with less left than that no server can answer."""
_REASONS = 20
"""The most reasons for a retry that are reported."""
_LOCAL = ("localhost", "127.0.0.1", "::1")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Asking:
    """How requests are made."""

    options: str = "--judge"
    """What the command line's options about these requests begin with, for messages."""
    key_variable: str | None = None
    """The environment variable with the key; None: OPENAI_API_KEY, which is not sent in clear text to others."""
    concurrency: int = 8
    """Requests at a time."""
    timeout_s: float = 120.0
    """Longest wait for a whole reply."""
    attempts: int = 6
    """Attempts at one request before it is given up."""
    first_wait_s: float = 1.0
    """Seconds before the second attempt; twice as many before each further one, unless the server names a time."""

    def __post_init__(self) -> None:
        if self.concurrency < 1 or self.attempts < 1:
            raise UsageError("a server is asked at least one request at a time, and once")
        if not 0 < self.timeout_s < float("inf") or self.first_wait_s < 0:
            raise UsageError(f"a reply cannot be waited for {self.timeout_s} seconds")


class Declined(Exception):
    """The server will not answer this request, while it would answer others."""

    def __init__(self, kind: str, answer: dict[str, Any]) -> None:
        super().__init__(kind)
        self.kind = kind
        """`refused` or `too long`."""
        self.answer = answer
        """Status and message of the server."""


class _Again(Exception):
    """An attempt that failed for a reason that may pass."""

    def __init__(self, why: str, wait_s: float | None = None) -> None:
        super().__init__(why)
        self.why = why
        self.wait_s = wait_s


class Endpoint:
    """One server, and how requests are made."""

    def __init__(self, base_url: str, asking: Asking, say: Callable[[str], None]) -> None:
        """
        Raises:
            UsageError: the address cannot be one, or holds a password; or the key cannot be a key.
        """
        self.base_url = _checked_url(base_url)
        self.asking, self._say = asking, say
        self._key = self._find_key()
        self._secret = Secret(self._key)
        self._reported: set[str] = set()
        self.retries = 0
        """Attempts that were not the first of their request."""

    def _find_key(self) -> str:
        variable = self.asking.key_variable or DEFAULT_KEY_VARIABLE
        key = os.environ.get(variable, "").strip()
        if not key and self.asking.key_variable is not None:
            raise UsageError(
                f"the environment variable {variable} is unset or empty", hint="export it, or name another"
            )
        if not all("!" <= character <= "~" for character in key):
            raise UsageError(
                f"the key in {variable} has a character that is not allowed in a key", hint="was it copied whole?"
            )
        url = urlsplit(self.base_url)
        if key and self.asking.key_variable is None and url.scheme == "http" and url.hostname not in _LOCAL:
            self._say(
                f"{url.hostname} gets no key: it would go there in clear text "
                f"({self.asking.options}-key-env {variable} sends it)"
            )
            return ""
        return key

    def without_key(self, value: Any) -> Any:
        """A JSON value (a text is one) with the key cut out of all its texts, however it is written there."""
        return self._secret.cut_everywhere(value)

    @asynccontextmanager
    async def client(self) -> AsyncIterator[AsyncOpenAI]:
        """A connection to the server, closed on leaving.

        Raises:
            JudgeError: the openai package is not installed.
        """
        try:
            from openai import AsyncOpenAI
        except ImportError:
            raise JudgeError("asking a server needs the openai package", hint=install_hint("judge")) from None
        from dpo_studio.evaluation.http_client import BoundedClient

        client = AsyncOpenAI(
            base_url=self.base_url,
            api_key=self._key or _NO_KEY,
            timeout=self.asking.timeout_s,
            max_retries=0,
            http_client=BoundedClient(timeout=self.asking.timeout_s),
        )
        async with client:
            yield client

    async def complete(self, client: AsyncOpenAI, request: Mapping[str, Any]) -> dict[str, Any]:
        """The server's chat completion, as it sent it, without the key.

        Raises:
            Declined: the server declines this one request.
            JudgeError: it refuses the requests, sends invalid replies, or gave no answer in `attempts` attempts.
        """
        patience, asking = _LONGEST_WAIT, _TIMEOUTS * self.asking.timeout_s
        for attempt in range(1, self.asking.attempts + 1):
            started = time.monotonic()
            try:
                return await self._attempt(client, request, min(asking, self.asking.timeout_s))
            except _Again as again:
                why, asked_for = _short(self.without_key(again.why)), again.wait_s  # else half a key might be left
            asking -= time.monotonic() - started
            wait = self._wait(attempt, asked_for)
            if attempt == self.asking.attempts or wait > patience or asking <= _LEAST:
                more = f"; it asks for {wait:,.0f} s more" if wait > patience else ""
                raise JudgeError(
                    f"{self.base_url} gave no answer in {attempt} attempts: {why}{more}",
                    hint="replies so far are saved: the same command requests only the others",
                )
            self._warn_of_retry(why, wait)
            self.retries += 1
            patience -= wait
            await asyncio.sleep(wait)
        raise AssertionError("the last attempt returns or raises")

    def _wait(self, attempt: int, asked_for: float | None) -> float:
        """Seconds; different for each worker, so that they do not all retry at once."""
        seconds = asked_for if asked_for is not None else self.asking.first_wait_s * 2 ** (attempt - 1)
        return seconds * random.uniform(1.0, 1.25)

    def _warn_of_retry(self, why: str, wait: float) -> None:
        """Report each reason once, up to a limit; the rest is counted."""
        if why not in self._reported and len(self._reported) < _REASONS:
            self._reported.add(why)
            self._say(f"{why}: trying again in {wait:.0f} s")

    async def _attempt(self, client: AsyncOpenAI, request: Mapping[str, Any], limit_s: float) -> dict[str, Any]:
        import httpx2
        import openai

        from dpo_studio.evaluation.http_client import ReplyRefusedError, StatusError

        try:
            async with asyncio.timeout(limit_s):  # the client's own limit is for each piece of a reply
                reply = await client.post("/chat/completions", body=dict(request), cast_to=httpx2.Response)
        except (TimeoutError, openai.APITimeoutError):
            raise _Again(f"no answer within {self.asking.timeout_s:g} s") from None
        except openai.APIConnectionError as error:
            raise _Again(f"no connection ({_cause(error)})") from None
        except StatusError as error:
            raise self._refusal(error.status, error.body, error.retry_after) from None
        except ReplyRefusedError as error:
            said = _short(self.without_key(str(error)))
            raise JudgeError(f"{self.base_url} cannot be asked: {said}", hint=error.hint) from None
        return self._completion(reply.content)

    def _completion(self, content: bytes) -> dict[str, Any]:
        try:
            whole = self.without_key(parse_json(content, what="a reply", depth=_DEPTH))
        except DataError:
            raise _Again("a reply that is not JSON") from None
        choices = whole.get("choices") if isinstance(whole, dict) else None
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise _Again(f"a reply without choices ({_short(str(whole))})")
        return dict(whole)

    def _refusal(self, status: int, body: bytes, retry_after: str | None) -> Exception:
        """What a status of 400 and more means for the request, and for those after it."""
        code, said = self._said(body)
        about = f"{code} {said}".lower()
        if (status in _AGAIN or status >= 500) and "insufficient_quota" not in about:
            return _Again(f"status {status}", _seconds(retry_after))
        answer = {"status": status, "said": said}
        if status in (400, 413, 422):
            if "content_filter" in about or "content management policy" in about:
                return Declined("refused", answer)
            if any(words in about for words in ("context length", "context_length", "context window", "too long")):
                return Declined("too long", answer)
        return JudgeError(f"{self.base_url} says no (status {status}): {said}", hint=_hint(status, self.asking.options))

    def _said(self, body: bytes) -> tuple[str, str]:
        """Code and message of an error, without the key, which is removed after parsing."""
        try:
            whole = self.without_key(parse_json(body, what="an error", depth=_DEPTH))
        except DataError:
            return "", _short(self.without_key(body.decode("utf-8", "replace")))
        error = whole.get("error", whole) if isinstance(whole, dict) else whole
        about = error if isinstance(error, dict) else {}
        return _short(str(about.get("code") or "")), _short(self.without_key(str(about.get("message") or whole)))


def _hint(status: int, options: str) -> str:
    if status in (401, 403):
        return f"the key is read from {DEFAULT_KEY_VARIABLE}, or from the variable that {options}-key-env names"
    if status == 404:
        return "is the model's name the server's own, and does the address end in /v1?"
    return f"{options}-param changes what is asked for, such as temperature=null"


def _checked_url(base_url: str) -> str:
    try:
        url = urlsplit(base_url)
        fine = url.scheme in ("http", "https") and bool(url.hostname) and (url.port is None or url.port > 0)
    except ValueError:
        fine = False
    if not fine:
        raise UsageError(f"{base_url!r} is not the address of a server", hint="such as http://localhost:8000/v1")
    if url.username or url.password or url.query or url.fragment:  # it is written into files and reports
        raise UsageError(
            "a server's address has more than a server and a path",
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
    """One line of it. The key is removed before: half of it could not be recognised."""
    return " ".join(text.split())[:200]


def run(work: Coroutine[Any, Any, _T]) -> _T:
    """The result of asynchronous work, whether or not an event loop runs already (in a notebook)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()
