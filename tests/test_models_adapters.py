"""Our LoRA layer against PEFT's, and adapters that leave for plain PEFT and come back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from dpo_studio.config import AdapterSection, TrainingSection
from dpo_studio.errors import ModelError
from dpo_studio.learning.logprobs import pair_logps
from dpo_studio.learning.packing_check import check_packing
from dpo_studio.models.adapters import (
    adapter_state,
    as_reference,
    attach,
    attach_existing,
    in_eval,
    save_adapter,
    train_mode,
)
from dpo_studio.models.attention import PAIRS
from dpo_studio.models.lora import LoraLinear
from dpo_studio.objectives import DPO
from dpo_studio.tokens.pack import pack
from tests.pairs_of_ids import random_pairs
from tests.policies import moved, policy_on, take_steps
from tests.textbook import plain_logps
from tests.tiny_models import tiny_folder, tiny_model

EIGHT = random_pairs(8)
STEP = TrainingSection(pairs_per_step=8, learning_rate=1e-2, warmup=0)


def layers(dtype: torch.dtype, **settings: Any) -> tuple[Any, Any]:
    """The same adapted linear layer as ours and as PEFT's own: base in `dtype`, adapter in fp32."""
    torch.manual_seed(0)
    bias = settings.pop("bias", False)
    base, a, b = nn.Linear(12, 20, bias=bias), torch.randn(4, 12), torch.randn(20, 4)
    made = []
    for kind in (LoraLinear, lora.Linear):
        layer = nn.Linear(12, 20, bias=bias)
        layer.load_state_dict(base.state_dict())
        settings_ = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "init_lora_weights": False} | settings
        adapted = kind(
            layer.to(dtype), "default", LoraConfig(**settings_), **{k: settings_[k] for k in ("r", "lora_alpha")}
        )
        adapted.lora_A["default"].weight.data = a.clone()
        adapted.lora_B["default"].weight.data = b.clone()
        made.append(adapted)
    return made[0], made[1]


def run(layer: Any, x: Tensor) -> list[Tensor]:
    """Output and the gradients of x, A and B."""
    x = x.clone().requires_grad_()
    y = layer(x)
    weights = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    slopes = torch.autograd.grad((y.float() * torch.linspace(-1, 1, y.numel()).view_as(y)).sum(), [x, *weights])
    return [y, *slopes]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 12), (7, 12), (1, 7, 12), (2, 3, 5, 12)])
