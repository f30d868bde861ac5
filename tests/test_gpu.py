"""What only a GPU can show: the kernel's numbers and gradients, compiled layers, real lack of memory, equal bits.

    python -m pytest tests/test_gpu.py

Skipped where there is no CUDA. The oracle: the plain model in fp32, eager attention, one sequence at a time.
"""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from dpo_studio.config import TrainingSection
from dpo_studio.learning.logprobs import check_packing, pair_logps
from dpo_studio.learning.memory import Limit, Room, plan_limit
from dpo_studio.learning.train import TrainingState, train
from dpo_studio.models.adapters import adapter_state, as_reference, train_mode
from dpo_studio.models.attention import FLEX
from dpo_studio.models.layers import RUNGS, compiled_layers, set_recompute
from dpo_studio.objectives import DPO, PairLogps
from dpo_studio.tokens.pack import Steps, pack
from tests.conftest import columns, gradients, plain_logps, plain_peft_on, policy_on, random_pairs
from tests.tiny_models import tiny_folder
from tests.tiny_runs import dpo, write_recipe

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),
]
CUDA = torch.device("cuda")
SHAPE: dict[str, Any] = {"head_dim": 16}
PAIRS = [*random_pairs(6), *random_pairs(3, seed=5, prompt=(30, 90), answer=(20, 200))]
WEIGHTS_P2 = torch.randn(len(PAIRS), 2, generator=torch.Generator().manual_seed(3))
ARCHITECTURES = ["llama", "mistral-window", "qwen3", "gemma3"]


def assert_textbook(policy: Any, architecture: str) -> None:
    """1e-4 relative: of each log-prob, and of each gradient relative to its largest entry."""
    oracle = plain_peft_on(architecture, **SHAPE).to(CUDA)
    expected_P2 = plain_logps(oracle, PAIRS)
    expected = gradients(oracle, (WEIGHTS_P2.to(CUDA) * expected_P2).sum())
    for pairs in (PAIRS, PAIRS[::-1]):
        logps_P2 = columns(pair_logps(policy, pack(pairs).to(CUDA)))
        if pairs is not PAIRS:
            logps_P2 = logps_P2.flip(0)
        torch.testing.assert_close(logps_P2, expected_P2, rtol=1e-4, atol=1e-4)
        found = gradients(policy, (WEIGHTS_P2.to(CUDA) * logps_P2).sum())
        for name, gradient in found.items():
            largest = expected[name].abs().max().item()
            torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-4 * largest, msg=name)
    with torch.no_grad(), as_reference(policy):
        reference = columns(pair_logps(policy, pack(PAIRS).to(CUDA)))
    with torch.no_grad(), oracle.disable_adapter():
        torch.testing.assert_close(reference, plain_logps(oracle, PAIRS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_flex_is_the_textbook_eager_and_compiled(architecture: str) -> None:
    policy = policy_on(architecture, attn_implementation=FLEX, **SHAPE).to(CUDA)
    train_mode(policy)
    assert check_packing(policy, PAIRS) < 1e-4
    assert_textbook(policy, architecture)
    set_recompute(policy, "nothing")
    with compiled_layers(policy):
        assert_textbook(policy, architecture)
        assert check_packing(policy, PAIRS) < 1e-4


@pytest.mark.parametrize("what", RUNGS)
@pytest.mark.parametrize("compiled", [False, True])
def test_forming_anew_changes_no_number(what: Any, compiled: bool) -> None:
    policy = policy_on(attn_implementation=FLEX, **SHAPE).to(CUDA)
    train_mode(policy)
    set_recompute(policy, what)
    with compiled_layers(policy) if compiled else nullcontext():
        assert_textbook(policy, "llama")


def test_in_bfloat16_compiled_packs_add_no_more_noise_than_bfloat16_itself() -> None:
    """Mean error a token against fp32: at most 1.5 times that of the plain model in bf16."""
    changes: dict[str, Any] = {"initializer_range": 0.08, **SHAPE}
    exact = plain_logps(policy_on(attn_implementation="sdpa", **changes).to(CUDA), PAIRS)
    half = policy_on(attn_implementation=FLEX, **changes)
    half.get_base_model().bfloat16()
    half = half.to(CUDA)
    for name, p in half.named_parameters():
        if "lora_" in name:
            p.data = p.data.float()
    tokens = sum(len(a.ids) for pair in PAIRS for a in (pair.chosen, pair.rejected))
    with torch.no_grad():
        plain = plain_logps(half, PAIRS)
        with compiled_layers(half):
            packed = columns(pair_logps(half, pack(PAIRS).to(CUDA)))
    noise, ours = ((x - exact).abs().sum().item() / tokens for x in (plain, packed))
    assert 0 < ours < 1.5 * noise


def steps_of(policy: Any, tokens: int, known: Sequence[Limit] = (), steps: int = 4) -> tuple[list[float], list[Limit]]:
    """Losses of some steps with a live reference, and the limits they met."""

    def live(batches: Any) -> list[PairLogps]:
        with as_reference(policy):
            return [pair_logps(policy, batch) for batch in batches]

    section = TrainingSection(pairs_per_step=16, learning_rate=3e-3, warmup=0, schedule="constant")
    pairs = random_pairs(48, prompt=(100, 300), answer=(100, 400))
    plan = Steps(pairs, 16, tokens, 0, 2, steps)
    state = TrainingState.fresh(policy, section, steps, Accelerator())
    met: list[Limit] = []
    train_mode(policy)
    reports = train(policy, plan, DPO(), state, live, Room(policy, plan, known, met.append))
    return [report.metrics["loss"] for report in reports], met


def larger() -> Any:
    """Some 25 MB of activations for a thousand tokens."""
    changes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 1024, "head_dim": 64, "initializer_range": 0.05}
    return policy_on(attn_implementation=FLEX, size=0, **changes).to(CUDA)


@contextmanager
def room_for(gib: float) -> Iterator[None]:
    """Inside, so much and no more can be allocated on top of what is."""
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + gib * 2**30) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_real_lack_of_memory_ends_with_the_same_losses() -> None:
    """Rows of 16,384 tokens, some 80 KB each, where 0.2 GiB are left: the same losses as with all the room there is."""
    free, nothing = steps_of(larger(), 16384)
    policy = larger()
    with room_for(0.2):
        short, met = steps_of(policy, 16384)
    assert nothing == []
    assert met
    assert met[-1].tokens < 16384
    assert short == pytest.approx(free, abs=1e-4)
    assert min(free) < free[0] - 0.05


