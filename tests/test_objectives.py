"""Losses worked by hand, and the same formulas in float64 NumPy."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dpo_studio.objectives import (
    AOT,
    BCO,
    DPO,
    EXO,
    FDPO,
    IPO,
    LDDPO,
    NCA,
    OBJECTIVES,
    ORPO,
    SFT,
    SPPO,
    WPO,
    AOTUnpaired,
    APODown,
    APOZero,
    DiscoPOP,
    DPONorm,
    Hinge,
    Mixture,
    PairLogps,
    Robust,
    SimPO,
    margin,
)

ALL: list[Any] = [
    *(kind() for kind in OBJECTIVES),
    DPO(beta=0.5, label_smoothing=0.1),
    AOT(beta=0.5, label_smoothing=0.1),
    AOTUnpaired(beta=0.5, label_smoothing=0.1),
    EXO(label_smoothing=0.2),
    Robust(label_smoothing=0.4),
    BCO(shift=0.7),
    DiscoPOP(tau=1.0),
    *(FDPO(divergence=how) for how in ("reverse_kl", "forward_kl", "alpha")),
    *(LDDPO(alpha=share) for share in (0.0, 1.0)),
    SFT(average="token"),
    Mixture(terms=(WPO(beta=0.3), AOT()), weights=(0.5, 2.0)),
]


def logps(
    chosen: Any,
    rejected: Any,
    tokens: tuple[int, int] = (2, 4),
    shared: tuple[Any, Any] | None = None,
    agreement: Any = None,
) -> PairLogps:
    """Columns from lists; half of a sum lies in the shared tokens and the weight is 1 where nothing else is said."""
    chosen_P, rejected_P = torch.as_tensor(chosen, dtype=torch.float32), torch.as_tensor(rejected, dtype=torch.float32)
    chosen_tokens_P, rejected_tokens_P = (torch.full(chosen_P.shape, count) for count in tokens)
    parts = map(torch.tensor, shared) if shared is not None else (chosen_P / 2, rejected_P / 2)
    chosen_shared_P, rejected_shared_P = parts
    return PairLogps(
        chosen_P,
        rejected_P,
        chosen_tokens_P,
        rejected_tokens_P,
        chosen_shared_P,
        rejected_shared_P,
        torch.zeros_like(chosen_P) if agreement is None else agreement,
    )


POLICY = logps([-3.0], [-7.0], shared=([-3.0], [-4.0]), agreement=torch.tensor([math.log(0.25)]))
REFERENCE = logps([-4.0], [-5.0], shared=([-4.0], [-3.0]))
"""The chosen answer gained 1 nat, the rejected one lost 2: a margin of 3 nats. The chosen answer is as long as the
first two of the rejected one's four tokens."""


