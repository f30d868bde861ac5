"""A reference that moves: against dense weights mixed by hand in double precision, and a loop that shares no code."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import logsigmoid

from dpo_studio.config import AdapterSection, ReferenceSection, TrainingSection
from dpo_studio.learning.logprobs import pair_logps
from dpo_studio.learning.state import TrainingState
from dpo_studio.learning.train import StepReport, train
from dpo_studio.models.adapters import REFERENCE, adapter_state, as_reference, attach, attach_existing, save_adapter
from dpo_studio.models.attention import PAIRS
from dpo_studio.objectives import DPO, PairLogps
from dpo_studio.policy.moving_reference import RANKS_KEPT, _truncated, move_reference, put_reference, reference_state
from dpo_studio.policy.policy import Policy
from dpo_studio.tokens.pack import MicroBatch, Steps, pack
from tests.pairs_of_ids import random_pairs
from tests.policies import moved, plain_peft_on, policy_on
from tests.textbook import plain_logps
from tests.tiny_models import tiny_model
from tests.tiny_runs import dpo, write_recipe

SIX = random_pairs(6)
TWENTY = random_pairs(20, prompt=(2, 8), answer=(1, 8))
SECTION = TrainingSection(pairs_per_step=4, learning_rate=5e-3, warmup=0, schedule="constant", seed=3)
Dense = dict[str, Tensor]
"""Weights of the adapted layers, by the plain model's names, in double precision."""


def policy(**changes: Any) -> Any:
    return policy_on(attn_implementation=PAIRS, **changes)


def live_steps(model: Any, reference: ReferenceSection, steps: int) -> Iterator[StepReport]:
    """Our loop as `dpo train` runs it with a live reference."""

    def live(batches: Sequence[MicroBatch]) -> list[PairLogps]:
        with as_reference(model):
            return [pair_logps(model, batch) for batch in batches]

    state = TrainingState.fresh(Policy(model), SECTION, steps, reference)
    return train(Policy(model), Steps(TWENTY, 4, 100, SECTION.seed, 1, steps), DPO(), state, live)


def dense(model: Any, adapter: str) -> Dense:
    """W + scale * B A as the textbook has it, W alone where the layer has no such adapter."""
    weights = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            weight = module.base_layer.weight.detach().double()
            if adapter in module.lora_A:
                a, b = (factor[adapter].weight.detach().double() for factor in (module.lora_A, module.lora_B))
                weight = weight + module.scaling[adapter] * b @ a
            weights[name.removeprefix("base_model.model.")] = weight
    return weights


def mixed(one: Dense, other: Dense, share: float) -> Dense:
    return {name: share * one[name] + (1 - share) * other[name] for name in one}


def apart(one: Dense, other: Dense) -> float:
    """The largest relative difference of two models' updates of the base, layer by layer."""
    base = {name: p.detach().double() for name, p in tiny_model().named_parameters()}
    changes = [(one[name] - other[name], other[name] - base[f"{name}.weight"]) for name in one]
    return max(float(error.norm() / change.norm()) for error, change in changes)


def reference_logps(model: Any) -> Tensor:
    with torch.no_grad(), as_reference(model):
        logps = pair_logps(model, pack(SIX))
    return torch.stack([logps.chosen_P, logps.rejected_P], 1)


@torch.no_grad()
def dense_logps(weights: Dense) -> Tensor:
    """Of the plain model with these weights, in double precision."""
    model = tiny_model().double()
    model.load_state_dict({f"{name}.weight": weight for name, weight in weights.items()}, strict=False)
    return plain_logps(model, SIX)


@pytest.mark.parametrize("share", [0.6, 0.1])
def test_soft_updates_mix_the_weights_and_not_the_factors(share: float) -> None:
    """Six steps of training, an update after each second one: three in all, ranks 4, 8 and 12, each of them exact."""
    model, expected = policy(size=0), dense(policy(size=0), REFERENCE)
    reference = ReferenceSection(update_every=2, update_share=share)
    for report in live_steps(model, reference, 6):
        if report.step % 2 == 0:
            expected = mixed(dense(model, "default"), expected, share)
            assert report.metrics["reference/cut"] == 0
        else:
            assert "reference/cut" not in report.metrics
    assert apart(dense(model, REFERENCE), expected) < 1e-6
    assert {len(p) for name, p in reference_state(model).items() if "lora_A" in name} == {4 * 3}
    torch.testing.assert_close(reference_logps(model), dense_logps(expected), rtol=1e-5, atol=0)
    assert (reference_logps(model) - plain_logps(tiny_model(), SIX)).abs().max() > 0.05


