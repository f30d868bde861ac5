"""How a browser comes in: the link of the terminal, the password, and what the page asks first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import FileResponse, HTMLResponse, RedirectResponse
from pydantic import BaseModel, Field

from dpo_studio import __version__
from dpo_studio.studio.guard import LOGIN
from dpo_studio.studio.sessions import SESSION_SECONDS
from dpo_studio.studio.studio import Here, Studio

__all__ = ["FRONT", "router"]

FRONT = Path(__file__).parent / "front" / "dist"
"""The pages, as they are built."""
_USED = (
    "<!doctype html><meta charset=utf-8><title>DPO Studio</title><h1>This link was used before, or is old</h1>"
    "<p>A link logs one browser in, once. <code>dpo studio --link</code> prints another."
)
router = APIRouter()


class Password(BaseModel):
    """What the page of the password sends."""

    password: str = Field(max_length=1000)


@router.get("/", include_in_schema=False)
def first_page(here: Here, token: str | None = None) -> Response:
    """The page; with a token first a cookie, and an address without it."""
    if token is None:
        return FileResponse(FRONT / "index.html")
    secret = here.sessions.with_token(token)
    if secret is None:
        return HTMLResponse(_USED, status_code=403)
    response = RedirectResponse("/", status_code=303)
    _set_cookie(response, here, secret)
    return response


@router.post(LOGIN)
def log_in(here: Here, given: Password, response: Response) -> dict[str, bool]:
    """Log in with the password of a studio that the network can reach."""
    _set_cookie(response, here, here.sessions.with_password(given.password))
    return {"ok": True}


@router.get("/api/session")
def session(here: Here) -> dict[str, Any]:
    """Where this studio works, and which one it is."""
    return {
        "folder": str(here.folder),
        "allowed": [str(path) for path in here.places.allowed],
        "version": __version__,
        "host": here.door.host,
        "port": here.door.port,
    }


def _set_cookie(response: Response, here: Studio, secret: str) -> None:
    response.set_cookie(
        here.door.cookie, secret, max_age=SESSION_SECONDS, httponly=True, samesite="strict", secure=False, path="/"
    )
