"""Law 6: a run that was stopped and continued is, byte for byte, the run that was never stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from dpo_studio.config import load_recipe
from dpo_studio.console.progress import Progress
from dpo_studio.errors import Interrupted
from dpo_studio.learning.checkpoints import newest_checkpoint, restore
from dpo_studio.learning.held_out import evaluate
from dpo_studio.learning.state import TrainingState
from dpo_studio.workflows.training import held_out, run_training, session
from dpo_studio.workflows.training.run_log import RunLog
from tests.tiny_runs import write_pairs

SETTINGS: dict[str, Any] = {
    "adapter": {"rank": 4, "alpha": 8, "dropout": 0.1},
    "training": {
        "pairs_per_step": 8,
        "tokens_per_micro_batch": 150,
        "epochs": 2,
        "learning_rate": 5e-3,
        "save_every": 2,
        "evaluate_every": 3,
    },
}
"""27 pairs: four steps an epoch, the last of three pairs; eight steps; dropout; several micro-batches a step;
checkpoints after the even steps."""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A recipe beside its pairs."""
    folder = tmp_path_factory.mktemp("recipe")
    write_pairs(folder / "pairs.jsonl", 27)
    write_pairs(folder / "held_out.jsonl", 4, seed=1)
    data = {"train": {"source": "pairs.jsonl"}, "held_out": {"source": "held_out.jsonl"}}
    content = {"model": {"path": str(tiny_base), "dtype": "float32"}, "data": data}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content | SETTINGS), encoding="utf-8")
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def through(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of that recipe that nothing ever stopped."""
    folder = tmp_path_factory.mktemp("runs") / "through"
    run(recipe, folder)
    return folder


def run(recipe: Path, folder: Path, *overrides: str) -> dict[str, Any]:
    loaded = load_recipe(recipe, [f"run.folder={folder}", *overrides])
    return run_training(loaded, Progress(quiet=True)).result


@contextmanager
def stopping_after(step: int) -> Iterator[None]:
    """Ctrl-C while this step is being taken."""
    inner = RunLog.write

    def write(self: RunLog, report: Any, held_out: Any) -> None:
        inner(self, report, held_out)
        if report.step == step:
            signal.raise_signal(signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunLog, "write", write)
        yield


def left_behind(folder: Path) -> dict[str, bytes]:
    """What must be equal: the adapter, the metrics, the last checkpoint with the optimizer in it."""
    last = newest_checkpoint(folder / "checkpoints")
    assert last is not None
    files = [folder / "metrics.jsonl", *(folder / "adapter").iterdir(), *(p for p in last.rglob("*") if p.is_file())]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.mark.parametrize(
    "reference", ["mode=cached", "mode=live", pytest.param("update_every=1", marks=pytest.mark.slow), "update_every=4"]
)
def test_stopping_and_continuing_changes_no_bit(recipe: Path, through: Path, tmp_path: Path, reference: str) -> None:
    """Stopped after step 3 (in the first epoch, no multiple of save_every), after 4 (the epoch's end), after 6 (in the
    second epoch), then to the end. A reference that moves: every step, so that ranks are cut on both sides of a
    checkpoint, or after 4, between two of them."""
    settings = [f"reference.{reference}"]
    if reference.startswith("update"):
        settings.append("reference.update_share=0.6")
    if reference != "mode=cached":
        through = tmp_path / "through"
        run(recipe, through, *settings)
    stopped = tmp_path / "stopped"
    for step in (3, 4, 6):
        with stopping_after(step), pytest.raises(Interrupted) as interrupted:
            run(recipe, stopped, *settings)
        assert interrupted.value.exit_code == 130
        assert f"after step {step}" in interrupted.value.message
        assert (stopped / f"checkpoints/step-{step}").is_dir()
        assert not (stopped / "result.json").exists()
    torch.manual_seed(12345)  # nothing may hang on the process's own random state
    result = run(recipe, stopped, *settings)
    assert left_behind(stopped) == left_behind(through)
    moved = "checkpoints/step-8/reference.safetensors" in left_behind(stopped)
    assert moved == reference.startswith("update")
    whole = json.loads((through / "result.json").read_text())
    for name in ("steps", "pairs", "accuracy", "held_out_loss"):
        assert result[name] == whole[name]


@pytest.mark.parametrize("kind", ["bco", "mixture", "simpo"])
def test_stopping_changes_no_bit_of_an_objective_with_a_memory_or_without_a_reference(
    recipe: Path, tmp_path: Path, kind: str
) -> None:
    """BCO's running mean, alone and in a mixture, comes back from the checkpoint; it is not 0, and forgotten it would
    change the next loss."""
    settings = (f"objective.kind={kind}", "training.max_steps=6")
    run(recipe, tmp_path / "through", *settings)
    for name in ("stopped", "forgotten"):
        with stopping_after(3), pytest.raises(Interrupted):
            run(recipe, tmp_path / name, *settings)
    state = tmp_path / "forgotten/checkpoints/step-3/state.json"
    assert (json.loads(state.read_text())["mean_log_ratio"] != 0) == (kind != "simpo")
    run(recipe, tmp_path / "stopped", *settings)
    assert left_behind(tmp_path / "stopped") == left_behind(tmp_path / "through")
    if kind == "simpo":
        return

    def forget(checkpoint: Path, policy: Any, state: TrainingState) -> None:
        restore(checkpoint, policy, state)
        state.mean_log_ratio = 0.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "restore", forget)
        run(recipe, tmp_path / "forgotten", *settings)
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("stopped", "forgotten")]
    assert lines[0][:4] == lines[1][:4]
    assert json.loads(lines[0][4])["loss"] != json.loads(lines[1][4])["loss"]


def test_a_held_out_loss_is_taken_at_the_threshold_of_its_step(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evaluated after steps 3 and 6: BCO's threshold is the mean reward of the first three steps, and of all six."""
    shifts: list[float] = []

    def listening(policy: Any, pairs: Any, reference: Any, objective: Any, **settings: Any) -> Any:
        shifts.append(objective.shift)
        return evaluate(policy, pairs, reference, objective, **settings)

    monkeypatch.setattr(held_out, "evaluate", listening)
    run(recipe, tmp_path / "run", "objective.kind=bco", "training.max_steps=6")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()][1:]
    means = [(line["rewards/chosen"] + line["rewards/rejected"]) / 2 for line in lines]
    assert shifts == pytest.approx([sum(means[:3]) / 3, sum(means) / 6], rel=1e-6)