def test_a_hard_update_starts_the_next_step_at_ln_2() -> None:
    """Updates after steps 3 and 6: steps 4 and 7 begin at a margin of 0 to the bit, whatever their pairs; no other
    does but the first, and the ranks do not grow."""
    model = policy(size=0)
    reports = {report.step: report.metrics for report in live_steps(model, ReferenceSection(update_every=3), 7)}
    assert {step for step, metrics in reports.items() if metrics["rewards/margins"] == 0} == {1, 4, 7}
    assert all(reports[step]["loss"] == pytest.approx(math.log(2), abs=1e-6) for step in (1, 4, 7))
    assert all(abs(reports[step]["rewards/margins"]) > 1e-3 for step in (2, 3, 5, 6))
    assert {len(p) for name, p in reference_state(model).items() if "lora_A" in name} == {4}


def by_hand(share: float, every: int, steps: int) -> Iterator[float]:
    """TR-DPO as one would write it down: PEFT's own layers, a second dense model, torch's AdamW, no packing."""
    model, reference = plain_peft_on(size=0), tiny_model().double()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3, weight_decay=0)
    plan = Steps(TWENTY, 4, 100, SECTION.seed, 1, steps)
    for step in range(1, steps + 1):
        pairs = [TWENTY[place] for place in plan.pairs_of(step)]
        with torch.no_grad():
            known_P2 = plain_logps(reference, pairs)
        ratios_P2 = plain_logps(model, pairs) - known_P2
        loss = -logsigmoid(0.1 * (ratios_P2[:, 0] - ratios_P2[:, 1])).mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % every == 0:
            for name, weight in dense(model, "default").items():
                p = reference.get_parameter(f"{name}.weight")
                p.data = share * weight + (1 - share) * p.data
        yield loss.item()


def test_twenty_steps_are_those_of_a_loop_written_by_hand() -> None:
    """TRL refuses to move a PEFT policy's reference, so the oracle is written out above. Updates after 4, 8, 12 and 16
    steps fill the reference's ranks and cut nothing. 1e-5, and the reference is felt: without it the losses differ."""
    every_four, never = ReferenceSection(update_every=4, update_share=0.6), ReferenceSection(mode="live")
    moving, fixed = (
        [report.metrics["loss"] for report in live_steps(policy(size=0), reference, 20)]
        for reference in (every_four, never)
    )
    assert moving == pytest.approx(list(by_hand(0.6, 4, 20)), abs=1e-5)
    assert moving[:4] == fixed[:4]
    assert abs(moving[-1] - fixed[-1]) > 0.05


def test_what_is_cut_off_is_the_least_that_can_be() -> None:
    """Eckart and Young: the singular values left over, by an SVD of the dense product in double precision."""
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(20, 24, generator=draw), torch.randn(40, 20, generator=draw)
    sizes = torch.linalg.svdvals((b @ a).double())
    short_a, short_b, cut = _truncated(a, b, 16)
    assert (short_a.shape, short_b.shape) == ((16, 24), (40, 16))
    assert cut == pytest.approx((sizes[16:].norm() / sizes.norm()).item(), rel=1e-5)
    assert ((short_b @ short_a - b @ a).norm() / (b @ a).norm()).item() == pytest.approx(cut, rel=1e-5)
    assert _truncated(a, b.zero_(), 16)[2] == 0


def test_a_stack_wider_than_its_layer_loses_nothing() -> None:
    """Rank 20 through an 8-wide layer: the product has rank 8 at most."""
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(20, 8, generator=draw), torch.randn(40, 20, generator=draw)
    short_a, short_b, cut = _truncated(a, b, 16)
    assert cut == 0
    torch.testing.assert_close(short_b @ short_a, b @ a, rtol=1e-5, atol=1e-5)


def test_over_a_whole_training_the_cuts_stay_small_and_within_their_bound() -> None:
    """An update every step, 24 in all, 20 of them cut to rank 16 of 24. What was cut off earlier counts half as much
    after each update: 1 + 1/2 + 1/4 + ... = 2 = 1 / share of the worst. Measured at share 0.5: 2e-5."""
    model, exact, worst = policy(size=0), dense(policy(size=0), REFERENCE), 0.0
    for report in live_steps(model, ReferenceSection(update_every=1, update_share=0.5), 24):
        exact = mixed(dense(model, "default"), exact, 0.5)
        worst = max(worst, report.metrics["reference/cut"])
        assert apart(dense(model, REFERENCE), exact) <= worst / 0.5 + 1e-6
    assert {len(p) for name, p in reference_state(model).items() if "lora_A" in name} == {RANKS_KEPT * 4}
    assert 1e-6 < worst < 1e-4