def test_our_layer_is_peft_s_in_fp32(shape: tuple[int, ...], bias: bool) -> None:
    ours, theirs = layers(torch.float32, bias=bias)
    x = torch.randn(shape)
    for got, expected in zip(run(ours, x), run(theirs, x), strict=True):
        assert got.shape == expected.shape
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [{"use_rslora": True}, {"r": 4, "lora_alpha": 3}])
def test_whatever_the_scale(settings: dict[str, Any]) -> None:
    """alpha / r = 0.75, alpha / sqrt(r) = 4."""
    ours, theirs = layers(torch.float32, **settings)
    if "use_rslora" in settings:
        for layer in (ours, theirs):
            layer.scaling["default"] = 4.0
    for got, expected in zip(run(ours, torch.ones(3, 12)), run(theirs, torch.ones(3, 12)), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_on_a_bfloat16_base_the_masters_stay_fp32_and_the_difference_is_rounding() -> None:
    """PEFT multiplies in fp32 and rounds once, we round the two small matrices: both within bf16 of the exact result.
    8 bits of mantissa: 2^-8 of the largest value, a few roundings deep."""
    ours, theirs = layers(torch.bfloat16)
    exact, _ = layers(torch.float32)
    exact.base_layer.weight.data = ours.base_layer.weight.data.float()
    x = torch.randn(50, 12).bfloat16()
    y, *slopes = run(ours, x)
    assert y.dtype == torch.bfloat16
    assert [slope.dtype for slope in slopes] == [torch.bfloat16, torch.float32, torch.float32]
    for got, peft_s, wanted in zip(run(ours, x), run(theirs, x), run(exact, x.float()), strict=True):
        largest = wanted.abs().max().item()
        assert (got.float() - wanted).abs().max() < 4 * 2**-8 * largest
        assert (peft_s.float() - wanted).abs().max() < 4 * 2**-8 * largest


def test_dropout_falls_on_the_adapter_s_input_alone() -> None:
    """The same seed drops the same inputs in ours and PEFT's; in eval nothing drops."""
    ours, theirs = layers(torch.float32, lora_dropout=0.5)
    for layer in (ours, theirs):
        layer.lora_dropout["default"] = nn.Dropout(0.5)
    x = torch.randn(6, 12)
    outputs = []
    for layer in (ours, theirs):
        torch.manual_seed(4)
        outputs.append(layer(x))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(outputs[0], ours(x))


def test_every_linear_layer_but_the_head_is_ours() -> None:
    policy = policy_on()
    adapted = {name for name, module in policy.named_modules() if isinstance(module, lora.LoraLayer)}
    assert len(adapted) == 4 * 7
    assert all(type(policy.get_submodule(name)) is LoraLinear for name in adapted)
    assert not any("lm_head" in name for name in adapted)


def test_a_fresh_adapter_is_drawn_from_its_seed_and_leaves_the_random_state_alone() -> None:
    def drawn(seed: int, noise: int) -> Mapping[str, Tensor]:
        model = tiny_model()
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        policy = attach(model, AdapterSection(rank=4, alpha=8), seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        return adapter_state(policy)

    one, same, other = drawn(0, 1), drawn(0, 2), drawn(1, 1)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one if "lora_A" in name)
    assert all(not p.any() for name, p in one.items() if "lora_B" in name)
    assert list(one) == list(same)


def test_the_adapter_of_a_bfloat16_base_is_fp32() -> None:
    policy = attach(tiny_model().bfloat16(), AdapterSection(rank=4), seed=0)
    assert {p.dtype for p in adapter_state(policy).values()} == {torch.float32}
    assert policy.get_base_model().lm_head.weight.dtype == torch.bfloat16


def test_targets_may_be_named_and_must_exist() -> None:
    policy = attach(tiny_model(), AdapterSection(rank=2, targets=["v_proj", "q_proj"]), seed=0)
    assert len(adapter_state(policy)) == 4 * 2 * 2
    with pytest.raises(ModelError) as refused:
        attach(tiny_model(), AdapterSection(targets=["query_proj"]), seed=0)
    assert "query_proj" in refused.value.message
    assert "this model's linear layers: down_proj, gate_proj, k_proj, lm_head" in str(refused.value.hint)


def test_an_adapter_on_the_head_is_refused() -> None:
    """Log-probs are read off the head's own weight, so it would never learn."""
    with pytest.raises(ModelError, match="head"):
        attach(tiny_model(), AdapterSection(targets=["q_proj", "lm_head"]), seed=0)


def saved(folder: Path, *, size: float = 0.1, architecture: str = "llama", base: str = "my/base") -> Path:
    save_adapter(policy_on(architecture, size=size), folder, base=base)
    return folder


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_plain_peft_loads_a_saved_adapter_and_says_the_same(tmp_path: Path, architecture: str) -> None:
    """Nothing of ours on the other side: transformers' model from its folder, PeftModel.from_pretrained."""
    base = tiny_folder(tmp_path / "base", architecture)
    saved(tmp_path / "adapter", architecture=architecture)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="float32"), tmp_path / "adapter")
    ids = torch.randint(3, 512, (1, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(
            plain.eval()(input_ids=ids).logits,
            policy_on(architecture)(input_ids=ids).logits,
            rtol=1e-4,
            atol=1e-4,
        )
    assert not any(isinstance(module, LoraLinear) for module in plain.modules())


def test_adapter_config_says_what_was_trained(tmp_path: Path) -> None:
    """The base as typed, targets short and sorted, nothing of this machine."""
    config = json.loads((saved(tmp_path, base="../my model") / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "../my model"
    assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert (config["r"], config["lora_alpha"], config["peft_type"], config["task_type"]) == (4, 8, "LORA", "CAUSAL_LM")
    assert config["inference_mode"] is True
    assert list(config) == sorted(config)
    assert "LoraLinear" not in json.dumps(config)


def test_targets_that_have_no_short_name_are_written_in_full(tmp_path: Path) -> None:
    """Only two layers' q_proj are adapted: `q_proj` would say all four."""
    targets = ["model.layers.0.self_attn.q_proj", "model.layers.2.self_attn.q_proj"]
    policy = attach(tiny_model(), AdapterSection(rank=2, targets=targets[::-1]), seed=0)
    save_adapter(policy, tmp_path, base="b")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == targets
    back = attach_existing(tiny_model(), tmp_path, trainable=False)
    assert sum(isinstance(module, LoraLinear) for module in back.modules()) == 2


def test_the_same_adapter_is_the_same_bytes_in_any_process(tmp_path: Path) -> None:
    """PEFT keeps its targets in a set, whose order hangs on PYTHONHASHSEED; this process has one, and that another."""
    code = (
        "import sys; from pathlib import Path; from tests.test_models_adapters import saved; saved(Path(sys.argv[1]))"
    )
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "there")], env=os.environ | {"PYTHONHASHSEED": seed}, check=True
    )
    saved(tmp_path / "here")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes()


def continued(folder: Path, **changes: Any) -> Any:
    """As `dpo train` does with `model.adapter`: the policy goes on from it, a frozen copy is the reference."""
    policy = attach_existing(tiny_model(attn_implementation=PAIRS).requires_grad_(False), folder, trainable=True)
    return attach_existing(policy, folder, trainable=False, name="reference")


def both(policy: Any) -> tuple[Tensor, Tensor]:
    """The policy's and its reference's log-probs, (P, 2) each."""
    with torch.no_grad(), in_eval(policy):
        one = pair_logps(policy, pack(EIGHT))
        with as_reference(policy):
            other = pair_logps(policy, pack(EIGHT))
    return torch.stack([one.chosen_P, one.rejected_P], 1), torch.stack([other.chosen_P, other.rejected_P], 1)


def test_an_adapter_that_is_continued_is_its_own_reference_frozen(tmp_path: Path) -> None:
    """At the start the policy IS the reference, and not the base; after three steps the policy has moved and the
    reference is where it was. The oracle is the plain model with PEFT's own layers."""
    saved(tmp_path)
    policy = continued(tmp_path)
    with torch.no_grad():
        start_P2 = plain_logps(PeftModel.from_pretrained(tiny_model(), tmp_path).eval(), EIGHT)
        base_P2 = plain_logps(tiny_model(), EIGHT)
    ours, reference = both(policy)
    assert torch.equal(ours, reference)
    torch.testing.assert_close(ours, start_P2, rtol=1e-4, atol=0)
    assert (ours - base_P2).abs().max() > 1
    reports = list(take_steps(policy, EIGHT, STEP, DPO(), steps=3))
    assert reports[0].metrics["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert reports[2].metrics["loss"] < 0.6
    after, still = both(policy)
    torch.testing.assert_close(still, start_P2, rtol=1e-4, atol=0)
    assert torch.equal(still, reference)
    assert (after - reference).abs().max() > 0.1


def test_only_the_policy_s_tensors_are_trained_and_saved(tmp_path: Path) -> None:
    """Also after the reference has been asked: switching adapters in PEFT switches what takes gradients."""
    policy = continued(saved(tmp_path / "start"))
    names = list(adapter_state(policy))
    assert len(names) == 56
    assert all(".default.weight" in name for name in names)
    both(policy)
    assert list(adapter_state(policy)) == names
    save_adapter(policy, tmp_path / "again", base="my/base")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "start" / name).read_bytes()


def test_a_fresh_adapter_s_reference_is_the_base() -> None:
    policy = policy_on(size=0.1, attn_implementation=PAIRS)
    with torch.no_grad():
        base_P2 = plain_logps(tiny_model(), EIGHT)
    ours, reference = both(policy)
    torch.testing.assert_close(reference, base_P2, rtol=1e-4, atol=0)
    assert (ours - reference).abs().max() > 1
    assert len(adapter_state(policy)) == 56


def test_a_continued_adapter_with_dropout_passes_the_check_of_its_packs(tmp_path: Path) -> None:
    """Without the frozen copy (the recipe names another reference) PEFT leaves its dropout on."""
    save_adapter(policy_on(dropout=0.5), tmp_path, base="b")
    policy = attach_existing(tiny_model(attn_implementation=PAIRS), tmp_path, trainable=True)
    assert check_packing(policy, EIGHT) < 1e-4


def test_training_mode_is_dropout_in_the_adapter_alone() -> None:
    policy = policy_on(dropout=0.5, attention_dropout=0.5)
    train_mode(policy)
    training = {name for name, module in policy.named_modules() if module.training}
    assert len(training) == 28
    assert all(name.endswith("lora_dropout.default") for name in training)
    with in_eval(policy):
        assert not any(module.training for module in policy.modules())
    assert {name for name, module in policy.named_modules() if module.training} == training
    with as_reference(policy):
        assert not any(module.training for module in policy.modules())
    assert {name for name, module in policy.named_modules() if module.training} == training


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"use_qalora": True}, "use_qalora"),
        ({"bias": "lora_only"}, "bias"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"lora_bias": True}, "lora_bias"),
    ],
)
def test_adapters_that_are_not_plain_lora_are_refused(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    config = json.loads((saved(tmp_path) / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(ModelError, match=f"only LoRA, rsLoRA and DoRA adapters can be used; this is .*{reason}"):
        attach_existing(tiny_model(), tmp_path, trainable=True)


def test_adapters_of_rows_of_the_embedding_are_refused_by_name(tmp_path: Path) -> None:
    config = json.loads((saved(tmp_path) / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"trainable_token_indices": [1, 2]}))
    with pytest.raises(ModelError, match=r"this adapter adapts .*embedding .*not supported"):
        attach_existing(tiny_model(), tmp_path, trainable=True)


@pytest.mark.parametrize(("target", "what"), [("lm_head", "the head"), ("embed_tokens", "the embedding")])
def test_plain_peft_s_adapter_on_the_head_or_the_embedding_is_refused_by_name(
    tmp_path: Path, target: str, what: str
) -> None:
    get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj", target])).save_pretrained(
        tmp_path, save_embedding_layers=False
    )
    with pytest.raises(ModelError, match=f"this adapter adapts {what}"):
        attach_existing(tiny_model(), tmp_path, trainable=True)


def tiny_mixture() -> Any:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 2}
    heads: dict[str, Any] = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    }
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, **heads)).eval()