@pytest.mark.parametrize(
    ("objective", "loss"),
    [
        (DPO(beta=0.5), 0.201413),
        (DPO(beta=0.5, label_smoothing=0.1), 0.351413),
        (IPO(beta=0.25), 1.0),
        (Hinge(beta=0.1), 0.7),
        (Hinge(beta=0.5), 0.0),
        (DPONorm(beta=1.0), 0.313262),
        (Robust(beta=0.5, label_smoothing=0.1), 0.013914),
        (EXO(beta=0.5, label_smoothing=0.25), 0.013045),
        (DiscoPOP(beta=0.5, tau=0.5), 0.222100),
        (FDPO(beta=0.5, divergence="reverse_kl"), 0.201413),
        (FDPO(beta=0.5, divergence="js"), 0.339184),
        (FDPO(beta=0.5, divergence="forward_kl"), 0.029441),
        (FDPO(beta=0.5, divergence="alpha", alpha=0.5), 0.114244),
        (LDDPO(beta=0.5, alpha=0.5), 0.251929),
        (LDDPO(beta=0.5, alpha=1.0), 0.201413),
        (LDDPO(beta=0.5, alpha=0.0), 0.313262),
        (WPO(beta=0.5), 0.050353),
        (NCA(beta=0.5), 1.117747),
        (BCO(beta=0.5), 0.787339),
        (BCO(beta=0.5, shift=0.5), 0.894560),
        (SPPO(beta=0.5), 1.0),
        (APOZero(beta=0.5), 0.646482),
        (APODown(beta=0.5), 0.804885),
        (SFT(), 1.5),
        (SFT(average="token"), 1.5),
        (SimPO(beta=2.0, gamma=0.5), 0.693147),
        (ORPO(beta=0.1), 1.554944),
        (Mixture(terms=(DPO(beta=0.5), SFT()), weights=(0.8, 1.0)), 1.661130),
    ],
    ids=str,
)
def test_a_pair_by_hand(objective: Any, loss: float) -> None:
    """Log-ratios 1 and -2, margin 3.

    DPO, beta 0.5: reward margin 1.5, ln(1 + e^-1.5) = ln 1.223130 = 0.201413.
    With smoothing 0.1: 0.9 x 0.201413 + 0.1 x (0.201413 + 1.5) = 0.351413.
    IPO, beta 0.25, 2 and 4 tokens: 1/2 - (-2/4) = 1 a token, the target is 1/(2 x 0.25) = 2, (1 - 2)^2 = 1.
    Hinge: 1 - 0.1 x 3 = 0.7; 1 - 0.5 x 3 < 0, so 0.

    Below, s(x) = 1 / (1 + e^-x) and l(x) = -ln s(x): l(1.5) = 0.201413, l(-1.5) = 1.701413, l(0.5) = 0.474077,
    l(-0.5) = 0.974077, l(1) = 0.313262, s(0.5) = 0.622459, s(1.5) = 0.817574, s(-1) = 0.268941. Rewards at beta 0.5:
    0.5 and -1.
    dpo_norm: a margin of 1 a token as in IPO, l(1).
    robust: (0.9 x l(1.5) - 0.1 x l(-1.5)) / 0.8 = (0.181272 - 0.170141) / 0.8.
    exo: s(1.5) (-l(1.5) - ln 0.75) + s(-1.5) (-l(-1.5) - ln 0.25) = 0.817574 x 0.086269 - 0.182426 x 0.315119.
    discopop, tau 0.5: s(3) = 0.952574; 0.047426 x l(1.5) + 0.952574 x e^-1.5 = 0.009552 + 0.212548.
    f_dpo: js -l(1) + l(-2) = 2.126928 - 0.313262 = 1.813666, half of it through l; forward KL (1 - e^-1) - (1 - e^2) =
    7.021177; alpha 0.5: -2 (e^-0.5 - 1) + 2 (e^1 - 1) = 0.786939 + 3.436564 = 4.223503.
    ld_dpo: rejected -4 - 0.5 x 3 = -5.5 and -3 - 0.5 x 2 = -4, log-ratio -1.5, margin 2.5, l(1.25); at alpha 1 DPO; at
    alpha 0 the rejected log-ratio is -4 + 3 = -1, margin 2, l(1).
    wpo: DPO's over 4. nca: l(0.5) + l(-0.5) / 2 + l(1) / 2. bco: l(0.5) + l(1); threshold 0.5: l(0) + l(1.5).
    sppo: (1 - 1)^2 + (-2 + 1)^2. apo_zero: s(-0.5) + s(-1). apo_down: s(0.5) + s(-1.5).
    Without the reference, -3 over 2 tokens and -7 over 4 are -1.5 and -1.75. sft: 1.5. simpo: l(2 x 0.25 - 0.5) = ln 2.
    orpo: log odds -1.5 - ln(1 - e^-1.5) = -1.247518 and -1.75 - ln(1 - e^-1.75) = -1.559113; 1.5 + 0.1 x l(0.311595).
    mixture: 0.8 x l(1.5) + 1.5.
    """
    assert margin(POLICY, REFERENCE).tolist() == [3.0]
    assert objective(POLICY, REFERENCE).tolist() == [pytest.approx(loss, abs=1e-6)]


