"""A dry run finds a missing model before it reads the data, and says how many tokens a training would take."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file

from dpo_studio.models.folder import open_model
from dpo_studio.workflows.training.forecasting import _multiplied
from tests.tiny_runs import dpo, tiny_rows, write_recipe, write_rows


@pytest.mark.parametrize("key", ["model.path", "reference.model", "reference.adapter"])
def test_a_missing_model_is_told_before_the_data_is_read(key: str, tiny_base: Path, tmp_path: Path) -> None:
    """The source is missing too: whichever is looked for first is what is said."""
    recipe = write_recipe(tmp_path / "r.yaml", tiny_base)
    for more in ((), ("--dry-run",)):
        asked = ("--set", f"{key}={tmp_path}/none", "--set", f"data.train.source={tmp_path}/none.jsonl", *more)
        said = dpo("train", recipe, *asked)
        assert said.code == 1 and f"{tmp_path}/none" in said.err and "none.jsonl" not in said.err


def test_the_forecast_is_what_the_training_then_takes(tiny_base: Path, tmp_path: Path) -> None:
    """Tokens in all are the sum of what every step records, over two epochs."""
    recipe = write_recipe(tmp_path / "r.yaml", tiny_base)
    asked = ("--set", "training.epochs=2", "--set", "training.max_steps=null", "--set", f"run.folder={tmp_path}/run")
    said = dpo("train", recipe, *asked, "--dry-run")
    assert said.code == 0, said.err
    found = re.search(
        r"([\d,]+) tokens an epoch .*, ([\d,]+) in all; their matrix products alone take ([\d.]+) s", said.err
    )
    assert found is not None, said.err
    trained = dpo("train", recipe, *asked)
    assert trained.code == 0, trained.err
    timing = [json.loads(line) for line in (tmp_path / "run" / "timing.jsonl").read_text().splitlines()]
    total = int(found[2].replace(",", ""))
    assert total == 2 * int(found[1].replace(",", "")) == sum(line["tokens"] for line in timing)
    assert float(found[3]) <= sum(line["seconds"] for line in timing)


def test_the_weights_that_every_token_meets_are_counted(tiny_base: Path) -> None:
    """Every matrix of the layers, by the names that a Llama has: not the embedding, not the head, no norm."""
    tensors = load_file(tiny_base / "model.safetensors")
    layers = sum(tensor.numel() for name, tensor in tensors.items() if ".layers." in name and "norm" not in name)
    assert _multiplied(open_model(str(tiny_base)).shapes) == layers > 0


def test_a_pair_more_is_some_tokens_more(tiny_base: Path, tmp_path: Path) -> None:
    tokens = []
    for count in (20, 21):
        source = write_rows(tmp_path / f"{count}.jsonl", tiny_rows(count))
        recipe = write_recipe(tmp_path / "r.yaml", tiny_base)
        asked = ("--set", f"data.train.source={source}", "--set", "data.held_out.fraction=0")
        said = dpo("train", recipe, *asked, "--dry-run", "--anyway")
        tokens.append(int(re.findall(r"([\d,]+) tokens an epoch", said.err)[0].replace(",", "")))
    assert 0 < tokens[1] - tokens[0] < tokens[0] / 10