def test_of_a_mixture_attention_and_experts_are_adapted_and_plain_peft_loads_it(tmp_path: Path) -> None:
    """Two layers of q, k, v, o and two projections of experts; what was left out is told; plain PEFT's logits."""
    said: list[str] = []
    base = tiny_mixture().requires_grad_(False)
    policy = moved(attach(base, AdapterSection(rank=2, alpha=4), seed=0, say=said.append)).eval()
    assert len(adapter_state(policy)) == 2 * (4 + 2) * 2
    assert len(said) == 1
    assert "4 projections of experts here. Left out: 2 routers; the load-balancing loss is not added" in said[0]
    save_adapter(policy, tmp_path, base="my/base")
    plain = PeftModel.from_pretrained(tiny_mixture(), tmp_path).eval()
    ids = torch.arange(20)[None]
    torch.testing.assert_close(policy(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("target", "what"), [("gate", "a router"), ("gate_proj", "experts")])
def test_targets_that_name_routers_or_halves_of_experts_are_refused_by_name(target: str, what: str) -> None:
    with pytest.raises(ModelError, match=rf"{target} is .*{what}"):
        attach(tiny_mixture(), AdapterSection(targets=["q_proj", target]), seed=0)


def test_pickled_adapters_are_refused_unread(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"no adapter_model\.safetensors") as refused:
        attach_existing(tiny_model(), tmp_path, trainable=True)
    assert "never loaded" in str(refused.value.hint)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"peft_type": "LORA", "r": "many"}'])
