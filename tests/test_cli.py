from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dpo_studio
from dpo_studio.cli.app import set_environment
from dpo_studio.learning.state import TrainingState
from dpo_studio.workflows.training import run as training_run
from tests.tiny_models import tiny_folder
from tests.tiny_runs import Said, dpo, tiny_rows, write_recipe, write_rows

COMMAND = Path(sys.executable).parent / "dpo"
HEAVY = ("torch", "numpy", "transformers", "datasets", "peft", "accelerate", "rich", "matplotlib")
VERBS = ("demo", "train", "score", "generate", "chat", "quantize", "export", "schema")


def real(*arguments: object, **more: Any) -> subprocess.CompletedProcess[str]:
    """The installed command, in a process of its own."""
    return subprocess.run([COMMAND, *map(str, arguments)], capture_output=True, text=True, check=False, **more)


def refused(said: Said, *parts: str, code: int = 1) -> None:
    """One message on stderr that holds `parts`, no data, no traceback."""
    assert (said.code, said.out) == (code, ""), said
    assert "error: " in said.err
    assert "Traceback" not in said.err
    assert "Warning" not in said.err
    for part in parts:
        assert part in said.err


# Quick to answer


def test_help_costs_less_than_three_tenths_of_a_second() -> None:
    """Processor time, the best of five: on a busy machine the clock says nothing about the program."""

    def cost() -> float:
        before = os.times()
        assert real("--help").returncode == 0
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    assert min(cost() for _ in range(5)) < 0.3


def test_the_package_can_be_run_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "dpo_studio", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == dpo_studio.__version__


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["--version"], ["nonsense"]])
def test_help_and_wrong_usage_load_nothing_heavy(arguments: list[str]) -> None:
    said = loaded_by(f"import sys; sys.argv = ['dpo', *{arguments}]; import dpo_studio.cli\ntry: dpo_studio.cli.main()")
    assert said == []


def test_the_command_line_and_the_package_load_nothing_heavy() -> None:
    """Law 8. The package's names are there all the same."""
    assert loaded_by("import dpo_studio, dpo_studio.cli\ntry: dir(dpo_studio)") == []
    assert "load_recipe" in dir(dpo_studio)
    assert all(getattr(dpo_studio, name) is not None for name in dpo_studio.__all__)
    with pytest.raises(AttributeError, match="nonsense"):
        getattr(dpo_studio, "nonsense")  # noqa: B009 - mypy refuses the plain spelling


def loaded_by(code: str) -> list[str]:
    """Which heavy packages a program that ends in an open `try:` has loaded."""
    program = (
        f"{code}\nexcept SystemExit: pass\nprint(*(name for name in {HEAVY} if name in sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", f"import sys\n{program}"], capture_output=True, text=True, check=True)
    return done.stderr.splitlines()[-1].split()


# Wrong usage: 2


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["train"], "Missing argument"),
        (["train", "--nosuch", "r.yaml"], "No such option"),
        (["train", "r.yaml", "--tracker", "csv"], "'csv' is not one of"),
        (["score", "m"], "Missing argument"),
        (["score", "m", "s", "--dtype", "int8"], "'int8' is not one of"),
        (["score", "m", "s", "--too-long", "cut"], "'cut' is not one of"),
        (["score", "m", "s", "--max-length", "3"], "max-length"),
        (["score", "m", "s", "--beta", "x"], "--beta"),
        (["generate", "m"], "one of the two is wanted"),
    ],
)
def test_wrong_usage_is_2_with_a_way_on(arguments: list[str], part: str) -> None:
    refused(dpo(*arguments), part, "--help` lists what there is", code=2)


