"""Law 8: every recipe shipped loads, validates and runs two steps.

What lives on the Hub is replaced by small local folders of the same shape: a Mistral of 50,000 parameters, and a
Parquet folder with the columns and the split names of HuggingFaceH4/ultrafeedback_binarized.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest

import dpo_studio
from dpo_studio.config import load_recipe
from dpo_studio.runs.folder import RunFolder
from tests.gptq_oracle import in_own_process
from tests.tiny_folders import ending_folder
from tests.tiny_models import tiny_folder
from tests.tiny_runs import Said, dpo, tiny_rows

FOLDER = Path(dpo_studio.__file__).parent / "recipes"
SHIPPED = sorted(file.stem for file in FOLDER.glob("*.yaml"))
ROUNDS = [name for name in SHIPPED if load_recipe(FOLDER / f"{name}.yaml").recipe.rounds is not None]
GPTQ = "openhermes-gptq-ultrafeedback"


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mistral's architecture, and a template that writes BOS and wants turns to alternate, as Mistral's does."""
    return tiny_folder(tmp_path_factory.mktemp("mistral") / "model", "mistral", family="llama2")


@pytest.fixture(scope="module")
def ultrafeedback(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 training and 8 test rows as the Hub's dataset has them: whole dialogues, scores, six splits (two suffice)."""
    folder = tmp_path_factory.mktemp("ultrafeedback")
    (folder / "data").mkdir()
    for split, count, seed in (("train_prefs", 20, 0), ("test_prefs", 8, 1)):
        rows = [_ultrafeedback_row(row) for row in tiny_rows(count, seed=seed)]
        datasets.Dataset.from_list(rows).to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


def _ultrafeedback_row(row: dict[str, Any]) -> dict[str, Any]:
    def dialogue(answer: str) -> list[dict[str, str]]:
        return [{"content": row["prompt"], "role": "user"}, {"content": answer, "role": "assistant"}]

    sides = {side: dialogue(row[side]) for side in ("chosen", "rejected")}
    scores = {"score_chosen": 8.0, "score_rejected": 5.0}
    return {"prompt": row["prompt"], "prompt_id": row["prompt"], **sides, "messages": sides["chosen"], **scores}


def train(name: str, folder: Path, model: Path, ultrafeedback: Path, *changes: str) -> Said:
    """Two steps of a shipped recipe, its Hub names replaced."""
    recipe = load_recipe(FOLDER / f"{name}.yaml").recipe
    sources = {"data.train.source": recipe.data.sources[0].source, "data.held_out.source": recipe.data.held_out.source}
    local = {
        key: source.replace("HuggingFaceH4/ultrafeedback_binarized", str(ultrafeedback))
        for key, source in sources.items()
        if source is not None
    }
    replaced = [f"{key}={value}" for key, value in local.items()]
    flags = [f"model.path={model}", *replaced, "training.max_steps=2", f"run.folder={folder}", *changes]
    return dpo("train", FOLDER / f"{name}.yaml", *(part for flag in flags for part in ("--set", flag)))


@pytest.mark.parametrize("name", [name for name in SHIPPED if name not in ROUNDS])
def test_a_shipped_recipe_trains_two_steps(name: str, mistral: Path, ultrafeedback: Path, tmp_path: Path) -> None:
    """Only what cannot be had here is replaced; the demo's pairs are its own, a few of them.

    The tiny tokenizer takes four times the tokens, and the demo's 144 would cut nearly every answer: it is refused.
    """
    few = ["data.train.rows=12", "data.held_out.rows=4", "data.max_length=1024"] if name.startswith("demo") else []
    said = train(name, tmp_path / "run", mistral, ultrafeedback, *few)
    assert said.code == 0, said.err
    result = RunFolder(tmp_path / "run").result()
    assert result is not None and result["steps"] == 2
    assert result["held_out_pairs"] > 0
    small = ("too few for a number to trust", "are fewer than training.pairs_per_step", "warm-up")  # as the folders are
    warned = [line for line in said.err.splitlines() if "warning" in line]
    assert not [line for line in warned if not any(words in line for words in small)]


def test_the_tutorials_recipe_trains_on_a_gptq_mistral(mistral: Path, ultrafeedback: Path, tmp_path: Path) -> None:
    """The layout of its own base: 4 bits, act-order, packed by gptqmodel; groups of 32, for the tiny model's inputs."""
    in_own_process("model", mistral, tmp_path / "gptq", "bits=4", "group_size=32", "desc_act=1")
    said = train(GPTQ, tmp_path / "run", tmp_path / "gptq", ultrafeedback)
    assert said.code == 0, said.err
    result = RunFolder(tmp_path / "run").result()
    assert result is not None and result["steps"] == 2
    assert 0 <= result["accuracy"] <= 1


def test_the_tutorials_recipe_carries_the_tutorials_settings() -> None:
    recipe = load_recipe(FOLDER / f"{GPTQ}.yaml").recipe
    assert recipe.model.path == "TheBloke/OpenHermes-2-Mistral-7B-GPTQ"
    assert recipe.data.sources[0].source == "HuggingFaceH4/ultrafeedback_binarized:train_prefs"
    assert (recipe.data.max_length, recipe.data.too_long) == (256, "cut_answer_end")
    adapter, training = recipe.adapter, recipe.training
    assert adapter is not None
    assert (adapter.rank, adapter.alpha, adapter.dropout, adapter.targets) == (4, 8, 0.1, ["q_proj", "v_proj"])
    assert (recipe.objective.beta, training.learning_rate, training.warmup) == (0.1, 3e-4, 2)
    assert (training.max_steps, training.pairs_per_step) == (50, 1)


def test_the_recipes_are_found_in_a_clone_and_in_a_wheel() -> None:
    """`recipes/` at the top of a clone is the folder that the package ships."""
    top = FOLDER.parents[2] / "recipes"
    assert not top.exists() or top.resolve() == FOLDER.resolve()
    assert {"demo", "demo-gptq", "lora-7b", GPTQ} <= set(SHIPPED)


@pytest.mark.parametrize("name", ROUNDS)
def test_a_shipped_recipe_of_rounds_goes_round(name: str, tmp_path: Path) -> None:
    """Two steps of one round; the tiny model says nothing that the demo's judge finds of use, so length judges."""
    model = ending_folder(tmp_path / "model")
    changes = {
        "model.path": model,
        "data.train.rows": 12,
        "data.held_out.rows": 8,
        "data.max_length": 1024,
        "training.max_steps": 2,
        "rounds.judge": "length",
        "rounds.max_new_tokens": 12,
        "run.folder": tmp_path / "run",
    }
    flags = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
    said = dpo("rounds", FOLDER / f"{name}.yaml", *flags, "--rounds", "1")
    assert said.code == 0, said.err
    result = RunFolder(tmp_path / "run" / "round-1").result()
    assert result is not None and result["steps"] == 2
    assert "| 1 | " in said.out
