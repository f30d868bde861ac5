"""rsLoRA, DoRA, patterns and modules trained whole, against plain PEFT on the plain model: values, gradients, files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from peft.tuners import lora
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from dpo_studio.config import AdapterSection, TrainingSection
from dpo_studio.errors import ModelError
from dpo_studio.export.merge import adapter_deltas, merge, save_plain
from dpo_studio.frozen.gptq import Packed
from dpo_studio.frozen.linear import FrozenLinear, frozen_weight
from dpo_studio.learning.logprobs import pair_logps
from dpo_studio.learning.packing_check import check_packing
from dpo_studio.learning.state import TrainingState
from dpo_studio.models import dora
from dpo_studio.models.adapters import (
    adapter_state,
    as_reference,
    attach,
    attach_existing,
    in_eval,
    save_adapter,
    saved_tensors,
    train_mode,
)
from dpo_studio.models.attention import PAIRS
from dpo_studio.models.dora import keep_norms
from dpo_studio.models.layers import compiled_layers, set_recompute
from dpo_studio.models.lora import LoraLinear
from dpo_studio.objectives import DPO
from dpo_studio.policy.policy import Policy
from dpo_studio.tokens.pack import pack
from tests.pairs_of_ids import random_pairs
from tests.policies import take_steps
from tests.textbook import columns, gradients, plain_logps
from tests.tiny_models import tiny_folder, tiny_model

THREE = random_pairs(3)
BOTH = ["embed_tokens", "lm_head"]
Kind = tuple[str, dict[str, Any], dict[str, Any]]
KINDS: list[Kind] = [
    ("llama", {"kind": "rslora"}, {"use_rslora": True}),
    ("llama", {"kind": "dora"}, {"use_dora": True}),
    ("qwen2", {"kind": "dora"}, {"use_dora": True}),
    (
        "llama",
        {"kind": "rslora", "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 8}, "alpha_pattern": {"up_proj": 5.0}},
        {
            "use_rslora": True,
            "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 8},
            "alpha_pattern": {"up_proj": 5.0},
        },
    ),
    ("llama", {"modules_to_save": BOTH}, {"modules_to_save": BOTH}),
    ("llama-tied", {"modules_to_save": ["lm_head"]}, {"modules_to_save": ["lm_head"]}),
    ("llama-tied", {"modules_to_save": ["embed_tokens"]}, {"modules_to_save": ["embed_tokens"]}),
    ("gemma3", {"kind": "dora", "modules_to_save": BOTH}, {"use_dora": True, "modules_to_save": BOTH}),
    ("gemma2", {"modules_to_save": ["lm_head"]}, {"modules_to_save": ["lm_head"]}),
    ("cohere", {"modules_to_save": ["model.embed_tokens"]}, {"modules_to_save": ["model.embed_tokens"]}),
]
PLAIN_WARNING = "ignore:Model has `tie_word_embeddings=True`:UserWarning"


def name_of(kind: Kind) -> str:
    architecture, section, _ = kind
    return "-".join([architecture, *map(str, (key if key != "kind" else value for key, value in section.items()))])


def moved(policy: Any, seed: int = 0) -> Any:
    """Every trained tensor is elsewhere; magnitudes and whole modules near where they began."""
    draw = torch.Generator().manual_seed(seed)
    for name, p in sorted(adapter_state(policy).items()):
        noise = torch.randn(p.shape, generator=draw)
        p.detach().copy_(p * (1 + 0.2 * noise) if "lora" not in name or "magnitude" in name else 0.1 * noise)
    return policy


def ours(kind: Kind, **changes: Any) -> Any:
    architecture, section, _ = kind
    model = tiny_model(architecture, attn_implementation=PAIRS, **changes).requires_grad_(False)
    return moved(attach(model, AdapterSection(rank=4, alpha=8, **section), seed=0)).eval()


def plain_twin(kind: Kind, policy: Any) -> Any:
    """The same numbers in PEFT's own layers on transformers' own model."""
    architecture, _, settings = kind
    model = tiny_model(architecture, attn_implementation="eager")
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **settings)
    plain = get_peft_model(model, config)
    tensors = dict(policy.named_parameters())
    for name, p in plain.named_parameters():
        if name in tensors:
            p.data = tensors[name].data.clone()
        else:  # a bound weight is named once
            assert not p.requires_grad, name
    assert not any(isinstance(module, LoraLinear) for module in plain.modules())
    return plain.eval()


@pytest.mark.filterwarnings(PLAIN_WARNING)
@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_log_probs_and_gradients_are_plain_peft_s(kind: Kind) -> None:
    """fp32, packed against one sequence at a time: 1e-4 relative; what is trained is the same set of tensors."""
    policy = ours(kind)
    plain = plain_twin(kind, policy)
    assert adapter_state(policy).keys() == adapter_state(plain).keys()
    weights_P2 = torch.linspace(-1, 2, 6).view(3, 2)
    found = columns(pair_logps(policy, pack(THREE)))
    expected = plain_logps(plain, THREE)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    mine, theirs = (gradients(m, (x * weights_P2).sum()) for m, x in ((policy, found), (plain, expected)))
    for name, slope in theirs.items():
        largest = slope.abs().max().item()
        assert largest > 0, name
        assert (mine[name] - slope).abs().max().item() < 1e-4 * largest, name


@pytest.mark.filterwarnings(PLAIN_WARNING)
@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_saved_it_is_plain_peft_s_and_from_there_it_comes_back(kind: Kind, tmp_path: Path) -> None:
    """PeftModel.from_pretrained says the same; what it saves again is read by us, and says the same too."""
    base = tiny_folder(tmp_path / "base", kind[0])
    policy = ours(kind)
    save_adapter(policy, tmp_path / "adapter", base="my/base")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="float32"), tmp_path / "adapter")
    with torch.no_grad():
        expected = plain_logps(plain.eval(), THREE)
        torch.testing.assert_close(columns(pair_logps(policy, pack(THREE))), expected, rtol=1e-4, atol=1e-4)
        plain.save_pretrained(tmp_path / "again", save_embedding_layers=False)
        back = attach_existing(tiny_model(kind[0], attn_implementation=PAIRS), tmp_path / "again", trainable=True)
        torch.testing.assert_close(columns(pair_logps(back.eval(), pack(THREE))), expected, rtol=1e-4, atol=1e-4)
    assert adapter_state(back).keys() == adapter_state(policy).keys()
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    for key, value in kind[2].items():
        assert config[key] == ([one.rpartition(".")[2] for one in value] if key == "modules_to_save" else value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_a_fresh_adapter_computes_its_reference_to_the_bit_and_the_reference_stays(
    kind: Kind, dtype: torch.dtype
) -> None:
    """Law 1; and whatever becomes of the adapter, the reference is the base, its head's own rows with it."""
    model = tiny_model(kind[0], attn_implementation=PAIRS).requires_grad_(False).to(dtype)
    with torch.no_grad():
        bare = columns(pair_logps(model, pack(THREE)))
    policy = attach(model, AdapterSection(rank=4, alpha=8, **kind[1]), seed=0)
    with torch.no_grad():
        here = columns(pair_logps(policy, pack(THREE)))
        with as_reference(policy):
            there = columns(pair_logps(policy, pack(THREE)))
        moved(policy)
        after = columns(pair_logps(policy, pack(THREE)))
        with as_reference(policy):
            still = columns(pair_logps(policy, pack(THREE)))
    assert torch.equal(here, there) and torch.equal(there, still)
    torch.testing.assert_close(there, bare, rtol=1e-5 if dtype == torch.float32 else 0.05, atol=1e-3)
    assert (after - still).abs().max() > 0.1
    assert {p.dtype for p in adapter_state(policy).values()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [KINDS[1], KINDS[4], KINDS[5], KINDS[7]], ids=name_of)
