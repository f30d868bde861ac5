"""Sampling, against the plain model read one prompt at a time and against the softmax itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from inspect import signature
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM

from dpo_studio.errors import DataError, NonFiniteError, UsageError
from dpo_studio.sampling.completion import Completion
from dpo_studio.sampling.generation import _choose, _closed_up, _uniforms, generate, stream
from tests.laid_out import base_of

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT's

VOCABULARY, EOS, PAD = 128, 1, 0
PROMPTS = [[5, 9, 17], [40, 41, 42, 43, 44, 45, 46, 47], [7], [88, 3, 3, 60, 12], [9, 5, 17], [100, 101], [64] * 11]
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": 2,
}


def tiny(kind: str = "llama", **changes: Any) -> Any:
    """A model of random weights large enough to have opinions, fp32, in eval."""
    torch.manual_seed(0)
    if kind == "mistral":
        return MistralForCausalLM(MistralConfig(**SHAPE, **{"sliding_window": 4, **changes})).eval()
    if kind == "qwen3":
        layers = {"layer_types": ["sliding_attention", "full_attention"], "use_sliding_window": True}
        return Qwen3ForCausalLM(Qwen3Config(**SHAPE, **layers, sliding_window=4, head_dim=8, **changes)).eval()
    return LlamaForCausalLM(LlamaConfig(**(SHAPE | changes))).eval()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Products this small gain nothing from a second thread, and wait for it wherever the cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny()


def spell(ids: Sequence[int]) -> str:
    return " ".join(map(str, ids))


def answers(model: nn.Module, prompts: Sequence[Sequence[int]] = PROMPTS, **changes: Any) -> list[Completion]:
    settings: dict[str, Any] = {"eos_ids": [EOS], "pad_id": PAD, "max_new_tokens": 12, "temperature": 1.0, "seed": 0}
    return generate(model, prompts, spell, **(settings | changes))


def alone(model: nn.Module, prompt: Sequence[int], tokens: int, eos: int = EOS) -> tuple[list[int], list[Tensor]]:
    """Greedy by the plain model without a cache, one prompt at a time: the new ids and each step's logits."""
    ids, logits = list(prompt), []
    with torch.no_grad():
        while len(ids) < len(prompt) + tokens and (len(ids) == len(prompt) or ids[-1] != eos):
            logits.append(model(torch.tensor([ids])).logits[0, -1])
            ids.append(int(logits[-1].argmax()))
    return ids[len(prompt) :], logits


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3"])
def test_greedy_is_the_argmax_of_the_plain_model_on_each_prompt_alone(kind: str) -> None:
    """Windows of 4 are shorter than prompts and answers, so a wrong window or a wrong pad would change the tokens.

    The end-of-turn token is one that the model does say, so rows leave the batch at different steps.
    """
    model = tiny(kind)
    said = [alone(model, prompt, 12, eos=-1)[0] for prompt in PROMPTS]
    eos = said[1][5]
    expected = [alone(model, prompt, 12, eos=eos)[0] for prompt in PROMPTS]
    completions = answers(model, temperature=0.0, eos_ids=[eos], batch_size=5)
    assert len({len(ids) for ids in expected}) > 1
    for ids, completion in zip(expected, completions, strict=True):
        ended = ids[-1] == eos
        assert completion == Completion(spell(ids[:-1] if ended else ids), ended, len(ids))


def test_left_padding_changes_no_logit() -> None:
    """What the batch sees at each step, against the plain model on the prompt alone: fp32, within 1e-4."""
    model, seen = tiny(), []
    hook = model.lm_head.register_forward_hook(lambda _m, _i, logits: seen.append(logits[:, -1]))
    answers(model, temperature=0.0, eos_ids=[-1])
    hook.remove()
    order = sorted(range(len(PROMPTS)), key=lambda place: (len(PROMPTS[place]), PROMPTS[place]))
    for row, place in enumerate(order):
        _, logits = alone(model, PROMPTS[place], 12, eos=-1)
        torch.testing.assert_close(torch.stack([step[row] for step in seen]), torch.stack(logits), rtol=0, atol=1e-4)


