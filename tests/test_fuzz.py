"""Two hundred of the mutations of `make faults`, for every day; and that they notice checks that are gone."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from dpo_studio.errors import DataError
from dpo_studio.reading import parse_json
from tests.attacks import attacked
from tests.fuzz import OUT_OF_REACH, _without
from tests.mutations import mutated

CHECKS = ("dpo_studio.runs.folder:RunFolder.refuse_what_leads_out", "dpo_studio.scan:_check_file")
"""Taken out, each in turn: without the first a run's file may be a link to any other, without the second a model's."""
GATES = (
    "dpo_studio.scan",
    "dpo_studio.models.adapter_settings:refuse_strange_lora",
    "dpo_studio.models.tokenizer_settings",
    *(f"dpo_studio.sizes:{name}" for name in ("tensor_shapes", "check_numbers", "check_model_size")),
    *(f"dpo_studio.preferences.bounds:{name}" for name in ("reading_rows", "checked", "too_many_values")),
    *(f"dpo_studio.reading:{name}" for name in ("open_regular", "_refuse", "_content", "parse_json", "_object")),
    "dpo_studio.models.folder:ModelFolder.check_files",
    "dpo_studio.runs.folder:RunFolder.refuse_what_leads_out",
)
"""Checks of files that no user has typed the name of; of a module alone, all of those that raise something."""


def _fuzz(*arguments: str) -> str:
    command = [sys.executable, "-m", "tests.fuzz", *arguments, "--seed", "30", "--stop-at", "5"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    said = subprocess.run(command, capture_output=True, text=True, timeout=1800, env=environment, check=False)
    assert said.returncode == 0, said.stdout[-6000:] + said.stderr[-3000:]
    return said.stdout


def test_two_hundred_mutations_are_survived_and_a_check_that_is_gone_is_noticed() -> None:
    """In one process, whose imports and little model are the most of what this takes. The seed is fixed and printed."""
    said = _fuzz("--readers", "200", "--verbs", "4", *(word for check in CHECKS for word in ("--without", check)))
    assert "seed 30: 200 mutations" in said
    assert all(f"without {check}: found by" in said for check in CHECKS)


@pytest.mark.slow
def test_a_thousand_mutations_notice_each_check_that_is_gone() -> None:
    """A check that is gone is one that raises nothing any more. Each is found by a mutation that is named."""
    said = _fuzz("--readers", "1000", "--verbs", "0", *(word for check in GATES for word in ("--without", check)))
    assert "NOT FOUND" not in said
    assert said.count(": found by") >= 20


def test_what_no_mutation_reaches_is_held_by_a_test() -> None:
    """The tests are there, and so are the checks, which can be taken out as any other."""
    for check, held_by in OUT_OF_REACH.items():
        file, name = held_by.split("::")
        assert f"def {name}(" in (Path(__file__).parent / file).read_text()
        with _without(check):
            pass


def test_an_attack_owes_the_words_of_its_refusal(tmp_path: Path) -> None:
    """Else nothing would tell it from a mutation that some other code happens to fail on."""
    config = b'{"model_type": "llama"}'
    drawn = [attacked(random.Random(n), "model/config.json", config, tmp_path, n) for n in range(300)]
    assert all(one.says and (one.content is None) != (one.special is None) for one in drawn)
    assert len({one.what for one in drawn}) > 30


def test_a_check_without_its_refusals_is_the_same_function_for_all_who_have_it() -> None:
    """And comes back afterwards."""
    with _without("dpo_studio.reading:_whole_number"):
        assert parse_json("9" * 101, what="a") == int("9" * 101)
    with _without("dpo_studio.reading:is_deeper"):
        assert parse_json("[" * 150 + "]" * 150, what="a")
    with pytest.raises(DataError):
        parse_json("9" * 101, what="a")
    with pytest.raises(DataError):
        parse_json("[" * 150 + "]" * 150, what="a")


def test_a_mutation_is_its_seed_s_and_another_than_the_file(tmp_path: Path) -> None:
    """So that `--seed N --only M` is the same case again; and few of them change nothing."""
    content = b'{"model_type": "llama", "eos_token_id": [1, 2], "rope": {"a": 1}}'
    for name in ("config.json", "metrics.jsonl", "recipe.yaml"):
        drawn = [mutated(random.Random(f"0:{n}"), name, content, tmp_path) for n in range(60)]
        again = [mutated(random.Random(f"0:{n}"), name, content, tmp_path) for n in range(60)]
        assert [one.what for one in drawn] == [one.what for one in again]
        assert [one.content for one in drawn] == [one.content for one in again]
        assert len({one.content for one in drawn}) > 45
        assert sum(one.content == content for one in drawn) < 5
