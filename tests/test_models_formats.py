"""Quantised formats besides GPTQ: formed weights are their own library's to the bit; each trains, scores, generates,
exports; its adapters are plain PEFT's; and what is not exactly the format is refused.

The oracles are bitsandbytes' CPU wheel (`tests/quantised_bases.py`), transformers and plain PEFT.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, LlamaConfig

from dpo_studio.config import ModelSection
from dpo_studio.errors import ModelError
from dpo_studio.frozen.awq_files import read_awq
from dpo_studio.frozen.linear import FrozenLinear
from dpo_studio.frozen.nf4 import Nf4
from dpo_studio.frozen.row_scaled import RowScaled
from dpo_studio.frozen.scaled import quantise_fp8
from dpo_studio.frozen.shards import Place
from dpo_studio.learning.logprobs import pair_logps
from dpo_studio.models.adapters import as_reference, attach, save_adapter
from dpo_studio.models.load import load_chat_model
from dpo_studio.sizes import check_model_size
from dpo_studio.tokens.pack import pack
from tests.gptq_oracle import in_own_process
from tests.pairs_of_ids import random_pairs
from tests.policies import SECTION, moved
from tests.quantised_bases import (
    awq_folder,
    change_config,
    change_tensors,
    compressed_folder,
    fp8_folder,
    int8_folder,
    nf4_folder,
)
from tests.textbook import columns, plain_logps
from tests.tiny_models import tiny_folder
from tests.tiny_runs import dpo, write_recipe

FORMATS: dict[str, Callable[[Path, Path], Path]] = {
    "awq": lambda plain, out: awq_folder(plain, out),
    "awq-in-bf16": lambda plain, out: awq_folder(plain, out, scales=torch.bfloat16, group_size=64),
    "ct-4": lambda plain, out: compressed_folder(
        plain, out, num_bits=4, type="int", strategy="group", group_size=32, symmetric=True
    ),
    "ct-4-zeros": lambda plain, out: compressed_folder(
        plain, out, num_bits=4, type="int", strategy="group", group_size=64, symmetric=False
    ),
    "ct-8": lambda plain, out: compressed_folder(
        plain, out, num_bits=8, type="int", strategy="channel", symmetric=True
    ),
    "ct-8-zeros": lambda plain, out: compressed_folder(
        plain, out, num_bits=8, type="int", strategy="channel", symmetric=False
    ),
    "ct-fp8": lambda plain, out: compressed_folder(plain, out, num_bits=8, type="float", strategy="channel"),
    "ct-fp8-whole": lambda plain, out: compressed_folder(plain, out, num_bits=8, type="float", strategy="tensor"),
    "ct-fp8-blocks": lambda plain, out: compressed_folder(
        plain, out, num_bits=8, type="float", strategy="block", block_structure=[128, 128]
    ),
    "fp8": lambda plain, out: fp8_folder(plain, out, block=(128, 128)),
    "fp8-small": lambda plain, out: fp8_folder(plain, out, block=(32, 64), scales=torch.bfloat16),
    "int8": lambda plain, out: int8_folder(plain, out),
    "nf4": lambda plain, out: nf4_folder(plain, out, double=False),
    "nf4-double": lambda plain, out: nf4_folder(plain, out, double=True),
    "nf4-in-bf16": lambda plain, out: nf4_folder(plain, out, double=True, storage=torch.bfloat16),
}
PAIRS = random_pairs(4)
SHAPE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 192, "head_dim": 16, "num_hidden_layers": 2}
KEY = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers, in fp32."""
    return tiny_folder(tmp_path_factory.mktemp("plain"), **SHAPE)