def test_the_same_seed_writes_the_same_text_whatever_the_random_state(model: Any) -> None:
    torch.manual_seed(1)
    first = answers(model)
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    assert answers(model) == first
    assert torch.equal(torch.random.get_rng_state(), before)
    for change in ({"seed": 1}, {"sample": 1}, {"temperature": 0.9}):
        assert answers(model, **change) != first


def test_at_temperature_zero_seed_and_sample_mean_nothing(model: Any) -> None:
    assert answers(model, temperature=0.0, seed=3, sample=2) == answers(model, temperature=0.0)


def test_prompts_in_another_order_get_the_same_answers(model: Any) -> None:
    order = [6, 3, 0, 5, 1, 4, 2]
    assert answers(model, [PROMPTS[i] for i in order], batch_size=3) == [answers(model, batch_size=3)[i] for i in order]
    half = tiny().bfloat16()
    assert answers(half, [PROMPTS[i] for i in order]) == [answers(half)[i] for i in order]


def test_neither_neighbours_nor_batches_nor_length_limits_matter(model: Any) -> None:
    """fp32: alone, in batches of two, and with a shorter limit, an answer is the same as far as it goes."""
    together = answers(model, eos_ids=[-1])
    assert [answers(model, [prompt], eos_ids=[-1])[0] for prompt in PROMPTS] == together
    assert answers(model, batch_size=2, eos_ids=[-1]) == together
    shorter = answers(model, max_new_tokens=7, eos_ids=[-1])
    assert [c.text.split() for c in shorter] == [c.text.split()[:7] for c in together]


def test_a_prompt_that_stands_there_twice_gets_two_answers(model: Any) -> None:
    twice = answers(model, [PROMPTS[0], PROMPTS[0]])
    assert twice[0] != twice[1]
    assert twice[0] == answers(model)[0]


def test_tokens_are_counted_with_the_end_of_turn_and_the_text_is_without_it(model: Any) -> None:
    """With every token an end of turn, each answer is that one token and no text; with none, the limit cuts."""
    assert answers(model, eos_ids=range(VOCABULARY)) == [Completion("", True, 1)] * len(PROMPTS)
    cut = answers(model, eos_ids=[-1], max_new_tokens=3)
    assert [(c.ended, c.tokens, len(c.text.split())) for c in cut] == [(False, 3, 3)] * len(PROMPTS)


def test_an_answer_that_ends_at_its_last_token_has_ended(model: Any) -> None:
    ids, _ = alone(model, PROMPTS[0], 4, eos=-1)
    assert ids[3] not in ids[:3]
    (completion,) = answers(model, [PROMPTS[0]], temperature=0.0, max_new_tokens=4, eos_ids=[ids[3], 99_999])
    assert completion == Completion(spell(ids[:3]), True, 4)


def test_progress_hears_every_token(model: Any) -> None:
    heard: list[int] = []
    completions = answers(model, eos_ids=range(0, VOCABULARY, 8), progress=heard.append)
    assert sum(heard) == sum(c.tokens for c in completions)
    assert heard == sorted(heard, reverse=True)


def test_temperature_one_samples_the_softmax() -> None:
    """60,000 draws from one distribution over 300 tokens (three blocks, one partly filled); uniforms 0.5/n, 1.5/n, ...

    Evenly spread uniforms makes the count of a token n times its share, give or take one for each end of its interval.
    """
    torch.manual_seed(3)
    logits, n = torch.randn(300) * 3, 60_000
    uniforms = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    counts = torch.zeros(300)
    for part in uniforms.view(-1, 5000):
        chosen = _choose(logits.expand(len(part), -1), part, temperature=1.0)
        counts += torch.bincount(chosen, minlength=300)
    assert (counts - n * torch.softmax(logits, -1)).abs().max() < 2.1


def test_frequencies_over_seeds_are_the_softmax() -> None:
    """The whole way, from seeds to tokens: 4,000 first tokens over a vocabulary of 8; chi-square, 7 degrees: < 24.3.

    24.3 is passed once in a thousand times by chance; the seeds are fixed, so it is passed always or never.
    """
    model = tiny(vocab_size=8, initializer_range=0.1)
    shares = torch.softmax(model(torch.tensor([[3, 4]])).logits[0, -1], -1).detach().double()
    draws = answers(model, [[3, 4]] * 4000, max_new_tokens=1, eos_ids=[-1], batch_size=4000)
    counts = torch.bincount(torch.tensor([int(c.text) for c in draws]), minlength=8).double()
    assert float(((counts - 4000 * shares) ** 2 / (4000 * shares)).sum()) < 24.3


