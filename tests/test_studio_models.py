"""Answers for Compare and Chat: the worker, its lines, and what becomes of it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from dpo_studio.studio.worker import Answering
from dpo_studio.workflows.loading import load_any
from tests.stub_server import Reply, stub_server
from tests.studio_client import Browser, browser_of, served


def asked_of(*models: str, tokens: int = 4, **sampling: Any) -> dict[str, Any]:
    return {
        "models": list(models),
        "messages": [{"role": "user", "content": "keep the bread"}],
        "sampling": {"max_new_tokens": tokens, "temperature": 0.0} | sampling,
    }


def events(browser: Browser, question: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Each event of a stream: its kind and its data."""
    said = browser.client.post("/api/generate", json=question, timeout=60).text
    blocks = [block.split("\n") for block in said.strip().split("\n\n")]
    return [(kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for kind, data in blocks]


def test_two_models_answer_one_after_the_other_and_a_base_is_its_run_without_the_adapter(
    tiny_run: Path, tiny_base: Path
) -> None:
    told: list[dict[str, Any]] = []
    answering = Answering(told.append)
    question = asked_of(str(tiny_base), str(tiny_run), top_p=1.0, seed=0)
    answering.answer(question)
    assert len(answering._loaded) == 1, "one base in memory serves both"
    assert [line["index"] for line in told if "end" in line] == [0, 1] and told[-1] == {"done": True}
    alone: list[dict[str, Any]] = []
    by_itself = Answering(alone.append)
    by_itself._loaded[str(tiny_base)] = load_any(str(tiny_base), dtype="float32")  # the run's own
    by_itself.answer(question | {"models": [str(tiny_base)]})

    def text(lines: list[dict[str, Any]], index: int) -> str:
        return "".join(line["piece"] for line in lines if line.get("index") == index and "piece" in line)

    assert text(told, 0) == text(alone, 0)


def test_a_stream_of_a_real_studio_whose_worker_dies_and_comes_back(
    tmp_path: Path, tiny_run: Path, tiny_base: Path
) -> None:
    shutil.copytree(tiny_run, tmp_path / "run")
    with served(tmp_path) as browser:
        browser.log_in()
        offered = browser.get("/api/compare/sources")
        assert offered["runs"] == ["run"] and str(tiny_base) in offered["bases"]
        told = events(browser, asked_of("run"))
        assert told[0][0] == "say" and told[-1][0] == "done" and "end" in [kind for kind, _ in told]
        (worker,) = children(browser.process.pid)
        os.kill(worker, 9)
        assert events(browser, asked_of("run"))[-1][0] in ("done", "error")
        assert events(browser, asked_of("run"))[-1][0] == "done"
        browser.post("/api/downloads", {"name": "nothing-of-this-name/x"})
        missing = dict(events(browser, asked_of("nothing-of-this-name/x")))
        assert missing["error"]["error"] and "Traceback" not in missing["error"]["error"]


def test_a_listed_server_is_asked_beside_a_model_of_ours_and_no_other(
    tmp_path: Path, tiny_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pieces come while the model here is still loading; its key goes to it alone, and no answer has it."""
    monkeypatch.setenv("THEIR_API_KEY", key := "sk-studio-0123456789abcdef")
    pieces: list[Any] = [{"choices": [{"delta": {"content": text}}]} for text in ("Good ", f"key {key}.")]
    pieces.append({"choices": [{"delta": {}, "finish_reason": "length"}]})
    body = "".join(f"data: {json.dumps(piece)}\n\n" for piece in pieces) + "data: [DONE]\n\n"
    shutil.copytree(tiny_run, tmp_path / "run")
    with stub_server(lambda number, _: Reply(body) if number < 2 else Reply(f"no: {key}", 401)) as stub:
        with served(tmp_path) as browser:
            browser.log_in()
            name = f"server:their-model@{stub.url}"
            said = browser.client.post("/api/generate", json=asked_of("run", name))
            assert (said.status_code, said.json()["field"]) == (403, "models") and stub.requests == []
            for wrong in ("file:///etc/passwd", "http://u:p@x/v1", "http://x/v1?k=1", "x", "http://a b"):
                asked = {"model": "m", "url": wrong}
                assert browser.client.post("/api/endpoints", json=asked).json()["field"] == "url", wrong
            secret: dict[str, Any] = {"model": "m", "url": stub.url, "key_variable": "AWS_SECRET_ACCESS_KEY"}
            assert browser.client.post("/api/endpoints", json=secret).status_code == 422
            listed: dict[str, Any] = {"model": "their-model", "url": stub.url + "/", "key_variable": "THEIR_API_KEY"}
            assert browser.post("/api/endpoints", listed) == {"name": name}
            assert browser.get("/api/compare/sources")["servers"] == [name]
            told = events(browser, asked_of("run", name))
            first = next(data["index"] for kind, data in told if kind == "piece")
            assert first == 1, "the server did not wait for the model here"
            assert [data["cut"] for kind, data in told if kind == "end" and data["index"] == 1] == [True]
            assert {data["index"] for kind, data in told if kind == "end"} == {0, 1} and told[-1][0] == "done"
            assert "".join(d["piece"] for k, d in told if k == "piece" and d["index"] == 1) == "Good key [key]."
            both = events(browser, asked_of(name, name))
            assert stub.requests[0]["messages"] == [{"role": "user", "content": "keep the bread"}]
            assert stub.headers[0]["authorization"] == f"Bearer {key}" and stub.requests[0]["max_tokens"] == 4
            assert [kind for kind, _ in both].count("error") == 1 and both[-1][0] == "done"
            shown = json.dumps([told, both, browser.get("/api/endpoints"), browser.get("/api/jobs")])
            assert key not in shown and '"key_is_set": true' in shown
            browser.post("/api/endpoints/remove", {"name": name})
            assert browser.client.post("/api/generate", json=asked_of(name)).status_code == 403
        kept = b"".join(file.read_bytes() for file in tmp_path.glob(".dpo-studio.db*"))
    assert key.encode() not in kept and len(stub.requests) == 3


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("model", ["../x", "/etc", "-x", "~/x", "server:http://127.0.0.1:1", "bundled:../x", ""])
def test_no_model_outside_is_asked(tmp_path: Path, model: str) -> None:
    said = browser_of(tmp_path).post("/api/generate", json=asked_of(model))
    assert said.status_code in (400, 403) and said.json()["field"] == "models"


def test_the_machine_is_described(tmp_path: Path) -> None:
    told = browser_of(tmp_path).get("/api/machine").json()
    assert told["memory"]["total"] > told["memory"]["free"] > 0 and told["versions"]["torch"]
