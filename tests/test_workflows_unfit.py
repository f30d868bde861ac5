"""What a model or its data lack is said by name and number before the first step, to who types `dpo train`."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.tiny_models import tiny_folder
from tests.tiny_runs import Said, dpo, tiny_rows, write_recipe
from tests.tiny_tokenizers import CHATML, VOCABULARY, tiny_tokenizer


def refused(said: Said, *parts: str) -> None:
    assert (said.code, said.out) == (1, ""), said
    assert "Traceback" not in said.err
    for part in parts:
        assert part in said.err


# Numbers that are none


@pytest.mark.parametrize(
    ("tensor", "value"),
    [
        ("model.layers.2.mlp.up_proj.weight", math.nan),
        ("model.embed_tokens.weight", math.inf),
        pytest.param("model.norm.weight", -math.inf, marks=pytest.mark.slow),
        pytest.param("lm_head.weight", math.nan, marks=pytest.mark.slow),
    ],
)
def test_a_base_with_a_number_that_is_none_is_named(tensor: str, value: float, tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights[tensor].view(-1)[-1] = value
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    said = dpo("train", write_recipe(tmp_path / "r.yaml", base))
    refused(said, "not finite", tensor)
    assert not list((tmp_path / "run").glob("adapter/*"))


# Tokens without an embedding


def with_tokens(folder: Path, *tokens: str, special: bool, template: str = CHATML, **more: Any) -> Path:
    """A tiny model whose tokenizer alone got more tokens: its embedding has 512 rows, for the first 512."""
    tiny_folder(folder)
    tokenizer = tiny_tokenizer("chatml")
    tokenizer.add_tokens(list(tokens), special_tokens=special)
    for name, token in more.items():
        setattr(tokenizer, name, token)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


MARKED = CHATML.replace("m.role + '\\n'", "m.role + '<|begin|>\\n'")
BY_ROLE = CHATML.replace("m.role + '\\n'", "('<|' ~ m.role ~ '|>') + '\\n'")


@pytest.mark.parametrize(
    ("tokens", "special", "more"),
    [
        (["<|pad|>", "<|begin|>"], True, {"pad_token": "<|pad|>", "template": MARKED}),
        (["<|begin|>"], True, {"template": MARKED}),
        (["<|user|>"], True, {"template": BY_ROLE}),
        (["<|pad|>"], True, {"pad_token": "<|pad|>"}),
        (["<think>"], False, {}),
    ],
)
def test_a_token_that_the_embedding_lacks_is_named(
    tokens: list[str], special: bool, more: dict[str, Any], tmp_path: Path
) -> None:
    base = with_tokens(tmp_path / "base", *tokens, special=special, **more)
    recipe = write_recipe(tmp_path / "r.yaml", base)
    largest = VOCABULARY + len(tokens) - 1
    commands = [["train", recipe], ["train", recipe, "--dry-run"], ["generate", base, "--prompt", "a"]]
    for command in commands if len(tokens) > 1 else commands[:1]:  # every verb reads the tokenizer in the same place
        refused(dpo(*command), f"token ids up to {largest} ('{tokens[-1]}')", f"{VOCABULARY} rows")
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").glob("*"))


def test_a_config_that_says_more_than_the_weights_hold_is_not_believed(tmp_path: Path) -> None:
    base = with_tokens(tmp_path / "base", "<|begin|>", special=True, template=MARKED)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"vocab_size": VOCABULARY + 8}))
    said = dpo("train", write_recipe(tmp_path / "r.yaml", base), "--dry-run")
    refused(said, f"token ids up to {VOCABULARY}", f"{VOCABULARY} rows")


def test_a_special_token_that_nothing_writes_needs_no_embedding(tmp_path: Path) -> None:
    """As Gemma 3's for an image; a text that spells it stays text."""
    base = with_tokens(tmp_path / "base", "<image_soft_token>", special=True)
    rows = [row | {"chosen": row["chosen"] + " <image_soft_token>"} for row in tiny_rows(12)]
    said = dpo("train", write_recipe(tmp_path / "r.yaml", base, rows=rows, training={"max_steps": 1}))
    assert said.code == 0, said.err


@pytest.mark.parametrize("architecture", ["llama", "llama-tied"])
def test_a_padded_embedding_is_no_fault(architecture: str, tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base", architecture, vocab_size=VOCABULARY + 64)
    said = dpo("train", write_recipe(tmp_path / "r.yaml", base), "--dry-run")
    assert said.code == 0, said.err


# Few pairs, a long warm-up


@pytest.mark.parametrize(
    ("pairs", "warmup", "epochs"), [(3, 100, 1), (5, 2, 2), pytest.param(2, 0.1, 1, marks=pytest.mark.slow)]
)
def test_few_pairs_and_a_long_warm_up_are_told_in_numbers(
    pairs: int, warmup: float, epochs: int, tiny_base: Path, tmp_path: Path
) -> None:
    training = {"pairs_per_step": 32, "warmup": warmup, "epochs": epochs, "max_steps": None}
    recipe = write_recipe(
        tmp_path / "r.yaml", tiny_base, rows=tiny_rows(pairs), training=training, data={"held_out": {"fraction": 0}}
    )
    steps = math.ceil(warmup) if warmup < 1 else int(warmup)
    for command in (["train", recipe, "--dry-run"], ["train", recipe]):
        said = dpo(*command)
        assert said.code == 0, said.err
        assert f"{pairs} training pairs are fewer than training.pairs_per_step, 32" in said.err
        assert f"training.warmup is {steps} steps, and the run has {epochs}" in said.err
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rates = [line["learning_rate"] for line in lines if line["step"]]
    (highest,) = re.findall(r"the learning rate gets to ([\d.e-]+),", said.err)
    assert len(rates) == epochs
    assert max(rates) == pytest.approx(float(highest))
    assert ("nothing is learned" in said.err) == (max(rates) == 0)
    weights = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    moved = any(tensor.count_nonzero() for name, tensor in weights.items() if "lora_B" in name)
    assert moved == ("nothing is learned" not in said.err)


def test_enough_pairs_and_a_short_warm_up_are_no_news(tiny_base: Path, tmp_path: Path) -> None:
    said = dpo("train", write_recipe(tmp_path / "r.yaml", tiny_base), "--dry-run")
    assert said.code == 0
    assert "training.warmup" not in said.err
    assert "pairs_per_step" not in said.err
