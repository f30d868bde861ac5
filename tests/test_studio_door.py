"""Who comes into the studio, and what is refused at its door."""

from __future__ import annotations

import json
import random
import shutil
import socket
import subprocess
import sys
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from dpo_studio.studio.guard import LARGEST_BODY, LOGIN
from dpo_studio.studio.store import Store
from dpo_studio.studio.studio import Studio
from tests.studio_client import PORT, URL, browser_of, served, vote_of
from tests.tiny_runs import dpo

STARTING = {("/api/jobs", "post"), ("/api/generate", "post"), ("/api/downloads", "post")}
"""Routes that start processes when what they are sent is right."""


def test_without_a_cookie_every_path_of_the_api_answers_401(tmp_path: Path) -> None:
    """Found in the application itself, so that a new route is asked, too."""
    client = browser_of(tmp_path, logged_in=False)
    paths = list(client.get("/api/openapi.json").json())
    assert paths == ["error", "hint", "field"]
    logged_in = browser_of(tmp_path)
    listed = logged_in.get("/api/openapi.json").json()["paths"]
    assert len(listed) > 12
    for path, methods in listed.items():
        for method in methods:
            if path != LOGIN:
                said = client.request(method, path.replace("{name}", "x"), json={} if method == "post" else None)
                assert (said.status_code, set(said.json())) == (401, {"error", "hint", "field"}), (method, path)


def test_a_link_logs_one_browser_in_once_and_a_refused_request_does_not_use_it_up(tmp_path: Path) -> None:
    client = browser_of(tmp_path, logged_in=False)
    token = client.app.state.studio.sessions.new_token()  # type: ignore[attr-defined]
    for headers in (
        {"host": "evil.example:8765"},
        {"origin": "http://evil.example"},
        {"host": f"127.0.0.1:{PORT + 1}"},
    ):
        assert client.get("/", params={"token": token}, headers=headers).status_code in (403, 421)
    assert "set-cookie" not in client.head("/", params={"token": token}).headers
    came_in = client.get("/", params={"token": token})
    assert (came_in.status_code, came_in.headers["location"]) == (303, "/")
    cookie = came_in.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie and f"dpo-studio-{PORT}-" in cookie
    assert client.get("/api/session").json()["folder"] == str(tmp_path)
    again = TestClient(client.app, base_url=URL, follow_redirects=False)
    assert again.get("/", params={"token": token}).status_code == 403
    assert again.get("/api/session").status_code == 401
    assert again.get("/", params={"token": "wrong"}).status_code == 403


def test_a_restart_logs_nobody_out_and_no_secret_is_kept(tmp_path: Path) -> None:
    client = browser_of(tmp_path)
    (name, secret) = next(iter(client.cookies.items()))
    restarted = browser_of(tmp_path, logged_in=False)
    restarted.cookies.set(name, secret)
    assert restarted.get("/api/session").status_code == 200
    kept = b"".join(file.read_bytes() for file in tmp_path.glob(".dpo-studio.db*"))
    assert secret.encode() not in kept


def test_two_studios_are_logged_in_at_once(tmp_path: Path) -> None:
    """One machine, two folders: a browser sends both cookies to both, and each knows its own."""
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    first, second = browser_of(one), browser_of(two)
    for client, other in ((first, second), (second, first)):
        client.cookies.update(dict(other.cookies.items()))
    assert [client.get("/api/session").json()["folder"] for client in (first, second)] == [str(one), str(two)]
    assert len(first.cookies) == 2


@pytest.mark.parametrize(
    "host",
    [
        "evil.example:8765",
        "127.0.0.1",
        "127.0.0.1:80",
        "localhost:8766",
        "",
        "127.0.0.1:8765.evil.example",
        "10.0.0.1:8765",
    ],
)
def test_a_name_that_was_pointed_here_is_refused(tmp_path: Path, host: str) -> None:
    client = browser_of(tmp_path)
    assert client.get("/api/session", headers={"host": host}).status_code == 421
    assert client.get("/", headers={"host": host}).status_code == 421


@pytest.mark.parametrize("host", ["127.0.0.1:8765", "localhost:8765", "[::1]:8765", "127.0.0.2:8765"])
def test_the_names_of_this_machine_are_ours(tmp_path: Path, host: str) -> None:
    client = browser_of(tmp_path)
    said = client.get("/api/session", headers={"host": host, "origin": f"http://{host}"})
    assert said.status_code in (200, 401)  # a cookie goes to the name that it was given on


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "http://127.0.0.1:9000"},
        {"origin": "https://127.0.0.1:8765"},
        {"origin": "null"},
        {"origin": ""},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
    ids=["another site", "another port", "another scheme", "a sandbox", "none", "fetched elsewhere", "by another port"],
)
def test_pages_of_others_change_nothing_and_read_nothing(tmp_path: Path, headers: dict[str, str]) -> None:
    client = browser_of(tmp_path)
    said = client.post("/api/votes", json=vote_of(1), headers=headers)
    assert said.status_code == 403, said.text
    assert client.get("/api/votes", headers=headers).status_code == 403
    assert client.get("/api/votes").json() == []


