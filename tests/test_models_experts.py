"""LoRA on fused experts, against plain PEFT (`target_parameters`) on the plain model with eager attention."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from torch import Tensor

from dpo_studio.config import AdapterSection, TrainingSection
from dpo_studio.errors import ModelError
from dpo_studio.export.merge import adapter_deltas, merge
from dpo_studio.frozen import expert_products
from dpo_studio.frozen.products import adapter_disabled
from dpo_studio.learning.logprobs import pair_logps
from dpo_studio.learning.packing_check import check_packing
from dpo_studio.models.adapters import (
    adapter_state,
    as_reference,
    attach,
    attach_existing,
    in_eval,
    save_adapter,
)
from dpo_studio.models.attention import choose_attention
from dpo_studio.models.experts import LoraExperts
from dpo_studio.models.layers import compiled_layers, set_recompute
from dpo_studio.objectives import DPO
from dpo_studio.policy.adapter_check import verify_adapter, verify_trial_adapter
from dpo_studio.tokens.pack import pack
from tests.pairs_of_ids import random_pairs
from tests.policies import moved, take_steps
from tests.textbook import columns, gradients, plain_logps
from tests.tiny_mixtures import MIXTURES, tiny_mixture

THREE = random_pairs(3)


def mixture(architecture: str = "qwen3_moe") -> Any:
    """The model as a run loads it on a CPU."""
    config = tiny_mixture(architecture).config
    return tiny_mixture(architecture, attn_implementation=choose_attention("auto", config, torch.device("cpu")))


def ours(architecture: str, **section: Any) -> Any:
    model = mixture(architecture)
    return moved(attach(model, AdapterSection(rank=3, alpha=6, **section), seed=0)).eval()


def plain_twin(kind: str, policy: Any) -> Any:
    """PEFT's own layers with the policy's tensors, by the adapter's own list of targets."""
    config = policy.peft_config["default"]
    plain = get_peft_model(
        tiny_mixture(kind),
        LoraConfig(
            r=3,
            lora_alpha=6,
            target_modules=sorted(config.target_modules),
            target_parameters=sorted(config.target_parameters),
            rank_pattern=config.rank_pattern,
            use_rslora=config.use_rslora,
        ),
    )
    tensors = dict(policy.named_parameters())
    for name, p in plain.named_parameters():
        p.data = tensors[name].data.clone()
    assert not any(isinstance(module, LoraExperts) for module in plain.modules())
    return plain.eval()


def compare(policy: Any, plain: Any) -> None:
    """Log-probs to 1e-4, gradients to 1e-4 of each one's largest, of the same tensors."""
    assert adapter_state(policy).keys() == adapter_state(plain).keys()
    weights_P2 = torch.linspace(-1, 2, 6).view(3, 2)
    found, expected = columns(pair_logps(policy, pack(THREE))), plain_logps(plain, THREE)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    mine, theirs = (gradients(m, (x * weights_P2).sum()) for m, x in ((policy, found), (plain, expected)))
    for name, slope in theirs.items():
        assert (mine[name] - slope).abs().max().item() <= 1e-4 * slope.abs().max().item() + 1e-9, name
    assert any("experts" in name and slope.abs().max() > 0 for name, slope in theirs.items())


@pytest.mark.parametrize("kind", MIXTURES)
def test_all_linear_is_experts_too_and_computes_what_plain_peft_computes(kind: str) -> None:
    policy = ours(kind)
    assert all(
        sum(f"{place}.lora_A" in name for name in adapter_state(policy)) == (1 if kind == "deepseek_v3" else 2)
        for place in ("experts", "experts.base_layer")
    )
    assert not any("gate.lora" in name or "router" in name for name in adapter_state(policy))
    compare(policy, plain_twin(kind, policy))


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning")  # PEFT's, and not so
@pytest.mark.parametrize(
    "section",
    [
        {"kind": "rslora", "targets": ["experts"]},
        {"targets": ["q_proj", "experts.down_proj"]},
        {"targets": ["gate_up_proj", "o_proj"], "rank_pattern": {"layers.1.mlp.experts.gate_up_proj": 5}},
    ],
    ids=str,
)
def test_experts_are_named_by_their_module_or_by_one_projection(section: dict[str, Any]) -> None:
    policy = ours("qwen3_moe", **section)
    compare(policy, plain_twin("qwen3_moe", policy))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", MIXTURES)
