"""What the rounds are made of: which prompts make pairs, which are judged, and each round's own recipe."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_studio.config import Recipe, RecipeFile, RoundsSection, SourceSection, load_recipe
from dpo_studio.disk import write_atomically
from dpo_studio.errors import DataError, RecipeError
from dpo_studio.evaluation.judges import judges_help
from dpo_studio.preferences.pair import Pair, prompt_key, trl_row
from dpo_studio.preferences.prompts import read_prompts
from dpo_studio.preferences.sources import read_pairs
from dpo_studio.preferences.split import split_pairs
from dpo_studio.preferences.turns import Turns

__all__ = ["Round", "RoundsPlan", "plan_rounds"]

_EVERYDAY = "bundled:everyday"


@dataclass(frozen=True)
class Round:
    """One round, and where what it makes is."""

    number: int
    folder: Path
    """The rounds' folder."""

    @property
    def run(self) -> Path:
        """Its run folder."""
        return self.folder / f"round-{self.number}"

    @property
    def pairs(self) -> Path:
        """The pairs it is trained on."""
        return self.folder / f"round-{self.number}.jsonl"

    @property
    def counts(self) -> Path:
        """What was counted as they were made."""
        return self.folder / f"round-{self.number}.json"


@dataclass(frozen=True)
class RoundsPlan:
    """A recipe of rounds."""

    recipe: Recipe
    """Resolved, its `rounds` included."""
    typed: str
    """The base as it was typed, which cards name."""
    folder: Path
    section: RoundsSection
    judge: str

    @property
    def start(self) -> str:
        """The model before the first round: the base, or the adapter that the recipe continues."""
        return self.recipe.model.adapter or self.recipe.model.path

    @property
    def prompts(self) -> Path:
        """The prompts that make pairs."""
        return self.folder / "prompts.jsonl"

    @property
    def held_out(self) -> Path:
        """Pairs whose prompts no round is trained on."""
        return self.folder / "held_out.jsonl"

    def rounds(self) -> list[Round]:
        """All of them, from 1."""
        return [Round(number, self.folder) for number in range(1, self.section.number + 1)]

    def policy_before(self, one: Round) -> str:
        """The model that answers in a round: the start, or the run of the round before."""
        return self.start if one.number == 1 else str(Round(one.number - 1, self.folder).run)

    def against(self, one: Round) -> str | None:
        """What a round's win rate over the start compares with; None: the run's own reference, which is the start."""
        return None if one.number == 1 or self._keeps_to_start else self.start

    @property
    def _keeps_to_start(self) -> bool:
        """Whether the later runs' reference is the start; an objective without one has the round before as such."""
        return self.section.reference == "start" and self.recipe.objective.needs_reference

    def recipe_of(self, one: Round) -> RecipeFile:
        """A round's recipe: its own pairs, the policy before as its start, and the reference that `rounds` says."""
        plain: dict[str, Any] = deepcopy(self.recipe.to_plain())
        del plain["rounds"]
        plain["data"] |= {"train": {"source": str(one.pairs)}, "held_out": {"source": str(self.held_out)}}
        plain["training"]["seed"] += one.number - 1  # another order each time
        plain["run"]["folder"] = str(one.run)
        if one.number > 1:
            plain.pop("adapter", None)
            plain["model"]["adapter"] = str(Round(one.number - 1, self.folder).run / "adapter")
            if self._keeps_to_start:
                own = self.recipe.model.adapter
                plain["reference"] |= {"model": self.recipe.model.path} if own is None else {"adapter": own}
        return load_recipe(plain)

    def write_prompts(self, held_out: Sequence[Pair], prompts: Mapping[str, Turns]) -> None:
        """Both files, once: what is judged stands before what is trained on."""
        asked = ([{"role": turn.role, "content": turn.content} for turn in turns] for turns in prompts.values())
        for file, rows in (
            (self.held_out, [trl_row(pair) for pair in held_out]),
            (self.prompts, [{"prompt": turns} for turns in asked]),
        ):
            write_atomically(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def plan_rounds(loaded: RecipeFile, number: int | None) -> RoundsPlan:
    """The plan of a recipe with a section `rounds`; `number` of them, if that is not None.

    Raises:
        RecipeError: it has none, names a reference of its own, or no judge.
    """
    recipe = loaded.recipe
    if recipe.rounds is None:
        raise RecipeError(f"{loaded.name} has no section rounds", hint="rounds: {number: 2, judge: JUDGE}")
    own = [name for name in ("model", "adapter", "update_every") if getattr(recipe.reference, name) is not None]
    if own:
        raise RecipeError(f"rounds.reference says what the reference is: remove reference.{own[0]}")
    own = [name for name in ("chat_template", "template") if getattr(recipe.model, name)]
    if own:  # the start answers the first round's prompts by its own template
        raise RecipeError(f"rounds of a model with model.{own[0]} are not built yet")
    if len(recipe.data.sources) > 1:
        raise RecipeError("rounds over several training sources are not built yet", hint="rounds.prompts: SOURCE")
    if recipe.model.revision is not None:
        raise RecipeError("rounds need a base that is named without a revision", hint="name a folder: model.path")
    section = recipe.rounds if number is None else recipe.rounds.model_copy(update={"number": number})
    judge = section.judge or (
        "everyday" if all(one.source.startswith(_EVERYDAY) for one in recipe.data.sources) else None
    )
    if judge is None or judge == "implicit":
        raise RecipeError("rounds.judge names who judges the answers", hint=f"one of {judges_help()}")
    typed: Any = loaded.typed.get("model")
    name = typed.get("path") if isinstance(typed, dict) else None
    return RoundsPlan(recipe, name or recipe.model.path, loaded.run_folder, section, judge)


def divide(plan: RoundsPlan) -> tuple[list[Pair], dict[str, Turns]]:
    """(pairs to measure on, prompts that make pairs by their keys), without a common prompt.

    Raises:
        DataError: nothing is left on one of the two sides.
    """
    data = plan.recipe.data
    (given,) = data.sources
    apart = data.held_out.as_source()
    other = plan.section.prompts
    if apart is not None:
        held_out = read_pairs(apart, seed=data.split_seed).pairs
        asked = read_prompts(SourceSection(source=other) if other else given, seed=data.split_seed).prompts
    else:
        split = split_pairs(read_pairs(given, seed=data.split_seed).pairs, data.held_out, seed=data.split_seed)
        held_out, asked = split.held_out, {prompt_key(pair.prompt): pair.prompt for pair in split.train}
        asked = read_prompts(SourceSection(source=other)).prompts if other else asked
    measured = {prompt_key(pair.prompt) for pair in held_out}
    prompts = {key: turns for key, turns in asked.items() if key not in measured}
    if not held_out:
        raise DataError("no pair is held out: no round could be measured", hint="data.held_out: {fraction: 0.1}")
    if not prompts:
        raise DataError("every prompt is held out: no round could make a pair", hint="name other prompts")
    return held_out, prompts
