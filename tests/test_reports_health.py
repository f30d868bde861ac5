"""Run health: each detector sees the curve it is for, none sees its near misses, and all are silent on a good run."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpo_studio.reports.findings import health_section
from dpo_studio.runs import detectors, health
from dpo_studio.runs.detectors import DETECTORS, Curve
from dpo_studio.runs.facts import read_run
from dpo_studio.runs.folder import RunFolder
from dpo_studio.runs.health import HealthFinding, HealthWatch, health_of, judge
from tests.tiny_runs import dpo, write_recipe


def recorded(name: str) -> list[Any]:
    lines = (Path(__file__).parent / "data" / f"{name}-metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


DEMO = recorded("demo")
"""What `dpo demo` wrote, step by step: SmolLM2-135M on 256 pairs, 32 steps."""
FAST = recorded("fast")
"""The same with ten times the learning rate, on 128 pairs twice (docs/health.md has the command): 64 steps."""

Series = Callable[[int], float] | float


def rows(steps: int = 100, *, held_out: dict[int, dict[str, float]] | None = None, **series: Series) -> list[Any]:
    """A healthy run of 16 pairs a step (loss 0.69 to 0.49, accuracy 0.5 to 0.8), but for what `series` says. Double
    underscores stand for slashes."""
    well: dict[str, Series] = {
        "loss": lambda step: 0.69 - 0.2 * step / steps,
        "grad_norm": lambda step: 2.0 + (step % 3) / 2,
        "rewards__accuracies": lambda step: 0.5 + 0.3 * step / steps,
        "rewards__margins": lambda step: 0.6 * step / steps,
        "log_ratios__chosen": lambda step: 1.0 * step / steps,
        "log_ratios__rejected": lambda step: -5.0 * step / steps,
        "tokens__chosen": 50,
        "tokens__rejected": 50,
    }
    lines: list[Any] = [{"step": step, "pairs": 16} for step in range(steps + 1)]
    for line in lines[1:]:
        for name, value in (well | series).items():
            line[name.replace("__", "/")] = value(line["step"]) if callable(value) else value
    for step, numbers in (held_out or {}).items():
        lines[step] |= {f"eval_{name}".replace("__", "/"): value for name, value in numbers.items()}
    return lines


def losses(*values: float, every: int = 20) -> dict[int, dict[str, float]]:
    """Held-out evaluations at step 0, 20, 40 ..."""
    return {every * place: {"loss": value, "rewards__accuracies": 0.75} for place, value in enumerate(values)}


def names(lines: list[Any], planned: int = 100) -> list[str]:
    return [finding.name for finding in judge(lines, planned)]


def noisy(middle: float, spread: float) -> Callable[[int], float]:
    draw = random.Random(5)
    return lambda step: draw.gauss(middle, spread)


SHOWS: dict[str, list[list[Any]]] = {
    # 3 of 50 tokens' worth: 0.06 and 0.1 nats a token, and 3 of 5 are a common fall
    "rewards_fall": [rows(log_ratios__chosen=-3.0, log_ratios__rejected=-5.0)],
    "chosen_collapses": [
        rows(log_ratios__chosen=-26.0, log_ratios__rejected=-60.0),  # 0.52 a token, but further apart than down
        rows(
            log_ratios__chosen=math.nan,  # no reference: from its own start
            logps__chosen=lambda step: -50.0 - (30.0 if step > 50 else 0.0),  # 0.6 a token
        ),
    ],
    "accuracy_saturates": [
        rows(rewards__accuracies=1.0),  # known after 5 steps of 100
        rows(  # after 34, with 0.8 on held-out pairs
            rewards__accuracies=lambda step: 0.6 if step < 30 else 1.0,
            held_out={0: {"loss": 0.69, "rewards__accuracies": 0.5}, 50: {"loss": 0.6, "rewards__accuracies": 0.8}},
        ),
    ],
    "margins_explode": [rows(rewards__margins=17.0)],
    "gradient_spikes": [rows(grad_norm=lambda step: 30.0 if step == 40 else 2.0 + (step % 3) / 2)],
    "loss_still": [rows(loss=noisy(0.693, 0.004)), rows(loss=lambda step: 0.693 - 0.01 * step / 100)],
    "held_out_turns": [
        rows(held_out=losses(0.69, 0.60, 0.55, 0.60, 0.62)),
        rows(held_out=losses(0.693, 0.74, 0.76)),  # never better than before training
    ],
}
MISSES: dict[str, list[list[Any]]] = {
    "rewards_fall": [
        rows(log_ratios__chosen=-2.4, log_ratios__rejected=-5.2, tokens__chosen=40),  # both by enough, but 0.46 shared
        rows(log_ratios__chosen=-2.0, log_ratios__rejected=-3.0),  # 0.04 nats a token
        rows(log_ratios__chosen=-3.0, log_ratios__rejected=1.0),  # wrong way round, but not both
        rows(log_ratios__chosen=lambda step: -3.0 * (step < 5), log_ratios__rejected=-5.0),  # only at first
    ],
    "chosen_collapses": [
        rows(log_ratios__chosen=-24.0, log_ratios__rejected=-60.0),
        rows(log_ratios__chosen=lambda step: -100.0 * (step == 50), log_ratios__rejected=-60.0),  # one odd step
    ],
    "accuracy_saturates": [
        rows(rewards__accuracies=0.97),
        rows(rewards__accuracies=lambda step: 0.6 if step < 30 else 1.0),  # late, and nothing known of held-out pairs
        rows(
            rewards__accuracies=lambda step: 0.6 if step < 30 else 1.0,
            held_out={0: {"loss": 0.69, "rewards__accuracies": 0.5}, 50: {"loss": 0.4, "rewards__accuracies": 0.9}},
        ),
    ],
    "margins_explode": [rows(rewards__margins=15.0), rows(rewards__margins=lambda step: 60.0 * (step == 50))],
    "gradient_spikes": [
        rows(grad_norm=lambda step: 20.0 if step == 40 else 2.5),  # 8 times
        rows(grad_norm=lambda step: 2.5 if step < 20 else 1.5 if step == 60 else 0.05),  # small beside the beginning
        rows(grad_norm=lambda step: 30.0 if step == 8 else 2.5),  # before there is a usual size
    ],
    "loss_still": [
        rows(loss=lambda step: 0.693 - 0.06 * step / 100),
        rows(loss=lambda step: 0.69 + 0.15 * (-1) ** step),  # a fall of 2 % could hide in it
        rows(steps=49, loss=0.693),  # not half of the run yet
    ],
    "held_out_turns": [
        rows(held_out=losses(0.69, 0.60, 0.55, 0.57, 0.575)),  # 4.5 % is not 5
        rows(held_out=losses(0.69, 0.60, 0.55, 0.60, 0.56)),  # once
        rows(held_out=losses(0.69, 0.80, 0.55)),  # before the lowest
    ],
}


def test_a_healthy_curve_shows_nothing() -> None:
    assert names(rows(held_out=losses(0.69, 0.66, 0.62, 0.6, 0.58, 0.57))) == []
    assert SHOWS.keys() == MISSES.keys() == {detector.name for detector in DETECTORS}


@pytest.mark.parametrize(("name", "lines"), [(name, lines) for name in SHOWS for lines in SHOWS[name]])
def test_each_detector_sees_its_curve_and_no_other_one_does(name: str, lines: list[Any]) -> None:
    assert names(lines) == [name]


@pytest.mark.parametrize(("name", "lines"), [(name, lines) for name in MISSES for lines in MISSES[name]])
def test_each_detector_is_silent_on_near_misses(name: str, lines: list[Any]) -> None:
    assert name not in names(lines)


@pytest.mark.parametrize(
    ("objective", "seen"),
    [
        ("{kind: dpo}", True),
        ("{kind: dpo, label_smoothing: 0.1}", False),
        ("{kind: ipo}", False),
        ("{kind: dpo_norm}", False),
        ("{kind: mixture}", True),
        ("{kind: mixture, terms: [{kind: ipo}, {kind: sft}], weights: [1, 1]}", False),
        ("{kind: no-such}", True),
        ("[]", True),
    ],
)
def test_wide_margins_are_no_illness_of_objectives_that_want_them(objective: str, seen: bool, tmp_path: Path) -> None:
    """IPO at its target: 5 nats a token times 50 tokens times beta 0.1 is a margin of 25."""
    lines = "".join(json.dumps(line) + "\n" for line in rows(rewards__margins=25.0))
    (tmp_path / "metrics.jsonl").write_text(lines)
    (tmp_path / "recipe.yaml").write_text(f"objective: {objective}\n")
    assert [finding.name for finding in health_of(read_run(tmp_path))] == ["margins_explode"] * seen
    assert ("argins explode" in health_section(read_run(tmp_path))) == seen


def test_all_are_silent_on_the_demo_run() -> None:
    """A real run, noisy as eight pairs a step are: its gradient goes up fourfold, its accuracy ends at 1.0."""
    assert judge(DEMO, 32) == []
    curve = Curve(32)
    for line in DEMO:
        curve.add(line)
    assert curve.recent("rewards/accuracies", "log_ratios/chosen", "tokens/chosen") is not None  # there was enough


def test_a_real_run_that_went_too_fast_is_caught() -> None:
    """Its accuracy ends at 1.0, 0.975 on held-out pairs. By eye: the norm of step 19 is 27.6 after a median of 2.46,
    held-out losses are 0.147, 0.333 and 0.363, and the mean margin of steps 15 to 30 passes 16."""
    first = {finding.name: finding.first_step for finding in judge(FAST, 64)}
    assert first == {"gradient_spikes": 19, "held_out_turns": 24, "margins_explode": 30, "chosen_collapses": 49}


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"log_ratios/chosen": -1.0, "log_ratios/rejected": 1.0}, "rewards_fall"),
        ({"log_ratios/chosen": -4.0}, "chosen_collapses"),
        ({"rewards/margins": 2.5}, "margins_explode"),
    ],
)
def test_the_demo_run_turned_bad_does_not_stay_silent(change: dict[str, float], name: str) -> None:
    """The same noise with chosen answers falling with the rejected ones, four times as far, or margins of 20."""
    bad = [{key: value * change.get(key, 1) for key, value in line.items()} for line in DEMO]
    assert name in names(bad, 32)


def test_what_is_seen_again_is_one_finding_with_its_last_words() -> None:
    """Margins of 17 from step 20 to 60, 20 between 40 and 60: recent means five steps, so seen from 24 on; at step 64
    four steps of five are over, and (20 + 4 x 0.6) / 5 is far below 16."""
    margins = rows(rewards__margins=lambda step: 0.6 if step < 20 or step > 60 else 17.0 if step < 40 else 20.0)
    watch = HealthWatch(100)
    told = {line["step"]: [finding.name for finding in watch.see(line)] for line in margins}
    assert {step: found for step, found in told.items() if found} == {24: ["margins_explode"]}
    (finding,) = watch.findings
    assert (finding.first_step, finding.last_step) == (24, 61)
    assert "is 16.1" in finding.saw  # step 61: (4 x 20 + 0.6) / 5


def test_few_pairs_are_not_judged() -> None:
    """50 steps of one pair, as the tutorial's: noise would be all there is to see."""
    lines = rows(50, rewards__accuracies=1.0, rewards__margins=30.0, log_ratios__chosen=-40.0)
    assert names([line | {"pairs": 1} for line in lines], 50) == []