@pytest.mark.parametrize(
    "kind", ["application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "text/plain", ""]
)
def test_a_form_is_no_request_of_ours(tmp_path: Path, kind: str) -> None:
    """Even where the origin is ours: a form cannot send JSON."""
    client = browser_of(tmp_path)
    assert client.post("/api/votes", content=b"{}", headers={"content-type": kind}).status_code == 415


def test_without_an_origin_nothing_is_changed(tmp_path: Path) -> None:
    client = browser_of(tmp_path)
    del client.headers["origin"]
    assert client.post("/api/votes", json=vote_of(1)).status_code == 403


def test_a_body_is_bounded_whatever_its_length_is_said_to_be(tmp_path: Path) -> None:
    with served(tmp_path) as browser:
        browser.log_in()
        said = browser.client.post(
            "/api/votes", content=b" " * (LARGEST_BODY + 1), headers={"content-type": "application/json"}
        )
        assert said.status_code == 413
        for length in ("99999999999", "-1", "x", "9" * 500):
            assert _raw(browser.url, f"content-length: {length}").split(b" ")[1] in (b"413", b"400", b"401")
        assert browser.get("/api/votes") == []


def _raw(url: str, line: str) -> bytes:
    host = url.removeprefix("http://")
    name, _, port = host.partition(":")
    with socket.create_connection((name, int(port)), timeout=10) as line_to:
        lines = ("POST /api/votes HTTP/1.1", f"host: {host}", f"origin: {url}", "content-type: application/json", line)
        head = "\r\n".join(lines) + "\r\n\r\n"
        line_to.sendall(head.encode())
        return line_to.recv(1000)


def test_every_answer_forbids_scripts_of_others(tmp_path: Path) -> None:
    client = browser_of(tmp_path)
    for path in ("/api/session", "/api/nothing", "/?token=wrong"):
        policy = client.get(path).headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy


def test_no_route_takes_a_command(tmp_path: Path) -> None:
    """A job is a verb of a list and values; what is not known is refused or left out."""
    client = browser_of(tmp_path)
    for verb in ("sh", "demo; id", "--help", "train --set run.folder=/x"):
        assert client.post("/api/jobs", json={"id": "job-000001", "verb": verb}).status_code == 422
    assert client.get("/api/jobs").json() == []


def test_other_machines_need_a_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DPO_STUDIO_PASSWORD", raising=False)
    said = dpo("studio", "--folder", tmp_path, "--host", "0.0.0.0", "--no-browser")  # noqa: S104
    assert said.code == 2 and "no password" in said.err and "warning" in said.err
    client = browser_of(tmp_path, logged_in=False, host="0.0.0.0", password="right")  # noqa: S104, S106
    client.headers["origin"] = "http://10.1.2.3:8765"
    client.headers["host"] = "10.1.2.3:8765"
    assert client.get("/api/session").status_code == 401
    said_wrong = [client.post("/api/login", json={"password": "wrong"}).status_code for _ in range(6)]
    assert said_wrong == [401] * 5 + [429]
    assert client.post("/api/login", json={"password": "right"}).status_code == 429
    assert client.get("/api/session", headers={"host": "evil.example:8765"}).status_code == 421


def test_the_password_logs_in(tmp_path: Path) -> None:
    client = browser_of(tmp_path, logged_in=False, password="right")  # noqa: S106
    assert client.post("/api/login", json={"password": "right"}).json() == {"ok": True}
    assert client.get("/api/session").status_code == 200
    nobody = browser_of(tmp_path, logged_in=False)
    assert nobody.post("/api/login", json={"password": ""}).status_code == 401


def test_a_running_studio_prints_another_link(tmp_path: Path) -> None:
    assert "no studio runs" in dpo("studio", "--folder", tmp_path, "--link").err
    with served(tmp_path) as browser:
        assert browser.link.startswith("http://127.0.0.1:") and "?token=" in browser.link
        link = dpo("studio", "--folder", tmp_path, "--link").out.strip()
        assert link.partition("=")[0] == browser.link.partition("=")[0] and link != browser.link
        browser.link = link
        browser.log_in()
        assert browser.get("/api/session")["folder"] == str(tmp_path)


def test_a_newer_studio_s_file_is_left_alone(tmp_path: Path) -> None:
    store = Store.of_folder(tmp_path)
    with store.writing() as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(Exception, match="newer"):
        Studio.opened(tmp_path, host="127.0.0.1", port=1)


def test_an_upload_is_bounded_kept_whole_and_replaces_nothing(tmp_path: Path) -> None:
    client = browser_of(tmp_path)
    kind = {"content-type": "application/octet-stream"}
    assert client.put("/api/uploads/a.jsonl", content=b"{}\n", headers=kind).json() == {
        "path": "uploads/a.jsonl",
        "bytes": 3,
    }
    assert client.put("/api/uploads/a.jsonl", content=b"", headers=kind).status_code == 409
    assert (
        client.put("/api/uploads/b", content=b"x", headers=kind | {"content-length": str(2 * 2**30)}).status_code == 413
    )
    for name in ("..%2Fx", "%2e%2e", ".", "CON", "a%00", "x" * 300, "a%2Fb"):
        assert client.put(f"/api/uploads/{name}", content=b"x", headers=kind).status_code in (
            400,
            403,
            404,
            405,
            415,
        ), name
    (tmp_path / "uploads" / "out").symlink_to(tmp_path.parent / "elsewhere")
    assert client.put("/api/uploads/out", content=b"x", headers=kind).status_code == 403
    assert sorted(path.name for path in (tmp_path / "uploads").iterdir()) == ["a.jsonl", "out"]
    assert not (tmp_path.parent / "elsewhere").exists()


def test_a_thousand_streams_leave_the_studio_answering_in_little_memory(tmp_path: Path, tiny_run: Path) -> None:
    shutil.copytree(tiny_run, tmp_path / "run")
    with served(tmp_path) as browser, ExitStack() as opened:
        browser.log_in()
        cookie = "; ".join(f"{name}={value}" for name, value in browser.client.cookies.items())
        host = browser.url.removeprefix("http://")
        head = f"GET /api/runs/run/events HTTP/1.1\r\nhost: {host}\r\ncookie: {cookie}\r\nconnection: close\r\n\r\n"
        codes = Counter[bytes]()
        for _ in range(1000):
            line = socket.create_connection((host.partition(":")[0], int(host.partition(":")[2])), timeout=30)
            line.sendall(head.encode())
            code = line.recv(12)[9:]
            codes[code] += 1
            opened.enter_context(line) if code == b"200" else line.close()
        assert 50 <= codes[b"200"] < 60 and codes[b"200"] + codes[b"503"] == 1000  # a few begin at the same moment
        assert browser.get("/api/session")["folder"] == str(tmp_path)
        status = Path(f"/proc/{browser.process.pid}/status").read_text()
        kilobytes = int(next(row.split()[1] for row in status.splitlines() if row.startswith("VmRSS")))
        assert kilobytes < 300_000
        assert [run["state"] for run in browser.get("/api/runs")] == ["finished"]


def test_the_server_loads_no_torch(tmp_path: Path) -> None:
    code = "import sys, dpo_studio.studio.server; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_request_makes_the_studio_fail(tmp_path: Path) -> None:
    """Six hundred random requests over every route that the studio lists, but those that start processes."""
    draw = random.Random(0)
    client = browser_of(tmp_path)
    listed = client.get("/api/openapi.json").json()["paths"]
    routes = [(path, method) for path in listed for method in listed[path] if (path, method) not in STARTING]
    values: list[Any] = [
        None,
        "",
        0,
        -1,
        1e308,
        True,
        [],
        {},
        "a" * 3000,
        "\0",
        "..",
        "~",
        "-x",
        "a: [b",
        "x: 1",
        "9" * 400,
    ]
    fields = ["id", "yaml", "values", "name", "run", "out", "choice", "prompt", "path", "without", "edited", "answers"]
    for _ in range(600):
        path, method = draw.choice(routes)
        url = path.replace("{name}", draw.choice(["x", "%00", "a%0Ab", "%ED%A0%80", "CON", "x" * 300]))
        body: Any = {name: draw.choice(values) for name in draw.sample(fields, draw.randint(0, 6))}
        if draw.random() < 0.5:
            body = vote_of(draw.randint(0, 9)) | dict(list(body.items())[:1])
        asked = {
            name: draw.choice(["", "-1", "..", "~", "\0", "-9e9"]) for name in ("path", "points", "limit", "search")
        }
        kind = "application/octet-stream" if "uploads" in url else "application/json"
        content = None if method == "get" else json.dumps(draw.choice([body, body, draw.choice(values)]))
        said = client.request(method, url, params=asked, content=content, headers={"content-type": kind})
        assert said.status_code < 500, (method, url, asked, content, said.text)
