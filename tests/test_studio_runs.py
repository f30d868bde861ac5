"""Runs, jobs and votes through the studio's routes: on a finished run, on hostile names, and through a SIGKILL."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml
from starlette.testclient import TestClient

from dpo_studio import SourceSection
from dpo_studio.preferences.sources import read_pairs
from dpo_studio.studio.standings import Compared, strengths
from tests.studio_client import browser_of, served, until, vote_of
from tests.tiny_runs import tiny_rows, write_recipe, write_rows


@pytest.fixture
def folder(tmp_path: Path, tiny_run: Path) -> Path:
    """A folder with one finished run."""
    home = tmp_path / "home"
    shutil.copytree(tiny_run, home / "runs" / "done")
    return home


def test_a_finished_run_is_listed_with_its_numbers(folder: Path) -> None:
    client = browser_of(folder)
    (run,) = client.get("/api/runs").json()
    assert (run["name"], run["state"], run["step"], run["steps"]) == ("runs/done", "finished", 4, 4)
    assert 0 <= run["accuracy"] <= 1 and run["loss"] > 0 and run["objective"] == "dpo"
    whole = client.get("/api/runs/runs/done").json()
    assert "learning_rate" in whole["recipe"] and whole["result"]["steps"] == 4
    assert whole["checkpoints"] == ["runs/done/checkpoints/step-4"] or whole["checkpoints"]
    curve = client.get("/api/runs/runs%2Fdone/metrics").json()
    assert curve["columns"]["step"] == [1, 2, 3, 4] and curve["held_out"]["step"] == [0, 2, 4]
    assert len(curve["columns"]["loss"]) == 4 and curve["last_step"] == 4
    assert client.get("/api/runs/runs/done/samples").json() == []


def test_twenty_thousand_steps_are_drawn_at_once_and_keep_their_spike(folder: Path) -> None:
    rows = [{"step": step, "loss": 0.5, "rewards/margins": 1.0, "rewards/accuracies": 1.0} for step in range(1, 20_001)]
    rows[7_777]["loss"] = 99.0
    write_rows(folder / "runs" / "done" / "metrics.jsonl", rows)
    client = browser_of(folder)
    began = time.perf_counter()
    curve = client.get("/api/runs/runs/done/metrics?points=1000").json()
    assert time.perf_counter() - began < 1  # 0.5 s on a quiet machine, and the first time: nothing was read before
    assert len(curve["columns"]["step"]) == 1000 and curve["columns"]["step"][-1] == 20_000
    assert max(curve["high"]["loss"]) == 99.0 and min(curve["low"]["loss"]) == 0.5


@pytest.mark.parametrize(
    "name",
    [
        "../outside",
        "..%2Foutside",
        "%2e%2e/outside",
        "link",
        "/etc",
        "runs/../../outside",
        ".dpo-studio",
        "a%00b",
        "nothing",
    ],
)
@pytest.mark.parametrize("rest", ["", "/metrics", "/samples", "/events", "/stop", "/continue"])
def test_no_name_of_a_run_leads_out(folder: Path, name: str, rest: str) -> None:
    outside = folder.parent / "outside"
    shutil.copytree(folder / "runs" / "done", outside)
    (folder / "link").symlink_to(outside)
    client = browser_of(folder)
    post = rest in ("/stop", "/continue")
    said = client.request(
        "POST" if post else "GET", f"/api/runs/{name}{rest}", json={"id": "job-000001"} if post else None
    )
    assert said.status_code in (400, 403, 404, 405), said.text
    assert str(said.json()["error"]) and client.get("/api/jobs").json() == []


def test_nothing_outside_is_read_or_written_by_a_job_or_an_export(folder: Path, tiny_base: Path) -> None:
    (folder / "link").symlink_to(folder.parent)
    client = browser_of(folder)
    for path in ("../x.jsonl", "/tmp/x.jsonl", "link/x.jsonl", ".dpo-studio/x", "~/../x/../../y"):  # noqa: S108
        client.post("/api/votes", json=vote_of(1))
        assert client.post("/api/votes/export", json={"out": path}).status_code in (400, 403), path
        asked: dict[str, Any] = {"id": "job-000001", "verb": "data-check", "data-check": {"source": path}}
        assert client.post("/api/jobs", json=asked).status_code in (400, 403), path
        asked = {"id": "job-000001", "verb": "export", "export": {"run": "runs/done", "out": path}}
        assert client.post("/api/jobs", json=asked).status_code in (400, 403), path
        for key in ("model.path", "model.chat_template", "data.train.source", "run.folder", "run.sample_prompts"):
            values: dict[str, Any] = {"model": {"path": "bundled:x"}, "data": {"train": {"source": "bundled:everyday"}}}
            *sections, last = key.split(".")
            inside = values
            for section in sections:
                inside = inside.setdefault(section, {})
            inside[last] = path
            said = client.post("/api/recipe/check", json={"values": values}).json()
            assert key in [error["field"] for error in said["errors"]], (key, path)
    for source in ("-", "--help", ""):
        asked = {"id": "job-000001", "verb": "data-check", "data-check": {"source": source}}
        assert client.post("/api/jobs", json=asked).status_code == 400
    assert client.get("/api/jobs").json() == []


def test_the_options_of_jobs_become_words_and_no_more(folder: Path) -> None:
    """Shown before they run; a judge with code, an unlisted server and an option for a name are refused."""
    client = browser_of(folder)
    client.post("/api/endpoints", json={"model": "m", "url": "http://127.0.0.1:9/v1", "key_variable": "X_API_KEY"})

    def command(verb: str, **given: Any) -> Any:
        said = client.post("/api/jobs/preview", json={"verb": verb, verb: given}).json()
        return said.get("command") or said["field"]

    export = {"run": "runs/done", "out": "out"}
    assert command("export", **export) == "dpo export ./runs/done ./out --to adapter"
    fine = {"to": "gptq", "bits": 8, "group_size": "64", "rows": 5, "desc_act": True, "force": True, "dtype": "float32"}
    flags = "--to gptq --bits 8 --group-size 64 --rows 5 --desc-act --dtype float32 --force"
    assert command("export", **export, **fine) == f"dpo export ./runs/done ./out {flags}"
    gguf = "dpo export ./runs/done ./out --to gguf --type q8_0"
    assert command("export", **export, to="gguf", type="q8_0") == gguf
    assert command("eval", run="runs/done", judge="everyday", temperatures="0,0.5", prompts=8, seed=0) == (
        "dpo eval ./runs/done --judge everyday --temperatures 0,0.5 --prompts 8 --seed 0"
    )
    assert command("eval", run="runs/done", judge="llm:m@http://127.0.0.1:9/v1").endswith("--judge-key-env X_API_KEY")
    quantize = command("quantize", model="bundled:smollm2-135m-instruct", out="q", calibration="bundled:everyday")
    assert quantize == "dpo quantize bundled:smollm2-135m-instruct ./q --calibration bundled:everyday"
    for wrong in ("rules.py:judge", "./rules.py:judge", "llm:m@http://127.0.0.1:10/v1", "reward:../x", "--help"):
        assert command("eval", run="runs/done", judge=wrong) == "judge", wrong
    for verb, given, field in (
        ("export", export | {"bits": 5}, "export.bits"),
        ("export", export | {"group_size": "64; id"}, "export.group_size"),
        ("export", export | {"more": 1}, "export.more"),
        ("export", export | {"run": "../x"}, "run"),
        ("eval", {"run": "runs/done", "temperatures": "0 --judge x"}, "eval.temperatures"),
        ("quantize", {"model": "-x", "out": "q"}, "model"),
        ("quantize", {"model": "bundled:x", "out": "../q"}, "out"),
    ):
        assert command(verb, **given) == field
    assert client.get("/api/jobs").json() == []


def test_a_recipe_is_checked_key_by_key(folder: Path) -> None:
    client = browser_of(folder)
    values = {"model": {"path": "a/b"}, "data": {"train": {"source": "a/b"}}, "training": {"epochz": 2, "seed": "x"}}
    said = client.post("/api/recipe/check", json={"values": values, "name": "mine"}).json()
    assert {error["field"] for error in said["errors"]} == {"training.epochz", "training.seed"}
    assert said["command"] == "dpo train mine.yaml" and yaml.safe_load(said["yaml"]) == values
    assert client.post("/api/recipe/check", json={"yaml": "a: [b"}).json()["field"] == "yaml"
    values = {"model": {"path": "a/b"}, "data": {"train": {"source": "a/b"}}}
    assert client.post("/api/recipe/check", json={"values": values}).json()["errors"] == []
    assert "properties" in client.get("/api/schema").json()


def test_votes_are_kept_once_summed_up_and_exported(folder: Path) -> None:
    client = browser_of(folder)
    choices = ["left", "left", "right", "tie", "both_bad", "left"]
    for number, choice in enumerate(choices):
        for _ in range(2):  # a page that lost its connection asks again
            assert client.post("/api/votes", json=vote_of(number, choice)).status_code == 200
    assert client.post("/api/votes", json=vote_of(0, "right")).status_code == 409
    assert len(client.get("/api/votes").json()) == 6
    told = client.get("/api/votes/summary").json()
    (pair,) = told["pairs"]
    assert (pair["models"], pair["wins"], pair["ties"], pair["losses"]) == (["base", "tuned"], 3, 2, 1)
    low, high = pair["win_rate_ci95"]
    assert low < pair["win_rate"] == 4 / 6 < high and told["bradley_terry"] == {}
    made = client.post("/api/votes/export", json={"out": "mine.jsonl"}).json()
    assert (made["pairs"], made["tie"], made["both_bad"]) == (4, 1, 1)
    pairs = read_pairs(SourceSection(source=str(folder / "mine.jsonl"))).pairs
    assert [pair.chosen[0].content for pair in pairs] == ["left 0", "left 1", "right 2", "left 5"]
    again = client.post("/api/votes/export", json={"out": "mine.jsonl"})
    assert again.status_code == 400 and "exists" in again.json()["error"]


def test_three_models_are_ranked(folder: Path) -> None:
    """a beats b nine times of ten and b beats c nine times of ten: their order, and a sum of zero."""
    client = browser_of(folder)
    for number in range(20):
        left, right = ("a", "b") if number < 10 else ("b", "c")
        client.post("/api/votes", json=vote_of(number, "right" if number % 10 == 0 else "left", left, right))
    strength = client.get("/api/votes/summary").json()["bradley_terry"]
    middle = {name: each["strength"] for name, each in strength.items()}
    assert middle["a"] > middle["b"] > middle["c"] and abs(sum(middle.values())) < 1e-9
    assert all(each["ci95"][0] < each["strength"] < each["ci95"][1] for each in strength.values())
    assert strength["a"]["ci95"][0] > strength["c"]["ci95"][1]  # nine of ten, twice over: no doubt of these two


def test_a_vote_for_whatever_is_longer_is_worth_nothing_at_equal_length(folder: Path) -> None:
    """One model always answers longer and wins; where by chance the other is longer, that one wins."""
    client = browser_of(folder)
    for number in range(30):
        long, short = "x" * (40 + 7 * (number % 5)), "y" * (10 + 3 * (number % 4))
        flipped = number % 5 == 0
        answers = {"left": short, "right": long} if flipped else {"left": long, "right": short}
        vote = vote_of(number, "right" if flipped else "left", answers=answers, prompt_set="a" if number < 15 else "b")
        client.post("/api/votes", json=vote)
    told = client.get("/api/votes/summary").json()
    (pair,) = told["pairs"]
    assert pair["win_rate"] == 24 / 30 and pair["win_rate_ci95"][0] > 0.5
    low, high = pair["length_controlled_ci95"]
    assert low < 0.5 < high and low <= pair["length_controlled"] <= high
    assert {name: each["pairs"][0]["n"] for name, each in told["by_prompt_set"].items()} == {"a": 15, "b": 15}


@pytest.mark.parametrize(
    "wrong", [{"choice": "up"}, {"id": "x"}, {"prompt": 3}, {"more": 1}, {"models": {"left": "a"}}]
)
def test_a_vote_that_is_none_is_refused_with_its_field(folder: Path, wrong: dict[str, Any]) -> None:
    said = browser_of(folder).post("/api/votes", json=vote_of(1) | wrong)
    assert said.status_code == 422 and said.json()["field"].startswith(next(iter(wrong)))


def test_a_job_that_fails_shows_the_command_s_own_error(folder: Path) -> None:
    (folder / "broken.jsonl").write_text("this is no JSON\n")
    client = browser_of(folder)
    asked = {"id": "job-000001", "verb": "data-check", "data-check": {"source": "broken.jsonl"}}
    assert client.post("/api/jobs", json=asked).json()["command"] == "dpo data check broken.jsonl --json"
    assert client.post("/api/jobs", json=asked | {"data-check": {"source": "runs"}}).status_code == 409

    def ended() -> Any:
        job = client.get("/api/jobs/job-000001").json()
        return job if job["state"] != "running" else None

    job = until(ended)
    assert job["state"] == "failed" and job["exit_code"] == 1 and "broken.jsonl" in job["error"], job
    assert "Traceback" not in job["log"]
    at_rest(client)


def at_rest(client: TestClient) -> None:
    """Wait for the processes of its jobs, which end after what they say."""
    jobs = client.app.state.studio.jobs  # type: ignore[attr-defined]
    until(lambda: jobs.all() is not None and not jobs._ours)


def test_strengths_by_hand() -> None:
    """Three wins of four, and half a vote more for each: 3.5 to 1.5, ln(3.5 / 1.5) = 0.847 apart."""
    votes = [Compared(str(number), ("a", "b"), 1.0 if number else 0.0, 0) for number in range(4)]
    found = {name: each["strength"] for name, each in strengths(votes).items()}
    assert found["a"] - found["b"] == pytest.approx(0.8473, abs=1e-4)
    assert found["a"] + found["b"] == pytest.approx(0)


def test_strengths_are_the_likeliest() -> None:
    """Of three models the gradient of Bradley and Terry's likelihood is zero: wins = expected wins for each."""
    draw = random.Random(0)
    names = ["a", "b", "c", "d"]
    some = [
        Compared(str(n), (names[n % 4], names[(n + 1 + n // 9) % 4]), draw.choice([0.0, 0.5, 1.0]), 0)
        for n in range(80)
    ]
    some = [each for each in some if each.models[0] != each.models[1]]
    found = {name: each["strength"] for name, each in strengths(some).items()}
    met = {(min(each.models), max(each.models)) for each in some}
    prior = [Compared("", pair, 0.5, 0) for pair in met]  # half a vote either way
    for name in names:
        excess = 0.0
        for each in [*some, *prior]:
            if name in each.models:
                other = each.models[0] if each.models[1] == name else each.models[1]
                won = each.points if each.models[0] == name else 1 - each.points
                excess += won - 1 / (1 + math.exp(found[other] - found[name]))
        assert abs(excess) < 1e-6


def test_pairs_are_paged_searched_checked_and_saved_without_some(folder: Path) -> None:
    rows = tiny_rows(30)
    source = write_rows(
        folder / "pairs.jsonl", [*rows, {"prompt": "same?", "chosen": "a zebra", "rejected": "a zebra"}]
    )
    before = source.read_bytes()
    client = browser_of(folder)

    def page(**asked: Any) -> Any:
        return client.get("/api/data/pairs", params={"path": "pairs.jsonl"} | asked).json()

    until(lambda: page()["state"] == "ready")
    assert page(limit=7)["total"] == 31 and [pair["row"] for pair in page(offset=28)["pairs"]] == [28, 29, 30]
    found = page(search=f"{rows[3]['chosen'].split()[0]} 3?", limit=200)
    assert 3 in [pair["row"] for pair in found["pairs"]] and found["total"] < 31
    assert page(search='" OR 1 --')["pairs"] == [] and page(search='"')["state"] == "ready"
    refused = page(finding="refused")
    assert [(pair["row"], "identical" in pair["refused"]) for pair in refused["pairs"]] == [(30, True)]
    asked: dict[str, Any] = {"path": "pairs.jsonl", "out": "fewer.jsonl", "without": [0, 1]}
    turn, answer = [{"role": "user", "content": "mended"}], [{"role": "assistant", "content": "so"}]
    asked["edited"] = {"2": {"prompt": turn, "chosen": answer, "rejected": [answer[0] | {"content": "not so"}]}}
    assert client.post("/api/data/save", json=asked).json() == {"out": "fewer.jsonl", "pairs": 28}
    assert "mended" in (folder / "fewer.jsonl").read_text().splitlines()[0] and source.read_bytes() == before
    assert client.post("/api/data/save", json=asked).status_code == 400
    assert client.post("/api/data/save", json=asked | {"out": "pairs.jsonl"}).status_code == 400

    def report() -> Any:
        told = client.get("/api/data", params={"path": "pairs.jsonl"}).json()
        return told if told["state"] == "finished" else None

    told = until(report)
    assert told["report"]["rows"] == 31 and told["report"]["pairs"] == 30
    for finding in told["report"]["findings"]:
        if finding["has_rows"]:
            shown = page(finding=finding["name"], limit=200)["pairs"]
            assert len(shown) == finding["count"] and all("rows" not in each for each in told["report"]["findings"])
            assert {each["row"] for each in finding["examples"]} <= {pair["row"] for pair in shown}
    longer = [row for row, pair in enumerate(rows) if len(pair["chosen"]) > len(pair["rejected"])]
    assert [pair["row"] for pair in page(finding="length-bias", limit=200)["pairs"]] == longer
    assert client.get("/api/data/pairs", params={"path": "pairs.jsonl", "finding": "x"}).status_code == 404
    assert len(client.get("/api/jobs").json()) == 1
    at_rest(client)


def test_nothing_is_downloaded_before_somebody_says_yes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub is a server of ours, which counts who asks it."""
    asked: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as hub:
        Thread(target=hub.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.server_port}")
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        with served(tmp_path) as browser:
            browser.log_in()
            for route in ("/api/data", "/api/data/pairs"):
                said = browser.client.get(route, params={"path": "some/pairs"})
                assert (said.status_code, said.json()["field"]) == (409, "download")
            question = {"models": ["some/model"], "messages": [{"role": "user", "content": "x"}]}
            assert browser.client.post("/api/generate", json=question).json()["field"] == "download"
            assert browser.client.post("/api/downloads", json={"name": "../x"}).status_code == 403
            values = {"model": {"path": "some/model"}, "data": {"train": {"source": "some/pairs"}}}
            assert browser.post("/api/recipe/check", {"values": values})["downloads"] == ["some/model", "some/pairs"]
            assert asked == [] and browser.get("/api/jobs") == []
            browser.post("/api/downloads", {"name": "some/pairs"})
            assert browser.client.get("/api/data/pairs", params={"path": "some/pairs"}).status_code == 200
            until(lambda: asked)
        hub.shutdown()
    assert any("some/pairs" in path for path in asked)


def test_a_source_outside_is_not_read(folder: Path) -> None:
    client = browser_of(folder)
    for path in ("../x.jsonl", "/etc/passwd", "~/x.jsonl", "https://example.org/x.jsonl"):
        for route in ("/api/data", "/api/data/pairs"):
            assert client.get(route, params={"path": path}).status_code in (400, 403), path


def test_a_lock_that_names_another_process_stops_nobody(folder: Path) -> None:
    """A run folder from elsewhere may name any process."""
    (folder / "runs" / "done" / ".lock").write_text(f"process {os.getpid()} on here\n")
    client = browser_of(folder)
    assert client.get("/api/runs").json()[0]["state"] == "finished"
    assert client.post("/api/runs/runs/done/stop", json={}).status_code == 409


def test_a_killed_studio_loses_no_training_no_vote_and_doubles_nothing(tmp_path: Path, tiny_base: Path) -> None:
    """SIGKILL in the middle of a run, its stream and a vote; then a second studio on the folder finds all of it."""
    recipe = write_recipe(tmp_path / "r.yaml", tiny_base, rows=tiny_rows(64), training={"max_steps": 300, "epochs": 50})
    text = recipe.read_text().replace(str(tmp_path / "run"), "runs/mine").replace(str(tiny_base), "base")
    shutil.copytree(tiny_base, tmp_path / "base")
    asked = {"id": "job-of-mine-1", "verb": "train", "train": {"yaml": text, "name": "mine"}}

    def running(browser: Any) -> Any:
        runs = [run for run in browser.get("/api/runs") if run["step"] >= 2]
        return runs[0] if runs else None

    with served(tmp_path) as first:
        first.log_in()
        job = first.post("/api/jobs", asked)
        assert job["command"] == "dpo train ./mine.yaml"
        first.post("/api/votes", vote_of(1))
        run = until(lambda: running(first))
        assert (run["name"], run["state"], run["job"]) == ("runs/mine", "running", "job-of-mine-1")
        with first.client.stream("GET", "/api/runs/runs/mine/events?after=-1") as stream:
            lines = stream.iter_lines()
            told = [next(lines) for _ in range(3)]
            assert told[0].startswith("id: ") and told[1] == "event: metrics" and "loss" in told[2]
            os.kill(first.process.pid, signal.SIGKILL)
        port, cookies = int(first.url.rpartition(":")[2]), dict(first.client.cookies.items())
        first.process.wait()
    with served(tmp_path, port=port) as second:
        second.client.cookies.update(cookies)  # nobody is logged out
        second.post("/api/votes", vote_of(1))
        second.post("/api/jobs", asked)
        assert len(second.get("/api/votes")) == 1 and len(second.get("/api/jobs")) == 1
        step = int(told[0].partition(" ")[2])
        with second.client.stream("GET", "/api/runs/runs/mine/events", headers={"last-event-id": str(step)}) as stream:
            data = next(line for line in stream.iter_lines() if line.startswith('data: {"step"'))
            assert json.loads(data[6:])["step"][0] == step + 1
        second.post("/api/runs/runs/mine/stop", {})
        ended = until(lambda: [run for run in second.get("/api/runs") if run["state"] in ("stopped", "finished")])
        if ended[0]["state"] == "stopped":
            second.post("/api/runs/runs/mine/continue", {"id": "job-of-mine-2"})
            until(lambda: [run for run in second.get("/api/runs") if run["state"] == "finished"])
        (done,) = second.get("/api/runs")
        assert done["step"] == done["steps"]
    steps = [json.loads(line)["step"] for line in (tmp_path / "runs/mine/metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))
