"""What stands between hidden states and log-probs: scales and caps, against autograd and the models' own logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3Config,
    GraniteConfig,
    HyperCLOVAXConfig,
    LlamaConfig,
    MiniCPM3Config,
    PreTrainedModel,
)

from dpo_studio.errors import ModelError
from dpo_studio.learning import logprobs
from dpo_studio.models.attention import PAIRS
from dpo_studio.models.head import HeadLaw, body_of, head_law, head_of
from dpo_studio.tokens.pack import pack
from tests.pairs_of_ids import random_pairs
from tests.textbook import columns, plain_logps
from tests.tiny_models import tiny_model


@pytest.mark.parametrize("law", [HeadLaw(0.25), HeadLaw(3.0), HeadLaw(cap=2.0), HeadLaw(0.5, cap=1.5)], ids=str)
@pytest.mark.parametrize("rows", [7, 2**20])
def test_a_scaled_and_capped_head_and_its_gradient(monkeypatch: pytest.MonkeyPatch, law: HeadLaw, rows: int) -> None:
    """log softmax(cap tanh(scale (h W + b) / cap))[target] written out in float64 for autograd; and the log-prob that
    two draws are the same, log sum p^2."""
    draw = torch.Generator().manual_seed(0)
    hidden, head, bias = (torch.randn(*size, generator=draw) for size in ((20, 16), (50, 16), (50,)))
    target, weights = torch.randint(50, (20,), generator=draw), torch.randn(20, generator=draw)
    monkeypatch.setattr(logprobs, "_LOGITS_AT_ONCE", {"cpu": rows * 50})
    ours, exact = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    for b in (None, bias):
        collision = torch.empty(20)
        got = logprobs._HeadLogps.apply(ours, head, b, target, collision, law)  # type: ignore[no-untyped-call]
        logits = law.scale * (exact @ head.double().T + (0 if b is None else b.double()))
        if law.cap is not None:
            logits = law.cap * torch.tanh(logits / law.cap)
        logps = logits.log_softmax(-1)
        want = logps[torch.arange(20), target]
        torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(collision, (2 * logps).logsumexp(-1).float(), rtol=1e-4, atol=1e-5)
        (slope,) = torch.autograd.grad((weights * got).sum(), ours)
        (exact_slope,) = torch.autograd.grad((weights * want).sum(), exact)
        torch.testing.assert_close(slope, exact_slope.float(), rtol=1e-4, atol=1e-5)


def test_in_bfloat16_a_cap_rounds_no_more_than_the_product_does() -> None:
    """Logits near a cap of 30 are 0.125 apart in bf16; ours come from fp32, off by what the bf16 product itself is."""
    draw = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(40, 64, generator=draw).bfloat16(), torch.randn(90, 64, generator=draw).bfloat16()
    target, law = torch.randint(90, (40,), generator=draw), HeadLaw(4.0, cap=30.0)
    got = logprobs._HeadLogps.apply(hidden, head, None, target, None, law)  # type: ignore[no-untyped-call]
    product = (hidden @ head.T).float()
    want = (30 * torch.tanh(4 * product / 30)).log_softmax(-1)[torch.arange(40), target]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "law"),
    [
        (LlamaConfig(), HeadLaw()),
        (GraniteConfig(logits_scaling=8.0), HeadLaw(1 / 8)),
        (MiniCPM3Config(hidden_size=2560, dim_model_base=256), HeadLaw(1 / 10)),
        (HyperCLOVAXConfig(logits_scaling=0.125), HeadLaw(0.125)),
        (CohereConfig(), HeadLaw(0.0625)),
        (Gemma2Config(), HeadLaw(cap=30.0)),
        (Gemma2Config(final_logit_softcapping=None), HeadLaw()),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_each_family_has_its_own_law(config: Any, law: HeadLaw) -> None:
    """Read off the families' modeling code by hand: the same key divides in Granite and multiplies in HyperCLOVA X."""
    assert head_law(config) == law


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (LlamaConfig(logits_scaling=8.0), "logits_scaling"),
        (LlamaConfig(lm_head_multiplier=0.5), "lm_head_multiplier"),
        (LlamaConfig(output_multiplier=0.5), "output_multiplier"),
        (LlamaConfig(final_logit_softcapping=1.0), "final_logit_softcapping"),
        (Gemma2Config(logit_scale=0.5), "logit_scale"),
        (Gemma3Config(text_config={"final_logit_softcapping": 30.0}), "final_logit_softcapping"),
    ],
    ids=lambda value: getattr(value, "model_type", value),
)
def test_a_key_that_nobody_looked_at_is_refused_by_name(config: Any, key: str) -> None:
    """Gemma 3's wrapper leaves out the cap of its text model, which alone applies it: not known is not guessed."""
    with pytest.raises(ModelError, match=key):
        head_law(config)


def test_keys_that_only_sound_alike_are_let_through() -> None:
    inner = {"moe_router_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0, "logit_scale_init_value": 2.6}
    assert head_law(LlamaConfig(**inner, logit_scale=1.0, output_scale=None)) == HeadLaw()


def test_a_head_that_is_more_than_one_product_is_refused() -> None:
    """DoryLMHead scales each token's logit by a learned number; ModernBERT's decoder has layers before its head."""
    from transformers import DoryConfig, ModernBertDecoderConfig

    small: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "pad_token_id": 0,
        "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1,
        "sep_token_id": 2, "num_hidden_layers": 2,
    }  # fmt: skip
    for config, reason in ((DoryConfig, "by a DoryLMHead"), (ModernBertDecoderConfig, "(lm_head) between")):
        known = set(config.__dataclass_fields__)
        model = AutoModelForCausalLM.from_config(config(**{k: v for k, v in small.items() if k in known}))
        with pytest.raises(ModelError) as refused:
            head_of(model)
        assert reason in refused.value.message


def test_a_body_that_the_model_misnames_is_found() -> None:
    """Llama 4's causal model says its body is `language_model`; it is `model`, and packs go through it."""
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    torch.manual_seed(0)
    model: PreTrainedModel = Llama4ForCausalLM._from_config(
        Llama4TextConfig(
            vocab_size=512, hidden_size=32, intermediate_size=48, intermediate_size_mlp=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_local_experts=2, attention_chunk_size=None,
            layer_types=["full_attention"] * 2, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.2,
        ),
        attn_implementation=PAIRS,
    ).eval()  # fmt: skip
    assert body_of(model) is model.model
    pairs = random_pairs(3)
    with torch.no_grad():
        ours = columns(logprobs.pair_logps(model, pack(pairs)))
        model.set_attn_implementation("eager")
        torch.testing.assert_close(ours, plain_logps(model, pairs), rtol=1e-4, atol=0)


def test_without_the_scale_the_numbers_would_be_others() -> None:
    """The oracle can tell: Granite's scale of a quarter left out is nats of difference."""
    model, pairs = tiny_model("granite", attn_implementation=PAIRS), random_pairs(3)
    with torch.no_grad():
        right, wrong = plain_logps(model, pairs), columns(logprobs.pair_logps(model, pack(pairs)))
        torch.testing.assert_close(wrong, right, rtol=1e-4, atol=0)
        model.config.logits_scaling = 1.0
        assert (columns(logprobs.pair_logps(model, pack(pairs))) - right).abs().min() > 1
