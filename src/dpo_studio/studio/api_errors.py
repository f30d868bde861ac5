"""What a request gets that cannot be answered: JSON of `{error, hint, field}`, never a stack trace."""

from __future__ import annotations

import errno
import sqlite3
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from dpo_studio.errors import DPOStudioError

__all__ = ["Refused", "no_store", "refusal", "told_as_json"]


class Refused(DPOStudioError):
    """A request that is refused, with the field of the form that it is about."""

    def __init__(self, message: str, *, status: int = 400, hint: str | None = None, field: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.status = status
        self.field = field


def refusal(error: str, *, status: int, hint: str | None = None, field: str | None = None) -> JSONResponse:
    """The answer in its one shape."""
    return JSONResponse({"error": error, "hint": hint, "field": field}, status_code=status)


def told_as_json(app: FastAPI) -> None:
    """Give every error of a route that shape."""
    app.add_exception_handler(DPOStudioError, _of_ours)
    app.add_exception_handler(RequestValidationError, _of_a_form)
    app.add_exception_handler(HTTPException, _of_http)
    app.add_exception_handler(OSError, _of_the_disk)
    app.add_exception_handler(sqlite3.Error, _of_the_store)
    app.add_exception_handler(Exception, _of_nobody)


async def _of_ours(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, DPOStudioError)
    status, field = (error.status, error.field) if isinstance(error, Refused) else (400, None)
    return refusal(error.message, status=status, hint=error.hint, field=field)


async def _of_a_form(_: Request, error: Exception) -> JSONResponse:
    """The first wrong field, by its dotted name."""
    assert isinstance(error, RequestValidationError)
    first: dict[str, Any] = error.errors()[0] if error.errors() else {}
    loc = tuple(map(str, first.get("loc", ())))
    field = ".".join(loc[1:] if loc[:1] in {("body",), ("query",), ("path",)} else loc) or None
    message = str(first.get("msg", "the request is not of the expected form")).removeprefix("Value error, ")
    return refusal(f"{field}: {message}" if field else message, status=422, field=field)


async def _of_http(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return refusal(str(error.detail), status=error.status_code)


async def _of_the_disk(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, OSError)
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    where = f"{error.filename}: " if error.filename else ""
    return refusal(
        f"{where}{error.strerror or error}",
        status=507 if full else 400,
        hint="free some space and try again" if full else "is the folder still there, and may it be written?",
    )


def no_store(error: sqlite3.Error) -> JSONResponse:
    """SQLite's errors: nothing of the transaction was kept."""
    hint = "is the disk full, and is the folder still there? Nothing was changed"
    return refusal(f"the studio's file cannot be used: {error}", status=507, hint=hint)


async def _of_the_store(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, sqlite3.Error)
    return no_store(error)


async def _of_nobody(_: Request, error: Exception) -> JSONResponse:
    """A mistake of ours; its trace is in the terminal of the studio."""
    return refusal(f"the studio failed: {type(error).__name__}", status=500, hint="its terminal says where")
