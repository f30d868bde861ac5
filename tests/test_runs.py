from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.tracking import get_available_trackers

from dpo_studio.disk import write_atomically
from dpo_studio.errors import RunError
from dpo_studio.learning.held_out import evaluate
from dpo_studio.runs.folder import RunFolder, is_run
from dpo_studio.workflows.training import held_out
from tests.tiny_runs import Said, dpo, write_recipe


@pytest.fixture
def finished(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run and of the recipe beside it, still pointing at the same pairs; the recipe's path."""
    shutil.copytree(tiny_run, tmp_path / "run")
    raw = yaml.safe_load((tiny_run.parent / "r.yaml").read_text())
    raw["data"]["train"]["source"] = str(tiny_run.parent / "pairs.jsonl")
    raw["run"]["folder"] = str(tmp_path / "run")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump(raw))
    return recipe


def train(recipe: Path, *changes: str) -> Said:
    return dpo("train", recipe, *(part for change in changes for part in ("--set", change)))


def metrics(recipe: Path) -> list[dict[str, Any]]:
    return list(RunFolder(recipe.parent / "run").lines("metrics.jsonl"))


# What is in the folder


def test_a_finished_run_holds_what_the_contract_lists(tiny_run: Path) -> None:
    names = {path.name for path in tiny_run.iterdir()}
    files = {"recipe.yaml", "recipe.typed.yaml", "metrics.jsonl", "timing.jsonl", "result.json", "environment.json"}
    files |= {"data.json"}
    assert names == files | {"report.html", "checkpoints", "adapter"}
    assert {path.name for path in (tiny_run / "checkpoints").iterdir()} == {"step-2", "step-4"}


def test_metrics_have_a_line_a_step_by_trls_names(tiny_run: Path) -> None:
    """Step 0 is the evaluation before training; evaluations stand in the line of their step (every 2, and the last)."""
    lines = list(RunFolder(tiny_run).lines("metrics.jsonl"))
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    trained = {"loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"}
    trained |= {"logps/chosen", "logps/rejected"}
    for line in lines[1:]:
        assert line.keys() >= trained | {"epoch", "grad_norm", "learning_rate", "pairs"}
    measured = {f"eval_{name}" for name in trained}
    assert [line["step"] for line in lines if line.keys() >= measured] == [0, 2, 4]
    assert lines[0]["eval_loss"] == pytest.approx(0.6931472, abs=1e-6)  # ln 2: the adapter is fresh


def test_timing_environment_and_result_hold_their_numbers(tiny_run: Path) -> None:
    timing = list(RunFolder(tiny_run).lines("timing.jsonl"))
    assert [line["step"] for line in timing] == [1, 2, 3, 4]
    assert timing[0].keys() == {
        "step",
        "seconds",
        "pairs",
        "tokens",
        "pairs_per_second",
        "tokens_per_second",
        "memory_gib",
    }
    environment = json.loads((tiny_run / "environment.json").read_text())
    assert environment.keys() >= {"date", "device", "cpus", "platform", "python", "versions", "precision"}
    result = RunFolder(tiny_run).result()
    assert result is not None
    assert (result["kind"], result["steps"], result["pairs"] + result["held_out_pairs"]) == ("train", 4, 24)
    assert result.keys() >= {
        "accuracy",
        "accuracy_ci95",
        "accuracy_before",
        "longer_wins",
        "seconds",
        "pairs_per_second",
    }


