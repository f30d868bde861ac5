"""PEFT reads nothing of a stranger's adapter but tensors: its settings are looked at one by one, and of what they name
nothing is matched, imported or made larger than the tensors."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

from dpo_studio.errors import ModelError
from dpo_studio.models.adapter_settings import base_named_by, lora_settings, refuse_strange_lora
from dpo_studio.models.adapters import attach_existing, read_adapter_config
from tests.guard_words import words_of
from tests.tiny_models import tiny_model

FOR_EVER = "(.*)*(.*)*(.*)*_nothing"
"""An expression that takes longer than the sun to say no to a layer's name."""


@pytest.fixture
def adapter(tiny_run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_run / "adapter", tmp_path / "adapter")


def rewrite(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def attach(folder: Path) -> Any:
    return attach_existing(tiny_model(), folder, trainable=False)


def adapted(policy: Any) -> int:
    return sum(name.endswith("lora_A.default.weight") for name, _ in policy.named_parameters())


def refusal(act: Callable[[], object]) -> ModelError:
    with pytest.raises(ModelError) as refused:
        act()
    assert "\n" not in refused.value.message and len(refused.value.message) < 600
    return refused.value


@pytest.mark.parametrize(
    "change",
    [
        {"target_modules": "all-linear", "exclude_modules": FOR_EVER},
        {"target_modules": "ALL-LINEAR", "exclude_modules": FOR_EVER},
        {"target_modules": "all-linear", "exclude_modules": [FOR_EVER]},
        {"target_modules": ["q_proj"], "exclude_modules": FOR_EVER},
        {"target_modules": FOR_EVER, "exclude_modules": FOR_EVER},
        {"target_modules": "all-linear", "layers_pattern": FOR_EVER, "layers_to_transform": [0]},
        {"target_modules": ["q_proj"], "layers_pattern": [FOR_EVER], "layers_to_transform": 0},
        {"target_modules": None, "layers_pattern": FOR_EVER},
        {"layers_pattern": FOR_EVER},
    ],
    ids=words_of,
)
def test_no_expression_of_a_stranger_s_is_matched(adapter: Path, change: dict[str, Any]) -> None:
    """All 28 layers that have tensors, and no others, at once."""
    rewrite(adapter, **change)
    before = time.process_time()
    policy = attach(adapter)
    assert time.process_time() - before < 10
    assert adapted(policy) == 28


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize(
    "pattern", ["(a+)+b", ".*q_proj", "q_proj|k_proj", "[a-z]+", "q{1,9999}", "(?=a)", "q_proj$$x?"]
)
def test_no_pattern_is_an_expression(adapter: Path, key: str, pattern: str) -> None:
    rewrite(adapter, **{key: {pattern: 2}})
    assert f"{key} names layers by an expression" in refusal(lambda: attach(adapter)).message


def test_a_hundred_thousand_names_are_too_many(adapter: Path) -> None:
    names = [f"layer_{number}" for number in range(100_000)]
    rewrite(adapter, target_modules=names)
    before = time.process_time()
    assert "names 100,000 target modules, and has tensors for 28 layers" in refusal(lambda: attach(adapter)).message
    for key in ("rank_pattern", "alpha_pattern"):
        rewrite(adapter, target_modules=["q_proj"], rank_pattern={}, alpha_pattern={})
        rewrite(adapter, **{key: dict.fromkeys(names, 2)})
        assert f"{key} has 100,000 entries for 28 layers" in refusal(lambda: attach(adapter)).message
    assert time.process_time() - before < 10


def test_names_made_for_every_family_are_no_too_many(adapter: Path) -> None:
    """A list of names for any model; a layer it names and has no tensors for is still missed."""
    targets = json.loads((adapter / "adapter_config.json").read_text())["target_modules"]
    rewrite(adapter, target_modules=[*targets, *(f"layer_{number}" for number in range(1000))])
    assert adapted(attach(adapter)) == 28
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({key: value for key, value in tensors.items() if "layers.3.mlp.up_proj" not in key}, file)
    assert "2 tensors do not match" in refusal(lambda: attach(adapter)).message


def test_a_hundred_thousand_tensors_are_told_before_they_are_looked_for(adapter: Path) -> None:
    save_file(
        {f"base_model.model.x.{number}.lora_A.weight": torch.zeros(2, 1) for number in range(20_000)},
        adapter / "adapter_model.safetensors",
    )
    rewrite(adapter, target_modules="all-linear")
    before = time.process_time()
    assert "20000 tensors do not match the model's layers" in refusal(lambda: attach(adapter)).message
    assert time.process_time() - before < 10


# Settings that this PEFT does not know


@pytest.mark.parametrize("value", [None, [], {}, False, ""], ids=repr)
def test_an_unknown_setting_that_says_nothing_passes(adapter: Path, value: Any) -> None:
    """Older and newer versions of PEFT write theirs, switched off."""
    rewrite(adapter, some_later_kind_of_lora=value)
    assert adapted(attach(adapter)) == 28


@pytest.mark.parametrize("value", [True, 1, 0, 0.0, "x", " ", [0], {"a": None}, [None]], ids=repr)
def test_an_unknown_setting_that_says_something_is_refused_by_name_and_version(adapter: Path, value: Any) -> None:
    rewrite(adapter, some_later_kind_of_lora=value)
    error = refusal(lambda: attach(adapter))
    assert "adapter_config.json has some_later_kind_of_lora: " in error.message
    assert f"which PEFT {version('peft')} does not know" in error.message


KNOWN = LoraConfig().to_dict()


@pytest.mark.parametrize(
    "change",
    [
        {"megatron_config": {"a": 1}},
        {"runtime_config": {"ephemeral_gpu_offload": True}},
        {"monteclora_config": {"a": 1}},
        {"kasa_config": {"a": 1}},
        {"arrow_config": {"top_k": 3}},
        {"velora_config": {"a": 1}},
        {"use_bdlora": {"nblocks": 2}},
        {"use_qalora": True},
        {"lora_bias": True},
        {"alora_invocation_tokens": [1]},
        {"ensure_weight_tying": True},
    ],
    ids=words_of,
)
def test_every_other_kind_of_lora_that_peft_has_is_refused_by_name(adapter: Path, change: dict[str, Any]) -> None:
    rewrite(adapter, **change)
    assert next(iter(change)) in refusal(lambda: attach(adapter)).message


def test_peft_opens_no_settings(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for the first adapter, nor for a second beside it: it gets ours."""
    monkeypatch.setattr(LoraConfig, "from_pretrained", lambda *_, **__: pytest.fail("PEFT read the file"))
    policy = attach(adapter)
    assert attach_existing(policy, adapter, trainable=False, name="reference") is policy


def test_what_is_left_of_the_settings_computes_what_plain_peft_computes(adapter: Path) -> None:
    """With its own way of reading the same folder, on patterns of rank and alpha and rank-stabilised scaling."""
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    for key, value in tensors.items():
        if "layers.1.mlp.down_proj" in key:
            tensors[key] = value[:1].clone() if "lora_A" in key else value[:, :1].clone()
    save_file(tensors, file)
    rewrite(
        adapter,
        use_rslora=True,
        rank_pattern={"layers.1.mlp.down_proj": 1},
        alpha_pattern={r"^model\.layers\.2\.self_attn\.q_proj$": 3.5, "v_proj": 9},
    )
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        ours = attach(adapter)(ids).logits
        plain = PeftModel.from_pretrained(tiny_model(), adapter)(ids).logits
        bare = tiny_model()(ids).logits
    assert torch.allclose(ours, plain, atol=1e-5) and not torch.allclose(ours, bare, atol=1e-2)


# Values


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("r", 10**9),
        ("r", 3),
        ("r", 0),
        ("r", -1),
        ("r", "2"),
        ("r", True),
        ("r", 2.0),
        ("r", None),
        ("rank_pattern", {"q_proj": 10**9}),
        ("rank_pattern", {"q_proj": 0}),
        ("rank_pattern", {"q_proj": "2"}),
        ("rank_pattern", ["q_proj"]),
        ("rank_pattern", 7),
        ("alpha_pattern", {"q_proj": "x"}),
        ("alpha_pattern", {"q_proj": None}),
        ("lora_alpha", "4"),
        ("lora_alpha", None),
        ("lora_alpha", [4]),
        ("lora_alpha", True),
        ("lora_dropout", 1),
        ("lora_dropout", -0.1),
        ("lora_dropout", "0"),
        ("use_rslora", "yes"),
        ("fan_in_fan_out", 1),
        ("target_modules", 7),
        ("target_modules", [7]),
        ("target_modules", {"a": 1}),
        ("exclude_modules", 7),
        ("layers_to_transform", "x"),
        ("layers_to_transform", [1.5]),
        ("layers_to_transform", [0, True]),
        ("layers_pattern", [1]),
        ("init_lora_weights", ["x"]),
        ("init_lora_weights", 1),
        ("init_lora_weights", {"a": 1}),
        ("task_type", 7),
        ("task_type", "NOT_A_TASK"),
        ("peft_type", ["LORA"]),
        ("peft_type", {"a": "LORA"}),
        ("bias", 7),
        ("modules_to_save", 7),
    ],
    ids=words_of,
)
def test_a_value_of_the_wrong_kind_is_named(adapter: Path, key: str, value: Any) -> None:
    """Also a rank that is not the tensors': PEFT would make matrices of it first."""
    rewrite(adapter, **{key: value})
    refused = refusal(lambda: attach(adapter))
    assert str(adapter) in refused.message
    other_words = {"r": " rank ", "rank_pattern": " rank ", "peft_type": "only LoRA", "task_type": "NOT_A_TASK"}
    assert key in refused.message or other_words[key] in refused.message


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("modules_to_save", ["lm_head"], "has lm_head in modules_to_save, and there is no tensor of it"),
        ("modules_to_save", ["q_proj"], "q_proj is not the input embedding or the head of this model"),
        ("use_dora", True, "28 tensors do not match the model's layers, the first is .*lora_magnitude_vector"),
        ("trainable_token_indices", [1], "adapts rows of the embedding"),
    ],
)
def test_what_is_adapted_beside_the_layers_is_said(adapter: Path, key: str, value: Any, words: str) -> None:
    rewrite(adapter, **{key: value})
    assert re.search(words, refusal(lambda: attach(adapter)).message)


