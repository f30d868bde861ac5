"""Long rope: a token's angles depend on how long the longest sequence of the forward pass is, so no pack may mix them.

The plain model (eager attention, one sequence at a time, its last token read too) and transformers' own greedy
`generate` say what is right. 30 tokens are the original length; the long factors turn angles four times as slowly.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from dpo_studio.config import AdapterSection, ModelSection
from dpo_studio.errors import ModelError
from dpo_studio.learning.batched_logps import batched_logps
from dpo_studio.learning.logprobs import pair_logps
from dpo_studio.models.adapters import attach
from dpo_studio.models.attention import choose_attention
from dpo_studio.models.folder import open_model
from dpo_studio.sampling.generation import generate
from dpo_studio.tokens.encode import EncodedPair
from dpo_studio.tokens.pack import pack, split_at_position
from tests.pairs_of_ids import encoded
from tests.policies import moved
from tests.textbook import columns, gradients, plain_logps
from tests.tiny_models import tiny_folder
from tests.tiny_tokenizers import VOCABULARY

LIMIT = 30
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": LIMIT,
}


def long_model(attention: str, limit: int = LIMIT) -> PreTrainedModel:
    config = AutoConfig.for_model(
        "phi3",
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        original_max_position_embeddings=limit,
        rope_parameters=LONG | {"original_max_position_embeddings": limit},
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return model.requires_grad_(False).eval()


def pairs() -> list[EncodedPair]:
    """Inside, over, and straddling in both directions; sequences of 29 to 32 tokens stand at the edge itself."""
    draw = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(3, VOCABULARY, (count,), generator=draw).tolist()

    lengths = [(20, 5, 8), (20, 9, 11), (20, 10, 12), (20, 11, 10), (25, 30, 2), (25, 2, 30), (40, 3, 9), (5, 1, 50)]
    return [encoded(ids(p), ids(c), ids(r), row=row) for row, (p, c, r) in enumerate(lengths)]


@pytest.mark.parametrize("wanted", ["auto", "sdpa"])
def test_packed_sequences_are_each_on_their_own_side(wanted: str) -> None:
    """Log-probs and gradients of eight pairs in one row, and of rows of two, are those of sequences one by one."""
    model = long_model("eager")
    plain = moved(attach(model, AdapterSection(rank=4, alpha=8), seed=0)).eval()
    sequences = pairs()
    expected = plain_logps(plain, sequences)
    slopes = gradients(plain, expected[:, 0].sum() - 0.5 * expected[:, 1].sum())
    ours = long_model(choose_attention(wanted, model.config, torch.device("cpu")))
    policy = moved(attach(ours, AdapterSection(rank=4, alpha=8), seed=0)).eval()
    logps = pair_logps(policy, pack(sequences))
    torch.testing.assert_close(columns(logps), expected.detach(), rtol=1e-5, atol=2e-4)
    anew = gradients(policy, logps.chosen_P.sum() - 0.5 * logps.rejected_P.sum())
    for name, gradient in slopes.items():
        torch.testing.assert_close(anew[name], gradient, rtol=1e-4, atol=1e-4 * gradient.abs().max().item(), msg=name)
    rows = batched_logps(policy, sequences, token_budget=80)
    torch.testing.assert_close(columns(rows), expected.detach(), rtol=1e-5, atol=2e-4)


def test_the_sides_matter_here() -> None:
    """What the split prevents: read beside a longer sequence, a short one is more than a nat off."""
    model = long_model("eager")
    short = pairs()[0]
    ids = torch.tensor([[*short.prompt.tolist(), *short.chosen.ids.tolist()]])
    alone = model(ids).logits.log_softmax(-1)
    beside = torch.nn.functional.pad(ids, (0, LIMIT))
    assert (model(beside).logits.log_softmax(-1)[:, : ids.shape[1]] - alone).abs().max() > 1


def test_a_straddling_pair_lies_in_two_rows_each_answer_with_its_prompt() -> None:
    """Prompt 25, answers of 2 (27 in all: within) and of 30 (55: over). 25 + 1 and 25 + 29 tokens, scored 2 and 30."""
    pair = pairs()[5]
    within, over = split_at_position(pack([pair]), LIMIT)
    assert [row.tokens for row, _ in (within, over)] == [26, 54]
    assert [row.position_ids_1T.max().item() for row, _ in (within, over)] == [25, 53]
    assert [len(places) for _, places in (within, over)] == [2, 30]
    assert torch.equal(torch.cat([within[1], over[1]]), torch.arange(32))


@pytest.mark.parametrize("length", [10, 24, 29, 30, 31, 40])
def test_greedy_answers_past_the_limit_are_transformers_own(length: int) -> None:
    model = long_model("sdpa")
    prompts = [list(range(3, 3 + length)), list(range(50, 54))]  # a short neighbour must not matter
    found = generate(model, prompts, str, eos_ids=[VOCABULARY], pad_id=0, max_new_tokens=24, temperature=0, seed=0)
    for prompt, completion in zip(prompts, found, strict=True):
        told = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=24, eos_token_id=None)
        assert list(completion.ids) == told[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    ("rope", "words"),
    [
        ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}, "longest position seen so far"),
        ({**LONG, "original_max_position_embeddings": None}, "without one length"),
    ],
)
def test_ropes_that_depend_on_length_are_refused_before_weights_load(
    tmp_path: Path, rope: dict[str, Any], words: str
) -> None:
    folder = tiny_folder(tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))
    (folder / "model.safetensors").write_bytes(b"never read")
    with pytest.raises(ModelError, match=words):
        open_model(str(folder)).check_base(ModelSection(path=str(folder)))
