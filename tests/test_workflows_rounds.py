"""`dpo rounds`, whole, on a tiny model that can learn what a judge wants: to end."""

from __future__ import annotations

import json
from math import log
from pathlib import Path
from typing import Any

import pytest

import dpo_studio
from dpo_studio.config import load_recipe
from dpo_studio.evaluation.winrate import win_rate
from dpo_studio.learning.reference import ReferenceChoice
from dpo_studio.workflows.rounds.plan import plan_rounds
from tests.tiny_folders import ending_folder
from tests.tiny_runs import Said, dpo, tiny_rows, write_recipe

RULES = '''
def ends(prompt, a, b):
    """An answer that ends is better than one that does not."""
    return "tie" if a.ended == b.ended else "a" if a.ended else "b"


def chance(prompt, a, b):
    """Nothing that an answer could learn to be."""
    one, other = (sum(map(ord, prompt + answer.text)) * 7919 % 101 for answer in (a, b))
    return "tie" if one == other else "a" if one < other else "b"
'''


def write(folder: Path, model: Path, judge: str = "ends", *, steps: int = 50, **rounds: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "rules.py").write_text(RULES)
    settings = {"judge": f"{folder / 'rules.py'}:{judge}", "max_new_tokens": 12, "choose": "all"} | rounds
    return write_recipe(
        folder / "r.yaml",
        model,
        rows=[row | {"prompt": f"Say {number}"} for number, row in enumerate(tiny_rows(200))],
        data={"held_out": {"fraction": 0.5}},
        adapter={"rank": 4, "alpha": 8},
        training={
            "pairs_per_step": 16,
            "max_steps": steps,
            "learning_rate": 5e-3,
            "evaluate_every": 100,
            "save_every": 100,
        },
        rounds=settings,
    )


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ending_folder(tmp_path_factory.mktemp("models") / "ending")


@pytest.fixture(scope="module")
def two(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Said]:
    """Two rounds, the second after a stop, and what was said."""
    folder = tmp_path_factory.mktemp("two")
    recipe = write(folder, model)
    assert dpo("rounds", recipe, "--rounds", "1").code == 0
    assert not (folder / "run" / "round-2").exists()
    said = dpo("rounds", recipe)
    assert said.code == 0, said.err
    return folder / "run", said


def test_each_round_gains_over_the_start_and_over_the_one_before(two: tuple[Path, Said]) -> None:
    """The numbers of rounds.json, worked out again from the evaluations' answers: who ends wins."""
    folder, said = two
    summary = json.loads((folder / "rounds.json").read_text())
    assert (summary["planned"], summary["stopped"], summary["best"]) == (2, None, "round-2")
    assert summary["judge"] == "rules:ends"
    first, second = summary["rounds"]
    answers = {name: rows_of(folder / name / "evaluation" / "comparisons.jsonl") for name in ("round-1", "round-2")}
    start = [row["base"]["ended"] for row in answers["round-1"]]
    ended = {name: [row["tuned"]["ended"] for row in rows] for name, rows in answers.items()}
    for one, name, before in ((first, "round-1", start), (second, "round-2", ended["round-1"])):
        points = [(after - other + 1) / 2 for other, after in zip(before, ended[name], strict=True)]
        assert one["gain"]["win_rate"] == pytest.approx(sum(points) / len(points))
        outcomes: list[Any] = [{0.0: "loss", 0.5: "tie", 1.0: "win"}[point] for point in points]
        assert one["gain"]["win_rate_ci95"] == pytest.approx(win_rate(outcomes).win_rate_ci95)
        assert one["gain"]["win_rate_ci95"][0] > 0.5
        assert one["stop_rate"] == pytest.approx(sum(ended[name]) / len(points))
        assert one["mean_tokens"] == pytest.approx(sum(row["tuned"]["tokens"] for row in answers[name]) / len(points))
        assert one["kl"] > 0 and one["length_controlled"] is not None
    assert summary["start"]["stop_rate"] == pytest.approx(sum(start) / len(start))
    over_start = [(after - other + 1) / 2 for other, after in zip(start, ended["round-2"], strict=True)]
    assert second["win_rate"] == pytest.approx(sum(over_start) / len(over_start))
    assert "| 2 | " in said.out and "over the round before" in said.out
    for name in ("rounds.png", "rounds.svg"):
        assert (folder / name).stat().st_size > 1000


def test_prompts_that_a_round_is_trained_on_are_never_judged(two: tuple[Path, Said]) -> None:
    folder, _ = two
    judged, learned = set(), set()
    for number in (1, 2):
        judged |= {row["prompt"] for row in rows_of(folder / f"round-{number}" / "evaluation" / "comparisons.jsonl")}
        rows = rows_of(folder / f"round-{number}.jsonl")
        learned |= {row["prompt"][0]["content"] for row in rows}
        assert {row["made"]["round"] for row in rows} == {number}
        assert {name for row in rows for name in row["made"]["models"]} == {"ending" if number == 1 else "round-1"}
    assert len(judged) > 60 and len(learned) > 60
    assert not judged & learned


def reference_of(run: Path, pairs: Path) -> list[float]:
    return [line["reference_chosen_logp"] for line in dpo("score", run, pairs, "--dtype", "float32").lines]


def policy_of(run: Path, pairs: Path) -> list[float]:
    return [line["chosen_logp"] for line in dpo("score", run, pairs, "--dtype", "float32").lines]


