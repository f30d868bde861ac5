"""Whole runs of several real processes: the same bytes, one voice, and one end where one of them dies or hangs."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file

from dpo_studio.errors import ModelError
from dpo_studio.learning import logprobs
from dpo_studio.learning import train as loop
from dpo_studio.workflows.training import held_out, session
from tests.rank_processes import Group, on_ranks
from tests.tiny_runs import dpo, tiny_rows, write_recipe, write_rows

STEPS = {
    "pairs_per_step": 6,
    "max_steps": 6,
    "tokens_per_micro_batch": 150,
    "learning_rate": 1e-2,
    "schedule": "constant",
    "warmup": 0,
    "evaluate_every": 3,
    "save_every": 2,
}
DROPOUT = {"rank": 2, "alpha": 4, "dropout": 0.1}


def recipe_in(folder: Path, base: Path, **sections: Any) -> Path:
    """Six steps of six pairs, several rows each."""
    folder.mkdir(exist_ok=True)
    return write_recipe(folder / "r.yaml", base, rows=tiny_rows(24), **({"training": STEPS} | sections))


def trained(recipe: Path, spoil: Callable[[], Any] | None = None, *arguments: str) -> tuple[int, str]:
    """`dpo train` in this process: its exit code and what it said. `spoil` breaks something first."""
    if spoil is not None:
        spoil()
    said = dpo("train", recipe, *arguments)
    return said.code, said.err


def left(recipe: Path) -> None:
    """The same, and leave this process by that code."""
    sys.exit(dpo("train", recipe).code)


def contents(run: Path) -> dict[str, bytes]:
    """What two runs of the same have to share."""
    files = ["metrics.jsonl", *(str(p.relative_to(run)) for p in run.glob("adapter/*"))]
    files += [str(p.relative_to(run)) for p in run.glob("checkpoints/step-6/*.safetensors")]
    return {name: (run / name).read_bytes() for name in files}


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Of the result."""
    tensors: dict[str, torch.Tensor] = load_file(run / "adapter" / "adapter_model.safetensors")
    return tensors


def assert_close(run: Path, other: Path) -> None:
    """Rounding apart, the same adapter."""
    for name, tensor in weights(run).items():
        there = weights(other)[name]
        assert (tensor - there).abs().max() < 1e-4 * there.abs().max(), name