def test_a_fresh_adapter_computes_its_reference_to_the_bit_and_the_reference_stays(
    kind: str, dtype: torch.dtype
) -> None:
    model = mixture(kind).to(dtype)
    policy = attach(model, AdapterSection(rank=4, alpha=8), seed=0).eval()
    with torch.no_grad():
        here = columns(pair_logps(policy, pack(THREE)))
        with as_reference(policy):
            there = columns(pair_logps(policy, pack(THREE)))
        moved(policy)
        with as_reference(policy):
            still = columns(pair_logps(policy, pack(THREE)))
        bare = plain_logps(tiny_mixture(kind), THREE)
        after = columns(pair_logps(policy, pack(THREE)))
    assert torch.equal(here, there) and torch.equal(there, still)
    assert (after - still).abs().max() > 0.1
    if dtype == torch.float32:
        torch.testing.assert_close(there, bare, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", MIXTURES)
def test_saved_it_is_plain_peft_s_proven_so_and_back(kind: str, tmp_path: Path) -> None:
    """The file that we write and the one that plain PEFT writes of it again."""
    policy = ours(kind)
    verify_trial_adapter(policy, tmp_path / "trial", base="b")
    save_adapter(policy, tmp_path / "adapter", base="b")
    verify_adapter(policy, tmp_path / "adapter")
    plain = PeftModel.from_pretrained(tiny_mixture(kind), tmp_path / "adapter").eval()
    with torch.no_grad():
        expected = plain_logps(plain, THREE)
        torch.testing.assert_close(columns(pair_logps(policy, pack(THREE))), expected, rtol=1e-4, atol=1e-4)
        plain.save_pretrained(tmp_path / "again", save_embedding_layers=False)
        base = mixture(kind)
        back = attach_existing(base, tmp_path / "again", trainable=True).eval()
        torch.testing.assert_close(columns(pair_logps(back, pack(THREE))), expected, rtol=1e-4, atol=1e-4)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_parameters"] == ["experts.down_proj", "experts.gate_up_proj"]
    assert adapter_state(back).keys() == adapter_state(policy).keys()


@pytest.mark.parametrize(
    ("kind", "dtype"), [("mixtral", torch.float32), ("gpt_oss", torch.float32), ("gpt_oss", torch.bfloat16)]
)
def test_the_check_at_the_start_compares_with_peft_s_own_experts(kind: str, dtype: torch.dtype) -> None:
    """In bf16 a token near the border between two experts may go to the other: of so small a model that is much."""
    model = mixture(kind).to(dtype)
    policy = attach(model, AdapterSection(rank=4, alpha=8), seed=0)
    before = {name: p.clone() for name, p in policy.named_parameters()}
    check_packing(policy, random_pairs(6))
    assert all(torch.equal(before[name], p) for name, p in policy.named_parameters())


@pytest.mark.parametrize("kind", MIXTURES)
def test_merged_it_says_the_same(kind: str) -> None:
    """fp32; the plain model with each expert's own sum."""
    policy, model = ours(kind), tiny_mixture(kind)
    merge(model, adapter_deltas(policy), torch.float32)
    with torch.no_grad():
        expected = columns(pair_logps(policy, pack(THREE)))
        torch.testing.assert_close(plain_logps(model, THREE), expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_that_is_continued_is_its_own_reference_frozen(tmp_path: Path) -> None:
    """Two adapters on the same experts: PEFT finds our layers again."""
    save_adapter(ours("qwen3_moe"), tmp_path, base="b")
    policy = attach_existing(mixture(), tmp_path, trainable=True)
    attach_existing(policy, tmp_path, trainable=False, name="reference")
    with torch.no_grad():
        start = plain_logps(PeftModel.from_pretrained(tiny_mixture(), tmp_path).eval(), THREE)
    section = TrainingSection(pairs_per_step=3, learning_rate=1e-2, warmup=0)
    reports = list(take_steps(policy, THREE, section, DPO(), steps=3))
    assert reports[0].metrics["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert reports[2].metrics["loss"] < 0.6
    with torch.no_grad(), in_eval(policy), as_reference(policy):
        torch.testing.assert_close(columns(pair_logps(policy, pack(THREE))), start, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
def test_an_adapter_by_names_of_transformers_4_is_read_as_peft_reads_it(tmp_path: Path) -> None:
    """`gate_proj, up_proj, down_proj` of Qwen3-MoE: PEFT makes fused experts of them, of twice the rank for two."""
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"])
    plain = moved(get_peft_model(tiny_mixture(), config)).eval()
    plain.save_pretrained(tmp_path)
    policy = attach_existing(mixture(), tmp_path, trainable=True).eval()
    compare(policy, plain)


# What is refused


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"targets": ["gate"]}, "gate is a router"),
        ({"targets": ["experts", "mlp.gate"]}, "mlp.gate is a router"),
        ({"targets": ["gate_proj"]}, "a name that PEFT gives to this family's experts"),
        ({"kind": "dora"}, "adapter.kind: dora cannot be on the experts"),
        ({"dropout": 0.1}, "adapter.dropout cannot be on the experts"),
    ],
)
def test_what_cannot_be_adapted_is_refused_by_name(section: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        attach(tiny_mixture(), AdapterSection(**section), seed=0)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_an_adapter_from_elsewhere_on_a_router_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    """Plain PEFT's `all-linear` takes the router along."""
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["gate.weight"])
    get_peft_model(tiny_mixture(kind), config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"this adapter adapts a router \(model\.layers\.0\.mlp\.gate\)"):
        attach_existing(tiny_mixture(kind), tmp_path, trainable=False)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"r": 10**9},
            r"gives the experts of model\.layers\.0\.mlp\.experts the ranks .*1000000000.*, its tensors have",
        ),
        ({"rank_pattern": {"experts.down_proj": 10**9}}, r"gives the experts of .* the ranks .*1000000000"),
        ({"rank_pattern": {r".*\.down_proj": 10**9}}, r"gives the experts of .* the ranks .*1000000000"),
        ({"target_parameters": ["experts.down_proj"]}, r"gives the experts of .* the ranks \[3\]"),
        ({"target_parameters": None}, r"gives the experts of .* the ranks \[\]"),
        (
            {"target_parameters": None, "target_modules": ["gate_proj", "up_proj", "down_proj"], "r": 10**9},
            "1000000000",
        ),
        ({"target_parameters": None, "target_modules": ["gate_proj"]}, "without also targeting up_proj"),
        ({"target_parameters": ["experts.down_proj", "gate.weight"]}, "gate.weight, which is no projection of fused"),
        ({"target_parameters": ["a"] * 2000}, "more than 1,000 target parameters"),
        ({"target_parameters": "experts.down_proj"}, "which is not a list of names"),
    ],
    ids=str,
)
def test_settings_that_the_experts_tensors_do_not_bear_out_are_refused(
    change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    """PEFT would make matrices of a billion rows before it looks at the file."""
    policy = ours("qwen3_moe", targets=["experts"])
    save_adapter(policy, tmp_path, base="b")
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ModelError, match=words):
        attach_existing(tiny_mixture(), tmp_path, trainable=False)


