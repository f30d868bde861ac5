"""What a step is: laws 1 and 5, the gradient of a step however it is packed, and what stops a run."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from statistics import mean
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers import get_scheduler

from dpo_studio.config import TrainingSection
from dpo_studio.errors import NonFiniteError
from dpo_studio.learning.held_out import evaluate
from dpo_studio.learning.logprobs import pair_logps
from dpo_studio.learning.reference import reference_logps
from dpo_studio.learning.schedule import learning_rate
from dpo_studio.learning.state import TrainingState
from dpo_studio.learning.train import train
from dpo_studio.models.adapters import as_reference, train_mode
from dpo_studio.models.attention import PAIRS
from dpo_studio.objectives import (
    AOT,
    BCO,
    DPO,
    IPO,
    LDDPO,
    ORPO,
    SFT,
    WPO,
    Hinge,
    Mixture,
    PairLogps,
    SimPO,
)
from dpo_studio.policy.policy import Policy
from dpo_studio.tokens.encode import EncodedPair
from dpo_studio.tokens.pack import MicroBatch, Steps, pack
from tests.pairs_of_ids import random_pairs
from tests.policies import policy_on, take_steps
from tests.textbook import plain_logps
from tests.tiny_models import tiny_model

GOLDEN = Path(__file__).parent / "golden" / "tiny_llama_losses.json"
THIRTY = random_pairs(30)
SECTION = TrainingSection(pairs_per_step=8, learning_rate=3e-3, warmup=0, schedule="constant")
"""Thirty pairs in steps of eight: the fourth step of an epoch has six."""


def policy(**changes: Any) -> Any:
    return policy_on(attn_implementation=PAIRS, **changes)


def losses(budget: int, section: TrainingSection = SECTION, objective: Any = DPO(), steps: int = 5) -> list[float]:  # noqa: B008 - frozen
    reports = take_steps(policy(size=0), THIRTY, section, objective, steps=steps, budget=budget)
    return [report.metrics["loss"] for report in reports]


def reference_of(model: Any, pairs: Sequence[EncodedPair]) -> PairLogps:
    with as_reference(model):
        return reference_logps(model, pairs, token_budget=10_000, cache=None)


@pytest.mark.parametrize("seed", range(3))
def test_the_first_loss_of_a_fresh_adapter_is_ln_2(seed: int) -> None:
    """Law 1, in fp32 to 1e-5; an accuracy of one half, for every margin is a tie, or rounding."""
    section = SECTION.model_copy(update={"seed": seed})
    (report,) = take_steps(policy(size=0), THIRTY, section, DPO(), steps=1)
    assert report.metrics["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert report.metrics["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert (report.step, report.pairs, report.metrics["pairs"]) == (1, 8, 8)


def test_swapped_answers_negate_every_margin() -> None:
    """Law 1, through the model. DPO's loss grows by the mean reward margin, for ln(1+e^m) = ln(1+e^-m) + m."""
    moved = policy(size=0.1)
    swapped = [pair.swap() for pair in THIRTY]
    here, there = (
        evaluate(Policy(moved), pairs, reference_of(moved, pairs), DPO(), token_budget=200)[0]
        for pairs in (THIRTY, swapped)
    )
    assert abs(here["eval_rewards/margins"]) > 0.01
    assert there["eval_rewards/margins"] == pytest.approx(-here["eval_rewards/margins"], abs=1e-5)
    assert there["eval_rewards/accuracies"] == pytest.approx(1 - here["eval_rewards/accuracies"])
    assert there["eval_loss"] - here["eval_loss"] == pytest.approx(here["eval_rewards/margins"], abs=1e-5)


def test_a_tied_margin_counts_one_half() -> None:
    """A fresh adapter in the very packs of its reference ties everywhere: 0.5, not 0 as a plain `>` would have it."""
    fresh = policy(size=0)
    numbers, _ = evaluate(Policy(fresh), THIRTY, reference_of(fresh, THIRTY), DPO(), token_budget=10_000)
    assert numbers["eval_rewards/accuracies"] == 0.5
    assert numbers["eval_rewards/margins"] == 0


