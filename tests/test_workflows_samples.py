"""Answers as training goes: they change nothing that is learned, and are those of the plain model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_studio.config import load_recipe
from dpo_studio.console.progress import Progress
from dpo_studio.workflows.training.run import run_training
from tests.tiny_runs import dpo, write_recipe
from tests.tiny_tokenizers import end_ids

SAME = ("metrics.jsonl", "adapter/adapter_model.safetensors", "adapter/adapter_config.json")


def trained(folder: Path, base: Path, sample_prompts: int | str | None, **training: Any) -> Path:
    """A run of four steps with dropout, which a touched random state would change."""
    folder.mkdir()
    run = {"folder": str(folder / "run")} | ({} if sample_prompts is None else {"sample_prompts": sample_prompts})
    steps = {"pairs_per_step": 4, "max_steps": 4, "learning_rate": 1e-2, "evaluate_every": 2, "save_every": 2}
    recipe = write_recipe(folder / "r.yaml", base, adapter={"dropout": 0.2}, training=steps | training, run=run)
    said = dpo("train", recipe)
    assert said.code == 0, said.err
    return folder / "run"


def samples(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


def test_answers_change_no_byte_of_what_is_learned(tiny_base: Path, tmp_path: Path) -> None:
    without = trained(tmp_path / "without", tiny_base, None)
    with_them = trained(tmp_path / "with", tiny_base, 3)
    for name in SAME:
        assert (without / name).read_bytes() == (with_them / name).read_bytes(), name
    assert not (without / "samples.jsonl").exists()
    rows = samples(with_them)
    assert [row["step"] for row in rows] == [0] * 3 + [2] * 3 + [4] * 3
    assert len({row["prompt"][-1]["content"] for row in rows}) == 3


def test_the_first_answers_are_the_base_s_own(tiny_base: Path, tmp_path: Path) -> None:
    """Step 0, against transformers' greedy generation of the base."""
    file = tmp_path / "prompts.txt"
    file.write_text("How is it?\nWhat now?\n")
    run = trained(tmp_path / "r", tiny_base, str(file), sample_every=3)
    rows = samples(run)
    assert [row["step"] for row in rows] == [0, 0, 3, 3, 4, 4]
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    for row in rows[:2]:
        ids = tokenizer.apply_chat_template(
            row["prompt"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            written = model.generate(**ids, do_sample=False, max_new_tokens=160, eos_token_id=sorted(end_ids()))
        answer = written[0, ids["input_ids"].shape[1] :].tolist()
        assert row["ended"] == (answer[-1] in end_ids())
        text = tokenizer.decode(answer[:-1] if row["ended"] else answer, skip_special_tokens=True)
        assert row["answer"].strip() == text.strip()


def test_a_resumed_run_has_each_answer_once(tiny_base: Path, tmp_path: Path) -> None:
    """What was answered after the checkpoint is answered again, and not kept twice."""
    recipe = write_recipe(tmp_path / "r.yaml", tiny_base, run={"folder": str(tmp_path / "run"), "sample_prompts": 1})
    with Progress(quiet=True) as progress:
        run_training(load_recipe(recipe), progress, stop_after=2)
    (tmp_path / "run" / "result.json").unlink()  # as of a run that was stopped there
    with (tmp_path / "run" / "samples.jsonl").open("a") as file:
        file.write(json.dumps({"step": 3, "prompt": [], "answer": "of a step that was lost", "ended": True}) + "\n")
    assert dpo("train", recipe).code == 0
    assert [row["step"] for row in samples(tmp_path / "run")] == [0, 2, 4]


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"run": {"sample_prompts": "nowhere.txt"}}, "nowhere.txt"),
        ({"training": {"sample_every": 2}}, "training.sample_every needs run.sample_prompts"),
        ({"run": {"sample_prompts": 0}}, "run.sample_prompts"),
    ],
)
def test_prompts_that_are_not_there_are_told_before_any_weights(
    sections: dict[str, Any], says: str, tiny_base: Path, tmp_path: Path
) -> None:
    said = dpo("train", write_recipe(tmp_path / "r.yaml", tiny_base, **sections), "--dry-run")
    assert said.code == 1 or said.code == 2
    assert says in said.err
