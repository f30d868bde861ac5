"""`dpo export` on dense bases: what plain PEFT and plain transformers make of the folders, and what is refused."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

from dpo_studio.export import verify
from dpo_studio.export.verify import Bar
from dpo_studio.models import find
from dpo_studio.workflows.exporting import comparing
from dpo_studio.workflows.exporting import run as exporting
from dpo_studio.workflows.talking import Sampling
from tests.tiny_runs import Said, dpo, write_recipe

COMMAND = Path(sys.executable).parent / "dpo"


@pytest.fixture(autouse=True)
def _short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparing, "SHOWN_SAMPLING", Sampling(temperature=0.7, max_new_tokens=8, seed=0))


def export(run: Path, out: Path, to: str, *more: object) -> Said:
    return dpo("export", run, out, "--to", to, *more)


def read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def no_path_in(folder: Path, *paths: Path) -> None:
    """No file of the folder names a place on this machine."""
    for file in folder.rglob("*"):
        content = file.read_bytes()
        for path in paths:
            assert str(path).encode() not in content, (file, path)


# merged


def test_the_merged_model_is_plain_pefts_in_plain_transformers(tiny_run: Path, tiny_base: Path, tmp_path: Path) -> None:
    """Logits within what rounding to bf16 explains, by the distance of PEFT's own merge rounded to the nearest."""
    said = export(tiny_run, tmp_path / "out", "merged")
    assert (said.code, said.out) == (0, f"{tmp_path / 'out'}\n"), said.err
    ids = torch.arange(3, 60)[None]
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    theirs: Any = PeftModel.from_pretrained(base, tiny_run / "adapter").merge_and_unload()
    exact = theirs(input_ids=ids).logits
    nearest = theirs.to(torch.bfloat16).float()(input_ids=ids).logits
    ours, told = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, output_loading_info=True)
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (ours(input_ids=ids).logits - exact).norm() < 2 * (nearest - exact).norm()
    config = read(tmp_path / "out" / "config.json")
    assert config["dtype"] == "bfloat16" and "quantization_config" not in config


def test_what_was_measured_is_printed_and_written_down(tiny_run: Path, tmp_path: Path) -> None:
    said = export(tiny_run, tmp_path / "out", "merged")
    result = read(tmp_path / "out" / "export.json")
    assert result["pairs"] == json.loads((tiny_run / "result.json").read_text())["held_out_pairs"]
    assert result["compared_on"] == "held-out pairs"
    assert result["misses"] == [] and result["signs_kept"] >= 0.99 and result["margins_kept"] >= 0.97
    assert result["beta"] == 0.5 and result["bars"] == {"signs": 0.99, "margins": 0.97}
    line = f"preferred answer kept: {100 * result['signs_kept']:.1f} % of {result['pairs']} pairs"
    assert line in said.err and line in (tmp_path / "out" / "README.md").read_text()
    assert 0 <= result["stop_rate"] <= 1 and "phone" in result["showcase_prompt"]


def test_the_accuracy_before_is_the_runs_own(tiny_run: Path, tmp_path: Path) -> None:
    """The same pairs, the same model, the same reference as at the end of the training."""
    export(tiny_run, tmp_path / "out", "merged")
    result, finished = read(tmp_path / "out" / "export.json"), read(tiny_run / "result.json")
    assert result["accuracy_before"] == finished["accuracy"]
    assert result["margin_before"] == pytest.approx(finished["margin"], abs=1e-4)
    assert result["accuracy_before_ci95"] == pytest.approx(finished["accuracy_ci95"])


