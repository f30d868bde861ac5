"""Poisoned folders: nothing in them runs, is unpickled or followed; refused by name, or left alone unread."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dpo_studio.config import ModelSection
from dpo_studio.errors import DPOStudioError, ModelError
from dpo_studio.models.adapter_settings import base_named_by, refuse_strange_lora
from dpo_studio.models.adapters import attach_existing
from dpo_studio.models.load import load_chat_model
from dpo_studio.scan import scan_folder, weight_files
from dpo_studio.tokens.template import ChatTemplate
from dpo_studio.workflows.loading import load_any
from tests.guard_words import words_of
from tests.tiny_models import tiny_model
from tests.tiny_runs import dpo, tiny_rows, write_recipe, write_rows
from tests.tiny_tokenizers import tiny_tokenizer

CANARY = "DPO_STUDIO_CANARY"
SONG = f"import os, pathlib\npathlib.Path(os.environ['{CANARY}']).touch()"


class Bomb:
    """Writes the canary's file when unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, (SONG,))


CODE = f"{SONG}\nclass Evil:\n    pass\n"
PICKLES = (
    "pytorch_model.bin",
    "model.pt",
    "training_args.bin",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "x.pkl",
)


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Dead at the end of every test that asks for it, having been shown to sing when it should."""
    file = tmp_path / "canary"
    monkeypatch.setenv(CANARY, str(file))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    pickle.loads(pickle.dumps(Bomb()))  # noqa: S301 - our own, the only one in the tests
    assert file.exists()
    file.unlink()
    yield file
    assert not file.exists(), "a payload ran"


@pytest.fixture
def model(tiny_base: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_base, tmp_path / "model")


@pytest.fixture
def adapter(tiny_run: Path, tiny_base: Path, tmp_path: Path) -> Path:
    """Far from its run, so that it finds its base by name."""
    return shutil.copytree(tiny_run / "adapter", tmp_path / "adapter")


def rewrite(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | changes))


def poison(folder: Path) -> None:
    """Every file that some loader has been made to unpickle or run, each with the canary in it."""
    for name in (*PICKLES, "adapter_model.bin", "consolidated.00.pth", "training_state.ckpt"):
        torch.save(Bomb(), folder / name)
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py", "setup.py", "__init__.py"):
        (folder / name).write_text(CODE)
    (folder / "custom_generate").mkdir(exist_ok=True)
    (folder / "custom_generate" / "generate.py").write_text(CODE)


def load(folder: Path) -> Any:
    return load_chat_model(ModelSection(path=str(folder), dtype="float32"))


def refusal(act: Callable[[], object]) -> ModelError:
    with pytest.raises(ModelError) as refused:
        act()
    assert "\n" not in refused.value.message
    return refused.value


# Left alone


def test_a_model_beside_poisoned_files_loads_trains_and_chats_without_touching_them(
    model: Path, canary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through every verb that opens the folder; from inside it too, where Python would find its modules first."""
    poison(model)
    recipe = write_recipe(tmp_path / "recipe.yaml", model, training={"max_steps": 1, "save_every": 1})
    monkeypatch.chdir(model)
    said = dpo("train", recipe)
    assert said.code == 0, said.err
    poison(tmp_path / "run" / "adapter")
    poison(tmp_path / "run" / "checkpoints" / "step-1")
    rows = write_rows(tmp_path / "two.jsonl", tiny_rows(2))
    assert dpo("score", tmp_path / "run", rows).code == 0
    assert dpo("generate", model, "--prompt", "a", "--max-new-tokens", "2").code == 0
    assert dpo("export", tmp_path / "run", tmp_path / "out", "--to", "adapter").code == 0


def test_an_adapter_beside_poisoned_files_is_used_without_touching_them(adapter: Path, canary: Path) -> None:
    poison(adapter)
    assert load_any(str(adapter), dtype="float32").adapter == adapter


# Refused


@pytest.mark.parametrize("name", PICKLES)
def test_weights_as_pickle_only_are_refused_unopened(model: Path, canary: Path, name: str) -> None:
    (model / "model.safetensors").unlink()
    torch.save(Bomb(), model / name)
    assert "as pickle only" in refusal(lambda: load(model)).message


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_adapters_as_pickle_are_refused_unopened(adapter: Path, canary: Path, name: str) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(Bomb(), adapter / name)
    assert "no adapter_model.safetensors" in refusal(lambda: load_any(str(adapter))).message


