"""A run held close to another model than its base: RUN means its adapter, and what needs the reference is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dpo_studio.workflows import loading
from tests.tiny_models import tiny_folder
from tests.tiny_runs import dpo, write_recipe

SHORT = ("--max-new-tokens", "8", "--dtype", "float32")


@pytest.fixture(scope="module")
def run(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be written to; its reference has other weights than its base."""
    place = tmp_path_factory.mktemp("other")
    reference = tiny_folder(place / "reference", seed=7)
    said = dpo("train", write_recipe(place / "r.yaml", tiny_base, reference={"model": str(reference)}))
    assert said.code == 0, said.err
    return place / "run"


def test_it_answers_as_its_adapter_does(run: Path) -> None:
    asked = ("--prompt", "What is water?", *SHORT)
    said = dpo("generate", run, *asked)
    assert (said.code, said.out) == (0, dpo("generate", run / "adapter", *asked).out)
    talk = dpo("chat", run, *SHORT, stdin="What is water?\n/base\nWhat is water?\n")
    assert talk.code == 0 and talk.out.startswith(said.out)
    assert f"this run's reference is not its base: it is {run.parent / 'reference'}" in talk.err


def test_what_needs_the_reference_is_refused_before_anything_is_loaded(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = run.parent / "pairs.jsonl"
    monkeypatch.setattr(loading, "load_chat_model", lambda *_, **__: pytest.fail("the base was loaded"))
    for command in (
        ("score", run, pairs),
        ("eval", run, "--judge", "length"),
        ("generate", run, "--prompt", "a", "--base"),
        ("judge", "check", pairs, "--judge", f"implicit:{run}"),
    ):
        said = dpo(*command)
        assert said.code == 1 and f"reference is another model ({run.parent / 'reference'})" in said.err, said
        assert f"name {run / 'adapter'} instead" in said.err


def test_the_hint_is_a_way_on(run: Path) -> None:
    assert dpo("score", run / "adapter", run.parent / "pairs.jsonl").code == 0


def test_against_a_named_model_it_is_evaluated_without_margins_and_kl(
    run: Path, tiny_base: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    asked = ("--temperatures", "1", "--prompts", "2", "--max-new-tokens", "4", "--against", tiny_base)
    said = dpo("eval", copy, "--judge", "length", *asked)
    assert said.code == 0, said.err
    assert "no margins and no KL" in said.err
    found = json.loads((copy / "evaluation" / "winrate.json").read_text())
    assert found["held_out"] == {} and found["temperatures"][0]["kl"] is None
    refused = dpo("eval", copy, "--judge", "implicit", *asked)
    assert refused.code == 1 and "reference is another model" in refused.err
