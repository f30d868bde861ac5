"""Law 2 in every layout: log-probs and LoRA gradients are those of one sequence at a time through the plain model.

The oracle shares nothing with the code under test: transformers' eager attention, the model's own logits, PEFT's own
LoRA layers, one sequence at a time. Neighbours are hostile: nothing of them may move a number.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from dpo_studio.config import AdapterSection, Layout
from dpo_studio.errors import ModelError
from dpo_studio.learning.logprobs import pair_logps
from dpo_studio.learning.neighbours_check import check_neighbours
from dpo_studio.learning.packing_check import check_packing
from dpo_studio.models.adapters import attach
from dpo_studio.models.conv1d import as_conv1d
from dpo_studio.models.layouts import LayoutChoice, choose_layout, layout_of, set_layout
from dpo_studio.models.targets import all_linear
from dpo_studio.tokens.encode import EncodedAnswer, EncodedPair
from dpo_studio.tokens.pack import MicroBatch, lay_out, micro_batches, pack, tokens_in
from dpo_studio.tokens.padded import MOST_PADDING
from tests.laid_out import CASES, base_of
from tests.pairs_of_ids import encoded, random_pairs
from tests.test_doors import plain_logp
from tests.textbook import columns, gradients, plain_logps
from tests.tiny_runs import dpo, tiny_rows, write_recipe
from tests.tiny_tokenizers import end_ids, tiny_tokenizer

PAIRS = [
    *random_pairs(4, seed=1),
    encoded([5], [6, 8], [7]),
    encoded([5, 6, 7], [8, 9, 10, 11, 12], [13, 14, 15], unscored=(0, 2)),
    encoded([50] * 20, [51, 52], [53] * 20),
]
WEIGHTS_P2 = torch.randn(len(PAIRS), 2, generator=torch.Generator().manual_seed(3))
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def with_noise(policy: nn.Module) -> nn.Module:
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in sorted(policy.named_parameters()):
            if ".lora_" in name:
                p.copy_(0.2 * torch.randn(p.shape, generator=draw))
    return policy.eval()


def policies(case: str) -> tuple[Any, Any, Layout]:
    """Ours, and plain PEFT on the plain eager model, with the same adapter on the same layers: all linear ones but
    fused experts, which have a test of their own."""
    base, layout = base_of(case)
    ours = attach(base, AdapterSection(rank=4, alpha=8, targets=all_linear(base).names), seed=0)
    plain, _ = base_of(case, "eager")
    as_conv1d(plain)  # GPT-2's own layers
    targets = ours.peft_config["default"].target_modules
    turned = case == "gpt2"
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", fan_in_fan_out=turned)
    oracle = get_peft_model(plain, config)
    return with_noise(ours), with_noise(oracle), layout


@pytest.mark.parametrize("case", CASES)
def test_log_probs_and_lora_gradients_are_the_textbook_s(case: str) -> None:
    """1e-5 nats a token, each gradient within 1e-4 of its largest entry, in fp32; in one micro-batch and in many."""
    ours, oracle, layout = policies(case)
    right_P2 = plain_logps(oracle, PAIRS)
    right = gradients(oracle, (WEIGHTS_P2 * right_P2).sum())
    tokens_P2 = torch.tensor([[pair.chosen.scored.sum(), pair.rejected.scored.sum()] for pair in PAIRS])
    for budget in (10_000, 80):
        batches = list(micro_batches(PAIRS, range(len(PAIRS)), budget, layout=layout))
        assert all(bool(batch.tables) == (layout != "packed") for batch in batches)
        found_P2 = torch.zeros(len(PAIRS), 2)
        total: dict[str, Tensor] = {}
        for batch in batches:
            logps_P2 = columns(pair_logps(ours, batch))
            found_P2[list(batch.pairs)] = logps_P2.detach()
            for name, gradient in gradients(ours, (WEIGHTS_P2[list(batch.pairs)] * logps_P2).sum()).items():
                if gradient is not None:
                    total[name] = total.get(name, 0) + gradient
        assert ((found_P2 - right_P2).abs() / tokens_P2).max() < 1e-5
        for name, gradient in right.items():
            if gradient is not None:
                largest = gradient.abs().max().item()
                torch.testing.assert_close(total[name], gradient, rtol=0, atol=1e-4 * largest, msg=name)
        assert len(total) >= 4


def alone(model: nn.Module, pair: EncodedPair, layout: Layout) -> Tensor:
    return columns(pair_logps(model, lay_out(layout, [pair])))[0]


@pytest.mark.parametrize("case", [case for case in CASES if case != "gpt_neo"])
def test_neighbours_padding_and_order_move_nothing(case: str) -> None:
    """Eight other last tokens in every neighbour, neighbours of every length, any place: 1e-5 nats a token."""
    model, layout = base_of(case)
    pair = random_pairs(1, seed=5, prompt=(9, 9), answer=(12, 16))[0]
    with torch.no_grad():
        right_2 = alone(model, pair, layout)
    limit = 1e-5 * len(pair.chosen.ids)

    @settings(max_examples=12, deadline=None, derandomize=True)
    @given(st.integers(0, 10**6), st.integers(1, 4), st.integers(0, 4))
    def holds(seed: int, count: int, place: int) -> None:
        others = random_pairs(count, seed=seed, prompt=(7, 11), answer=(10, 18))
        for neighbours in (others, [changed_at_the_end(other) for other in others]):
            batch = [*neighbours[:place], pair, *neighbours[place:]]
            with torch.no_grad():
                found_2 = columns(pair_logps(model, lay_out(layout, batch)))[min(place, count)]
            assert (found_2 - right_2).abs().max() < limit

    holds()


def changed_at_the_end(pair: EncodedPair) -> EncodedPair:
    def changed(answer: EncodedAnswer) -> EncodedAnswer:
        ids = answer.ids.copy()
        ids[-8:] = 3 + (ids[-8:] + 1) % 200
        return replace(answer, ids=ids)

    return replace(pair, chosen=changed(pair.chosen), rejected=changed(pair.rejected))


def test_a_state_that_flows_from_one_sequence_into_the_next_is_seen() -> None:
    """What the layout is for: the same hybrid read as one pack is off, and the check at the start says so."""
    model, _ = base_of("qwen3_next")
    with torch.no_grad():
        right_P2 = columns(pair_logps(model, lay_out("rows", PAIRS)))
    model.config._attn_implementation_internal = "dpo_studio_dense"
    set_layout(model, "packed")
    try:
        with torch.no_grad():
            off = (columns(pair_logps(model, pack(PAIRS))) - right_P2).abs().max()
    except (ValueError, RuntimeError, KeyError, TypeError):  # or its code takes no pack at all
        off = torch.tensor(torch.inf)
    assert off > 0.1
    with pytest.raises(ModelError, match=r"cannot be computed|computed incorrectly"):
        check_packing(model, PAIRS)


@pytest.mark.parametrize("case", ["bloom", "bamba"])
def test_the_check_at_the_start_passes_what_is_right(case: str) -> None:
    model, _ = base_of(case)
    assert check_packing(model, PAIRS) < 1e-5


class Capacity(nn.Module):
    """A layer of experts with room for half of a batch's tokens: the later ones are dropped."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        kept = torch.arange(x[..., 0].numel()).view(x.shape[:-1]) < 40
        return torch.where(kept[..., None], y, torch.zeros_like(y))