def test_an_index_that_leads_to_a_pickle_is_refused(model: Path, canary: Path) -> None:
    """transformers unpickles whatever file an index names that does not end in .safetensors."""
    torch.save(Bomb(), model / "evil.bin")
    (model / "model.safetensors").rename(model / "model-00001.safetensors")
    rewrite(model / "model.safetensors.index.json", weight_map={"lm_head.weight": "evil.bin"})
    assert "names an invalid weight file: 'evil.bin'" in refusal(lambda: load(model)).message


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd.safetensors", "a/b.safetensors", 7, None, ""])
def test_an_index_names_files_of_its_folder(model: Path, name: Any) -> None:
    rewrite(model / "model.safetensors.index.json", weight_map={"a": name})
    assert "names an invalid weight file" in refusal(lambda: weight_files(model, "m")).message


def test_the_files_of_a_sound_index_are_known(model: Path) -> None:
    names = {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}
    rewrite(model / "model.safetensors.index.json", weight_map=names)
    assert weight_files(model, "m") == {key: model / name for key, name in names.items()}


@pytest.mark.parametrize("content", ["", "{", "[]", '{"weight_map": []}', "{}", "[" * 100_000])
def test_a_damaged_index_is_refused(model: Path, content: str) -> None:
    (model / "model.safetensors.index.json").write_text(content)
    error = refusal(lambda: scan_folder(model, "m"))
    assert error.message == "m: model.safetensors.index.json is damaged"
    assert error.hint == "is the download complete? fetch the model again"


CONFIGS = (
    *("config.json", "tokenizer_config.json", "generation_config.json", "processor_config.json"),
    *("preprocessor_config.json", "special_tokens_map.json", "quantize_config.json"),
)
ASKS_FOR_CODE: list[dict[str, Any]] = [
    {"trust_remote_code": True},
    {"text_config": {"deep": [{"trust_remote_code": True}]}},
    {"text_config": {"custom_generate": "evil"}, "zeros": [0, 0]},
    {"custom_generate": "someone/repo"},
    {"_attn_implementation": "someone/kernel"},
    {"_attn_implementation_internal": "someone/kernel:run"},
    {"text_config": {"attn_implementation": {"": "someone/kernel"}}},
    {"_experts_implementation": "someone/kernel"},
]


@pytest.mark.parametrize("change", ASKS_FOR_CODE, ids=words_of)
@pytest.mark.parametrize("file", CONFIGS)
def test_settings_that_ask_for_code_are_refused(model: Path, canary: Path, file: str, change: dict[str, Any]) -> None:
    poison(model)
    rewrite(model / file, **change)
    error = refusal(lambda: load(model))
    assert f"{file} asks to run" in error.message and str(model) in error.message
    assert "never runs code" in str(error.hint)


def test_settings_that_say_no_to_code_are_fine(model: Path) -> None:
    rewrite(model / "config.json", auto_map={}, trust_remote_code=False, _attn_implementation="sdpa")
    assert load(model)


@pytest.mark.parametrize("file", [*CONFIGS, "adapter_config.json"])
@pytest.mark.parametrize("content", ["{", "[1]", "[" * 100_000, '{"a": 1' + " " * 20_000_001 + "}"], ids=words_of)
def test_settings_that_are_none_are_refused(model: Path, file: str, content: str) -> None:
    (model / file).write_text(content)
    assert file in refusal(lambda: scan_folder(model, "m")).message


def test_a_model_with_an_adapter_in_its_folder_is_refused(model: Path, adapter: Path, canary: Path) -> None:
    """transformers puts the two together unasked, and takes the adapter's pickle where it has no safetensors."""
    shutil.copyfile(adapter / "adapter_config.json", model / "adapter_config.json")
    torch.save(Bomb(), model / "adapter_model.bin")
    assert "a model and an adapter in one folder" in refusal(lambda: load(model)).message


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "config.json", "model.safetensors", "chat_template.jinja", "x.model"]
)
def test_a_pipe_in_a_folder_is_refused_and_not_waited_for(model: Path, name: str) -> None:
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    before = time.monotonic()
    assert f"{name} is not a regular file" in refusal(lambda: load(model)).message
    assert time.monotonic() - before < 5


