"""The one worker process with the models: started when somebody asks, ended when nobody does."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Workshop"]

IDLE_SECONDS = 600.0
_LONGEST_LINE = 2**22


@dataclass
class Workshop:
    """The worker process of one studio; one request at a time."""

    folder: Path
    idle: float = IDLE_SECONDS
    _process: asyncio.subprocess.Process | None = None
    _used: float = 0.0
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    _watch: asyncio.Task[None] | None = None

    async def ask(self, request: dict[str, Any]) -> AsyncGenerator[dict[str, Any]]:
        """The worker's lines; an asker who leaves stops the answer, and the next one finds the worker free."""
        async with self._turn:
            process = await self._started()
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(json.dumps(request).encode() + b"\n")
            line: dict[str, Any] = {}
            try:
                await process.stdin.drain()
                while "done" not in line and (text := await process.stdout.readline()):
                    line = json.loads(text)
                    yield line
                if "done" not in line:
                    yield {"error": "the process with the models died", "hint": "a smaller model needs less memory"}
            finally:
                self._used = time.monotonic()
                if "done" not in line:
                    self._end_answer(process)

    def _end_answer(self, process: asyncio.subprocess.Process) -> None:
        """Its remaining lines belong to nobody: a new process is simpler than to read them away."""
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGINT)
            process.kill()
        self._process = None

    async def _started(self) -> asyncio.subprocess.Process:
        if self._process is None or self._process.returncode is not None:
            command = [sys.executable, "-m", "dpo_studio.studio.worker"]
            pipe = asyncio.subprocess.PIPE
            self._process = await asyncio.create_subprocess_exec(
                *command, stdin=pipe, stdout=pipe, cwd=self.folder, limit=_LONGEST_LINE
            )
            self._watch = asyncio.create_task(self._end_when_idle(self._process))
        self._used = time.monotonic()
        return self._process

    async def _end_when_idle(self, process: asyncio.subprocess.Process) -> None:
        while process.returncode is None:
            await asyncio.sleep(min(5.0, self.idle))
            if not self._turn.locked() and time.monotonic() - self._used > self.idle:
                assert process.stdin is not None
                process.stdin.close()  # the end of its requests
                await process.wait()
