"""Two hundred of the mutations of `make faults`, for every day; and that they notice a check that is gone."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

from tests.mutations import mutated

CHECKS = ("dpo_studio.runs.folder:RunFolder.refuse_what_leads_out",)
"""Taken out, each in turn: without it a run's file may be a link to any other."""


def test_two_hundred_mutations_are_survived_and_a_check_that_is_gone_is_noticed() -> None:
    """In one process, whose imports and little model are the most of what this takes. The seed is fixed and printed."""
    command = [sys.executable, "-m", "tests.fuzz", "--readers", "200", "--verbs", "4", "--seed", "30", "--stop-at", "5"]
    command += [word for check in CHECKS for word in ("--without", check)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    said = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment, check=False)
    assert said.returncode == 0, said.stdout[-6000:] + said.stderr[-3000:]
    assert "seed 30: 200 mutations" in said.stdout
    assert all(f"without {check}: found" in said.stdout for check in CHECKS)


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
