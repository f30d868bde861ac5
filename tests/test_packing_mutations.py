"""The check at a start: what it must notice, where one pair in fifty is affected; and what it must let go.

Each mutation breaks the product in one place. Right models are the same with nothing broken.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
from peft.tuners import lora
from transformers import MixtralConfig, MixtralForCausalLM

from dpo_studio.config import SourceSection
from dpo_studio.errors import ModelError
from dpo_studio.learning import logprobs
from dpo_studio.learning.packing_check import check_packing
from dpo_studio.models import attention_functions
from dpo_studio.models.adapters import attach, attach_existing, save_adapter
from dpo_studio.models.attention import PAIRS, row_inputs
from dpo_studio.models.head import HeadLaw
from dpo_studio.preferences.pair import Message, Pair
from dpo_studio.tokens.chat import ChatEncoder
from dpo_studio.tokens.encode import EncodedAnswer, EncodedPair, encode_pairs
from dpo_studio.workflows.scoring import score_pairs
from tests.pairs_of_ids import random_pairs
from tests.policies import SECTION, moved, policy_on
from tests.test_long_rope import long_model
from tests.tiny_models import _SHAPE, ARCHITECTURES, tiny_folder, tiny_model
from tests.tiny_runs import tiny_rows, write_rows
from tests.tiny_tokenizers import end_ids, tiny_tokenizer

Break = Callable[[pytest.MonkeyPatch], None]
DTYPES = [torch.float32, torch.bfloat16]


class _Other:
    """A config that says something else about some of its keys."""

    def __init__(self, config: Any, **lies: Any) -> None:
        self.config, self.lies = config, lies

    def __getattr__(self, name: str) -> Any:
        return self.lies[name] if name in self.lies else getattr(self.config, name)


def no_window(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(logprobs, "row_inputs", lambda config, batch: row_inputs(_Other(config, sliding_window=None), batch))


def no_sinks(patch: pytest.MonkeyPatch) -> None:
    extras = attention_functions._extras
    patch.setattr(attention_functions, "_extras", lambda module, given: (extras(module, given)[0], None))


def rope_by_the_longest(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(logprobs, "long_rope_limit", lambda config: None)


def no_head_scale(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(logprobs, "head_law", lambda config: HeadLaw())


def fifty(*, short: int = 6, long: int = 40) -> list[EncodedPair]:
    """Forty-nine pairs of at most 2 x `short` tokens, one whose answers reach past every window and limit."""
    pairs = random_pairs(49, prompt=(2, 4), answer=(2, short - 2))
    (far,) = random_pairs(1, seed=1, prompt=(4, 4), answer=(long, long))
    return [*pairs[:30], replace(far, row=30), *(replace(pair, row=pair.row + 1) for pair in pairs[30:])]


def model_of(name: str) -> Any:
    model = long_model(PAIRS) if name == "phi3-longrope" else tiny_model(name, attn_implementation=PAIRS)
    return model.requires_grad_(False)


MUTATIONS: list[tuple[str, Break]] = [
    ("mistral-window", no_window),
    ("gemma3", no_window),
    ("granite-swa", no_sinks),
    ("phi3-longrope", rope_by_the_longest),
    ("cohere", no_head_scale),
    ("gemma2", no_head_scale),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "break_it"), MUTATIONS, ids=[f"{name}-{b.__name__}" for name, b in MUTATIONS])
def test_what_one_pair_in_fifty_shows_stops_the_run(
    name: str, break_it: Break, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = attach(model_of(name).to(dtype), SECTION, seed=0)
    right = check_packing(policy, fifty())
    assert right < (1e-4 if dtype == torch.float32 else 0.2)
    break_it(monkeypatch)
    with pytest.raises(ModelError, match="packed and plain log-probs differ by"):
        check_packing(policy, fifty())


@pytest.mark.parametrize("size", [0.08, 0.3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_that_the_reference_does_not_switch_off_stops_the_run(dtype: torch.dtype, size: float) -> None:
    """PEFT's own layers do not hear of our switch; B is zero at a start, so ln 2 would not see it either.

    0.08 is about a real model's weights; at 0.3 bf16's own rounding is as large as what one adapter does.
    """
    model = tiny_model(attn_implementation=PAIRS, initializer_range=size).requires_grad_(False)
    policy = attach(model.to(dtype), SECTION, seed=0)
    check_packing(policy, fifty())
    layer = next(m for n, m in policy.named_modules() if n.endswith("layers.1.mlp.down_proj"))
    layer.forward = MethodType(lora.Linear.forward, layer)
    with pytest.raises(ModelError, match="the adapter off"):
        check_packing(policy, fifty())


@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_that_are_not_switched_off_stop_the_run(dtype: torch.dtype) -> None:
    config = MixtralConfig(**(_SHAPE | {"num_local_experts": 4, "sliding_window": None}), attn_implementation=PAIRS)
    torch.manual_seed(0)
    model = MixtralForCausalLM(config).to(dtype).requires_grad_(False).eval()
    policy = attach(model, SECTION, seed=0)
    check_packing(policy, fifty())
    experts = next(m for n, m in policy.named_modules() if n.endswith("layers.0.mlp.experts"))
    inner = experts.forward
    adapted = next(m for n, m in policy.named_modules() if n.endswith("layers.0.self_attn.o_proj"))

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """An adapter inside the experts that computes whatever the switch says."""
        up = adapted.lora_B["default"].weight.to(x.dtype)
        here = adapted.disable_adapters  # only PEFT's own switch, which the plain side uses
        low = x @ adapted.lora_A["default"].weight.to(x.dtype).t()
        return inner(x if here else x + low @ up.t(), *args, **kwargs)  # type: ignore[no-any-return]

    experts.forward = forward
    with pytest.raises(ModelError, match="the adapter off"):
        check_packing(policy, fifty())


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_adapter_that_is_half_loaded_stops_the_run(dtype: torch.dtype, tmp_path: Path) -> None:
    save_adapter(policy_on(attn_implementation=PAIRS), tmp_path, base="m")
    policy = attach_existing(model_of("llama").to(dtype), tmp_path, trainable=True)
    check_packing(policy, fifty(), adapters={"default": tmp_path})
    next(p for name, p in policy.named_parameters() if "layers.2.mlp.up_proj.lora_B" in name).data.zero_()
    with pytest.raises(ModelError, match=r"layers\.2\.mlp\.up_proj\.lora_B.* is not what its file says"):
        check_packing(policy, fifty(), adapters={"default": tmp_path})


def encoder() -> ChatEncoder:
    return ChatEncoder(tiny_tokenizer(), eos_ids=end_ids("chatml"))


def scored_prompt(pair: EncodedPair, count: int) -> EncodedPair:
    """The same chat, parted `count` tokens too early."""

    def answer(own: EncodedAnswer) -> EncodedAnswer:
        ids = np.concatenate([pair.prompt[-count:], own.ids])
        return EncodedAnswer(ids, np.ones(len(ids), np.bool_))

    return EncodedPair(pair.row, pair.prompt[:-count], answer(pair.chosen), answer(pair.rejected))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_prompt_turn_that_is_scored_stops_the_run(dtype: torch.dtype) -> None:
    texts = [
        Pair(
            (Message("user", row["prompt"]),),
            (Message("assistant", row["chosen"]),),
            (Message("assistant", row["rejected"]),),
            number,
        )
        for number, row in enumerate(tiny_rows(50))
    ]
    pairs = encode_pairs(texts, encoder(), max_length=None).pairs
    model = model_of("llama").to(dtype)
    check_packing(model, pairs, texts=texts, encoder=encoder())
    (end,) = end_ids("chatml") & set(pairs[17].prompt.tolist())
    after_system = pairs[17].prompt.tolist().index(end) + 1
    pairs[17] = scored_prompt(pairs[17], len(pairs[17].prompt) - after_system)
    with pytest.raises(ModelError, match="row 17: text of its prompt"):
        check_packing(model, pairs, texts=texts, encoder=encoder())


# Through `dpo score`


def folder_of(name: str, place: Path) -> Path:
    if name != "phi3-longrope":
        return tiny_folder(place, name)
    long_model("eager", limit=50).save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    return place


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("name", "break_it"), MUTATIONS, ids=[f"{name}-{b.__name__}" for name, b in MUTATIONS])
def test_score_stops_too(
    name: str, break_it: Break, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": f"n{number}?", "chosen": "yes", "rejected": "no"} for number in range(49)]
    rows.insert(20, {"prompt": "Far?", "chosen": "moon " * 30, "rejected": "bread " * 25})
    source = SourceSection(source=str(write_rows(tmp_path / "pairs.jsonl", rows)))
    folder = folder_of(name, tmp_path / "model")
    score_pairs(str(folder), source, io.StringIO(), dtype=dtype)
    break_it(monkeypatch)
    with pytest.raises(ModelError, match="packed and plain log-probs differ by"):
        score_pairs(str(folder), source, io.StringIO(), dtype=dtype)


# What is right


def clean_start(name: str, dtype: torch.dtype, seed: int) -> None:
    """Of 20 pairs, answers of a single token among them."""
    if name == "phi3-longrope":
        torch.manual_seed(seed)
        model = long_model(PAIRS)
    else:
        model = tiny_model(name, seed=seed, attn_implementation=PAIRS)
    policy = attach(model.requires_grad_(False).to(dtype), SECTION, seed=seed)
    if seed % 3 == 0:
        moved(policy, seed=seed, size=0.02)
    check_packing(policy, random_pairs(20, seed=seed, prompt=(2, 20), answer=(1, 30)), token_budget=256)


OTHERS = sorted(ARCHITECTURES.keys() - {name for name, _ in MUTATIONS})


@pytest.mark.parametrize(("seed", "name"), list(enumerate(OTHERS)), ids=OTHERS)
def test_a_clean_start_stops_nothing(name: str, seed: int) -> None:
    """Of the architectures that no mutation above begins with, in either precision by turns."""
    clean_start(name, DTYPES[seed % 2], seed)


@pytest.mark.slow
def test_two_hundred_clean_starts_stop_none() -> None:
    """Every architecture in both precisions."""
    names = [*ARCHITECTURES, "phi3-longrope"]
    for seed in range(200):
        clean_start(names[seed % len(names)], DTYPES[seed // len(names) % 2], seed)
