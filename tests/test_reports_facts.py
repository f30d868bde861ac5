"""A run folder is read with patience, and what could not be read is said."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from dpo_studio.errors import RunError
from dpo_studio.runs.facts import finite, interval, read_run, share


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_a_half_written_last_line_is_not_missed_and_a_broken_one_inside_is_counted(tmp_path: Path) -> None:
    rows = [{"step": 1, "loss": 0.69}, {"step": 2, "loss": math.nan}, {"step": 3, "loss": 0.5}]
    (tmp_path / "metrics.jsonl").write_text(lines(rows) + '{"step": 4, "lo')
    facts = read_run(tmp_path)
    assert facts.series("loss") == ([1, 3], [0.69, 0.5])
    assert facts.notes == ()
    (tmp_path / "metrics.jsonl").write_text("not json\n[]\n" + lines(rows))
    assert read_run(tmp_path).notes == ("metrics.jsonl: 2 unreadable lines skipped",)


def test_a_line_about_the_same_step_adds_to_it(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(lines([{"step": 1, "loss": 0.6}, {"step": 1, "eval_loss": 0.5}]))
    assert read_run(tmp_path).metrics == [{"step": 1, "loss": 0.6, "eval_loss": 0.5}]


def test_what_is_not_a_finite_number_is_no_number() -> None:
    row = {
        "a": True,
        "b": "1",
        "c": math.inf,
        "d": None,
        "e": 2,
        "f": -0.1,
        "g": [0.1, 0.9],
        "h": [0.1, None],
        "i": [1],
    }
    assert [finite(row, key) for key in "abcdejx"] == [None, None, None, None, 2.0, None, None]
    assert [share(row, key) for key in "ef"] == [None, None]
    assert [interval(row, key) for key in "aghi"] == [None, (0.1, 0.9), None, None]


def test_files_of_another_shape_are_named(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text("[1, 2]")
    (tmp_path / "recipe.yaml").write_text("a: [b\n")
    notes = read_run(tmp_path).notes
    assert notes == (
        "recipe.yaml is not YAML and is shown unchanged",
        "result.json is not a JSON object and was skipped",
    )


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "result.json").mkdir()
    with pytest.raises(RunError, match=r"result\.json is a folder, not a file"):
        read_run(tmp_path)
