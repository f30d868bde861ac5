"""Whole runs over a mixture: what `all-linear` meant is written down, resumed, scored, exported; what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

from dpo_studio.config import load_recipe
from dpo_studio.console.progress import Progress
from dpo_studio.workflows.exporting import comparing
from dpo_studio.workflows.talking import Sampling
from dpo_studio.workflows.training.run import run_training
from tests.tiny_mixtures import mixture_folder
from tests.tiny_runs import dpo, write_recipe

FILES = ("adapter/adapter_config.json", "adapter/adapter_model.safetensors", "metrics.jsonl")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mixture_folder(tmp_path_factory.mktemp("base") / "mixture")


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("run")
    said = dpo("train", write_recipe(place / "recipe.yaml", base))
    assert said.code == 0, said.err
    assert "8 layers of attention and dense MLPs and 4 projections of experts here. Left out: 2 routers" in said.err
    return place / "run"


def test_it_begins_at_ln_2_and_its_recipe_says_in_full_names_what_it_adapts(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert next(line["loss"] for line in lines if "loss" in line) == pytest.approx(0.6931472, abs=1e-6)
    targets = yaml.safe_load((run / "recipe.yaml").read_text())["adapter"]["targets"]
    assert len(targets) == 12 and "model.layers.1.mlp.experts.gate_up_proj" in targets
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert config["target_parameters"] == ["experts.down_proj", "experts.gate_up_proj"]


def test_stopped_and_continued_it_is_the_same_bytes(run: Path, base: Path, tmp_path: Path) -> None:
    """The continued run is told what `all-linear` meant by the run's recipe."""
    recipe = write_recipe(tmp_path / "recipe.yaml", base)
    with Progress() as progress:
        run_training(load_recipe(recipe, []), progress, stop_after=2)
    (tmp_path / "run" / "result.json").unlink(missing_ok=True)
    said = dpo("train", recipe)
    assert said.code == 0 and "after step 2 of 4" in said.err, said.err
    for name in FILES:
        assert (tmp_path / "run" / name).read_bytes() == (run / name).read_bytes(), name


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_merged_plain_transformers_says_what_plain_peft_says(
    run: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparing, "SHOWN_SAMPLING", Sampling(temperature=0.7, max_new_tokens=8, seed=0))
    said = dpo("export", run, tmp_path / "merged", "--to", "merged")
    assert said.code == 0, said.err
    ids = torch.arange(3, 60)[None]
    under = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    bare = under(input_ids=ids).logits
    exact = PeftModel.from_pretrained(under, run / "adapter").eval()(input_ids=ids).logits
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert (merged(input_ids=ids).logits - exact).norm() < 0.25 * (bare - exact).norm()
    scores = [dpo("score", name, run.parent / "pairs.jsonl", "--dtype", "float32") for name in (run, run / "adapter")]
    assert [said.code for said in scores] == [0, 0], scores[0].err
    assert scores[0].out == scores[1].out


def test_a_reference_that_moves_is_refused_where_experts_are_adapted(base: Path, tmp_path: Path) -> None:
    moving: dict[str, Any] = {"reference": {"update_every": 2}}
    said = dpo("train", write_recipe(tmp_path / "recipe.yaml", base, **moving))
    assert said.code == 1 and "adapted experts cannot be mixed into a reference that moves" in said.err
    attention: dict[str, Any] = {"adapter": {"targets": ["q_proj", "v_proj"]}}
    assert dpo("train", write_recipe(tmp_path / "recipe.yaml", base, **moving, **attention)).code == 0
