"""Law 2: packed log-probs and their gradients are those of one sequence at a time through the plain model.

The oracle shares nothing with the code under test: transformers' eager attention, the model's own logits, PEFT's own
LoRA layers, autograd through all of it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dpo_studio.errors import ModelError
from dpo_studio.learning import logprobs, packing_check
from dpo_studio.learning.eager_logps import plain_token_logps
from dpo_studio.learning.logprobs import pair_logps, token_logps
from dpo_studio.learning.packing_check import check_packing
from dpo_studio.models.attention import DENSE, FLEX, PAIRS, row_inputs
from dpo_studio.tokens import pack as tokens_pack
from dpo_studio.tokens.encode import EncodedPair
from dpo_studio.tokens.pack import MicroBatch, Span, pack
from tests.pairs_of_ids import encoded, random_pairs
from tests.policies import plain_peft_on, policy_on
from tests.textbook import columns, gradients, plain_logps
from tests.tiny_models import ARCHITECTURES, tiny_model

ODD = [
    encoded([5], [6], [7]),  # a prompt of one token, answers of one token
    encoded([5, 6, 7], [8, 9, 10, 11, 12], [13, 14, 15], unscored=(0, 2)),
    encoded([40, 41], [42, 43, 44], [42, 43, 44]),  # equal answers
    encoded([50] * 30, [51, 52], [53] * 20),  # a prompt longer than every window
]
PAIRS_OF_ALL_KINDS = [*random_pairs(4), *ODD]
WEIGHTS_P2 = torch.randn(len(PAIRS_OF_ALL_KINDS), 2, generator=torch.Generator().manual_seed(3))
"""Every answer's log-prob counts for something of its own in the gradient."""


flex_on_a_cpu = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
"""FlexAttention's own reference: forward only, every score formed. Its kernel and gradients: tests/test_gpu.py."""


@pytest.fixture(scope="module", params=ARCHITECTURES)
def textbook(request: pytest.FixtureRequest) -> tuple[str, Tensor, dict[str, Tensor]]:
    """An architecture, its log-probs and its LoRA gradients the textbook way."""
    oracle = plain_peft_on(request.param)
    logps_P2 = plain_logps(oracle, PAIRS_OF_ALL_KINDS)
    return request.param, logps_P2.detach(), gradients(oracle, (WEIGHTS_P2 * logps_P2).sum())


@pytest.mark.parametrize("attention", [PAIRS, DENSE])
def test_packed_log_probs_and_every_lora_gradient_are_the_textbook_s(
    textbook: tuple[str, Tensor, dict[str, Tensor]], attention: str
) -> None:
    """fp32, 1e-4 relative: of each log-prob, and of each of the 56 gradients relative to its largest entry."""
    architecture, expected_P2, expected = textbook
    policy = policy_on(architecture, attn_implementation=attention)
    logps_P2 = columns(pair_logps(policy, pack(PAIRS_OF_ALL_KINDS)))
    torch.testing.assert_close(logps_P2, expected_P2, rtol=1e-4, atol=0)
    found = gradients(policy, (WEIGHTS_P2 * logps_P2).sum())
    assert found.keys() == expected.keys()
    assert len(found) == 4 * 7 * 2
    for name, gradient in found.items():
        largest = expected[name].abs().max().item()
        assert largest > 0
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-4 * largest, msg=name)


def test_the_oracle_can_tell() -> None:
    """What a pair's neighbours, its other answer or a missing window would do to these log-probs: whole nats."""
    policy = tiny_model("mistral-window", attn_implementation="sdpa")
    with torch.no_grad():
        right = columns(pair_logps(policy, pack(PAIRS_OF_ALL_KINDS)))
        policy.config.sliding_window = None
        wrong = columns(pair_logps(policy, pack(PAIRS_OF_ALL_KINDS)))
    assert (right - wrong).abs().max() > 1


def test_counts_are_of_scored_tokens() -> None:
    """[5 ids, places 0 and 2 unscored] counts 3, [3 ids] counts 1; the others count every id."""
    logps = pair_logps(tiny_model(), pack(ODD))
    assert logps.chosen_tokens_P.tolist() == [1, 3, 3, 2]
    assert logps.rejected_tokens_P.tolist() == [1, 1, 3, 20]
    assert logps.chosen_P.dtype == torch.float32


