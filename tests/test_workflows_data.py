"""`dpo data convert` and `dpo data split` as a person types them: what they leave, say and refuse."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo_studio.config import HeldOutSection, SourceSection
from dpo_studio.preferences.sources import read_pairs
from dpo_studio.preferences.split import split_pairs
from tests.tiny_runs import dpo, write_rows

ROWS: list[Any] = [
    {
        "instruction": "Why?",
        "input": None,
        "output_1": "A",
        "output_2": "Bé\u2028",
        "preference": 2,
        "dataset": "koala",
    },
    {"instruction": "Why?", "output_1": "A", "output_2": "B", "preference": "1.5"},
    {"instruction": "How?", "output_1": "A", "output_2": True, "preference": 1},
    [],
]
PAIR = {
    "prompt": [{"role": "user", "content": "Why?"}],
    "chosen": [{"role": "assistant", "content": "Bé\u2028"}],
    "rejected": [{"role": "assistant", "content": "A"}],
    "source": "koala",
}
REFUSED = [
    {"row": 1, "reason": "tie"},
    {"row": 2, "reason": "rejected is neither text nor messages", "seen": "True"},
    {"row": 3, "reason": "row is not a JSON object"},
]


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def test_convert(tmp_path: Path) -> None:
    out = tmp_path / "pairs.jsonl"
    said = dpo("data", "convert", write_rows(tmp_path / "in.jsonl", ROWS), out)
    assert said.code == 0, said.err
    assert said.out == f"{out}\n"
    assert "4 rows (alpaca-eval), 1 pairs" in said.err
    assert "1 rows refused: tie" in said.err
    assert lines(out) == [PAIR]
    assert lines(tmp_path / "pairs.refused.jsonl") == REFUSED
    assert sorted(file.name for file in tmp_path.iterdir()) == ["in.jsonl", "pairs.jsonl", "pairs.refused.jsonl"]


def test_convert_through_a_mapping(tmp_path: Path) -> None:
    """The issue's own example, with a tie in its label and a source whose name says a split."""
    source = write_rows(
        tmp_path / "in.jsonl", [row | {"x": {"v": row.pop("preference")}} for row in map(dict, ROWS[:2])]
    )
    options = ["--map", "prompt=instruction", "--map", "first=output_1", "--map", "second=output_2"]
    options += ["--map", "label=x.v", "--label", "first=1", "--label", "second=2", "--label", "tie=1.5", "--json"]
    said = dpo("data", "convert", f"{source}:train", tmp_path / "pairs.jsonl", *options)
    assert json.loads(said.out) == {
        "source": f"{source}:train",
        "format": "mapped",
        "rows": 2,
        "pairs": 1,
        "refused": {"tie": 1},
        "refused_first": {"tie": {"row": 1, "seen": ""}},
        "out": str(tmp_path / "pairs.jsonl"),
        "refused_out": str(tmp_path / "pairs.refused.jsonl"),
    }
    assert lines(tmp_path / "pairs.jsonl") == [PAIR]


def test_nothing_is_replaced_without_overwrite(tmp_path: Path) -> None:
    source, out = write_rows(tmp_path / "in.jsonl", ROWS), tmp_path / "pairs.jsonl"
    for kept in (out, tmp_path / "pairs.refused.jsonl"):
        kept.write_text("mine")
        said = dpo("data", "convert", source, out)
        assert (said.code, said.out) == (1, "")
        assert f"{kept} exists\n  hint: --overwrite replaces it" in said.err
        assert kept.read_text() == "mine"
        assert len(list(tmp_path.iterdir())) == 2
        kept.unlink()
    out.write_text("mine")
    assert dpo("data", "convert", source, out, "--overwrite").code == 0
    assert lines(out) == [PAIR]
    said = dpo("data", "convert", out, out, "--overwrite")  # the source itself
    assert said.code == 2 and "is what is read" in said.err
    assert lines(out) == [PAIR]


