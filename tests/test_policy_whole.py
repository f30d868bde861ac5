"""Training the whole model: the steps of plain torch, in fp32 copies where the model is in bf16, and a plain result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_studio.config import TrainingSection
from dpo_studio.errors import ModelError
from dpo_studio.learning.reference import reference_logps
from dpo_studio.learning.state import TrainingState
from dpo_studio.learning.train import train
from dpo_studio.models.attention import PAIRS
from dpo_studio.objectives import DPO
from dpo_studio.policy.whole import WholePolicy
from dpo_studio.tokens.pack import Steps
from tests.pairs_of_ids import random_pairs
from tests.rank_processes import on_ranks
from tests.test_models_gptq import packed_folder
from tests.test_ranks_together import recipe_in, trained
from tests.textbook import plain_logps
from tests.tiny_models import tiny_model
from tests.tiny_runs import dpo, tiny_rows, write_rows

SECTION = TrainingSection(pairs_per_step=4, learning_rate=1e-3, warmup=0, schedule="constant", clip=1.0)
TWELVE = random_pairs(12)
STEPS = 5


def whole_training(policy: WholePolicy, steps: int = STEPS, section: TrainingSection = SECTION) -> list[float]:
    """Our loop on all weights, the reference known beforehand; the losses."""
    with policy.as_reference():
        known = reference_logps(policy.model, TWELVE, cache=None)
    plan = Steps(TWELVE, 4, 100, 0, 9, steps, lambda places: known.map(lambda x_P: x_P[list(places)]))
    policy.train_mode()
    state = TrainingState.fresh(policy, section, steps)
    return [report.metrics["loss"] for report in train(policy, plan, DPO(), state)]


def plain_training(model: Any, steps: int = STEPS) -> list[float]:
    """The same by hand: one sequence at a time through the model's own logits and eager attention, torch's AdamW."""
    model.requires_grad_(True)
    with torch.no_grad():
        before = plain_logps(model, TWELVE).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, foreach=False)
    plan = Steps(TWELVE, 4, 100, 0, 9, steps)
    losses: list[float] = []
    for step in range(1, steps + 1):
        places = plan.pairs_of(step)
        now = plain_logps(model, [TWELVE[place] for place in places])
        ratios = now - before[places]
        loss = -torch.nn.functional.logsigmoid(0.1 * (ratios[:, 0] - ratios[:, 1])).mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "gemma2", "qwen2"])
def test_the_steps_are_those_of_plain_torch(architecture: str) -> None:
    """In fp32, the largest difference over the largest weight of each tensor. A head tied to its embedding gets the
    gradients of both; Gemma's is behind a soft-cap."""
    ours = WholePolicy.of(tiny_model(architecture, attn_implementation=PAIRS))
    plain = tiny_model(architecture, attn_implementation="eager")
    start = {name: p.detach().clone() for name, p in plain.named_parameters()}
    losses, expected = whole_training(ours), plain_training(plain)
    assert losses == pytest.approx(expected, rel=2e-4)
    assert losses[0] == pytest.approx(0.693147, abs=1e-6) and abs(losses[-1] - losses[0]) > 0.01
    for name, p in plain.named_parameters():
        tensor = ours.state()[name]
        assert (tensor - p).abs().max() < 2e-3 * p.abs().max(), name
        assert (tensor - p).norm() < 0.05 * (p - start[name]).norm(), name  # of what it moved
        assert not torch.equal(tensor, start[name]), name


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "granite"])
def test_the_gradient_of_every_tensor_is_plain_torchs(architecture: str) -> None:
    """One step's, relative to its norm: AdamW looks at signs first, and would hide a gradient's size above."""
    ours = WholePolicy.of(tiny_model(architecture, attn_implementation=PAIRS))
    with ours.as_reference():
        known = reference_logps(ours.model, TWELVE, cache=None).map(lambda x_P: x_P - x_P % 3)  # not at ln 2
    plan = Steps(TWELVE, 4, 100, 0, 9, 1, lambda places: known.map(lambda x_P: x_P[list(places)]))
    state = TrainingState.fresh(ours, SECTION.model_copy(update={"clip": None}), 1)
    seen: dict[str, torch.Tensor] = {}

    def keep(*given: Any) -> None:
        seen.update({name: p.grad.clone() for name, p in ours.trained.items() if p.grad is not None})

    state.optimizer.register_step_pre_hook(keep)
    list(train(ours, plan, DPO(), state))
    plain = tiny_model(architecture, attn_implementation="eager")
    plain.requires_grad_(True)
    places = plan.pairs_of(1)
    reference = torch.stack([known.chosen_P, known.rejected_P], 1)[places]
    ratios = plain_logps(plain, [TWELVE[place] for place in places]) - reference
    torch.autograd.backward(-torch.nn.functional.logsigmoid(0.1 * (ratios[:, 0] - ratios[:, 1])).mean())
    for name, p in plain.named_parameters():
        assert (seen[name] - p.grad).norm() < 1e-4 * p.grad.norm() + 1e-7, name