def test_the_plan_fits_and_fills() -> None:
    """What is planned runs, and twice as much does not."""
    pairs = random_pairs(48, prompt=(100, 300), answer=(100, 400))
    policy = larger()
    train_mode(policy)
    with room_for(0.3):
        limit = plan_limit(policy, pairs, 48, CUDA)
        assert limit.recompute == "nothing"
        assert steps_of(policy, limit.tokens)[1] == []
        assert steps_of(policy, 2 * limit.tokens)[1] != []


def test_the_same_run_twice_has_the_same_bits() -> None:
    """Nothing adds in the order in which threads happen to arrive."""
    runs = []
    for _ in range(2):
        policy = larger()
        set_recompute(policy, "nothing")
        with compiled_layers(policy):
            losses, _ = steps_of(policy, 4096)
        runs.append((losses, {name: p.detach().clone() for name, p in adapter_state(policy).items()}))
    assert runs[0][0] == runs[1][0]
    for name, p in runs[0][1].items():
        assert torch.equal(p, runs[1][1][name]), name


def test_a_run_from_the_command_line_resumes_bit_for_bit(tmp_path: Path) -> None:
    """`dpo train` on the GPU, bf16: eight steps at once, and stopped after four."""
    base = tiny_folder(tmp_path / "base", **SHAPE)
    recipe = write_recipe(tmp_path / "r.yaml", base, training={"max_steps": 8, "save_every": 4})
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    said = dpo("train", recipe, "--set", f"run.folder={whole}")
    assert said.code == 0, said.err
    assert dpo("train", recipe, "--set", f"run.folder={parts}").code == 0
    shutil.rmtree(parts / "checkpoints" / "step-8")
    (parts / "result.json").unlink()
    again = dpo("train", recipe, "--set", f"run.folder={parts}")
    assert again.code == 0, again.err
    assert (whole / "metrics.jsonl").read_text() == (parts / "metrics.jsonl").read_text()
    name = "adapter/adapter_model.safetensors"
    assert (whole / name).read_bytes() == (parts / name).read_bytes()
    losses = [json.loads(line)["loss"] for line in (whole / "metrics.jsonl").read_text().splitlines() if "loss" in line]
    assert len(losses) == 9 or len(losses) == 8