def test_shared_sums_stop_at_the_shorter_answer_s_length() -> None:
    """By scored tokens: of 3 and 1, of 1 and 20 and so on, against each token of one sequence at a time. Their gradient
    is theirs alone."""
    model = tiny_model()
    logps = pair_logps(model, pack(PAIRS_OF_ALL_KINDS))
    assert logps.chosen_shared_P is not None
    assert logps.rejected_shared_P is not None
    for place, pair in enumerate(PAIRS_OF_ALL_KINDS):
        chosen_N, rejected_N = (
            plain_token_logps(model, pair.prompt.tolist(), answer) for answer in (pair.chosen, pair.rejected)
        )
        shorter = min(len(chosen_N), len(rejected_N))
        assert logps.chosen_shared_P[place].item() == pytest.approx(chosen_N[:shorter].sum().item(), rel=1e-4)
        assert logps.rejected_shared_P[place].item() == pytest.approx(rejected_N[:shorter].sum().item(), rel=1e-4)
    assert (logps.chosen_shared_P - logps.chosen_P).abs().max() > 1
    assert (logps.rejected_shared_P - logps.rejected_P).abs().max() > 1


def test_agreement_is_log_p_against_what_a_draw_would_have() -> None:
    """log p(token) - log sum p^2, averaged over an answer, both answers added, in float64 from the plain model's
    logits. Asking for it changes no sum, and it carries no gradient."""
    policy = policy_on()
    logps = pair_logps(policy, pack(PAIRS_OF_ALL_KINDS), agreement=True)
    without = pair_logps(policy, pack(PAIRS_OF_ALL_KINDS))
    assert without.agreement_P is None
    assert torch.equal(columns(logps), columns(without))
    assert logps.agreement_P is not None
    assert not logps.agreement_P.requires_grad
    for place, pair in enumerate(PAIRS_OF_ALL_KINDS):
        expected = 0.0
        for answer in (pair.chosen, pair.rejected):
            ids = torch.tensor([*pair.prompt.tolist(), *answer.ids.tolist()])
            p_TV = policy(input_ids=ids[None]).logits[0].detach().double().softmax(-1)
            at = [len(pair.prompt) + place - 1 for place in range(len(answer.ids)) if answer.scored[place]]
            terms = [(p_TV[t, ids[t + 1]].log() - p_TV[t].square().sum().log()).item() for t in at]
            expected += sum(terms) / len(terms)
        assert logps.agreement_P[place].item() == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_equal_answers_have_equal_log_probs_wherever_they_stand() -> None:
    """The rejected answer stands behind the chosen one in the row and must not notice."""
    chosen, rejected = columns(pair_logps(tiny_model(attn_implementation=PAIRS), pack([ODD[2]])))[0].tolist()
    assert chosen == pytest.approx(rejected, rel=1e-6)


@flex_on_a_cpu
@pytest.mark.parametrize("attention", [PAIRS, FLEX, DENSE])
def test_a_pair_does_not_notice_its_neighbours(attention: str) -> None:
    """Alone, first, last or in the middle of a row: the same to 1e-5 relative."""
    model = tiny_model("qwen2-mixed", attn_implementation=attention)
    with torch.no_grad():
        together = columns(pair_logps(model, pack(PAIRS_OF_ALL_KINDS)))
        reversed_ = columns(pair_logps(model, pack(PAIRS_OF_ALL_KINDS[::-1]))).flip(0)
        alone = torch.cat([columns(pair_logps(model, pack([pair]))) for pair in PAIRS_OF_ALL_KINDS])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=0)
    torch.testing.assert_close(reversed_, alone, rtol=1e-5, atol=0)


