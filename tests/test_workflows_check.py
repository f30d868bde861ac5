"""`dpo data check` as a command, and its short form before a training."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

import dpo_studio
from dpo_studio.config import SourceSection
from dpo_studio.doctor.findings import DataReport, Example, Finding
from dpo_studio.doctor.text_checks import TextChecks
from dpo_studio.preferences.pair import Pair
from dpo_studio.preferences.sources import open_pairs
from dpo_studio.reports.data_page import render_data_page
from dpo_studio.reports.data_table import plain_report
from tests.tiny_runs import dpo, tiny_rows, write_recipe, write_rows


def swapped(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"chosen": row["rejected"], "rejected": row["chosen"]}


@pytest.fixture
def dirty(tmp_path: Path) -> Path:
    """20 good rows, the first once more, the second the other way round, an empty answer, and no JSON object."""
    rows = tiny_rows(20)
    return write_rows(tmp_path / "dirty.jsonl", [*rows, rows[0], swapped(rows[1]), rows[2] | {"rejected": ""}, [1]])


def test_the_table_begins_with_the_verdict_and_shows_the_rows(dirty: Path) -> None:
    said = dpo("data", "check", dirty)
    first, second, *_ = said.out.splitlines()
    assert said.code == 0
    assert first == (
        "Usable: 22 pairs of 24 rows; look at pairs that occur twice and pairs that occur in both orders first."
    )
    assert "24 rows, 22 pairs, 20 prompts" in second
    assert "row 20: the same pair as row 0" in said.out
    assert "row 21: row 1 prefers the other answer" in said.out


def test_json_is_one_object_on_stdout(dirty: Path) -> None:
    said = dpo("data", "check", dirty, "--json")
    (report,) = said.lines
    assert (report["rows"], report["pairs"], report["usable"], report["prompts"]) == (24, 22, 22, 20)
    assert report["refused"] == {"rejected is empty": 1, "row is not a JSON object": 1}
    by_name = {finding["name"]: finding for finding in report["findings"]}
    assert by_name["opposite-pairs"]["examples"] == [{"row": 21, "text": "row 1 prefers the other answer"}]
    assert all({"title", "level", "count", "of", "does", "todo"} <= finding.keys() for finding in report["findings"])
    assert report["verdict"] == dpo("data", "check", dirty).out.splitlines()[0]


def test_nothing_usable_is_said_and_exit_1(tmp_path: Path, tiny_base: Path) -> None:
    """No row is a pair; or every pair is over max_length with this tokenizer."""
    empty = write_rows(tmp_path / "empty.jsonl", [row | {"chosen": ""} for row in tiny_rows(3)])
    said = dpo("data", "check", empty, "--json")
    assert (said.code, said.lines[0]["verdict"]) == (1, "Nothing usable: none of 3 rows can be trained on.")
    assert said.lines[0]["refused"] == {"chosen is empty": 3}
    good = write_rows(tmp_path / "good.jsonl", tiny_rows(3))
    assert dpo("data", "check", good, "--model", tiny_base).code == 0
    assert dpo("data", "check", good, "--model", tiny_base, "--max-length", 8).code == 1


def test_what_cannot_be_read_is_an_error_with_a_hint(tmp_path: Path) -> None:
    for arguments, code in (
        ([tmp_path / "none.jsonl"], 1),
        ([write_rows(tmp_path / "other.jsonl", [{"a": 1}])], 1),
        (["bundled:everyday", "--too-long", "never"], 2),
        (["bundled:everyday", "--model", tmp_path / "none"], 1),
        (["bundled:everyday", "--chat-template", tmp_path / "none"], 2),
    ):
        said = dpo("data", "check", *arguments)
        assert (said.code, said.out) == (code, "")
        assert "error: " in said.err and "hint: " in said.err


def test_an_unknown_shape_is_read_by_its_columns(tmp_path: Path) -> None:
    rows = [{"q": row["prompt"], "good": row["chosen"], "bad": row["rejected"]} for row in tiny_rows(5)]
    file = write_rows(tmp_path / "pairs.jsonl", rows)
    columns = [word for name in ("prompt=q", "chosen=good", "rejected=bad") for word in ("--map", name)]
    said = dpo("data", "check", file, *columns, "--json")
    assert (said.code, said.lines[0]["pairs"]) == (0, 5)


def test_a_held_out_source_is_compared(tmp_path: Path) -> None:
    rows = tiny_rows(12)
    train, held = write_rows(tmp_path / "train.jsonl", rows[:10]), write_rows(tmp_path / "held.jsonl", rows[8:])
    said = dpo("data", "check", train, "--held-out", held, "--json")
    leak = next(finding for finding in said.lines[0]["findings"] if finding["name"] == "held-out-leak")
    assert (leak["count"], leak["of"], [e["row"] for e in leak["examples"]]) == (2, 4, [0, 1])


def test_a_held_out_source_without_a_pair_is_no_source_without_leaks(tmp_path: Path) -> None:
    train = write_rows(tmp_path / "train.jsonl", tiny_rows(3))
    held = write_rows(tmp_path / "held.jsonl", [row | {"chosen": 1} for row in tiny_rows(3)])
    said = dpo("data", "check", train, "--held-out", held)
    assert said.code == 1
    assert "held.jsonl: none of its 3 rows can be used" in said.err


def test_a_page_never_takes_the_place_of_the_pairs(tmp_path: Path) -> None:
    """Nor is it told after the reading that there is no such folder."""
    pairs = write_rows(tmp_path / "p.jsonl", tiny_rows(3))
    before = pairs.read_bytes()
    (tmp_path / "dir.html").mkdir()
    for page in (pairs, tmp_path / "none" / "p.html", tmp_path / "dir.html"):
        said = dpo("data", "check", pairs, "--html", page)
        assert (said.code, said.out) == (2, "")
        assert "--html" in said.err
    assert pairs.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["dir.html", "p.jsonl"]


def test_where_there_is_no_pair_the_other_checks_were_not_made(tmp_path: Path) -> None:
    said = dpo("data", "check", write_rows(tmp_path / "p.jsonl", [row | {"chosen": 1} for row in tiny_rows(3)]))
    assert "The other checks are of pairs, and there are none." in said.out
    assert "Every check" not in said.out


def test_the_page_holds_no_markup_of_the_data(tmp_path: Path) -> None:
    rows = [*tiny_rows(20), {"prompt": "<script>alert(1)</script>", "chosen": "</table>\u202e<b>x", "rejected": "no"}]
    page = tmp_path / "page.html"
    said = dpo("data", "check", write_rows(tmp_path / "p.jsonl", rows), "--html", page)
    text = page.read_text(encoding="utf-8")
    assert said.code == 0
    assert "<script" not in text and "\u202e" not in text and "</table>\u202e" not in text
    assert "\\u202e&lt;b&gt;x" in text
    assert text.count("<svg") == 1 and "http:" not in text.replace("http://www.w3.org", "")
    assert "Usable: 21 pairs of 21 rows" in text


def test_terminal_escapes_in_the_data_stay_text() -> None:
    finding = Finding("x", "x", 1, 1, "note", "a", "b", examples=(Example(0, "\x1b[2J\nrow 9: forged"),))
    report = DataReport("s\x1b[31m", "trl", 1, 1, 1, 1, {}, [finding])
    assert "\x1b" not in plain_report(report) + render_data_page(report)
    assert "row 0: \\x1b[2J row 9: forged" in plain_report(report)


def test_the_checks_of_text_load_no_torch() -> None:
    code = (
        "import sys; from dpo_studio.cli import main; sys.argv = ['dpo', 'data', 'check', 'bundled:everyday']; main(); "
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.splitlines()[0][:6]) == (0, "Ready:"), done.stderr


def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    """Rows of 11 KB are seen and forgotten: what stays of a pair is hashes and signatures, less than 2 KB."""
    long = {"chosen": "Because. " * 400, "rejected": "No. " * 900}
    kept = []
    for count in (200, 400):
        rows = [long | {"prompt": f"{number} {'Why? ' * 750}"} for number in range(count)]
        file = write_rows(tmp_path / f"{count}.jsonl", rows)
        del rows
        texts = TextChecks()
        tracemalloc.start()
        try:
            for pair in open_pairs(SourceSection(source=str(file))).results:
                assert isinstance(pair, Pair)
                texts.see(pair)
            kept.append(tracemalloc.get_traced_memory()[0])
        finally:
            tracemalloc.stop()
    assert 200 * 500 < kept[1] - kept[0] < 200 * 2_000


# Before a training


def test_a_training_that_would_be_worthless_is_stopped_and_goes_on_anyway(tmp_path: Path, tiny_base: Path) -> None:
    """Half of the pairs contradict the other half. Nothing is written before someone has said so."""
    rows = tiny_rows(20)
    recipe = write_recipe(tmp_path / "r.yaml", tiny_base, rows=[*rows, *map(swapped, rows)])
    said = dpo("train", recipe)
    assert said.code == 1
    assert "error: this run would be worthless: pairs that occur in both orders: " in said.err
    assert "--anyway" in said.err
    assert not (tmp_path / "run").exists()
    assert dpo("train", recipe, "--dry-run").code == 1
    gone_on = dpo("train", recipe, "--anyway", "--set", "training.max_steps=1")
    assert (gone_on.code, (tmp_path / "run" / "result.json").is_file()) == (0, True), gone_on.err
    assert "warning: pairs that occur in both orders" in gone_on.err
    for more in (("train", recipe, "--verify"), ("sweep", recipe, "--set", "objective.beta=0.1,0.2")):
        said = dpo(*more)
        assert said.code == 1 and "--anyway" in said.err
        gone_on = dpo(*more, "--anyway", "--set", "training.max_steps=1")
        assert gone_on.code == 0 and "warning: pairs that occur in both orders" in gone_on.err, gone_on.err


def test_cut_answers_stop_a_training(tmp_path: Path, tiny_base: Path) -> None:
    """40 tokens hold no answer of 4 to 12 words whole, and leave some of each."""
    recipe = write_recipe(tmp_path / "r.yaml", tiny_base)
    cut = ["--set", "data.too_long=cut_answer_end", "--set", "data.max_length=44", "--dry-run"]
    said = dpo("train", recipe, *cut)
    assert said.code == 1
    assert "pairs whose chosen answer loses its end" in said.err
    assert "another data.too_long" in said.err
    assert dpo("train", recipe, *cut, "--anyway").code == 0


def test_a_held_out_source_that_is_the_training_source_stops_it(tmp_path: Path, tiny_base: Path) -> None:
    rows = tiny_rows(20)
    held = write_rows(tmp_path / "held.jsonl", rows[:15])
    recipe = write_recipe(tmp_path / "r.yaml", tiny_base, rows=rows, data={"held_out": {"source": str(held)}})
    assert "held_out" in recipe.read_text()
    said = dpo("train", recipe, "--dry-run")
    assert said.code == 1
    assert "training pairs whose prompt is held out: 15 of 20 (75 %)" in said.err


def test_good_pairs_are_said_to_be(tmp_path: Path, tiny_base: Path) -> None:
    said = dpo("train", write_recipe(tmp_path / "r.yaml", tiny_base), "--dry-run")
    assert said.code == 0
    assert "training pairs: no problems found" in said.err


def test_the_report_as_a_value(dirty: Path) -> None:
    report = dpo_studio.check_source(SourceSection(source=str(dirty)))
    assert json.loads(json.dumps(report.to_plain()))["pairs"] == 22
