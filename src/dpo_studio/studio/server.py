"""The studio as a server: its routes behind their guard, the socket, and the one link that is printed."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from fastapi.staticfiles import StaticFiles

from dpo_studio import __version__
from dpo_studio.errors import UsageError
from dpo_studio.studio import (
    data_routes,
    downloads,
    endpoints,
    generation,
    job_routes,
    login,
    machine,
    run_routes,
    votes,
)
from dpo_studio.studio.api_errors import told_as_json
from dpo_studio.studio.guard import Guard, is_loopback
from dpo_studio.studio.processes import is_alive, start_of
from dpo_studio.studio.sessions import Sessions
from dpo_studio.studio.store import Store
from dpo_studio.studio.studio import Studio

__all__ = ["another_link", "create_app", "serve"]

PASSWORD = "DPO_STUDIO_PASSWORD"  # noqa: S105 - the variable's name
_CONNECTIONS = 300
"""At a time; a page has six. More are answered 503."""


def create_app(studio: Studio) -> FastAPI:
    """All routes of a studio, behind their guard."""
    app = FastAPI(
        title="DPO Studio", version=__version__, docs_url=None, redoc_url=None, openapi_url="/api/openapi.json"
    )
    app.state.studio = studio
    app.add_middleware(Guard, door=studio.door)
    told_as_json(app)
    for router in (
        login.router,
        run_routes.router,
        job_routes.router,
        votes.router,
        generation.router,
        data_routes.router,
        data_routes.uploads,
        downloads.router,
        endpoints.router,
        machine.router,
    ):
        app.include_router(router)
    if login.FRONT.is_dir():
        app.mount("/", StaticFiles(directory=login.FRONT, html=True))
    return app


def serve(folder: Path, *, host: str, port: int, allow: tuple[Path, ...], tell: Callable[[str], None]) -> None:
    """Serve a folder until a signal; `tell` gets the link when the studio listens.

    Raises:
        UsageError: the folder is not there, the port is taken, or the network may ask and there is no password.
    """
    for path in (folder, *allow):
        if not path.is_dir():
            raise UsageError(f"{path} is not a folder", hint="--folder names the one to work in")
    password = os.environ.get(PASSWORD) or None
    if not is_loopback(host) and password is None:
        raise UsageError(
            f"--host {host}: other machines could ask this studio, and it has no password",
            hint=f"set {PASSWORD}, or leave --host out and use `ssh -L {port}:127.0.0.1:{port}`",
        )
    listening = _listen(host, port)
    port = int(listening.getsockname()[1])
    studio = Studio.opened(folder, host=host, port=port, allow=allow, password=password)
    url = f"http://{_shown(host)}:{port}/"
    with studio.store.writing() as db:
        row = (port, url, os.getpid(), start_of(os.getpid()) or "")
        db.execute("INSERT OR REPLACE INTO servers (port, url, pid, start) VALUES (?, ?, ?, ?)", row)
    config = uvicorn.Config(
        create_app(studio),
        log_level="warning",
        access_log=False,  # it would show the token
        server_header=False,
        proxy_headers=False,
        limit_concurrency=_CONNECTIONS,
        timeout_graceful_shutdown=2,  # streams of events end only when they are ended
    )
    with studio.store.held():
        tell(f"{url}?token={studio.sessions.new_token()}")
        uvicorn.Server(config).run(sockets=[listening])


def another_link(folder: Path, port: int) -> str:
    """Another link for a studio that runs on this folder.

    Raises:
        UsageError: none does.
    """
    store = Store.of_folder(folder.resolve())
    with store.reading() as db:
        rows = db.execute("SELECT * FROM servers ORDER BY port = ? DESC, port", (port,)).fetchall()
    url = next((row["url"] for row in rows if is_alive(row["pid"], row["start"])), None)
    if url is None:
        raise UsageError(f"no studio runs on {folder}", hint=f"dpo studio --folder {folder}")
    return f"{url}?token={Sessions(store).new_token()}"


def _listen(host: str, port: int) -> socket.socket:
    """The socket before anything else: a link is printed only where it leads somewhere."""
    try:
        kind = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(kind[0], kind[1])
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(kind[4])
        listening.listen(128)
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(
            f"{host}:{port}: {reason}", hint="if a studio runs there, `dpo studio --link` opens it; else choose --port"
        ) from None
    return listening


def _shown(host: str) -> str:
    """The address to type: a studio on all addresses is found by this machine's own."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - it is not listened on
    return f"[{host}]" if ":" in host else host