@pytest.mark.parametrize(("tuned", "seen"), [(125, True), (115, False)])
def test_answers_that_lengthen(tuned: float, seen: bool, tmp_path: Path) -> None:
    """By the demo's sample, or over the temperatures that `dpo eval` measured, 100 tokens before."""
    facts = {"steps": 4, "mean_tokens_base": 100, "mean_tokens_tuned": tuned}
    (tmp_path / "result.json").write_text(json.dumps(facts))
    assert [finding.name for finding in health_of(read_run(tmp_path))] == ["answers_lengthen"] * seen
    rates = [{"reference_mean_tokens": 90, "mean_tokens": tuned - 10}, {"mean_tokens": 900}]
    rates += [{"reference_mean_tokens": 110, "mean_tokens": tuned + 10}]
    (tmp_path / "result.json").write_text('{"steps": 4}')
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "winrate.json").write_text(json.dumps({"temperatures": rates}))
    assert [finding.name for finding in health_of(read_run(tmp_path))] == ["answers_lengthen"] * seen


def test_training_warns_once_and_the_same_stands_in_the_result_and_on_the_page(tiny_base: Path, tmp_path: Path) -> None:
    """18 random pairs at a rate of 0.1 are learned by heart: 1.0 on them and a coin toss on the held-out ones. The run
    goes on from step 8, and what was told before is not told again."""
    recipe = write_recipe(tmp_path / "r.yaml", tiny_base, training={"pairs_per_step": 18, "learning_rate": 0.1})
    first = dpo("train", recipe, "--set", "training.max_steps=12")
    assert first.code == 0, first.err
    run = RunFolder(tmp_path / "run")
    found = (run.result() or {})["health"]
    assert "accuracy_saturates" in [finding["name"] for finding in found]
    for finding in found:
        assert first.err.count(f"step {finding['first_step']}: {finding['title'][0].lower()}") == 1
        assert finding["title"] in (tmp_path / "run" / "report.html").read_text()
    assert found == [finding.to_plain() for finding in judge(run.lines("metrics.jsonl"), 12)]

    second = dpo("train", recipe, "--set", "training.max_steps=16")
    assert second.code == 0, second.err
    again = (run.result() or {})["health"]
    for finding in again:
        assert second.err.count(finding["advice"]) == int(finding["first_step"] > 12)
    assert {finding["name"] for finding in again} >= {finding["name"] for finding in found}


