"""What is added at run time: an objective, a data format, a judge; and what is refused, with a reason."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor

from dpo_studio.config import add_objective
from dpo_studio.errors import UsageError
from dpo_studio.evaluation.judges import add_judge, added_judge, longer_wins
from dpo_studio.objectives import AOT, DPO, LDDPO, Formula, PairLogps, Positive, known_objectives
from dpo_studio.preferences.formats import add_format
from dpo_studio.preferences.pair import Pair

LOSS = """
from __future__ import annotations
import json
from dataclasses import dataclass
from typing import Annotated, Literal
from pydantic import Field
from torch import Tensor
from dpo_studio.config import add_objective, load_recipe, recipe_schema
from dpo_studio.errors import RecipeError
from dpo_studio.objectives import Formula, PairLogps, Positive, margin, objectives_help

BASE = {"model": {"path": "m"}, "data": {"train": {"source": "d"}}}
assert load_recipe(BASE).recipe.objective.kind == "dpo"  # the recipe was made before the loss was added

@dataclass(frozen=True)
class Cubed(Formula):
    kind: Literal["cubed"] = "cubed"
    beta: Positive = 0.5
    power: Annotated[int, Field(gt=0)] = 3

    def __call__(self, policy: PairLogps, reference: PairLogps | None) -> Tensor:
        return (1 - self.beta * margin(policy, reference)) ** self.power

add_objective(Cubed)
add_objective(Cubed)  # the same once more changes nothing
read = load_recipe(BASE | {"objective": {"kind": "cubed", "power": 5}}).recipe
assert read.objective == Cubed(power=5), read.objective
assert load_recipe(read).recipe == read
mixed = {"kind": "mixture", "terms": [{"kind": "cubed"}, {"kind": "sft"}], "weights": [1.0, 0.5]}
assert load_recipe(BASE | {"objective": mixed}).recipe.objective.terms[0] == Cubed()
assert "Cubed" in recipe_schema()["$defs"] and objectives_help().endswith("mixture, cubed")
for section, says in (({"kind": "cubed", "powr": 1}, "objective.power"), ({"kind": "cubd"}, "mixture, cubed")):
    try:
        load_recipe(BASE | {"objective": section})
    except RecipeError as error:
        assert says in str(error), error
    else:
        raise AssertionError(section)
try:
    load_recipe(BASE | {"objective": {"kind": "cubed", "power": 0}})
except RecipeError as error:
    assert "objective.power: " in str(error), error