def test_what_a_run_learns_is_more_than_rounding(recipe: Path, through: Path, tmp_path: Path) -> None:
    """Or the test above would compare nothing: the loss falls, dropout is felt, and another seed gives other bytes."""
    lines = [json.loads(line) for line in (through / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(9))
    assert [line["pairs"] for line in lines[1:]] == [8, 8, 8, 3] * 2
    assert min(line["loss"] for line in lines[1:]) < 0.6
    for name, override in (("seed", "training.seed=1"), ("dropout", "adapter.dropout=0.2")):
        run(recipe, tmp_path / name, override, "training.max_steps=4")
        others = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert others[4]["loss"] != lines[4]["loss"]


def test_a_damaged_checkpoint_is_passed_over_and_the_run_ends_the_same(
    recipe: Path, through: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Stopped after step 5: checkpoints 4 and 5 are there. One bit of 5's optimizer flips, a half-written 6 lies about,
    and two empty folders of later steps: the run goes on from 4 and says so, and in the end its own two are there."""
    stopped = tmp_path / "stopped"
    with stopping_after(5), pytest.raises(Interrupted):
        run(recipe, stopped)
    checkpoints = stopped / "checkpoints"
    assert names(checkpoints) == ["step-4", "step-5"]
    damaged = checkpoints / "step-5" / "optimizer.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    shutil.copytree(checkpoints / "step-4", checkpoints / ".step-6.writing-1-0a")
    (checkpoints / ".step-6.writing-1-0a/manifest.json").unlink()
    (checkpoints / "step-98").mkdir()
    (checkpoints / "step-99").mkdir()
    run(recipe, stopped)
    said = capfd.readouterr().err
    assert f"{checkpoints / 'step-5'} is damaged or incomplete and is skipped" in said
    assert f"{checkpoints / 'step-99'} is damaged" in said
    assert "writing" not in said
    assert left_behind(stopped) == left_behind(through)
    assert names(checkpoints) == ["step-6", "step-8"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("change", ["missing file", "extra file", "cut file", "no manifest", "broken manifest"])
def test_a_checkpoint_is_whole_or_not_there(through: Path, tmp_path: Path, change: str) -> None:
    newest = tmp_path / "step-8"
    shutil.copytree(through / "checkpoints/step-8", newest)
    warnings: list[str] = []
    assert newest_checkpoint(tmp_path, warnings.append) == newest
    assert not warnings
    match change:
        case "missing file":
            (newest / "adapter/adapter_config.json").unlink()
        case "extra file":
            (newest / "stray").write_text("")
        case "cut file":
            os.truncate(newest / "adapter/adapter_model.safetensors", 100)
        case "no manifest":
            (newest / "manifest.json").unlink()
        case "broken manifest":
            (newest / "manifest.json").write_text('{"state.json": ')
    assert newest_checkpoint(tmp_path, warnings.append) is None
    assert len(warnings) == 1


def test_a_run_without_any_whole_checkpoint_begins_again(recipe: Path, through: Path, tmp_path: Path) -> None:
    stopped = tmp_path / "stopped"
    with stopping_after(3), pytest.raises(Interrupted):
        run(recipe, stopped)
    for manifest in stopped.glob("checkpoints/*/manifest.json"):
        manifest.unlink()
    run(recipe, stopped)
    assert left_behind(stopped) == left_behind(through)


def test_a_crash_between_metrics_and_checkpoint_leaves_no_line_twice(
    recipe: Path, through: Path, tmp_path: Path
) -> None:
    """Power fails in step 6, after 4 was saved: metrics.jsonl holds 5 and half a line more. The run cuts back to 4."""
    crashed = tmp_path / "crashed"
    with stopping_after(5), pytest.raises(Interrupted):
        run(recipe, crashed)
    shutil.rmtree(crashed / "checkpoints/step-5")
    with (crashed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "epo')
    run(recipe, crashed)
    assert left_behind(crashed) == left_behind(through)


def test_a_longer_run_goes_on_from_where_the_shorter_ended(recipe: Path, tmp_path: Path) -> None:
    """max_steps 4, then 8, at a constant rate without warm-up: the same as 8 at once."""
    same = ("training.schedule=constant", "training.warmup=0", "training.evaluate_every=4")
    run(recipe, tmp_path / "at once", "training.max_steps=8", *same)
    run(recipe, tmp_path / "longer", "training.max_steps=4", *same)
    assert run(recipe, tmp_path / "longer", "training.max_steps=8", *same)["steps"] == 8
    assert left_behind(tmp_path / "longer") == left_behind(tmp_path / "at once")


def test_a_finished_run_is_left_as_it_is(recipe: Path, through: Path) -> None:
    before = left_behind(through) | {"result.json": (through / "result.json").read_bytes()}
    assert run(recipe, through) == json.loads(before["result.json"])
    assert left_behind(through) | {"result.json": (through / "result.json").read_bytes()} == before


def test_a_checkpoint_holds_the_optimizer_s_averages_of_every_trained_tensor(through: Path) -> None:
    """4 layers x 7 linear layers x (A, B) x (exp_avg, exp_avg_sq, step), and the step is 8 everywhere."""
    averages = load_file(through / "checkpoints/step-8/optimizer.safetensors")
    assert len(averages) == 4 * 7 * 2 * 3
    assert {float(value) for name, value in averages.items() if name.endswith(".step")} == {8.0}
    adapter = load_file(through / "checkpoints/step-8/adapter/adapter_model.safetensors")
    assert {name.rpartition(".")[0].replace(".default.weight", ".weight") for name in averages} == set(adapter)
    assert (through / "adapter/adapter_model.safetensors").read_bytes() == (
        through / "checkpoints/step-8/adapter/adapter_model.safetensors"
    ).read_bytes()


def test_only_the_newest_two_stay(through: Path) -> None:
    assert names(through / "checkpoints") == ["step-6", "step-8"]


@pytest.mark.slow
def test_ctrl_c_on_a_real_command_leaves_a_checkpoint_and_the_same_command_ends_as_if_nothing_had_been(
    recipe: Path, tmp_path: Path
) -> None:
    """A process of its own, stopped by a signal in the middle, against this process left alone. 80 steps last a second
    or two, so a signal sent when the third is seen comes long before the end."""
    longer = ("training.max_steps=80", "training.save_every=30", "training.evaluate_every=100")
    stopped, through = tmp_path / "stopped", tmp_path / "through"
    options = [part for text in (f"run.folder={stopped}", *longer) for part in ("--set", text)]
    command = [sys.executable, "-c", "from dpo_studio.cli import main; main()", "train", str(recipe), *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    metrics = stopped / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") > 3):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=600)[1]
    assert process.returncode == 130, said
    assert "stopped by SIGINT after step" in said
    assert "the same command continues from there" in said
    checkpoint = newest_checkpoint(stopped / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.name == f"step-{metrics.read_text().count(chr(10)) - 1}"
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"continuing {stopped} after step" in done.stderr
    assert "Traceback" not in said + done.stderr
    run(recipe, through, *longer)
    assert left_behind(stopped) == left_behind(through)
