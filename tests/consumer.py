"""A program on the public API, as someone else would write it: mypy checks it, `test_public_api.py` runs it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, assert_type

import dpo_studio
from dpo_studio import Completion, Recipe, RecipeFile, SourceSection


def use(base: Path, pairs: Path, folder: Path) -> dict[str, Any]:
    """Train, score, ask, evaluate, export and sweep; the results by the verb's name."""
    plain: dict[str, Any] = {
        "model": {"path": str(base), "dtype": "float32"},
        "data": {"train": {"source": str(pairs)}, "held_out": {"fraction": 0.25}},
        "adapter": {"rank": 2, "alpha": 4},
        "training": {"pairs_per_step": 4, "max_steps": 1, "learning_rate": 1e-2},
        "run": {"folder": str(folder / "run")},
    }
    loaded = assert_type(dpo_studio.load_recipe(plain), RecipeFile)
    recipe = assert_type(loaded.recipe, Recipe)
    trained = assert_type(dpo_studio.train_recipe(plain), dict[str, Any])
    again = dpo_studio.train_recipe(recipe)
    lines = io.StringIO()
    scored = assert_type(dpo_studio.score_pairs(str(folder / "run"), str(pairs), lines), dict[str, Any])
    read = dpo_studio.read_pairs(SourceSection(source=str(pairs)))
    assert_type(read.pairs[0].prompt[0], dpo_studio.Message)
    sampling = dpo_studio.Sampling(temperature=0, max_new_tokens=4)
    answers = dpo_studio.generate_answers(str(folder / "run"), ["What is water?"], sampling=sampling)
    assert_type(answers, list[Completion])
    few = dpo_studio.Evaluation(temperatures=(0.0,), max_new_tokens=4, prompts=2)
    rates = dpo_studio.evaluate_run(str(folder / "run"), "length", settings=few)
    exported = dpo_studio.export_run(folder / "run", folder / "out", "adapter")
    judged = dpo_studio.check_judge(str(pairs), "length")
    checked = dpo_studio.check_source(str(pairs))
    swept = assert_type(dpo_studio.run_sweep(plain, ["objective.beta=0.1,0.2"], out=folder / "sweep"), Path)
    return {
        "trained": trained,
        "again": again,
        "scored": scored,
        "lines": lines.getvalue(),
        "answers": answers,
        "rates": rates,
        "exported": exported,
        "judged": judged,
        "usable": checked.usable,
        "swept": swept,
    }
