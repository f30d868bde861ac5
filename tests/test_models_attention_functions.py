"""Sinks and capped scores, attentions that a model has written in, and what is handed to attention beside q, k and v.

The oracle: the plain model, transformers' eager attention, one sequence at a time; or the sum written out.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DogeConfig,
    FalconConfig,
    Gemma4TextConfig,
    GPTNeoXJapaneseConfig,
    GptOssConfig,
    NemotronConfig,
    XGLMConfig,
)

from dpo_studio.errors import ModelError
from dpo_studio.learning.logprobs import pair_logps
from dpo_studio.models.attention import DENSE, FLEX, PAIRS, block_mask, choose_attention, row_inputs
from dpo_studio.models.attention_functions import _attend, _attend_flex, _attend_pairs, _attend_plainly, pack_note
from dpo_studio.tokens.pack import pack
from tests.pairs_of_ids import random_pairs
from tests.textbook import columns, plain_logps
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import VOCABULARY

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_layers": 2,
    "num_attention_heads": 4, "attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "d_model": 32,
    "ffn_dim": 48, "max_position_embeddings": 256, "initializer_range": 0.2, "init_std": 0.2, "num_local_experts": 4,
    "num_experts_per_tok": 2, "keep_window_size": 12, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8, "tie_word_embeddings": False,
}  # fmt: skip


def small(kind: Any, attention: str, **more: Any) -> Any:
    """A random model of any kind of config; nothing is left at the zero it begins at."""
    config = kind(**({k: v for k, v in SMALL.items() if k in kind.__dataclass_fields__} | more))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    for p in model.parameters():
        if p.ndim == 1:
            p.data += 0.5 * torch.randn(p.shape)
    return model


@pytest.mark.parametrize(
    ("kind", "attention", "more"),
    [
        (GptOssConfig, PAIRS, {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]}),
        (GptOssConfig, DENSE, {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]}),
        (Gemma4TextConfig, PAIRS, {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]}),
        (NemotronConfig, PAIRS, {}),  # hands its attention the mask and nothing else
        (NemotronConfig, DENSE, {}),
        (DogeConfig, DENSE, {}),  # adds to the mask, and keeps the 12 keys that it likes best
        (FalconConfig, "eager", {}),  # attention written in
        (XGLMConfig, "eager", {}),
        (GPTNeoXJapaneseConfig, "eager", {}),
    ],
)
def test_packed_log_probs_and_gradients_are_the_textbook_s(kind: Any, attention: str, more: dict[str, Any]) -> None:
    """fp32, 1e-4 relative: every log-prob, and the gradient in every projection, relative to its largest entry."""
    pairs = [*random_pairs(3), *random_pairs(2, seed=5, prompt=(10, 30), answer=(10, 20))]
    ours, plain = small(kind, attention, **more), small(kind, "eager", **more)
    if attention != DENSE or kind is DogeConfig:
        assert choose_attention("auto", ours.config, CPU) == attention
    found: list[dict[str, Tensor]] = []
    logps = [columns(pair_logps(ours, pack(pairs))), plain_logps(plain, pairs)]
    torch.testing.assert_close(logps[0], logps[1], rtol=1e-4, atol=0)
    weights_P2 = torch.randn(5, 2, generator=torch.Generator().manual_seed(1))
    for model, logps_P2 in zip((ours, plain), logps, strict=True):
        torch.autograd.backward((weights_P2 * logps_P2).sum())
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None and "att" in n})
    noise = 1e-6 * max(gradient.abs().max().item() for gradient in found[1].values())  # a key's bias has none but that
    for name, gradient in found[1].items():
        largest = gradient.abs().max().item()
        torch.testing.assert_close(found[0][name], gradient, rtol=0, atol=1e-4 * largest + noise, msg=name)


@pytest.mark.parametrize("architecture", ["gemma2", "granite-swa"])
@pytest.mark.parametrize("attention", [PAIRS, FLEX, DENSE])
def test_answers_are_sampled_with_sinks_and_capped_scores_too(architecture: str, attention: str) -> None:
    """Without a pack: padded on the left, and token by token behind a cache, as `generate` does."""
    ids, mask = torch.tensor([[0, 0, 7, 8, 9], [3, 4, 5, 6, 7]]), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    ours, theirs = (tiny_model(architecture, attn_implementation=kind) for kind in (attention, "eager"))
    with torch.no_grad():
        got, want = (model(input_ids=ids, attention_mask=mask).logits for model in (ours, theirs))
        torch.testing.assert_close(got[mask.bool()], want[mask.bool()], rtol=1e-4, atol=1e-4)
        texts = [m.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False) for m in (ours, theirs)]
    assert torch.equal(*texts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sink_is_a_logit_that_nothing_is_read_from(dtype: torch.dtype) -> None:
    """softmax over [scores, sink], the sink's share dropped; two queries' heads share a key. In bf16 the sink 7.77
    rounds to 7.78, which alone would be 1 % of what is left: the error is that of rounding q, k and v."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 6, 8, generator=draw).to(dtype) for heads in (4, 2, 2))
    sink = torch.tensor([7.77, -2.0, 0.0, 3.3])
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    got = _attend(q, k, v, mask, 0.3, sink_H=sink)
    q, k, v = q.double(), k.double().repeat_interleave(2, 1), v.double().repeat_interleave(2, 1)
    scores = (q @ k.transpose(2, 3) * 0.3).masked_fill(~mask, float("-inf"))
    whole = torch.cat([scores, sink.double().view(1, 4, 1, 1).expand(1, 4, 6, 1)], -1).softmax(-1)
    want = whole[..., :-1] @ v
    error = 1e-5 if dtype == torch.float32 else 4e-3
    assert ((got.double() - want).abs().amax((0, 2, 3)) <= error * want.abs().amax((0, 2, 3))).all()


