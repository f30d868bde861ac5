"""`dpo sweep`: every combination once, one reference for all, killed and continued with the same numbers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dpo_studio.errors import NonFiniteError, UsageError
from dpo_studio.learning import batched_logps as batched
from dpo_studio.learning import reference
from dpo_studio.reports.frontier import draw_frontier, frontier_table, measure
from dpo_studio.workflows import training
from dpo_studio.workflows.sweeping import plan_sweep
from tests.tiny_runs import Said, dpo, write_recipe

BETAS = ["--set", "objective.beta=0.1,0.5"]


@pytest.fixture(scope="module")
def recipe(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe") / "r.yaml", tiny_base)


@pytest.fixture(scope="module")
def swept(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Said, int]:
    """A whole sweep in a new cache: its folder, what it said, and how many pairs the reference was computed for."""
    computed = 0
    whole = batched.logps_over_ranks

    def counted(ranks: Any, model: Any, pairs: Sequence[Any], **more: Any) -> Any:
        nonlocal computed
        computed += len(pairs)
        return whole(ranks, model, pairs, **more)

    out = tmp_path_factory.mktemp("sweep") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DPO_STUDIO_CACHE", str(out.with_name("cache")))
        patch.setattr(reference, "logps_over_ranks", counted)
        said = dpo("sweep", recipe, *BETAS, "--out", out)
    assert said.code == 0, said.err
    return out, said, computed


def content(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "sweep.json").read_text()))


def test_each_setting_is_a_run_of_its_own_and_the_table_says_what_they_gave(swept: tuple[Path, Said, int]) -> None:
    out, said, _ = swept
    runs = content(out)["runs"]
    assert [run["folder"] for run in runs] == ["objective.beta=0.1", "objective.beta=0.5"]
    for run in runs:
        folder = out / run["folder"]
        result = json.loads((folder / "result.json").read_text())
        metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert (run["accuracy"], run["margin"], run["loss"]) == tuple(
            result[key] for key in ("accuracy", "margin", "held_out_loss")
        )
        assert [point["step"] for point in run["path"]] == [0, 2, 4]
        assert [point["distance"] for point in run["path"]] == [
            line["eval_log_ratios/size"] for line in metrics if "eval_loss" in line
        ]
        assert run["path"][0] == {"step": 0, "distance": 0.0, "accuracy": 0.5}  # it still is its reference
        assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    assert said.out == (out / "sweep.md").read_text()
    assert said.out.count("\n| objective.beta=") == 2
    assert {path.name for path in out.iterdir()} == {
        *(run["folder"] for run in runs),
        *("sweep.json", "sweep.md", "frontier.png", "frontier.svg"),
    }


def test_the_reference_is_computed_once(swept: tuple[Path, Said, int], recipe: Path) -> None:
    """24 pairs, trained on or held out: one pass over each in two runs. (What the policy computes is not counted.)"""
    assert swept[2] == 24


def test_the_same_command_again_trains_nothing(swept: tuple[Path, Said, int], recipe: Path) -> None:
    out, first, _ = swept
    before = (out / "sweep.json").read_bytes()
    again = dpo("sweep", recipe, *BETAS, "--out", out)
    assert again.err.count("nothing to do") == 2
    assert (out / "sweep.json").read_bytes() == before
    assert again.out == first.out


def test_a_sweep_killed_in_its_second_run_goes_on_to_the_same_numbers(
    swept: tuple[Path, Said, int], recipe: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    program = "from dpo_studio.cli import main; main()"
    command = [sys.executable, "-c", program, "sweep", str(recipe), *BETAS, "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    second = out / "objective.beta=0.5" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not second.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert len(content(out)["runs"]) == 1  # of the run that was done, table and figure are there
    assert (out / "frontier.svg").exists()
    said = dpo("sweep", recipe, *BETAS, "--out", out)
    assert said.code == 0, said.err
    assert content(out) == content(swept[0])


def test_a_run_that_stops_itself_does_not_stop_the_others(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = training.run_training

    def breaks(loaded: Any, progress: Any, **more: Any) -> Any:
        if loaded.recipe.objective.beta == 0.1:
            raise NonFiniteError("step 3: the gradient is not finite")
        return whole(loaded, progress, **more)

    (tmp_path / "out" / "objective.beta=0.1").mkdir(parents=True)
    monkeypatch.setattr(training, "run_training", breaks)
    said = dpo("sweep", recipe, *BETAS, "--out", tmp_path / "out")
    assert said.code == 0, said.err
    assert "objective.beta=0.1 stopped itself: step 3" in said.err
    first, second = content(tmp_path / "out")["runs"]
    assert first["stopped"] == "step 3: the gradient is not finite" and second["stopped"] is None
    assert "then stopped itself" in said.out


def test_several_keys_make_their_product_and_one_value_holds_for_all(recipe: Path, tmp_path: Path) -> None:
    sets = ["objective.beta=0.1,0.5", "adapter.targets=[q_proj,v_proj],all-linear", "training.learning_rate=3e-4"]
    folder, members = plan_sweep(recipe, sets, tmp_path / "out")
    assert [member.name for member in members] == [
        'objective.beta=0.1,adapter.targets=["q_proj", "v_proj"]',
        "objective.beta=0.1,adapter.targets=all-linear",
        'objective.beta=0.5,adapter.targets=["q_proj", "v_proj"]',
        "objective.beta=0.5,adapter.targets=all-linear",
    ]
    recipes = [member.loaded.recipe for member in members]
    assert [one.objective.beta for one in recipes] == [0.1, 0.1, 0.5, 0.5]
    assert [one.adapter and one.adapter.targets for one in recipes] == [["q_proj", "v_proj"], "all-linear"] * 2
    assert {one.training.learning_rate for one in recipes} == {3e-4}
    assert len({member.loaded.run_folder for member in members}) == 4
    assert all(member.loaded.run_folder.parent == folder == tmp_path / "out" for member in members)


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        ([], "no --set has several values"),
        (["objective.beta=0.1"], "no --set has several values"),
        (["objective.beta=0.1,0.10"], "occurs twice"),
        (["run.folder=a,b"], "--out names the sweep's folder"),
    ],
)
def test_what_is_no_sweep_is_refused(sets: list[str], said: str, recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said):
        plan_sweep(recipe, sets, tmp_path)


def test_an_impossible_value_is_refused_before_anything_is_trained(recipe: Path, tmp_path: Path) -> None:
    said = dpo("sweep", recipe, "--set", "objective.beta=0.1,-1", "--out", tmp_path / "out")
    assert said.code == 1
    assert "objective.beta" in said.err
    assert not (tmp_path / "out").exists()


def test_a_run_folder_is_not_taken_for_a_sweep(recipe: Path, tiny_run: Path) -> None:
    said = dpo("sweep", recipe, *BETAS, "--out", tiny_run)
    assert said.code == 2
    assert "is a run, not a sweep" in said.err


def test_samples_are_read_where_an_evaluation_left_them(tmp_path: Path) -> None:
    """KL and win rate of the temperature nearest to 1, where log-ratios of samples estimate the policy's own KL."""
    assert measure(tmp_path, "a|b").sampled is None
    (tmp_path / "evaluation").mkdir()
    rates = [{"temperature": 0.0, "win_rate": 0.9, "kl": 9.0}, {"temperature": 1.0, "win_rate": 0.7, "kl": 4.5}]
    rates[1] |= {"win_rate_ci95": [0.6, 0.8], "kl_ci95": [3.5, 5.5]}  # type: ignore[dict-item]
    evaluation = {"against": "reference", "temperatures": [*rates, {"temperature": 2.0}]}
    (tmp_path / "evaluation" / "winrate.json").write_text(json.dumps(evaluation))
    run = measure(tmp_path, "a|b")
    at_one = {"temperature": 1.0, "kl": 4.5, "kl_ci95": (3.5, 5.5), "win_rate": 0.7, "win_rate_ci95": (0.6, 0.8)}
    assert run.to_plain()["sampled"] == at_one
    table = frontier_table([run])
    assert "| a\\|b | 0 | – | – | – | – | 70 % (60–80 %) | 4.50 | nothing found |" in table
    assert "at temperature 1." in table
    draw_frontier([run], tmp_path)
    assert "KL to the reference, nats an answer" in (tmp_path / "frontier.svg").read_text()
    (tmp_path / "evaluation" / "winrate.json").write_text(json.dumps(evaluation | {"against": "other/model"}))
    assert measure(tmp_path, "a|b").to_plain()["sampled"] == at_one | {"win_rate": None, "win_rate_ci95": None}


def test_importing_the_sweep_loads_no_torch() -> None:
    program = "import sys, dpo_studio.workflows.sweeping; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout == "False\n"