@pytest.mark.parametrize("target", ["/dev/zero", "/dev/null"])
def test_a_device_in_a_folder_is_refused(model: Path, target: str) -> None:
    (model / "tokenizer.json").unlink()
    (model / "tokenizer.json").symlink_to(target)
    error = refusal(lambda: load(model))
    assert error.message == f"{model}: tokenizer.json is not a regular file"
    assert error.hint == "a device or a pipe in a model folder is never legitimate"


@pytest.mark.parametrize("name", ["secret.model", "merges.txt", "tokenizer.json", "README.md", "chat_template.jinja"])
def test_a_link_that_leads_out_is_refused(model: Path, tmp_path: Path, name: str) -> None:
    """`dpo export` copies tokenizer files: a link to a key would leave with them."""
    (tmp_path / "id_rsa").write_text("key")
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to("../id_rsa")
    error = refusal(lambda: load(model))
    assert f"{name} is a link that points out" in error.message
    assert error.hint == "put the file itself there"


def test_a_link_into_a_folder_with_a_like_name_leads_out(model: Path, tmp_path: Path) -> None:
    """`model_evil` begins with `model`."""
    (tmp_path / "model_evil").mkdir()
    (tmp_path / "model_evil" / "x").write_text("x")
    (model / "x.model").symlink_to("../model_evil/x")
    assert "points out" in refusal(lambda: load(model)).message


def test_only_a_snapshot_of_the_hub_s_cache_has_blobs_beside_it(model: Path) -> None:
    blobs = model.parent.parent / "blobs"
    blobs.mkdir()
    (blobs / "x").write_text("x")
    (model / "x.model").symlink_to("../../blobs/x")
    assert "points out" in refusal(lambda: scan_folder(model, "m")).message


