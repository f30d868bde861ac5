"""GGUF exports: llama.cpp itself (xllamacpp) computes what the merged model computes, and every way to break it shows.

The oracle is llama.cpp, which shares nothing with us; the file's tokens are read back by the gguf package.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from dpo_studio.errors import ModelError
from dpo_studio.export import gguf_file
from dpo_studio.export.gguf_file import write_gguf
from dpo_studio.export.gguf_tokenizer import GgufTokenizer, read_tokenizer
from dpo_studio.export.llama_cpp import LlamaCpp
from dpo_studio.export.modelfile import modelfile
from dpo_studio.export.parity import Parity, PromptParity
from tests.tiny_models import tiny_folder
from tests.tiny_runs import dpo, write_recipe
from tests.tiny_tokenizers import FAMILIES, tiny_tokenizer

QUESTION = [{"role": "user", "content": "How far is the moon? 384,400 km"}]
_WINDOW, _FULL = "sliding_attention", "full_attention"
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-3.1": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    "llama-tied": ("llama-tied", {}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {"head_dim": 16}),
    "qwen3": ("qwen3", {}),
    "gemma2": (
        "gemma2",
        {"tie_word_embeddings": True, "query_pre_attn_scalar": 32, "layer_types": [_WINDOW, _FULL] * 2},
    ),
    "gemma3": (
        "gemma3",
        {"query_pre_attn_scalar": 32, "num_hidden_layers": 6, "layer_types": [_WINDOW] * 5 + [_FULL]},
    ),
}


CHATS = {"llama-3.1": "llama3", "mistral": "llama2-first", "llama-tied": "llama2", "gemma2": "gemma", "gemma3": "gemma"}
"""The tokenizer of each shape, where that is not a byte-level one with ChatML."""


def end_of_turn(family: str) -> int:
    """The token that ends a turn."""
    its = FAMILIES[family]
    return int(tiny_tokenizer(family).convert_tokens_to_ids(its.end or its.eos))


def written(folder: Path, out: Path, type_: Any = "f16", family: str = "chatml", **changes: Any) -> Path:
    """The folder's model as a GGUF."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    settings = {
        "config": AutoConfig.from_pretrained(folder).get_text_config(),
        "tokenizer": tokenizer,
        "template": tokenizer.chat_template,
        "end_of_turn": end_of_turn(family),
        "name": "tiny",
        "type_": type_,
    }
    write_gguf(folder, out, **(settings | changes))
    return out


def plain_logps(folder: Path, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Of each answer token, by transformers in fp32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    ids = torch.tensor([[*prompt, *answer]])
    with torch.no_grad():
        logps = model(ids).logits.log_softmax(-1)
    answer_logps: torch.Tensor = logps[0, len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None]).flatten()
    return answer_logps


@pytest.mark.parametrize("shape", SHAPES)
def test_llama_cpp_computes_what_transformers_does(shape: str, tmp_path: Path) -> None:
    """Log-probs of 12 tokens after a chat, and the chat's ids, at every family's own shape. In bf16: its matrices are
    exact, what is left is llama.cpp's fp16 cache and sums."""
    (architecture, settings), family = SHAPES[shape], CHATS.get(shape, "chatml")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32, "initializer_range": 0.1} | settings
    folder = tiny_folder(tmp_path / "model", architecture, family=family, dtype=torch.bfloat16, **sizes)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False)
    answer = tokenizer("About 384,400 kilometres away.", add_special_tokens=False)["input_ids"][:12]
    consumer = LlamaCpp(written(folder, tmp_path / "m.gguf", "bf16", family), context=256)
    expected = plain_logps(folder, prompt, answer)
    found = torch.tensor(consumer.token_logps(prompt, answer))
    assert (found - expected).abs().mean() < 0.03, (found, expected)
    assert consumer.reads_chat_as(QUESTION, prompt) is None
    assert consumer.ends_at(prompt, end_of_turn(family))
    assert not consumer.ends_at(prompt, answer[0])


