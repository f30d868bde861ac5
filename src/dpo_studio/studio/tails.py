"""The ends of logs, and the error that a command ended with."""

from __future__ import annotations

from pathlib import Path

from dpo_studio.errors import DPOStudioError
from dpo_studio.reading import open_regular

__all__ = ["error_of", "tail"]

_TAIL = 64 * 2**10


def tail(file: Path) -> str:
    """The last 64 KiB of a text file; empty where there is none."""
    try:
        with open_regular(file, what="log") as stream:
            stream.seek(max(0, file.stat().st_size - _TAIL))
            return stream.read(_TAIL).decode("utf-8", "replace")
    except (DPOStudioError, OSError):
        return ""


def error_of(log: str) -> tuple[str | None, str | None]:
    """(the message, the hint) of the last `error:` in a log."""
    _, found, after = log.rpartition("error: ")
    if not found:
        return None, None
    message, _, hint = after.partition("\n  hint: ")
    return message.strip() or None, hint.strip() or None