class Ahead(nn.Module):
    """A layer that normalises over the sequence: later tokens show."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x - x.mean(1, keepdim=True))
        return y


class Forgetful(nn.Module):
    """A layer that is another one in each call."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y: Tensor = self.inner(x) * (1 + 0.1 * self.calls)
        return y


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Capacity, "longer|another order|more sequences"),
        (Ahead, "later token|padding"),
        (Forgetful, "computed twice|order"),
    ],
)
def test_what_depends_on_its_neighbours_is_refused_by_name(kind: Any, words: str) -> None:
    model, _ = base_of("llama, asked for apart")
    assert check_neighbours(model, PAIRS[:3], 1e-4) < 1e-5
    mlp = model.model.layers[0].mlp
    mlp.down_proj = kind(mlp.down_proj)
    with pytest.raises(ModelError, match=words) as refused:
        check_neighbours(model, PAIRS[:3], 1e-4)
    assert "llama" in refused.value.message and "layout apart" in refused.value.message


def test_padding_stays_below_fifteen_percent_and_micro_batches_within_their_budget() -> None:
    pairs = random_pairs(200, seed=9, prompt=(5, 120), answer=(2, 150))
    batches = list(micro_batches(pairs, range(200), 1500, layout="apart"))
    assert sorted(place for batch in batches for place in batch.pairs) == list(range(200))
    for batch in batches:
        assert batch.tokens <= 1500
        for table in batch.tables:
            assert padding(batch, pairs) <= MOST_PADDING
            assert table.ids_BL.shape[0] <= 2 * len(batch)
    whole = sum(real_tokens(pair) for pair in pairs) / sum(batch.tokens for batch in batches)
    assert whole > 0.88  # 11 % of it is padding here
    assert all(tokens_in("apart", pair) >= real_tokens(pair) for pair in pairs)


