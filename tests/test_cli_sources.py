"""Every verb that reads a SOURCE takes the same options for it, and hints name only options that are there."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import typer

import dpo_studio.preferences
from dpo_studio.cli.app import app
from tests.tiny_runs import dpo, tiny_rows, write_rows

HOW = {"--map", "--label", "--format", "--split", "--rows", "--revision"}
VERBS = ["data check", "data convert", "data split", "score", "eval", "quantize", "judge check"]


def options(verb: str) -> set[str]:
    found: Any = typer.main.get_command(app)
    for word in verb.split():
        found = found.commands[word]
    return {option for parameter in found.params for option in parameter.opts}


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_that_reads_pairs_has_every_option_of_a_source(verb: str) -> None:
    assert options(verb) >= HOW


@pytest.mark.parametrize("verb", VERBS)
def test_what_hints_about_pairs_advise_is_an_option_of_the_verb(verb: str) -> None:
    """Their texts say `--map` and the like, whichever verb reads the pairs."""
    folder = Path(dpo_studio.preferences.__file__).parent
    texts = [file.read_text(encoding="utf-8") for file in folder.rglob("*.py")]
    named = {option for text in texts for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)}
    assert "--map" in named
    assert named <= options(verb)


@pytest.fixture(scope="module")
def strange(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same pairs under column names that nobody knows, and under ours."""
    folder, rows = tmp_path_factory.mktemp("strange"), tiny_rows(6, seed=3)
    other = [{"ask": row["prompt"], "good": row["chosen"], "bad": row["rejected"]} for row in rows]
    return write_rows(folder / "strange.jsonl", other), write_rows(folder / "plain.jsonl", rows)


MAP = ("--map", "prompt=ask", "--map", "chosen=good", "--map", "rejected=bad")


def test_score_reads_columns_as_map_says(tiny_base: Path, strange: tuple[Path, Path]) -> None:
    """What the hint of the refusal advises then works: the same numbers as under our own names."""
    other, plain = strange
    refused = dpo("score", tiny_base, other)
    assert refused.code == 1 and "--map" in refused.err
    said = dpo("score", tiny_base, other, *MAP, "--dtype", "float32")
    assert said.code == 0, said.err
    assert said.lines == dpo("score", tiny_base, plain, "--dtype", "float32").lines
    assert len(dpo("score", tiny_base, other, *MAP, "--rows", "2").lines) == 2


def test_convert_and_split_take_a_sample(strange: tuple[Path, Path], tmp_path: Path) -> None:
    said = dpo("data", "convert", strange[0], tmp_path / "out.jsonl", *MAP, "--rows", 3, "--json")
    assert said.code == 0, said.err
    assert json.loads(said.out)["pairs"] == 3
    files = ("--train", tmp_path / "train.jsonl", "--held-out", tmp_path / "held_out.jsonl")
    split = dpo("data", "split", strange[0], *files, *MAP, "--rows", 4, "--fraction", "0.5", "--json")
    assert split.code == 0, split.err
    assert json.loads(split.out)["pairs"] == 4


def test_eval_reads_its_source_as_map_says(tiny_run: Path, strange: tuple[Path, Path], tmp_path: Path) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "run")
    few = ("--judge", "length", "--temperatures", "0", "--max-new-tokens", "4")
    said = dpo("eval", run, "--source", strange[0], *MAP, *few)
    assert said.code == 0, said.err
    alone = dpo("eval", run, *MAP, *few)
    assert alone.code == 2 and "--source" in alone.err
