"""What a run does when its disk, its folder, its clock or its numbers fail it."""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpo_studio.learning import checkpoints, train
from dpo_studio.learning.checkpoints import newest_checkpoint
from dpo_studio.learning.state import TrainingState
from dpo_studio.models import adapters
from dpo_studio.policy.policy import Policy
from dpo_studio.runs.folder import RunFolder
from tests.test_lock import another_holds
from tests.tiny_runs import Said, dpo, write_recipe

FILES = ("adapter/adapter_config.json", "adapter/adapter_model.safetensors", "optimizer.safetensors", "state.json")
TWELVE_STEPS = {"max_steps": 12, "save_every": 1, "evaluate_every": 1, "learning_rate": 0.1}


@pytest.fixture
def recipe(tiny_base: Path, tmp_path: Path) -> Path:
    """Four steps, saved and evaluated after 2 and 4; its run folder beside it."""
    return write_recipe(tmp_path / "r.yaml", tiny_base)


def during_step(step: int, monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Once, right after that step's update."""
    advance = TrainingState.advance
    left = [act]

    def advancing(state: TrainingState, policy: Any) -> None:
        advance(state, policy)
        if state.step == step and left:
            left.pop()()

    monkeypatch.setattr(TrainingState, "advance", advancing)


def refused(said: Said, *parts: str, code: int = 1) -> None:
    assert said.code == code, said.err
    assert "Traceback" not in said.err
    for part in parts:
        assert part in said.err


def same_bytes(one: Path, other: Path) -> bool:
    names = ["metrics.jsonl", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"]
    last = newest_checkpoint(one / "checkpoints")
    assert last is not None
    names += [str(file.relative_to(one)) for file in last.rglob("*") if file.is_file()]
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


# The disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 600 kB, in memory; only root can mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", place], capture_output=True)
    if mounted.returncode:
        pytest.skip("no right to mount a file system")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def fill(disk: Path) -> None:
    """Until not a byte more fits."""
    with (disk / "ballast").open("wb", buffering=0) as file:
        try:
            while file.write(b"x" * 512):
                pass
        except OSError:
            pass
    assert shutil.disk_usage(disk).free == 0


@pytest.mark.parametrize("asked_before", [True, False])
def test_a_full_disk_leaves_the_last_checkpoint_and_the_run_goes_on(
    recipe: Path, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked_before: bool
) -> None:
    """A tmpfs fills up behind step 3's metrics. Where the disk says how full it is, nothing of step 4 is tried; where
    it does not (a quota), the write fails, and its half goes. With room again the run ends as if nothing had been."""
    run = small_disk / "run"
    folder = ("--set", f"run.folder={run}")
    assert dpo("train", recipe).code == 0
    write = checkpoints._write_files

    def filling(scratch: Path, policy: Any, state: Any, *rest: Any) -> None:
        if state.step == 4:
            fill(small_disk)
        write(scratch, policy, state, *rest)

    with monkeypatch.context() as patched:
        if asked_before:
            sync = RunFolder.sync_lines
            lines = iter((lambda: None, lambda: fill(small_disk)))
            patched.setattr(RunFolder, "sync_lines", lambda run: (sync(run), next(lines)()))
        else:
            patched.setattr(checkpoints, "_write_files", filling)
        said = dpo("train", recipe, *folder)
    refused(said, "the checkpoint of step 4", "free some space")
    assert ("needs" in said.err and "MB left" in said.err) == asked_before
    assert ("No space left on device" in said.err) == (not asked_before)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-2"]
    (small_disk / "ballast").unlink()
    again = dpo("train", recipe, *folder)
    assert again.code == 0 and "after step 2 of 4" in again.err
    assert same_bytes(run, tmp_path / "run")


def test_a_disk_too_small_for_the_checkpoints_to_come_is_told_of_before_the_first_step(
    recipe: Path, small_disk: Path
) -> None:
    """Rank 64 on 600 kB: 4 x 2.3 MB (hidden 32, mlp 64: 64 x (7 x 32 + ...) numbers a layer) are wanted."""
    run = small_disk / "run"
    changes = ("--set", f"run.folder={run}", "--set", "adapter.rank=64")
    refused(
        dpo("train", recipe, *changes), "keeping checkpoints needs", "free some space, or choose a folder on another"
    )
    assert not (run / "checkpoints").exists()


def test_a_write_that_the_system_refuses_is_told_of(recipe: Path, tmp_path: Path) -> None:
    """Files may not grow beyond 60,000 bytes (RLIMIT_FSIZE, which any user can set): the optimizer's is larger, the
    adapter's is not."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))
    try:
        said = dpo("train", recipe, "--set", "adapter.rank=4")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    refused(said, "the checkpoint of step 2 cannot be written", "File too large", "the last complete checkpoint")
    assert not list((tmp_path / "run/checkpoints").iterdir())
    assert dpo("train", recipe, "--set", "adapter.rank=4").code == 0


def test_a_read_only_folder_is_told_of_before_the_model_is_loaded(
    recipe: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new run, and one that would be continued."""
    run = small_disk / "run"
    half = ("--set", f"run.folder={run}", "--set", "training.max_steps=2")
    assert dpo("train", recipe, *half).code == 0
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    monkeypatch.setattr("dpo_studio.workflows.training.run.load_chat_model", lambda *_, **__: pytest.fail("loaded"))
    for folder in (run, small_disk / "new"):
        refused(dpo("train", recipe, "--set", f"run.folder={folder}"), f"{folder} cannot be written: Read-only")


# The adapter


def test_an_adapter_that_plain_peft_would_not_load_is_told_of_before_the_first_step(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapters, "short_names", lambda _model, _names: ["q_proj"])
    refused(
        dpo("train", recipe), "plain PEFT would not load", "no place for the tensor base_model.model.model.layers.0"
    )
    assert not (tmp_path / "run/metrics.jsonl").exists() and not (tmp_path / "run/checkpoints").exists()
    assert not list((tmp_path / "run").glob(".trial*"))


def test_a_result_that_is_not_what_was_trained_finishes_no_run(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One number of one tensor is another; run again, it is written anew from the last checkpoint."""

    whole = Policy.save

    def spoil(policy: Policy, folder: Path, **named: Any) -> None:
        whole(policy, folder, **named)
        if folder.parent.name != "run":  # a checkpoint's
            return
        tensors = load_file(folder / "adapter_model.safetensors")
        tensors[sorted(tensors)[3]][-1, -1] += 1
        save_file(tensors, folder / "adapter_model.safetensors")

    with monkeypatch.context() as patched:
        patched.setattr(Policy, "save", spoil)
        refused(dpo("train", recipe), "differs from the trained one")
    assert not (tmp_path / "run/result.json").exists()
    assert dpo("train", recipe).code == 0
    assert (tmp_path / "run/result.json").exists()


# The folder


@pytest.mark.parametrize("how", ["removed", "moved", "replaced"])
def test_a_run_folder_taken_away_in_mid_run_ends_the_run(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """After step 3's update. Nothing is written in the place of what was there; a moved run goes on where it is now."""
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    assert dpo("train", recipe, "--set", f"run.folder={tmp_path}/through").code == 0

    def take_away() -> None:
        shutil.rmtree(run) if how == "removed" else run.rename(elsewhere)
        if how == "replaced":
            run.mkdir()
            (run / "metrics.jsonl").write_text("another's\n")

    with monkeypatch.context() as patched:
        during_step(3, patched, take_away)
        refused(dpo("train", recipe), f"{run} was removed, moved or replaced while it was being trained in")
    assert run.exists() == (how == "replaced")
    if how == "replaced":
        assert [path.name for path in run.iterdir()] == ["metrics.jsonl"]
        assert (run / "metrics.jsonl").read_text() == "another's\n"
    if how == "moved":
        again = dpo("train", recipe, "--set", f"run.folder={elsewhere}")
        assert again.code == 0 and "after step 2 of 4" in again.err
        assert same_bytes(elsewhere, tmp_path / "through")


def test_two_processes_never_train_in_one_folder(recipe: Path, tmp_path: Path) -> None:
    """A process of its own has the folder: refused, with its number; once it is dead, the run is trained."""
    with another_holds(tmp_path / "run") as other:
        refused(dpo("train", recipe), f"{tmp_path}/run is being trained in by process {other.pid} on", "run.folder=")
        other.kill()
    assert dpo("train", recipe).code == 0
    assert not (tmp_path / "run/.lock").exists()


@pytest.mark.parametrize("name", ["checkpoints", "adapter", "metrics.jsonl"])
def test_a_link_out_of_the_run_folder_is_refused(recipe: Path, tmp_path: Path, name: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert dpo("train", recipe, "--set", "training.max_steps=2").code == 0
    moved = elsewhere / name
    (tmp_path / "run" / name).rename(moved)
    (tmp_path / "run" / name).symlink_to(moved)
    before = {path: path.read_bytes() for path in elsewhere.rglob("*") if path.is_file()}
    refused(dpo("train", recipe), f"run/{name} is a link; a run uses only its own folder")
    assert {path: path.read_bytes() for path in elsewhere.rglob("*") if path.is_file()} == before


def test_nothing_is_removed_that_the_run_did_not_write(recipe: Path, tmp_path: Path) -> None:
    """Old checkpoints go, but not one with a note in it, nor what links lead to: a run with such a link is refused."""
    folder, elsewhere = tmp_path / "run/checkpoints", tmp_path / "elsewhere"
    assert dpo("train", recipe, "--set", "training.save_every=1", "--set", "training.max_steps=1").code == 0
    (folder / "step-1/note.txt").write_text("mine")
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("mine")
    (folder / "step-0").symlink_to(elsewhere)
    (folder / "step-77").symlink_to(elsewhere)
    (folder / ".step-2.writing-1-0a").symlink_to(elsewhere)
    refused(dpo("train", recipe), "is a link that points out of the run")
    for name in ("step-0", "step-77", ".step-2.writing-1-0a"):
        (folder / name).unlink()
    refused(dpo("train", recipe), "step-1 is damaged or incomplete and is skipped: note.txt was not", code=0)
    assert (folder / "step-1/note.txt").read_text() == "mine"
    assert (elsewhere / "precious").read_text() == "mine"
    assert {path.name for path in folder.iterdir()} == {"step-1", "step-2", "step-4"}


# A damaged checkpoint


def cut(file: Path, other: Path) -> None:
    os.truncate(file, file.stat().st_size - 2)


def flip(file: Path, other: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.write_bytes(content)


def swap(file: Path, other: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(other.read_bytes())
    other.write_bytes(content)


def link(file: Path, other: Path) -> None:
    target = file.with_name("elsewhere")
    shutil.move(file, file.parents[2] / "elsewhere")
    file.symlink_to(file.parents[2] / "elsewhere")
    assert not target.exists()


@pytest.fixture(scope="module")
def two_checkpoints(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of steps 3 and 4."""
    recipe = write_recipe(
        tmp_path_factory.mktemp("two") / "r.yaml", tiny_base, training=TWELVE_STEPS | {"max_steps": 4}
    )
    assert dpo("train", recipe).code == 0
    return recipe.parent / "run/checkpoints"


@pytest.mark.parametrize("damage", [cut, flip, swap, link], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_taken(
    two_checkpoints: Path, tmp_path: Path, name: str, damage: Callable[[Path, Path], None]
) -> None:
    """Each file of step 4's cut short by two bytes, with another bit, swapped with step 3's, or a link. Of files that
    are the same in both, a swap is none. A swapped manifest damages step 3's too."""
    folder = tmp_path / "checkpoints"
    for step in ("step-3", "step-4"):
        shutil.copytree(two_checkpoints / step, folder / step)
    file, other = folder / "step-4" / name, folder / "step-3" / name
    same = file.read_bytes() == other.read_bytes()
    damage(file, other)
    said: list[str] = []
    found = newest_checkpoint(folder, said.append)
    if same and damage is swap:
        assert found == folder / "step-4"
        return
    assert found == (None if damage is swap else folder / "step-3")
    assert f"{folder}/step-4 is damaged or incomplete and is skipped: " in said[0]
    if name != "manifest.json":
        assert Path(name).name in said[0]


def test_a_checkpoint_under_another_step_s_name_is_noticed(two_checkpoints: Path, tmp_path: Path) -> None:
    """Each whole in itself; trained on from there, steps would be taken twice or never."""
    shutil.copytree(two_checkpoints / "step-3", tmp_path / "step-4")
    said: list[str] = []
    assert newest_checkpoint(tmp_path, said.append) is None
    assert said[0].endswith("it is of step 3")


def test_the_best_checkpoint_stays(tiny_base: Path, tmp_path: Path) -> None:
    """Twelve steps at a rate so high that held-out loss rises in the end: the newest two stay, and the step whose
    line in metrics.jsonl has the lowest held-out loss of all."""
    recipe = write_recipe(tmp_path / "r.yaml", tiny_base, training=TWELVE_STEPS, data={"split_seed": 3})
    assert dpo("train", recipe).code == 0
    lines = list(RunFolder(tmp_path / "run").lines("metrics.jsonl"))[1:]
    best = min(lines, key=lambda line: line["eval_loss"])["step"]
    assert best < 11  # or this test shows nothing
    kept = {path.name for path in (tmp_path / "run/checkpoints").iterdir()}
    assert kept == {f"step-{step}" for step in (best, 11, 12)}


# Time


def test_a_clock_set_back_changes_nothing(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after step 3; the clock falls back by ten days, so that step 3's checkpoint lies in the future, and step
    2's, touched since, seems the newer one. It goes on falling, a day at every look."""
    run = tmp_path / "run"
    assert dpo("train", recipe, "--set", f"run.folder={tmp_path}/through").code == 0
    with monkeypatch.context() as patched:
        during_step(3, patched, lambda: signal.raise_signal(signal.SIGTERM))
        refused(dpo("train", recipe), "stopped by SIGTERM after step 3", code=143)
    now = time.time() - 864_000
    os.utime(run / "checkpoints/step-2", (now + 2_000_000, now + 2_000_000))
    days = iter(range(1_000_000))
    monkeypatch.setattr(time, "time", lambda: now - 86_400 * next(days))
    said = dpo("train", recipe)
    refused(said, "step-3 was written", "in the future: was the clock set back?", "after step 3 of 4", code=0)
    assert same_bytes(run, tmp_path / "through")


def test_saving_by_the_clock_and_by_steps_ends_in_the_same_bytes(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every 1.5 minutes of a clock that moves a minute a step: after steps 2 and 4 of 5, and at the end. And however
    often a run is saved, it ends the same; `through` is saved after 2, 4 and 5."""
    longer = ("--set", "training.max_steps=5", "--set", "training.warmup=0")
    assert dpo("train", recipe, *longer, "--set", f"run.folder={tmp_path}/through").code == 0
    minutes = [0.0]
    saved: list[tuple[str, str]] = []
    real = checkpoints.save_checkpoint

    def saving(folder: Path, policy: Any, state: TrainingState, **more: Any) -> Path:
        saved.append((folder.parent.name, f"step-{state.step}"))
        return real(folder, policy, state, **more)

    monkeypatch.setattr("dpo_studio.workflows.training.saving.save_checkpoint", saving)
    monkeypatch.setattr("dpo_studio.workflows.training.saving.time.monotonic", lambda: 60 * minutes[0])
    advance = TrainingState.advance

    def advancing(state: TrainingState, policy: Any) -> None:
        minutes[0] += 1
        advance(state, policy)

    monkeypatch.setattr(TrainingState, "advance", advancing)
    for every in ("1.5min", "1"):
        folder = tmp_path / every
        assert dpo("train", recipe, *longer, "--save-every", every, "--set", f"run.folder={folder}").code == 0
        assert same_bytes(folder, tmp_path / "through")
    assert saved == [(e, f"step-{n}") for e, steps in (("1.5min", (2, 4, 5)), ("1", (1, 2, 3, 4, 5))) for n in steps]


@pytest.mark.parametrize("every", ["0", "-1", "10 weeks", "min"])
def test_a_cadence_that_is_none_is_refused(recipe: Path, every: str) -> None:
    refused(dpo("train", recipe, f"--save-every={every}"), "training.save_every")


# Numbers


def spoil(steps: set[int], monkeypatch: pytest.MonkeyPatch) -> dict[int, list[int]]:
    """Make the reference of these steps NaN; the pairs of each step, by position, as they come by."""
    learn = train._learn_from
    seen: dict[int, list[int]] = {}

    def learning(batches: Any, pairs: int, policy: Any, objective: Any, state: TrainingState, live: Any) -> Any:
        seen[state.step + 1] = [pair for batch in batches for pair in batch.pairs]
        if state.step + 1 in steps:
            batches = [replace(b, reference=b.reference.map(lambda x: x * math.nan)) for b in batches]
        return learn(batches, pairs, policy, objective, state, live)

    monkeypatch.setattr(train, "_learn_from", learning)
    return seen


def strict(text: str) -> dict[str, Any]:
    """JSON as the standard has it: no NaN, no Infinity."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    read: dict[str, Any] = json.loads(text, parse_constant=refuse)
    return read


@pytest.mark.parametrize("stopped", [False, True])
def test_a_step_of_nan_is_passed_over_and_its_pairs_are_named(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: bool
) -> None:
    """Step 2 of 4, injected. Nothing is held out, so positions are rows. Stopped after step 3 and continued, the run
    ends in the same bytes, for what was skipped is in the checkpoint."""
    seen = spoil({2}, monkeypatch)
    changes = ("--set", "data.held_out.fraction=0", "--set", "objective={kind: bco}")
    said = dpo("train", recipe, *changes, "--set", f"run.folder={tmp_path}/through")
    rows = ", ".join(map(str, sorted(seen[2])))
    refused(said, f"step 2 was skipped: the loss of rows {rows} is not finite; the weights are unchanged", code=0)
    lines = [strict(line) for line in (tmp_path / "through/metrics.jsonl").read_text().splitlines()]
    assert lines[1] == {"step": 2, "epoch": 2 / 6, "skipped": 1.0, "pairs": 4}
    assert strict((tmp_path / "through/result.json").read_text())["skipped_steps"] == 1
    if stopped:
        with monkeypatch.context() as patched:
            during_step(3, patched, lambda: signal.raise_signal(signal.SIGINT))
            refused(dpo("train", recipe, *changes), "stopped by SIGINT after step 3", code=130)
        assert dpo("train", recipe, *changes).code == 0
        assert same_bytes(tmp_path / "run", tmp_path / "through")


def test_three_steps_of_nan_end_the_run_with_what_it_had_learned(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 2 to 4 of 6: exit code 3, and step 4's checkpoint holds step 1's weights. The same command takes steps 5
    and 6 from there."""
    changes = ("--set", "training.max_steps=6", "--set", "training.warmup=0", "--save-every", "1")
    weights: list[dict[str, torch.Tensor]] = []
    adapter = tmp_path / "run/checkpoints/step-1/adapter/adapter_model.safetensors"
    with monkeypatch.context() as patched:
        spoil({2, 3, 4}, patched)
        skip = TrainingState.skip

        def skipping(state: TrainingState) -> None:
            weights.extend([load_file(adapter)] if state.step == 1 else [])
            skip(state)

        patched.setattr(TrainingState, "skip", skipping)
        said = dpo("train", recipe, *changes)
    refused(said, "step 4: the loss of rows", "as in the 2 steps before", "learning_rate", code=3)
    last = tmp_path / "run/checkpoints/step-4"
    kept = load_file(last / "adapter/adapter_model.safetensors")
    assert all(torch.equal(kept[name], weights[0][name]) for name in kept)
    again = dpo("train", recipe, *changes)
    assert again.code == 0 and "after step 4 of 6" in again.err


# --verify


def test_this_machine_is_deterministic_and_says_so(recipe: Path, tmp_path: Path) -> None:
    """With dropout, which would show a forgotten seed. Nothing is left behind."""
    said = dpo("train", recipe, "--set", "adapter.dropout=0.2", "--verify")
    assert said.code == 0, said.err
    assert said.out.startswith("deterministic (CPU, float32, 1 threads): 3 steps trained twice")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("place", "where"),
    [
        ("forward", "step 2, loss: "),
        ("backward", "step 2, grad_norm: "),
        ("optimizer", "adapter/adapter_model.safetensors after step-3: "),
    ],
)
@pytest.mark.parametrize("save_every", [1, 100])
def test_a_difference_is_found_where_it_is(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, place: str, where: str, save_every: int
) -> None:
    """The second training's step 2 (or the end of step 3, its last) computes something else by a hair."""
    advance = TrainingState.advance
    trainings: list[TrainingState] = []

    def second(state: TrainingState, step: int) -> bool:
        if not trainings or trainings[-1] is not state:
            trainings.append(state)
        return len(trainings) == 2 and state.step == step

    def hair(policy: Any) -> Any:
        return next(p for name, p in policy.trained.items() if "lora_B" in name)

    def advancing(state: TrainingState, policy: Any) -> None:
        if second(state, 1) and place == "backward":
            hair(policy).grad *= 1.01
        advance(state, policy)
        if second(state, 1) and place == "forward":
            hair(policy).data += 1e-3
        if second(state, 3) and place == "optimizer":
            hair(policy).data += 1e-6

    listing = Path.glob
    monkeypatch.setattr(
        Path, "glob", lambda *its: iter(sorted(listing(*its)))
    )  # any order is allowed: here the oldest first
    monkeypatch.setattr(TrainingState, "advance", advancing)
    said = dpo("train", recipe, "--verify", "--set", "training.warmup=0", "--save-every", save_every)
    assert said.code == 3, said.err
    assert said.out.startswith("not deterministic (CPU, float32, 1 threads): ")
    assert f"first differ in {where}" in said.out