@pytest.fixture(scope="module")
def base(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a format. Not to be written to."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = FORMATS[name](plain, tmp_path_factory.mktemp(name) / "base")
        return made[name]

    return folder


def load(folder: Path, dtype: str = "float32", **settings: Any) -> Any:
    """Our model."""
    return load_chat_model(ModelSection(path=str(folder), dtype=dtype, **settings)).model


def test_awqs_order_worked_by_hand() -> None:
    """Input 0's word is 0x76543210: its nibbles 0 to 7 are outputs 0, 2, 4, 6, 1, 3, 5, 7, so outputs 0 to 7 have the
    integers 0, 4, 1, 5, 2, 6, 3, 7. The other seven inputs are 0. Zero points are 1, scales 0.5: -0.5 to 3."""
    words, zeros = torch.zeros(8, 1, dtype=torch.int32), torch.full((1, 1), 0x11111111, dtype=torch.int32)
    words[0] = 0x76543210
    tensors = {"x.qweight": words, "x.qzeros": zeros, "x.scales": torch.full((1, 8), 0.5).half()}
    read = Read(tensors)
    place = Place(read, torch.device("cpu"), torch.float32, "packed", "auto", print)  # type: ignore[arg-type]
    layer = read_awq(Path(), {"bits": 4, "group_size": 8}).reader(place).linear("x", nn.Linear(8, 8, bias=False))
    assert isinstance(layer, FrozenLinear)
    formed_NK = layer.kept.dequantised(torch.float32)
    assert formed_NK[:, 0].tolist() == [-0.5, 1.5, 0.0, 2.0, 0.5, 2.5, 1.0, 3.0]
    assert (formed_NK[:, 1:] == -0.5).all()


class Read:
    """Tensors in the place of files."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.files = dict.fromkeys(tensors, Path("none"))
        self.read = tensors.__getitem__


@pytest.mark.parametrize("name", FORMATS)
def test_formed_weights_are_the_librarys_own(base: Callable[[str], Path], name: str) -> None:
    """Every layer, in three precisions, packed and formed once: those of `dense/`, to the bit."""
    for dtype in ("bfloat16", "float32", "float16"):
        dense = load_file(base(name) / "dense" / f"{dtype}.safetensors")
        layers = {n: m for n, m in load(base(name), dtype).named_modules() if isinstance(m, FrozenLinear)}
        once = dict(load(base(name), dtype, residency="bf16").named_parameters())
        assert len(layers) == 2 * 7
        for key, layer in layers.items():
            expected = dense[f"{key}.weight"]
            assert str(expected.dtype) == f"torch.{dtype}"
            assert expected.abs().max() > 0.1
            assert torch.equal(layer.kept.dequantised(expected.dtype), expected), key
            assert torch.equal(once[f"{key}.weight"], expected), key
            assert torch.equal(layer.kept.rows(5).exact(torch.float32), layer.kept.exact(torch.float32)[:5])


@pytest.mark.parametrize("name", FORMATS)
def test_log_probs_and_first_loss_are_the_plain_models(base: Callable[[str], Path], name: str) -> None:
    """transformers' own model with the library's weights, in fp32, one sequence at a time; adapter on and off."""
    policy = moved(attach(load(base(name)), SECTION, seed=0))
    plain = AutoModelForCausalLM.from_pretrained(base(name) / "dense", dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        with as_reference(policy):
            reference = columns(pair_logps(policy, pack(PAIRS)))
        torch.testing.assert_close(reference, plain_logps(plain, PAIRS), rtol=1e-5, atol=5e-4)


@pytest.mark.parametrize("name", ["awq", "ct-4-zeros", "ct-fp8", "fp8", "int8", "nf4-double"])
def test_a_base_trains_scores_generates_and_is_exported(base: Callable[[str], Path], name: str, tmp_path: Path) -> None:
    """Four steps from ln 2 on; what is exported is the formed weight plus the adapter's delta, drawn to bf16."""
    recipe = write_recipe(tmp_path / "r.yaml", base(name))
    said = dpo("train", recipe)
    assert said.code == 0, said.err
    run = tmp_path / "run"
    first, *_, last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][1:]
    assert first["loss"] == pytest.approx(0.693147, abs=1e-6)
    assert last["loss"] != pytest.approx(0.693147, abs=1e-4)
    assert len(dpo("score", run, tmp_path / "pairs.jsonl").lines) == 24
    assert dpo("generate", run, "--prompt", "the bread", "--max-new-tokens", 4).code == 0
    said = dpo("export", run, tmp_path / "merged", "--to", "merged", "--force")
    assert said.code == 0, said.err
    merged, adapter = load_file(tmp_path / "merged" / "model.safetensors"), load_file(run / "adapter" / ADAPTER)
    formed = load_file(base(name) / "dense" / "float32.safetensors")[f"{KEY}.weight"]
    a, b = (adapter[f"base_model.model.{KEY}.lora_{side}.weight"] for side in "AB")
    exact = formed + 2 * b @ a  # alpha 4, rank 2
    assert (merged[f"{KEY}.weight"].float() - exact).abs().max() <= exact.abs().max() * 2**-7
    assert not torch.equal(merged[f"{KEY}.weight"], formed.bfloat16())
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())


