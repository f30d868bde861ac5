"""Law 5: twenty steps of our loop are twenty steps of TRL's DPOTrainer on the same ids in the same order.

TRL pads, runs every sequence whole, asks the reference in the step and leaves optimizer, schedule and clipping to
transformers' Trainer. We pack, share prompts, and do the rest ourselves. Nothing but the start is common.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from trl import DPOConfig, DPOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

from dpo_studio.config import TrainingSection
from dpo_studio.models.attention import PAIRS
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
    TRL_NAMES,
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
)
from dpo_studio.tokens.encode import EncodedPair
from dpo_studio.tokens.pack import Steps
from tests.pairs_of_ids import random_pairs
from tests.policies import plain_peft_on, policy_on, take_steps
from tests.tiny_tokenizers import tiny_tokenizer

STEPS = 20
TRAINED_ON = random_pairs(30, prompt=(2, 12), answer=(1, 16))
"""Thirty pairs in steps of five: six steps an epoch, and twenty steps end in the fourth."""


class AsGiven(DPOTrainer):  # type: ignore[misc]
    """TRL, its hands off the ids."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset


def trl_steps(
    rows: Sequence[EncodedPair], section: TrainingSection, folder: Path, steps: int, **settings: Any
) -> list[dict[str, float]]:
    """What TRL logs at each of `steps` steps over `rows`, from the start that `policy_on(size=0)` has."""
    dataset = Dataset.from_list(
        [
            {
                "prompt_ids": pair.prompt.tolist(),
                "chosen_ids": pair.chosen.ids.tolist(),
                "rejected_ids": pair.rejected.ids.tolist(),
            }
            for pair in rows
        ]
    )
    config = DPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=section.pairs_per_step,
        train_sampling_strategy="sequential",
        max_steps=steps,
        learning_rate=section.learning_rate,
        weight_decay=section.weight_decay,
        warmup_steps=int(section.warmup),
        max_grad_norm=section.clip or 0.0,
        logging_steps=1,
        logging_strategy="steps",
        report_to="none",
        save_strategy="no",
        bf16=False,
        activation_checkpointing=False,
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        **({"lr_scheduler_type": section.schedule} | settings),
    )
    trainer = AsGiven(
        model=plain_peft_on(size=0),
        args=config,
        train_dataset=dataset,
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line]


def our_steps(section: TrainingSection, objective: Any, steps: int) -> list[dict[str, float]]:
    """What our loop reports at each of `steps` steps, in micro-batches of at most 100 tokens."""
    policy = policy_on(size=0, attn_implementation=PAIRS)
    return [report.metrics for report in take_steps(policy, TRAINED_ON, section, objective, steps=steps)]