def test_held_out_numbers_are_the_textbook_s() -> None:
    """Against the plain model one sequence at a time: beta 0.1 x (policy - reference), means over all pairs."""
    moved = policy(size=0.1)
    numbers, logps = evaluate(Policy(moved), THIRTY, reference_of(moved, THIRTY), DPO(beta=0.1), token_budget=150)
    with torch.no_grad():
        tuned_P2, base_P2 = plain_logps(moved, THIRTY), plain_logps(tiny_model(), THIRTY)
    rewards_P2 = 0.1 * (tuned_P2 - base_P2)
    margins_P = rewards_P2[:, 0] - rewards_P2[:, 1]
    assert numbers == {
        "eval_loss": pytest.approx(torch.log1p(torch.exp(-margins_P)).mean().item(), rel=1e-4),
        "eval_rewards/chosen": pytest.approx(rewards_P2[:, 0].mean().item(), abs=1e-4),
        "eval_rewards/rejected": pytest.approx(rewards_P2[:, 1].mean().item(), abs=1e-4),
        "eval_rewards/margins": pytest.approx(margins_P.mean().item(), abs=1e-4),
        "eval_rewards/accuracies": pytest.approx((margins_P > 0).float().mean().item()),
        "eval_logps/chosen": pytest.approx(tuned_P2[:, 0].mean().item(), rel=1e-4),
        "eval_logps/rejected": pytest.approx(tuned_P2[:, 1].mean().item(), rel=1e-4),
        "eval_tokens/chosen": pytest.approx(mean(int(pair.chosen.scored.sum()) for pair in THIRTY)),
        "eval_tokens/rejected": pytest.approx(mean(int(pair.rejected.scored.sum()) for pair in THIRTY)),
        "eval_log_ratios/chosen": pytest.approx((tuned_P2 - base_P2)[:, 0].mean().item(), abs=1e-3),
        "eval_log_ratios/rejected": pytest.approx((tuned_P2 - base_P2)[:, 1].mean().item(), abs=1e-3),
        "eval_log_ratios/size": pytest.approx((tuned_P2 - base_P2).abs().mean().item(), abs=1e-3),
    }
    torch.testing.assert_close(torch.stack([logps.chosen_P, logps.rejected_P], 1), tuned_P2, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "objective",
    [DPO(), IPO(), Hinge(), AOT(), LDDPO(), SimPO(), BCO(), Mixture(terms=(LDDPO(), AOT()), weights=(1.0, 1.0))],
    ids=lambda o: o.kind,
)
def test_packing_changes_speed_only(objective: Any) -> None:
    """A pair to a row, or all of a step in one, one-pass or two-pass: five steps, the fourth smaller, the same losses
    to 1e-5 (relative for IPO, whose loss is 25), and they move."""
    narrow, wide = losses(64, objective=objective), losses(10_000, objective=objective)
    assert narrow == pytest.approx(wide, rel=1e-5, abs=1e-5)
    assert abs(narrow[-1] - narrow[0]) > 0.02


def gradients_of_a_step(model: Any, objective: Any, *, budget: int, section: TrainingSection = SECTION) -> Any:
    """What lies in every trainable tensor's gradient when the optimizer is about to step."""
    found: dict[str, Tensor] = {}

    def catch(self: TrainingState, policy: Any) -> None:
        found.update({name: p.grad.clone() for name, p in policy.trained.items() if p.grad is not None})
        self.step += 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingState, "advance", catch)
        (report,) = take_steps(model, THIRTY, section, objective, steps=1, budget=budget)
    return found, report.metrics["loss"]


@dataclass(frozen=True)
class WholeStepDPO(DPO):
    """DPO made to take the two passes."""

    whole_step: ClassVar[bool] = True


@dataclass(frozen=True)
class WholeStepMixture(Mixture):
    """A mixture made to, though its terms need not."""

    whole_step: ClassVar[bool] = True


