"""GPTQ: packed weights are gptqmodel's to the bit, a layer of them is a dense layer, and bad checkpoints are told of.

The oracle is gptqmodel itself, in a process of its own (`tests/gptq_oracle.py`), and plain dense layers.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from dpo_studio.config import ModelSection
from dpo_studio.errors import ModelError
from dpo_studio.frozen.dequantising import unpack
from dpo_studio.frozen.formats import read_quantization
from dpo_studio.frozen.gptq import Packed
from dpo_studio.frozen.gptq_files import Gptq, GptqReader
from dpo_studio.frozen.linear import FrozenLinear, held_dense, weight_count
from dpo_studio.frozen.shards import Place, Shards
from dpo_studio.learning.logprobs import pair_logps
from dpo_studio.learning.packing_check import check_packing
from dpo_studio.models.adapters import as_reference, attach, save_adapter
from dpo_studio.models.fingerprint import weights_fingerprint
from dpo_studio.models.load import load_chat_model
from dpo_studio.policy.adapter_check import verify_adapter, verify_trial_adapter
from dpo_studio.tokens.pack import pack
from tests.gptq_oracle import CASES, INPUTS, OUTPUTS, case_name, in_own_process
from tests.pairs_of_ids import random_pairs
from tests.policies import SECTION, moved
from tests.textbook import columns, gradients, plain_logps
from tests.tiny_models import tiny_folder
from tests.tiny_runs import dpo, write_recipe

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random layers of every format, packed by gptqmodel."""
    file = tmp_path_factory.mktemp("layers") / "layers.safetensors"
    in_own_process("layers", file)
    return file