def test_aot_by_hand() -> None:
    """Policy's chosen minus rejected: -3 + 7 = 4 and -2 + 1 = -1, sorted -1, 4. Reference's: -4 + 5 = 1, -6 + 3 = -3,
    sorted -3, 1. Differences by rank 2 and 3; at beta 0.5 ln(1 + e^-1) = 0.313262 and ln(1 + e^-1.5) = 0.201413.
    With the two references exchanged the ranks are the same, and so are AOT's losses; DPO's are not."""
    policy, reference = logps([-3.0, -2.0], [-7.0, -1.0]), logps([-4.0, -6.0], [-5.0, -3.0])
    assert AOT(beta=0.5)(policy, reference).tolist() == pytest.approx([0.313262, 0.201413], abs=1e-6)
    exchanged = reference.map(lambda x_P: x_P.flip(0))
    assert AOT(beta=0.5)(policy, exchanged).tolist() == pytest.approx([0.313262, 0.201413], abs=1e-6)
    assert DPO(beta=0.5)(policy, exchanged).tolist() != pytest.approx(DPO(beta=0.5)(policy, reference).tolist())


@pytest.mark.parametrize("objective", ALL, ids=str)
def test_before_the_first_step_the_loss_is_known(objective: Any) -> None:
    """Policy = reference: ln 2 whatever beta and smoothing (law 1), except where the formula has other terms. IPO
    (1/(2 x 0.1))^2 = 25; SPPO twice that; the answers' own classifiers 2 ln 2 or, as sigmoids, 1; EXO the KL of a fair
    coin from the label; DiscoPOP half ln 2, half 1."""
    if not objective.needs_reference or isinstance(objective, Mixture):
        return
    shift = objective.shift if isinstance(objective, BCO) and objective.shift != "running" else 0.0
    smoothing = getattr(objective, "label_smoothing", 0.0)
    starts: dict[type, Callable[[], float]] = {
        IPO: lambda: 25.0,
        Hinge: lambda: 1.0,
        SPPO: lambda: 50.0,
        NCA: lambda: 2 * math.log(2),
        BCO: lambda: math.log1p(math.exp(shift)) + math.log1p(math.exp(-shift)),
        APOZero: lambda: 1.0,
        APODown: lambda: 1.0,
        DiscoPOP: lambda: (math.log(2) + 1) / 2,
        EXO: lambda: -math.log(2) - math.log(smoothing * (1 - smoothing)) / 2,
    }
    start = starts.get(type(objective), lambda: math.log(2))()
    same = logps([-3.0, -9.0], [-7.0, -1.0])
    assert objective(same, same).tolist() == pytest.approx([start, start], rel=1e-6)


def swap(sides: PairLogps) -> PairLogps:
    return PairLogps(sides.rejected_P, sides.chosen_P, sides.rejected_tokens_P, sides.chosen_tokens_P)


def test_swapping_the_answers_negates_the_margin() -> None:
    """Law 1. Margin 3, and -3 when swapped; DPO's loss grows by beta x 3 exactly, for ln(1+e^m) - ln(1+e^-m) = m."""
    assert margin(swap(POLICY), swap(REFERENCE)).tolist() == [-3.0]
    there, back = DPO(beta=0.5)(POLICY, REFERENCE), DPO(beta=0.5)(swap(POLICY), swap(REFERENCE))
    assert (back - there).item() == pytest.approx(1.5, abs=1e-6)