@pytest.mark.parametrize("value", ["Infinity", "NaN", "1e999", "1" + "0" * 400])
def test_numbers_that_are_none_are_refused(adapter: Path, value: str) -> None:
    file = adapter / "adapter_config.json"
    raw = json.loads(file.read_text()) | {"lora_alpha": 0.25}
    file.write_text(json.dumps(raw).replace('"lora_alpha": 0.25', f'"lora_alpha": {value}'))
    refusal(lambda: attach(adapter))


def test_each_type_is_looked_at_on_its_own() -> None:
    sound = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"]}
    refuse_strange_lora(sound, KNOWN, "a")
    wrong = {
        "r": "whole number",
        "lora_alpha": "a number",
        "lora_dropout": "a share",
        "use_rslora": "true or false",
        "fan_in_fan_out": "true or false",
        "rank_pattern": "ranks",
        "alpha_pattern": "alphas",
        "target_modules": "names",
        "exclude_modules": "names",
        "layers_pattern": "names",
        "layers_to_transform": "numbers",
        "task_type": "task",
    }
    for key, words in wrong.items():
        settings = sound | {key: 1.5 if key != "lora_alpha" else "x"}
        error = refusal(partial(refuse_strange_lora, settings, KNOWN, "a"))
        assert f"adapter_config.json has {key}: " in error.message and words in error.message


