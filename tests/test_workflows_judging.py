"""`dpo judge check` from the command line: labels people gave, a real server, a real process really killed."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_studio.config import SourceSection
from dpo_studio.preferences.labelled import read_labelled
from dpo_studio.preferences.pair import Message
from dpo_studio.preferences.sources import read_pairs
from tests.stub_server import better_says_good, says, stub_server
from tests.tiny_models import tiny_model
from tests.tiny_runs import dpo, write_rows
from tests.tiny_tokenizers import end_ids, tiny_tokenizer

KEY = "sk-of-the-tests-0123456789"
DPO = [sys.executable, "-c", "from dpo_studio.cli import main; main()"]


def panda(number: int, one: str, two: str, *labels: int) -> dict[str, Any]:
    """A row of PandaLM's test set."""
    named = {f"annotator{place}": label for place, label in enumerate(labels, 1)}
    texts = {"instruction": "Summarize.", "input": f"text {number}", "response1": one, "response2": two}
    return {"idx": number, "cmp_key": "x_y", **texts, **named}


SLICE = [
    panda(0, "long long long", "short", 1, 1, 1),
    panda(1, "short", "long long long", 1, 1, 2),
    panda(2, "short", "long long long", 2, 2, 2),
    panda(3, "short", "longer", 0, 0, 2),
    panda(4, "one", "other", 0, 1, 2),
    panda(5, "the same", "the same", 0, 0, 0),
    panda(6, "as broken", True, 1, 1, 1),  # type: ignore[arg-type]
]


def write_slice(folder: Path) -> Path:
    file = folder / "panda.json"
    file.write_text(json.dumps(SLICE))
    return file


def test_a_judge_reads_the_prompt_that_a_run_would_learn_from(tmp_path: Path) -> None:
    """The same file as comparisons and as pairs: the input stands on the line after its instruction in both."""
    section = SourceSection(source=str(write_slice(tmp_path)))
    judged = {row.pair.row: row.pair.prompt for row in read_labelled(section).comparisons}
    learned = {pair.row: pair.prompt for pair in read_pairs(section).pairs}
    assert learned and learned.items() <= judged.items()
    assert judged[0] == (Message("user", "Summarize.\ntext 0"),)


def test_pandalm_by_hand(tmp_path: Path) -> None:
    """Rows 5 and 6 are no comparisons. Majorities of the other five: 1, 1, 2, tie, none.

    The longer answer says 1, 2, 2, 2, 2. Where people prefer one (three rows): right, wrong, right: 2/3. Over the four
    with a majority: 2/4 exact. Kappa hangs on which answer the coin shows as A, so it is worked from what --out says.

    Each annotator against the other two where those agree. Row 0: 3 of 3 right. Row 1: the two 1s stand against (1, 2),
    split, the 2 against 1: wrong. Row 2: 3 of 3. Row 3: the 2 against a tie (people prefer nothing: not in
    `agreement`), the ties against (0, 2), split. Row 4: split throughout. So agreement 6/7, exact 6/8; the longer
    answer on the same: row 0 three times right, row 1 wrong, row 2 three times right, row 3 wrong: 6/7 and 6/8.
    """
    out = tmp_path / "verdicts.jsonl"
    said = dpo("judge", "check", write_slice(tmp_path), "--judge", "length", "--json", "--out", out)
    assert said.code == 0, said.err
    result = json.loads(said.out)
    assert result["annotators"] == ["annotator1", "annotator2", "annotator3"]
    assert list(result["refused"].values()) == [1, 1]
    assert (result["n"], result["n_preferred"], result["split_labels"], result["prompts"]) == (4, 3, 1, 5)
    assert result["agreement"] == pytest.approx(2 / 3)
    assert result["exact"] == pytest.approx(2 / 4)
    people, judge = result["leave_one_out"]["people"], result["leave_one_out"]["judge"]
    assert (people["n"], people["n_preferred"]) == (8, 7)
    assert people["agreement"] == judge["agreement"] == pytest.approx(6 / 7)
    assert people["exact"] == judge["exact"] == pytest.approx(6 / 8)
    low, high = result["agreement_ci95"]
    assert 0 <= low < 2 / 3 < high <= 1
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["index"] for line in lines] == [0, 1, 2, 3, 4]
    assert [unswapped(line["winner"], line) for line in lines] == ["1", "2", "2", "2", "2"]
    assert [unswapped(label, lines[4]) for label in lines[4]["labels"]] == ["tie", "1", "2"]
    pairs = [(line["winner"], max(line["labels"], key=line["labels"].count)) for line in lines[:4]]
    assert result["kappa"] == pytest.approx(kappa_by_definition(pairs))