def test_training_does_not_warn_of_margins_that_its_objective_means_a_token(tiny_base: Path, tmp_path: Path) -> None:
    """dpo_norm's beta of 5 makes 3.2 nats of a whole answer a reward margin of 16: DPO's curve would be ill."""
    steps = {"pairs_per_step": 18, "learning_rate": 0.1, "max_steps": 12}
    said = dpo("train", write_recipe(tmp_path / "r.yaml", tiny_base, training=steps, objective={"kind": "dpo_norm"}))
    assert said.code == 0, said.err
    run = RunFolder(tmp_path / "run")
    assert "margins_explode" in [finding.name for finding in judge(run.lines("metrics.jsonl"), 12)]
    assert "margins_explode" not in [finding["name"] for finding in (run.result() or {})["health"]]
    assert "margins explode" not in said.err


def test_the_document_lists_every_detector_with_its_thresholds() -> None:
    text = (Path(__file__).parent.parent / "docs" / "health.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `([a-z_]+)` \|", text, re.MULTILINE))
    assert listed == {detector.name for detector in DETECTORS} | {"answers_lengthen"}
    for module in (detectors, health):
        for name, value in vars(module).items():
            if name.isupper() and isinstance(value, (int, float)):
                assert f"`{name}` {value:g}" in text


def test_a_finding_speaks_to_the_person_at_the_keyboard() -> None:
    finding = HealthFinding("margins_explode", "Margins explode", 24, 60, "the mean is 17", "stop earlier")
    assert finding.words() == "step 24: margins explode: the mean is 17\n  hint: stop earlier"
