"""That a saved adapter is what plain PEFT loads, and that one which is not is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import LagunaConfig, LagunaForCausalLM

from dpo_studio.config import AdapterSection
from dpo_studio.errors import ModelError
from dpo_studio.models import targets
from dpo_studio.models.adapters import attach, attach_existing, save_adapter
from dpo_studio.models.targets import all_linear
from dpo_studio.policy.adapter_check import verify_adapter, verify_trial_adapter
from tests.pairs_of_ids import random_pairs
from tests.policies import moved, policy_on
from tests.textbook import plain_logps
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import VOCABULARY

WEIGHTS = "adapter_model.safetensors"
Q_A = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
Q_B = Q_A.replace("lora_A", "lora_B")


def laguna() -> Any:
    """A mixture whose `shared_expert` transformers renames to `shared_experts` while PEFT loads."""
    torch.manual_seed(0)
    config = LagunaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,
    )
    return LagunaForCausalLM(config).eval()


def saved(folder: Path, policy: Any = None) -> Any:
    """A policy whose adapter does something, saved."""
    policy = policy or policy_on()
    save_adapter(policy, folder, base="my/base")
    verify_adapter(policy, folder)
    return policy


def change(folder: Path, **tensors: Any) -> None:
    """Write the file again with tensors changed; None takes one out."""
    there = load_file(folder / WEIGHTS) | tensors
    save_file({name: value for name, value in there.items() if value is not None}, folder / WEIGHTS)


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "gemma3", "stablelm"])
def test_a_trial_is_proven_and_leaves_the_policy_and_the_random_state_as_they_were(
    tmp_path: Path, architecture: str
) -> None:
    policy = attach(tiny_model(architecture), AdapterSection(rank=4), seed=0)
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    torch.manual_seed(7)
    expected = torch.randn(5)
    torch.manual_seed(7)
    verify_trial_adapter(policy, tmp_path, base="my/base")
    assert torch.equal(torch.randn(5), expected)
    after = dict(policy.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(tensor.count_nonzero() for tensor in load_file(tmp_path / WEIGHTS).values())


@pytest.mark.parametrize("rest", ["bfloat16", "continued"])
def test_adapters_of_bfloat16_bases_and_continued_ones_are_proven(tmp_path: Path, rest: str) -> None:
    if rest == "bfloat16":
        policy = attach(tiny_model().bfloat16(), AdapterSection(rank=4), seed=0)
    else:
        saved(tmp_path / "start")
        policy = attach_existing(tiny_model(), tmp_path / "start", trainable=True)
        policy = attach_existing(policy, tmp_path / "start", trainable=False, name="reference")
    verify_trial_adapter(policy, tmp_path / "trial", base="my/base")
    saved(tmp_path / "end", policy)


def test_a_layer_lost_from_the_file_is_caught(tmp_path: Path) -> None:
    policy = saved(tmp_path)
    change(tmp_path, **{Q_A: None, Q_B: None})
    with pytest.raises(ModelError, match=f"its file lacks the tensor {Q_A}"):
        verify_adapter(policy, tmp_path)


def test_a_tensor_under_another_name_is_caught(tmp_path: Path) -> None:
    policy = saved(tmp_path)
    change(tmp_path, **{Q_A: None, Q_A.replace("q_proj", "query"): load_file(tmp_path / WEIGHTS)[Q_A]})
    with pytest.raises(ModelError, match=r"its file also has the tensor .*query|its file lacks the tensor .*q_proj"):
        verify_adapter(policy, tmp_path)


def test_a_wrong_value_is_caught(tmp_path: Path) -> None:
    policy = saved(tmp_path)
    value = load_file(tmp_path / WEIGHTS)[Q_B]
    value[-1, -1] += 1e-6
    change(tmp_path, **{Q_B: value})
    with pytest.raises(ModelError, match=f"the tensor {Q_B} differs from the trained one"):
        verify_adapter(policy, tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora_alpha": 16}, "scales .*q_proj by 4.0, where this training has 2.0"),
        ({"use_rslora": True}, "scales .*q_proj by 4.0, where this training has 2.0"),
        ({"target_modules": ["q_proj", "k_proj", "v_proj"]}, "has no place for the tensor .*down_proj"),
        (
            {
                "target_modules": [
                    "q_proj",
                    "k_proj",
                    "v_proj",
                    "o_proj",
                    "gate_proj",
                    "up_proj",
                    "down_proj",
                    "lm_head",
                ]
            },
            "adapts too many layers, the first is lm_head",
        ),
        ({"r": 2}, "it refuses the adapter: .*size mismatch"),
    ],
)
def test_settings_that_plain_peft_would_compute_otherwise_are_caught(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    policy = saved(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ModelError, match=words):
        verify_adapter(policy, tmp_path)


def test_all_linear_leaves_out_what_peft_would_not_find_again(tmp_path: Path) -> None:
    """Plain PEFT says what the trained model says, on a base made anew."""
    meant = all_linear(laguna())
    assert meant.lost == [f"model.layers.1.mlp.shared_experts.{name}_proj" for name in ("down", "gate", "up")]
    assert "that PEFT would not find again" in (meant.words() or "")
    policy = moved(attach(laguna(), AdapterSection(rank=4), seed=0)).eval()
    verify_trial_adapter(policy, tmp_path / "trial", base="my/base")
    saved(tmp_path / "adapter", policy)
    plain = PeftModel.from_pretrained(laguna(), tmp_path / "adapter").eval()
    pairs = random_pairs(2)
    with torch.no_grad():
        torch.testing.assert_close(plain_logps(plain, pairs), plain_logps(policy, pairs), rtol=1e-5, atol=1e-4)


def test_a_layer_that_peft_would_not_find_again_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match=r"up_proj is model.layers.1.mlp.shared_experts.up_proj too"):
        attach(laguna(), AdapterSection(targets=["q_proj", "up_proj"]), seed=0)


def test_what_the_look_at_names_would_miss_the_proof_catches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT says nothing of it: the layers keep what they were made with."""
    monkeypatch.setattr(targets, "_lost", lambda _model, _names: set())
    policy = moved(attach(laguna(), AdapterSection(rank=4), seed=0))
    with pytest.raises(ModelError, match=r"it loads another tensor than was saved as .*shared_experts\.down_proj"):
        verify_trial_adapter(policy, tmp_path / "trial", base="my/base")
    save_adapter(policy, tmp_path / "adapter", base="my/base")
    with pytest.raises(ModelError, match=r"shared_experts\.down_proj"):
        verify_adapter(policy, tmp_path / "adapter")
