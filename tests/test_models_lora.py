"""The operator against its formula in float64, and layers that are computed together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dpo_studio.config import AdapterSection
from dpo_studio.frozen.dense import Dense
from dpo_studio.frozen.gptq import Packed
from dpo_studio.frozen.products import adapter_disabled, products
from dpo_studio.frozen.weights import flatten
from dpo_studio.models.adapters import as_reference, attach
from dpo_studio.models.lora import LoraLinear
from tests.pairs_of_ids import random_pairs
from tests.policies import moved
from tests.textbook import plain_logps
from tests.tiny_models import tiny_model

RANKS = (4, 2, 3)
OUTPUTS = (20, 8, 8)


def drawn(dtype: torch.dtype, *, needs_input: bool = True) -> tuple[Tensor, list[Tensor], Tensor, list[Tensor]]:
    """(x, weights, stacked A, B's) of three layers of 12 inputs that read the same 7 tokens."""
    draw = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=draw).to(dtype)

    x, down = random(7, 12).requires_grad_(needs_input), random(sum(RANKS), 12).requires_grad_()
    ups = [random(n, r).requires_grad_() for n, r in zip(OUTPUTS, RANKS, strict=True)]
    return x, [random(n, 12) for n in OUTPUTS], down, ups


def by_formula(x: Tensor, weights: list[Tensor], down: Tensor, ups: list[Tensor]) -> list[Tensor]:
    """y = x W^T + (x A^T) B^T for each layer, with its own rows of the stacked A."""
    parts = torch.split(down, [up.shape[1] for up in ups])
    return [x @ w.t() + (x @ a.t()) @ b.t() for w, a, b in zip(weights, parts, ups, strict=True)]


def by_operator(x: Tensor, weights: list[Tensor], down: Tensor, ups: list[Tensor]) -> list[Tensor]:
    """The product's own, of dense weights."""
    return products(x, [Dense(weight) for weight in weights], down, ups)


def value_and_slopes(outputs: list[Tensor], parameters: list[Tensor]) -> list[Tensor]:
    """Outputs, and the gradients of a sum in which every entry counts for something of its own."""
    total = sum((y.double() * torch.linspace(-1, 2, y.numel()).view_as(y)).sum() for y in outputs)
    assert isinstance(total, Tensor)
    return [*outputs, *torch.autograd.grad(total, parameters)]


@pytest.mark.parametrize("needs_input", [True, False])
def test_outputs_and_every_gradient_are_the_formula_s(needs_input: bool) -> None:
    """fp32 against float64, 1e-5; also for the first layer of a model, whose input needs no gradient."""
    found, exact = (
        value_and_slopes(compute(x, w, a, b), [*([x] if needs_input else []), a, *b])
        for compute, (x, w, a, b) in (
            (by_operator, drawn(torch.float32, needs_input=needs_input)),
            (by_formula, drawn(torch.float64, needs_input=needs_input)),
        )
    )
    for got, wanted in zip(found, exact, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-4)


def test_a_disabled_adapter_is_an_adapter_of_zeros_and_teaches_nothing() -> None:
    """To the bit, the adapter being there; a backward pass through it gives no numbers rather than wrong ones."""
    x, weights, down, ups = drawn(torch.bfloat16)
    expected = by_operator(x, weights, down, [torch.zeros_like(up) for up in ups])
    with adapter_disabled():
        found = by_operator(x, weights, down, ups)
    for y, wanted, adapted in zip(found, expected, by_operator(x, weights, down, ups), strict=True):
        assert torch.equal(y, wanted)
        assert not torch.equal(y, adapted)
    slopes = torch.autograd.grad(sum((y.sum() for y in found), torch.zeros(())), ups)
    assert all(slope.isnan().all() for slope in slopes)


def test_the_operator_keeps_torch_s_rules() -> None:
    """torch's own examination: shapes without data, gradients, nothing aliased, the same under AOT dispatch."""
    x, weights, down, ups = drawn(torch.float32)
    torch.library.opcheck(torch.ops.dpo_studio.lora.default, (x, *flatten([Dense(w) for w in weights]), down, ups))


def test_it_keeps_them_with_packed_weights_too() -> None:
    """Four bits, one group: 32 inputs a row of four words."""
    words = [torch.randint(-(2**31), 2**31 - 1, (n, 4), dtype=torch.int32) for n in OUTPUTS]
    packed = [Packed(w, torch.rand(len(w), 1).half(), torch.full((len(w), 1), 8).byte(), None, 4, 32) for w in words]
    x, down = torch.randn(7, 32, requires_grad=True), torch.randn(sum(RANKS), 32, requires_grad=True)
    ups = drawn(torch.float32)[3]
    torch.library.opcheck(torch.ops.dpo_studio.lora.default, (x, *flatten(packed), down, ups))


def layer_in(model: Any, name: str) -> Any:
    return model.get_submodule(f"base_model.model.model.layers.1.{name}")


def fresh(**settings: Any) -> Any:
    return attach(tiny_model(), AdapterSection(rank=4, alpha=8, **settings), seed=0)


def test_layers_that_read_one_input_are_computed_in_the_first_one_s_call() -> None:
    """q's call computes k and v too; each is handed over once, for the very tensor it was computed from."""
    policy = moved(fresh())
    q, k, v = (layer_in(policy, f"self_attn.{name}") for name in ("q_proj", "k_proj", "v_proj"))
    x, other = torch.randn(2, 1, 5, 32)
    alone = [layer(x) for layer in (k, v)]
    q(x)
    assert k._ready is not None
    torch.testing.assert_close(k(x), alone[0])
    assert k._ready is None
    torch.testing.assert_close(v(other), layer_in(moved(fresh()), "self_attn.v_proj")(other))  # not what was ready
    assert v._ready is None
    torch.testing.assert_close(v(x), alone[1])


def test_nothing_is_kept_after_a_forward_pass() -> None:
    policy = moved(fresh())
    plain_logps(policy, random_pairs(1))
    layers = [module for module in policy.modules() if isinstance(module, LoraLinear)]
    assert sum(len(layer.mates) for layer in layers) == 4 * 5
    assert all(layer._ready is None for layer in layers)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["k_proj"], ["v_proj", "up_proj", "down_proj"]])
def test_some_of_the_layers_adapted_are_peft_s_as_well(targets: list[str]) -> None:
    """The ones without an adapter are plain layers, and nobody waits for them."""
    policy = moved(fresh(targets=targets))
    ours = plain_logps(policy, random_pairs(3))
    for module in policy.modules():
        if isinstance(module, LoraLinear):
            module.__class__ = LoraLinear.__bases__[0]
    torch.testing.assert_close(ours, plain_logps(policy, random_pairs(3)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_a_fresh_policy_and_its_reference_have_the_same_bits(architecture: str, dtype: torch.dtype) -> None:
    """Law 1 to the bit: the same kernels add a product of zeros or one of no rank. And it is the base."""
    model = tiny_model(architecture)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(p)
    model = model.to(dtype)
    plain = plain_logps(model, random_pairs(3))
    policy = attach(model, AdapterSection(rank=4, alpha=8), seed=0)
    here = plain_logps(policy, random_pairs(3))
    with as_reference(policy):
        there = plain_logps(policy, random_pairs(3))
    assert torch.equal(here, there)
    torch.testing.assert_close(there, plain, rtol=1e-5 if dtype == torch.float32 else 0.05, atol=1e-5)
