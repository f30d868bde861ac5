"""What transformers and tokenizers read of a stranger's folder is for us to say: no setting of it leads elsewhere, asks
for code, or for more memory than its weights have."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from dpo_studio.config import ModelSection
from dpo_studio.errors import ModelError
from dpo_studio.evaluation.reward_model import load_reward_model
from dpo_studio.export.merge import save_plain
from dpo_studio.models.fingerprint import weights_fingerprint
from dpo_studio.models.folder import open_model
from dpo_studio.models.load import load_chat_model
from dpo_studio.models.tokenizer_settings import load_encoder, read_tokenizer
from dpo_studio.scan import scan_folder, template_text, weights_of
from dpo_studio.sizes import check_model_size, check_numbers, tensor_shapes
from tests.guard_words import words_of
from tests.tiny_models import tiny_folder
from tests.tiny_runs import dpo


@pytest.fixture
def model(tiny_base: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_base, tmp_path / "model")


def rewrite(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | changes))


def load(folder: Path) -> Any:
    return load_chat_model(ModelSection(path=str(folder), dtype="float32"))


def refusal(act: Callable[[], object]) -> ModelError:
    with pytest.raises(ModelError) as refused:
        act()
    assert "\n" not in refused.value.message and len(refused.value.message) < 700
    return refused.value


# What is loaded


LEADS_ELSEWHERE: list[tuple[str, dict[str, Any]]] = [
    ("config.json", {"transformers_weights": "x.safetensors.index.json"}),
    ("config.json", {"transformers_weights": "adapter_model.bin"}),
    ("config.json", {"transformers_weights": "other.safetensors"}),
    ("config.json", {"text_config": {"transformers_weights": "x.safetensors.index.json"}}),
    ("config.json", {"configuration_files": ["config.4.0.0.json"]}),
    ("config.json", {"configuration_files": ["../config.1.json"]}),
    ("config.json", {"gguf_file": "x.gguf"}),
    ("config.json", {"fusion_config": {"patch_embeddings": True}}),
    ("config.json", {"kernel_config": {"kernel_mapping": {"RMSNorm": "someone/kernel:Norm"}}}),
    ("config.json", {"distributed_config": {"tp_size": 2}}),
    ("config.json", {"text_config": {"quantization_config": {"quant_method": "quark"}}}),
    ("config.json", {"vision_config": {"compression_config": {"quant_method": "x"}}}),
    ("generation_config.json", {"transformers_weights": "x"}),
    ("tokenizer_config.json", {"fast_tokenizer_files": ["tokenizer.1.0.json"]}),
    ("tokenizer_config.json", {"fast_tokenizer_files": ["../../tokenizer.1.json"]}),
    ("tokenizer_config.json", {"init_inputs": ["/etc/passwd"]}),
    ("tokenizer_config.json", {"tokenizer_object": "x"}),
    ("tokenizer_config.json", {"sp_model_kwargs": {"model_file": "/etc/passwd"}}),
    ("tokenizer_config.json", {"mecab_kwargs": {"mecab_option": "-r /etc/passwd"}}),
    ("tokenizer_config.json", {"sudachi_kwargs": {"sudachi_config_path": "/etc/passwd"}}),
    ("tokenizer_config.json", {"jumanpp_kwargs": {"jumanpp_command": "x"}}),
]


@pytest.mark.parametrize(("file", "change"), LEADS_ELSEWHERE, ids=words_of)
def test_a_setting_that_says_what_is_loaded_is_refused_by_name(model: Path, file: str, change: dict[str, Any]) -> None:
    """transformers would follow each: to an index nobody scanned, another config, a file outside of the folder."""
    rewrite(model / file, **change)
    error = refusal(lambda: load(model))
    ((outer, inner),) = change.items()
    named = next(iter(inner)) if outer in ("text_config", "vision_config", "sp_model_kwargs") else outer
    assert error.message.startswith(f"{model}: {file} ") and named in error.message


def test_such_a_setting_is_named_wherever_it_stands(model: Path) -> None:
    rewrite(model / "config.json", text_config={"deep": [{"transformers_weights": "x.bin"}]})
    error = refusal(lambda: scan_folder(model, "m"))
    assert error.message.startswith("m: config.json names other weights than model.safetensors (transformers_weights)")
    assert str(error.hint).startswith("remove transformers_weights from config.json")


def test_where_they_say_nothing_they_are_fine(model: Path) -> None:
    rewrite(model / "config.json", transformers_weights=None, configuration_files=[], kernel_config={})
    rewrite(model / "config.json", text_config={"quantization_config": {}, "compression_config": None})
    scan_folder(model, "m")
    rewrite(model / "config.json", text_config=None)
    rewrite(model / "tokenizer_config.json", init_inputs=[], fast_tokenizer_files=[], sp_model_kwargs={})
    assert load(model)


def test_a_link_to_itself_is_named_and_no_traceback(model: Path) -> None:
    (model / "circle.json").symlink_to(model / "circle.json")
    assert "m: circle.json cannot be read: Too many levels" in refusal(lambda: scan_folder(model, "m")).message


def test_what_most_finetunes_carry_is_ignored(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto_map` beside a model that transformers has itself, and where files once were on another machine."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    plain = load_encoder(model, ModelSection(path=str(model))).vocabulary_digest
    song = f"open({str(tmp_path / 'sang')!r}, 'w')\n"
    for name in ("modeling_evil.py", "tokenization_evil.py", "configuration_evil.py"):
        (model / name).write_text(song + "class Evil: pass\n")
    code = {"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "someone/repo--modeling_evil.Evil"}
    rewrite(model / "config.json", auto_map=code, _name_or_path="../../elsewhere")
    secret = tmp_path / "secret.json"
    secret.write_text('{"stolen": 0}')
    files = dict.fromkeys(("vocab_file", "merges_file", "tokenizer_file", "special_tokens_map_file"), str(secret))
    rewrite(
        model / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["tokenization_evil.Evil", None]},
        name_or_path="/root/x",
        vocab=str(secret),
        merges=str(secret),
        **files,
    )
    found = load(model)
    assert found.encoder.vocabulary_digest == plain
    assert not (tmp_path / "sang").exists()


@pytest.mark.parametrize("key", ["AutoConfig", "AutoModelForCausalLM"])
def test_a_model_that_is_its_own_code_is_refused_and_nobody_asked(
    model: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    """transformers would ask on stdin whether to run it, for fifteen seconds."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    rewrite(model / "config.json", model_type="its_own", auto_map={key: "evil.Evil"})
    error = refusal(lambda: load(model))
    assert "config.json asks to run code from the model's folder (auto_map)" in error.message
    assert "never runs code" in str(error.hint)
    rewrite(model / "config.json", model_type=["its_own"])
    assert "(auto_map)" in refusal(lambda: open_model(str(model)).check_base(ModelSection(path=str(model)))).message