@pytest.mark.parametrize("type_", ["f16", "q8_0"])
def test_tensors_are_read_back_within_their_types_rounding(type_: str, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", hidden_size=64, intermediate_size=128, head_dim=16)
    reader = gguf.GGUFReader(written(folder, tmp_path / "m.gguf", type_))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    wanted = model.model.layers[1].mlp.down_proj.weight.detach().numpy()
    stored = tensors["blk.1.ffn_down.weight"]
    found = gguf.quants.dequantize(stored.data, stored.tensor_type)
    assert np.abs(found - wanted).max() <= np.abs(wanted).max() * (2**-11 if type_ == "f16" else 1 / 127)
    norm = tensors["blk.0.attn_norm.weight"]
    assert norm.tensor_type == gguf.GGMLQuantizationType.F32


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_act": "relu"}, "with silu, not relu"),
        ({"attention_bias": True}, "without attention_bias"),
        ({"model_type": "stablelm"}, "stablelm models are not written as GGUF"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "scaling of type yarn"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(change: dict[str, Any], words: str) -> None:
    config = AutoConfig.for_model("llama")
    if "model_type" in change:
        config = AutoConfig.for_model(change["model_type"])
    for key, value in change.items():
        if key != "model_type":
            setattr(config, key, value)
    with pytest.raises(ModelError, match=words):
        gguf_file.gguf_family(config)


def test_a_split_rule_without_a_name_is_refused(tmp_path: Path) -> None:
    tokenizer: PreTrainedTokenizerBase = tiny_tokenizer("chatml")
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["pre_tokenizer"] = {"type": "Whitespace"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    from transformers import PreTrainedTokenizerFast

    odd = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    with pytest.raises(ModelError, match=r"no name for \(Whitespace\)"):
        read_tokenizer(odd, 600, None)


# a whole export


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose adapter moved far."""
    folder = tmp_path_factory.mktemp("gguf")
    base = tiny_folder(
        folder / "base", family="llama3", hidden_size=64, intermediate_size=128, head_dim=32, initializer_range=0.1
    )
    recipe = write_recipe(
        folder / "r.yaml", base, training={"learning_rate": 5e-2, "max_steps": 6, "pairs_per_step": 8}
    )
    said = dpo("train", recipe)
    assert said.code == 0, said.err
    return folder / "run"


def test_an_export_ends_with_the_table_and_passes(run: Path, tmp_path: Path) -> None:
    said = dpo("export", run, tmp_path / "out", "--to", "gguf")
    assert said.code == 0, said.err
    content = json.loads((tmp_path / "out/export.json").read_text())
    parity = content["parity"]
    assert parity["misses"] == [] and parity["stops"] is True
    assert 0 <= parity["nats_a_token"] < 0.005 < 0.1 < parity["nats_a_token_from_base"]
    assert all(one["chat"] is None for one in parity["prompts"])
    assert "nats a token from the run (f16 explains 0.005)" in said.err
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        *("Modelfile", "README.md", "export.json", "model.gguf"),
    ]


@pytest.mark.parametrize("broken", ["template", "eos", "bos", "adapter"])
def test_each_way_to_break_an_export_is_found_and_named(
    broken: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What goes wrong in other exporters, put into the file that ours writes."""
    from dpo_studio.workflows.exporting import gguf as exporting

    def without_an_end(tokenizer: Any, size: int, end: int | None) -> GgufTokenizer:
        """llama.cpp knows some ends of turns by their texts, too."""
        found = read_tokenizer(tokenizer, size, end)
        special = {name: token for name, token in found.special.items() if name not in ("eos", "eot")}
        tokens = [f"<t{at}>" if at in (0, end) else token for at, token in enumerate(found.tokens)]
        return replace(found, special=special | {"eos": 300}, tokens=tokens)

    def spoilt(merged: Path, out: Path, **given: Any) -> None:
        if broken == "template":
            given["template"] = given["template"].replace("m.role", "'x' + m.role")
        if broken == "eos":
            monkeypatch.setattr(gguf_file, "read_tokenizer", without_an_end)
        if broken == "bos":
            given["template"] = "{{- bos_token -}}" + given["template"]
        write_gguf(run.parent / "base" if broken == "adapter" else merged, out, **given)

    monkeypatch.setattr(exporting, "write_gguf", spoilt)
    said = dpo("export", run, tmp_path / "out", "--to", "gguf")
    assert said.code == 1 and not (tmp_path / "out").exists()
    words = {
        "template": "the chat template or the tokenizer is another one",
        "eos": "does not stop at the end of a turn",
        "bos": "BOS is doubled",
        "adapter": "the adapter is not in the file",
    }
    assert words[broken] in said.err, said.err


def test_without_llama_cpp_it_says_not_verified(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaCpp, "installed", staticmethod(lambda: False))
    said = dpo("export", run, tmp_path / "out", "--to", "gguf", "--type", "q8_0")
    assert said.code == 0, said.err
    assert "llama.cpp: not verified" in said.err
    assert json.loads((tmp_path / "out/export.json").read_text())["parity"] == "not verified"


def test_k_quants_without_their_program_are_refused_before_anything(run: Path, tmp_path: Path) -> None:
    said = dpo("export", run, tmp_path / "out", "--to", "gguf", "--type", "q4_k_m")
    assert said.code == 1
    assert "needs llama-quantize of llama.cpp, which is not on PATH" in said.err


def test_the_verdict_by_hand() -> None:
    """Two prompts of 10 and 30 tokens: |sums| 0.1 + 0.3 apart = 0.01 a token; bf16's bound is 0.02, f16's 0.005."""

    def parity(type_: str, consumer: tuple[float, float], base: tuple[float, float]) -> Parity:
        rows = [
            PromptParity(10, -20.0, consumer[0], base[0], None, 3),
            PromptParity(30, -60.0, consumer[1], base[1], None, 3),
        ]
        return Parity("llama.cpp", type_, rows, stops=True)

    near = parity("bf16", (-20.1, -60.3), (-30.0, -90.0))
    assert near.apart == pytest.approx(0.01)
    assert near.from_base == pytest.approx((9.9 + 29.7) / 40)
    assert near.misses() == []
    assert "weights or settings differ" in parity("f16", (-20.1, -60.3), (-30.0, -90.0)).misses()[0]
    assert "weights or settings differ" in parity("bf16", (-19.1, -60.0), (-30.0, -90.0)).misses()[0]  # one prompt 0.09
    assert "adapter is not in the file" in parity("f16", (-30.0, -90.0), (-30.0, -90.0)).misses()[0]
    weak = parity("bf16", (-20.1, -60.3), (-20.5, -61.0))
    assert weak.too_weak_to_tell and weak.misses() == []


# the Modelfile


@pytest.mark.parametrize("family", ["chatml", "llama2", "llama3", "gemma", "qwen3-no-think", "bare"])
def test_ollamas_template_renders_what_jinja_does(family: Any) -> None:
    """By a reader of the few words of Go that a Modelfile of ours has."""
    tokenizer = tiny_tokenizer(family)

    def render(chat: Any) -> str:
        turns = [{"role": role, "content": text} for role, text in chat]
        try:
            return str(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))
        except Exception as error:
            raise ValueError(str(error)) from None

    text, has_template = modelfile("model.gguf", render, ["<|im_end|>"], tokenizer.bos_token)
    assert has_template
    assert text.startswith('FROM ./model.gguf\nTEMPLATE """') and text.endswith('PARAMETER stop "<|im_end|>"\n')
    chat = [("user", "Why?"), ("assistant", "So."), ("user", "And {then}?\n- a")]
    found = go(text.split('"""')[1], chat)
    assert (tokenizer.bos_token or "") + found == render(chat) or found == render(chat)


def test_a_template_that_depends_on_more_than_its_turns_gets_no_guess() -> None:
    def render(chat: Any) -> str:
        return f"{len(chat)} turns: " + " ".join(text for _, text in chat)

    text, has_template = modelfile("model.gguf", render, [], None)
    assert not has_template and "TEMPLATE" not in text


def go(template: str, chat: list[tuple[str, str]]) -> str:
    """Text of a Go template with strings, `range .Messages`, `if`/`else if eq .Role` and the test of the first role."""
    import re

    def evaluated(template: str, turn: tuple[str, str]) -> str:
        out, active, taken = "", True, False
        for word in re.findall(r"\{\{-? (.*?) ?\}\}", template):
            if found := re.fullmatch(r'(?:else )?if eq \.Role "(\w+)"', word):
                active = turn[0] == found[1] and not taken
                taken = taken or active
            elif word == "end":
                active = True
            elif active and word == ".Content":
                out += turn[1]
            elif active and word.startswith('"'):
                out += json.loads(word)
        return out

    before, inside, after = re.fullmatch(
        r"(.*?)\{\{- range \.Messages \}\}(.*)\{\{- end \}\}\{\{- end \}\}(.*)", template, re.DOTALL
    ).groups()  # type: ignore[union-attr]
    if found := re.search(r'\{\{- if ne \(index \.Messages 0\)\.Role "system" \}\}(.*?)\{\{- end \}\}', before):
        before = before.replace(found[0], found[1] if chat[0][0] != "system" else "")
    nobody = ("", "")
    turns = "".join(evaluated(inside + "{{ end }}", turn) for turn in chat)
    return evaluated(before, nobody) + turns + evaluated(after, nobody)
