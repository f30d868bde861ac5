"""status.json: how the last start of a run of several processes ended; the exit code of torchrun is its own."""

from __future__ import annotations

from contextlib import suppress

from dpo_studio.errors import RunError
from dpo_studio.reading import read_json
from dpo_studio.runs.folder import RunFolder, is_run

__all__ = ["read_status", "write_status"]

_LARGEST = 100_000


def write_status(run: RunFolder, code: int, message: str) -> None:
    """Write the exit code that `dpo train --gpus N` has, and the message; nothing where no run has begun: a folder with
    this file alone would be taken for something else."""
    if is_run(run.path):
        with suppress(RunError, OSError):  # a full disk is reported by what it stopped
            RunFolder(run.path).write_json(RunFolder.STATUS, {"exit_code": code, "message": message})


def read_status(run: RunFolder) -> int | None:
    """The exit code that the last start left; None if it left none."""
    file = run.path / RunFolder.STATUS
    if not file.is_file():
        return None
    with suppress(RunError):
        status = read_json(file, what="the run's status", limit=_LARGEST, error=RunError)
        code = status.get("exit_code") if isinstance(status, dict) else None
        return code if isinstance(code, int) else None
    return None
