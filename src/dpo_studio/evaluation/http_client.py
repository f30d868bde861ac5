"""The HTTP client for servers of models: it sends requests to its own server only, and every reply is limited in size.

`openai` follows redirects, reads replies of any size, and decompresses them. Here a redirect is an error that names
both hosts, because the other host would get the prompts and the key; a body is read up to a limit, and decompressed up
to the same one.
"""

from __future__ import annotations

import zlib
from typing import Any
from urllib.parse import urlsplit

import httpx2

__all__ = ["LARGEST_REPLY", "BoundedClient", "ReplyRefusedError", "StatusError"]

LARGEST_REPLY = 4 * 2**20
"""Bytes, as sent and as decompressed. A reply of 100,000 tokens is half a megabyte; one of 512, each with the log-probs
of 20 others, is one."""


class ReplyRefusedError(Exception):
    """A reply that is refused, where a retry would not help."""

    def __init__(self, why: str, hint: str | None = None) -> None:
        super().__init__(why)
        self.hint = hint


class StatusError(Exception):
    """The server answered with a status of 400 or more."""

    def __init__(self, status: int, body: bytes, retry_after: str | None) -> None:
        super().__init__(f"status {status}")
        self.status = status
        self.body = body
        self.retry_after = retry_after


class BoundedClient(httpx2.AsyncClient):
    """A client whose replies are complete, decompressed and of limited size."""

    async def send(self, request: httpx2.Request, **settings: Any) -> httpx2.Response:
        """Send the request; redirects are not followed.

        Raises:
            ReplyRefusedError: a redirect, or a body that is too large, decompresses to too much, or is not as it says.
            StatusError: the server answers with an error.
        """
        request.headers["Accept-Encoding"] = "gzip, deflate"
        response = await super().send(request, **{**settings, "stream": True, "follow_redirects": False})
        try:
            if 300 <= response.status_code < 400:
                raise _redirect(request, response)
            body = _decompressed(await _whole(response), response.headers.get("content-encoding", ""))
        finally:
            await response.aclose()
        if response.status_code >= 400:
            raise StatusError(response.status_code, body, response.headers.get("retry-after"))
        return httpx2.Response(response.status_code, content=body, request=request)


def _redirect(request: httpx2.Request, response: httpx2.Response) -> ReplyRefusedError:
    asked, status = request.url.netloc.decode("ascii", "replace"), response.status_code
    target = response.headers.get("location")
    if target is None:
        return ReplyRefusedError(f"{asked} answers with status {status}, which is not a reply")
    return ReplyRefusedError(
        f"{asked} sends its requests on to {_host(target) or asked} (status {status}): redirects are not followed: "
        "prompts and key would go there",
        "if that is the server you mean, name its own address",
    )


def _host(address: str) -> str:
    """The host and port an address names; empty for one of the same host."""
    try:
        return urlsplit(address).netloc.rpartition("@")[2][:200]
    except ValueError:
        return "an invalid address"


async def _whole(response: httpx2.Response) -> bytes:
    body = bytearray()
    async for piece in response.aiter_raw():
        body += piece
        if len(body) > LARGEST_REPLY:
            raise _too_large("")
    return bytes(body)


def _decompressed(body: bytes, encodings: str) -> bytes:
    """The decompressed body: one encoding, gzip or deflate."""
    named = [name for part in encodings.split(",") if (name := part.strip().lower()) not in ("", "identity")]
    if not named:
        return body
    if len(named) > 1 or named[0] not in ("gzip", "x-gzip", "deflate"):
        raise ReplyRefusedError(f"a reply compressed as {', '.join(named)[:80]!r}, where gzip or deflate was asked for")
    zlib_header = len(body) > 1 and body[0] & 0x0F == 8 and (body[0] * 256 + body[1]) % 31 == 0
    window = 31 if "gzip" in named[0] else 15 if zlib_header else -15  # some send deflate without its header
    reader = zlib.decompressobj(window)
    try:
        plain = reader.decompress(body, LARGEST_REPLY + 1)
    except zlib.error:
        raise ReplyRefusedError(f"a reply that says it is {named[0]} and is not") from None
    if len(plain) > LARGEST_REPLY:
        raise _too_large(", decompressed")
    if body and not reader.eof:
        raise ReplyRefusedError(f"a reply whose {named[0]} breaks off")
    return plain


def _too_large(how: str) -> ReplyRefusedError:
    return ReplyRefusedError(
        f"a reply of more than {LARGEST_REPLY // 2**20} MiB{how}", "is this the address of a chat model?"
    )
