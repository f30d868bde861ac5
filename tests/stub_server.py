"""An OpenAI-compatible server that does what a test tells it to, on a real socket."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

__all__ = ["Reply", "Stub", "better_says_good", "says", "stub_server"]


@dataclass
class Reply:
    """What to answer: `body` as it is, whole or cut off, at once or in drops."""

    body: str | bytes = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    drop_after: int | None = None
    """Hang up after so many bytes of the body."""
    hang: bool = False
    """Never answer (until the test is over)."""
    drip_s: float | None = None
    """Seconds between two single bytes, so that something arrives all the time."""
    endless: bool = False
    """Send the body again and again, in chunks, as long as anybody listens."""


@dataclass
class Stub:
    """The server as the test sees it."""

    answer: Callable[[int, dict[str, Any]], Reply]
    """The number of the request, from 0, and its JSON, to what is answered."""
    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    fetched: list[str] = field(default_factory=list)
    """Paths of GET requests: what a followed redirect asks for."""
    at_once: int = 0
    """Most requests that were open at a time."""
    over: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)


@contextmanager
def stub_server(answer: Callable[[int, dict[str, Any]], Reply]) -> Iterator[Stub]:
    """Serve `answer` on a free port of this machine."""
    stub = Stub(answer)
    open_now = 0

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            """Nothing on the test's stderr."""

        def do_POST(self) -> None:
            nonlocal open_now
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with stub.lock:
                number = len(stub.requests)
                stub.requests.append(request)
                stub.headers.append({name.lower(): value for name, value in self.headers.items()})
                open_now += 1
                stub.at_once = max(stub.at_once, open_now)
            try:
                self._send(stub.answer(number, request))
            except OSError:  # the client has hung up, as a test may want
                self.close_connection = True
            finally:
                with stub.lock:
                    open_now -= 1

        def do_GET(self) -> None:
            stub.fetched.append(self.path)
            self._send(stub.answer(len(stub.requests), {"messages": [{"content": ""}]}))

        def _send(self, reply: Reply) -> None:
            if reply.hang:
                stub.over.wait(60)
                self.close_connection = True
                return
            body = reply.body.encode() if isinstance(reply.body, str) else reply.body
            self.send_response(reply.status)
            for name, value in {"Content-Type": "application/json", **reply.headers}.items():
                self.send_header(name, value)
            if reply.endless:
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                while not stub.over.is_set():
                    self.wfile.write(b"%x\r\n%b\r\n" % (len(body), body))
                return
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if reply.drip_s is not None:
                for byte in body:
                    if stub.over.wait(reply.drip_s):
                        return
                    self.wfile.write(bytes([byte]))
                return
            self.wfile.write(body[: reply.drop_after])
            if reply.drop_after is not None:
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    stub.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield stub
    finally:
        stub.over.set()
        server.shutdown()
        server.server_close()
        thread.join()


def says(text: str | None, *, wait_s: float = 0.0, **message: Any) -> Reply:
    """A chat completion with this text."""
    time.sleep(wait_s)
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text, **message}}
    usage = {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107}
    return Reply(json.dumps({"id": "x", "object": "chat.completion", "choices": [choice], "usage": usage}))


def better_says_good(number: int, request: dict[str, Any], *, wait_s: float = 0.0) -> Reply:
    """A fair judge: the answer that holds the word good is better, whichever place it is in."""
    asked = request["messages"][0]["content"]
    places = re.findall(r"<(answer_\d(?:-\w+)?)>\n(.*?)\n</\1>", asked, re.DOTALL)
    first, second = ("good" in text for _, text in places)
    return says(f"Because.\nVerdict: {'tie' if first == second else 1 if first else 2}", wait_s=wait_s)