EVERY_COLUMN: dict[str, Any] = {"terms": (LDDPO(beta=0.3), WPO(), SFT()), "weights": (1.0, 500.0, 0.1)}
"""Sums, shared sums and agreement; WPO's losses are a thousandth where the weights are random."""


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    ("objective", "in_two_passes"),
    [
        (DPO(beta=0.3), WholeStepDPO(beta=0.3)),
        (Mixture(**EVERY_COLUMN), WholeStepMixture(**EVERY_COLUMN)),
    ],
    ids=["dpo", "mixture"],
)
def test_the_two_pass_gradient_is_the_one_pass_gradient(objective: Any, in_two_passes: Any, dropout: float) -> None:
    """Chain rule: dL/dw = sum of dL/dlogp x dlogp/dw. With dropout both passes draw the same masks."""
    one, loss = gradients_of_a_step(policy(dropout=dropout), objective, budget=100)
    two, same = gradients_of_a_step(policy(dropout=dropout), in_two_passes, budget=100)
    assert loss == pytest.approx(same, rel=1e-6)
    assert len(one) == 56
    for name, gradient in one.items():
        torch.testing.assert_close(two[name], gradient, rtol=0, atol=1e-6 * gradient.abs().max().item(), msg=name)


def test_aot_in_micro_batches_is_aot_in_one_graph() -> None:
    """Ranks run across micro-batches; the oracle has all eight pairs in one row and one backward."""
    objective = AOT(beta=0.3)
    found, loss = gradients_of_a_step(policy(), objective, budget=70)
    direct = policy()
    places = Steps(THIRTY, 8, 100, SECTION.seed, 1).pairs_of(1)
    pairs = [THIRTY[place] for place in places]
    expected = objective(pair_logps(direct, pack(pairs)), reference_of(direct, pairs)).mean()
    torch.autograd.backward(expected)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    for name, p in direct.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(found[name], p.grad, rtol=0, atol=1e-5 * p.grad.abs().max().item(), msg=name)


@dataclass(frozen=True)
class ListeningBCO(BCO):
    """Notes the means it is given."""

    heard: ClassVar[list[float]] = []

    def with_running_mean(self, mean_log_ratio: float) -> BCO:  # type: ignore[override]
        self.heard.append(mean_log_ratio)
        return BCO(beta=self.beta).with_running_mean(mean_log_ratio)


def test_bco_s_threshold_is_the_mean_reward_of_the_steps_before() -> None:
    """From the metrics of steps 1 to k-1: (chosen + rejected reward) / 2 / beta, every step counted once, the smaller
    fourth too. Nothing before the first step."""
    reports = list(take_steps(policy(), THIRTY, SECTION, ListeningBCO(beta=0.3), steps=6))
    means = [(line["rewards/chosen"] + line["rewards/rejected"]) / 2 / 0.3 for line in (r.metrics for r in reports)]
    expected = [0.0, *(sum(means[:step]) / step for step in range(1, 6))]
    assert ListeningBCO.heard == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert min(map(abs, expected[1:])) > 0.1


@pytest.mark.parametrize("objective", [SimPO(), ORPO(), SFT(), SFT(average="token")], ids=str)
def test_an_objective_without_a_reference_learns_without_one(objective: Any) -> None:
    """No log-probs come with the micro-batches. The loss falls; rewards are beta x the log-prob a token."""
    model = policy(size=0)
    state = TrainingState.fresh(Policy(model), SECTION, 6)
    train_mode(model)
    reports = list(train(Policy(model), Steps(THIRTY, 30, 100, SECTION.seed, 1, 6), objective, state))
    assert reports[-1].metrics["loss"] < reports[0].metrics["loss"] - 0.02
    base_P2, tokens_P2 = plain_logps(tiny_model(), THIRTY), [[len(p.chosen.ids), len(p.rejected.ids)] for p in THIRTY]
    per_token_P2 = (base_P2 / torch.tensor(tokens_P2)).detach()
    first = reports[0].metrics
    assert first["rewards/chosen"] == pytest.approx(objective.beta * per_token_P2[:, 0].mean().item(), rel=1e-4)
    assert first["rewards/rejected"] == pytest.approx(objective.beta * per_token_P2[:, 1].mean().item(), rel=1e-4)
    assert first["rewards/accuracies"] == (per_token_P2[:, 0] > per_token_P2[:, 1]).double().mean().item()
    assert state.mean_log_ratio == 0