# The product


def drawn(transposed: bool, dtype: torch.dtype) -> list[Tensor]:
    """x of 13 rows, five experts' weights, ends (one expert has no row), A and B of rank 3."""
    draw = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=draw).to(dtype)

    weight = random(5, 16, 24) if transposed else random(5, 24, 16).transpose(1, 2)
    ends = torch.tensor([4, 4, 9, 10, 13], dtype=torch.int32)
    x, down, up = random(13, 16), random(5, 3, 16), random(5, 24, 3)
    return [x.requires_grad_(), weight, ends, down.requires_grad_(), up.requires_grad_()]


def by_formula(x: Tensor, weight: Tensor, ends: Tensor, down: Tensor, up: Tensor) -> Tensor:
    starts = [0, *ends.tolist()]
    return torch.cat(
        [
            x[i:j] @ (weight[e] + (up[e] @ down[e]).t())
            for e, (i, j) in enumerate(zip(starts, ends.tolist(), strict=False))
        ]
    )


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_product_and_its_gradients_are_the_formula_s(
    transposed: bool, grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the loop in fp32, and by torch's grouped_mm in bf16, which a GPU takes and a CPU has too; rank 3 is padded."""
    dtype = torch.bfloat16 if grouped else torch.float32
    monkeypatch.setattr(expert_products, "in_groups", lambda *_: grouped)
    given, exact = (
        drawn(transposed, dtype),
        [
            x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
            for x in drawn(transposed, dtype)
        ],
    )
    results = []
    for compute, (x, weight, ends, down, up) in ((expert_products.expert_products, given), (by_formula, exact)):
        y = compute(x, weight, ends, down, up)
        total = (y.double() * torch.linspace(-1, 2, y.numel()).view_as(y)).sum()
        results.append([y, *torch.autograd.grad(total, [x, down, up])])
    for got, wanted in zip(*results, strict=True):
        limit = 2**-6 if grouped else 1e-5
        assert (got.double() - wanted).abs().max() < limit * wanted.abs().max()
    assert not results[0][2][1].any()  # the expert without rows


@pytest.mark.parametrize("grouped", [False, True])
def test_a_disabled_adapter_is_one_of_zeros_to_the_bit(grouped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_products, "in_groups", lambda *_: grouped)
    x, weight, ends, down, up = drawn(False, torch.bfloat16)
    zeros = expert_products.expert_products(x, weight, ends, down, torch.zeros_like(up))
    with adapter_disabled():
        off = expert_products.expert_products(x, weight, ends, down, up)
    assert torch.equal(off, zeros)
    assert torch.autograd.grad(off.sum(), up)[0].isnan().any()


def test_the_operator_keeps_torch_s_rules() -> None:
    torch.library.opcheck(torch.ops.dpo_studio.experts.default, tuple(drawn(False, torch.float32)))


def test_peft_s_own_wrapper_is_not_left(tmp_path: Path) -> None:
    policy = ours("mixtral")
    wrappers = [module for module in policy.modules() if isinstance(module, lora.ParamWrapper)]
    assert len(wrappers) == 4 and all(type(module) is LoraExperts for module in wrappers)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_compiled_layers_are_the_plain_ones_and_switch_off(kind: str) -> None:
    policy = moved(attach(tiny_mixture(kind, attn_implementation="sdpa"), AdapterSection(rank=4), seed=0)).eval()
    set_recompute(policy, "nothing")
    torch._dynamo.reset()
    expected = columns(pair_logps(policy, pack(THREE)))
    slopes = gradients(policy, expected.sum())
    with torch.no_grad(), as_reference(policy):
        off = columns(pair_logps(policy, pack(THREE)))
    with compiled_layers(policy):
        found = columns(pair_logps(policy, pack(THREE)))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        for name, slope in gradients(policy, found.sum()).items():
            largest = slopes[name].abs().max().item()
            torch.testing.assert_close(slope, slopes[name], rtol=0, atol=1e-3 * largest + 1e-9, msg=name)
        with torch.no_grad(), as_reference(policy):
            torch.testing.assert_close(columns(pair_logps(policy, pack(THREE))), off, rtol=1e-4, atol=1e-4)