def test_the_check_at_the_start_passes_and_restores_everything(kind: Kind, dtype: torch.dtype) -> None:
    """Against PEFT's own forward with noise in magnitudes and whole modules, in fp32 and as bf16 explains."""
    model = tiny_model(kind[0], attn_implementation=PAIRS).requires_grad_(False).to(dtype)
    policy = attach(model, AdapterSection(rank=4, alpha=8, **kind[1]), seed=0)
    before = {name: p.clone() for name, p in policy.named_parameters()}
    assert check_packing(policy, random_pairs(6)) < (1e-4 if dtype == torch.float32 else 0.2)
    assert all(torch.equal(before[name], p) for name, p in policy.named_parameters())


@pytest.mark.parametrize("kind", [KINDS[1], KINDS[7]], ids=name_of)
def test_a_reference_adapter_of_these_kinds_is_frozen_beside_the_policy(kind: Kind, tmp_path: Path) -> None:
    """`model.adapter`: a frozen copy is the reference. It says what plain PEFT says of the folder, also afterwards."""
    save_adapter(ours(kind), tmp_path, base="b")
    base = tiny_model(kind[0], attn_implementation=PAIRS).requires_grad_(False)
    policy = attach_existing(base, tmp_path, trainable=True)
    attach_existing(policy, tmp_path, trainable=False, name="reference")
    names = set(adapter_state(policy))
    assert names and not any(".reference." in name for name in names)
    with torch.no_grad(), in_eval(policy):
        start = columns(pair_logps(policy, pack(THREE)))
        moved(policy, seed=5)
        with as_reference(policy):
            reference = columns(pair_logps(policy, pack(THREE)))
        plain = PeftModel.from_pretrained(tiny_model(kind[0]), tmp_path).eval()
        torch.testing.assert_close(reference, plain_logps(plain, THREE), rtol=1e-4, atol=1e-4)
        assert torch.equal(start, reference)
        assert (columns(pair_logps(policy, pack(THREE))) - reference).abs().max() > 0.1
    assert set(adapter_state(policy)) == names