def test_a_smaller_last_step_averages_over_its_own_pairs() -> None:
    """Six pairs, alone in a step that could hold eight: the gradient of their mean, not of their sum over eight."""
    model, six = policy(), THIRTY[:6]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.test_learning_train.THIRTY", six)
        found, _ = gradients_of_a_step(model, DPO(beta=0.3), budget=70)
    direct = policy()
    torch.autograd.backward(DPO(beta=0.3)(pair_logps(direct, pack(six)), reference_of(direct, six)).mean())
    for name, p in direct.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(found[name], p.grad, rtol=0, atol=1e-5 * p.grad.abs().max().item(), msg=name)


def test_a_live_reference_is_a_cached_one() -> None:
    """Law 3, over five steps: the same losses to 1e-5."""
    model = policy(size=0)

    def live(batches: Sequence[MicroBatch]) -> list[PairLogps]:
        with as_reference(model):
            return [pair_logps(model, batch) for batch in batches]

    state = TrainingState.fresh(Policy(model), SECTION, 5)
    train_mode(model)
    reports = train(Policy(model), Steps(THIRTY, 8, 100, SECTION.seed, 1, 5), DPO(), state, live)
    assert [report.metrics["loss"] for report in reports] == pytest.approx(losses(100), abs=1e-5)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 0.1, 0.25, 0.07, 1, 7, 40])