def test_a_token_of_no_probability_is_never_drawn() -> None:
    """Luck at both ends of [0, 1), and a first and last token that cannot be."""
    logits = torch.full((4, 200), -torch.inf)
    logits[:, [50, 150]] = 0.0
    uniforms = torch.tensor([0.0, 0.5 - 2**-53, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert _choose(logits, uniforms, temperature=1.0).tolist() == [50, 50, 150, 150]


def test_cold_is_greedy_and_hot_is_uniform(model: Any) -> None:
    greedy = answers(model, temperature=0.0)
    assert answers(model, temperature=1e-5) == greedy
    assert answers(model, temperature=1e-300) == greedy
    logits = torch.tensor([[0.0, 5.0, -5.0, 1.0]])
    hot = [int(_choose(logits, torch.tensor([u]).double(), temperature=1e6)) for u in (0.1, 0.3, 0.6, 0.9)]
    assert hot == [0, 1, 2, 3]


def test_uniforms_are_in_the_interval_and_even() -> None:
    """Mean 1/2 and variance 1/12 of 40,000 numbers: standard errors 0.0014 and 0.0004."""
    uniforms = _uniforms([[i] for i in range(40)], 1000, "key")
    assert uniforms.min() >= 0
    assert uniforms.max() < 1
    assert uniforms.mean() == pytest.approx(0.5, abs=0.006)
    assert uniforms.var() == pytest.approx(1 / 12, abs=0.002)
    assert np.array_equal(_uniforms([[3]], 10, "key")[0], uniforms[3, :10])


def test_the_last_rows_fill_the_holes() -> None:
    """Five rows of which the second and the third have ended: three stay, row 4 moves to place 1, row 3 nowhere."""
    assert _closed_up([True, False, False, True, True]) == [0, 3, 4]
    assert _closed_up([False, True, True, False]) == [2, 1]
    assert _closed_up([True, True]) == [0, 1]
    assert _closed_up([False]) == []


def adapted(base: nn.Module, dropout: float = 0.0) -> Any:
    """`base` with an adapter that changes its mind: A and B random, B not zero."""
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = torch.randn_like(p.data, dtype=torch.float32) * 0.2
    return model


def test_an_adapter_on_and_off_in_one_model() -> None:
    """The adapter's greedy answers are the plain forward's; off, they are the base's; the model is left as it was."""
    model = adapted(tiny(), dropout=0.5)
    model.train()
    with model.disable_adapter():
        base = answers(model, temperature=0.0)
    assert base == answers(tiny(), temperature=0.0)
    tuned = answers(model, temperature=0.0)
    assert all(module.training for module in model.modules())
    model.eval()
    assert tuned != base
    assert [c.tokens for c in tuned] == [len(alone(model, prompt, 12)[0]) for prompt in PROMPTS]


def test_bf16_with_an_adapter_is_the_same_again() -> None:
    model = adapted(tiny().bfloat16())
    first = answers(model)
    assert answers(model) == first
    with model.disable_adapter():
        assert answers(model) == answers(tiny().bfloat16())


def pieces(model: nn.Module, decode: Callable[[list[int]], str] = spell, **changes: Any) -> Iterator[str]:
    settings: dict[str, Any] = {"eos_ids": [EOS], "max_new_tokens": 12, "temperature": 1.0, "seed": 0}
    return stream(model, PROMPTS[0], decode, **(settings | changes))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_pieces_are_the_answer(model: Any, temperature: float) -> None:
    (whole,) = answers(model, [PROMPTS[0]], temperature=temperature)
    parts = list(pieces(model, temperature=temperature))
    assert "".join(parts) == whole.text
    assert len(parts) == len(whole.text.split())


def test_a_character_of_several_tokens_comes_whole(model: Any) -> None:
    """Tokens stand for the bytes of "né→🐈n", 1 + 2 + 3 + 4 + 1; the last byte of the cat and the n come together."""
    text = "né→🐈n"

    def decode(ids: list[int]) -> str:
        return text.encode()[: len(ids)].decode(errors="replace")

    assert list(pieces(model, decode, eos_ids=[-1], max_new_tokens=11)) == ["n", "é", "→", "🐈", "n"]
    assert list(pieces(model, decode, eos_ids=[-1], max_new_tokens=8)) == ["n", "é", "→", "�"]


def test_the_model_is_in_eval_only_while_a_piece_is_computed() -> None:
    model = adapted(tiny(), dropout=0.9)
    model.train()
    expected = None
    for _ in range(2):
        parts = []
        for piece in pieces(model, eos_ids=[-1]):
            assert all(module.training for module in model.modules())
            assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
            parts.append(piece)
        assert expected in (None, parts)
        expected = parts


def test_top_p_keeps_the_fewest_tokens_that_hold_it() -> None:
    """Shares .5 .3 .15 .05. For 0.6 the first two are needed: of them the first holds 5/8 = .625."""
    logits = torch.log(torch.tensor([[0.05, 0.3, 0.5, 0.15]]))

    def drawn(uniforms: float, top_p: float) -> int:
        return int(_choose(logits, torch.tensor([uniforms]).double(), temperature=1.0, top_p=top_p))

    assert [drawn(uniforms, 0.6) for uniforms in (0.01, 0.37, 0.38, 0.99)] == [1, 1, 2, 2]
    assert [drawn(uniforms, 0.4) for uniforms in (0.01, 0.99)] == [2, 2]
    assert [drawn(uniforms, 1.0) for uniforms in (0.01, 0.2, 0.5, 0.9)] == [0, 1, 2, 3]


def test_no_prompts_is_no_answers(model: Any) -> None:
    assert answers(model, []) == []


@pytest.mark.parametrize(
    ("changes", "problem"),
    [({"max_new_tokens": 0}, "max_new_tokens is 0"), ({"temperature": -1.0}, "temperature is -1")]
    + [({"temperature": value}, "temperature is") for value in (float("nan"), float("inf"))],
)
def test_settings_that_mean_nothing_are_refused(model: Any, changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        answers(model, **changes)


def test_what_cannot_be_sampled_from_is_refused(model: Any) -> None:
    with pytest.raises(DataError, match="prompt 1 has no tokens"):
        answers(model, [[3], []])
    with pytest.raises(UsageError, match="top_p is 0"):
        pieces(model, top_p=0.0)


@pytest.mark.parametrize("case", ["qwen3_next", "bamba", "lfm2", "bloom"])
def test_a_cache_of_its_own_writes_what_the_plain_model_does_without_one(case: str) -> None:
    """States, and ALiBi: greedy, one prompt at a time, each token from the whole sequence."""
    model, _ = base_of(case)
    for prompt, completion in zip(PROMPTS[:3], answers(model, PROMPTS[:3], temperature=0.0, eos_ids=[]), strict=True):
        assert list(completion.ids) == alone(model, prompt, 12, eos=-1)[0]


def test_a_cache_that_is_wrong_is_not_used() -> None:
    """Right for a token and then lost: the second token from it shows, and every other comes from the whole."""
    model, _ = base_of("qwen3_next")
    expected = alone(model, PROMPTS[0], 12, eos=-1)[0]
    forward, calls = model.forward, []

    def forgetful(*inputs: Any, **named: Any) -> Any:
        if named.get("use_cache"):
            calls.append(1)
            if len(calls) == 3:
                named["cache"] = None
        return forward(*inputs, **named)

    forgetful.__signature__ = signature(forward)  # type: ignore[attr-defined]
    model.forward = forgetful
    (completion,) = answers(model, PROMPTS[:1], temperature=0.0, eos_ids=[])
    assert list(completion.ids) == expected and len(calls) == 3


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_stop_it(temperature: float) -> None:
    model = tiny()
    model.lm_head.weight.data[7] = torch.nan
    with pytest.raises(NonFiniteError, match="not finite"):
        answers(model, temperature=temperature)