def unswapped(side: str, line: dict[str, Any]) -> str:
    """A side as the number of the response."""
    sides = {"first": {"a": "1", "b": "2"}, "second": {"a": "2", "b": "1"}}[line["a"]]
    return sides.get(side, "tie")


def kappa_by_definition(pairs: list[tuple[str, str]]) -> float:
    """(p_o - p_e) / (1 - p_e), from shares."""
    words = {word for pair in pairs for word in pair}
    ours, theirs = ([pair[place] for pair in pairs] for place in (0, 1))
    observed = sum(x == y for x, y in pairs) / len(pairs)
    chance = sum(ours.count(word) * theirs.count(word) for word in words) / len(pairs) ** 2
    return (observed - chance) / (1 - chance)


def test_labels_of_any_columns_and_their_ties(tmp_path: Path) -> None:
    """AlpacaEval's shape: 1, "2" and 1.5 for a tie. The longer answer is right, wrong, and cannot be."""
    rows = [
        {"instruction": f"q{n}", "output_1": "long enough", "output_2": "short", "preference": label}
        for n, label in enumerate([1, "2", 1.5])
    ]
    file = write_rows(tmp_path / "alpaca.jsonl", rows)
    columns = ["--map", "prompt=instruction", "--map", "first=output_1", "--map", "second=output_2"]
    labels = ["--annotators", "preference", "--label", "first=1", "--label", "second=2", "--label", "tie=1.5"]
    said = dpo("judge", "check", file, "--judge", "length", *columns, *labels, "--json")
    assert said.code == 0, said.err
    result = json.loads(said.out)
    assert (result["n"], result["n_preferred"], result["agreement"]) == (3, 2, 0.5)
    assert result["leave_one_out"] is None
    lost = dpo("judge", "check", file, "--judge", "length", *columns[:4], *labels)
    assert lost.code == 1
    assert "--map second=COLUMN" in lost.err


def test_a_meaning_of_several_values(tmp_path: Path) -> None:
    """Longer is right on A>>B and A>B, wrong on B>A; people tie once: 2 of 3 where they prefer."""
    verdicts = ["A>>B", "A>B", "B>A", "A=B"]
    file = write_rows(tmp_path / "v.jsonl", [{"q": v, "x": "long enough", "y": "short", "v": v} for v in verdicts])
    columns = ["--map", "prompt=q", "--map", "first=x", "--map", "second=y", "--annotators", "v"]
    labels = [word for label in ("first=A>>B", "first=A>B", "second=B>A", "tie=A=B") for word in ("--label", label)]
    said = dpo("judge", "check", file, "--judge", "length", *columns, *labels, "--json")
    assert said.code == 0, said.err
    result = json.loads(said.out)
    assert (result["n"], result["n_preferred"], result["refused"]) == (4, 3, {})
    assert result["agreement"] == pytest.approx(2 / 3)


def test_what_a_rule_can_do_wrong(tmp_path: Path) -> None:
    """What it prints is not data, what is no verdict is told, and leaving Python is a failure of the rule."""
    rules = tmp_path / "rules.py"
    rules.write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "import sys\n"
        "import numpy as np\n"
        "print('loaded')\n"
        "@dataclass\n"
        "class Words:\n"
        "    said: int\n"
        "def chatty(prompt, a, b):\n"
        "    print('thinking')\n"
        "    return 'a' if Words(len(a.text)).said > len(b.text) else 'b'\n"
        "def array(prompt, a, b):\n"
        "    return np.array([1, 2])\n"
        "def quits(prompt, a, b):\n"
        "    sys.exit('enough')\n"
    )
    pairs = write_rows(tmp_path / "p.jsonl", [{"prompt": "q", "chosen": "yes", "rejected": "no"}])
    said = dpo("judge", "check", pairs, "--judge", f"{rules}:chatty", "--json")
    assert json.loads(said.out)["agreement"] == 1.0
    assert "loaded" in said.err and "thinking" in said.err
    for name, message in (
        ("array", "array returned array([1, 2]): expected"),
        ("quits", "line 15: SystemExit: enough"),
    ):
        said = dpo("judge", "check", pairs, "--judge", f"{rules}:{name}")
        assert (said.code, said.out) == (1, "")
        assert message in said.err
    rules.write_text("raise SystemExit(0)\n")
    said = dpo("judge", "check", pairs, "--judge", f"{rules}:any")
    assert said.code == 1 and "cannot be run: line 1: SystemExit" in said.err