def test_swapping_the_answers_swaps_their_log_probs() -> None:
    model = tiny_model(attn_implementation=PAIRS)
    swapped = [pair.swap() for pair in PAIRS_OF_ALL_KINDS]
    with torch.no_grad():
        here, there = (columns(pair_logps(model, pack(pairs))) for pairs in (PAIRS_OF_ALL_KINDS, swapped))
    torch.testing.assert_close(here, there.flip(1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("rows", [1, 7, 2**20])
def test_the_head_in_slices_is_the_head_at_once(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """log softmax(h W + b)[target] and its gradient in h, against autograd in float64; 1, 7 or all rows at a time."""
    draw = torch.Generator().manual_seed(0)
    hidden, head, bias = (torch.randn(*size, generator=draw) for size in ((20, 16), (50, 16), (50,)))
    target, weights = torch.randint(50, (20,), generator=draw), torch.randn(20, generator=draw)
    monkeypatch.setattr(logprobs, "_LOGITS_AT_ONCE", {"cpu": rows * 50})
    ours, exact = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    for b in (None, bias):
        got = logprobs._HeadLogps.apply(ours, head, b, target)  # type: ignore[no-untyped-call]
        logits = exact @ head.double().T + (0 if b is None else b.double())
        want = logits.log_softmax(-1)[torch.arange(20), target]
        torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=1e-5)
        (slope,) = torch.autograd.grad((weights * got).sum(), ours)
        (exact_slope,) = torch.autograd.grad((weights * want).sum(), exact)
        torch.testing.assert_close(slope, exact_slope.float(), rtol=1e-4, atol=1e-5)


def test_plain_token_logps_are_the_textbook_s() -> None:
    """The yardstick of `check_packing`, against this file's own."""
    model = tiny_model("gemma3")
    for pair in PAIRS_OF_ALL_KINDS:
        sums = [plain_token_logps(model, pair.prompt.tolist(), answer).sum() for answer in (pair.chosen, pair.rejected)]
        torch.testing.assert_close(torch.stack(sums), plain_logps(model, [pair])[0].detach(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@flex_on_a_cpu
@pytest.mark.parametrize("attention", [PAIRS, FLEX, DENSE])
def test_in_bfloat16_packing_adds_no_more_noise_than_bfloat16_itself(architecture: str, attention: str) -> None:
    """A token's log-prob in bf16 is off by some rounding whether packed or plain. Mean error against fp32 over all
    tokens: packed at most 1.5 times plain's. initializer_range 0.08: at 0.3 bf16 itself is whole nats off."""
    changes: dict[str, Any] = {"initializer_range": 0.08}
    exact_P2 = plain_logps(tiny_model(architecture, **changes), PAIRS_OF_ALL_KINDS)
    tokens_P2 = torch.tensor([[p.chosen.scored.sum(), p.rejected.scored.sum()] for p in PAIRS_OF_ALL_KINDS])
    half = tiny_model(architecture, attn_implementation=attention, **changes).bfloat16()
    with torch.no_grad():
        packed_P2 = columns(pair_logps(half, pack(PAIRS_OF_ALL_KINDS)))
        plain_P2 = plain_logps(half, PAIRS_OF_ALL_KINDS)
    noise, ours = (((logps - exact_P2).abs().sum() / tokens_P2.sum()).item() for logps in (plain_P2, packed_P2))
    assert 0 < noise < 0.05
    assert ours < 1.5 * noise


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@flex_on_a_cpu
@pytest.mark.parametrize("attention", [PAIRS, FLEX, DENSE])
def test_check_packing_passes_what_is_right(architecture: str, attention: str) -> None:
    assert (
        check_packing(policy_on(architecture, attn_implementation=attention), random_pairs(20), token_budget=256) < 1e-4
    )


def test_check_packing_passes_a_single_pair_and_bfloat16() -> None:
    assert check_packing(tiny_model(attn_implementation=PAIRS), random_pairs(1)) < 1e-4
    half = tiny_model(attn_implementation=PAIRS, initializer_range=0.08).bfloat16()
    assert check_packing(half, random_pairs(5)) < 0.05


@pytest.mark.parametrize(
    ("dtype", "off", "passes"), [("float32", 5e-5, True), ("float32", 3e-4, False), ("bfloat16", 0.3, False)]
)
def test_check_packing_allows_what_the_precision_explains(
    monkeypatch: pytest.MonkeyPatch, dtype: str, off: float, passes: bool
) -> None:
    monkeypatch.setattr(packing_check, "token_logps", lambda *given: token_logps(*given) + off)
    model = tiny_model(attn_implementation=PAIRS, initializer_range=0.08).to(getattr(torch, dtype))
    with nullcontext() if passes else pytest.raises(ModelError, match=rf"where {dtype} explains"):
        check_packing(model, random_pairs(5))


def test_check_packing_is_blind_to_dropout() -> None:
    """An adapter that goes on training has dropout on and is no longer zero: that is no fault of the mask."""
    policy = policy_on(attn_implementation=PAIRS, size=1.0, dropout=0.5).train()
    assert check_packing(policy, random_pairs(5)) < 1e-4
    assert policy.training


def wrong_mask(change: Callable[[MicroBatch], MicroBatch]) -> Callable[[Any, MicroBatch], dict[str, Any]]:
    """The right tokens with the mask of another row."""
    return lambda config, batch: row_inputs(config, change(batch))


def one_pair(batch: MicroBatch) -> MicroBatch:
    """The second pair reads the first."""
    (first, last) = batch.spans[0], batch.spans[-1]
    return replace(
        batch,
        seen_until_T=torch.full_like(batch.seen_until_T, batch.tokens),
        spans=(Span(0, first.prompt_end, first.chosen_end, last.rejected_end),),
    )


def one_answer(batch: MicroBatch) -> MicroBatch:
    """The rejected answer reads the chosen one."""
    spans = tuple(span._replace(chosen_end=span.rejected_end) for span in batch.spans)
    seen_until = [torch.full((span.rejected_end - span.start,), span.rejected_end) for span in spans]
    return replace(batch, seen_until_T=torch.cat(seen_until).int(), spans=spans)


@flex_on_a_cpu
@pytest.mark.parametrize("attention", [PAIRS, FLEX, DENSE])
@pytest.mark.parametrize("mistake", [one_pair, one_answer])
def test_check_packing_catches_tokens_that_see_too_much(
    monkeypatch: pytest.MonkeyPatch, mistake: Callable[[MicroBatch], MicroBatch], attention: str
) -> None:
    monkeypatch.setattr(logprobs, "row_inputs", wrong_mask(mistake))
    with pytest.raises(ModelError, match="packed and plain log-probs differ by") as refused:
        check_packing(tiny_model(attn_implementation=attention), random_pairs(20))
    assert "model.attention: sdpa" in str(refused.value.hint)


def test_check_packing_catches_positions_that_run_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The row's places as positions, as if it were one text."""

    def running_on(pairs: list[EncodedPair], positions: list[int]) -> MicroBatch:
        batch = pack(pairs, positions)
        return replace(batch, position_ids_1T=torch.arange(batch.tokens)[None])

    monkeypatch.setattr(tokens_pack, "pack", running_on)
    with pytest.raises(ModelError, match="packed and plain"):
        check_packing(tiny_model(attn_implementation=PAIRS), random_pairs(20))


class Forgetful:
    """A config that says one thing to the mask and another to the model."""

    def __init__(self, config: Any, **lies: Any) -> None:
        self.config, self.lies = config, lies

    def __getattr__(self, name: str) -> Any:
        return self.lies[name] if name in self.lies else getattr(self.config, name)


@flex_on_a_cpu
@pytest.mark.parametrize("attention", [PAIRS, FLEX, DENSE])
@pytest.mark.parametrize(
    ("architecture", "lies"),
    [
        ("mistral-window", {"sliding_window": None}),
        ("qwen2-mixed", {"sliding_window": None}),
        ("gemma3", {"sliding_window": None}),
        ("gemma3", {"sliding_window": 10}),
    ],
)
def test_check_packing_catches_a_lost_window(
    monkeypatch: pytest.MonkeyPatch, architecture: str, lies: dict[str, Any], attention: str
) -> None:
    """Also one that is a single token too wide."""
    monkeypatch.setattr(logprobs, "row_inputs", lambda config, batch: row_inputs(Forgetful(config, **lies), batch))
    with pytest.raises(ModelError, match="packed and plain"):
        check_packing(tiny_model(architecture, attn_implementation=attention), random_pairs(20))


def test_check_packing_looks_at_an_answer_longer_than_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """Window 9. Forty pairs of 5 + 5 + 5 ids fill 13 places, but an answer's last token looks back at 9 only: no window
    shows. One pair of 5 + 20 + 20 ids looks back at 24, and it is that one that must be compared."""
    short = random_pairs(40, prompt=(5, 5), answer=(5, 5))
    long = random_pairs(1, seed=1, prompt=(5, 5), answer=(20, 20))
    monkeypatch.setattr(
        logprobs,
        "row_inputs",
        lambda config, batch: row_inputs(Forgetful(config, sliding_window=None), batch),
    )
    model = tiny_model("mistral-window", attn_implementation=PAIRS)
    assert check_packing(model, short) < 1e-4
    with pytest.raises(ModelError, match="packed and plain"):
        check_packing(model, short + long)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_check_packing_catches_a_scaled_head(monkeypatch: pytest.MonkeyPatch, architecture: str) -> None:
    """A model whose logits are not `hidden @ head`."""
    model = tiny_model(architecture, attn_implementation=PAIRS)
    model.lm_head.register_forward_hook(lambda _module, _inputs, logits: 0.5 * logits)
    with pytest.raises(ModelError, match="packed and plain"):
        check_packing(model, random_pairs(20))


def test_check_packing_catches_numbers_that_are_none() -> None:
    model = tiny_model(attn_implementation=PAIRS)
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(ModelError, match=r"not finite: tensor lm_head\.weight has NaN"):
        check_packing(model, random_pairs(3))


def test_scored_tokens_come_in_the_order_of_the_row() -> None:
    """Pair by pair, chosen before rejected, so that per-token values can be told apart."""
    model = tiny_model(attn_implementation=PAIRS)
    batch = pack(ODD)
    with torch.no_grad():
        logps = token_logps(model, batch)
        expected = torch.cat(
            [plain_token_logps(model, p.prompt.tolist(), a) for p in ODD for a in (p.chosen, p.rejected)]
        )
    torch.testing.assert_close(logps, expected, rtol=1e-4, atol=1e-5)
    assert batch.tokens_A.tolist() == [int(a.scored.sum()) for p in ODD for a in (p.chosen, p.rejected)]
