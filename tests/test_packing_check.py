"""The check at the start of a run: errors that touch one pair in fifty stop it, what is right never does.

Each error is put into the product while it computes; the plain side shares nothing with what is changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpo_studio.errors import ModelError
from dpo_studio.learning import packing_check
from dpo_studio.learning.packing_check import check_packing
from dpo_studio.learning.probe_pairs import limits_of, probe_pairs
from dpo_studio.models.adapters import attach, attach_existing
from dpo_studio.models.attention import PAIRS
from dpo_studio.models.lora import LoraLinear
from dpo_studio.policy import policy as policy_module
from dpo_studio.tokens.chat import AnswerIds, ChatEncoder, PairError, PairIds
from tests.pairs_of_ids import random_pairs
from tests.policies import SECTION, policy_on
from tests.tiny_models import tiny_model
from tests.tiny_runs import dpo, tiny_rows, write_recipe, write_rows

DTYPES = [torch.float32, torch.bfloat16]
ONE_IN_FIFTY = [
    *random_pairs(49, prompt=(2, 4), answer=(2, 4)),
    *random_pairs(1, seed=1, prompt=(20, 20), answer=(24, 24)),
]
"""Only the last pair reaches past a window of 9."""


def fresh(architecture: str, dtype: torch.dtype, seed: int = 0) -> Any:
    """A policy before its first step: B is zero."""
    model: PreTrainedModel = tiny_model(architecture, seed=seed, attn_implementation=PAIRS, initializer_range=0.1)
    model = model.to(dtype)
    model.requires_grad_(False)
    return attach(model, SECTION, seed=seed).eval()


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_adapter_that_stays_on_in_the_reference_is_seen(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As experts did: what `as_reference` does not reach."""

    @contextmanager
    def nothing(_policy: nn.Module) -> Iterator[None]:
        yield

    policy = fresh("llama", dtype)
    monkeypatch.setattr(packing_check, "as_reference", nothing)
    with pytest.raises(ModelError, match="the adapter off"):
        check_packing(policy, ONE_IN_FIFTY)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_adapter_that_half_the_layers_ignore_is_seen(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = fresh("llama", dtype)
    plain = LoraLinear.forward

    def forward(self: LoraLinear, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        ignored = self.in_features == self.out_features
        return self.base_layer(x) if ignored else plain(self, x, *args, **kwargs)

    monkeypatch.setattr(LoraLinear, "forward", forward)
    with pytest.raises(ModelError, match="the adapter on"):
        check_packing(policy, ONE_IN_FIFTY)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_head_scale_that_is_left_out_is_seen(dtype: torch.dtype) -> None:
    """The model's own logits are half of hidden @ head."""
    policy = fresh("llama", dtype)
    head = policy.get_base_model().lm_head
    head.register_forward_hook(lambda _module, _inputs, logits: 0.5 * logits)
    with pytest.raises(ModelError, match="packed and plain"):
        check_packing(policy, ONE_IN_FIFTY)


@pytest.mark.parametrize("dtype", DTYPES)
def test_afterwards_everything_is_as_it_was(dtype: torch.dtype) -> None:
    """Every tensor to the bit, in its own precision and place; what needs a gradient; the random state; the config."""
    policy = fresh("gemma3", dtype)
    before = {name: (p.data_ptr(), p.dtype, p.requires_grad, p.detach().clone()) for name, p in _tensors(policy)}
    config, random = policy.config.to_dict(), torch.get_rng_state()
    check_packing(policy, ONE_IN_FIFTY)
    assert torch.equal(torch.get_rng_state(), random)
    assert policy.config.to_dict() == config
    assert policy.get_base_model().config._attn_implementation == PAIRS
    for name, p in _tensors(policy):
        place, kind, trained, value = before[name]
        assert (p.data_ptr(), p.dtype, p.requires_grad) == (place, kind, trained)
        assert torch.equal(p.detach(), value)
        assert p.grad is None


def _tensors(policy: Any) -> Any:
    return [*policy.named_parameters(), *policy.named_buffers()]


def test_a_moved_policy_passes_with_its_noise_on_top() -> None:
    assert check_packing(policy_on(attn_implementation=PAIRS, size=1.0), ONE_IN_FIFTY) < 1e-4


def test_both_sides_of_every_limit_are_chosen() -> None:
    """Limit 9 in the config. 49 pairs inside; one with prompt 5 and answers 30; one with prompt 20, answers 3."""
    inside = random_pairs(49, prompt=(2, 4), answer=(2, 4))
    across, past = random_pairs(1, prompt=(5, 5), answer=(30, 30)), random_pairs(1, prompt=(20, 20), answer=(3, 3))
    limits = limits_of(tiny_model("mistral-window"))
    assert limits == {"sliding_window": {9}}
    chosen = {one.place: one.why for one in probe_pairs([*inside, *across, *past], limits)}
    assert "across sliding_window 9" in chosen[49]
    assert "the longest pair" in chosen[49]
    assert "past sliding_window 9" in chosen[50]
    assert any("shortest" in why for place, why in chosen.items() if place < 49)


def test_no_more_than_so_many_tokens_are_chosen() -> None:
    """Two pairs of 20 + 24 + 24 - 2 = 66 tokens, room for 70: the shortest is taken, then what still fits."""
    pairs = [*random_pairs(1, prompt=(2, 2), answer=(2, 2)), *random_pairs(2, prompt=(20, 20), answer=(24, 24))]
    assert len(probe_pairs(pairs, {"sliding_window": {9, 30}}, most=70)) == 2
    assert len(probe_pairs(pairs, {}, most=10)) == 1


def _parted_earlier(encoder: ChatEncoder, found: PairIds | PairError) -> PairIds | PairError:
    if isinstance(found, PairError) or "be brief" not in encoder.decode(found.prompt):
        return found
    moved = found.prompt[-25:]

    def with_prompt(answer: AnswerIds) -> AnswerIds:
        return AnswerIds([*moved, *answer.ids], [True] * (len(moved) + len(answer.ids)))

    return replace(
        found, prompt=found.prompt[:-25], chosen=with_prompt(found.chosen), rejected=with_prompt(found.rejected)
    )


@pytest.mark.parametrize("verb", ["train", "score"])
def test_a_scored_prompt_turn_of_one_pair_in_fifty_stops(
    verb: str, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one chat with a system turn is split in front of its question."""
    rows: list[Any] = tiny_rows(50)
    question = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "where is the river then?"}]
    said = [[{"role": "assistant", "content": rows[30][side]}] for side in ("chosen", "rejected")]
    rows = [
        {
            side: [{"role": "user", "content": row["prompt"]}]
            if side == "prompt"
            else [{"role": "assistant", "content": row[side]}]
            for side in row
        }
        for row in rows
    ]
    rows[30] = {"prompt": question, "chosen": said[0], "rejected": said[1]}
    recipe = write_recipe(tmp_path / "r.yaml", tiny_base, rows=rows, data={"held_out": {"fraction": 0.01}})
    plain = ChatEncoder.pairs

    def earlier(self: ChatEncoder, given: Any) -> list[PairIds | PairError]:
        return [_parted_earlier(self, found) for found in plain(self, given)]

    monkeypatch.setattr(ChatEncoder, "pairs", earlier)
    asked = [recipe] if verb == "train" else [tiny_base, write_rows(tmp_path / "s.jsonl", rows)]
    answer = dpo(verb, *asked)
    assert answer.code == 1
    assert "row 30: text of its prompt" in answer.err
    assert "where is the river then?" in answer.err


def test_an_adapter_half_loaded_stops_score(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = write_rows(tmp_path / "p.jsonl", tiny_rows(10))
    assert dpo("score", tiny_run, pairs).code == 0
    plain = attach_existing

    def half(*args: Any, **kwargs: Any) -> Any:
        policy = plain(*args, **kwargs)
        for name, p in policy.named_parameters():
            if "lora_B" in name and "layers.1." in name:
                p.data.zero_()
        return policy

    monkeypatch.setattr(policy_module, "attach_existing", half)
    answer = dpo("score", tiny_run, pairs)
    assert answer.code == 1
    assert "is not what its file says" in answer.err


def test_weights_that_are_no_numbers_are_named(tiny_base: Path) -> None:
    policy = fresh("llama", torch.float32)
    policy.get_base_model().model.layers[2].mlp.up_proj.base_layer.weight.data[3, 4] = float("nan")
    with pytest.raises(ModelError, match=r"not finite: tensor .*layers\.2\.mlp\.up_proj.* has NaN"):
        check_packing(policy, ONE_IN_FIFTY)
