from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from dpo_studio.config import load_recipe
from dpo_studio.workflows import demo
from dpo_studio.workflows.talking import Sampling
from tests.tiny_runs import Said, dpo, tiny_rows, write_recipe

PROMISED = {
    *("win_rate", "win_rate_ci95", "stop_rate_base", "stop_rate_tuned", "accuracy", "seconds", "pairs_per_second"),
    *("base_answer", "tuned_answer", "wins", "ties", "losses", "n", "judge", "mean_tokens_base", "mean_tokens_tuned"),
}


@pytest.fixture
def tiny_demo(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`dpo demo` with a tiny model, few pairs and short answers; the folder it runs into."""
    recipe = write_recipe(tmp_path / "demo.yaml", tiny_base, rows=tiny_rows(30), run={"folder": None})
    monkeypatch.setattr(demo, "demo_recipe", lambda out: load_recipe(recipe, [f"run.folder={json.dumps(str(out))}"]))
    monkeypatch.setattr(demo, "SHOWN_SAMPLING", Sampling(temperature=0.7, max_new_tokens=8, seed=0))
    return tmp_path / "out"


def run(folder: Path) -> tuple[Said, dict[str, Any]]:
    said = dpo("demo", "--out", folder)
    return said, json.loads((folder / "result.json").read_text())


def test_the_demo_leaves_its_numbers_its_answers_and_a_report(tiny_demo: Path) -> None:
    said, result = run(tiny_demo)
    assert said.code == 0
    assert said.out.splitlines()[-1] == str(tiny_demo / "report.html")
    shown = re.match(r"win rate ([\d.]+) % ", said.out)
    assert shown and float(shown[1]) == pytest.approx(100 * result["win_rate"], abs=0.5)
    assert result.keys() >= PROMISED
    assert result["kind"] == "demo"
    assert result["wins"] + result["ties"] + result["losses"] == result["n"] == result["held_out_pairs"]
    answers = (tiny_demo / "evaluation" / "answers.jsonl").read_text().splitlines()
    assert len(answers) == result["n"]
    assert "<html" in (tiny_demo / "report.html").read_text()
    assert (tiny_demo / "adapter" / "adapter_model.safetensors").is_file()


def test_a_finished_demo_says_its_result_again(tiny_demo: Path) -> None:
    _, first = run(tiny_demo)
    said, second = run(tiny_demo)
    assert said.code == 0 and "nothing to do" in said.err
    assert second == first


def test_a_demo_interrupted_while_answering_goes_on_from_the_trained_model(
    tiny_demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training is done and says so in result.json; the answers are still to come, and are the same."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(demo, "_evaluate", interrupted)
        assert run(tiny_demo)[0].code == 130
    said, result = run(tiny_demo)
    assert said.code == 0 and "nothing to do" in said.err
    assert result.keys() >= PROMISED
    _, uninterrupted = run(tiny_demo.with_name("whole"))
    assert result["tuned_answer"] == uninterrupted["tuned_answer"]
    assert result["win_rate"] == uninterrupted["win_rate"]