@pytest.mark.parametrize("kind", [KINDS[1], *KINDS[3:8]], ids=name_of)
def test_merged_it_is_a_plain_model_that_says_the_same(kind: Kind, tmp_path: Path) -> None:
    """Saved, loaded by transformers alone; fp32 keeps all. A tied head that was not trained is the base's."""
    source = tiny_folder(tmp_path / "source", kind[0])
    policy = ours(kind)
    with torch.no_grad():
        expected = columns(pair_logps(policy, pack(THREE)))
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype="float32")
    (tmp_path / "out").mkdir()
    merge(model, adapter_deltas(policy), torch.float32)
    save_plain(model, tmp_path / "out", source=source, template=None)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="float32").eval()
    with torch.no_grad():
        torch.testing.assert_close(plain_logps(back, THREE), expected, rtol=1e-4, atol=1e-4)


# DoRA


def dora_layers(bias: bool, dropout: float = 0.0, packed: bool = False) -> tuple[Any, Any]:
    """The same DoRA layer as ours and as PEFT's own; `packed`: ours has 4 bits, PEFT's has them dequantised."""
    draw = torch.Generator().manual_seed(0)
    words = torch.randint(-(2**31), 2**31 - 1, (20, 4), generator=draw).to(torch.int32)
    frozen = Packed(words, torch.rand(20, 1, generator=draw).half() / 4, torch.full((20, 1), 8).byte(), None, 4, 32)
    b = torch.randn(20, generator=draw) if bias else None
    made = []
    for kind in (LoraLinear, lora.Linear):
        layer: Any = nn.Linear(32, 20, bias=bias)
        layer.weight.data = frozen.dequantised(torch.float32).clone()
        if b is not None:
            layer.bias.data = b.clone()
        if packed and kind is LoraLinear:
            layer = FrozenLinear(frozen, b)
        layer.requires_grad_(False)
        config = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, use_dora=True, init_lora_weights=False)
        adapted: Any = kind(layer, "default", config=config, r=4, lora_alpha=8)
        numbers = torch.Generator().manual_seed(1)
        for part in (adapted.lora_A, adapted.lora_B):
            part["default"].weight.data = torch.randn(part["default"].weight.shape, generator=numbers)
        adapted.lora_magnitude_vector["default"].weight.data = torch.rand(20, generator=numbers) + 0.5
        made.append(adapted)
    keep_norms(made[0], torch.float32)
    return made[0], made[1]


def values_and_slopes(layer: Any, x: Tensor, seed: int = 3) -> list[Tensor]:
    """Output, and the gradients in x, A, B and m."""
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)
    y = layer(x)
    parts = (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector)
    slopes = torch.autograd.grad(
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum(), [x, *(part["default"].weight for part in parts)]
    )
    return [y, *slopes]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("bias", [False, True])
def test_a_dora_layer_is_peft_s(bias: bool, dropout: float, packed: bool) -> None:
    """Over GPTQ too: the norm is of the dequantised weight. With dropout PEFT drops inputs of the magnitude's part."""
    mine, theirs = dora_layers(bias, dropout, packed)
    x = torch.randn(2, 5, 32)
    for got, expected in zip(values_and_slopes(mine, x), values_and_slopes(theirs, x), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [KINDS[1], KINDS[7]], ids=name_of)
