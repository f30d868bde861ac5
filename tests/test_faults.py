"""A run survives anything: twelve of the kills of `make faults`, for every day."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.faults import Outcome, put_table, table


def test_twelve_kills_change_no_byte(tmp_path: Path) -> None:
    """In a process of its own, which forks: this one has threads. It also spoils one trial and sees that it fails."""
    command = [sys.executable, "-m", "tests.faults", "--few", "--results", str(tmp_path / "results")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr
    results = [Outcome(**json.loads(line)) for line in (tmp_path / "results").read_text().splitlines()]
    assert len(results) == 12
    assert sum(result.resumed_after > 0 for result in results) >= 6  # from a checkpoint, not from the start


def test_the_table_counts_what_went_well(tmp_path: Path) -> None:
    """Two of a kind, one of them with a byte that differs: 2 trials, 1 the same; text around the table stays."""
    well = Outcome("SIGTERM", "bco", 0, "0.1 s", 143, 2, False, [], 1.0)
    results = [well, Outcome("SIGTERM", "live", 0, "0.2 s", 0, -1, False, ["metrics.jsonl"], 1.0)]
    mark = "<!-- the table of `make faults` -->"
    page = tmp_path / "page.md"
    page.write_text(f"above\n{mark}\nold\n{mark}\nbelow\n")
    put_table(page, table(results))
    text = page.read_text()
    assert "| SIGTERM | bco, live | 2 | 1 | 1 | 1 |" in text
    assert text.startswith("above\n") and text.endswith("\nbelow\n") and "old" not in text