def test_the_export_scores_generates_and_names_no_path(tiny_run: Path, tiny_base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(tiny_run, out, "merged")
    no_path_in(out, tmp_path, tiny_base.parent, tiny_run.parent)
    assert dpo("generate", out, "--prompt", "What is water?", "--max-new-tokens", 4).code == 0
    scored = dpo("score", out, tiny_run.parent / "pairs.jsonl")
    assert scored.code == 0 and len(scored.lines) == 24


def test_the_same_run_exports_the_same_bytes(tiny_run: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert export(tiny_run, tmp_path / name, "merged").code == 0
    for file in (tmp_path / "a").iterdir():
        if file.name != "README.md":  # its title is the folder's
            assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


def test_a_model_that_lost_its_adapter_is_not_made_unless_forced(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The merge forgets the adapter: every reward margin becomes zero. The figures are shown all the same."""
    monkeypatch.setattr(exporting, "merge", lambda model, deltas: None)
    said = export(tiny_run, tmp_path / "out", "merged")
    assert (said.code, said.out) == (1, "")
    assert "too far from the run's own" in said.err and "hint:" in said.err and "--force" in said.err
    assert "preferred answer kept" in said.err and "-> 0.00" in said.err
    assert list(tmp_path.iterdir()) == []
    forced = export(tiny_run, tmp_path / "out", "merged", "--force")
    assert forced.code == 0 and "warning: made all the same" in forced.err
    assert read(tmp_path / "out" / "export.json")["misses"]
    assert "made although" in (tmp_path / "out" / "README.md").read_text()


def test_the_bars_are_the_promised_ones() -> None:
    own = Bar(0.99, 0.97)
    assert {"merged": own, "gptq": Bar(0.95, 0.85), "gguf": own} == verify.BARS


def test_a_run_without_held_out_pairs_says_so_and_is_compared_on_its_training_pairs(
    tiny_base: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", tiny_base, data={"held_out": {"fraction": 0}})
    assert dpo("train", recipe).code == 0
    said = export(tmp_path / "run", tmp_path / "out", "merged", "--force")  # one pair of 24 is 4 %
    assert said.code == 0, said.err
    assert "warning: the run has no held-out pairs" in said.err
    assert read(tmp_path / "out" / "export.json")["compared_on"] == "training pairs"
    assert read(tmp_path / "out" / "export.json")["pairs"] == 24


def test_a_continued_adapter_and_another_reference_are_exported_too(
    tiny_run: Path, tiny_base: Path, tmp_path: Path
) -> None:
    """The policy is what is exported; rewards are against whatever the run's reference was."""
    continued = write_recipe(
        tmp_path / "r.yaml",
        tiny_base,
        model={"path": str(tiny_base), "adapter": str(tiny_run / "adapter")},
        adapter=None,
    )
    assert dpo("train", continued).code == 0
    assert export(tmp_path / "run", tmp_path / "out", "merged").code == 0
    finished = read(tmp_path / "run" / "result.json")
    assert read(tmp_path / "out" / "export.json")["margin_before"] == pytest.approx(finished["margin"], abs=1e-4)
    other = tmp_path / "other"
    other.mkdir()
    recipe = write_recipe(other / "r.yaml", tiny_base, reference={"model": str(tiny_base)})
    assert dpo("train", recipe).code == 0
    assert export(other / "run", other / "out", "merged").code == 0


# adapter


def test_the_adapter_folder_is_one_that_plain_peft_loads(tiny_run: Path, tiny_base: Path, tmp_path: Path) -> None:
    said = export(tiny_run, tmp_path / "out", "adapter")
    assert (said.code, said.out) == (0, f"{tmp_path / 'out'}\n")
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    loaded = PeftModel.from_pretrained(base, tmp_path / "out")
    assert any("lora_A" in name for name, _ in loaded.named_parameters())
    weights = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    assert weights == (tiny_run / "adapter" / "adapter_model.safetensors").read_bytes()


def test_the_adapter_names_its_base_as_the_user_did(tiny_run: Path, tiny_base: Path, tmp_path: Path) -> None:
    export(tiny_run, tmp_path / "out", "adapter")
    config = read(tmp_path / "out" / "adapter_config.json")
    assert config["base_model_name_or_path"] == str(tiny_base)
    head = yaml.safe_load((tmp_path / "out" / "README.md").read_text().split("---\n")[1])
    assert head["library_name"] == "peft" and head["tags"] == ["dpo", "lora"]
    assert "held-out accuracy" in (tmp_path / "out" / "README.md").read_text()


def test_an_adapter_on_the_bundled_model_names_it_as_the_hub_does(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT and the Hub know nothing of `bundled:`. Run, checkpoint, adapter and export still work without a network."""
    monkeypatch.setattr(find, "bundled_folder", lambda _name, _say: tiny_base)
    assert dpo("train", write_recipe(tmp_path / "r.yaml", Path("bundled:smollm2-135m-instruct"))).code == 0
    run, out = tmp_path / "run", tmp_path / "out"
    assert export(run, out, "adapter").code == 0
    for folder in (run / "adapter", run / "checkpoints" / "step-4" / "adapter", out):
        named = read(folder / "adapter_config.json")["base_model_name_or_path"]
        assert named == "HuggingFaceTB/SmolLM2-135M-Instruct"
    scored = []
    for folder in (run, out):
        said = dpo("score", folder, tmp_path / "pairs.jsonl", "--dtype", "float32")
        assert said.code == 0, said.err
        scored.append(said.lines)
    assert scored[0] == scored[1]
    assert "path: bundled:smollm2-135m-instruct" in (run / "recipe.yaml").read_text()
    card = (out / "README.md").read_text()
    assert "base_model: HuggingFaceTB/SmolLM2-135M-Instruct" in card and "bundled:smollm2" not in card
    assert "rounded to 4 bits" in card


def test_an_unfinished_run_leaves_with_its_newest_checkpoint(tiny_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "run")
    (run / "result.json").unlink()
    said = export(run, tmp_path / "out", "adapter")
    assert said.code == 0 and "is unfinished: using step-4" in said.err
    shutil.rmtree(run / "checkpoints")
    assert "no adapter and no checkpoint" in export(run, tmp_path / "more", "adapter").err


# Refused


@pytest.mark.parametrize("to", ["adapter", "merged", "gptq"])
def test_nothing_is_overwritten(to: str, tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    said = export(tiny_run, tmp_path / "out", to)
    assert said.code == 1 and "exists" in said.err and "hint:" in said.err
    assert list((tmp_path / "out").iterdir()) == []


def test_what_is_no_run_is_told_so(tiny_base: Path, tmp_path: Path) -> None:
    said = export(tiny_base, tmp_path / "out", "merged")
    assert said.code == 1 and "is not a run" in said.err and "`dpo train`" in said.err


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "Missing option"),
        (["--to", "onnx"], "'onnx' is not one of 'adapter', 'merged', 'gptq', 'gguf'"),
        (["--to", "gptq", "--bits", "5"], "'5' is not one of"),
        (["--to", "gptq", "--group-size", "x"], "neither auto nor a number"),
        (["--to", "gptq", "--group-size", "0"], "neither auto nor a number"),
        (["--to", "gptq", "--rows", "0"], "rows"),
        (["--to", "merged", "--dtype", "int8"], "'int8' is not one of"),
    ],
)
def test_wrong_usage_is_2(arguments: list[str], part: str, tiny_run: Path, tmp_path: Path) -> None:
    said = dpo("export", tiny_run, tmp_path / "out", *arguments)
    assert (said.code, said.out) == (2, "")
    assert part in said.err


def test_a_disk_that_is_too_small_is_told_of_before_anything_is_written(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: whole._replace(free=1000))
    said = export(tiny_run, tmp_path / "out", "merged")
    assert said.code == 1 and "needs" in said.err and "free some space" in said.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_halfway_leaves_nothing(number: signal.Signals, code: int, tiny_run: Path, tmp_path: Path) -> None:
    """A real process, stopped while the scratch folder is there."""
    with subprocess.Popen(
        [COMMAND, "export", tiny_run, tmp_path / "out", "--to", "merged"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as child:
        started = time.monotonic()
        while not list(tmp_path.glob(".out.writing-*")) and child.poll() is None and time.monotonic() - started < 120:
            time.sleep(0.01)
        child.send_signal(number)
        out, err = child.communicate(timeout=60)
    assert (child.returncode, out) == (code, b""), err
    assert list(tmp_path.iterdir()) == []