ADAPTER = "adapter_model.safetensors"


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
@pytest.mark.parametrize("name", ["ct-4-zeros", "ct-fp8", "fp8-small", "int8", "nf4-double"])
def test_a_saved_adapter_scores_the_same_by_plain_peft_on_the_librarys_layers(
    base: Callable[[str], Path], name: str, tmp_path: Path
) -> None:
    """transformers loads the same folder by the format's own library (compressed-tensors and FP8 are decompressed on a
    CPU); in fp32, one sequence at a time."""
    policy = moved(attach(load(base(name)), SECTION, seed=0))
    save_adapter(policy, tmp_path / "adapter", base="someone/a-model")
    settings: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
    if name.startswith("ct"):
        settings["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(base(name), **settings)
    for p in theirs.parameters():  # what is not quantised stays in bf16, whatever is asked for
        p.data = p.data.float() if p.dtype == torch.bfloat16 else p.data
    model = PeftModel.from_pretrained(theirs, tmp_path / "adapter")
    model.train()  # else bitsandbytes multiplies in bf16, or rounds activations to INT8; there is no dropout
    with torch.no_grad():
        ours = columns(pair_logps(policy, pack(PAIRS)))
        with as_reference(policy):
            reference = columns(pair_logps(policy, pack(PAIRS)))
    torch.testing.assert_close(plain_logps(model, PAIRS).detach(), ours, rtol=1e-5, atol=1e-3)
    assert (ours - reference).abs().max() > 0.1


@pytest.mark.parametrize("kept", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_a_dense_base_is_quantised_to_the_bits_that_bitsandbytes_makes(
    kept: str, architecture: str, tmp_path: Path
) -> None:
    """Every linear layer but the head, biases (Qwen2) kept; levels and scales. Rows of 36 and 70: blocks over their
    ends, a last one that is not full, and one of zeros."""
    from bitsandbytes.functional import quantize_4bit

    shape: dict[str, Any] = {"hidden_size": 36, "intermediate_size": 70, "head_dim": 8, "num_hidden_layers": 1}
    folder = tiny_folder(tmp_path / "base", architecture, **shape)
    cast = getattr(torch, kept)

    def change(tensors: dict[str, Tensor]) -> None:
        tensors.update({key: tensor.to(cast) for key, tensor in tensors.items()})
        tensors["model.layers.0.mlp.up_proj.weight"][:4] = 0

    change_tensors(folder, change)
    model = load(folder, "bfloat16", quantize="nf4")
    layers = {name: m for name, m in model.named_modules() if isinstance(m, FrozenLinear)}
    assert len(layers) == 7
    tensors = load_file(folder / "model.safetensors")
    for name, layer in layers.items():
        packed, state = quantize_4bit(tensors[f"{name}.weight"], quant_type="nf4")
        assert isinstance(layer.kept, Nf4)
        assert torch.equal(layer.kept.bytes_P, packed.flatten())
        assert torch.equal(layer.kept.scales_B, state.absmax)
        assert (layer.bias is not None) == (f"{name}.bias" in tensors)
    assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"].bfloat16())


@pytest.mark.parametrize("kept", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(256, 384), (130, 200)])
def test_fp8_is_quantised_to_the_bits_that_transformers_makes(kept: torch.dtype, shape: tuple[int, int]) -> None:
    """Where blocks divide the weight; of one that they do not divide, filled up with zeros. A block of zeros stays."""
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    weight_NK = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(kept)
    weight_NK[:128, 128:] = 0
    found = quantise_fp8(weight_NK)
    outputs, inputs = shape
    whole = pad(weight_NK, (0, -inputs % 128, 0, -outputs % 128))
    config = SimpleNamespace(weight_block_size=[128, 128], scale_fmt="float")
    made = Fp8Quantize(SimpleNamespace(quantization_config=config))._quantize_one("x.weight", whole)
    assert torch.equal(found.values_NK.float(), made["x.weight"].float()[:outputs, :inputs])
    assert torch.equal(found.scales_RC, made["x.weight_scale_inv"])
    assert (found.exact(torch.float32) - weight_NK).abs().max() <= weight_NK.abs().max() / 16
    assert (found.exact(torch.float32)[:128, 128:] == 0).all()


def test_a_base_quantised_to_fp8_trains(plain: Path, tmp_path: Path) -> None:
    """Its weights are the quantised ones; its run starts at ln 2."""
    model = load(plain, quantize="fp8")
    tensors = load_file(plain / "model.safetensors")
    for name, layer in model.named_modules():
        if isinstance(layer, FrozenLinear):
            assert torch.equal(
                layer.kept.exact(torch.float32), quantise_fp8(tensors[f"{name}.weight"]).exact(torch.float32)
            )
    said = dpo("train", write_recipe(tmp_path / "r.yaml", plain, model={"quantize": "fp8"}))
    assert said.code == 0, said.err
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[1])
    assert first["loss"] == pytest.approx(0.693147, abs=1e-6)