def real_tokens(pair: EncodedPair) -> int:
    return 2 * len(pair.prompt) + len(pair.chosen.ids) + len(pair.rejected.ids) - 2


def padding(batch: MicroBatch, pairs: list[EncodedPair]) -> float:
    return 1 - sum(real_tokens(pairs[place]) for place in batch.pairs) / batch.tokens


def test_a_table_by_hand() -> None:
    """Prompt 11 12, chosen 21 22 23, rejected 31 32: 11 12 21 22 and 11 12 31; of 4 + 3 tokens one is padding, 12.5 %.

    Scored: chosen 21 22 23 from places 1 2 3 of the first row, rejected 31 32 from places 1 2 of the second: 5 6."""
    (table,) = lay_out("apart", [encoded([11, 12], [21, 22, 23], [31, 32])]).tables
    assert table.ids_BL.tolist() == [[11, 12, 21, 22], [11, 12, 31, 0]]
    assert table.predictor_n.tolist() == [1, 2, 3, 5, 6]
    assert table.place_n.tolist() == [0, 1, 2, 3, 4]


def test_the_layout_of_a_model_and_what_it_cannot_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpo_studio.models.layouts.find_spec", lambda module: None)
    plain = LlamaConfig()
    assert choose_layout(plain) == LayoutChoice("packed", "")
    assert choose_layout(plain, "apart").layout == "apart"
    with pytest.raises(ModelError, match=r"layout: rows is not possible: some/model \(llama\) has no layer with a"):
        choose_layout(plain, "rows", "some/model")
    long = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 64, "long_factor": [2.0] * 64}
    stretched = LlamaConfig(rope_parameters={**long, "original_max_position_embeddings": 64})
    assert choose_layout(stretched).layout == "packed"
    with pytest.raises(ModelError, match="longest sequence of a pass"):
        choose_layout(stretched, "apart")
    hybrid = base_of("bamba")[0].config
    assert choose_layout(hybrid).layout == choose_layout(hybrid, "rows").layout == "rows"
    with pytest.raises(
        ModelError, match=r"packed is not possible: the model \(bamba\) has layers with a state"
    ) as refused:
        choose_layout(hybrid, "packed")
    assert "takes rows" in (refused.value.hint or "")
    assert layout_of(base_of("bloom")[0]) == "apart"
    said = choose_layout(hybrid).told(random_pairs(5, prompt=(40, 40), answer=(10, 10)))
    assert said.startswith("layout rows, because this model has layers with a state (linear_attention): up to 2")
    assert said.endswith("; mamba-ssm and causal-conv1d not installed: its states run as plain torch")
    assert choose_layout(base_of("qwen3_next")[0].config).kernels == ("flash-linear-attention", "causal-conv1d")
    assert choose_layout(base_of("lfm2")[0].config).kernels == ("causal-conv1d",)


