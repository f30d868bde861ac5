"""Whole runs whose adapter is more than LoRA: resumed, scored, continued, exported; and what they are refused with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from dpo_studio.config import load_recipe
from dpo_studio.console.progress import Progress
from dpo_studio.workflows.exporting import comparing
from dpo_studio.workflows.talking import Sampling
from dpo_studio.workflows.training.run import run_training
from tests.tiny_models import tiny_folder
from tests.tiny_runs import dpo, write_recipe

EVERYTHING: dict[str, Any] = {
    "kind": "dora",
    "rank_pattern": {"down_proj": 3},
    "alpha_pattern": {"layers.1.self_attn.q_proj": 9},
    "learning_rate_ratio": 4,
    "modules_to_save": ["embed_tokens", "lm_head"],
}
FILES = ("adapter/adapter_config.json", "adapter/adapter_model.safetensors", "metrics.jsonl")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("base") / "tied", "llama-tied", num_hidden_layers=2)


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, its head and embedding tied in the base."""
    place = tmp_path_factory.mktemp("run")
    said = dpo("train", write_recipe(place / "recipe.yaml", base, adapter=EVERYTHING))
    assert said.code == 0, said.err
    return place / "run"


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_it_begins_at_ln_2_and_learns(run: Path) -> None:
    losses = [line["loss"] for line in metrics(run) if "loss" in line]
    assert losses[0] == pytest.approx(0.6931472, abs=1e-6)
    assert losses[-1] < 0.69


def test_stopped_and_continued_it_is_the_same_bytes(run: Path, base: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", base, adapter=EVERYTHING)
    with Progress() as progress:
        run_training(load_recipe(recipe, []), progress, stop_after=2)
    (tmp_path / "run" / "result.json").unlink(missing_ok=True)
    said = dpo("train", recipe)
    assert said.code == 0 and "after step 2 of 4" in said.err, said.err
    for name in FILES:
        assert (tmp_path / "run" / name).read_bytes() == (run / name).read_bytes(), name


def test_plain_peft_scores_as_the_run_does_and_merged_plain_transformers_too(
    run: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--to merged`: head and embedding are no longer tied, and its own check lets it pass."""
    monkeypatch.setattr(comparing, "SHOWN_SAMPLING", Sampling(temperature=0.7, max_new_tokens=8, seed=0))
    said = dpo("export", run, tmp_path / "merged", "--to", "merged")
    assert said.code == 0, said.err
    ids = torch.arange(3, 60)[None]
    under = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    bare = under(input_ids=ids).logits
    with pytest.warns((UserWarning, FutureWarning)):  # of the tie, and of a property that transformers has renamed
        theirs = PeftModel.from_pretrained(under, run / "adapter")
    exact = theirs.eval()(input_ids=ids).logits
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert merged.config.tie_word_embeddings is False
    assert (merged(input_ids=ids).logits - exact).norm() < 0.02 * exact.norm() < (bare - exact).norm()
    scores = [dpo("score", name, run.parent / "pairs.jsonl", "--dtype", "float32") for name in (run, run / "adapter")]
    assert [said.code for said in scores] == [0, 0], scores[0].err
    assert [line["chosen_logp"] for line in scores[0].lines] == [line["chosen_logp"] for line in scores[1].lines]


def test_it_is_continued_by_another_run_with_a_ratio_of_its_own(run: Path, base: Path, tmp_path: Path) -> None:
    """The continued adapter brings its kind; its frozen copy is the reference, so the loss begins at ln 2 again."""
    recipe = write_recipe(
        tmp_path / "recipe.yaml", base, model={"adapter": str(run / "adapter")}, adapter=None, training={"max_steps": 2}
    )
    text = recipe.read_text()
    recipe.write_text(text + "adapter: {learning_rate_ratio: 2}\n")
    said = dpo("train", recipe)
    assert said.code == 0, said.err
    assert metrics(tmp_path / "run")[1]["loss"] == pytest.approx(0.6931472, abs=1e-6)
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert config["use_dora"] is True and config["modules_to_save"] == ["embed_tokens", "lm_head"]
    assert config["rank_pattern"] == {"down_proj": 3}
    recipe.write_text(text + "adapter: {kind: dora}\n")
    assert "remove adapter.kind" in dpo("train", recipe).err


def test_a_reference_that_moves_is_refused_with_what_cannot_be_mixed(run: Path, base: Path, tmp_path: Path) -> None:
    """By the recipe, and by the adapter that is continued; rsLoRA moves."""
    for adapter, words in (({"kind": "dora"}, "DoRA"), ({"modules_to_save": ["lm_head"]}, "modules_to_save")):
        recipe = write_recipe(tmp_path / "recipe.yaml", base, adapter=adapter, reference={"update_every": 2})
        said = dpo("train", recipe)
        assert said.code != 0 and words in said.err and "update_every" in said.err
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        base,
        model={"adapter": str(run / "adapter")},
        adapter=None,
        reference={"update_every": 2},
    )
    said = dpo("train", recipe)
    assert said.code == 1 and "a DoRA adapter cannot be mixed into a reference that moves" in said.err
    recipe = write_recipe(tmp_path / "recipe.yaml", base, adapter={"kind": "rslora"}, reference={"update_every": 2})
    assert dpo("train", recipe).code == 0


def test_dora_over_a_base_in_fp8_begins_at_ln_2_and_is_held_to_peft_s(tmp_path: Path) -> None:
    """The norm is of what e4m3 holds, as the products are; the check at the start compares with PEFT's own DoRA."""
    base = tiny_folder(tmp_path / "base", num_hidden_layers=2)
    recipe = write_recipe(
        tmp_path / "recipe.yaml", base, model={"compute": "fp8", "dtype": "bfloat16"}, adapter={"kind": "dora"}
    )
    said = dpo("train", recipe)
    assert said.code == 0, said.err
    losses = [line["loss"] for line in metrics(tmp_path / "run") if "loss" in line]
    assert losses[0] == pytest.approx(0.6931472, abs=1e-6) and losses[-1] != losses[0]
