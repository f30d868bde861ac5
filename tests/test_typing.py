"""What mypy sees of an objective, from outside: `make check` holds to the types, the test to the values."""

from __future__ import annotations

from typing import assert_type

import torch
from torch import Tensor

from dpo_studio.config import Recipe, RecipeFile, load_recipe
from dpo_studio.objectives import DPO, Formula, Mixture, PairLogps, known_objectives, to_objective


def use(recipe: Recipe, policy: PairLogps, reference: PairLogps | None) -> Tensor:
    """The loss of a recipe's objective, as a training loop calls it."""
    objective = assert_type(recipe.objective, Formula)
    assert_type(objective.kind, str)
    assert_type(objective.beta, float)
    assert_type(objective.needs_reference, bool)
    assert_type(objective.whole_step, bool)
    assert_type(objective.scores(policy, reference), tuple[Tensor, Tensor])
    assert_type(objective.with_running_mean(0.5), Formula)
    return assert_type(objective(policy, reference), Tensor)


def test_the_types_of_an_objective_are_its_values() -> None:
    """Policy and reference agree: every loss is ln 2 = 0.693147."""
    loaded = assert_type(load_recipe({"model": {"path": "m"}, "data": {"train": {"source": "d"}}}), RecipeFile)
    logps = PairLogps(torch.tensor([-3.0]), torch.tensor([-4.0]), torch.tensor([2]), torch.tensor([2]))
    torch.testing.assert_close(use(loaded.recipe, logps, logps), torch.tensor([0.693147]))
    assert_type(known_objectives(), tuple[type[Formula], ...])
    assert assert_type(to_objective({"kind": "mixture"}), Formula) == Mixture()
    assert assert_type(DPO().with_running_mean(0.5), DPO) == DPO()