@pytest.mark.parametrize(
    ("rows", "code", "message"),
    [
        ([{"instruction": "q"}], 1, "its columns (instruction) are not those of a known format"),
        (ROWS[1:], 1, "none of its 3 rows can be used (read as alpaca-eval): 1 x tie"),
        ([*ROWS, "{broken"], 1, "in.jsonl, line 5: not JSON"),
        ([], 1, "has no rows"),
    ],
)
def test_what_cannot_be_converted_leaves_nothing(rows: list[Any], code: int, message: str, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", rows)
    said = dpo("data", "convert", source, tmp_path / "pairs.jsonl")
    assert said.code == code
    assert message in said.err
    assert "hint: " in said.err
    assert [file.name for file in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "in.jsonl", "no/such/out.jsonl"], "no such folder"),
        (["convert", "in.jsonl", "."], "is not a file"),
        (["convert", "in.jsonl", "/dev/zero"], "is not a file"),
        (["convert", "", "out.jsonl"], "the source is empty"),
        (["convert", "in.jsonl", "out.jsonl", "--map", "prompt"], "'prompt' is not of the form name=value"),
        (["convert", "in.jsonl", "out.jsonl", "--label", "=1"], "'=1' is not of the form name=value"),
        (["split", "in.jsonl", "--train", "a.jsonl"], "Missing option '--held-out'"),
        (["split", "in.jsonl", "--train", "a.jsonl", "--held-out", "a.jsonl"], "would be written twice"),
        (["split", "in.jsonl", "--train", "a.jsonl", "--held-out", "b.jsonl", "--fraction", "1"], "between 0 and 1"),
        (["split", "in.jsonl", "--train", "a.jsonl", "--held-out", "b.jsonl", "--fraction", "nan"], "between 0 and 1"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "in.jsonl", ROWS)
    said = dpo("data", *arguments)
    assert (said.code, said.out) == (2, "")
    assert message in said.err
    assert [file.name for file in tmp_path.iterdir()] == ["in.jsonl"]


def test_split_takes_what_a_recipe_takes(tmp_path: Path) -> None:
    """Without sources the held-out prompts are those of `data.held_out.fraction` under the same seed."""
    rows = [{"prompt": f"q{n % 40}", "chosen": "a", "rejected": "b" if n % 9 else "a"} for n in range(100)]
    source = write_rows(tmp_path / "in.jsonl", rows)
    train, held_out = tmp_path / "t.jsonl", tmp_path / "h.jsonl"
    said = dpo("data", "split", source, "--train", train, "--held-out", held_out, "--fraction", "0.3", "--seed", "5")
    assert said.out == f"{train}\n{held_out}\n"
    pairs = read_pairs(SourceSection(source=str(source)))
    split = split_pairs(pairs.pairs, HeldOutSection(fraction=0.3), seed=5)
    assert [line["prompt"][0]["content"] for line in lines(train)] == [p.prompt[0].content for p in split.train]
    assert [line["prompt"][0]["content"] for line in lines(held_out)] == [p.prompt[0].content for p in split.held_out]
    assert len(lines(tmp_path / "t.refused.jsonl")) == len(pairs.refused) == 12  # rows 0, 9, ... 99
    assert f"{len(split.train)} pairs to learn from, {len(split.held_out)} held out" in said.err


def test_split_takes_its_share_of_every_source(tmp_path: Path) -> None:
    """40 prompts of one source, 10 of another, 3 of none: a fifth is 8, 2 and (0.6 rounds to) 1; three rows each."""
    counts = {"large": 40, "small": 10, None: 3}
    rows = [
        {"prompt": f"{name} {n}", "chosen": "a", "rejected": f"b{copy}"} | ({"source": name} if name else {})
        for name, count in counts.items()
        for n in range(count)
        for copy in range(3)
    ]
    source = write_rows(tmp_path / "in.jsonl", rows)
    options = ["--train", tmp_path / "t.jsonl", "--held-out", tmp_path / "h.jsonl", "--fraction", "0.2", "--json"]
    summary = json.loads(dpo("data", "split", source, *options).out)
    assert summary["by_source"] == {
        "large": {"train": 96, "held_out": 24},
        "small": {"train": 24, "held_out": 6},
        "(no source)": {"train": 6, "held_out": 3},
    }
    assert (summary["train"], summary["held_out"]) == (126, 33)
    assert {line.get("source") for line in lines(tmp_path / "h.jsonl")} == {"large", "small", None}