@pytest.mark.parametrize("total", [1, 20, 100])
def test_the_learning_rate_is_transformers_own(schedule: Any, warmup: float, total: int) -> None:
    """Step by step, also where the warm-up is longer than the run. Shares are rounded up: 0.1 of 20 is 2 steps, 0.25 of
    1 is 1, and 0.07 of 100 is 7 although floating point has 7.000000000000001."""
    section = TrainingSection(schedule=schedule, warmup=warmup, learning_rate=3e-4)
    steps = int(warmup) if warmup >= 1 else math.ceil(Fraction(str(warmup)) * total)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    theirs = get_scheduler(name, optimizer, num_warmup_steps=steps, num_training_steps=total)
    for step in range(total):
        assert learning_rate(section, step, total) == pytest.approx(theirs.get_last_lr()[0], rel=1e-9, abs=1e-15)
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("clip", [None, 0.01, 1e6])
def test_gradients_are_clipped_to_the_norm_asked_for(clip: float | None) -> None:
    """The norm reported is that before clipping; what AdamW averages (0.1 x gradient after one step) is after it."""
    model = policy()
    section = SECTION.model_copy(update={"clip": clip})
    gradients, _ = gradients_of_a_step(policy(), DPO(), budget=100)
    norm = math.sqrt(sum(float(g.double().pow(2).sum()) for g in gradients.values()))
    state_norms: list[float] = []
    inner = TrainingState.advance

    def advance(self: TrainingState, policy: Any) -> None:
        inner(self, policy)
        averages = (self.optimizer.state[p]["exp_avg"] for p in policy.trained.values())
        state_norms.append(10 * math.sqrt(sum(float(a.double().pow(2).sum()) for a in averages)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingState, "advance", advance)
        (report,) = take_steps(model, THIRTY, section, DPO(), steps=1)
    assert report.metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert norm > 0.1
    assert state_norms == [pytest.approx(min(norm, clip or math.inf), rel=1e-3)]


def weights(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("objective", [DPO(), AOT()], ids=lambda o: o.kind)
def test_a_loss_that_is_not_finite_never_reaches_the_weights(objective: Any) -> None:
    """Pair 4's reference is NaN; it is named, nothing was learned from the step. AOT sorts NaN too."""
    model = policy()
    before = weights(model)
    known = reference_of(model, THIRTY)
    known.chosen_P[4] = math.nan
    plan = Steps(THIRTY, 30, 100, 0, 1, 1, lambda places: known.map(lambda x_P: x_P[list(places)]))
    state = TrainingState.fresh(Policy(model), SECTION, 1)
    (report,) = train(Policy(model), plan, objective, state)
    assert report.skipped == "the loss of row 4 is not finite"
    assert report.metrics == {"epoch": 1.0, "skipped": 1.0, "pairs": 30}
    assert (state.step, state.skipped, state.optimizer.state) == (1, 1, {})
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_gradient_that_is_not_finite_never_reaches_the_weights(clip: float | None) -> None:
    """The losses are finite, one layer's gradient is not: all pairs of the step are named."""
    model = policy()
    before = weights(model)
    next(p for p in model.parameters() if p.requires_grad).register_hook(lambda gradient: gradient * math.inf)
    (report,) = take_steps(model, THIRTY, SECTION.model_copy(update={"clip": clip}), DPO(), steps=1)
    rows = ", ".join(map(str, sorted(Steps(THIRTY, 8, 100, SECTION.seed, 1).pairs_of(1))))
    assert report.skipped == f"the gradient of rows {rows} together is not finite"
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_run_goes_on_after_a_step_that_was_not_taken() -> None:
    """The pairs of step 3 of 5 have a NaN reference: weights and averages stay as step 2 left them, and steps 4 and 5
    learn from them at their own rates. BCO's threshold is then the mean of the four steps that were taken."""
    model = policy()
    known = reference_of(model, THIRTY)
    plan = Steps(THIRTY, 6, 100, SECTION.seed, 1, 5, lambda places: known.map(lambda x_P: x_P[list(places)]))
    known.rejected_P[plan.pairs_of(3)] = math.nan
    section = SECTION.model_copy(update={"schedule": "linear"})
    state = TrainingState.fresh(Policy(model), section, 5)
    train_mode(model)
    reports, after, averages = [], [], []
    for report in train(Policy(model), plan, BCO(beta=0.3), state):
        reports.append(report)
        after.append(weights(model))
        averages.append([{k: v.clone() for k, v in kept.items()} for kept in state.optimizer.state.values()])
    rows = ", ".join(map(str, sorted(plan.pairs_of(3))))
    assert [r.skipped for r in reports] == ["", "", f"the loss of rows {rows} is not finite", "", ""]
    same = [all(torch.equal(a[name], b[name]) for name in a) for a, b in itertools.pairwise(after)]
    assert same == [False, True, False, False]
    assert all(torch.equal(x[k], y[k]) for x, y in zip(averages[1], averages[2], strict=True) for k in x)
    assert [r.metrics.get("learning_rate") for r in reports] == pytest.approx(
        [3e-3, 3e-3 * 4 / 5, None, 3e-3 * 2 / 5, 3e-3 / 5]
    )
    taken = [r.metrics for r in reports if not r.skipped]
    means = [(m["rewards/chosen"] + m["rewards/rejected"]) / 2 / 0.3 for m in taken]
    assert state.mean_log_ratio == pytest.approx(sum(means) / 4, rel=1e-6)
    assert (state.skipped, state.skipped_in_a_row) == (1, 0)


def test_three_steps_in_a_row_that_are_not_finite_stop_the_run() -> None:
    """Steps 2, 3 and 4 of 5: the third is reported, then the run stops, with the weights of step 1."""
    model = policy()
    known = reference_of(model, THIRTY)
    plan = Steps(THIRTY, 6, 100, SECTION.seed, 1, 5, lambda places: known.map(lambda x_P: x_P[list(places)]))
    for step in (2, 3, 4):
        known.chosen_P[plan.pairs_of(step)] = math.inf
    state = TrainingState.fresh(Policy(model), SECTION, 5)
    reports = train(Policy(model), plan, DPO(), state)
    next(reports)
    before = weights(model)
    assert [next(reports).step for _ in range(3)] == [2, 3, 4]
    with pytest.raises(NonFiniteError, match=r"step 4: the loss of rows .* as in the 2 steps") as stopped:
        next(reports)
    assert stopped.value.exit_code == 3
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_dropout_masks_come_from_seed_step_and_micro_batch_alone() -> None:
    """Whatever the process drew before; and each of the three changes them."""
    model = policy()

    def drawn(seed: int, step: int, micro_batch: int) -> list[float]:
        state = TrainingState.fresh(Policy(model), TrainingSection(seed=seed), 9)
        state.step = step
        state.seed_dropout(micro_batch)
        return [round(float(x), 6) for x in torch.rand(3)]

    torch.manual_seed(99)
    once = drawn(1, 2, 3)
    torch.rand(1000)
    assert drawn(1, 2, 3) == once
    draws = [drawn(seed, step, number) for seed in (0, 1) for step in (0, 1, 2) for number in (0, 1, 2)]
    assert len({tuple(draw) for draw in draws}) == 18


def test_dropout_is_felt_in_training_and_not_in_evaluation() -> None:
    """The same weights: another loss in the step than without dropout, the same held-out loss; and the random state of
    the process changes neither."""
    torch.manual_seed(1)
    (first,) = take_steps(policy(dropout=0.5), THIRTY, SECTION, DPO(), steps=1)
    torch.manual_seed(2)
    (again,) = take_steps(policy(dropout=0.5), THIRTY, SECTION, DPO(), steps=1)
    (without,) = take_steps(policy(), THIRTY, SECTION, DPO(), steps=1)
    assert first.metrics == again.metrics
    assert first.metrics["loss"] != pytest.approx(without.metrics["loss"], abs=1e-4)
    model = policy(dropout=0.5)
    train_mode(model)
    held_out = evaluate(Policy(model), THIRTY, reference_of(model, THIRTY), DPO(), token_budget=100)[0]
    assert held_out == evaluate(Policy(policy()), THIRTY, reference_of(policy(), THIRTY), DPO(), token_budget=100)[0]
    assert any(module.training for module in model.modules())


def test_only_the_adapter_learns_and_only_it_drops_out() -> None:
    """The base's own dropout would make the policy differ from its reference by chance."""
    model = policy(size=0, attention_dropout=0.5)
    before = weights(model)
    reports = list(take_steps(model, THIRTY, SECTION, DPO(), steps=2))
    assert reports[0].metrics["loss"] == pytest.approx(math.log(2), abs=1e-5)
    after = weights(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".lora_" in name}


def test_weight_decay_shrinks_what_is_trained() -> None:
    """AdamW's decoupled decay, one step at rate r: p <- p (1 - r x decay) - update, the update being the same."""
    section = SECTION.model_copy(update={"learning_rate": 1e-2})
    plain, decayed, start = policy(), policy(), weights(policy())
    list(take_steps(plain, THIRTY, section, DPO(), steps=1))
    list(take_steps(decayed, THIRTY, section.model_copy(update={"weight_decay": 0.5}), DPO(), steps=1))
    without, with_ = weights(plain), weights(decayed)
    for name in (name for name in start if ".lora_" in name):
        torch.testing.assert_close(without[name] - with_[name], 1e-2 * 0.5 * start[name], rtol=1e-3, atol=1e-6)


@pytest.fixture
def golden_run() -> Iterator[list[float]]:
    section = TrainingSection(pairs_per_step=8, learning_rate=3e-3, warmup=3, schedule="cosine", seed=11)
    yield losses(150, section, steps=20)


def this_machine() -> str:
    """What bits hang on: torch's build, the processor's instructions and who made it."""
    maker = (
        re.search(r"vendor_id\s*: (\w+)", Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").exists() else None
    )
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {maker[1] if maker else 'unknown'}"


def test_twenty_losses_are_those_on_file(golden_run: list[float]) -> None:
    """A change meant to keep the numbers keeps these: to the bit on the machine type they were written on (CPU,
    fp32), to 1e-5 elsewhere. A difference beyond rounding means another algorithm. To renew: delete the file."""
    if not GOLDEN.exists():
        GOLDEN.write_text(
            json.dumps({"machine": this_machine(), "losses": golden_run}, indent=0) + "\n", encoding="utf-8"
        )
        pytest.fail(f"{GOLDEN} was missing and has been written: read it over and run again")
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert golden_run == pytest.approx(golden["losses"], abs=1e-5)
    if golden["machine"] == this_machine():
        assert golden_run == golden["losses"]
    assert golden_run[-1] < math.log(2) - 0.1