def test_links_that_are_usual_are_followed(model: Path, tmp_path: Path) -> None:
    """Weights on another disk; a link within; the Hub's cache, where every file is one; the folder itself."""
    (model / "model.safetensors").rename(tmp_path / "elsewhere")
    (model / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    (model / "readme.txt").symlink_to("config.json")
    (model / "gone.txt").symlink_to("nowhere")
    cache = tmp_path / "models--a--b"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for file in model.glob("*.json"):
        shutil.copyfile(file, cache / "blobs" / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    (tmp_path / "named").symlink_to(model)
    for folder in (model, snapshot, tmp_path / "named"):
        scan_folder(folder, "m")
    (snapshot / "x.txt").symlink_to("../../../elsewhere")
    assert "points out" in refusal(lambda: scan_folder(snapshot, "m")).message


# Adapters


DEFAULTS = {"peft_type": "LORA", "use_dora": False, "megatron_core": "megatron.core", "new": [], "r": 8}
STRANGE_LORA: list[tuple[dict[str, Any], str]] = [
    ({"use_dora": True}, "lora_magnitude_vector"),
    ({"lora_bias": True}, "lora_bias"),
    ({"bias": "all"}, "bias"),
    ({"peft_type": "IA3"}, "IA3"),
    ({"peft_type": None}, "None"),
    ({"megatron_config": {"a": 1}, "megatron_core": "evil"}, "megatron"),
    ({"megatron_core": "evil"}, "megatron_core"),
    ({"corda_config": {"cache_file": "evil.pt"}}, "corda_config"),
    ({"lora_ga_config": {"cache_file": "evil.pt"}}, "lora_ga_config"),
    ({"eva_config": {"rho": 1}}, "eva_config"),
    ({"loftq_config": {"loftq_bits": 4}}, "loftq_config"),
    ({"layer_replication": [[0, 4]]}, "layer_replication"),
    ({"target_parameters": ["a"]}, "target_parameters"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"init_lora_weights": "corda"}, "init_lora_weights: corda"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights: pissa"),
    ({"init_lora_weights": "lora_ga"}, "init_lora_weights: lora_ga"),
    ({"init_lora_weights": "olora"}, "init_lora_weights: olora"),
    ({"rank_pattern": {"(a+)+b": 4}}, "rank_pattern names layers by an expression"),
    ({"alpha_pattern": {".*.*.*.*q": 4}}, "alpha_pattern names layers by an expression"),
    ({"alpha_pattern": {"q_proj|k_proj": 4}}, "alpha_pattern"),
    ({"alpha_pattern": ["(x"]}, "alpha_pattern"),
    ({"trust_remote_code": True}, "asks to run code"),
    ({"auto_map": {"a": "b"}}, "auto_map"),
]


@pytest.mark.parametrize(("change", "reason"), STRANGE_LORA, ids=words_of)
def test_an_adapter_that_is_more_than_plain_lora_is_refused(
    adapter: Path, canary: Path, change: dict[str, Any], reason: str
) -> None:
    """What PEFT would import, unpickle, rebuild the base by, or match for ever."""
    torch.save(Bomb(), adapter / "evil.pt")
    rewrite(adapter / "adapter_config.json", **change)
    error = refusal(lambda: load_any(str(adapter)))
    assert reason in error.message and str(adapter) in error.message


def test_a_strange_adapter_is_refused_with_a_way_on() -> None:
    two = {"peft_type": "LORA", "megatron_core": "evil", "bias": "all"}
    error = refusal(lambda: refuse_strange_lora(two, DEFAULTS, "a"))
    assert error.message == "a: only LoRA, rsLoRA and DoRA adapters can be used; this is LORA, megatron_core, bias"
    assert error.hint == "merge it into its base first, or train a LoRA adapter"
    error = refusal(lambda: refuse_strange_lora({"peft_type": "LORA", "init_lora_weights": "pissa"}, DEFAULTS, "a"))
    assert str(error.hint).startswith("PEFT makes plain LoRA of it: save_pretrained(")


@pytest.mark.parametrize(
    "change",
    [
        {"init_lora_weights": "gaussian"},
        {"rank_pattern": {"^model.layers.0.self_attn.q_proj$": 4, r"layers\.1\.mlp": 4, "v_proj": 4}},
        {"auto_mapping": {"parent_library": "evil", "base_model_class": "Evil"}},
        {"megatron_core": "megatron.core", "megatron_config": None, "use_dora": False},
        {"unknown_to_this_peft": None},
    ],
    ids=words_of,
)
def test_what_plain_lora_says_is_fine(change: dict[str, Any]) -> None:
    refuse_strange_lora({"peft_type": "LORA"} | change, DEFAULTS, "a")


@pytest.mark.parametrize("raw", [[], "x", None, 3])
def test_settings_of_an_adapter_are_an_object(raw: Any) -> None:
    assert "not a JSON object" in refusal(lambda: refuse_strange_lora(raw, DEFAULTS, "a")).message


@pytest.mark.parametrize(
    "change",
    [
        {"target_modules": "(.*)*(.*)*(.*)*_nothing"},
        {"target_modules": r".*\.(q|k|v|o|gate|up|down)_proj"},
        {"exclude_modules": "(.*)*(.*)*(.*)*_nothing"},
        {"layers_to_transform": [0, 1, 2, 3], "layers_pattern": "(l+)+(a+)+yers"},
    ],
    ids=words_of,
)
def test_layers_come_from_the_tensors_where_a_pattern_names_them(adapter: Path, change: dict[str, Any]) -> None:
    """The first would take longer than the sun; all give the same 28 layers."""
    rewrite(adapter / "adapter_config.json", **change)
    before = time.monotonic()
    policy = attach_existing(tiny_model(), adapter, trainable=True)
    assert time.monotonic() - before < 20
    assert sum(name.endswith("lora_A.default.weight") for name, _ in policy.named_parameters()) == 28


LEADS_ELSEWHERE: list[Any] = [
    "../model",
    "../../etc",
    "/models/../etc",
    "a/../../b",
    "..",
    "https://evil.test/model",
    "file:///etc",
    "hf://someone/model",
    "\\\\server\\share",
    "C:\\model",
    "~/model",
    "~root",
    "model\0",
    "mod\nel",
    "%2e%2e/model",
    "bundled:../x",
    ["a"],
    {"a": 1},
    7,
]


@pytest.mark.parametrize("named", LEADS_ELSEWHERE, ids=words_of)
def test_an_adapter_whose_base_leads_elsewhere_is_refused(adapter: Path, named: Any) -> None:
    rewrite(adapter / "adapter_config.json", base_model_name_or_path=named)
    error = refusal(lambda: load_any(str(adapter)))
    assert "leads elsewhere" in error.message
    assert "model.adapter" in str(error.hint)


@pytest.mark.parametrize("named", ["", None, [], 0])
def test_an_adapter_names_a_base(named: Any) -> None:
    assert "names no base" in refusal(lambda: base_named_by(named, None, "a")).message


@pytest.mark.parametrize(
    "named", ["a/b", "gpt2", "./model", "/models/mistral-7b v0.1", "bundled:smollm2-135m-instruct"]
)
def test_a_base_that_can_be_followed_is(named: str) -> None:
    assert base_named_by(named, "main", "a") == named


@pytest.mark.parametrize("revision", ["refs/pr/7", 7, ["a"]])
def test_a_revision_that_anybody_can_make_is_refused(revision: Any) -> None:
    """A pull request on the Hub is a stranger's model under a known name."""
    assert "not a branch or commit" in refusal(lambda: base_named_by("a/b", revision, "a")).message


def test_the_base_of_an_adapter_is_scanned_too(adapter: Path, model: Path, canary: Path) -> None:
    poison(model)
    rewrite(model / "config.json", custom_generate="evil")
    rewrite(adapter / "adapter_config.json", base_model_name_or_path=str(model))
    assert "asks to run code" in refusal(lambda: load_any(str(adapter))).message


def test_a_folder_is_scanned_wherever_one_is_named(model: Path, adapter: Path, canary: Path, tmp_path: Path) -> None:
    """Model, adapter, reference model and reference adapter of a recipe, and every verb's argument."""
    poison(model)
    bad_model = shutil.copytree(model, tmp_path / "bad model")
    rewrite(bad_model / "tokenizer_config.json", trust_remote_code=True)
    bad_adapter = shutil.copytree(adapter, tmp_path / "bad adapter")
    rewrite(bad_adapter / "adapter_config.json", corda_config={"cache_file": "x.pkl"})
    rows = write_rows(tmp_path / "two.jsonl", tiny_rows(2))
    sections: list[tuple[Path, dict[str, Any]]] = [
        (bad_model, {}),
        (model, {"model": {"adapter": str(bad_adapter)}, "adapter": None}),
        (model, {"reference": {"model": str(bad_model)}}),
        (model, {"reference": {"adapter": str(bad_adapter)}}),
    ]
    for number, (base, changes) in enumerate(sections):
        (tmp_path / str(number)).mkdir()
        said = dpo("train", write_recipe(tmp_path / str(number) / "recipe.yaml", base, **changes))
        assert said.code == 1 and "bad " in said.err, said.err
    for verb in (
        ("score", bad_model, rows),
        ("score", bad_adapter, rows),
        ("generate", bad_model, "--prompt", "a"),
        ("chat", bad_adapter),
        ("quantize", bad_model, tmp_path / "out"),
    ):
        said = dpo(*verb)
        assert said.code == 1 and "bad " in said.err, said.err


def test_safetensors_that_lie_about_their_size_are_refused(adapter: Path, model: Path) -> None:
    for file in (model / "model.safetensors", adapter / "adapter_model.safetensors"):
        file.write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    with pytest.raises(ModelError):
        load(model)
    with pytest.raises(DPOStudioError):
        attach_existing(tiny_model(), adapter, trainable=False)


def test_the_guards_add_no_second_to_a_start(model: Path) -> None:
    """Alone: 8 ms for 300 shards, 4 ms for a template, each twice in a start; the limit has room for a busy machine."""
    for shard in range(300):
        save_file({"a": torch.zeros(1)}, model / f"model-{shard:05}.safetensors")
    tokenizer = tiny_tokenizer("qwen3")
    before = time.perf_counter()
    for _ in range(2):
        scan_folder(model, "m")
        ChatTemplate(tokenizer.get_chat_template(), tokenizer.special_tokens_map)
    assert time.perf_counter() - before < 1


@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_config": None, "gguf_file": "", "fusion_config": {}},
        {"text_config": {"quantization_config": None, "compression_config": {}}},
    ],
)
def test_a_key_that_says_nothing_is_no_reason_to_refuse(model: Path, settings: dict[str, Any]) -> None:
    """transformers itself writes such keys into every config of some families."""
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | settings))
    scan_folder(model, "m")