def test_a_base_quantised_while_loading_is_the_checkpoint_in_nf4(
    base: Callable[[str], Path], plain: Path, tmp_path: Path
) -> None:
    """A run on the dense base with model.quantize gives the numbers of one on the NF4 checkpoint of the same weights,
    although the reference of a run on the dense base itself, with the same cache, came first."""
    found = []
    folder = shutil.copytree(plain, tmp_path / "dense")
    change_tensors(folder, lambda tensors: tensors.update({key: x.bfloat16() for key, x in tensors.items()}))
    for name, path, model in (("b", folder, {}), ("a", base("nf4"), {}), ("c", folder, {"quantize": "nf4"})):
        (tmp_path / name).mkdir()
        steps: dict[str, Any] = {} if name != "b" else {"training": {"max_steps": 1}}
        said = dpo("train", write_recipe(tmp_path / name / "r.yaml", path, model=model, **steps))
        assert said.code == 0, said.err
        found.append((tmp_path / name / "run" / "metrics.jsonl").read_text().splitlines()[1:])
    dense, checkpoint, quantised = found
    assert quantised == checkpoint
    assert quantised[0] != dense[0]
    assert dpo("score", tmp_path / "c" / "run", tmp_path / "c" / "pairs.jsonl").code == 0
    said = dpo("export", tmp_path / "c" / "run", tmp_path / "merged", "--to", "merged", "--force")
    assert said.code == 0 and "as they are formed" in said.err, said.err


@pytest.mark.parametrize("name", ["awq", "fp8", "nf4-double"])
def test_a_quantised_base_computes_in_fp8_with_its_formed_weights(base: Callable[[str], Path], name: str) -> None:
    """e4m3 with a scale a row of the weight in bf16, as of a dense base; and a policy that starts at its reference."""
    dense = load_file(base(name) / "dense" / "bfloat16.safetensors")
    model = load(base(name), "bfloat16", compute="fp8")
    for key, weight_NK in dense.items():
        found, expected = model.get_submodule(key.removesuffix(".weight")).kept, RowScaled.of(weight_NK)
        assert isinstance(found, RowScaled)
        for tensor, wanted in zip(found.tensors().values(), expected.tensors().values(), strict=True):
            assert torch.equal(tensor.float(), wanted.float())
    policy = attach(model, SECTION, seed=0)
    with torch.no_grad():
        now = columns(pair_logps(policy, pack(PAIRS)))
        with as_reference(policy):
            assert torch.equal(columns(pair_logps(policy, pack(PAIRS))), now)