def test_the_reference_is_the_start_or_the_round_before(two: tuple[Path, Said], model: Path, tmp_path: Path) -> None:
    """`dpo score` says what the second run is held close to; and its policy began as the first round's."""
    folder, _ = two
    pairs = folder / "held_out.jsonl"
    assert reference_of(folder / "round-2", pairs) == pytest.approx(policy_of(model, pairs), abs=1e-4)
    assert abs(first_loss(folder / "round-2") - log(2)) > 0.01  # the policy has left the start already
    plan = plan_rounds(load_recipe(write(tmp_path, model, reference="previous")), None)
    second = plan.recipe_of(plan.rounds()[1]).recipe
    assert second.model.adapter == str(tmp_path / "run" / "round-1" / "adapter")
    assert ReferenceChoice.of(second) == ReferenceChoice(None, tmp_path / "run" / "round-1" / "adapter", is_start=True)


def first_loss(run: Path) -> float:
    return float(next(row["loss"] for row in rows_of(run / "metrics.jsonl") if "loss" in row))


@pytest.mark.slow
def test_the_round_before_as_the_reference(model: Path, tmp_path: Path) -> None:
    """The second run begins at ln 2, and `dpo score` says that its reference is the first run."""
    said = dpo("rounds", write(tmp_path, model, reference="previous"))
    assert said.code == 0, said.err
    pairs, runs = tmp_path / "run" / "held_out.jsonl", [tmp_path / "run" / f"round-{number}" for number in (1, 2)]
    assert reference_of(runs[1], pairs) == pytest.approx(policy_of(runs[0], pairs), abs=1e-4)
    assert first_loss(runs[1]) == pytest.approx(log(2), abs=1e-5)


@pytest.mark.slow
def test_one_round_and_then_another_is_two_rounds(two: tuple[Path, Said], model: Path, tmp_path: Path) -> None:
    """The same pairs, adapter and numbers as without a stop."""
    folder, _ = two
    assert dpo("rounds", write(tmp_path, model)).code == 0
    for name in ("round-1.jsonl", "round-2.jsonl", "round-2/adapter/adapter_model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (folder / name).read_bytes(), name
    summaries = [json.loads((place / "rounds.json").read_text()) for place in (folder, tmp_path / "run")]
    assert summaries[0]["rounds"] == summaries[1]["rounds"]


def test_rounds_that_are_done_are_not_done_again(two: tuple[Path, Said]) -> None:
    said = dpo("rounds", two[0].parent / "r.yaml")
    assert (said.code, said.out, "answers of" in said.err) == (0, two[1].out, False)


def test_a_round_that_gains_nothing_says_so_and_ends_them(model: Path, tmp_path: Path) -> None:
    """A judge whose taste nobody can learn: one of three rounds is made."""
    said = dpo("rounds", write(tmp_path, model, judge="chance", steps=2, number=3, max_new_tokens=8))
    assert said.code == 0, said.err
    summary = json.loads((tmp_path / "run" / "rounds.json").read_text())
    (only,) = summary["rounds"]
    assert only["gain"]["win_rate_ci95"][0] <= 0.5
    assert summary["stopped"].startswith("round 1 gained nothing beyond its interval: win rate over the start ")
    assert summary["best"] is None
    assert "gained nothing" in said.err + said.out


def test_what_cannot_be_rounds_is_refused(two: tuple[Path, Said], model: Path, tmp_path: Path) -> None:
    recipe = write(tmp_path / "a", model)
    (tmp_path / "a" / "run").mkdir()
    (tmp_path / "a" / "run" / "thesis.txt").write_text("mine")
    plain = write_recipe(tmp_path / "plain.yaml", model)
    begun = two[0].parent / "r.yaml"
    for command, code, words in (
        (["rounds", recipe], 1, "exists and has no rounds"),
        (["rounds", plain], 1, "has no section rounds"),
        (["train", recipe], 1, "`dpo rounds` takes it"),
        (["train", recipe, "--dry-run"], 1, "`dpo rounds` takes it"),
        (["rounds", recipe, "--set", f"reference.model={model}"], 1, "remove reference.model"),
        (["rounds", recipe, "--set", "rounds.judge=implicit"], 1, "rounds.judge names who judges"),
        (["rounds", begun, "--set", "training.max_steps=9"], 1, "with other settings: training.max_steps"),
        (["rounds", begun, "--set", "data.held_out.fraction=0"], 1, "with other settings"),
    ):
        said = dpo(*command)
        assert (said.code, words in said.err) == (code, True), said.err


@pytest.mark.slow
def test_the_demo_of_rounds_gains_or_says_that_it_does_not(tmp_path: Path) -> None:
    """The shipped recipe, whole, on the bundled model: half an hour on two cores, and more on busy ones."""
    recipe = Path(dpo_studio.__file__).parent / "recipes" / "rounds-demo.yaml"
    said = dpo("rounds", recipe, "--set", f"run.folder={tmp_path / 'run'}")
    assert said.code == 0, said.err
    summary = json.loads((tmp_path / "run" / "rounds.json").read_text())
    for one in summary["rounds"]:
        assert one["length_controlled"] is not None
        gained = one["gain"]["win_rate_ci95"][0] > 0.5
        assert gained or summary["stopped"].startswith(f"round {one['round']} gained nothing")
    assert len(summary["rounds"]) == 2 or summary["stopped"] is not None
    judged = {row["prompt"] for row in rows_of(tmp_path / "run" / "round-1" / "evaluation" / "comparisons.jsonl")}
    assert len(judged) == 100
    for file in (tmp_path / "run").glob("round-?.jsonl"):
        assert not judged & {row["prompt"][0]["content"] for row in rows_of(file)}
