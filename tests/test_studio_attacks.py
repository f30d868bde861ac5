"""The studio and what goes wrong around it: requests of its schema, slow clients, a full disk, two studios, kills."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.core.result import Ok

from dpo_studio.studio.store import Store
from tests.studio_client import URL, Browser, browser_of, served, until, vote_of
from tests.test_studio_door import STARTING
from tests.tiny_runs import tiny_rows, write_rows

IN_A_VOTE = """
import sys, time
from contextlib import contextmanager
from pathlib import Path
from dpo_studio.studio.store import Store
from tests.studio_client import browser_of, vote_of

client = browser_of(Path(sys.argv[1]))
writing = Store.writing

@contextmanager
def held(store):
    with writing(store) as db:
        yield db
        print("inside", flush=True)
        time.sleep(60)

Store.writing = held
client.post("/api/votes", json=vote_of(1))
"""


@pytest.mark.parametrize("cases", [8, pytest.param(200, marks=pytest.mark.slow)])
def test_no_request_of_the_routes_own_schema_makes_the_studio_fail(tmp_path: Path, cases: int) -> None:
    """schemathesis makes them of the OpenAPI: right ones and wrong ones, for every route that starts no process."""
    client = browser_of(tmp_path)
    cookie = "; ".join(f"{name}={value}" for name, value in client.cookies.items())
    known = {"origin": URL, "cookie": cookie, "host": URL.removeprefix("http://")}
    schema = schemathesis.openapi.from_asgi("/api/openapi.json", client.app, headers=known)
    told = Counter[int]()
    for found in schema.get_all_operations():
        assert isinstance(found, Ok)
        operation = found.ok()
        if (operation.path, operation.method) in STARTING:
            continue
        upload = operation.path.startswith("/api/uploads")
        kind = {"content-type": "application/octet-stream" if upload else "application/json"}
        headers = known | (kind if upload or operation.method == "post" else {})

        _ask(operation, headers, told, cases)
    assert told[2] > cases and told[4] > cases, told
    started = {job["verb"] for job in client.get("/api/jobs").json()}
    assert started <= {"data-check"}  # of a file that an earlier case uploaded: it is read, nothing else


def _ask(operation: Any, headers: dict[str, str], told: Counter[int], cases: int) -> None:
    @settings(
        max_examples=cases,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(case=operation.as_strategy())
    def asked(case: Any) -> None:
        said = case.call(headers=headers)
        told[said.status_code // 100] += 1
        assert said.status_code < 500, (case, said.text)

    asked()


def test_slow_clients_hold_nobody_up(tmp_path: Path, tiny_run: Path) -> None:
    """Half a head, half a body, half an upload, and streams that nobody reads; another one is answered meanwhile."""
    (tmp_path / "run").symlink_to(tiny_run)
    with served(tmp_path, "--allow", str(tiny_run)) as browser, ExitStack() as opened:
        browser.log_in()
        host = browser.url.removeprefix("http://")
        cookie = "; ".join(f"{name}={value}" for name, value in browser.client.cookies.items())
        known = f"host: {host}\r\norigin: {browser.url}\r\ncookie: {cookie}\r\n"
        upload = "content-type: application/octet-stream\r\ncontent-length: 100000"
        starts = [
            "GET /api/session HTTP/1.1\r\nhost: ",
            f"POST /api/votes HTTP/1.1\r\n{known}content-type: application/json\r\ncontent-length: 5000\r\n\r\n{{",
            f"PUT /api/uploads/slow.jsonl HTTP/1.1\r\n{known}{upload}\r\n\r\nabc",
            f"GET /api/runs/run/events HTTP/1.1\r\n{known}\r\n",
        ]
        for number in range(80):
            line = socket.create_connection((host.partition(":")[0], int(host.partition(":")[2])), timeout=30)
            line.sendall(starts[number % len(starts)].encode())
            opened.enter_context(line)
        browser.client.timeout = 5.0
        browser.post("/api/votes", vote_of(1))
        assert len(browser.get("/api/votes")) == 1
        assert not (tmp_path / "uploads" / "slow.jsonl").exists()
        status = Path(f"/proc/{browser.process.pid}/status").read_text()
        kilobytes = int(next(row.split()[1] for row in status.splitlines() if row.startswith("VmRSS")))
        assert kilobytes < 300_000


def test_a_full_disk_is_said_and_takes_nothing_away(tmp_path: Path) -> None:
    """Every write of the server fails from some size on, as on a full disk; afterwards all goes on."""
    with served(tmp_path) as browser:
        browser.log_in()
        browser.post("/api/votes", vote_of(1))
        write_rows(tmp_path / "pairs.jsonl", tiny_rows(200))
        _, most = resource.prlimit(browser.process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(browser.process.pid, resource.RLIMIT_FSIZE, (1000, most))
        kind = {"content-type": "application/octet-stream"}
        said = [
            browser.client.post("/api/votes", json=vote_of(2)),
            browser.client.put("/api/uploads/big.jsonl", content=b"x" * 100_000, headers=kind),
            browser.client.post("/api/data/save", json={"path": "pairs.jsonl", "out": "kept.jsonl"}),
        ]
        assert [each.status_code for each in said] == [507, 507, 400], [each.text for each in said]
        assert browser.client.get("/api/session").status_code == 200  # it still reads
        assert all(each.json()["error"] and each.json()["hint"] for each in said)
        assert len(browser.get("/api/votes")) == 1
        resource.prlimit(browser.process.pid, resource.RLIMIT_FSIZE, (most, most))
        browser.post("/api/votes", vote_of(2))
        assert browser.post("/api/data/save", {"path": "pairs.jsonl", "out": "kept.jsonl"})["pairs"] == 200
        assert len(browser.get("/api/votes")) == 2
    assert sorted(path.name for path in (tmp_path / "uploads").iterdir()) == []


def test_a_folder_that_was_removed_is_said(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    client = browser_of(home)
    home.rename(tmp_path / "elsewhere")
    for path in ("/api/votes", "/api/jobs", "/api/session"):
        said = client.get(path)
        assert said.status_code in (401, 400, 507) and said.json()["error"], (path, said.text)


def test_two_studios_on_one_folder_lose_nothing_and_double_nothing(tmp_path: Path) -> None:
    """Both get the same votes and the same job at the same time, and some of their own."""
    write_rows(tmp_path / "pairs.jsonl", tiny_rows(20))
    with served(tmp_path) as one, served(tmp_path) as two:
        for browser in (one, two):
            browser.log_in()
        job = {"id": "job-of-both", "verb": "data-check", "data-check": {"source": "pairs.jsonl"}}

        def vote(at: tuple[Browser, int]) -> Any:
            return at[0].post("/api/votes", vote_of(at[1]))

        asked = [(browser, number) for number in range(40) for browser in (one, two)]
        asked += [(one, 100 + number) for number in range(10)] + [(two, 200 + number) for number in range(10)]
        with ThreadPoolExecutor(8) as pool:
            jobs = [pool.submit(browser.post, "/api/jobs", job) for browser in (one, two)]
            list(pool.map(vote, asked))
            assert [each.result()["id"] for each in jobs] == ["job-of-both"] * 2
        kept = [each["id"] for each in one.get("/api/votes")]
        assert len(kept) == len(set(kept)) == 60 and kept == [each["id"] for each in two.get("/api/votes")]
        until(lambda: two.get("/api/jobs/job-of-both")["state"] == "finished")
        told = one.get("/api/jobs/job-of-both")
        assert len(one.get("/api/jobs")) == 1 and told["out"].count('"verdict"') == 1


def test_a_kill_in_the_middle_of_a_vote_leaves_it_undone_and_the_file_whole(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", IN_A_VOTE, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "inside\n"
        os.kill(process.pid, signal.SIGKILL)
    client = browser_of(tmp_path)
    assert client.get("/api/votes").json() == []
    for _ in range(2):
        assert client.post("/api/votes", json=vote_of(1)).status_code == 200
    assert len(client.get("/api/votes").json()) == 1
    with Store.of_folder(tmp_path).reading() as db:
        assert db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
        assert [json.loads(row["content"])["id"] for row in db.execute("SELECT content FROM votes")] == ["vote-000001"]
