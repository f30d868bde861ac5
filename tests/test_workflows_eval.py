"""`dpo eval` on a tiny run: what it leaves, that a restart and a second start say the same, and what it refuses."""

from __future__ import annotations

import html
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo_studio.console.text import printable
from dpo_studio.sampling.generation import generate
from dpo_studio.workflows.evaluating import completions
from dpo_studio.workflows.evaluating import run as evaluating
from dpo_studio.workflows.evaluating.run import default_judge
from tests.textbook import plain_logps
from tests.tiny_models import tiny_folder
from tests.tiny_runs import Said, dpo, tiny_rows, write_recipe
from tests.tiny_tokenizers import tiny_tokenizer

QUICK = ("--judge", "length", "--temperatures", "0,1", "--max-new-tokens", "8", "--samples", "2", "--prompts", "6")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained tiny run, nine prompts held out."""
    folder = tmp_path_factory.mktemp("eval")
    recipe = write_recipe(
        folder / "r.yaml",
        tiny_folder(folder / "base"),
        rows=tiny_rows(40),
        data={"held_out": {"fraction": 0.3}},
        training={"max_steps": 4, "learning_rate": 0.02},
        run={"folder": str(folder / "run")},
    )
    said = dpo("train", recipe)
    assert said.code == 0, said.err
    return folder / "run"


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy: each test leaves its own files in it."""
    return Path(shutil.copytree(made, tmp_path / "run"))


def evaluated(run: Path, *more: object) -> tuple[Said, dict[str, Any]]:
    said = dpo("eval", run, *QUICK, *more)
    assert said.code == 0, said.err
    return said, json.loads((run / "evaluation" / "winrate.json").read_text())


def test_what_it_leaves(run: Path) -> None:
    """Six prompts; one answer each at temperature 0, two at 1: 6 and 12 comparisons, their points added by hand."""
    said, rates = evaluated(run)
    rows = [json.loads(line) for line in (run / "evaluation" / "comparisons.jsonl").read_text().splitlines()]
    cold, warm = rates["temperatures"]
    assert [(row["n"], row["n_prompts"]) for row in (cold, warm)] == [(6, 6), (12, 6)]
    for row in (cold, warm):
        here = [one for one in rows if one["temperature"] == row["temperature"]]
        points = [{"tuned": 1.0, "tie": 0.5, "base": 0.0}[one["winner"]] for one in here]
        assert row["win_rate"] == pytest.approx(sum(points) / len(points))
        longer = [(len(one["tuned"]["text"]) > len(one["base"]["text"])) for one in here]
        assert [one["winner"] == "tuned" for one in here] == longer
        assert row["stop_rate"] == pytest.approx(sum(one["tuned"]["ended"] for one in here) / len(here))
        assert row["reference_mean_tokens"] == pytest.approx(sum(one["base"]["tokens"] for one in here) / len(here))
        low, high = row["win_rate_ci95"]
        assert 0 <= low < high <= 1
    assert cold["kl"] is None
    held_out = rates["held_out"]
    assert held_out["accuracy"] == json.loads((run / "result.json").read_text())["accuracy"]
    assert 0 <= held_out["calibration"]["error"] <= 1
    assert "temperature 1: win rate" in said.out
    assert said.out.splitlines()[-1] == str(run / "evaluation" / "answers.html")
    for name in ("answers.html", "winrate.png", "winrate.svg", "winrate.md"):
        assert (run / "evaluation" / name).stat().st_size > 500


