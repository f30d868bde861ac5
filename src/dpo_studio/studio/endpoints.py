"""Models behind OpenAI-compatible servers: the list of Settings, and their answers as they come.

Only what is listed is asked. A key is in an environment variable of the studio: its name is kept, the key never is, and
it is cut out of whatever a server says.
"""

from __future__ import annotations

import os
import time
from collections.abc import AsyncGenerator
from typing import Annotated, Any
from urllib.parse import urlsplit

import httpx2
from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from dpo_studio.errors import DataError
from dpo_studio.evaluation.secret import Secret
from dpo_studio.reading import parse_json
from dpo_studio.studio.api_errors import Refused
from dpo_studio.studio.studio import Here, Studio

__all__ = ["SERVER", "answer_of", "key_variable_of", "listed", "named_endpoints", "router"]

router = APIRouter(prefix="/api/endpoints")
SERVER = "server:"
_LARGEST = 4 * 2**20
"""Bytes of an answer as it is sent, or of an error."""
_SILENCE = 120.0
"""Seconds without a byte."""


class Endpoint(BaseModel):
    """A model of a server, and the variable that has its key."""

    model_config = ConfigDict(extra="forbid")
    model: str = Field(min_length=1, max_length=200, pattern=r"^[^\s@]+$")
    url: str = Field(min_length=8, max_length=500)
    key_variable: Annotated[str | None, Field(pattern=r"^[A-Z][A-Z0-9_]*_API_KEY$", max_length=100)] = None
    """It ends in _API_KEY: no page may have another secret of the environment sent to a server."""


class Removed(BaseModel):
    """One that is taken off the list."""

    name: str = Field(max_length=1000)


@router.get("")
def named_endpoints(here: Here) -> list[dict[str, Any]]:
    """The servers that may be asked; of a key only whether its variable is set."""
    with here.store.reading() as db:
        rows = db.execute("SELECT name, key_variable FROM endpoints ORDER BY made").fetchall()
    return [
        {
            "name": row["name"],
            "key_variable": row["key_variable"],
            "key_is_set": bool(row["key_variable"] and os.environ.get(row["key_variable"])),
        }
        for row in rows
    ]


@router.post("")
def add(here: Here, given: Endpoint) -> dict[str, Any]:
    """List a server, or change the variable of its key."""
    name = f"{SERVER}{given.model}@{_checked(given.url)}"
    with here.store.writing() as db:
        row = (name, given.key_variable, time.time())
        db.execute("INSERT OR REPLACE INTO endpoints (name, key_variable, made) VALUES (?, ?, ?)", row)
    return {"name": name}


@router.post("/remove")
def remove(here: Here, given: Removed) -> dict[str, Any]:
    """Take a server off the list."""
    with here.store.writing() as db:
        db.execute("DELETE FROM endpoints WHERE name = ?", (given.name,))
    return {"name": given.name}


def listed(here: Studio, name: str, field: str) -> str:
    """A name `server:MODEL@URL` that is on the list.

    Raises:
        Refused: it is not.
    """
    with here.store.reading() as db:
        found = db.execute("SELECT 1 FROM endpoints WHERE name = ?", (name,)).fetchone()
    if found is None:
        raise Refused(f"{name[:200]!r} is not listed", status=403, field=field, hint="Settings lists servers")
    return name


def key_variable_of(here: Studio, name: str) -> str | None:
    """The variable that has the key of a listed server; None where it needs none."""
    with here.store.reading() as db:
        row = db.execute("SELECT key_variable FROM endpoints WHERE name = ?", (name,)).fetchone()
    return None if row is None else row["key_variable"]


async def answer_of(here: Studio, name: str, request: dict[str, Any]) -> AsyncGenerator[dict[str, Any]]:
    """`{piece}` as they come, then `{end, cut}`; or `{error, hint}`. Redirects are not followed."""
    key = os.environ.get(key_variable_of(here, name) or "", "").strip()
    secret = Secret(key)
    model, _, url = name.removeprefix(SERVER).partition("@")
    sampling = request["sampling"]
    body = {
        "model": model,
        "messages": request["messages"],
        "temperature": sampling["temperature"],
        "top_p": sampling["top_p"],
        "max_tokens": sampling["max_new_tokens"],
        "seed": sampling["seed"],
        "stream": True,
    }
    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        async with (
            httpx2.AsyncClient(timeout=_SILENCE, follow_redirects=False, trust_env=False) as client,
            client.stream("POST", f"{url}/chat/completions", json=body, headers=headers) as answer,
        ):
            if answer.status_code != 200:
                said = (await _some(answer)).decode("utf-8", "replace")
                yield {"error": f"{url} says {answer.status_code}: {secret.cut_everywhere(said)[:400]}", "hint": None}
                return
            async for line in _pieces(answer):
                yield secret.cut_everywhere(line)
    except (httpx2.HTTPError, DataError, UnicodeError) as error:
        said = secret.cut_everywhere(str(error)) or type(error).__name__
        yield {"error": f"{url}: {said}"[:400], "hint": "does the server run, and does its address end in /v1?"}


async def _pieces(answer: httpx2.Response) -> AsyncGenerator[dict[str, Any]]:
    cut, read, rest = True, 0, b""
    async for some in answer.aiter_bytes():
        read += len(some)
        if read > _LARGEST:
            raise DataError(f"an answer of more than {_LARGEST // 2**20} MiB")
        *lines, rest = (rest + some).split(b"\n")
        for line in lines:
            text = line.strip().removeprefix(b"data:").strip()
            if not line.startswith(b"data:") or text == b"[DONE]":
                continue
            choice = _first_choice(parse_json(text, what="an answer"))
            delta = choice.get("delta")
            piece = delta.get("content") if isinstance(delta, dict) else None
            if isinstance(piece, str) and piece:
                yield {"piece": piece}
            if choice.get("finish_reason") is not None:
                cut = choice["finish_reason"] != "stop"
    yield {"end": True, "cut": cut}


def _first_choice(event: Any) -> dict[str, Any]:
    choices = event.get("choices") if isinstance(event, dict) else None
    return choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}


async def _some(answer: httpx2.Response) -> bytes:
    body = b""
    async for some in answer.aiter_bytes():
        body += some
        if len(body) > 10_000:
            break
    return body


def _checked(url: str) -> str:
    try:
        parts = urlsplit(url)
        fine = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        fine = False
    if not fine or "\\" in url or any(character <= " " for character in url):
        raise Refused(f"{url[:80]!r} is not the address of a server", field="url", hint="http://localhost:8000/v1")
    if parts.username or parts.password or parts.query or parts.fragment or "@" in url:
        hint = "a key is in an environment variable, never in an address"
        raise Refused("the address has more than a server and a path", field="url", hint=hint)
    return url.rstrip("/")