def test_held_out_pairs_that_are_not_finite_are_left_out_and_counted(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """JSON has no NaN. Accuracy by hand over the other pairs; the loss, a mean over all of them, is null."""
    kept: list[float] = []

    def broken(policy: Any, pairs: Any, reference: Any, *arguments: Any, **more: Any) -> Any:
        numbers, logps = evaluate(policy, pairs, reference, *arguments, **more)
        margins = (logps.chosen_P - reference.chosen_P) - (logps.rejected_P - reference.rejected_P)
        kept[:] = margins[1:].tolist()
        logps.chosen_P[0] = float("nan")
        return numbers | {"eval_loss": float("nan")}, logps

    monkeypatch.setattr(held_out, "evaluate", broken)
    said = train(write_recipe(tmp_path / "r.yaml", tiny_base))
    assert said.code == 0, said.err

    def no_json(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    result = json.loads((tmp_path / "run" / "result.json").read_text(), parse_constant=no_json)
    assert result["not_finite"] == 1 and len(kept) == result["held_out_pairs"] - 1
    assert result["accuracy"] == pytest.approx(sum(margin > 0 for margin in kept) / len(kept))
    assert result["margin"] == pytest.approx(0.1 * sum(kept) / len(kept), rel=1e-5)
    assert result["held_out_loss"] is None


def test_a_number_that_json_has_no_word_for_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        RunFolder(tmp_path).write_json("result.json", {"margin": float("nan")})
    assert not any(tmp_path.iterdir())


def test_the_resolved_recipe_is_settled_and_the_typed_one_as_given(tiny_run: Path) -> None:
    resolved = yaml.safe_load((tiny_run / "recipe.yaml").read_text())
    assert resolved["training"]["tokens_per_micro_batch"] > 0  # auto, decided once
    assert Path(resolved["data"]["train"]["source"]).is_absolute()
    assert yaml.safe_load((tiny_run / "recipe.typed.yaml").read_text())["data"]["train"]["source"] == "pairs.jsonl"


# The same command again


def test_a_finished_run_says_so_and_is_left_alone(finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.parent.rglob("*")}
    said = train(finished)
    assert said.code == 0
    assert "is finished: 4 steps; nothing to do" in said.err
    assert {path: path.stat().st_mtime_ns for path in finished.parent.rglob("*")} == before


def test_a_finished_run_needs_no_data_to_say_so(finished: Path, tiny_run: Path) -> None:
    pairs = tiny_run.parent / "pairs.jsonl"
    pairs.rename(finished.parent / "moved.jsonl")
    try:
        said = train(finished)
    finally:
        (finished.parent / "moved.jsonl").rename(pairs)
    assert said.code == 0, said.err
    assert "is finished: 4 steps; nothing to do" in said.err


def test_an_unfinished_run_is_continued_to_the_same_end(finished: Path) -> None:
    """As a crash after step 2's checkpoint leaves it: lines beyond the checkpoint are written again, equal."""
    run = finished.parent / "run"
    whole = metrics(finished)
    weights = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(run / "checkpoints" / "step-4")
    shutil.rmtree(run / "adapter")
    (run / "result.json").unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss"')  # cut off in the middle
    said = train(finished)
    assert said.code == 0
    assert "after step 2 of 4" in said.err
    assert metrics(finished) == whole
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == weights


def test_other_settings_are_refused_with_the_difference(finished: Path) -> None:
    said = train(finished, "training.learning_rate=1e-3", "objective={kind: ipo}")
    assert said.code == 1
    for line in ("training.learning_rate: 0.01 there, 0.001 asked for", "objective.kind: dpo there, ipo asked for"):
        assert line in said.err
    assert "hint:" in said.err
    assert RunFolder(finished.parent / "run").result() is not None


def test_a_longer_run_goes_on_from_the_end(finished: Path) -> None:
    said = train(finished, "training.max_steps=6")
    assert said.code == 0
    assert "after step 4 of 6" in said.err
    assert [line["step"] for line in metrics(finished)] == [0, 1, 2, 3, 4, 5, 6]
    result = RunFolder(finished.parent / "run").result()
    assert result is not None and result["steps"] == 6


def test_a_shorter_run_is_refused_and_nothing_is_lost(finished: Path) -> None:
    """18 pairs in steps of 4 are 5 steps an epoch: half an epoch is 3 steps, and 4 are behind it."""
    assert "training.max_steps: 4 there, 3 asked for" in train(finished, "training.max_steps=3").err
    run = RunFolder(finished.parent / "run")
    recipe = run.recipe()
    assert recipe is not None
    halved: Any = recipe.to_plain()
    halved["training"] |= {"max_steps": None, "epochs": 0.5}
    run.write_yaml("recipe.yaml", halved)  # as if it had been begun so
    said = train(finished, "training.max_steps=null", "training.epochs=0.5001")
    assert said.code == 1
    assert "has finished 4 steps" in said.err and "ask for 3" in said.err
    assert run.result() is not None


def test_what_does_not_change_the_learning_may_change(finished: Path) -> None:
    run = finished.parent / "run"
    (run / "result.json").unlink()
    shutil.rmtree(run / "checkpoints" / "step-4")
    said = train(finished, "training.save_every=3", "training.evaluate_every=3")
    assert said.code == 0
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step-3", "step-4"}
    assert [line["step"] for line in metrics(finished) if "eval_loss" in line] == [0, 2, 3, 4]


def test_a_run_that_took_no_step_takes_other_settings(finished: Path) -> None:
    """A first try that failed early, at `adapter.targets` say, must not stand in the way of the corrected one."""
    run = finished.parent / "run"
    for name in ("checkpoints", "adapter"):
        shutil.rmtree(run / name)
    for name in ("result.json", "metrics.jsonl", "timing.jsonl"):
        (run / name).unlink()
    assert train(finished, "training.max_steps=1", "objective={beta: 0.3}").code == 0


def test_a_setting_that_fails_leaves_no_run_behind(tiny_base: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", tiny_base)
    said = train(recipe, "adapter.targets=[no_such_layer]")
    assert said.code == 1
    assert "q_proj" in said.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_place_that_is_not_a_run_is_refused(what: str, tiny_base: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", tiny_base)
    if what == "file":
        (tmp_path / "run").write_text("mine")
    else:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "thesis.txt").write_text("mine")
    said = train(recipe)
    assert said.code == 1
    assert "exists and is not a run" in said.err and "--set run.folder=" in said.err


def test_an_empty_folder_becomes_a_run(tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    recipe = write_recipe(tmp_path / "r.yaml", tiny_base)
    assert train(recipe, "training.max_steps=1").code == 0
    assert is_run(tmp_path / "run")


# Trackers


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_done(finished: Path) -> None:
    missing = sorted({"tensorboard", "wandb", "trackio"} - set(map(str, get_available_trackers())))
    if not missing:
        pytest.skip("every tracker is installed")
    said = dpo("train", finished, "--tracker", missing[0], "--set", "run.folder=elsewhere")
    assert said.code == 1
    assert "is not installed" in said.err and "pip install -e " in said.err and "[trackers]" in said.err


def test_tensorboard_gets_the_metrics(tiny_base: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    recipe = write_recipe(tmp_path / "r.yaml", tiny_base)
    assert dpo("train", recipe, "--tracker", "tensorboard").code == 0
    assert list((tmp_path / "run").rglob("events.out.tfevents.*"))


# A disk that does not want to


def test_a_disk_that_cannot_be_written_is_told_of_by_name(tmp_path: Path) -> None:
    """A file where a folder is wanted is refused to root too, as a read-only or full disk would be."""
    (tmp_path / "file").write_text("")
    run = RunFolder(tmp_path / "file" / "run")
    with pytest.raises(RunError, match=r"run/metrics\.jsonl cannot be written: Not a directory"):
        run.append("metrics.jsonl", {"step": 1})
    with pytest.raises(RunError, match="cannot be written"):
        write_atomically(tmp_path / "file" / "x.json", "{}")


def test_a_full_disk_stops_a_run_that_can_be_continued(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint of step 4 does not fit: step 2's stays, the half-written one goes, the next start ends the run."""
    run = finished.parent / "run"
    (run / "result.json").unlink()
    shutil.rmtree(run / "checkpoints" / "step-4")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("dpo_studio.learning.checkpoints.save_file", full)
        said = train(finished)
    assert said.code == 1
    assert "step 4 cannot be written" in said.err and "No space left on device" in said.err and "hint:" in said.err
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-2"]
    assert train(finished).code == 0


def test_a_cache_that_cannot_be_written_is_told_of(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DPO_STUDIO_CACHE", str(tmp_path / "file"))
    recipe = write_recipe(tmp_path / "r.yaml", tiny_base)
    said = train(recipe)
    assert said.code == 1
    assert "cache of reference log-probs" in said.err and "DPO_STUDIO_CACHE" in said.err
    assert train(recipe, "reference.mode=live", "training.max_steps=1").code == 0


def test_a_damaged_run_is_an_error_not_a_traceback(finished: Path) -> None:
    run = finished.parent / "run"
    (run / "result.json").write_text("{")
    assert "is not valid JSON" in train(finished).err
    (run / "recipe.yaml").write_text("[")
    assert "recipe.yaml cannot be read" in train(finished).err


def test_a_log_that_a_broken_disk_has_been_at_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    """Zeros as after a power cut, bytes that are no text, JSON that is no line of ours: what comes before counts."""
    run = RunFolder(tmp_path)
    for junk in (b"\0" * 40, b"\xff\xfe{", b"5\n", b"[1]\n", b'{"loss": 1}\n', b'{"step": null}\n'):
        (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": 2}\n' + junk)
        assert list(run.lines("metrics.jsonl")) == [{"step": 1}, {"step": 2}]


def test_what_a_killed_start_left_is_no_stranger_s(tiny_base: Path, tmp_path: Path) -> None:
    """Killed before recipe.yaml had its name: only a lock and an unfinished file are there."""
    recipe = write_recipe(tmp_path / "r.yaml", tiny_base)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.lock").write_text("process 1 on earth\n")
    (tmp_path / "run/.recipe.yaml.writing-4194305").write_text("model:")
    assert train(recipe, "training.max_steps=1").code == 0
    assert not list((tmp_path / "run").glob(".*"))
