"""Layers that keep less, and layers that are compiled, against the same layers plain."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from dpo_studio.config import AdapterSection
from dpo_studio.learning.logprobs import pair_logps
from dpo_studio.learning.packing_check import check_packing
from dpo_studio.models.adapters import as_reference, attach, train_mode
from dpo_studio.models.attention import PAIRS
from dpo_studio.models.layers import RUNGS, compiled_layers, set_recompute
from dpo_studio.tokens.pack import pack
from tests.pairs_of_ids import random_pairs
from tests.policies import moved, policy_on
from tests.textbook import gradients
from tests.tiny_models import ARCHITECTURES
from tests.tiny_tokenizers import VOCABULARY

SIX, FOUR = pack(random_pairs(6)), pack(random_pairs(4, seed=1))


def numbers(policy: Any, row: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs of policy and reference, and every LoRA gradient."""
    logps = pair_logps(policy, row)
    found = gradients(policy, logps.chosen_P.sum() - 0.5 * logps.rejected_P.sum())
    with torch.no_grad(), as_reference(policy):
        reference = pair_logps(policy, row)
    return torch.cat([logps.chosen_P, logps.rejected_P, reference.chosen_P]).detach(), found


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3"])
def test_forming_anew_changes_no_bit(architecture: str) -> None:
    """Whatever is chosen, in whatever order; afterwards the model's classes are transformers' or pass for them."""
    policy = policy_on(architecture, attn_implementation=PAIRS)
    train_mode(policy)
    logps, slopes = numbers(policy, SIX)
    for what in (*RUNGS, "mlp", "nothing"):
        set_recompute(policy, what)
        again, anew = numbers(policy, SIX)
        assert torch.equal(again, logps)
        assert all(torch.equal(anew[name], slopes[name]) for name in slopes)


@pytest.mark.parametrize("kind", ["biogpt", "jetmoe"])
def test_a_layer_formed_anew_drops_nothing_of_the_frozen_base(kind: str) -> None:
    """BioGPT's layers drop a tenth of their activations wherever they are in training mode, and JetMoe has no switch of
    transformers' own: on every rung the gradients are those of a plain pass in eval mode."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    own = {"num_key_value_heads": 2, "kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2}
    config = AutoConfig.for_model(kind, **sizes, intermediate_size=48, **(own if kind == "jetmoe" else {}))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=PAIRS).requires_grad_(False)
    section = AdapterSection(rank=2, alpha=4, targets=["q_proj"] if kind == "biogpt" else ["kv_proj"])
    policy = moved(attach(model, section, seed=0))
    train_mode(policy)
    found = []
    for what in RUNGS:
        set_recompute(policy, what)
        found.append(numbers(policy, SIX)[1])
    for name, slope in found[0].items():
        assert slope.any()
        for anew in found[1:]:
            torch.testing.assert_close(anew[name], slope, rtol=1e-5, atol=1e-7)


class Kept:
    """Storages that autograd holds for the backward pass, and their bytes."""

    def __init__(self) -> None:
        self.storages: dict[int, int] = {}

    def note(self, x: Tensor) -> Tensor:
        self.storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x


def test_less_is_kept_on_each_rung() -> None:
    policy = policy_on(attn_implementation=PAIRS)
    train_mode(policy)
    held = []
    for what in RUNGS:
        set_recompute(policy, what)
        kept = Kept()
        with torch.autograd.graph.saved_tensors_hooks(kept.note, lambda x: x):
            pair_logps(policy, SIX)
        held.append(sum(kept.storages.values()))
    assert held[0] > 1.3 * held[1] > 1.3 * 1.3 * held[2]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_layers_are_the_plain_ones() -> None:
    """One compilation for four layers, two lengths, policy and reference; on the way out they are plain again.
    Dense masks: FlexAttention has no backward pass on a CPU (tests/test_gpu.py has it)."""
    policy = policy_on("mistral-window", attn_implementation="sdpa")
    train_mode(policy)
    plain = [numbers(policy, row) for row in (SIX, FOUR)]
    set_recompute(policy, "nothing")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with compiled_layers(policy):
        compiled = [numbers(policy, row) for row in (SIX, FOUR)]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert torch.equal(numbers(policy, FOUR)[0], plain[1][0])
    for (logps, wanted), (again, anew) in zip(plain, compiled, strict=True):
        torch.testing.assert_close(again, logps, rtol=1e-5, atol=1e-5)
        for name, gradient in wanted.items():
            largest = gradient.abs().max().item()
            torch.testing.assert_close(anew[name], gradient, rtol=0, atol=1e-4 * largest, msg=name)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_in_bf16_a_policy_that_has_not_moved_is_its_reference() -> None:
    """To the bit, for both run the same code: ln 2 is ln 2. Compiled apart, with and without things kept for a backward
    pass, they are up to 0.3 nats apart here."""
    policy = policy_on(attn_implementation="sdpa", size=0, num_hidden_layers=2, hidden_size=128, intermediate_size=256)
    policy.get_base_model().bfloat16()
    train_mode(policy)
    set_recompute(policy, "nothing")
    torch._dynamo.reset()
    with compiled_layers(policy):
        logps = pair_logps(policy, SIX)
        torch.autograd.backward((logps.chosen_P - logps.rejected_P).sum())
        with torch.no_grad(), as_reference(policy):
            reference = pair_logps(policy, SIX)
    assert torch.equal(logps.chosen_P, reference.chosen_P)
    assert torch.equal(logps.rejected_P, reference.rejected_P)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_layers_drop_out_alike_with_a_gradient_and_without() -> None:
    """What an objective over a whole step needs: its second pass learns from the first one's numbers."""
    policy = policy_on(attn_implementation="sdpa", dropout=0.3)
    train_mode(policy)
    set_recompute(policy, "nothing")
    torch._dynamo.reset()
    found = []
    with compiled_layers(policy):
        for seed, kept in ((5, False), (5, True), (6, True)):
            torch.manual_seed(seed)
            with torch.set_grad_enabled(kept):
                found.append(pair_logps(policy, SIX).chosen_P.detach())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])


@pytest.mark.parametrize("what", RUNGS)
def test_layers_that_form_anew_are_compiled_whole(what: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No graph break on any rung, and one graph for policy and reference (traced, not turned into kernels)."""
    policy = policy_on(attn_implementation="sdpa")
    train_mode(policy)
    plain, _ = numbers(policy, SIX)
    set_recompute(policy, what)
    compile_ = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: compile_(self, backend="aot_eager", **how))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with compiled_layers(policy):
        traced, _ = numbers(policy, SIX)
        assert not torch._dynamo.utils.counters["graph_break"]
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
        check_packing(policy, random_pairs(5))  # the plain model's four sequences are not worth a compilation
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(traced, plain, rtol=1e-5, atol=1e-5)


def test_every_architecture_s_layers_are_found() -> None:
    for architecture in ARCHITECTURES:
        policy = policy_on(architecture)
        set_recompute(policy, "mlp")
        assert sum("Recomputing" in type(module).__name__ for module in policy.modules()) == 4