def test_a_pack_given_to_a_model_of_another_layout_is_read_in_tables() -> None:
    model, layout = base_of("bloom")
    with torch.no_grad():
        here, there = (columns(pair_logps(model, batch)) for batch in (pack(PAIRS), lay_out(layout, PAIRS)))
    assert torch.equal(here, there)
    assert np.isfinite(here.numpy()).all()


def test_a_hybrid_trains_resumes_scores_and_is_verified_in_rows(tmp_path: Path) -> None:
    """The whole way through `dpo`: the layout is told, written into the run and kept; score is the plain model's."""
    base = hybrid_folder(tmp_path / "base")
    rows = tiny_rows(20)
    recipe = write_recipe(tmp_path / "r.yaml", base, rows=rows, training={"max_steps": 2, "save_every": 1})
    said = dpo("train", recipe, "--dry-run")
    assert said.code == 0 and "layout rows, because this model has layers with a state" in said.err
    assert "a prompt counted once an answer, padded" in said.err
    for wanted, words in (("packed", "model.layout: packed is not possible"), ("diagonal", "model.layout")):
        said = dpo("train", recipe, "--set", f"model.layout={wanted}")
        assert said.code != 0 and words in said.err and not (tmp_path / "run").exists()
    said = dpo("train", recipe)
    assert said.code == 0, said.err
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["model"]["layout"] == "rows"
    said = dpo("train", recipe, "--set", "training.max_steps=3")  # model.layout: auto, resolved in the run
    assert said.code == 0 and "after step 2 of 3" in said.err, said.err
    said = dpo("train", recipe, "--set", "training.max_steps=4", "--set", "model.layout=apart")
    assert said.code == 1 and "model.layout: rows there, apart asked for" in said.err
    said = dpo("score", tmp_path / "run", tmp_path / "pairs.jsonl", "--dtype", "float32")
    assert said.code == 0, said.err
    plain = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    for row, line in list(zip(rows, said.lines, strict=True))[:4]:
        for side in ("chosen", "rejected"):
            right = plain_logp(plain, tokenizer, row["prompt"], row[side])
            assert line[f"reference_{side}_logp"] == pytest.approx(right, rel=2e-4)
    assert any(line["chosen_logp"] != line["reference_chosen_logp"] for line in said.lines)


@pytest.mark.slow
def test_training_in_rows_is_the_same_bits_twice(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", hybrid_folder(tmp_path / "base"), rows=tiny_rows(12))
    said = dpo("train", recipe, "--verify")
    assert said.code == 0 and "the same bits" in said.err + said.out


def hybrid_folder(folder: Path) -> Path:
    model, _ = base_of("lfm2")
    model.generation_config.eos_token_id = sorted(end_ids())
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_what_a_model_gets_is_told(tmp_path: Path) -> None:
    said = dpo("models", hybrid_folder(tmp_path / "base"))
    assert said.code == 0, said.err
    told = dict(line.split(maxsplit=1) for line in said.out.splitlines())
    assert told["family"] == "lfm2"
    assert told["layout"] == "rows, because it has layers with a state (conv)"
    assert told["adapted"].endswith("in_proj, k_proj, out_proj, q_proj, v_proj, w1, w2, w3")
    said = dpo("models", tmp_path / "base", "--layout", "packed")
    assert said.code == 1 and "model.layout: packed is not possible" in said.err
    assert dpo("models", tmp_path / "base", "--layout", "wide").code == 2
    said = dpo("models")
    assert said.code == 0
    by_family = {line.split("  ")[0]: line for line in said.out.splitlines()}
    assert "rows" in by_family["qwen3_next"] and "all verbs" in by_family["qwen3_next"]
    assert "refused" in by_family["llama, rope dynamic"]