@pytest.fixture(scope="module")
def alone(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process, without dropout."""
    recipe = recipe_in(tmp_path_factory.mktemp("alone"), tiny_base)
    assert dpo("train", recipe).code == 0
    return recipe.parent / "run"


@pytest.fixture(scope="module")
def pair(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed run of two processes, with dropout."""
    recipe = recipe_in(tmp_path_factory.mktemp("two"), tiny_base, adapter=DROPOUT)
    (code, said), other = on_ranks(2, trained, recipe)
    assert code == 0, said
    assert "Not shown" in said or "better" in said
    assert other == (0, "")  # one of them talks
    assert json.loads((recipe.parent / "run" / "status.json").read_text())["exit_code"] == 0
    return recipe.parent / "run"


def test_two_starts_of_two_processes_give_the_same_bytes(pair: Path, tiny_base: Path, tmp_path: Path) -> None:
    on_ranks(2, trained, recipe_in(tmp_path / "again", tiny_base, adapter=DROPOUT))
    assert contents(tmp_path / "again" / "run") == contents(pair)
    timing = [json.loads(line) for line in (pair / "timing.jsonl").read_text().splitlines()]
    assert all(line["ranks"] == 2 and len(line["memory_gib_of_ranks"]) == 2 for line in timing)
    assert all(1 <= line["imbalance"] < 2 for line in timing)


def test_a_run_continues_on_other_numbers_of_processes(alone: Path, tiny_base: Path, tmp_path: Path) -> None:
    """Two, one, then four processes: the adapter is that of one process, and each change is said."""
    recipe = recipe_in(tmp_path / "on", tiny_base)
    words = []
    for size, steps in ((2, 2), (1, 4), (4, 6)):
        code, said = on_ranks(size, trained, recipe, None, "--set", f"training.max_steps={steps}")[0]
        assert code == 0, said
        words.append(said)
    assert "bits" not in words[0]
    assert "is of 2 processes, and now there are 1" in words[1] and "bits of every number may differ" in words[1]
    assert "is of 1 process, and now there are 4" in words[2]
    assert_close(recipe.parent / "run", alone)


@pytest.mark.slow
def test_cached_log_probs_are_computed_once_and_by_all(tiny_base: Path, tmp_path: Path) -> None:
    """A second run finds every pair in the cache, whoever computed it."""
    recipe = recipe_in(tmp_path / "a", tiny_base, objective={"beta": 0.3})
    environment = {"DPO_STUDIO_CACHE": str(tmp_path / "cache")}
    for folder, begins in (("one", "0/17"), ("two", "17/17")):
        code, said = on_ranks(2, trained, recipe, None, "--set", f"run.folder={tmp_path / folder}", **environment)[0]
        assert code == 0, said
        lines = [line for line in said.splitlines() if line.startswith("reference, training pairs")]
        assert lines[0].split()[3] == begins


# Together or not at all


def killed_at(recipe: Path, rank: int, number: signal.Signals, step: int, **environment: str) -> list[int | None]:
    """Send a signal to one of two processes once that step is written; the exit codes of both."""
    group = Group(2, left, recipe, environment=environment)
    metrics = recipe.parent / "run" / "metrics.jsonl"
    try:
        end = time.monotonic() + 120
        while not metrics.exists() or len(metrics.read_text().splitlines()) < step + 1:
            assert time.monotonic() < end
            time.sleep(0.005)
        group.send(rank, number)
        began = time.monotonic()
        (other,) = group.codes(within=60, of=[1 - rank])
        assert other is not None, "the other process did not end within 60 s"
        assert time.monotonic() - began < 60
        return [other, group.processes[rank].exitcode]
    finally:
        group.kill()


@pytest.mark.parametrize(
    ("rank", "number"),
    [
        (1, signal.SIGKILL),
        (0, signal.SIGSTOP),
        pytest.param(1, signal.SIGSTOP, marks=pytest.mark.slow),
        pytest.param(0, signal.SIGKILL, marks=pytest.mark.slow),
    ],
)
def test_a_process_that_dies_or_hangs_ends_the_other(
    pair: Path, tiny_base: Path, tmp_path: Path, rank: int, number: signal.Signals
) -> None:
    """With a patience of 2 s; then the same command gives the bytes of the run that nothing disturbed."""
    recipe = recipe_in(tmp_path / "run", tiny_base, adapter=DROPOUT)
    other, _ = killed_at(recipe, rank, number, 3, DPO_STUDIO_PATIENCE="2")
    assert other == 4
    run = recipe.parent / "run"
    assert json.loads((run / "status.json").read_text())["exit_code"] == 4
    assert not list((run / "checkpoints").glob(".*"))
    code, said = on_ranks(2, trained, recipe)[0]
    assert code == 0, said
    assert contents(run) == contents(pair)


def test_a_signal_to_one_process_stops_all_with_a_checkpoint(pair: Path, tiny_base: Path, tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path / "run", tiny_base, adapter=DROPOUT)
    codes = killed_at(recipe, 1, signal.SIGTERM, 2)
    assert codes[0] == 143
    assert json.loads((recipe.parent / "run" / "status.json").read_text())["exit_code"] == 143
    code, said = on_ranks(2, trained, recipe)[0]
    assert code == 0 and "continuing" in said
    assert contents(recipe.parent / "run") == contents(pair)


def _on_rank_one(where: Any, name: str, odd: Callable[..., Any]) -> None:
    """Replace a function in the second process."""
    if os.environ.get("RANK") == "1":
        patch.object(where, name, odd).start()


def _short_of_memory() -> None:
    """The second process runs out of memory in its fourth row."""
    real, calls = logprobs.pair_logps, []

    def once(*given: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("injected")
        return real(*given, **more)

    _on_rank_one(loop, "pair_logps", once)


def _not_a_number() -> None:
    """The second process has a loss that is none in its fourth row."""
    real, calls = logprobs.pair_logps, []

    def once(*given: Any, **more: Any) -> Any:
        calls.append(1)
        logps = real(*given, **more)
        return logps.map(lambda x: x * float("nan") if x.is_floating_point() else x) if len(calls) == 4 else logps

    _on_rank_one(loop, "pair_logps", once)


def _refused() -> None:
    def refuse(*given: Any, **more: Any) -> Any:
        raise ModelError("this model is odd in the second process", hint="none")

    _on_rank_one(session, "check_packing", refuse)


@pytest.mark.parametrize(
    "sections", [pytest.param({}, marks=pytest.mark.slow), {"objective": {"kind": "aot"}}], ids=["dpo", "aot"]
)
def test_out_of_memory_in_one_process_is_retried_by_all(tiny_base: Path, tmp_path: Path, sections: Any) -> None:
    """The numbers are those of the run that had enough."""
    recipes = [recipe_in(tmp_path / name, tiny_base, **sections) for name in ("short", "enough")]
    for recipe, spoil in zip(recipes, (_short_of_memory, None), strict=True):
        for code, said in on_ranks(2, trained, recipe, spoil):
            assert code == 0, said
    short, enough = (recipe.parent / "run" for recipe in recipes)
    assert len((short / "memory.jsonl").read_text().splitlines()) == 1
    assert_close(short, enough)


def test_a_number_that_is_none_in_one_process_is_skipped_by_all(tiny_base: Path, tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path / "run", tiny_base)
    (code, said), _ = on_ranks(2, trained, recipe, _not_a_number)
    assert code == 0, said
    assert json.loads((recipe.parent / "run" / "result.json").read_text())["skipped_steps"] == 1
    assert said.count("was skipped: the loss of row") == 1


def test_what_one_process_refuses_all_refuse_in_its_words(tiny_base: Path, tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path / "run", tiny_base)
    (code, said), other = on_ranks(2, trained, recipe, _refused)
    assert code == 1 and "odd in the second process" in said and "Traceback" not in said
    assert other == (1, "")


def _slow_evaluation() -> None:
    real = held_out.HeldOut.measure

    def slow(*given: Any) -> Any:
        time.sleep(8)
        return real(*given)

    if os.environ["RANK"] == "0":
        patch.object(held_out.HeldOut, "measure", slow).start()


def scored(*arguments: object) -> tuple[int, str, str]:
    """`dpo score` in this process."""
    said = dpo("score", *arguments)
    return said.code, said.out, said.err


def test_scores_are_split_and_come_out_in_order(alone: Path, tmp_path: Path) -> None:
    """As one process has them, rounding apart; the second process says nothing."""
    pairs = write_rows(tmp_path / "p.jsonl", tiny_rows(9, seed=3))
    (code, out, said), other = on_ranks(2, scored, alone, pairs)
    assert code == 0, said
    assert other == (0, "", "")
    lines = [json.loads(line) for line in out.splitlines()]
    whole = dpo("score", alone, pairs).lines
    assert [line["index"] for line in lines] == list(range(9))
    for line, expected in zip(lines, whole, strict=True):
        assert line == pytest.approx(expected, rel=1e-4)


def test_a_verb_that_several_processes_cannot_share_is_refused(alone: Path) -> None:
    for code, said in on_ranks(2, asked, "generate", alone, "--prompt", "why?"):
        assert code == 2
        assert "`dpo train` and `dpo score` alone" in said or not said


def asked(*arguments: object) -> tuple[int, str]:
    """`dpo ARGUMENTS` in this process."""
    said = dpo(*arguments)
    return said.code, said.err


@pytest.mark.slow
def test_two_processes_verify_themselves(tiny_base: Path, tmp_path: Path) -> None:
    (code, said), other = on_ranks(2, trained, recipe_in(tmp_path / "run", tiny_base), None, "--verify")
    assert code == 0 and "the first 3 steps, the second time" in said
    assert other == (0, "")


@pytest.mark.slow
def test_a_slow_evaluation_is_not_taken_for_a_hang(tiny_base: Path, tmp_path: Path) -> None:
    """Eight seconds on the first process, with a patience of three: its heart beats."""
    recipe = recipe_in(tmp_path / "run", tiny_base)
    assert on_ranks(2, trained, recipe, _slow_evaluation, DPO_STUDIO_PATIENCE="3")[0][0] == 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_thirty_random_moments(pair: Path, tiny_base: Path, tmp_path: Path, number: signal.Signals) -> None:
    """From the start to the last step, either rank: the other ends, and the run resumes to the same bytes."""
    draw = random.Random(int(number))
    late = []
    for trial in range(30):
        recipe = recipe_in(tmp_path / f"{trial}", tiny_base, adapter=DROPOUT)
        rank, moment = draw.randrange(2), draw.uniform(0.3, 4.0)
        group = Group(2, left, recipe, environment={"DPO_STUDIO_PATIENCE": "2"})
        try:
            time.sleep(moment)
            if group.processes[rank].is_alive():
                group.send(rank, number)
            (code,) = group.codes(within=60, of=[1 - rank])
            late += [] if code in (0, 4) else [(trial, rank, moment, code)]
        finally:
            group.kill()
        (code, said), _ = on_ranks(2, trained, recipe)
        assert code == 0, said
        assert contents(recipe.parent / "run") == contents(pair), (trial, rank, moment)
    assert not late


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM])
def test_the_real_command_with_a_process_that_is_ended(tiny_base: Path, tmp_path: Path, number: signal.Signals) -> None:
    """`dpo train --gpus 2`: exit code 4, or that of the signal; within a minute, and no process left."""
    import subprocess

    steps = STEPS | {"max_steps": 100_000, "evaluate_every": 100_000, "save_every": 50}
    recipe = recipe_in(tmp_path / "run", tiny_base, training=steps)
    command = [sys.executable, "-m", "dpo_studio", "train", str(recipe), "--gpus", "2"]
    log = tmp_path / "log"
    with log.open("w") as words:
        process = subprocess.Popen(command, stdout=words, stderr=words, start_new_session=True)
    metrics = recipe.parent / "run" / "metrics.jsonl"
    end = time.monotonic() + 120
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 60:
        assert time.monotonic() < end and process.poll() is None, log.read_text()
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    began = time.monotonic()
    os.kill(process.pid if number == signal.SIGTERM else int(children[-1]), number)
    code = process.wait(timeout=90)
    assert time.monotonic() - began < 60
    assert code == (143 if number == signal.SIGTERM else 4), log.read_text()
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]
    assert json.loads((recipe.parent / "run" / "status.json").read_text())["exit_code"] == code
    assert "Traceback" not in log.read_text()
