"""`dpo` as a process of its own, and inputs that lie about what they are."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GOOD = b'{"prompt": "q", "chosen": "yes", "rejected": "no"}\n'
_MEMORY = 4 * 2**30
"""Bytes of address space: what needs more ends as an out-of-memory error, which no test here expects."""


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    error: str
    seconds: float


def dpo(
    *arguments: str | bytes | Path,
    cwd: Path,
    feed: bytes | None = None,
    stdin: Any = None,
    closed: Sequence[int] = (),
    env: dict[str, str] | None = None,
    timeout: float = 60,
) -> Ended:
    """Run the command to its end; `closed` are the standard streams that are closed before it starts."""

    def prepare() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
        for number in closed:
            os.close(number)

    started = time.monotonic()
    command = [sys.executable, "-c", "from dpo_studio.cli import main; main()", *arguments]
    done = subprocess.run(
        command,
        cwd=cwd,
        input=feed,
        stdin=stdin,
        capture_output=True,
        preexec_fn=prepare,
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | (env or {}),
        timeout=timeout,
        check=False,
    )
    out, told = (text.decode("utf-8", "backslashreplace") for text in (done.stdout, done.stderr))
    assert "Traceback" not in told, told
    return Ended(done.returncode, out, told, time.monotonic() - started)
