"""The learning rate of every step, a function of its number alone."""

from __future__ import annotations

import math

from dpo_studio.config import TrainingSection

__all__ = ["learning_rate", "warmup_steps"]


def warmup_steps(section: TrainingSection, total_steps: int) -> int:
    """How many updates `training.warmup`, a share or a number of steps, is of the whole run's."""
    share = math.ceil(round(section.warmup * total_steps, 6))  # 0.07 x 100 is 7.000000000000001 to a float
    return share if section.warmup < 1 else int(section.warmup)


def learning_rate(section: TrainingSection, step: int, total_steps: int) -> float:
    """The rate of the update after `step` updates: linear warm-up from 0, then as `schedule` says, down to 0.

    The same numbers as transformers' `get_scheduler`, as a function of the step alone.
    """
    warmup = warmup_steps(section, total_steps)
    if step < warmup:
        return section.learning_rate * step / warmup
    done = (step - warmup) / max(1, total_steps - warmup)
    shape = {
        "constant": 1.0,
        "linear": max(0.0, 1 - done),
        "cosine": max(0.0, 0.5 * (1 + math.cos(math.pi * done))),
    }
    return section.learning_rate * shape[section.schedule]