"""


def test_a_loss_of_one_file_is_in_the_recipe_the_mixture_the_schema_and_the_hints() -> None:
    """In a process of its own, which may be changed."""
    done = subprocess.run([sys.executable, "-c", LOSS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@dataclass(frozen=True)
class Taken(DPO):
    """Another loss by the name of ours."""


@dataclass(frozen=True)
class Unnamed(Formula):
    """Nothing in a recipe could mean it."""

    beta: Positive = 0.1

    def __call__(self, policy: PairLogps, reference: PairLogps | None) -> Tensor:
        return policy.chosen_P


@dataclass(frozen=True)
class Badly(Unnamed):
    """Its name is none."""

    kind: Literal["My Loss"] = "My Loss"


@dataclass(frozen=True)
class NoDefault(Formula):
    """A recipe that says nothing of it could not be made."""

    power: float
    beta: ClassVar[float] = 0.1
    kind: Literal["no_default"] = "no_default"

    def __call__(self, policy: PairLogps, reference: PairLogps | None) -> Tensor:
        return policy.chosen_P


@dataclass(frozen=True)
class NoLoss(Formula):
    """A kind and no formula."""

    kind: Literal["no_loss"] = "no_loss"


class NoDataclass(Unnamed):
    """A class whose parameters nobody can set."""

    kind = "no_dataclass"


@pytest.mark.parametrize(
    ("formula", "says"),
    [
        (Taken, "'dpo' is already registered: dpo_studio.objectives.margins.DPO"),
        (Unnamed, "has no kind"),
        (Badly, "'My Loss' is not a name"),
        (NoDefault, "have defaults"),
        (NoLoss, "does not define __call__, beta"),
        (NoDataclass, "is not a dataclass"),
        (int, "is not an objective"),
        (DPO(), "is not an objective"),
    ],
)
def test_what_is_no_objective_is_refused_and_changes_nothing(formula: Any, says: str) -> None:
    before = known_objectives()
    with pytest.raises(UsageError, match="(?s)" + says):
        add_objective(formula)
    assert known_objectives() == before


@pytest.mark.parametrize("objective", [DPO(), AOT(), LDDPO()], ids=str)
def test_an_objective_that_needs_a_reference_says_that_it_got_none(objective: Formula) -> None:
    one = torch.tensor([-1.0])
    with pytest.raises(ValueError, match="compares the policy with a reference"):
        objective(PairLogps(one, one, one, one, one, one), None)


def no_pair(row: Any) -> Pair:
    """A parser that is never asked."""
    raise NotImplementedError


@pytest.mark.parametrize(
    ("name", "columns", "says"),
    [
        ("trl", ["a"], "'trl' is there already"),
        ("auto", ["a"], "'auto' is there already"),
        ("My Format", ["a"], "not a format's name"),
        ("mine", [], "names no columns"),
    ],
)
def test_a_format_that_cannot_be_added_is_refused(name: str, columns: list[str], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        add_format(name, columns, no_pair)


@pytest.mark.parametrize(
    ("name", "usage", "says"),
    [
        ("length", None, "'length' is there already"),
        ("llm", None, "'llm' is there already"),
        ("FILE.py", None, "not a judge's name"),
        ("panel", "pannel:MODEL", "not how the judge 'panel' is written"),
    ],
)
def test_a_judge_that_cannot_be_added_is_refused(name: str, usage: str | None, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        add_judge(name, lambda more: longer_wins(), usage=usage)
    assert added_judge(f"{name}:x") is None


OTHERS = """
import json, sys
from pathlib import Path
from dpo_studio.config import SourceSection
from dpo_studio.errors import UsageError
from dpo_studio.evaluation.judges import RuleJudge, Verdict, add_judge, judges_help
from dpo_studio.preferences.formats import add_format, formats_help
from dpo_studio.preferences.pair import Message, Pair
from dpo_studio.preferences.sources import read_pairs
from dpo_studio.workflows.judging import check_judge

def qa(row):
    return Pair((Message("user", row["q"]),), (Message("assistant", row["good"]),), (Message("assistant", row["bad"]),))

add_format("qa", ["q", "good", "bad"], qa)
assert formats_help().endswith("langfuse, qa")
file = Path(sys.argv[1]) / "rows.jsonl"
rows = [json.dumps({"q": f"What is {n}?", "good": f"It is {n}.", "bad": "No"}) for n in range(9)]
file.write_text("\\n".join(rows))
for how in ("auto", "qa"):
    read = read_pairs(SourceSection(source=str(file), format=how))
    assert (read.format, len(read.pairs)) == ("qa", 9), read

def first(more):
    if not more:
        raise UsageError("--judge letter needs a letter")
    said = lambda row: Verdict("a" if row.a.text.startswith(more) else "b", "its first letter")
    return RuleJudge(f"letter:{more}", "The first letter.", said)

add_judge("letter", first, usage="letter:LETTER")
assert "letter:LETTER" in judges_help()
pairs = Path(sys.argv[1]) / "pairs.jsonl"
row = {"prompt": "Hm?", "chosen": "Yes", "rejected": "No"}
pairs.write_text(json.dumps(row) + "\\n")
result = check_judge(str(pairs), "letter:Y")
assert (result["judge"], result["verdicts"]["comparisons"]) == ("letter:Y", 1), result
try:
    check_judge(str(pairs), "leter:Y")
except UsageError as error:
    assert "letter:LETTER" in str(error), error
"""


def test_a_format_and_a_judge_of_one_file_are_read_asked_and_named_in_the_hints(tmp_path: Any) -> None:
    """In a process of its own, which may be changed."""
    done = subprocess.run([sys.executable, "-c", OTHERS, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