def test_the_run_s_report_shows_the_evaluation_s_answers(run: Path) -> None:
    """Both sides' own texts and the verdict of each comparison at the lowest temperature, none of another one's."""
    before = (run / "report.html").read_text()
    assert 'id="evaluated"' not in before
    evaluated(run)
    rows = [json.loads(line) for line in (run / "evaluation" / "comparisons.jsonl").read_text().splitlines()]
    cold = [row for row in rows if row["temperature"] == 0]
    page = (run / "report.html").read_text()
    shown = page.partition('<section id="evaluated"')[2].partition("</section>")[0]
    assert "The first 6 of 6 comparisons at temperature 0," in shown
    articles = shown.split("<article")[1:]
    assert len(articles) == len(cold) == 6
    for row, article in zip(cold, articles, strict=True):
        for text in (row["prompt"], row["base"]["text"], row["tuned"]["text"], row["reason"]):
            assert html.escape(printable(text)) in article
        assert {"tuned": "tuned wins", "base": "base wins", "tie": "tie"}[row["winner"]] in article
    assert len(page) < len(before) + 200_000


def test_kl_is_the_plain_models(run: Path) -> None:
    """log policy - log reference of the saved answers' own tokens, by PEFT and transformers alone, one at a time."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from dpo_studio.workflows.loading import load_any
    from tests.pairs_of_ids import encoded

    _, rates = evaluated(run)
    loaded = load_any(str(run))
    files = sorted((run / "evaluation" / "completions").glob("policy-t1-s*.jsonl"))
    rows = [json.loads(line)["ids"] for file in files for line in file.read_text().splitlines()]
    asked = [json.loads(line) for line in (run / "evaluation" / "comparisons.jsonl").read_text().splitlines()]
    prompts = [one["prompt"] for one in asked if one["temperature"] == 1]
    from dpo_studio.preferences.pair import Message

    ids = [loaded.base.encoder.prompt_ids([Message("user", prompt)]) for prompt in prompts]
    pairs = [encoded(prompt, row, row) for prompt, row in zip(ids, rows, strict=True)]
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(loaded.base.folder, dtype=loaded.base.model.dtype), run / "adapter"
    ).eval()
    tuned = plain_logps(plain, pairs)
    with plain.disable_adapter():
        base = plain_logps(plain, pairs)
    expected = (tuned - base)[:, 0].mean().item()
    assert rates["temperatures"][1]["kl"] == pytest.approx(expected, abs=1e-3)
    assert abs(expected) > 0.01


def test_twice_and_after_an_interruption_the_same(run: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted while the third file of answers is being written: a second start takes up the first two, and every
    number and answer is that of a start that was never stopped."""
    whole = shutil.copytree(made, run.parent / "whole")
    _, expected = evaluated(whole)
    calls: list[int] = []

    def dies(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(*args, **kwargs)

    def counts(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return generate(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(completions, "generate", dies)
        assert dpo("eval", run, *QUICK).code == 130
    assert not (run / "evaluation" / "winrate.json").exists()
    calls.clear()
    monkeypatch.setattr(completions, "generate", counts)
    _, found = evaluated(run)
    assert len(calls) == 4  # six files in all: temperature 0 once, temperature 1 twice, for two models
    assert found | {"run": ""} == expected | {"run": ""}
    for name in ("comparisons.jsonl", "winrate.svg", "winrate.png"):
        assert (run / "evaluation" / name).read_bytes() == (Path(whole) / "evaluation" / name).read_bytes(), name
    calls.clear()
    _, again = evaluated(run)
    assert again == found
    assert calls == []  # nothing is written twice


def test_a_damaged_file_of_answers_is_written_again(run: Path) -> None:
    _, first = evaluated(run)
    file = next((run / "evaluation" / "completions").glob("policy-t0*.jsonl"))
    file.write_text(file.read_text()[:-30])
    assert evaluated(run)[1] == first


def test_edited_answers_are_written_again(run: Path) -> None:
    """A value of another kind (here a list of null) would be a verdict or a number made of nothing. One a file."""
    _, first = evaluated(run)
    files = sorted((run / "evaluation" / "completions").glob("*.jsonl"))
    before = [file.read_text() for file in files]
    for file, field in zip(files, ("text", "ended", "tokens", "ids"), strict=False):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        rows[0][field] = [None]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert evaluated(run)[1] == first
    assert [file.read_text() for file in files] == before


def test_what_cannot_be_is_told_before_anything_is_asked(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No model behind --against, an evaluation folder that is none, or that may not be written."""

    def asked(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a model was asked")

    monkeypatch.setattr(completions, "generate", asked)
    for against, code, message in (("/none", 1, "no such model folder: /none"), ("", 2, "name of a model is empty")):
        said = dpo("eval", run, *QUICK, "--against", against)
        assert (said.code, message in said.err) == (code, True)
    (run / "evaluation").write_text("not a folder")
    said = dpo("eval", run, *QUICK)
    assert said.code == 1 and "completions cannot be made: Not a directory" in said.err
    (run / "evaluation").unlink()
    with monkeypatch.context() as patched:
        patched.setattr(os, "access", lambda path, mode: False)
        said = dpo("eval", run, *QUICK)
    assert said.code == 1 and "completions cannot be written" in said.err and "hint: " in said.err


def test_against_itself_everything_ties(run: Path, made: Path) -> None:
    """The same model with the same luck says the same: one half, and an interval that has a width."""
    _, rates = evaluated(run, "--against", made)
    for row in rates["temperatures"]:
        assert (row["win_rate"], row["ties"]) == (0.5, row["n"])
        assert row["win_rate_ci95"][0] < 0.5 < row["win_rate_ci95"][1]


def test_against_another_vocabulary_one_tokenizer_counts(run: Path, tmp_path: Path) -> None:
    """Lengths by the run's own tokenizer, from the texts, one more for an end; and the run's implicit reward, to which
    the other model's ids are other words, judges every answer that is text."""
    from dpo_studio.evaluation.length_control import length_controlled

    other = tiny_folder(tmp_path / "other", family="gemma", seed=3)
    for judge in ("length", "implicit"):
        _, rates = evaluated(run, "--judge", judge, "--against", other)
        rows = [json.loads(line) for line in (run / "evaluation" / "comparisons.jsonl").read_text().splitlines()]
        tokenizer = tiny_tokenizer("chatml")

        def count(one: dict[str, Any], tokenizer: Any = tokenizer) -> int:
            ids: list[int] = tokenizer(one["text"], add_special_tokens=False, split_special_tokens=True)["input_ids"]
            return len(ids) + int(one["ended"])

        for at in rates["temperatures"]:
            here = [row for row in rows if row["temperature"] == at["temperature"]]
            points = [{"tuned": 1.0, "tie": 0.5, "base": 0.0}[row["winner"]] for row in here]
            longer_by = [count(row["tuned"]) - count(row["base"]) for row in here]
            assert longer_by != [row["tuned"]["tokens"] - row["base"]["tokens"] for row in here]
            expected, _ = length_controlled(points, longer_by, [row["prompt"] for row in here], seed=0)
            assert at["length_controlled"] == pytest.approx(expected)


def test_several_runs_share_a_figure(run: Path, made: Path, tmp_path: Path) -> None:
    other = shutil.copytree(made, tmp_path / "other")
    said = dpo("eval", run, other, *QUICK, "--figure", tmp_path / "both")
    assert said.code == 0, said.err
    assert said.out.splitlines()[-1] == str(tmp_path / "both.png")
    svg = (tmp_path / "both.svg").read_text()
    assert ">run<" in svg and ">other<" in svg


def test_what_is_wrong_with_the_last_run_is_told_before_the_first_is_evaluated(
    run: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hours of answers must not end at a typo in the second name."""
    more = [Path(shutil.copytree(made, tmp_path / name)) for name in ("two", "three", "four", "five")]
    empty = Path(shutil.copytree(made, tmp_path / "empty"))
    (empty / "result.json").unlink()
    shutil.rmtree(empty / "checkpoints")
    other = Path(shutil.copytree(made, tmp_path / "other"))
    recipe = (other / "recipe.yaml").read_text()
    its = yaml.safe_load(recipe)
    its["reference"]["model"] = "/other"
    (other / "recipe.yaml").write_text(yaml.safe_dump(its))
    everyday = Path(shutil.copytree(made, tmp_path / "everyday"))
    its["reference"]["model"], its["data"]["train"]["source"] = None, "bundled:everyday"
    (everyday / "recipe.yaml").write_text(yaml.safe_dump(its))

    def evaluates(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a run is evaluated")

    monkeypatch.setattr(evaluating, "load_any", evaluates)
    cases: tuple[tuple[int, str, tuple[object, ...]], ...] = (
        (2, "5 runs in one figure: more than 4 cannot be told apart", (run, *more, *QUICK)),
        (1, "no-such is not a run folder", (run, tmp_path / "no-such", *QUICK)),
        (2, "occurs twice", (run, more[0], run.parent / "two" / ".." / "run", *QUICK)),
        (1, "empty has no adapter and no checkpoint yet", (run, empty, *QUICK)),
        (1, "the run's reference is another model (/other)", (run, other, *QUICK)),
        (2, "run: name a judge of its answers with --judge", (everyday, run)),
    )
    for code, message, given in cases:
        said = dpo("eval", *given)
        assert (said.code, message in said.err) == (code, True), said.err


def test_margins_that_are_no_log_odds_are_not_calibrated(run: Path) -> None:
    """IPO pulls margins to a target: sigmoid of them is nobody's probability. The output says so."""
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["objective"] = {"kind": "ipo", "beta": 0.1}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    _, rates = evaluated(run)
    found = rates["held_out"]["calibration"]
    assert (found["error"], found["bins"]) == (None, [])
    assert found["left_out"].startswith("ipo does not train margins to be log-odds")
    assert "No calibration: ipo" in (run / "evaluation" / "winrate.md").read_text()


def test_pairs_of_ones_own_leave_trained_prompts_out(run: Path, tmp_path: Path) -> None:
    source = tmp_path / "more.jsonl"
    rows = tiny_rows(44)
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said, rates = evaluated(run, "--source", source)
    assert "pairs left out" in said.err
    held_out = json.loads((run / "result.json").read_text())["held_out_pairs"]
    assert rates["held_out"]["pairs"] == held_out + 4


@pytest.mark.parametrize(
    ("given", "code", "said_"),
    [
        (("--temperatures", "0,hot"), 2, "not numbers"),
        (("--temperatures", "1,1"), 2, "none twice"),
        (("--temperatures", "-1"), 2, "not 0 or more"),
        (("--judge", "nobody"), 2, "names no judge"),
        (("another", "--figure", "/none/both"), 2, "no such folder"),
    ],
)
def test_what_is_refused(run: Path, given: tuple[str, ...], code: int, said_: str) -> None:
    said = dpo("eval", run, *QUICK, *given)
    assert said.code == code
    assert said_ in said.err
    assert not (run / "evaluation" / "completions").exists()


def test_a_run_on_pairs_of_ones_own_has_no_judge_by_itself(run: Path) -> None:
    said = dpo("eval", run)
    assert said.code == 2 and "--judge" in said.err and "reward:MODEL" in said.err
    recipe = (run / "recipe.yaml").read_text()
    source = next(line for line in recipe.splitlines() if line.strip().startswith("source:"))
    (run / "recipe.yaml").write_text(recipe.replace(source, "    source: bundled:everyday", 1))
    assert default_judge(str(run)) == "everyday"


def test_not_a_run(tmp_path: Path) -> None:
    said = dpo("eval", tmp_path, *QUICK)
    assert said.code == 1 and "not a run" in said.err


def test_no_held_out_pairs(made: Path, tmp_path: Path) -> None:
    bare = Path(shutil.copytree(made, tmp_path / "bare"))
    recipe = (bare / "recipe.yaml").read_text().replace("fraction: 0.3", "fraction: 0.0")
    (bare / "recipe.yaml").write_text(recipe)
    said = dpo("eval", bare, *QUICK)
    assert said.code == 1
    assert "has no held-out pairs" in said.err and "--source" in said.err
