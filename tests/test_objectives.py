"""Losses worked by hand, and the same formulas in float64 NumPy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dpo_studio.objectives import AOT, DPO, IPO, Hinge, PairLogps, margin

ALL: list[Any] = [DPO(), DPO(beta=0.5, label_smoothing=0.1), IPO(), Hinge(), AOT(), AOT(beta=0.5, label_smoothing=0.1)]


def logps(chosen: Any, rejected: Any, tokens: tuple[int, int] = (2, 4)) -> PairLogps:
    chosen_P, rejected_P = torch.as_tensor(chosen, dtype=torch.float32), torch.as_tensor(rejected, dtype=torch.float32)
    counts = (torch.full(chosen_P.shape, count) for count in tokens)
    return PairLogps(chosen_P, rejected_P, *counts)


POLICY, REFERENCE = logps([-3.0], [-7.0]), logps([-4.0], [-5.0])
"""The chosen answer gained 1 nat, the rejected one lost 2: a margin of 3 nats."""


@pytest.mark.parametrize(
    ("objective", "loss"),
    [
        (DPO(beta=0.5), 0.201413),
        (DPO(beta=0.5, label_smoothing=0.1), 0.351413),
        (IPO(beta=0.25), 1.0),
        (Hinge(beta=0.1), 0.7),
        (Hinge(beta=0.5), 0.0),
    ],
    ids=str,
)
def test_a_pair_by_hand(objective: Any, loss: float) -> None:
    """Log-ratios 1 and -2, margin 3.

    DPO, beta 0.5: reward margin 1.5, ln(1 + e^-1.5) = ln 1.223130 = 0.201413.
    With smoothing 0.1: 0.9 x 0.201413 + 0.1 x (0.201413 + 1.5) = 0.351413.
    IPO, beta 0.25, 2 and 4 tokens: 1/2 - (-2/4) = 1 a token, the target is 1/(2 x 0.25) = 2, (1 - 2)^2 = 1.
    Hinge: 1 - 0.1 x 3 = 0.7; 1 - 0.5 x 3 < 0, so 0.
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
    """Policy = reference: ln 2 whatever beta and smoothing (law 1); IPO (1/(2 x 0.1))^2 = 25; hinge 1."""
    start = {DPO: math.log(2), AOT: math.log(2), IPO: 25.0, Hinge: 1.0}[type(objective)]
    losses = objective(logps([-3.0, -90.0], [-7.0, -1.0]), logps([-3.0, -90.0], [-7.0, -1.0]))
    assert losses.tolist() == pytest.approx([start, start], rel=1e-6)


def swap(sides: PairLogps) -> PairLogps:
    return PairLogps(sides.rejected_P, sides.chosen_P, sides.rejected_tokens_P, sides.chosen_tokens_P)


def test_swapping_the_answers_negates_the_margin() -> None:
    """Law 1. Margin 3, and -3 when swapped; DPO's loss grows by beta x 3 exactly, for ln(1+e^m) - ln(1+e^-m) = m."""
    assert margin(swap(POLICY), swap(REFERENCE)).tolist() == [-3.0]
    there, back = DPO(beta=0.5)(POLICY, REFERENCE), DPO(beta=0.5)(swap(POLICY), swap(REFERENCE))
    assert (back - there).item() == pytest.approx(1.5, abs=1e-6)


def exact(objective: Any, policy: PairLogps, reference: PairLogps) -> np.ndarray[Any, Any]:
    """The losses in float64, from the papers' formulas."""
    pc, pr, rc, rr = (
        x.double().numpy() for x in (policy.chosen_P, policy.rejected_P, reference.chosen_P, reference.rejected_P)
    )
    beta, smoothing = objective.beta, getattr(objective, "label_smoothing", 0.0)
    if isinstance(objective, IPO):
        c, r = policy.chosen_tokens_P.numpy(), policy.rejected_tokens_P.numpy()
        return np.asarray(((pc - rc) / c - (pr - rr) / r - 1 / (2 * beta)) ** 2)
    h = np.sort(pc - pr) - np.sort(rc - rr) if isinstance(objective, AOT) else (pc - rc) - (pr - rr)
    if isinstance(objective, Hinge):
        return np.asarray(np.maximum(0, 1 - beta * h))
    return np.asarray((1 - smoothing) * np.logaddexp(0, -beta * h) + smoothing * np.logaddexp(0, beta * h))


def random_logps(seed: int, count: int = 200) -> PairLogps:
    draw = np.random.default_rng(seed)
    chosen, rejected = draw.uniform(-80, 0, (2, count))
    tokens = torch.from_numpy(draw.integers(1, 50, (2, count)))
    return PairLogps(torch.tensor(chosen).float(), torch.tensor(rejected).float(), *tokens)


@pytest.mark.parametrize("objective", ALL, ids=str)
def test_the_formula_in_float64(objective: Any) -> None:
    policy, reference = random_logps(1), random_logps(2)
    np.testing.assert_allclose(
        objective(policy, reference).numpy(), exact(objective, policy, reference), rtol=1e-4, atol=1e-4
    )


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
    chosen = torch.tensor([nats], requires_grad=True)
    losses = objective(PairLogps(chosen, *(torch.tensor([x]) for x in (0.0, 1, 1))), logps([0.0], [0.0]))
    (slope,) = torch.autograd.grad(losses.sum(), chosen)
    assert torch.isfinite(losses).all()
    assert torch.isfinite(slope).all()


@pytest.mark.parametrize("objective", ALL, ids=str)
def test_the_order_of_a_step_s_pairs_means_nothing(objective: Any) -> None:
    """The step's loss is the same, and every pair keeps its own gradient; AOT's ranks go along with the pairs."""
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    policy, reference = random_logps(1), random_logps(2)

    def step(policy: PairLogps, reference: PairLogps) -> tuple[Tensor, Tensor]:
        chosen = policy.chosen_P.clone().requires_grad_()
        sides = PairLogps(chosen, policy.rejected_P, policy.chosen_tokens_P, policy.rejected_tokens_P)
        loss = objective(sides, reference).mean()
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


def test_only_aot_needs_the_whole_step() -> None:
    assert [type(objective).__name__ for objective in ALL if objective.whole_step] == ["AOT", "AOT"]
    assert all(objective.needs_reference for objective in ALL)


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