def exact(objective: Any, policy: PairLogps, reference: PairLogps) -> np.ndarray[Any, Any]:
    """The losses in float64, from the papers' formulas."""
    if isinstance(objective, Mixture):
        parts = (exact(term, policy, reference) for term in objective.terms)
        return np.asarray(sum(weight * part for weight, part in zip(objective.weights, parts, strict=True)))
    pc, pr, nc, nr, ps, pt, agreement = columns(policy)
    rc, rr, _, _, rs, rt, _ = columns(reference)
    beta, smoothing = objective.beta, getattr(objective, "label_smoothing", 0.0)
    c, r = pc - rc, pr - rr
    chosen, rejected, m = beta * c, beta * r, beta * (c - r)
    match objective.kind:
        case "dpo":
            return (1 - smoothing) * soft(-m) + smoothing * soft(m)
        case "ipo":
            return np.asarray((c / nc - r / nr - 1 / (2 * beta)) ** 2)
        case "hinge":
            return np.asarray(np.maximum(0, 1 - m))
        case "dpo_norm":
            return soft(-beta * (c / nc - r / nr))
        case "robust":
            return np.asarray(((1 - smoothing) * soft(-m) - smoothing * soft(m)) / (1 - 2 * smoothing))
        case "exo":
            q = sigmoid(m)
            return np.asarray(q * (-soft(-m) - np.log(1 - smoothing)) + (1 - q) * (-soft(m) - np.log(smoothing)))
        case "discopop":
            blend = sigmoid(m / objective.tau)
            return np.asarray((1 - blend) * soft(-m) + np.exp(-m - soft(-m / objective.tau)))
        case "f_dpo":
            slope: Any = {
                "reverse_kl": lambda t: np.log(t) + 1,
                "forward_kl": lambda t: -1 / t,
                "js": lambda t: np.log(2 * t / (1 + t)),
                "alpha": lambda t: (1 - t ** -(1 - objective.alpha)) / (1 - objective.alpha),
            }[objective.divergence]
            return soft(-beta * (slope(np.exp(c)) - slope(np.exp(r))))
        case "ld_dpo":
            a = objective.alpha
            return soft(-beta * ((a * c + (1 - a) * (ps - rs)) - (a * r + (1 - a) * (pt - rt))))
        case "wpo":
            return np.asarray(soft(-m) * np.exp(agreement))
        case "nca":
            return np.asarray(soft(-chosen) + 0.5 * soft(chosen) + 0.5 * soft(rejected))
        case "bco":
            shift = 0 if objective.shift == "running" else objective.shift
            return np.asarray(soft(shift - chosen) + soft(rejected - shift))
        case "sppo":
            return np.asarray((c - 1 / (2 * beta)) ** 2 + (r + 1 / (2 * beta)) ** 2)
        case "apo_zero":
            return np.asarray(1 - sigmoid(chosen) + sigmoid(rejected))
        case "apo_down":
            return np.asarray(sigmoid(chosen) + 1 - sigmoid(m))
        case "aot" | "aot_unpaired":
            sides = (pc - pr, rc - rr) if objective.kind == "aot" else (c, r)
            m = beta * (np.sort(sides[0]) - np.sort(sides[1]))
            return (1 - smoothing) * soft(-m) + smoothing * soft(m)
        case "sft":
            return np.asarray(-pc / nc if objective.average == "answer" else -pc / nc.mean())
        case "simpo":
            return soft(objective.gamma - beta * (pc / nc - pr / nr))
        case "orpo":
            odds, other = (np.exp(x) / (1 - np.exp(x)) for x in (pc / nc, pr / nr))
            return np.asarray(-pc / nc - beta * np.log(sigmoid(np.log(odds / other))))
    raise AssertionError(objective)


def columns(logps: PairLogps) -> list[np.ndarray[Any, Any]]:
    """Every column in float64."""
    return [getattr(logps, field.name).double().numpy() for field in fields(logps)]