def test_weights_are_not_stored_in_two_ways(plain: Path) -> None:
    with pytest.raises(ModelError, match="two ways to store the same weights"):
        load(plain, "bfloat16", quantize="nf4", compute="fp8")


def test_a_base_that_is_quantised_is_not_quantised_again(base: Callable[[str], Path]) -> None:
    with pytest.raises(ModelError, match="is for dense bases"):
        load(base("nf4"), quantize="nf4")


@pytest.mark.slow
def test_a_saved_adapter_scores_the_same_on_the_awq_base_that_gptqmodel_loads(
    base: Callable[[str], Path], tmp_path: Path
) -> None:
    """By transformers, gptqmodel's torch_awq and PEFT. Its products are in fp16 whatever the precision is: within
    0.1 nats of the 30 to 210 of an answer, where the adapter changes some by more than 1."""
    policy = moved(attach(load(base("awq")), SECTION, seed=0))
    save_adapter(policy, tmp_path / "adapter", base="someone/a-model-AWQ")
    sequences = [[p.prompt.tolist(), a.ids.tolist()] for p in PAIRS for a in (p.chosen, p.rejected)]
    asked, told = tmp_path / "asked.json", tmp_path / "told.json"
    asked.write_text(json.dumps(sequences))
    in_own_process("adapter", base("awq"), tmp_path / "adapter", asked, told)
    with torch.no_grad():
        ours = columns(pair_logps(policy, pack(PAIRS))).flatten()
        with as_reference(policy):
            reference = columns(pair_logps(policy, pack(PAIRS))).flatten()
    assert json.loads(told.read_text()) == pytest.approx(ours.tolist(), abs=0.1)
    assert (ours - reference).abs().max() > 1