def test_policies_with_nothing_in_common_are_the_worst_case() -> None:
    """A and B drawn anew before each of twelve updates, all of a size: unlike in training every rank is needed. At
    share 0.6 the fifth newest policy still weighs 0.4^4 = 2.6 % of the newest, and that is what goes."""
    model, exact = policy(), dense(policy(), REFERENCE)
    cuts = []
    for seed in range(12):
        draw = torch.Generator().manual_seed(seed)
        for p in adapter_state(model).values():
            p.data = torch.randn(p.shape, generator=draw)
        exact = mixed(dense(model, "default"), exact, 0.6)
        cuts.append(move_reference(model, 0.6))
        assert apart(dense(model, REFERENCE), exact) <= max(cuts) / 0.6 + 1e-6
    assert cuts[:4] == [0, 0, 0, 0]
    assert max(cuts) < 0.026


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_the_starting_reference_may_be_an_adapter_of_another_shape(tmp_path: Path, share: float) -> None:
    """Rank 3, alpha 5 on two kinds of layer, one of which the policy does not adapt; the policy has rank 4, alpha 8."""
    start = attach(tiny_model(), AdapterSection(rank=3, alpha=5, targets=["q_proj", "up_proj"]), seed=1)
    save_adapter(moved(start, seed=1), tmp_path, base="b")
    base = tiny_model(attn_implementation=PAIRS).requires_grad_(False)
    model = moved(attach(base, AdapterSection(rank=4, alpha=8, targets=["q_proj", "k_proj"]), seed=0))
    model = attach_existing(model, tmp_path, trainable=False, name=REFERENCE).eval()
    expected = mixed(dense(model, "default"), dense(model, REFERENCE), share)
    assert move_reference(model, share) == 0
    torch.testing.assert_close(reference_logps(model), dense_logps(expected), rtol=1e-5, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(plain_logps(model, SIX), dense_logps(dense(model, "default")), rtol=1e-5, atol=0)


def test_what_is_saved_and_put_back_is_the_reference_to_the_bit(tmp_path: Path) -> None:
    """Also onto a policy that never moved one; what is trained and saved stays what it was."""
    model = policy()
    assert reference_state(model) == {}
    names = list(adapter_state(model))
    save_adapter(model, tmp_path / "before", base="b")
    move_reference(model, 0.6)
    move_reference(moved(model, seed=1), 0.6)
    fresh = policy()
    put_reference(fresh, reference_state(model))
    assert torch.equal(reference_logps(fresh), reference_logps(model))
    assert (move_reference(fresh, 0.6), move_reference(policy(), 0.6)) == (0, 0)
    assert list(adapter_state(fresh)) == names
    save_adapter(fresh, tmp_path / "after", base="b")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "after" / name).read_bytes() == (tmp_path / "before" / name).read_bytes()


def test_held_out_pairs_are_measured_against_where_the_reference_began(tiny_base: Path, tmp_path: Path) -> None:
    """Four steps, hard updates after 1, 2, 3 and 4. Training rewards start anew at 0 each time; held-out rewards do
    not, and are those of the log-probs against step 0's, which were the reference's own. `live` goes without saying."""
    recipe = write_recipe(tmp_path / "r.yaml", tiny_base, reference={"update_every": 1})
    said = dpo("train", recipe)
    assert said.code == 0, said.err
    run = tmp_path / "run"
    start, *steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["rewards/margins"] for line in steps] == [0, 0, 0, 0]
    for line in (steps[1], steps[3]):
        for side in ("chosen", "rejected"):
            reward = 0.1 * (line[f"eval_logps/{side}"] - start[f"eval_logps/{side}"])
            assert line[f"eval_rewards/{side}"] == pytest.approx(reward, rel=1e-4)
        assert abs(line["eval_rewards/margins"]) > 1e-3
    assert json.loads((run / "result.json").read_text())["held_out_loss"] == steps[3]["eval_loss"]
    held = load_file(run / "checkpoints/step-4/reference.safetensors")
    own = load_file(run / "adapter/adapter_model.safetensors")
    assert {name.replace(f".{REFERENCE}.", "."): p.tolist() for name, p in held.items()} == {
        name: p.tolist() for name, p in own.items()
    }
    assert "mode: live" in (run / "recipe.yaml").read_text()


def test_a_reference_that_would_never_move_is_told_of(tiny_base: Path, tmp_path: Path) -> None:
    said = dpo("train", write_recipe(tmp_path / "r.yaml", tiny_base, reference={"update_every": 4}))
    assert "reference.update_every is 4, and the run has 4 steps: the reference never moves" in said.err