def test_verdicts_never_take_the_place_of_what_was_judged(tmp_path: Path) -> None:
    pairs = write_rows(tmp_path / "p.jsonl", [{"prompt": "q", "chosen": "yes", "rejected": "no"}])
    before = pairs.read_bytes()
    link = tmp_path / "link.jsonl"
    link.symlink_to(pairs)
    for out in (pairs, link, tmp_path, tmp_path / "none" / "out.jsonl"):
        said = dpo("judge", "check", pairs, "--judge", "length", "--out", out)
        assert (said.code, said.out) == (2, "")
        assert "--out" in said.err and "comparisons" not in said.err
    said = dpo("judge", "check", f"{tmp_path}:train", "--judge", "length", "--out", pairs)
    assert (said.code, pairs.read_bytes()) == (2, before)


def test_plain_pairs_and_a_rule_of_the_users_own(tmp_path: Path) -> None:
    """Chosen is what people prefer. The rule is right on even rows and ties on odd ones: (5 + 5/2) / 10."""
    rules = tmp_path / "rules.py"
    rules.write_text(
        "def even(prompt, a, b):\n"
        "    if int(prompt) % 2:\n"
        "        return 'tie'\n"
        "    return ('a' if 'yes' in a.text else 'b'), 'it says yes'\n"
        "def first(prompt, a, b):\n"
        "    return 'a'\n"
        "def broken(prompt, a, b):\n"
        "    return a.text[99]\n"
    )
    pairs = write_rows(tmp_path / "p.jsonl", [{"prompt": f"{n}", "chosen": "yes", "rejected": "no"} for n in range(10)])
    said = dpo("judge", "check", pairs, "--judge", f"{rules}:even", "--json")
    assert said.code == 0, said.err
    result = json.loads(said.out)
    assert (result["judge"], result["agreement"], result["longer_wins"]["agreement"]) == ("rules:even", 0.75, 1.0)
    said = dpo("judge", "check", pairs, "--judge", f"{rules}:first")
    assert "the answer shown first was preferred in 100 %" in said.out
    assert "the orders disagree on 10 of 10" in said.out
    said = dpo("judge", "check", pairs, "--judge", f"{rules}:broken")
    assert said.code == 1
    assert "line 8: IndexError" in said.err
    assert "Traceback" not in said.err
    said = dpo("judge", "check", pairs, "--judge", f"{rules}:nowhere")
    assert said.code == 2
    assert "there is broken, even, first" in said.err or "there is even, first, broken" in said.err


@pytest.mark.parametrize("spec", ["", "gpt-4", "llm:gpt-4", "implicit", "reward:", "no.py:rule", "llm:m@file:///x"])
def test_what_names_no_judge_is_wrong_usage(tmp_path: Path, spec: str) -> None:
    said = dpo("judge", "check", write_slice(tmp_path), "--judge", spec)
    assert said.code == 2, said.err
    assert "hint:" in said.err


def test_an_estimate_asks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with stub_server(better_says_good) as stub:
        said = dpo("judge", "check", write_slice(tmp_path), "--judge", f"llm:m@{stub.url}", "--estimate", "--json")
        assert stub.requests == []
    assert said.code == 0, said.err
    assert json.loads(said.out)["requests"] == 10
    assert "10 requests to m: about" in said.err


def rows_about_good(count: int) -> list[dict[str, Any]]:
    draw = random.Random(0)
    sides = [draw.sample(["good", "bad"], 2) for _ in range(count)]
    return [{"prompt": f"q{n}", "chosen": f"{x} {n}", "rejected": f"{y} {n}"} for n, (x, y) in enumerate(sides)]