def test_a_model_in_bf16_is_trained_in_fp32_copies() -> None:
    """Updates of 1e-6 are below what bf16 can hold, and are there; what the model computes with is their rounding."""
    model = tiny_model(attn_implementation=PAIRS).to(torch.bfloat16)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    policy = WholePolicy.of(model)
    whole_training(policy, 3, SECTION.model_copy(update={"learning_rate": 1e-6}))
    for name, p in model.named_parameters():
        master = policy.state()[name]
        assert master.dtype == torch.float32 and p.dtype == torch.bfloat16
        assert torch.equal(p, master.to(torch.bfloat16)), name
        assert not torch.equal(master, start[name].float()), name
    unmoved = sum(torch.equal(p, start[name]) for name, p in model.named_parameters())
    assert unmoved > 5  # in bf16 alone nothing would have been learned there


def test_the_reference_is_gone_after_the_first_step() -> None:
    policy = WholePolicy.of(tiny_model(attn_implementation=PAIRS))
    whole_training(policy, 1)
    with pytest.raises(ModelError, match="gone after the first step"), policy.as_reference():
        pass


def test_half_precision_is_refused() -> None:
    with pytest.raises(ModelError, match="not trained in float16"):
        WholePolicy.of(tiny_model().half())


def whole_recipe(folder: Path, base: Path) -> Path:
    """Six steps on all weights."""
    recipe = recipe_in(folder, base, adapter=None)
    recipe.write_text(recipe.read_text() + "adapter: null\n")
    return recipe


@pytest.fixture(scope="module")
def run(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of six steps on all weights."""
    recipe = whole_recipe(tmp_path_factory.mktemp("whole"), tiny_base)
    said = dpo("train", recipe, "--set", "training.learning_rate=1e-3")
    assert said.code == 0, said.err
    return recipe.parent / "run"


def test_the_result_is_a_plain_model_that_transformers_loads(run: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[1]["loss"] == pytest.approx(0.693147, abs=1e-5) and lines[-1]["loss"] < 0.69
    assert not (run / "adapter").exists()
    model = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    assert tokenizer.chat_template
    saved = load_file(run / "checkpoints" / "step-6" / "weights.safetensors")
    assert all(torch.equal(p, saved[name]) for name, p in model.named_parameters())
    pairs = write_rows(tmp_path / "p.jsonl", tiny_rows(3))
    assert dpo("score", run / "model", pairs).code == 0
    assert dpo("generate", run, "--prompt", "why?", "--max-new-tokens", "4").code == 0
    for verb in (("score", run, pairs), ("export", run, tmp_path / "out", "--to", "merged")):
        said = dpo(*verb)
        assert said.code == 1 and "whole model" in said.err and str(run / "model") in said.err, said.err


def test_it_continues_to_the_bit(run: Path, tiny_base: Path, tmp_path: Path) -> None:
    recipe = whole_recipe(tmp_path / "again", tiny_base)
    for steps in (4, 6):
        more = ("--set", "training.learning_rate=1e-3", "--set", f"training.max_steps={steps}")
        assert dpo("train", recipe, *more).code == 0
    again = recipe.parent / "run"
    for name in ("model/model.safetensors", "checkpoints/step-6/optimizer.safetensors"):
        assert (again / name).read_bytes() == (run / name).read_bytes(), name


def test_two_processes_train_it_as_one_does(run: Path, tiny_base: Path, tmp_path: Path) -> None:
    recipe = whole_recipe(tmp_path / "two", tiny_base)
    code, said = on_ranks(2, trained, recipe, None, "--set", "training.learning_rate=1e-3")[0]
    assert code == 0, said
    one, two = (load_file(folder / "model" / "model.safetensors") for folder in (run, recipe.parent / "run"))
    assert all((two[name] - one[name]).abs().max() < 2e-3 * one[name].abs().max() for name in one)


@pytest.mark.slow
def test_a_quantised_base_is_refused(tmp_path: Path) -> None:
    said = dpo("train", whole_recipe(tmp_path / "q", packed_folder(tmp_path / "packed")))
    assert said.code == 1 and "quantised base" in said.err


def test_an_evaluation_of_it_claims_no_margins(run: Path, tiny_base: Path) -> None:
    """Its reference, the start, is not in memory: without that being known, policy and reference would be the same
    model, with accuracy 0.5 and margin 0."""
    how = ("--judge", "length", "--temperatures", "0", "--prompts", "2", "--max-new-tokens", "4")
    said = dpo("eval", run, "--against", tiny_base, *how)
    assert said.code == 0, said.err
    assert f"no margins and no KL: the run's reference, {tiny_base}, is not loaded" in said.err
    refused = dpo("eval", run, *how)
    assert (refused.code, "`dpo eval` has --against MODEL" in refused.err) == (1, True)