def soft(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """ln(1 + e^x), the logistic loss of -x."""
    return np.asarray(np.logaddexp(0, x))


def sigmoid(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.asarray(np.exp(-soft(-x)))


def random_logps(seed: int, count: int = 200) -> PairLogps:
    draw = np.random.default_rng(seed)
    sums_2P = torch.from_numpy(draw.uniform(-80, -1, (2, count))).float()
    tokens_2P = torch.from_numpy(draw.integers(1, 50, (2, count)))
    shared_2P = sums_2P * torch.from_numpy(draw.uniform(0, 1, (2, count))).float()
    agreement_P = torch.from_numpy(draw.uniform(-8, 1, count)).float()
    columns: list[Any] = [*sums_2P, *tokens_2P, *shared_2P, agreement_P]
    return PairLogps(*columns)


@pytest.mark.parametrize("objective", ALL, ids=str)
def test_the_formula_in_float64(objective: Any) -> None:
    """Log-ratios of up to 79 nats. A reference that nobody reads may be missing."""
    policy, reference = random_logps(1), random_logps(2)
    np.testing.assert_allclose(
        objective(policy, reference).numpy(), exact(objective, policy, reference), rtol=1e-4, atol=1e-4
    )
    if not objective.needs_reference:
        assert torch.equal(objective(policy, None), objective(policy, reference))


@pytest.mark.parametrize("objective", [DPO(beta=0.5), DPO(beta=0.5, label_smoothing=0.25)], ids=str)
def test_dpo_s_gradient_by_hand(objective: DPO) -> None:
    """d loss / d chosen log-prob = -beta x ((1 - s) sigmoid(-m) - s sigmoid(m)), minus that for the rejected one.
    Margin 3 nats, m = 1.5, sigmoid(-1.5) = 0.182426: -0.0912 at s = 0, -0.5 x (0.136819 - 0.204394) at s = 0.25."""
    policy = POLICY.map(lambda x_P: x_P.clone().requires_grad_() if x_P.is_floating_point() else x_P)
    chosen, rejected = torch.autograd.grad(objective(policy, REFERENCE).sum(), [policy.chosen_P, policy.rejected_P])
    expected = {0.0: -0.091213, 0.25: 0.033787}[objective.label_smoothing]
    assert chosen.item() == pytest.approx(expected, abs=1e-6)
    assert rejected.item() == pytest.approx(-expected, abs=1e-6)


@pytest.mark.parametrize("objective", ALL, ids=str)
@pytest.mark.parametrize("nats", [-1e4, 1e4])
def test_margins_of_thousands_of_nats_overflow_nothing(objective: Any, nats: float) -> None:
    """An answer of a thousand tokens gets there: the loss is large or 0, its gradient finite."""
    for sums in ([nats, 0.0], [0.0, nats]):
        sums_2 = torch.tensor(sums, requires_grad=True)
        halves = (sums_2[:1], sums_2[1:])
        policy = PairLogps(*halves, torch.tensor([1]), torch.tensor([1]), *halves, torch.zeros(1))
        losses = objective(policy, logps([0.0], [0.0]))
        (slopes_2,) = torch.autograd.grad(losses.sum(), sums_2)
        assert torch.isfinite(losses).all()
        assert torch.isfinite(slopes_2).all()


@pytest.mark.parametrize("objective", ALL, ids=str)
def test_the_order_of_a_step_s_pairs_means_nothing(objective: Any) -> None:
    """The step's loss is the same, and every pair keeps its own gradient; AOT's ranks go along with the pairs."""
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    policy, reference = random_logps(1), random_logps(2)

    def step(policy: PairLogps, reference: PairLogps) -> tuple[Tensor, Tensor]:
        chosen = policy.chosen_P.clone().requires_grad_()
        loss = objective(replace(policy, chosen_P=chosen), reference).mean()
        return loss.detach(), torch.autograd.grad(loss, chosen)[0]

    loss, slopes = step(policy, reference)
    moved_loss, moved_slopes = step(policy.map(lambda x: x[order]), reference.map(lambda x: x[order]))
    torch.testing.assert_close(moved_loss, loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(moved_slopes, slopes[order], rtol=1e-5, atol=1e-8)


def test_aot_does_not_care_which_reference_belongs_to_which_pair() -> None:
    """It compares two distributions: permuting the reference's pairs alone changes nothing, and DPO's loss."""
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    policy, reference = random_logps(1), random_logps(2)
    other = reference.map(lambda x: x[order])
    assert torch.equal(AOT()(policy, reference), AOT()(policy, other))
    assert not torch.allclose(DPO()(policy, reference).mean(), DPO()(policy, other).mean())


def test_what_each_objective_asks_for() -> None:
    """Two passes, a reference, WPO's weights: only where the formula reads them, and a mixture what its terms ask."""
    mixed = [Mixture(terms=(SFT(), one), weights=(1.0, 1.0)) for one in (AOT(), SimPO(), WPO())]
    asks = [(one.whole_step, one.needs_reference, one.needs_agreement) for one in mixed]
    assert asks == [(True, True, False), (False, False, False), (False, True, True)]
    plain = [kind() for kind in OBJECTIVES]
    assert {one.kind for one in plain if one.whole_step} == {"aot", "aot_unpaired"}
    assert {one.kind for one in plain if not one.needs_reference} == {"sft", "simpo", "orpo"}
    assert {one.kind for one in plain if one.needs_agreement} == {"wpo"}
    assert SFT(average="token").whole_step


@pytest.mark.parametrize("objective", ALL, ids=str)
def test_a_pair_s_loss_hangs_on_no_other_pair_unless_it_says_so(objective: Any) -> None:
    """Half of the pairs alone: the same losses, bit for bit; or the whole step matters, and they are others."""
    policy, reference = random_logps(1), random_logps(2)
    alone = objective(policy.map(lambda x: x[:100]), reference.map(lambda x: x[:100]))
    assert torch.allclose(alone, objective(policy, reference)[:100], rtol=1e-5, atol=1e-6) != objective.whole_step


def test_rewards_are_log_ratios_or_without_a_reference_log_probs_a_token() -> None:
    """Nats: 1 and -2 against the reference; -1.5 and -1.75 a token alone; LD-DPO's rejected one -5.5 + 4 = -1.5. A
    mixture has its first term's, in that term's beta."""
    assert [x.tolist() for x in DPO().scores(POLICY, REFERENCE)] == [[1.0], [-2.0]]
    assert [x.tolist() for x in SimPO().scores(POLICY)] == [[-1.5], [-1.75]]
    assert [x.tolist() for x in LDDPO(alpha=0.5).scores(POLICY, REFERENCE)] == [[1.0], [-1.5]]
    mixture = Mixture(terms=(LDDPO(beta=0.7), SFT()), weights=(1.0, 2.0))
    assert mixture.beta == 0.7
    assert [x.tolist() for x in mixture.scores(POLICY, REFERENCE)] == [[1.0], [-1.5]]


def test_bco_s_threshold_is_beta_times_the_mean_log_ratio_unless_it_is_a_number() -> None:
    """Mean log-ratio 2 nats at beta 0.5: threshold 1, l(0.5 - 1) + l(1 + 1) = 0.974077 + 0.126928. In a mixture too."""
    after = BCO(beta=0.5).with_running_mean(2.0)
    assert after == BCO(beta=0.5, shift=1.0)
    assert after(POLICY, REFERENCE).tolist() == [pytest.approx(1.101005, abs=1e-6)]
    assert BCO(shift=0.3).with_running_mean(2.0) == BCO(shift=0.3)
    assert Mixture().with_running_mean(2.0).terms == (DPO(), BCO(shift=0.2), SFT())
    assert DPO().with_running_mean(2.0) == DPO()


def test_mpo_is_the_mixture_that_needs_no_words() -> None:
    """Its preference, quality and generation losses, 0.8, 0.2 and 1."""
    expected = 0.8 * DPO()(POLICY, REFERENCE) + 0.2 * BCO()(POLICY, REFERENCE) + SFT()(POLICY)
    torch.testing.assert_close(Mixture()(POLICY, REFERENCE), expected)
    for terms, weights in (((), ()), ((DPO(),), (1.0, 2.0))):
        with pytest.raises(ValueError, match="every term has one"):
            Mixture(terms=terms, weights=weights)


def test_ipo_counts_an_empty_answer_as_one_token() -> None:
    """An answer of which nothing is scored has log-prob 0 and may not divide by 0: (0 - 0 - 5)^2."""
    empty = logps([0.0], [0.0], tokens=(0, 0))
    assert IPO()(empty, empty).tolist() == [25.0]


def test_joining_keeps_the_order_and_len_counts_pairs() -> None:
    joined = PairLogps.cat([POLICY, logps([1.0, 2.0], [3.0, 4.0])])
    assert len(joined) == 3
    assert joined.chosen_P.tolist() == [-3.0, 1.0, 2.0]
    assert joined.rejected_P.tolist() == [-7.0, 3.0, 4.0]
    assert joined.chosen_tokens_P.tolist() == [2, 2, 2]


def at(objective: Any, reward_margin: float, share: float) -> tuple[PairLogps, PairLogps]:
    """A pair with that margin of rewards in the metrics, `share` of it won by the chosen answer; 2 and 4 tokens."""

    def moved(nats: float) -> PairLogps:
        return logps([-2000.0 + nats * share], [-4000.0 - nats * (1 - share)])

    reference = moved(0.0)
    scores = (objective.scores(moved(nats), reference) for nats in (0.0, 1.0))
    start, unit = (float(chosen - rejected) for chosen, rejected in scores)
    return moved((reward_margin / objective.beta - start) / (unit - start)), reference


@pytest.mark.parametrize("objective", [one for one in ALL if not isinstance(one, Mixture)], ids=str)
def test_a_loss_that_saturates_is_flat_at_a_margin_of_16_and_no_other_one_is(objective: Any) -> None:
    """By autograd: no log-prob of the pair moves the loss by more than 1e-6 a nat, whichever answer won the margin."""
    steepest = 0.0
    for share in (0.0, 0.5, 1.0):
        policy, reference = at(objective, 16.0, share)
        leaves = [policy.chosen_P.requires_grad_(), policy.rejected_P.requires_grad_()]
        policy = replace(policy, chosen_shared_P=leaves[0] / 2, rejected_shared_P=leaves[1] / 2)
        slopes = torch.autograd.grad(objective(policy, reference).sum(), leaves, materialize_grads=True)
        steepest = max(steepest, *(abs(slope.item()) for slope in slopes))
    assert (steepest < 1e-6) == objective.saturates


@pytest.mark.parametrize("objective", [one for one in ALL if not isinstance(one, Mixture)], ids=str)
def test_margins_are_log_odds_where_the_best_margin_is_the_labels_own(objective: Any) -> None:
    """A pair that a share p of people label one way: the expected loss is least where sigmoid(beta x margin) is p.

    Smoothing is an assumption about the labels and left out; the whole step's losses are of no single pair, and LD-DPO
    that leaves nothing out is DPO.
    """
    if objective.whole_step or objective == LDDPO(alpha=1.0):
        return
    if objective.log_odds and hasattr(objective, "label_smoothing"):
        objective = replace(objective, label_smoothing=0.0)
    rewards = torch.linspace(-4, 4, 1601)
    nats = rewards / objective.beta
    losses = objective(logps(nats / 2 - 3000, -nats / 2 - 3000), logps(0 * nats - 3000, 0 * nats - 3000))
    found = []
    for share in (0.3, 0.7, 0.9):
        expected = share * losses + (1 - share) * losses.flip(0)
        found.append(abs(rewards[expected.argmin()].sigmoid().item() - share) < 0.01)
    assert all(found) == objective.log_odds


def test_a_mixture_s_margins_are_its_first_term_s() -> None:
    for first in (DPO(), IPO(), WPO(), SimPO()):
        mixture = Mixture(terms=(first, SFT()), weights=(1.0, 1.0))
        assert (mixture.saturates, mixture.log_odds) == (first.saturates, first.log_odds)