def test_nothing_judged_is_lost_when_killed_and_no_key_is_seen(tmp_path: Path) -> None:
    """A process that is really killed, started again: it asks for what the file does not hold, and for nothing else."""
    pairs = write_rows(tmp_path / "pairs.jsonl", rows_about_good(20))
    work = tmp_path / "work"
    work.mkdir()
    replies = work / "replies.jsonl"
    environment = os.environ | {"OPENAI_API_KEY": KEY, "OPENAI_LOG": "debug", "OPENAI_ADMIN_KEY": KEY + "-admin"}
    environment["PYTHONPATH"] = os.pathsep.join(["src", environment.get("PYTHONPATH", "")])
    with stub_server(lambda n, request: better_says_good(n, request, wait_s=0.05)) as stub:
        command = [*DPO, "judge", "check", str(pairs), "--judge", f"llm:m@{stub.url}", "--json"]
        command += ["--judge-replies", str(replies), "--judge-concurrency", "2", "--out", str(work / "verdicts.jsonl")]
        with (work / "log").open("w") as log:
            first = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
            deadline = time.monotonic() + 60
            while len(stub.requests) < 14 and time.monotonic() < deadline:
                time.sleep(0.01)
            first.send_signal(signal.SIGKILL)
            assert first.wait() == -signal.SIGKILL
        kept = len(replies.read_text().splitlines())
        assert 12 <= kept < 40  # at most the two that were on their way are lost
        asked = len(stub.requests)
        second = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
        assert second.returncode == 0, second.stderr
        assert len(stub.requests) - asked == 40 - kept
        assert all(headers["authorization"] == f"Bearer {KEY}" for headers in stub.headers)
    (work / "out").write_text(second.stdout + second.stderr)
    result = json.loads(second.stdout)
    goods = sum("good" in row["chosen"] for row in rows_about_good(20))
    assert result["agreement"] == goods / 20
    assert result["verdicts"]["first_shown_preferred"] == 0.5
    for file in work.iterdir():
        assert KEY not in file.read_text(), file


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path, subprocess.Popen[bytes]]]:
    """`transformers serve` with a model whose every reply is `Verdict: 1`."""
    folder = a_model_that_says("Verdict: 1", tmp_path_factory.mktemp("models") / "first")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    log = folder.parent / "log"
    with log.open("w") as out:
        serving = subprocess.Popen(
            command, stdout=out, stderr=out, env=os.environ | {"HF_HUB_OFFLINE": "1"}, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 120
        while not answers(f"http://127.0.0.1:{port}/health"):
            assert serving.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1", folder, serving
    finally:
        serving.kill()
        serving.wait()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:  # noqa: S310 - our own address
            return bool(reply.status == 200)
    except OSError:
        return False


def a_model_that_says(text: str, folder: Path) -> Path:
    """A Llama whose layers add nothing and whose head turns each token of `text` into the next one.

    Attention and MLP write zeros, so that the head sees the last token's embedding alone; that of the i-th token of the
    text is the i-th unit vector, and the head's row of the token after it looks for that.
    """
    tokenizer = tiny_tokenizer("chatml")
    model = tiny_model("llama", max_position_embeddings=4096)
    chain = tokenizer("\n" + text + "<|im_end|>", add_special_tokens=False)["input_ids"]
    assert len(chain) == len(set(chain)) <= 32  # each token is followed by one only
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()
        head.zero_()
        for place, (token, following) in enumerate(pairwise(chain)):
            embedding[token] = torch.eye(32)[place]
            head[following, place] = 10.0
    model.generation_config.eos_token_id = sorted(end_ids("chatml"))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_real_server_whose_model_likes_the_first_place(
    server: tuple[str, Path, subprocess.Popen[bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the same command with the server gone: every reply is known, so the numbers are the same."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    url, folder, serving = server
    pairs = write_rows(tmp_path / "pairs.jsonl", rows_about_good(3))
    command = ["judge", "check", pairs, "--judge", f"llm:{folder}@{url}", "--json", "--judge-replies", tmp_path / "r"]
    said = dpo(*command)
    assert said.code == 0, said.err
    result = json.loads(said.out)
    assert (result["agreement"], result["verdicts"]["orders_disagree"]) == (0.5, 3)
    assert result["verdicts"]["first_shown_preferred"] == 1.0
    replies = [json.loads(line) for line in (tmp_path / "r").read_text().splitlines()]
    assert len(replies) == 6
    assert {reply["reply"]["choices"][0]["message"]["content"] for reply in replies} == {"Verdict: 1"}
    serving.kill()
    serving.wait()
    again = dpo(*command)
    assert (again.code, again.out) == (0, said.out), again.err


def test_what_the_server_says_reaches_the_terminal_harmless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with stub_server(lambda n, request: says("\x1b[2JVerdict: 1")) as stub:
        out = tmp_path / "out.jsonl"
        said = dpo("judge", "check", write_slice(tmp_path), "--judge", f"llm:\x1b[2J@{stub.url}", "--out", out)
    assert said.code == 0, said.err
    assert "\x1b" not in said.out + said.err + out.read_text()
