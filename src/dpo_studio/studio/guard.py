"""The door of the studio: which requests reach a route at all, and what every answer says to the browser.

- Host: a page whose name was pointed at this machine (DNS rebinding) asks with its own name, which is refused.
- Origin: whatever changes something must come from a page of this scheme, host and port; a form of another site, or
  a page on another port of this machine, is refused, although the browser may send our cookie along.
- Cookie: without one every path below /api answers 401.
- Bodies are bounded, as they are read: a length that is promised is not believed.
"""

from __future__ import annotations

import ipaddress
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dpo_studio.studio.api_errors import no_store, refusal

__all__ = ["LARGEST_BODY", "LOGIN", "Door", "Guard"]

LARGEST_BODY = 8 * 2**20
"""Bytes of a request, but for an upload: ten thousand edited pairs."""
LARGEST_UPLOAD = 2**30
UPLOADS = "/api/uploads/"
LOGIN = "/api/login"
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
_OF_OURS = frozenset({"same-origin", "none"})
"""Values of Sec-Fetch-Site: asked by a page of ours, or typed into the browser."""
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; "
        "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


@dataclass(frozen=True)
class Door:
    """Where a studio listens, and whom it knows."""

    host: str
    port: int
    cookie: str
    is_known: Callable[[str], bool]

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine can ask."""
        return is_loopback(self.host)

    def is_ours(self, host: str) -> bool:
        """Whether a Host header names this studio.

        Where the network may ask, any address of a machine will do (rebinding needs a name), and the name that was
        given as `--host`.
        """
        name, _, port = host.rpartition(":") if not host.endswith("]") else (host, "", "80")
        if not name:
            name, port = host, "80"
        if port != str(self.port):
            return False
        name = name.strip("[]").lower()
        if name in ("localhost", self.host.lower()) or is_loopback(name):
            return True
        return not self.on_loopback and _is_address(name)


class Guard:
    """ASGI middleware around the whole studio."""

    def __init__(self, app: ASGIApp, door: Door) -> None:
        self.app = app
        self.door = door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # there is no web socket here
            await send({"type": "websocket.close", "code": 1008})
            return
        asked = HTTPConnection(scope)
        answering = _with_headers(send, private=scope["path"].startswith("/api"))
        try:
            refused = self._refusal(scope, asked) or _too_long(asked.headers, _limit(scope["path"]))
        except sqlite3.Error as error:  # a full disk, or the folder is gone: who is logged in cannot be looked up
            refused = no_store(error)
        if refused is not None:
            await refused(scope, receive, answering)
            return
        bounded = _Bounded(receive, _limit(scope["path"]))
        await self.app(scope, bounded, answering)

    def _refusal(self, scope: Scope, asked: HTTPConnection) -> JSONResponse | None:
        headers = asked.headers
        host = headers.get("host", "")
        if len(headers.getlist("host")) != 1 or not self.door.is_ours(host):
            return refusal("this name is not the studio's", status=421, hint="open the address that the terminal shows")
        origin = headers.get("origin")
        changes = scope["method"] not in _SAFE
        if (changes and origin is None) or (origin is not None and origin != f"{scope['scheme']}://{host}"):
            return refusal("only the studio's own pages may ask this", status=403)
        if not scope["path"].startswith("/api"):
            return None
        if headers.get("sec-fetch-site", "none") not in _OF_OURS:
            return refusal("only the studio's own pages may ask this", status=403)
        if scope["path"] != LOGIN and not self.door.is_known(asked.cookies.get(self.door.cookie, "")):
            hint = "`dpo studio --link` prints a link that logs this browser in"
            return refusal("log in first", status=401, hint=hint)
        if changes and _kind(headers) != _expected(scope["path"]):
            return refusal(f"a body of {_expected(scope['path'])} is expected", status=415)
        return None


class _Bounded:
    """The body of a request, which ends the request when it grows beyond its limit."""

    def __init__(self, receive: Receive, limit: int) -> None:
        self.receive = receive
        self.left = limit

    async def __call__(self) -> Message:
        message = await self.receive()
        self.left -= len(message.get("body", b""))
        return message if self.left >= 0 else {"type": "http.disconnect"}


def _too_long(headers: Headers, limit: int) -> JSONResponse | None:
    length = headers.get("content-length", "0")
    if length.isascii() and length.isdecimal() and int(length[:20]) <= limit:
        return None
    return refusal(f"more than {limit / 2**20:,.0f} MiB", status=413, hint="put the file into the studio's folder")


def _limit(path: str) -> int:
    return LARGEST_UPLOAD if path.startswith(UPLOADS) else LARGEST_BODY


def _expected(path: str) -> str:
    """A form of another site can send neither of the two without asking first."""
    return "application/octet-stream" if path.startswith(UPLOADS) else "application/json"


def _kind(headers: Headers) -> str:
    return headers.get("content-type", "").partition(";")[0].strip().lower()


def _with_headers(send: Send, *, private: bool) -> Send:
    async def answering(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in _HEADERS.items():
                headers[name] = value
            if private:
                headers["cache-control"] = "no-store"
        await send(message)

    return answering


def is_loopback(host: str) -> bool:
    """Whether a name or an address is this machine's own."""
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