@pytest.fixture(scope="session")
def gptq_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with 4-bit linears in groups of 32, symmetric, and in `dense/` the same with plain weights."""
    return packed_folder(tmp_path_factory.mktemp("gptq"))


def packed_folder(folder: Path, *settings: str, **changes: Any) -> Path:
    """A tiny model packed by gptqmodel."""
    plain = tiny_folder(folder / "plain", **changes)
    in_own_process("model", plain, folder / "gptq", *settings)
    return folder / "gptq"


def read_layer(file: Path, case: dict[str, Any]) -> FrozenLinear:
    """A layer of the oracle's file, by the product's reader."""
    quantization = Gptq(
        case["bits"], case["group_size"], case["sym"], case["desc_act"], case["checkpoint_format"], True, False
    )
    with Shards(file.parent, "layers") as shards:
        reader = quantization.reader(Place(shards, CPU, torch.float16, "packed", "auto", print))
        layer = reader.linear(case_name(case), nn.Linear(INPUTS, OUTPUTS, bias=False, device="meta"))
    assert isinstance(layer, FrozenLinear)
    return layer


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_every_format_dequantises_to_gptqmodels_weights_bit_for_bit(layers: Path, case: dict[str, Any]) -> None:
    """Law 7, in fp16; float32 compute rounds to the same, bfloat16 once from the exact product."""
    expected = load_file(layers)[f"{case_name(case)}.dense"]
    weight = read_layer(layers, case).kept
    assert expected.abs().max() > 0.1
    assert torch.equal(weight.dequantised(torch.float16), expected)
    assert torch.equal(weight.dequantised(torch.float32), expected.float())
    assert torch.equal(weight.dequantised(torch.bfloat16), weight.exact(torch.float32).bfloat16())


def test_a_weight_worked_by_hand() -> None:
    """One output, 32 inputs of 4 bits: word 0 is 0x76543210, so inputs 0..7 are 0..7; zero point 8, scale 0.5:
    input k is 0.5 (k - 8), -4 to -0.5. Words 1 to 3 are 0xFFFFFFFF: 0.5 (15 - 8) = 3.5."""
    words = torch.tensor([[0x76543210, -1, -1, -1]], dtype=torch.int32)
    weight = Packed(words, torch.tensor([[0.5]]).half(), torch.tensor([[8]], dtype=torch.uint8), None, 4, 32)
    expected = [0.5 * (k - 8) for k in range(8)] + [3.5] * 24
    assert weight.dequantised(torch.float32).tolist() == [expected]


def test_three_bits_cross_the_ends_of_words() -> None:
    """A stream of fields from the lowest bit on: 32 fields 0..7 again and again are 96 bits, three words."""
    fields = [k % 8 for k in range(32)]
    stream = sum(field << 3 * k for k, field in enumerate(fields))
    words = [(stream >> 32 * w & 0xFFFFFFFF) - (1 << 32 if stream >> 32 * w & 0x80000000 else 0) for w in range(3)]
    assert unpack(torch.tensor([words], dtype=torch.int32), 3).tolist() == [fields]


@pytest.mark.parametrize(
    "stored, by_gptqmodel, expected", [(0x7777_7777, True, [8] * 8), (0x0F0F_0F0F, False, [0, 1] * 4)]
)
def test_old_zero_points_are_stored_less_one(stored: int, by_gptqmodel: bool, expected: list[int]) -> None:
    """gptqmodel added and subtracted over the whole word; older tools field by field, where 15 + 1 is 0 again."""
    quantization = Gptq(4, -1, False, False, "gptq", by_gptqmodel, False)
    place = Place(None, CPU, torch.float16, "packed", "auto", print)  # type: ignore[arg-type]
    reader = GptqReader(place, quantization)
    words = torch.tensor([[stored]], dtype=torch.int32)
    assert reader._zeros("layer", words, 4, 8, 1).flatten().tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("eval_first", [False, True])
def test_lora_through_a_packed_layer_is_lora_through_a_dense_one(
    gptq_base: Path, dtype: torch.dtype, eval_first: bool
) -> None:
    """Log-probs and every gradient: the same products on the same weights, so the same bits; whatever ran before."""
    name = str(dtype).removeprefix("torch.")
    packed = load_chat_model(ModelSection(path=str(gptq_base), dtype=name))
    dense = load_chat_model(ModelSection(path=str(gptq_base), dtype=name, residency="bf16"))
    assert sum(isinstance(m, FrozenLinear) for m in packed.model.modules()) == 4 * 7
    assert not any(isinstance(m, FrozenLinear) for m in dense.model.modules())
    found = []
    for base in (packed, dense):
        policy = moved(attach(base.model, SECTION, seed=0), size=0.1)
        if eval_first:
            policy.eval()
            with torch.no_grad(), as_reference(policy):
                pair_logps(policy, pack(PAIRS))
            policy.train()
        logps_P2 = columns(pair_logps(policy, pack(PAIRS)))
        found.append((logps_P2.detach(), gradients(policy, (WEIGHTS_P2 * logps_P2).sum())))
    (packed_logps, packed_gradients), (dense_logps, dense_gradients) = found
    assert torch.equal(packed_logps, dense_logps)
    assert len(packed_gradients) == 4 * 7 * 2
    for key, gradient in packed_gradients.items():
        assert gradient.abs().max() > 0
        assert torch.equal(gradient, dense_gradients[key]), key


PAIRS = random_pairs(6)
WEIGHTS_P2 = torch.randn(len(PAIRS), 2, generator=torch.Generator().manual_seed(3))


def plain_dense(folder: Path) -> Any:
    """transformers' own model with the oracle's dequantised weights."""
    return AutoModelForCausalLM.from_pretrained(folder / "dense", dtype=torch.float32, attn_implementation="eager")


def test_gradients_equal_those_of_plain_peft_on_the_oracles_weights(gptq_base: Path) -> None:
    """fp32: 1e-5 of each gradient's largest entry, one sequence at a time through transformers and PEFT alone."""
    policy = moved(attach(load_gptq_fp32(gptq_base), SECTION, seed=0), size=0.1)
    oracle = peft_twin(policy, plain_dense(gptq_base))
    expected_P2 = plain_logps(oracle, PAIRS)
    expected = gradients(oracle, (WEIGHTS_P2 * expected_P2).sum())
    logps_P2 = columns(pair_logps(policy, pack(PAIRS)))
    torch.testing.assert_close(logps_P2, expected_P2, rtol=1e-5, atol=1e-4)
    for name, gradient in gradients(policy, (WEIGHTS_P2 * logps_P2).sum()).items():
        largest = expected[name].abs().max().item()
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-5 * largest, msg=name)


def load_gptq_fp32(folder: Path, **settings: Any) -> Any:
    """Our model, packed, in fp32."""
    return load_chat_model(ModelSection(path=str(folder), dtype="float32", **settings)).model