@pytest.mark.parametrize("way", ["pairs", "flex", "plain"])
def test_what_is_handed_to_attention_is_not_left_out(way: str) -> None:
    """A tensor or a number whose name nobody looked at is refused by that name; a name that changes nothing passes."""
    pairs = random_pairs(2)
    batch, module = pack(pairs), nn.Identity()
    q = torch.randn(1, 2, batch.tokens, 16)
    ways: dict[str, tuple[Any, Any]] = {
        "pairs": (_attend_pairs, pack_note(batch.spans, None)),
        "flex": (_attend_flex, block_mask(batch)),
        "plain": (_attend_plainly, torch.ones(1, 1, batch.tokens, batch.tokens, dtype=torch.bool)),
    }
    attend, mask = ways[way]
    for name, value in (("block_indices", torch.zeros(3)), ("temperature", 0.5)):
        with pytest.raises(ModelError, match=f"Identity passes `{name}`"):
            attend(module, q, q, q, mask, **{name: value})
    with pytest.raises(ModelError, match="both at once"):
        attend(module, q, q, q, mask, softcap=2.0, s_aux=torch.zeros(2))
    if way == "pairs":
        told: dict[str, Any] = {
            "dropout": 0.0,
            "sliding_window": 4,
            "position_ids": torch.zeros(3),
            "softcap": None,
            "s_aux": None,
        }
        out, _ = attend(module, q, q, q, mask, output_attentions=False, indices=None, **told)
        assert out.shape == (1, batch.tokens, 2, 16)
        with pytest.raises(ModelError, match="later tokens"):
            attend(module, q, q, q, mask, is_causal=False)


def test_a_note_that_the_model_changed_is_not_believed() -> None:
    batch = pack(random_pairs(2))
    q = torch.randn(1, 2, batch.tokens, 8)
    with pytest.raises(ModelError, match="changes its attention mask"):
        _attend_pairs(nn.Identity(), q, q, q, pack_note(batch.spans, None)[:, :, :2])


def test_capped_scores_are_not_kept_for_the_backward_pass() -> None:
    """A pair of 300 tokens in a row of two: nothing saved is as large as one head's scores times the heads."""
    pairs = random_pairs(2, prompt=(100, 100), answer=(101, 101))
    model = tiny_model("gemma2", attn_implementation=PAIRS).requires_grad_(False)
    model.model.embed_tokens.weight.requires_grad_(True)
    inputs, largest = row_inputs(model.config, pack(pairs)), 0

    def note(x: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, x.numel() if x.is_floating_point() and x.shape[:1] != (VOCABULARY,) else 0)
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        model.model(**inputs)
    assert 0 < largest < 4 * 200 * 200


def test_heads_may_differ_between_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 4: 16 wide under a window, 32 under full attention; the smallest decides whether the kernel takes them."""
    monkeypatch.setattr("dpo_studio.models.attention.can_compile", lambda: True)
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2}
    narrow, wide = (Gemma4TextConfig(head_dim=size, global_head_dim=32, **kinds) for size in (8, 16))
    assert [choose_attention("auto", config, GPU) for config in (narrow, wide)] == [PAIRS, FLEX]