def test_a_broken_adapter_config_is_an_error_with_its_name(tmp_path: Path, content: str) -> None:
    (saved(tmp_path) / "adapter_config.json").write_text(content)
    with pytest.raises(ModelError, match=r"adapter"):
        attach_existing(tiny_model(), tmp_path, trainable=True)


def test_a_folder_without_an_adapter_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="contains no adapter"):
        attach_existing(tiny_model(), tmp_path, trainable=True)


@pytest.mark.parametrize(
    "other",
    [{"hidden_size": 16}, {"num_hidden_layers": 2}, {"num_hidden_layers": 6}, {"intermediate_size": 32}],
    ids=str,
)
def test_an_adapter_of_another_base_is_refused(tmp_path: Path, other: dict[str, Any]) -> None:
    """Other widths, fewer layers (tensors left over), more layers (tensors missing)."""
    saved(tmp_path)
    with pytest.raises(ModelError, match=r"do not match|does not fit") as refused:
        attach_existing(tiny_model(**other), tmp_path, trainable=True)
    assert "another base" in str(refused.value.hint)


@pytest.mark.parametrize("change", ["missing", "left over", "cut"])
def test_a_damaged_adapter_is_refused(tmp_path: Path, change: str) -> None:
    file = saved(tmp_path) / "adapter_model.safetensors"
    tensors = load_file(file)
    if change == "missing":
        tensors.pop(min(tensors))
    elif change == "left over":
        tensors["base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"] = torch.zeros(4, 32)
    save_file(tensors, file, metadata={"format": "pt"})
    if change == "cut":
        os.truncate(file, file.stat().st_size - 100)
    with pytest.raises(ModelError):
        attach_existing(tiny_model(), tmp_path, trainable=True)


def test_plain_peft_trains_on_from_what_we_saved(tmp_path: Path) -> None:
    """And the other way round: an adapter that PEFT itself saved is continued by us, log-probs unchanged."""
    theirs = moved(get_peft_model(tiny_model(), LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "up_proj"])))
    theirs.save_pretrained(tmp_path)
    ours = attach_existing(tiny_model(attn_implementation=PAIRS), tmp_path, trainable=True)
    with torch.no_grad(), in_eval(ours):
        got = pair_logps(ours, pack(EIGHT))
        expected_P2 = plain_logps(theirs.eval(), EIGHT)
    torch.testing.assert_close(torch.stack([got.chosen_P, got.rejected_P], 1), expected_P2, rtol=1e-4, atol=0)