def peft_twin(policy: Any, model: Any) -> Any:
    """Plain PEFT on `model` with the policy's adapter."""
    config = LoraConfig(r=SECTION.rank, lora_alpha=SECTION.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    twin = get_peft_model(model, config)
    ours = dict(policy.named_parameters())
    for name, p in twin.named_parameters():
        if "lora_" in name:
            p.data = ours[name].data.clone()
    return twin.eval()


def test_a_saved_adapter_is_plain_pefts(gptq_base: Path, tmp_path: Path) -> None:
    policy = moved(attach(load_gptq_fp32(gptq_base), SECTION, seed=0), size=0.1)
    save_adapter(policy, tmp_path / "adapter", base="someone/a-model-GPTQ")
    verify_adapter(policy, tmp_path / "adapter")
    verify_trial_adapter(policy, tmp_path / "trial", base="someone/a-model-GPTQ")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    loaded = PeftModel.from_pretrained(plain_dense(gptq_base), tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(
            columns(pair_logps(policy, pack(PAIRS))), plain_logps(loaded, PAIRS), rtol=1e-5, atol=1e-4
        )


def test_a_saved_adapter_scores_the_same_on_the_base_that_gptqmodel_loads(gptq_base: Path, tmp_path: Path) -> None:
    """By transformers, gptqmodel's torch kernel and PEFT, which know nothing of us, within 1e-3 nats an answer."""
    policy = moved(attach(load_gptq_fp32(gptq_base), SECTION, seed=0), size=0.1)
    save_adapter(policy, tmp_path / "adapter", base="someone/a-model-GPTQ")
    sequences = [
        [pair.prompt.tolist(), answer.ids.tolist()] for pair in PAIRS[:3] for answer in (pair.chosen, pair.rejected)
    ]
    asked, told = tmp_path / "asked.json", tmp_path / "told.json"
    asked.write_text(json.dumps(sequences))
    in_own_process("adapter", gptq_base, tmp_path / "adapter", asked, told)
    with torch.no_grad():
        ours = columns(pair_logps(policy, pack(PAIRS[:3]))).flatten().tolist()
        with as_reference(policy):
            base = columns(pair_logps(policy, pack(PAIRS[:3]))).flatten().tolist()
    assert json.loads(told.read_text()) == pytest.approx(ours, abs=1e-3)
    assert max(abs(x - y) for x, y in zip(ours, base, strict=True)) > 0.1  # the adapter does something


def test_pefts_merge_says_what_to_use_instead(gptq_base: Path) -> None:
    policy = attach(load_gptq_fp32(gptq_base), SECTION, seed=0)
    with pytest.raises(ModelError, match="cannot be merged") as raised:
        policy.merge_and_unload()
    assert "dpo export" in str(raised.value)


def test_weights_held_for_a_while_change_no_bit(gptq_base: Path) -> None:
    model = load_gptq_fp32(gptq_base)
    layers = [module for module in model.modules() if isinstance(module, FrozenLinear)]
    ids = torch.arange(3, 20)[None]
    before = model(ids).logits
    with held_dense(model):
        assert all(layer.held is not None for layer in layers)
        assert torch.equal(model(ids).logits, before)
    assert all(layer.held is None for layer in layers)
    assert weight_count(model) == sum(p.numel() for p in plain_dense(gptq_base).parameters())


SLOW_FAMILIES = ["llama-tied", "mistral-window", "qwen2", "qwen3"]


@pytest.mark.parametrize(
    "architecture", [*(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_FAMILIES), "gemma3"]
)
def test_other_families_and_act_order_compute_what_the_dense_model_does(architecture: str, tmp_path: Path) -> None:
    """Tied embeddings, biases (Qwen2), norms inside attention (Qwen3), scaled embeddings (Gemma-3)."""
    folder = packed_folder(tmp_path, "desc_act=1", "sym=0", "checkpoint_format=gptq_v2", architecture=architecture)
    with torch.no_grad():
        ours = columns(pair_logps(load_gptq_fp32(folder), pack(PAIRS)))
        torch.testing.assert_close(ours, plain_logps(plain_dense(folder), PAIRS), rtol=1e-5, atol=2e-4)


def test_a_run_on_a_gptq_base_trains_resumes_scores_and_chats_without_gptqmodel(
    gptq_base: Path, tmp_path: Path
) -> None:
    """The whole of it in a process where importing gptqmodel or optimum would be seen; stdout carries data only."""
    recipe = write_recipe(tmp_path / "r.yaml", gptq_base, training={"pairs_per_step": 24})
    script = (
        "import sys\n"
        "from tests.tiny_runs import dpo\n"
        f"said = dpo('train', {str(recipe)!r})\n"
        "assert said.code == 0, said.err\n"
        "assert said.out.startswith('held-out accuracy') and said.out.count(chr(10)) == 1, said.out\n"
        "loaded = [name for name in ('gptqmodel', 'optimum') if name in sys.modules]\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    first, *_, last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][1:]
    assert first["loss"] == pytest.approx(0.693147, abs=1e-6)
    assert last["loss"] < first["loss"] - 0.01
    shutil.rmtree(run / "checkpoints" / "step-4")
    (run / "result.json").unlink()
    adapter = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    assert dpo("train", recipe).code == 0
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == adapter
    scored = dpo("score", run, tmp_path / "pairs.jsonl")
    assert scored.code == 0, scored.err
    assert len(scored.lines) == 24
    assert dpo("generate", run, "--prompt", "the bread", "--max-new-tokens", 4).code == 0


def test_the_tutorials_subset_of_targets_trains_too(gptq_base: Path, tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path / "r.yaml",
        gptq_base,
        adapter={"targets": ["q_proj", "v_proj"], "dropout": 0.1},
        model={"dtype": "auto"},
    )
    said = dpo("train", recipe)
    assert said.code == 0, said.err


def damaged(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """The folder after its tensors were changed."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


KEY = "model.layers.1.mlp.down_proj"


def _set(part: str, value: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{KEY}.{part}"] = value(tensors[f"{KEY}.{part}"]).contiguous()

    return change


def _at(place: tuple[int, ...], number: float) -> Callable[[Tensor], Tensor]:
    def changed(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor[place] = number
        return tensor

    return changed


@pytest.mark.parametrize(
    "change, part, words",
    [
        (_set("g_idx", _at((3,), 2)), "g_idx", "names group 2, and there are 2"),
        (_set("g_idx", _at((3,), -1)), "g_idx", "names group -1"),
        (_set("g_idx", lambda x: x[:-1]), "g_idx", "is int32 (63,)"),
        (_set("g_idx", lambda x: x.float()), "g_idx", "is float32"),
        (_set("scales", _at((0, 5), float("nan"))), "scales", "not finite"),
        (_set("scales", _at((1, 0), float("inf"))), "scales", "not finite"),
        (_set("scales", lambda x: x[:1]), "scales", "has 1 groups for 64 inputs"),
        (_set("scales", lambda x: x[:, :-1]), "scales", "not float16 (groups, 32)"),
        (_set("qweight", lambda x: x[:-1]), "qweight", "unsupported number of bits"),
        (_set("qweight", lambda x: x[:4]), "qweight", "has 2 bits a weight, the config says 4"),
        (_set("qweight", lambda x: x[:, :-1]), "qweight", "is int32 (8, 31)"),
        (_set("qweight", lambda x: x.long()), "qweight", "is int64"),
        (_set("qzeros", lambda x: x[:, :-1]), "qzeros", "is int32 (2, 3), not int32 (2, 4)"),
        (lambda tensors: tensors.pop(f"{KEY}.scales"), "scales", "is missing"),
        (lambda tensors: tensors.pop(f"{KEY}.qzeros"), "qzeros", "is missing"),
    ],
)
def test_a_bad_layer_is_refused_by_file_and_tensor(
    gptq_base: Path, tmp_path: Path, change: Any, part: str, words: str
) -> None:
    folder = shutil.copytree(gptq_base, tmp_path / "bad")
    damaged(folder, change)
    with pytest.raises(ModelError) as raised:
        load_gptq_fp32(folder)
    message = str(raised.value)
    assert message.startswith(f"model.safetensors: tensor {KEY}.{part} "), message
    assert words in message


def test_negative_scales_are_told_of_and_used(gptq_base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(gptq_base, tmp_path / "bad")
    damaged(folder, _set("scales", _at((0, 5), -0.5)))
    said: list[str] = []
    load_chat_model(ModelSection(path=str(folder), dtype="float32"), say=said.append)
    assert [line for line in said if "negative" in line and KEY in line]


def _drop(key: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[key]

    return change


def _extra(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.9.mlp.down_proj.qweight"] = tensors[f"{KEY}.qweight"].clone()


def _short_norm(tensors: dict[str, Tensor]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].contiguous()


@pytest.mark.parametrize(
    "change, words",
    [
        (_drop(f"{KEY}.qweight"), "tensors, the first is"),
        (_drop("model.norm.weight"), "1 missing tensors, the first is model.norm.weight"),
        (_extra, "model.layers.9.mlp.down_proj, which is not a linear layer"),
        (_short_norm, "model.safetensors: tensor model.norm.weight is float16 (31,), the model's is (32,)"),
    ],
)
def test_nothing_is_filled_in_at_random(gptq_base: Path, tmp_path: Path, change: Any, words: str) -> None:
    folder = shutil.copytree(gptq_base, tmp_path / "bad")
    damaged(folder, change)
    with pytest.raises(ModelError) as raised:
        load_gptq_fp32(folder)
    assert words in str(raised.value)


def test_a_truncated_file_is_named(gptq_base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(gptq_base, tmp_path / "bad")
    file = folder / "model.safetensors"
    for share in (0.9, 0.5, 0.001):
        file.write_bytes((gptq_base / "model.safetensors").read_bytes()[: int(share * file.stat().st_size)])
        with pytest.raises(ModelError, match=r"model\.safetensors is damaged"):
            load_gptq_fp32(folder)


def test_shards_are_read_and_a_missing_one_is_named(gptq_base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(gptq_base, tmp_path / "sharded")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    where = {key: names[place % 2] for place, key in enumerate(sorted(tensors))}  # a layer's parts lie in both
    for name in names:
        save_file({key: tensors[key] for key in tensors if where[key] == name}, folder / name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    ids = torch.arange(3, 20)[None]
    assert torch.equal(load_gptq_fp32(folder)(ids).logits, load_gptq_fp32(gptq_base)(ids).logits)
    (folder / names[1]).unlink()
    with pytest.raises(ModelError, match=names[1]):
        load_gptq_fp32(folder)
    for outside in ("../plain/model.safetensors", "/etc/passwd", 7, "model.bin"):
        index.write_text(json.dumps({"weight_map": where | {KEY: outside}}))
        with pytest.raises(ModelError, match="names an invalid weight file"):
            load_gptq_fp32(folder)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"bits": 5}, "5 bits in groups of 32"),
        ({"bits": "four"}, "names no bits"),
        ({"group_size": 0}, "groups of 0"),
        ({"quant_method": "quark"}, "quantised with quark"),
        ({"checkpoint_format": "marlin"}, "for one kernel (marlin)"),
        ({"checkpoint_format": "gptq_p"}, "for one kernel (gptq_p)"),
        ({"is_marlin_format": True}, "for one kernel (marlin)"),
        ({"pack_dtype": "int64"}, "its words are int64"),
        ({"bits": 8}, "has 4 bits a weight, the config says 8"),
        ({"group_size": 16}, "the config says 16 inputs a group"),
    ],
)
def test_what_the_config_says_is_held_against_the_tensors(
    gptq_base: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    folder = shutil.copytree(gptq_base, tmp_path / "bad")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError) as raised:
        load_gptq_fp32(folder)
    assert words in str(raised.value)


def test_older_tools_keep_the_settings_in_a_file_of_their_own(gptq_base: Path, tmp_path: Path) -> None:
    """And AutoGPTQ wrote a bias of zeros for every layer, and `inv_freq`: neither is a stranger."""
    folder = shutil.copytree(gptq_base, tmp_path / "old")
    config = json.loads((folder / "config.json").read_text())
    settings = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    old = {"bits": 4, "group_size": 32, "desc_act": False, "sym": True, "model_file_base_name": "model"}
    (folder / "quantize_config.json").write_text(json.dumps(old))
    assert settings["quant_method"] == "gptq"

    def add(tensors: dict[str, Tensor]) -> None:
        tensors[f"{KEY}.bias"] = torch.zeros(32).half()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    damaged(folder, add)
    ids = torch.arange(3, 20)[None]
    assert torch.equal(load_gptq_fp32(folder)(ids).logits, load_gptq_fp32(gptq_base)(ids).logits)
    read = read_quantization(folder)
    assert isinstance(read, Gptq)
    assert not read.by_gptqmodel
    before = weights_fingerprint(folder)
    (folder / "quantize_config.json").write_text(json.dumps(old | {"sym": False}))
    assert weights_fingerprint(folder) != before


def test_modules_may_differ_where_the_config_says_so(gptq_base: Path, tmp_path: Path) -> None:
    """`dynamic`: one layer of 8 bits among those of 4."""
    other = packed_folder(tmp_path, "bits=8", "group_size=64")
    folder = shutil.copytree(gptq_base, tmp_path / "mixed")
    eight = load_file(other / "model.safetensors")
    damaged(folder, lambda tensors: tensors.update({key: eight[key] for key in eight if key.startswith(KEY)}))
    with pytest.raises(ModelError, match="has 8 bits a weight, the config says 4"):
        load_gptq_fp32(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["dynamic"] = {r".*layers\.1\.mlp\.down_proj": {"bits": 8, "group_size": 64}}
    (folder / "config.json").write_text(json.dumps(config))
    layer = load_gptq_fp32(folder).get_submodule(KEY)
    assert (layer.kept.bits, layer.kept.group_size) == (8, 64)
    dense = load_file(other / "dense" / "model.safetensors")[f"{KEY}.weight"]
    assert torch.equal(layer.kept.dequantised(torch.float16), dense)


def test_a_quantised_head_is_read_as_plain_weights(gptq_base: Path, tmp_path: Path) -> None:
    """Log-probs are read off the head's own weight, so it is formed once."""
    folder = shutil.copytree(gptq_base, tmp_path / "head")

    def replace(tensors: dict[str, Tensor]) -> None:
        del tensors["lm_head.weight"]
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            tensors[f"lm_head.{part}"] = tensors[f"model.layers.0.mlp.gate_proj.{part}"].clone()

    vocabulary = load_file(folder / "model.safetensors")["lm_head.weight"].shape[0]
    assert vocabulary != 64
    damaged(folder, replace)
    with pytest.raises(ModelError, match=r"lm_head\.qweight is int32"):
        load_gptq_fp32(folder)


def test_fp8_says_what_it_needs(gptq_base: Path) -> None:
    with pytest.raises(ModelError, match="Hopper"):
        load_gptq_fp32(gptq_base, compute="fp8")


DORA = SECTION.model_copy(update={"kind": "dora"})


def test_dora_over_packed_weights_is_plain_peft_s_over_the_oracle_s(gptq_base: Path) -> None:
    """Its norms are those of the dequantised weights."""
    policy = attach(load_gptq_fp32(gptq_base), DORA, seed=0)
    oracle = get_peft_model(
        plain_dense(gptq_base),
        LoraConfig(r=SECTION.rank, lora_alpha=SECTION.alpha, target_modules="all-linear", use_dora=True),
    ).eval()
    theirs = dict(oracle.named_parameters())
    for name, p in policy.named_parameters():
        if "magnitude" in name:
            torch.testing.assert_close(p, theirs[name], rtol=1e-6, atol=1e-6)
            p.detach().mul_(1.2)
        elif "lora_B" in name:
            p.detach().copy_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
    for name, p in oracle.named_parameters():
        if "lora_" in name:
            p.data = dict(policy.named_parameters())[name].data.clone()
    expected_P2 = plain_logps(oracle, PAIRS)
    expected = gradients(oracle, (WEIGHTS_P2 * expected_P2).sum())
    logps_P2 = columns(pair_logps(policy, pack(PAIRS)))
    torch.testing.assert_close(logps_P2, expected_P2, rtol=1e-5, atol=1e-4)
    for name, gradient in gradients(policy, (WEIGHTS_P2 * logps_P2).sum()).items():
        largest = expected[name].abs().max().item()
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-4 * largest, msg=name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_check_at_the_start_holds_dora_over_packed_weights_to_peft_s_own(gptq_base: Path, dtype: Any) -> None:
    packed = load_chat_model(ModelSection(path=str(gptq_base), dtype=dtype)).model
    assert check_packing(attach(packed, DORA, seed=0), PAIRS) < (1e-4 if dtype == "float32" else 0.2)