@pytest.mark.parametrize(("kind", "elements"), [("U8", 2), ("BF16", 4), ("F32", 8)])
def test_four_bits_a_weight_are_counted_as_such_in_any_precision(kind: str, elements: int) -> None:
    """Four layers of a Llama 7B, 809 million weights: in bf16 they are a quarter of that, and not too few for it."""
    config = LlamaConfig(num_hidden_layers=4, vocab_size=64)
    count = 4 * (4 * 4096**2 + 3 * 4096 * 11008)
    shapes = {"all.weight": (kind, (count // elements, 1)), "all.weight.quant_map": ("F32", (16,))}
    check_model_size(AutoModelForCausalLM, config, shapes, "a model")
    with pytest.raises(ModelError, match="its weights have"):
        check_model_size(AutoModelForCausalLM, config, shapes | {"all.weight": (kind, (count // 64, 1))}, "a model")


def ct_weights(**changes: Any) -> dict[str, Any]:
    """The one group of a compressed-tensors config, changed."""
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights | changes}}}


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("awq", {"version": "gemv"}, "another packing than gemm (gemv)"),
        ("awq", {"backend": "llm-awq"}, "another packing than gemm"),
        ("awq", {"bits": 8}, "AWQ of 8 bits"),
        ("awq", {"zero_point": False}, "zero_point False"),
        ("awq", {"group_size": 0}, "has the group_size 0"),
        ("ct-4", {"format": "marlin-24"}, "has the format 'marlin-24'"),
        ("ct-4", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "is sparse ('sparse-24-bitmask')"),
        ("ct-4", {"kv_cache_scheme": {"num_bits": 8}}, "quantises keys and values"),
        ("ct-4", {"config_groups": {}}, "names no one scheme for all its weights"),
        ("ct-4", {"config_groups": {"a": {"weights": {"num_bits": 4}}, "b": {"weights": {}}}}, "names no one scheme"),
        ("ct-4", ct_weights(num_bits=3), "has weights of 3 bits"),
        ("ct-4", ct_weights(actorder="group"), "has activation ordering (actorder 'group')"),
        ("ct-4", ct_weights(strategy="token"), "has scales by 'token'"),
        ("ct-4", ct_weights(group_size=None), "has the group_size None"),
        ("ct-fp8", {"format": "float-quantized"} | ct_weights(type="int"), "has weights of 4 bits, type 'int'"),
        (
            "ct-4",
            {"config_groups": {"a": ct_weights()["config_groups"]["group_0"] | {"format": []}}},
            "several formats",
        ),
        ("ct-4", ct_weights(num_bits=[], type={}), "has weights of [] bits, type {}"),
        ("awq", {"bits": {}, "version": []}, "AWQ of {} bits"),
        ("fp8", {"weight_block_size": None}, "have the weight_block_size None"),
        ("fp8", {"weight_block_size": [128, 0]}, "have the weight_block_size [128, 0]"),
        ("fp8", {"fmt": "e5m2"}, "are 'e5m2'"),
        ("fp8", {"activation_scheme": "static"}, "activation_scheme 'static'"),
        ("nf4", {"bnb_4bit_quant_type": "fp4"}, "to fp4 (bnb_4bit_quant_type)"),
        ("nf4", {"load_in_4bit": False}, "neither load_in_4bit nor load_in_8bit"),
    ],
)
def test_other_settings_are_refused_by_name(
    base: Callable[[str], Path], name: str, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    folder = shutil.copytree(base(name), tmp_path / "bad")
    change_config(folder, **changes)
    with pytest.raises(ModelError) as raised:
        load(folder)
    assert words in str(raised.value) and "hint" in str(raised.value)


def _state(**changes: Any) -> Callable[[dict[str, Tensor]], None]:
    """Other numbers in the layer's state."""

    def change(tensors: dict[str, Tensor]) -> None:
        key = f"{KEY}.weight.quant_state.bitsandbytes__nf4"
        state = json.loads(bytes(tensors[key].tolist())) | changes
        tensors[key] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return change


def _set(part: str, value: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({f"{KEY}.{part}": value(tensors[f"{KEY}.{part}"])})


def _add(part: str, value: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({f"{KEY}.{part}": value})


def _drop(part: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[f"{KEY}.{part}"]

    return change


def test_blocks_may_be_larger_than_a_weight(base: Callable[[str], Path], tmp_path: Path) -> None:
    """Then a weight has one scale."""
    folder = shutil.copytree(base("fp8"), tmp_path / "large")
    change_config(folder, weight_block_size=[10**6, 10**6])

    def change(tensors: dict[str, Tensor]) -> None:
        tensors.update({key: x[:1, :1] for key, x in tensors.items() if key.endswith("scale_inv")})

    change_tensors(folder, change)
    layer, tensors = load(folder).get_submodule(KEY), load_file(folder / "model.safetensors")
    formed_NK = tensors[f"{KEY}.weight"].float() * tensors[f"{KEY}.weight_scale_inv"]
    assert torch.equal(layer.kept.dequantised(torch.float32), formed_NK)
    x = torch.randn(3, 192)
    assert torch.equal(layer(x), x @ formed_NK.t())


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("awq", _set("qweight", lambda x: x[:-1]), "is int32 (191, 8), not int32 (192, 8)"),
        ("awq", _set("qzeros", lambda x: x.float()), "is float32 (6, 8), not int32 (6, 8)"),
        ("awq", _set("scales", lambda x: x[:3]), "is float16 (3, 64), not float16 or bfloat16 (6, 64)"),
        ("awq", _set("scales", lambda x: x / 0), "has values that are not finite"),
        ("awq", _drop("qzeros"), f"tensor {KEY}.qzeros is missing"),
        ("ct-4", _set("weight_shape", lambda x: x.flip(0)), "is [192, 64], the model's is [64, 192]"),
        ("ct-4", _set("weight_packed", lambda x: x[:, 1:]), "is int32 (64, 23), not int32 (64, 24)"),
        ("ct-4", _set("weight_scale", lambda x: x[:, 1:]), "is bfloat16 (64, 5), not bfloat16"),
        ("ct-4", _add("weight_g_idx", torch.zeros(192)), "orders inputs by activation"),
        ("ct-4", _add("weight_zero_point", torch.zeros(8, 6).int()), "is there, and the config says symmetric"),
        ("ct-4-zeros", _drop("weight_zero_point"), "weight_zero_point is missing"),
        ("ct-fp8", _set("weight", lambda x: x.bfloat16()), "is bfloat16 (64, 192), not float8_e4m3fn"),
        ("ct-fp8", _set("weight_scale", lambda x: x[1:]), "is (63, 1), not (64, 1)"),
        ("ct-fp8", _add("weight_zero_point", torch.zeros(64, 1)), "is not read for FP8"),
        ("fp8", _set("weight_scale_inv", lambda x: x[:, :1]), "is float32 (1, 1), not float32 or bfloat16"),
        ("fp8", _set("weight_scale_inv", lambda x: x.to(torch.float8_e8m0fnu)), "is float8_e8m0fnu (1, 2)"),
        ("fp8", _set("weight", lambda x: x.float()), "is float32 (64, 192), not float8_e4m3fn"),
        ("fp8", _set("weight", lambda x: (x.float() * float("nan")).to(x.dtype)), "has values that are not finite"),
        ("int8", _set("weight_format", lambda x: x + 1), "names another order than rows"),
        ("int8", _set("SCB", lambda x: x[1:]), "is float32 (63,), not float32 (64,)"),
        ("int8", _set("weight", lambda x: x.byte()), "is uint8 (64, 192), not int8"),
        ("nf4", _state(blocksize=96), "has the blocksize 96"),
        ("nf4", _state(shape=[192, 64]), "is of [192, 64], the model's is (64, 192)"),
        ("nf4", _state(quant_type="fp4"), "is not the state of a weight in NF4"),
        ("nf4", _set("weight", lambda x: x[:-1]), "weights, not 64 x 192"),
        ("nf4", _set("weight", lambda x: x[0, 0]), "has 2 weights, not 64 x 192"),
        ("nf4", _set("weight", lambda x: x.long()), "is int64 (6144, 1), not uint8"),
        ("nf4", _set("weight.absmax", lambda x: x[:-1]), "is float32 (191,), not float32 (192,)"),
        ("nf4", _set("weight.absmax", lambda x: x / 0), "has values that are not finite"),
        ("nf4", _set("weight.quant_map", lambda x: x * 0.5), "has other levels than NF4's"),
        ("nf4", _drop("weight.absmax"), f"tensor {KEY}.weight.absmax is missing"),
        ("nf4", _drop("weight.quant_state.bitsandbytes__nf4"), "bitsandbytes__nf4 is missing"),
        ("nf4", _drop("weight"), f"tensor {KEY}.weight is missing"),
        ("nf4-double", _state(nested_blocksize=1), "has the nested_blocksize 1"),
        ("nf4-double", _state(nested_offset=None), "has the nested_offset None"),
        ("nf4-double", _state(nested_offset=10**60), "has the nested_offset 1000"),
        ("nf4", _state(shape=7), "is of 7, the model's is (64, 192)"),
        ("nf4-double", _drop("weight.nested_quant_map"), "nested_quant_map is missing"),
    ],
)
def test_a_bad_layer_is_refused_by_tensor(
    base: Callable[[str], Path], name: str, change: Any, words: str, tmp_path: Path
) -> None:
    folder = shutil.copytree(base(name), tmp_path / "bad")
    change_tensors(folder, change)
    with pytest.raises(ModelError) as raised:
        load(folder)
    assert words in str(raised.value), str(raised.value)
    assert KEY in str(raised.value)