def test_a_wrong_override_and_a_wrong_beta_are_wrong_usage(tiny_base: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", tiny_base)
    refused(dpo("train", recipe, "--set", "training"), "not of the form section.key=value", "hint:", code=2)
    refused(dpo("score", tiny_base, recipe.parent / "pairs.jsonl", "--beta", "0"), "not a positive number", code=2)


def test_dpo_alone_shows_its_help() -> None:
    said = dpo()
    assert (said.code, said.out) == (2, "")
    assert "Commands:" in said.err and "error" not in said.err


def test_help_names_every_verb_and_what_it_does() -> None:
    said = dpo("--help")
    assert said.code == 0
    for verb in VERBS:
        assert f"\n  {verb} " in said.out
        assert dpo(verb, "--help").out.startswith("Usage: dpo")


def test_version_and_schema_are_data() -> None:
    assert dpo("--version").out == f"{dpo_studio.__version__}\n"
    assert json.loads(dpo("schema").out)["title"] == "Recipe"


# What bad input gets: 1, a reason, a hint


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        ([], ["has no rows"]),
        ([{"prompt": "a?", "chosen": "x", "rejected": "y"}, "{no json"], ["line 2: not JSON", "hint:"]),
        ([{"question": "a?", "good": "x", "bad": "y"}], ["question, good, bad", "data.train.map"]),
        ([{"prompt": "a?", "chosen": 3, "rejected": "y"}], ["neither text nor messages"]),
        ([{"prompt": "a?", "chosen": "", "rejected": "y"}], ["chosen is empty"]),
        ([{"prompt": "a?", "chosen": "x", "rejected": "x"}] * 3, ["3 x chosen and rejected are identical"]),
        ([{"prompt": "water " * 2000, "chosen": "x", "rejected": "y"}], ["the prompt alone has", "data.max_length is"]),
    ],
    ids=["empty", "not JSON", "columns", "no text", "empty answer", "identical", "prompt too long"],
)
def test_data_that_cannot_be_used_is_refused(
    rows: list[object], parts: list[str], tiny_base: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(
        tmp_path / "r.yaml",
        tiny_base,
        rows=rows,
        data={"train": {"source": "pairs.jsonl"}, "held_out": {"fraction": 0}},
    )
    refused(dpo("train", recipe), *parts)
    refused(dpo("train", recipe, "--dry-run"), *parts)
    assert not (tmp_path / "run").exists()


def test_rows_that_cannot_be_used_are_counted_and_the_others_trained_on(tiny_base: Path, tmp_path: Path) -> None:
    rows = [
        *tiny_rows(20),
        {"prompt": "a?", "chosen": 3, "rejected": "y"},
        {"prompt": "b?", "chosen": "x", "rejected": "x"},
    ]
    said = dpo("train", write_recipe(tmp_path / "r.yaml", tiny_base, rows=rows))
    assert said.code == 0
    assert "warning: 1 rows refused: chosen is neither text nor messages" in said.err
    assert "warning: 1 rows refused: chosen and rejected are identical" in said.err


def without_template(folder: Path) -> None:
    """A tokenizer that knows no chat."""
    (folder / "chat_template.jinja").unlink()


def as_pickle(folder: Path) -> None:
    """The weights in a format that can run code."""
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut_in_half(folder: Path) -> None:
    """A download that broke off."""
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def with_remote_code(folder: Path) -> None:
    """A model that brings its own program."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"model_type": "its_own", "auto_map": {"AutoConfig": "x.Y"}})
    )


def not_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def empty(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


def an_adapter(folder: Path) -> None:
    empty(folder)
    (folder / "adapter_config.json").write_text("{}")


def a_run(folder: Path) -> None:
    empty(folder)
    (folder / "recipe.yaml").write_text("{}")


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (without_template, ["no chat template", "model.chat_template: FILE"]),
        (as_pickle, ["as pickle only (pytorch_model.bin)", "safetensors"]),
        (cut_in_half, ["cannot be loaded", "is the download complete?"]),
        (with_remote_code, ["asks to run code", "never runs code"]),
        (not_json, ["config.json is not valid JSON"]),
        (empty, ["has no config.json"]),
        (an_adapter, ["this is an adapter folder", "model.adapter"]),
        (a_run, ["this is a run", "model.adapter"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_model_that_cannot_be_used_is_refused(
    spoil: Callable[[Path], None], parts: list[str], tiny_base: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    spoil(base)
    refused(dpo("train", write_recipe(tmp_path / "r.yaml", base)), *parts)
    assert not (tmp_path / "run").exists()


def test_a_template_in_a_file_is_the_way_on_for_a_tokenizer_without_one(tiny_base: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    (base / "chat_template.jinja").rename(tmp_path / "t.jinja")
    recipe = write_recipe(tmp_path / "r.yaml", base, model={"chat_template": "t.jinja"})
    assert dpo("train", recipe, "--set", "training.max_steps=1").code == 0
    assert dpo("generate", tmp_path / "run", "--prompt", "x", "--max-new-tokens", 2).code == 0


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ("objective.kind=dppo", ["unknown objective 'dppo'", "dpo, ipo, hinge, exo"]),
        ("training.max_step=1", ["unknown key training.max_step", "did you mean training.max_steps?"]),
        ("training.epochs=x", ["training.epochs", "number"]),
        ("model.path=./nosuch", ["no such model folder"]),
        ("data.train.source=nosuch.jsonl", ["no such file or folder", "nosuch.jsonl"]),
        ("data.held_out.fraction=0.99999", ["all their prompts are held out"]),
        ("model.residency=bf16", ["for quantised bases"]),
        ("adapter.targets=[nosuch]", ["nosuch", "linear layers: down_proj"]),
        ("model.path=bundled:nosuch", ["no bundled model", "bundled:smollm2-135m-instruct"]),
    ],
)
def test_a_recipe_that_asks_for_what_is_not_there_is_refused(
    change: str, parts: list[str], tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(
        dpo("train", write_recipe(tmp_path / "r.yaml", tiny_base), "--set", change),
        *parts,
        "hint:" if "hint" in parts else "",
    )
    assert not (tmp_path / "run").exists()


def test_a_hub_id_without_a_network_is_refused(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under HF_HUB_OFFLINE=1, which the Hub's libraries read once, when they are imported."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    recipe = write_recipe(tmp_path / "r.yaml", tiny_base)
    model = dpo("train", recipe, "--set", "model.path=nosuch/model")
    refused(model, "nosuch/model is not on this machine, and HF_HUB_OFFLINE keeps the Hub away", "hint:")
    data = dpo("train", recipe, "--set", "data.train.source=nosuch/data:train")
    refused(data, "nosuch/data:train is not a file or folder here", "HF_HUB_OFFLINE", "hint:")


def test_an_adapter_to_continue_must_be_one(tiny_base: Path, tiny_run: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", tiny_base, adapter=None)
    refused(dpo("train", recipe, "--set", f"model.adapter={tmp_path}/no"), "contains no adapter", "adapter_config.json")
    refused(dpo("train", recipe, "--set", f"model.adapter={tiny_run}"), f"{tiny_run}/adapter does")
    other = tiny_folder(tmp_path / "other", num_hidden_layers=2)
    said = dpo("train", recipe, "--set", f"model.adapter={tiny_run}/adapter", "--set", f"model.path={other}")
    refused(said, "another base?")


@pytest.mark.parametrize("more", [(), ("--dry-run",)], ids=["train", "dry run"])
def test_what_else_a_recipe_names_is_looked_at_before_any_weights(
    more: tuple[str, ...], tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_run, "load_chat_model", lambda *_, **__: pytest.fail("the base was loaded"))
    other = tiny_folder(tmp_path / "other", family="qwen3")
    recipe = write_recipe(tmp_path / "r.yaml", tiny_base, adapter=None)
    (empty := tmp_path / "empty").mkdir()
    for change, words in (
        (f"model.adapter={tmp_path}/no", f"{tmp_path}/no contains no adapter"),
        (f"reference.adapter={tmp_path}/no", f"{tmp_path}/no contains no adapter"),
        (f"reference.model={tmp_path}/no", f"no such model folder: {tmp_path}/no"),
        (f"reference.model={empty}", "has no config.json"),
        (f"reference.model={other}", f"reference.model {other} has another vocabulary than {tiny_base}"),
    ):
        refused(dpo("train", recipe, *more, "--set", change), words)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_training_goes_on_from_a_finished_runs_adapter(tiny_base: Path, tiny_run: Path, tmp_path: Path) -> None:
    """The policy then starts as that adapter and so does its reference: the first loss is ln 2."""
    recipe = write_recipe(tmp_path / "r.yaml", tiny_base, adapter=None, model={"adapter": f"{tiny_run}/adapter"})
    assert dpo("train", recipe).code == 0
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[1])
    assert first["loss"] == pytest.approx(0.6931472, abs=1e-5)


@pytest.mark.parametrize("mode", ["cached", "live"])
def test_another_adapter_or_model_may_be_the_reference(
    mode: str, tiny_base: Path, tiny_run: Path, tmp_path: Path
) -> None:
    """Then the policy does not start at its reference, and the loss not at ln 2."""
    reference = {"mode": mode, "adapter": f"{tiny_run}/adapter"}
    recipe = write_recipe(tmp_path / "r.yaml", tiny_base, reference=reference)
    assert dpo("train", recipe).code == 0
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[1])
    assert abs(first["loss"] - 0.6931472) > 1e-3
    named = [f"reference.model={tiny_base}", f"run.folder={tmp_path}/named"]
    assert dpo("train", recipe, *(part for change in named for part in ("--set", change))).code == 0
    again = json.loads((tmp_path / "named" / "metrics.jsonl").read_text().splitlines()[1])
    assert again["loss"] == pytest.approx(first["loss"], abs=1e-5)


# Corners that are no mistakes


@pytest.mark.parametrize(
    "changes",
    [
        ["training.pairs_per_step=1000", "training.max_steps=1"],
        ["data.held_out.fraction=0"],
        ["training.max_steps=null", "training.epochs=0.3", "training.warmup=1"],
        ["training.tokens_per_micro_batch=1"],
        ["data.train.rows=5"],
        ["model.dtype=bfloat16"],
        ["objective.kind=aot"],
        ["adapter.dropout=0.3"],
        ["reference.mode=live"],
    ],
    ids=lambda changes: changes[0],
)
def test_an_unusual_recipe_trains(changes: list[str], tiny_base: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", tiny_base)
    said = dpo("train", recipe, *(part for change in changes for part in ("--set", change)))
    assert said.code == 0, said.err
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("count", [1, 2])
def test_one_or_two_pairs_are_enough(count: int, tiny_base: Path, tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path / "r.yaml",
        tiny_base,
        rows=tiny_rows(count),
        data={"train": {"source": "pairs.jsonl"}, "held_out": {"fraction": 0}},
    )
    assert dpo("train", recipe).code == 0


def test_strange_text_is_only_text(tiny_base: Path, tmp_path: Path) -> None:
    strange = {"prompt": "पानी 📱 \u202e <|im_end|> \x00 \x1b[31m", "chosen": "乾かす 😀 " * 9, "rejected": "né\u0301"}
    lone = '{"prompt": "a \\ud800", "chosen": "x", "rejected": "y"}'
    recipe = write_recipe(tmp_path / "r.yaml", tiny_base, rows=[strange, lone, *tiny_rows(8)])
    said = dpo("train", recipe)
    assert said.code == 0
    assert "not valid Unicode" in said.err and "\x1b" not in said.err


def test_a_recipe_may_be_run_from_anywhere(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its paths are relative to itself, its run to where the command is typed."""
    (tmp_path / "here").mkdir()
    shutil.copytree(tiny_base, tmp_path / "base")
    recipe = write_recipe(tmp_path / "r.yaml", Path("base"), run={"folder": None})
    monkeypatch.chdir(tmp_path / "here")
    assert dpo("train", "../r.yaml", "--set", "training.max_steps=1").code == 0
    assert (tmp_path / "here" / "runs" / "r" / "result.json").is_file()
    assert dpo("score", "runs/r", recipe.parent / "pairs.jsonl").code == 0
    assert (
        json.loads((tmp_path / "here/runs/r/adapter/adapter_config.json").read_text())["base_model_name_or_path"]
        == "base"
    )


def test_a_dry_run_writes_nothing(tiny_base: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", tiny_base)
    said = dpo("train", recipe, "--dry-run")
    assert (said.code, said.out) == (0, "")
    assert "4 steps of 4 pairs would be trained" in said.err
    assert {path.name for path in tmp_path.iterdir()} == {"r.yaml", "pairs.jsonl"}


# Data on stdout, all else on stderr


def test_a_run_says_its_result_on_stdout_and_nothing_else(tiny_base: Path, tmp_path: Path) -> None:
    said = dpo("train", write_recipe(tmp_path / "r.yaml", tiny_base))
    assert said.code == 0
    (line,) = said.out.splitlines()
    assert line.startswith("held-out accuracy ") and "longer answer wins" in line
    for noise in ("Warning", "it/s", "Loading weights", "%|", "deprecated"):
        assert noise not in said.err


def test_a_reader_that_stops_reading_is_no_error_message(tiny_base: Path, tmp_path: Path) -> None:
    """`dpo score ... | head -1`, with more to say than a pipe holds."""
    pairs = write_rows(tmp_path / "pairs.jsonl", tiny_rows(400))
    command = [str(part) for part in (COMMAND, "score", tiny_base, pairs, "--dtype", "float32")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        err = process.stderr.read()
        assert process.wait(timeout=60) == 141, err
    assert "error: " not in err
    assert "Traceback" not in err and "Exception ignored" not in err and "BrokenPipe" not in err
    assert "policy 400/400" in err


def test_a_slip_in_the_recipe_is_told_of_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("{model: {path: m}, data: {train: {source: s}}, trainig: {}}")
    assert "torch" not in loaded_by(
        f"sys.argv = ['dpo', 'train', {str(tmp_path / 'r.yaml')!r}]; import dpo_studio.cli\ntry: dpo_studio.cli.main()"
    )


def test_a_terminal_that_cannot_show_a_character_gets_its_number(tmp_path: Path) -> None:
    done = real("train", tmp_path / "पानी.yaml", env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 1
    assert "\\u092a" in done.stderr and "Traceback" not in done.stderr


# A run that stops itself: 3. A signal: 130, 143


def test_numbers_that_are_not_finite_stop_the_run_with_3(tiny_base: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", tiny_base)
    said = dpo("train", recipe, "--set", "training.learning_rate=1e30", "--set", "training.warmup=0")
    refused(said, "is not finite", "learning_rate", code=3)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_the_step_and_leaves_a_checkpoint(
    number: signal.Signals, code: int, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", tiny_base)
    assert dpo("train", recipe, "--set", f"run.folder={tmp_path}/whole").code == 0
    advance = TrainingState.advance

    def signalled(state: TrainingState, policy: Any) -> None:
        advance(state, policy)
        if state.step == 3:
            signal.raise_signal(number)

    with monkeypatch.context() as patched:
        patched.setattr(TrainingState, "advance", signalled)
        said = dpo("train", recipe)
    refused(said, f"stopped by {number.name} after step 3", "the same command continues", "a second signal", code=code)
    assert (tmp_path / "run" / "checkpoints" / "step-3").is_dir()
    again = dpo("train", recipe)
    assert again.code == 0 and "after step 3 of 4" in again.err
    for name in ("metrics.jsonl", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_does_not_wait(
    number: signal.Signals, code: int, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def signalled(*_: object) -> None:
        signal.raise_signal(number)
        signal.raise_signal(number)

    monkeypatch.setattr(TrainingState, "advance", signalled)
    assert dpo("train", write_recipe(tmp_path / "r.yaml", tiny_base)).code == code
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize(
    "phase",
    [
        "training.preparing.encode_pairs",
        "training.run.load_chat_model",
        "training.session.check_packing",
        "training.run.write_report",
    ],
)
def test_a_signal_before_or_after_the_steps_ends_at_once(
    phase: str, number: signal.Signals, code: int, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is nothing to wait for; the same command does the rest."""
    recipe = write_recipe(tmp_path / "r.yaml", tiny_base)
    with monkeypatch.context() as patched:
        patched.setattr(f"dpo_studio.workflows.{phase}", lambda *_, **__: signal.raise_signal(number))
        refused(dpo("train", recipe), "interrupted" if number == signal.SIGINT else "terminated", code=code)
    assert dpo("train", recipe).code == 0


def test_a_real_interrupt_in_a_real_process_leaves_a_run_that_continues(tiny_base: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", tiny_base, training={"max_steps": 100_000, "save_every": 100_000})
    with subprocess.Popen(
        [COMMAND, "train", recipe], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        metrics = tmp_path / "run" / "metrics.jsonl"
        while process.poll() is None and not (metrics.exists() and len(metrics.read_text().splitlines()) > 3):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, ""), err
    assert "the same command continues from there" in err and "Traceback" not in err
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    step = int(checkpoint.name.removeprefix("step-"))
    said = dpo("train", recipe, "--set", f"training.max_steps={step}")
    refused(said, f"100000 there, {step} asked for")


def test_a_reader_that_goes_away_ends_a_training_with_a_checkpoint(tiny_base: Path, tmp_path: Path) -> None:
    """`dpo train R 2>&1 | head`: 141 is what a shell shows for a process that SIGPIPE has ended."""
    recipe = write_recipe(tmp_path / "r.yaml", tiny_base, training={"max_steps": 100_000, "save_every": 100_000})
    with subprocess.Popen([COMMAND, "train", recipe], stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        while b"train " not in process.stdout.readline():
            assert process.poll() is None
        process.stdout.close()
        assert process.wait(timeout=60) == 141
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    step = int(checkpoint.name.removeprefix("step-"))
    assert dpo("train", recipe, "--set", f"training.max_steps={step}").code == 1  # it stands where it stopped


@pytest.mark.parametrize("ignored", [False, True], ids=["terminal", "nohup"])
def test_a_terminal_that_goes_away(ignored: bool, tiny_base: Path, tmp_path: Path) -> None:
    """SIGHUP leaves a checkpoint and 129; under nohup, where it was ignored from the start, the run goes on."""
    recipe = write_recipe(tmp_path / "r.yaml", tiny_base, training={"max_steps": 100_000, "save_every": 100_000})
    started = [*(["nohup"] if ignored else []), str(COMMAND), "train", str(recipe)]
    with subprocess.Popen(started, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        metrics = tmp_path / "run" / "metrics.jsonl"
        while process.poll() is None and not (metrics.exists() and len(metrics.read_text().splitlines()) > 3):
            time.sleep(0.05)
        process.send_signal(signal.SIGHUP)
        if ignored:
            before = len(metrics.read_text().splitlines())
            while process.poll() is None and len(metrics.read_text().splitlines()) < before + 3:
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == (143 if ignored else 129), err
    assert f"stopped by {'SIGTERM' if ignored else 'SIGHUP'} after step" in err
    assert list((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="torch's segments grow on Linux alone")
@pytest.mark.parametrize("chosen", [{}, {"PYTORCH_ALLOC_CONF": "a:1"}, {"PYTORCH_CUDA_ALLOC_CONF": "a:1"}])
def test_a_gpu_s_memory_grows_unless_the_user_has_chosen(
    monkeypatch: pytest.MonkeyPatch, chosen: dict[str, str]
) -> None:
    monkeypatch.setattr(os, "environ", dict(chosen))
    set_environment()
    set_here = {name: value for name, value in os.environ.items() if "ALLOC_CONF" in name}
    assert set_here == chosen or (not chosen and set_here == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"})


def test_another_interrupt_while_an_error_is_told_leaves_no_traceback() -> None:
    code = (
        "import os, signal; from dpo_studio.cli import app; from dpo_studio.console import text\n"
        "text.printable = lambda message: os.kill(os.getpid(), signal.SIGINT)\n"
        "app._die('stopped by SIGINT after step 4', 130)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "")


@pytest.mark.parametrize(
    ("verb", "option", "choices"),
    [
        ("train", "--tracker", "tensorboard|wandb|trackio"),
        ("score", "--dtype", "float32|bfloat16|float16"),
        ("score", "--too-long", "drop|cut_prompt_start|cut_answer_end"),
        ("data check", "--too-long", "drop|cut_prompt_start|cut_answer_end"),
        ("export", "--to", "adapter|merged|gptq|gguf"),
        ("quantize", "--bits", "2|3|4|8"),
        ("judge check", "--dtype", "float32|bfloat16|float16"),
    ],
)
def test_help_lists_the_choices_of_an_option_and_a_wrong_one_is_answered_with_them(
    verb: str, option: str, choices: str
) -> None:
    assert f"<{choices}>" in " ".join(dpo(*verb.split(), "--help").out.split())
    said = dpo(*verb.split(), "x", "y", option, "7")
    assert said.code == 2 and all(choice in said.err for choice in choices.split("|"))
