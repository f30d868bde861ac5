"""A studio in this process, and as a process of its own, with a client that speaks like a browser."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
from starlette.testclient import TestClient

from dpo_studio.studio.server import create_app
from dpo_studio.studio.studio import Studio

__all__ = ["PORT", "URL", "Browser", "browser_of", "served", "until", "vote_of"]

PORT = 8765
URL = f"http://127.0.0.1:{PORT}"


def browser_of(folder: Path, *, logged_in: bool = True, **how: Any) -> TestClient:
    """A browser before a studio on a folder, both in this process."""
    studio = Studio.opened(folder, host=how.pop("host", "127.0.0.1"), port=PORT, **how)
    client = TestClient(
        create_app(studio), base_url=URL, headers={"origin": URL}, follow_redirects=False, raise_server_exceptions=False
    )
    if logged_in:
        assert client.get("/", params={"token": studio.sessions.new_token()}).status_code == 303
    return client


class Browser:
    """A browser before a studio that is a process of its own."""

    def __init__(self, process: subprocess.Popen[str], link: str) -> None:
        self.process, self.link = process, link
        self.url = link.partition("/?")[0]
        self.client = httpx2.Client(base_url=self.url, headers={"origin": self.url}, timeout=30)

    def log_in(self) -> None:
        assert self.client.get(self.link).status_code == 303

    def get(self, path: str) -> Any:
        answer = self.client.get(path)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def post(self, path: str, content: Any) -> Any:
        answer = self.client.post(path, json=content)
        assert answer.status_code == 200, answer.text
        return answer.json()


@contextmanager
def served(folder: Path, *more: str, port: int = 0) -> Iterator[Browser]:
    """`dpo studio` on a folder, killed at the end."""
    command = [sys.executable, "-m", "dpo_studio", "studio", "--folder", str(folder), "--port", str(port)]
    with subprocess.Popen(
        [*command, "--no-browser", *more], stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    ) as process:
        try:
            assert process.stdout is not None
            browser = Browser(process, process.stdout.readline().strip())
            with browser.client:
                yield browser
        finally:
            process.kill()


def until(look: Callable[[], Any], seconds: float = 180.0) -> Any:
    """What `look` sees once it is something."""
    end = time.monotonic() + seconds
    while not (seen := look()):
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.1)
    return seen


def vote_of(number: int, choice: str = "left", left: str = "base", right: str = "tuned", **more: Any) -> dict[str, Any]:
    """A vote as a page sends it."""
    vote = {
        "id": f"vote-{number:06d}",
        "time": f"2026-01-01T00:00:{number % 60:02d}Z",
        "prompt": f"How? {number}",
        "answers": {"left": f"left {number}", "right": f"right {number}"},
        "models": {"left": left, "right": right},
        "sampling": {"temperature": 0.7, "seed": 1},
        "shown_order_seed": number,
        "choice": choice,
        "voter": "me",
    }
    return json.loads(json.dumps(vote | more))  # type: ignore[no-any-return]