def test_four_steps_are_those_of_plain_peft_and_norms_are_computed_once_a_step(
    kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two micro-batches a step; PEFT computes the norm in every forward pass. Losses to 1e-4, weights to 1e-3."""
    pairs = random_pairs(4)
    policy = ours(kind)
    plain, base = plain_twin(kind, policy), tiny_model(kind[0])
    counted: list[Any] = []

    def counting(base: Any) -> Any:
        counted.append(base)
        return frozen_weight(base)

    monkeypatch.setattr(dora, "frozen_weight", counting)
    section = TrainingSection(pairs_per_step=4, learning_rate=1e-2, schedule="constant", warmup=0, clip=None)
    reports = list(take_steps(policy, pairs, section, DPO(), steps=4, budget=60))
    assert len(counted) == 4 * 28  # 28 layers, in the first step too: `ours` has moved them
    with torch.no_grad():
        reference_P2 = plain_logps(base, pairs)
    optimizer = torch.optim.AdamW(list(adapter_state(plain).values()), lr=1e-2, weight_decay=0)
    for report in reports:
        ratio_P2 = plain_logps(plain, pairs) - reference_P2
        loss = -nn.functional.logsigmoid(0.1 * (ratio_P2[:, 0] - ratio_P2[:, 1])).mean()
        assert report.metrics["loss"] == pytest.approx(loss.item(), abs=1e-4)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    for name, p in adapter_state(plain).items():
        torch.testing.assert_close(dict(policy.named_parameters())[name], p, rtol=1e-3, atol=1e-3)


def test_the_dora_operator_keeps_torch_s_rules() -> None:
    """torch's own examination, and compiled layers compute what eager ones do."""
    z, gain = torch.randn(3, 5, 8, requires_grad=True), torch.rand(8, requires_grad=True)
    torch.library.opcheck(torch.ops.dpo_studio.dora.default, (z, gain))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_dora_layers_are_the_plain_ones_and_switch_off() -> None:
    policy = moved(attach(tiny_model(), AdapterSection(rank=4, kind="dora"), seed=0)).eval()
    set_recompute(policy, "nothing")
    torch._dynamo.reset()
    with torch.no_grad(), as_reference(policy):
        expected_off = columns(pair_logps(policy, pack(THREE)))
    expected = columns(pair_logps(policy, pack(THREE)))
    slopes = gradients(policy, expected.sum())
    with compiled_layers(policy):
        found = columns(pair_logps(policy, pack(THREE)))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        for name, slope in gradients(policy, found.sum()).items():
            torch.testing.assert_close(slope, slopes[name], rtol=1e-3, atol=1e-3)
        with torch.no_grad(), as_reference(policy):
            torch.testing.assert_close(columns(pair_logps(policy, pack(THREE))), expected_off, rtol=1e-4, atol=1e-4)


# LoRA+


def test_lora_plus_is_peft_s_optimizer() -> None:
    """Five steps of gradients drawn at random, with DoRA's magnitudes and a whole head; without a ratio it differs."""
    kind = KINDS[7]
    section = TrainingSection(learning_rate=1e-2, schedule="constant", warmup=0, clip=None)
    results = []
    for ratio in (16.0, None):
        policy = Policy(ours(kind))
        state = TrainingState.fresh(policy, section, 5, learning_rate_ratio=ratio)
        for step in range(5):
            give_gradients(policy.model, step)
            state.advance(policy)
        results.append({name: p.detach().clone() for name, p in policy.trained.items()})
        assert state.last["learning_rate"] == 1e-2
    plain = ours(kind)
    optimizer = create_loraplus_optimizer(plain, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=16.0)
    for step in range(5):
        give_gradients(plain, step)
        optimizer.step()
    for name, p in adapter_state(plain).items():
        torch.testing.assert_close(results[0][name], p.detach(), rtol=1e-5, atol=1e-6)
        assert torch.allclose(results[0][name], results[1][name]) == (".lora_B." not in name and p.ndim > 1)


def give_gradients(policy: Any, step: int) -> None:
    draw = torch.Generator().manual_seed(step)
    for _, p in sorted(adapter_state(policy).items()):
        p.grad = torch.randn(p.shape, generator=draw)


# What is refused


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"modules_to_save": ["q_proj"]}, "q_proj is not the input embedding or the head"),
        ({"modules_to_save": ["norm"]}, "norm is not the input embedding or the head"),
        ({"modules_to_save": ["nosuch"]}, "nosuch is not the input embedding or the head"),
        ({"rank_pattern": {"w1": 3}}, "adapter.rank_pattern: no adapted layer is called w1"),
        ({"alpha_pattern": {"proj": 3.0}}, "adapter.alpha_pattern: no adapted layer is called proj"),
    ],
)
def test_what_fits_nothing_is_refused_by_name(section: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        attach(tiny_model(), AdapterSection(**section), seed=0)


def test_a_packed_head_is_not_trained_whole() -> None:
    model: Any = tiny_model()
    mine, _ = dora_layers(False, packed=True)
    model.lm_head = mine.base_layer
    with pytest.raises(ModelError, match="lm_head cannot be trained whole: its weight is packed"):
        attach(model, AdapterSection(modules_to_save=["lm_head"]), seed=0)


def test_only_the_adapter_s_dropout_is_on_in_training_whatever_the_kind() -> None:
    policy = ours(("llama", {"kind": "dora", "dropout": 0.5, "modules_to_save": BOTH}, {}))
    train_mode(policy)
    assert all(name.endswith("lora_dropout.default") for name, module in policy.named_modules() if module.training)


def test_saved_names_are_those_of_peft_s_file(tmp_path: Path) -> None:
    policy = ours(KINDS[7])
    policy.save_pretrained(tmp_path, save_embedding_layers=False)
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == set(saved_tensors(policy))