@pytest.mark.parametrize(
    ("key", "sound", "wrong"),
    [
        ("r", [1, 64], [0, -1, True, 2.0, "2", None, [2]]),
        ("lora_alpha", [4, 0.5, -1], [True, "4", None, float("inf"), float("nan"), [4]]),
        ("lora_dropout", [0, 0.5, 0.999], [1, -0.1, True, "0", None, float("nan")]),
        ("use_rslora", [True, False], [1, "yes", None]),
        ("rank_pattern", [None, {}, {"q": 2}], [{"q": 0}, {"q": True}, {"q": 2.0}, ["q"], 7, True, 0]),
        ("alpha_pattern", [None, {}, {"q": 0.5, "k": 2}], [{"q": "x"}, {"q": None}, {"q": True}, ["q"], 7]),
        ("target_modules", [None, "q", ["q", "k"], []], [7, [7], ["q", None], {"q": 1}, True]),
        ("layers_to_transform", [None, 0, [0, 1], []], ["x", [1.5], [0, True], True, ["x"], {"a": 1}]),
        ("task_type", [None, "CAUSAL_LM"], [7, ["CAUSAL_LM"], True]),
        ("init_lora_weights", [None, True, False, "gaussian", "orthogonal"], [1, 0, ["x"], {"a": 1}, "pissa", "x"]),
        ("some_later_kind", [None, [], {}, False, ""], [True, 1, 0, 0.0, "x", [0], {"a": None}]),
        ("bias", ["none"], ["all", 7, None]),
        ("use_dora", [True, False, None], [1, "x", [0]]),
        ("modules_to_save", [None, [], ["lm_head"]], [7, [7], "lm_head", {"a": 1}, True]),
        ("use_qalora", [False, None, 0, ""], [True, "x", [0]]),
        ("megatron_core", ["megatron.core", None, ""], ["another.module", True]),
    ],
)
def test_what_a_setting_may_be(key: str, sound: list[Any], wrong: list[Any]) -> None:
    """Each alone, beside a rank and a target that are sound."""
    base = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"]}
    for value in sound:
        refuse_strange_lora(base | {key: value}, KNOWN, "a")
    for value in wrong:
        assert key in refusal(partial(refuse_strange_lora, base | {key: value}, KNOWN, "a")).message, value