def test_a_tokenizer_that_is_its_own_code_is_refused_and_nobody_asked(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a config that transformers has no tokenizer for."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    (model / "config.json").write_text('{"model_type": "its_own"}')
    rewrite(
        model / "tokenizer_config.json",
        tokenizer_class="ItsOwn",
        auto_map={"AutoTokenizer": ["tokenization_evil.Evil", None]},
    )
    error = refusal(lambda: load_encoder(model, ModelSection(path=str(model))))
    assert "tokenizer_config.json asks to run code" in error.message


def test_no_file_that_a_tokenizer_s_settings_name_is_handed_on(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None stands for the folder's own; a vocabulary that is written out is no file."""
    rewrite(model / "tokenizer_config.json", vocab_file="/a", merges_file="b", vocab="/c", merges="d", unk_token="e")  # noqa: S106

    def load(folder: Path, **given: object) -> SimpleNamespace:
        return SimpleNamespace(given=given, unk_token_id=None)

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", load)
    assert read_tokenizer(model, "m").given == dict.fromkeys(("vocab_file", "merges_file", "vocab", "merges"))
    rewrite(model / "tokenizer_config.json", vocab={"a": 0}, merges=["a b"])
    assert read_tokenizer(model, "m").given == dict.fromkeys(("vocab_file", "merges_file"))


@pytest.mark.parametrize("failure", [ValueError, TypeError, ZeroDivisionError, KeyError, IndexError, AttributeError])
def test_whatever_a_config_s_values_make_of_it_is_told_in_one_line(
    model: Path, monkeypatch: pytest.MonkeyPatch, failure: type[Exception]
) -> None:
    """What is computed from them is transformers' code as much as ours, and raises what it likes."""

    def check(*_: object) -> None:
        raise failure("of a\nvalue")

    monkeypatch.setattr("dpo_studio.models.folder.check_architecture", check)
    error = refusal(lambda: open_model(str(model)).check_base(ModelSection(path=str(model))))
    assert "config.json has a value of the wrong kind: " in error.message


def test_a_tokenizer_with_code_beside_it_that_fails_for_another_reason_says_that(model: Path) -> None:
    rewrite(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_evil.Evil", None]})
    (model / "tokenizer.json").write_text("{}")
    assert "its tokenizer cannot be loaded" in refusal(lambda: read_tokenizer(model, "m")).message


def test_a_reward_model_s_code_is_not_asked_for_either(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    rewrite(model / "config.json", model_type="granite", auto_map={"AutoModelForSequenceClassification": "evil.Evil"})
    assert "not a model of this kind" in refusal(lambda: load_reward_model(str(model), dtype="float32")).message
    rewrite(model / "config.json", model_type="llama", quantization_config={"quant_method": "quark"}, num_labels=1)
    assert "is quantised" in refusal(lambda: load_reward_model(str(model), dtype="float32")).message


def test_parts_of_a_distributed_checkpoint_are_refused(model: Path) -> None:
    """transformers 5.24 reads them in the place of model.safetensors, as soon as there is one."""
    (model / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"")
    assert "distributed checkpoint" in refusal(lambda: load(model)).message


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_the_folder_of_more_templates_is_looked_at_too(model: Path, tmp_path: Path, kind: str) -> None:
    (model / "additional_chat_templates").mkdir()
    (tmp_path / "id_rsa").write_text("key")
    file = model / "additional_chat_templates" / "rag.jinja"
    if kind == "link":
        file.symlink_to(tmp_path / "id_rsa")
    else:
        os.mkfifo(file)
    assert "rag.jinja is" in refusal(lambda: load(model)).message


# What is hashed


def split(folder: Path, names: tuple[str, str] = ("model-1.safetensors", "model-2.safetensors")) -> None:
    """Its weights in two files and an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    half = len(tensors) // 2
    where: dict[str, str] = {}
    for name, keys in zip(names, (list(tensors)[:half], list(tensors)[half:]), strict=True):
        save_file({key: tensors[key] for key in keys}, folder / name, metadata={"format": "pt"})
        where |= dict.fromkeys(keys, name)
    rewrite(folder / "model.safetensors.index.json", weight_map=where, metadata={})


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-2000] ^= 1
    file.write_bytes(content)


def test_the_fingerprint_is_of_the_files_that_are_loaded_and_no_other(model: Path, tmp_path: Path) -> None:
    """A decoy beside them changes nothing, and cannot stand in for them."""
    before = weights_fingerprint(model)
    save_file({"decoy": torch.zeros(4096)}, model / "consolidated.safetensors")
    rewrite(model / "model.safetensors.index.json", weight_map={"decoy": "consolidated.safetensors"})
    assert [file.name for file in weights_of(model, "m")] == ["model.safetensors"]
    assert weights_fingerprint(model) == before
    flip(model / "consolidated.safetensors")
    assert weights_fingerprint(model) == before
    flip(model / "model.safetensors")
    assert weights_fingerprint(model) != before


def test_of_a_model_in_parts_each_part_and_the_index_are_in_the_fingerprint(model: Path) -> None:
    split(model)
    seen = {weights_fingerprint(model)}
    for name in ("model-1.safetensors", "model-2.safetensors"):
        flip(model / name)
        seen.add(weights_fingerprint(model))
    rewrite(model / "model.safetensors.index.json", weight_map={"a": "model-1.safetensors"})
    seen.add(weights_fingerprint(model))
    assert len(seen) == 4
    save_file({"decoy": torch.zeros(4096)}, model / "zzz.safetensors")
    assert weights_fingerprint(model) in seen


def test_a_model_in_parts_loads_as_transformers_loads_it(model: Path) -> None:
    whole = load(model).model.state_dict()
    split(model)
    parts = load(model).model.state_dict()
    assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)
    (model / "model-2.safetensors").unlink()
    assert "cannot" in refusal(lambda: load(model)).message or "missing" in refusal(lambda: load(model)).message


# Sizes


HUGE: list[dict[str, Any]] = [
    {"num_labels": 10**9},
    {"num_labels": 200_000},
    {"num_hidden_layers": 10**5},
    {"num_hidden_layers": 1000},
    {"num_attention_heads": 10**6, "num_key_value_heads": 10**6},
    {"vocab_size": 10**9},
    {"vocab_size": 1 << 40},
    {"hidden_size": 1 << 24},
    {"intermediate_size": 10**8},
    {"intermediate_size": 1 << 23},
    {"head_dim": 1 << 22},
    {"model_type": "mixtral", "num_local_experts": 10**5},
    {"model_type": "qwen3_moe", "num_experts": 4000, "moe_intermediate_size": 64},
    {"text_config": {"num_hidden_layers": 10**7}},
    {"layer_types": "full_attention", "num_hidden_layers": 10**12},
    {"num_labels": 10**30},
    {"model_type": "gpt_neo", "attention_types": [[["global"], 10**9]]},
    {"model_type": "gptj", "n_layer": 10**6, "n_embd": 32},
]


@pytest.mark.parametrize("change", HUGE, ids=words_of)
def test_a_config_cannot_ask_for_more_than_its_weights_have(model: Path, change: dict[str, Any]) -> None:
    """Told in a second, whatever it asks for: the limit is of memory that the process could have taken meanwhile."""
    rewrite(model / "config.json", **change)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    error = refusal(lambda: load(model))
    assert time.process_time() - start < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB, unless more were taken before
    assert str(model) in error.message
    assert re.search(r"weights that are there allow|describes a model of|whole number|cannot build", error.message)


@pytest.mark.parametrize("change", HUGE[:3], ids=words_of)
def test_nor_can_the_config_of_a_tokenizer_or_a_reward_model(model: Path, change: dict[str, Any]) -> None:
    rewrite(model / "config.json", **change)
    assert next(iter(change)) in refusal(lambda: open_model(str(model))).message
    assert next(iter(change)) in refusal(lambda: load_reward_model(str(model))).message


SHAPES = {"a.weight": ("F32", (20_000, 32)), **{f"layers.{n}.w": ("F32", (32, 32)) for n in range(200)}}


@pytest.mark.parametrize(
    ("key", "fits", "over"),
    [
        ("num_hidden_layers", 201, 202),
        ("n_layer", 201, 202),
        ("num_local_experts", 20_000, 20_001),
        ("num_labels", 20_000, 20_001),
        ("num_attention_heads", 20_000, 20_001),
        ("n_embd", 20_000, 20_001),
        ("vocab_size", 1 << 24, (1 << 24) + 1),
        ("some_new_size", 1 << 24, (1 << 24) + 1),
        ("anything", 1 << 24, (1 << 24) + 1),
    ],
)
def test_each_kind_of_number_has_its_limit(key: str, fits: int, over: int) -> None:
    """201 tensors, the widest of 20,000 rows, 844,800 numbers."""
    check_numbers({key: fits, "deep": [{key: fits}]}, SHAPES, "m")
    for config in ({key: over}, {"deep": [{key: over}]}, {key: [1, over]}):
        error = refusal(lambda config=config: check_numbers(config, SHAPES, "m"))  # type: ignore[misc]
        assert error.message.startswith(f"m: config.json has {key}: {over:,}, and the weights that are there allow ")
    check_numbers({key: over}, None, "m")  # no weights to compare with: only a tokenizer is wanted
    with pytest.raises(ModelError):
        check_numbers({key: 1 << 50}, None, "m")


@pytest.mark.parametrize(
    "config",
    [
        {"max_position_embeddings": 1 << 30, "rope_theta": 10**12, "eos_token_id": 10**9, "num_hidden_layers": 4},
        {"sliding_window": 10**12, "model_max_length": 10**30, "n_ctx": 8192, "seed": 1 << 40},
        {"mamba_dt_rank": "auto", "time_step_rank": "auto", "group_size": -1, "pad_token_id": -1, "head_dim": None},
        {"attention_layers": ["global", "local"], "feature_layer": -2, "num_experts": 16_384, "n_routed_experts": 512},
        {"id2label": {"0": "A", "1": "B"}, "label2id": {"A": 0}, "intermediate_size": [64, 128], "tie": True},
    ],
    ids=words_of,
)
def test_what_honest_configs_hold_passes(config: dict[str, Any]) -> None:
    check_numbers(config, SHAPES, "m")


@pytest.mark.parametrize("value", ["64", 1e9, 64.5, "x", -(1 << 30), [64, "x"], {"num_layers": "x"}], ids=words_of)
def test_a_size_is_a_whole_number(value: Any) -> None:
    refusal(lambda: check_numbers({"hidden_size": value}, SHAPES, "m"))


def test_packed_weights_count_for_what_they_may_hold() -> None:
    """Of GPTQ's words, each 16 weights at two bits."""
    packed = {"q": ("I32", (1000, 5000))}
    check_numbers({"some_size": 80_000_000}, packed, "m")
    refusal(lambda: check_numbers({"some_size": 80_000_001}, packed, "m"))


def test_a_whole_model_is_counted_before_it_is_made(model: Path) -> None:
    """Every number is small, and their product is not."""
    rewrite(model / "config.json", hidden_size=4096, intermediate_size=4096, num_hidden_layers=100)
    error = refusal(lambda: load(model))
    assert "config.json describes a model of" in error.message
    assert "never filled in" in str(error.hint) or "ever filled in" in str(error.hint)


def test_a_model_that_transformers_cannot_build_is_told_in_one_line() -> None:
    config = LlamaConfig(vocab_size=8, hidden_size=8, num_attention_heads=1, num_hidden_layers=1, hidden_act="no\nsuch")
    error = refusal(lambda: check_model_size(AutoModelForCausalLM, config, {}, "m"))
    assert error.message.startswith("m: transformers cannot build this model: ")


def test_buffers_count_too() -> None:
    """Some models have a mask of every two positions."""
    from transformers import AutoModelForCausalLM, GPTNeoConfig

    few = {"a": ("F32", (1000,))}
    sizes: dict[str, Any] = {"hidden_size": 8, "num_layers": 1, "num_heads": 1, "vocab_size": 8}
    small = GPTNeoConfig(attention_types=[[["global"], 1]], max_position_embeddings=16, **sizes)
    check_model_size(AutoModelForCausalLM, small, few, "m")
    large = GPTNeoConfig(attention_types=[[["global"], 1]], max_position_embeddings=1 << 20, **sizes)
    assert "describes a model" in refusal(lambda: check_model_size(AutoModelForCausalLM, large, few, "m")).message


def test_weights_that_are_no_file_are_told_of_by_name(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    error = refusal(lambda: tensor_shapes([tmp_path / "model.safetensors"], "m"))
    assert "m cannot be loaded: model.safetensors is damaged" in error.message


def test_headers_that_lie_are_no_sizes(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    head = json.dumps({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 4]}}).encode()
    file.write_bytes(len(head).to_bytes(8, "little") + head + b"0000")
    assert "m cannot be loaded: model.safetensors is damaged" in refusal(lambda: tensor_shapes([file], "m")).message
    assert "is missing" in refusal(lambda: tensor_shapes([tmp_path / "gone.safetensors"], "m")).message


# Values of the wrong kind


BAD: list[Any] = [None, True, -1, 1.5, "x", [], {}, [1], {"a": 1}, 10**30, [[["x"]]], "\x00"]
KEYS = {
    "config.json": (
        *("model_type", "architectures", "rope_parameters", "rope_scaling", "dtype", "quantization_config", "id2label"),
        *("eos_token_id", "pad_token_id", "layer_types", "sliding_window", "hidden_act", "rms_norm_eps", "text_config"),
        *("tie_word_embeddings", "auto_map", "vocab_size", "hidden_size", "num_attention_heads", "attention_bias"),
    ),
    "generation_config.json": (
        *(
            "eos_token_id",
            "pad_token_id",
            "temperature",
            "top_k",
            "top_p",
            "max_new_tokens",
            "stop_strings",
            "num_beams",
        ),
        *("suppress_tokens", "bad_words_ids", "sequence_bias", "watermarking_config", "cache_implementation"),
        *("repetition_penalty", "forced_bos_token_id", "compile_config", "min_p", "num_return_sequences", "max_time"),
    ),
    "tokenizer_config.json": (
        *("tokenizer_class", "added_tokens_decoder", "chat_template", "eos_token", "extra_special_tokens", "auto_map"),
        *("model_max_length", "padding_side", "model_input_names", "additional_special_tokens", "vocab", "merges"),
    ),
}


@pytest.mark.parametrize("file", KEYS)
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 12))])
def test_no_value_of_any_setting_is_a_traceback(
    model: Path, monkeypatch: pytest.MonkeyPatch, file: str, seed: int
) -> None:
    """A dozen of them in each, drawn from all (and all, slowly); every one through the verb."""
    monkeypatch.setattr("dpo_studio.models.load.choose_dtype", lambda *_: (torch.float32, "for the test"))
    cases = [(key, value) for key in KEYS[file] for value in BAD]
    original = (model / file).read_text() if (model / file).exists() else "{}"
    for place in range(seed, len(cases), max(12, len(cases) // 12)):
        key, value = cases[place]
        (model / file).write_text(json.dumps(json.loads(original) | {key: value}))
        said = dpo("generate", model, "--prompt", "a", "--max-new-tokens", "2")
        assert said.code in (0, 1), (key, value, said.err)
        assert "Traceback" not in said.err and len(said.err.splitlines()) < 6, (key, value, said.err)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer_config.json", {"added_tokens_decoder": {"1000000000": {"content": "x"}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"10000001": {"content": "x"}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"-1": {"content": "x"}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "x"}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"\u0661\u0662": {"content": "x"}}}),  # Arabic digits
        ("tokenizer_config.json", {"added_tokens_decoder": {"1" * 5000: {"content": "x"}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": ["x"]}),
        ("tokenizer_config.json", {"added_tokens_decoder": [7]}),
        ("tokenizer_config.json", {"added_tokens_decoder": 7}),
        ("added_tokens.json", {"x": 1000000000}),
        ("added_tokens.json", {"x": "1"}),
        ("added_tokens.json", {"x": None}),
        ("added_tokens.json", {"x": [1]}),
    ],
    ids=words_of,
)
def test_a_token_s_id_is_one_that_a_vocabulary_has(model: Path, file: str, content: dict[str, Any]) -> None:
    """Some tokenizers make a token for every id below the largest: of 10^9 they make a hundred gigabytes."""
    rewrite(model / file, **content)
    if content != {"x": "1"}:  # as text it is the same id
        assert file in refusal(lambda: load_encoder(model, ModelSection(path=str(model)))).message


@pytest.mark.parametrize(
    ("key", "sound", "wrong"),
    [
        ("model_max_length", [10**30, 2.5, None], ["x", [], {}, True]),
        ("padding_side", ["left", "right"], ["up", 7, ["left"]]),
        ("truncation_side", ["left"], ["up", {}]),
        ("model_input_names", [["input_ids"]], ["input_ids", [7], {}]),
        ("chat_template", ["x", {"default": "x"}, [{"name": "a", "template": "x"}]], [7, ["x"], {"a": 7}]),
        ("chat_template", [None], [[{"name": "a"}], [{"template": "x"}], [{"name": 7, "template": "x"}]]),
        ("tokenizer_class", ["TokenizersBackend", None], [7, ["x"]]),
        ("mask_token", [{"content": "a", "__type": "AddedToken"}], [{"content": 7}]),
        *((f"{kind}_token", ["a", None], [7, ["x"], {}, True]) for kind in ("eos", "bos", "pad", "unk")),
    ],
)
def test_a_tokenizer_s_values_are_of_their_kinds(model: Path, key: str, sound: list[Any], wrong: list[Any]) -> None:
    """transformers takes any, and fails when the first text is encoded."""
    file = model / "tokenizer_config.json"
    raw = json.loads(file.read_text())
    for value in sound:
        file.write_text(json.dumps(raw | {key: value}))
        assert read_tokenizer(model, "m").get_vocab()
    for value in wrong:
        file.write_text(json.dumps(raw | {key: value}))
        assert f"m: tokenizer_config.json has {key}: " in refusal(lambda: read_tokenizer(model, "m")).message


def test_the_gate_costs_a_7b_little() -> None:
    """Of 0.3 s that a start may cost more: the headers of 300 tensors, the numbers, and the model without memory."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    sizes: dict[str, Any] = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    config = LlamaConfig(num_attention_heads=32, vocab_size=32000, **sizes)
    shapes = {f"layers.{n}.w": ("BF16", (4096, 5400)) for n in range(300)}
    check_model_size(AutoModelForCausalLM, config, shapes, "m")  # what is imported once
    start = time.process_time()
    check_numbers(config.to_dict(), shapes, "m")
    check_model_size(AutoModelForCausalLM, config, shapes, "m")
    assert time.process_time() - start < 0.3
    assert sys.getsizeof(shapes) < 100_000


def test_another_family_s_folder_passes_the_gate(tmp_path: Path) -> None:
    for name in ("gemma3", "qwen2-mixed", "granite"):
        folder = tiny_folder(tmp_path / name, name)
        assert load(folder)


def test_an_adapter_s_file_is_none_of_a_model_s(model: Path) -> None:
    """Beside weights in parts; and alone it is what is loaded of an adapter's folder."""
    split(model)
    save_file({"a": torch.zeros(3)}, model / "adapter_model.safetensors")
    assert [file.name for file in weights_of(model, "m")] == ["model-1.safetensors", "model-2.safetensors"]
    (model / "model.safetensors.index.json").unlink()
    assert [file.name for file in weights_of(model, "m")] == ["adapter_model.safetensors"]


def test_a_template_is_read_as_python_reads_text(tmp_path: Path) -> None:
    """Lines end in one way: a run's digest of its template does not depend on how the file was saved."""
    file = tmp_path / "t.jinja"
    file.write_bytes(b"a\r\nb\rc\n")
    assert template_text(str(file), what="t", error=ModelError) == "a\nb\nc\n" == file.read_text()
    file.write_bytes(b"x" * 4_000_001)
    assert "over 4,000,000 bytes" in refusal(lambda: template_text(str(file), what="t", error=ModelError)).message


def test_a_generation_config_with_a_fault_does_not_stop_a_merge(model: Path, tmp_path: Path) -> None:
    """Of the best known models some have a temperature beside `do_sample: false`: transformers would not save it."""
    rewrite(model / "generation_config.json", do_sample=False, temperature=0.5, top_p=0.3)
    (tmp_path / "out").mkdir()
    save_plain(load(model).model, tmp_path / "out", source=model, template=None)
    left = (tmp_path / "out" / "generation_config.json").read_text()
    assert json.loads(left) == json.loads((model / "generation_config.json").read_text())


@pytest.mark.parametrize(
    "name", ["chat_template.jinja", "tokenizer.json", "vocab.txt", "tokenizer.model", "merges.txt"]
)
def test_a_file_of_a_tokenizer_without_an_end_is_not_read(model: Path, name: str) -> None:
    """Libraries read it whole: a terabyte that takes no room on a disk would take all memory."""
    with (model / name).open("wb") as file:
        file.truncate(2**40)
    assert f"{name} is over" in refusal(lambda: open_model(str(model))).message


def test_a_weight_file_s_name_is_no_longer_than_a_file_system_takes(model: Path) -> None:
    """To ask whether it is there is an error of the system's, ENAMETOOLONG; a name of 255 bytes is one."""
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "x" * 244 + ".safetensors"}}))
    assert "256 characters" in refusal(lambda: open_model(str(model))).message
    index.write_text(json.dumps({"weight_map": {"a": "x" * 243 + ".safetensors"}}))
    open_model(str(model))


def test_an_unknown_token_that_is_unknown_itself_is_refused(model: Path) -> None:
    """transformers looks a token that it does not know up as `unk_token`: that one, too, and so on without end."""
    rewrite(model / "tokenizer_config.json", unk_token="")
    message = refusal(lambda: read_tokenizer(model, "m")).message
    assert message == "m: tokenizer_config.json: its unk_token is not in its vocabulary"