def test_one_prompt_cannot_be_split(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b"}] * 3)
    said = dpo("data", "split", source, "--train", tmp_path / "t.jsonl", "--held-out", tmp_path / "h.jsonl")
    assert said.code == 1
    assert "all 3 pairs fall on one side" in said.err
    assert [file.name for file in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_conversion_that_is_ended_leaves_no_half_file(number: signal.Signals, tmp_path: Path) -> None:
    """A real process, ended in the middle of 300,000 rows; only SIGKILL leaves its scratch files behind."""
    source, out = tmp_path / "in.jsonl", tmp_path / "pairs.jsonl"
    source.write_text("".join(f'{{"prompt": "q{n}", "chosen": "a", "rejected": "b"}}\n' for n in range(300_000)))
    out.write_text("mine")
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += "from dpo_studio.cli import main; main()"
    command = [sys.executable, "-c", code, "data", "convert", str(source), str(out), "--overwrite"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        deadline = time.monotonic() + 30
        while not any(file.stat().st_size for file in tmp_path.glob(".pairs.jsonl.*")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(number)
        said = process.communicate(timeout=30)[1].decode()
    assert process.returncode == {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -9}[number]
    assert "Traceback" not in said
    assert out.read_text() == "mine"
    left = {file.name for file in tmp_path.iterdir()}
    assert (left == {"in.jsonl", "pairs.jsonl"}) == (number != signal.SIGKILL)
    assert "pairs.refused.jsonl" not in left


def test_a_full_disk_leaves_no_half_file(tmp_path: Path) -> None:
    """A limit on the size of a file stands for the disk; Python is told to get an error instead of a signal."""
    source = write_rows(
        tmp_path / "in.jsonl", [{"prompt": f"q{n}", "chosen": "a", "rejected": "b"} for n in range(5000)]
    )
    code = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    code += "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000,) * 2); from dpo_studio.cli import main; main()"
    command = [sys.executable, "-c", code, "data", "convert", str(source), str(tmp_path / "pairs.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "error: " in done.stderr
    assert "Traceback" not in done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["in.jsonl"]


def test_the_worked_example_of_the_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows, the command and the recipe of docs/data.md give the two pairs it names, and one tie."""
    text = (Path(__file__).parent.parent / "docs" / "data.md").read_text(encoding="utf-8")
    rows, recipe = (re.search(rf"```{kind}\n(.*?)```", text, re.DOTALL) for kind in ("json", "yaml"))
    command = re.search(r"^dpo (data convert verdicts\.jsonl .*?)\n```", text, re.DOTALL | re.MULTILINE)
    assert rows
    assert recipe
    assert command
    monkeypatch.chdir(tmp_path)
    Path("verdicts.jsonl").write_text(rows[1], encoding="utf-8")
    assert dpo(*shlex.split(command[1].replace("\\\n", " "))).code == 0
    pairs = [(line["chosen"][0]["content"], line["rejected"][0]["content"]) for line in lines(Path("pairs.jsonl"))]
    assert pairs == [("4", "5"), ("6", "7")]
    assert lines(Path("pairs.refused.jsonl")) == [{"row": 2, "reason": "tie"}]
    by_recipe = read_pairs(SourceSection(**yaml.safe_load(recipe[1])["data"]["train"]))
    assert by_recipe.pairs == read_pairs(SourceSection(source="pairs.jsonl")).pairs