def in_our_order(section: TrainingSection, steps: int) -> list[EncodedPair]:
    """The rows as the steps take them."""
    plan = Steps(TRAINED_ON, section.pairs_per_step, 100, section.seed, 1, steps)
    return [TRAINED_ON[place] for step in range(1, steps + 1) for place in plan.pairs_of(step)]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_twenty_steps_are_trl_s_loss_by_loss(schedule: Any, tmp_path: Path) -> None:
    """1e-5 in losses and rewards (law 5 asks for 1e-4; 4e-7 was measured), at a rate that moves the loss by more than
    0.1 from ln 2: at one that does not, any two programs agree. TRL counts a tie as 0, we as one half, so accuracies
    are compared from step 3 on: the first update has rate 0, and two steps see the start."""
    section = TrainingSection(pairs_per_step=5, learning_rate=3e-3, schedule=schedule, warmup=3, seed=7)
    theirs = trl_steps(in_our_order(section, STEPS), section, tmp_path, STEPS)
    ours = our_steps(section, DPO(beta=0.1), STEPS)
    assert len(ours) == len(theirs) == STEPS
    assert ours[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert min(line["loss"] for line in ours) < math.log(2) - 0.1
    for our, their in zip(ours, theirs, strict=True):
        for name in ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins"):
            assert our[name] == pytest.approx(their[name], abs=1e-5), name
        for name in ("logps/chosen", "logps/rejected", "grad_norm"):
            assert our[name] == pytest.approx(their[name], rel=1e-5), name
        assert our["learning_rate"] == pytest.approx(their["learning_rate"], rel=1e-12)
    for our, their in zip(ours[2:], theirs[2:], strict=True):
        assert our["rewards/accuracies"] == pytest.approx(their["rewards/accuracies"], abs=1e-6)


@pytest.mark.parametrize(
    ("objective", "settings"),
    [
        (IPO(beta=0.3), {"loss_type": "ipo"}),
        (Hinge(beta=0.3), {"loss_type": "hinge"}),
        (EXO(beta=0.3), {"loss_type": "exo_pair", "label_smoothing": 1e-3}),
        (NCA(beta=0.3), {"loss_type": "nca_pair"}),
        (Robust(beta=0.3, label_smoothing=0.2), {"loss_type": "robust", "label_smoothing": 0.2}),
        (BCO(beta=0.3, shift=0.0), {"loss_type": "bco_pair"}),
        (SPPO(beta=0.3), {"loss_type": "sppo_hard"}),
        (AOT(beta=0.3), {"loss_type": "aot"}),
        (AOT(beta=0.3, label_smoothing=0.2), {"loss_type": "aot", "label_smoothing": 0.2}),
        (AOTUnpaired(beta=0.3, label_smoothing=0.2), {"loss_type": "aot_unpaired", "label_smoothing": 0.2}),
        (APOZero(beta=0.3), {"loss_type": "apo_zero"}),
        (APODown(beta=0.3), {"loss_type": "apo_down"}),
        (DiscoPOP(beta=0.3), {"loss_type": "discopop"}),
        (SFT(average="token"), {"loss_type": "sft"}),
        (DPONorm(beta=3.0), {"loss_type": "sigmoid_norm", "beta": 3.0}),
        (LDDPO(beta=0.3, alpha=0.3), {"ld_alpha": 0.3}),
        (WPO(beta=0.3), {"use_weighting": True}),
        (FDPO(beta=0.3, divergence="forward_kl"), {"f_divergence_type": "forward_kl"}),
        (FDPO(beta=0.3, divergence="js"), {"f_divergence_type": "js_divergence"}),
        (
            FDPO(beta=0.3, divergence="alpha", alpha=0.4),
            {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.4},
        ),
        (
            Mixture(terms=(DPO(beta=0.3), BCO(beta=0.3, shift=0.0), SFT(average="token")), weights=(0.8, 0.2, 1.0)),
            {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
        ),
        (
            Mixture(terms=(Hinge(beta=0.3), AOT(beta=0.3)), weights=(0.5, 2.0)),
            {"loss_type": ["hinge", "aot"], "loss_weights": [0.5, 2.0]},
        ),
    ],
    ids=str,
)
def test_the_other_objectives_take_trl_s_steps_too(objective: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    """Eight steps, weight decay on, gradients clipped hard; AOT sorts over the whole step, which we take in several
    micro-batches and TRL in one. Measured over all of them: 1e-5 relative in the losses (DiscoPOP; the others 3e-6) and
    2e-5 in the gradients' norms. WPO's losses are a thousandth: random weights write no such answers."""
    section = TrainingSection(
        pairs_per_step=6, learning_rate=5e-3, schedule="constant", warmup=1, seed=1, clip=0.1, weight_decay=0.1
    )
    theirs = trl_steps(
        in_our_order(section, 8),
        section,
        tmp_path,
        8,
        lr_scheduler_type="constant_with_warmup",
        **({"beta": 0.3} | settings),
    )
    ours = our_steps(section, objective, 8)
    losses = [line["loss"] for line in ours]
    largest = max(map(abs, losses))
    assert max(losses) - min(losses) > 0.1 * largest
    assert losses == pytest.approx([line["loss"] for line in theirs], rel=1e-5, abs=2e-5 * largest)
    norms = [line["grad_norm"] for line in theirs]
    assert [line["grad_norm"] for line in ours] == pytest.approx(norms, rel=1e-4, abs=1e-6)
    for name in ("rewards/chosen", "rewards/rejected") if objective.needs_reference else ():
        assert [line[name] for line in ours] == pytest.approx([line[name] for line in theirs], rel=1e-5, abs=3e-5)


def test_every_loss_type_of_trl_s_dpo_is_among_them_or_hinted_at() -> None:
    """Its own message lists what it takes; what we call otherwise, a recipe's error translates."""
    source = inspect.getsource(DPOTrainer._compute_loss)
    named = set(re.findall(r'loss_type == "(\w+)"', source))
    assert len(named) == 15
    assert {TRL_NAMES.get(name, name) for name in named} <= {kind.kind for kind in OBJECTIVES}


def without_a_reference() -> tuple[PairLogps, Tensor, Tensor]:
    """Fifty pairs' sums, and their log-probs a token, which is what TRL's CPO and ORPO losses are given."""
    draw = torch.Generator().manual_seed(0)
    means_2P = -0.05 - 3 * torch.rand(2, 50, generator=draw)
    tokens_2P = torch.randint(1, 40, (2, 50), generator=draw)
    return PairLogps(*(means_2P * tokens_2P), *tokens_2P), *means_2P


def test_simpo_is_trl_s() -> None:
    """The loss and the rewards of its experimental CPOTrainer, called without the trainer around it."""
    policy, chosen_P, rejected_P = without_a_reference()
    settings = {"alpha": 0.0, "beta": 2.5, "simpo_gamma": 0.7, "loss_type": "simpo", "label_smoothing": 0.0}
    trainer = SimpleNamespace(accelerator=SimpleNamespace(device="cpu"), **settings)
    losses, chosen_rewards, rejected_rewards = CPOTrainer.cpo_loss(trainer, chosen_P, rejected_P)
    ours = SimPO(beta=2.5, gamma=0.7)
    torch.testing.assert_close(ours(policy), losses, rtol=1e-5, atol=1e-6)
    for score_P, reward_P in zip(ours.scores(policy), (chosen_rewards, rejected_rewards), strict=True):
        torch.testing.assert_close(2.5 * score_P, reward_P)


def test_orpo_s_odds_ratio_is_trl_s() -> None:
    """Of its experimental ORPOTrainer, which gives beta x log-sigmoid and subtracts it from the likelihood's loss."""
    policy, chosen_P, rejected_P = without_a_reference()
    trainer = SimpleNamespace(accelerator=SimpleNamespace(device="cpu"), beta=0.4)
    theirs, chosen_rewards, *_ = ORPOTrainer.odds_ratio_loss(trainer, chosen_P, rejected_P)
    ours = ORPO(beta=0.4)
    torch.testing.assert_close(ours(policy), -chosen_P - theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(0.4 * ours.scores(policy)[0], chosen_rewards)
