"""The state of a training between two steps: optimizer, schedule, and the few numbers that a checkpoint saves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from dpo_studio.config import ReferenceSection, TrainingSection
from dpo_studio.errors import NonFiniteError
from dpo_studio.learning.schedule import learning_rate
from dpo_studio.policy.policy import Policy
from dpo_studio.ranks import ALONE, Ranks

__all__ = ["TrainingState"]

_FIXED = ReferenceSection()


@dataclass
class TrainingState:
    """What changes from step to step besides the adapter's weights."""

    optimizer: torch.optim.Optimizer
    section: TrainingSection
    total_steps: int
    reference: ReferenceSection = _FIXED
    """When the reference moves, and how far."""
    ranks: Ranks = ALONE
    step: int = 0
    mean_log_ratio: float = 0.0
    """Of all answers of a step, averaged over the steps taken, in nats: BCO's threshold depends on it."""
    skipped: int = 0
    """Steps that were not taken because a number in them was not finite."""
    skipped_in_a_row: int = 0
    last: dict[str, float] = field(default_factory=dict)
    """Gradient norm and learning rate of the last step, and the part that a move of the reference truncated."""

    @classmethod
    def fresh(
        cls,
        policy: Policy,
        section: TrainingSection,
        total_steps: int,
        reference: ReferenceSection = _FIXED,
        ranks: Ranks = ALONE,
        learning_rate_ratio: float | None = None,
    ) -> TrainingState:
        """AdamW over what is trained, at step 0; `learning_rate_ratio` is LoRA+'s."""
        optimizer = torch.optim.AdamW(
            [{"params": params, "ratio": ratio} for ratio, params in policy.by_learning_rate(learning_rate_ratio)],
            lr=section.learning_rate,
            betas=section.betas,
            eps=section.eps,
            weight_decay=section.weight_decay,
            fused=True,  # one pass over all parameters; the plain loop took 4 % of a step on two cores
        )
        return cls(optimizer, section, total_steps, reference, ranks)

    def advance(self, policy: Policy) -> None:
        """Clip, set the learning rate, step the optimizer, clear the gradients, step += 1.

        Raises:
            NonFiniteError: the gradient is not finite; weights, averages and step are as they were.
        """
        trained = policy.trained.values()
        self.ranks.sum_gradients(trained)
        norm = nn.utils.clip_grad_norm_(trained, self.section.clip or math.inf).item()
        if self.ranks.any(not math.isfinite(norm)):
            raise NonFiniteError("the gradient is not finite")
        rate = learning_rate(self.section, self.step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["ratio"]
        self.optimizer.step()
        increment_version(list(trained))  # which torch's fused step leaves out; what is derived from them looks at it
        policy.updated()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.skipped_in_a_row = 0
        self.last = {"grad_norm": norm, "learning_rate": rate}

    def skip(self) -> None:
        """Skip a step: weights and averages stay, gradients are cleared, schedule and order of pairs continue."""
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.skipped += 1
        self.skipped_in_a_row += 1
        self.last = {"skipped": 1.0}

    def numbers(self) -> dict[str, float]:
        """The numbers that a checkpoint saves besides the optimizer."""
        return {name: getattr(self, name) for name in _NUMBERS}

    def restore(self, numbers: Mapping[str, object]) -> None:
        """Restore what `numbers` returned; a number missing in an older checkpoint keeps its initial value.

        Raises:
            TypeError, ValueError: a value is not a number.
        """
        for name in _NUMBERS:
            setattr(self, name, type(getattr(self, name))(numbers.get(name, getattr(self, name))))

    def remember(self, log_ratio: float) -> None:
        """Add the mean log-ratio of the last step to the running mean; every step has the same weight."""
        self.mean_log_ratio += (log_ratio - self.mean_log_ratio) / (self.step - self.skipped)

    def move_reference(self, policy: Policy) -> None:
        """Every `update_every` steps, move the reference towards the policy; never by default."""
        every = self.reference.update_every
        if every is not None and self.step % every == 0:
            self.last["reference/cut"] = policy.move_reference(self.reference.update_share)

    def is_finite(self, policy: Policy) -> bool:
        """Whether the trained weights and the averages of their gradients are finite: one norm for all of them."""
        kept = [p.detach() for p in policy.trained.values()]
        kept += [x for known in self.optimizer.state.values() for x in known.values() if isinstance(x, Tensor)]
        return bool(torch.isfinite(nn.utils.get_total_norm(kept, norm_type=math.inf)))

    def seed_dropout(self, micro_batch: int) -> None:
        """Dropout masks come from (seed, step, micro-batch): nothing to restore on a resume.

        `micro_batch` is this process's n-th; no two processes have the same masks.
        """
        number = micro_batch * self.ranks.size + self.ranks.rank
        words = np.random.SeedSequence([self.section.seed, self.step, number]).generate_state(2)
        torch.manual_seed(int(words[0]) << 31 ^ int(words[1]))


_NUMBERS = ("step", "mean_log_ratio", "skipped", "skipped_in_a_row")