def test_a_rank_must_be_the_tensors() -> None:
    raw = {"r": 4, "rank_pattern": {"layers.1.q": 2}}
    made = lora_settings(raw, {"layers.0.q": 4, "layers.1.q": 2, "layers.11.q": 4, "embed": 0}, "a")
    assert made["r"] == 4 and made["target_modules"] == ["embed", "layers.0.q", "layers.1.q", "layers.11.q"]
    error = refusal(lambda: lora_settings(raw, {"layers.1.q": 4}, "a"))
    assert error.message == "a: adapter_config.json gives layers.1.q rank 2, its tensors have 4"
    assert lora_settings({}, {"q": 8}, "a")["target_modules"] == ["q"]


@pytest.mark.parametrize("key", ["auto_mapping", "peft_version", "inference_mode", "megatron_core", "exclude_modules"])
def test_what_names_a_library_or_an_expression_is_not_handed_to_peft(adapter: Path, key: str) -> None:
    value: dict[str, Any] = {
        "auto_mapping": {"parent_library": "evil", "base_model_class": "Evil"},
        "peft_version": "99",
        "inference_mode": "evil",
        "megatron_core": "megatron.core",
        "exclude_modules": FOR_EVER,
    }
    rewrite(adapter, **{key: value[key]})
    assert getattr(read_adapter_config(adapter), key) in (None, False, "megatron.core", version("peft"))


def test_a_base_s_name_is_short_in_a_message() -> None:
    error = refusal(lambda: base_named_by("../" + "x" * 10_000, None, "a"))
    assert len(error.message) < 300
