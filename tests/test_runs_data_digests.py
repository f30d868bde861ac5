"""What a run keeps of its data: it never continues with other pairs, nor with another day's date in its prompts."""

from __future__ import annotations

import datetime
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dpo_studio.errors import RunError
from dpo_studio.models.tokenizer_settings import load_encoder
from dpo_studio.runs.data_digests import date_of
from dpo_studio.runs.folder import RunFolder
from tests.tiny_models import tiny_folder
from tests.tiny_runs import Said, dpo, tiny_rows, write_recipe, write_rows
from tests.tiny_tokenizers import CHATML

Rows = list[dict[str, Any]]
ROWS = tiny_rows(20)
DATED = "{{- 'Today: ' + strftime_now('%d %b %Y') + '\\n' -}}" + CHATML
FIRST, LATER = datetime.date(2031, 5, 17), datetime.date(2032, 11, 2)


@pytest.fixture(scope="module")
def begun(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe of a run with two of its four steps behind it, on the chat template in a file beside it."""
    place = tmp_path_factory.mktemp("begun")
    (place / "chat.jinja").write_text(CHATML)
    recipe = write_recipe(
        place / "r.yaml", tiny_base, rows=ROWS, model={"chat_template": "chat.jinja"}, training={"max_steps": 2}
    )
    assert dpo("train", recipe).code == 0
    return recipe


@pytest.fixture
def copied(begun: Path, tmp_path: Path) -> Iterator[Path]:
    """That recipe, its data to be changed at will; the run is a copy at RUN below."""
    shutil.copytree(begun.parent / "run", tmp_path / "run")
    files = {file: file.read_bytes() for file in (begun.parent / "pairs.jsonl", begun.parent / "chat.jinja")}
    yield begun
    for file, content in files.items():
        file.write_bytes(content)


def longer(recipe: Path, run: Path, *more: str) -> Said:
    return dpo("train", recipe, "--set", f"run.folder={run}", "--set", "training.max_steps=4", *more)


def steps(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


# Other pairs


def place_of(run: Path, side: str) -> int:
    """The second source row of a side."""
    return int(json.loads((run / "data.json").read_text())[side]["rows"][1])


def _answer(rows: Rows, at: int) -> Rows:
    return [row | {"chosen": row["chosen"] + " then"} if place == at else row for place, row in enumerate(rows)]


def _swapped(rows: Rows, at: int) -> Rows:
    other = {"chosen": rows[at]["rejected"], "rejected": rows[at]["chosen"]}
    return [row | other if place == at else row for place, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("change", "side", "words", "more"),
    [
        (_answer, "train", "training pairs", []),
        (_answer, "held_out", "held-out pairs", ["--dry-run"]),
        (_swapped, "train", "training pairs", ["--dry-run"]),
        (_swapped, "held_out", "held-out pairs", []),
    ],
)
def test_a_changed_pair_is_refused_with_its_row(
    change: Callable[[Rows, int], Rows], side: str, words: str, more: list[str], copied: Path, tmp_path: Path
) -> None:
    row = place_of(tmp_path / "run", side)
    write_rows(copied.parent / "pairs.jsonl", change(ROWS, row))
    before = {file: file.read_bytes() for file in sorted((tmp_path / "run").rglob("*")) if file.is_file()}
    said = longer(copied, tmp_path / "run", *more)
    assert (said.code, said.out) == (1, "")
    assert f"is a run on other data:\n    {words}: 1 changed (row {row})" in said.err
    assert "Traceback" not in said.err
    assert {file: file.read_bytes() for file in sorted((tmp_path / "run").rglob("*")) if file.is_file()} == before


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([*ROWS, *tiny_rows(40, seed=3)[20:]], " added (row"),
        (ROWS[:-6], " removed (row"),
        (ROWS[::-1], "in another order"),
        (tiny_rows(20, seed=5), " changed (row"),
    ],
)
def test_other_rows_are_refused(rows: Rows, words: str, copied: Path, tmp_path: Path) -> None:
    write_rows(copied.parent / "pairs.jsonl", rows)
    said = longer(copied, tmp_path / "run")
    assert said.code == 1
    assert "is a run on other data" in said.err
    assert words in said.err
    assert steps(tmp_path / "run") == [0, 1, 2]


def test_another_template_is_refused_by_name(copied: Path, tmp_path: Path) -> None:
    (copied.parent / "chat.jinja").write_text(CHATML.replace("helpful assistant", "grumpy assistant"))
    said = longer(copied, tmp_path / "run")
    assert said.code == 1
    assert "the chat template is another" in said.err
    assert "training pairs: " in said.err


def test_a_template_that_writes_the_same_is_told_of(copied: Path, tmp_path: Path) -> None:
    (copied.parent / "chat.jinja").write_text("{#- a remark -#}" + CHATML)
    said = longer(copied, tmp_path / "run")
    assert said.code == 0, said.err
    assert "the chat template is another" in said.err
    assert "still has the same ids" in said.err


def test_another_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base")
    recipe = write_recipe(tmp_path / "r.yaml", base, rows=ROWS, training={"max_steps": 1})
    assert dpo("train", recipe).code == 0
    file = base / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    file.write_text(json.dumps(tokenizer))
    said = longer(recipe, tmp_path / "run")
    assert said.code == 1
    assert "the tokenizer's vocabulary is another" in said.err


def test_rows_that_are_not_trained_on_may_come_and_go(copied: Path, tmp_path: Path) -> None:
    """A refused row before all others moves every row, and changes nothing that is learned."""
    write_rows(copied.parent / "pairs.jsonl", [{"prompt": "", "chosen": "", "rejected": ""}, *ROWS])
    said = longer(copied, tmp_path / "run")
    assert said.code == 0, said.err
    assert "other data" not in said.err
    assert "data.json" not in said.err
    assert "digest" not in said.err
    assert "another" not in said.err
    assert steps(tmp_path / "run") == [0, 1, 2, 3, 4]


def test_a_run_of_an_older_version_continues_and_says_so_once(copied: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "data.json").unlink()
    said = longer(copied, tmp_path / "run")
    assert said.code == 0, said.err
    assert said.err.count("stored no digest of its pairs") == 1
    again = longer(copied, tmp_path / "run", "--set", "training.max_steps=5", "--dry-run")
    assert again.code == 0, again.err
    assert "stored no digest" not in again.err


def test_a_damaged_file_is_named(copied: Path, tmp_path: Path) -> None:
    file = tmp_path / "run" / "data.json"
    for text in ("", "[]", "{", '{"date": "today"}', file.read_text()[:-9]):
        file.write_text(text)
        with pytest.raises(RunError, match=r"data\.json"):
            date_of(RunFolder(tmp_path / "run"))
    said = longer(copied, tmp_path / "run")
    assert said.code == 1
    assert "data.json: " in said.err
    assert "Traceback" not in said.err


def test_a_finished_run_says_so_without_its_data(copied: Path, tmp_path: Path) -> None:
    (copied.parent / "pairs.jsonl").unlink()
    said = dpo("train", copied, "--set", f"run.folder={tmp_path / 'run'}")
    assert said.code == 0
    assert "is finished: 2 steps" in said.err


def test_a_run_that_has_learned_nothing_begins_with_any_pairs(copied: Path, tmp_path: Path) -> None:
    """As where a start was killed before its first checkpoint."""
    for name in ("checkpoints", "adapter"):
        shutil.rmtree(tmp_path / "run" / name)
    (tmp_path / "run" / "result.json").unlink()
    write_rows(copied.parent / "pairs.jsonl", tiny_rows(20, seed=5))
    said = longer(copied, tmp_path / "run")
    assert said.code == 0, said.err
    assert steps(tmp_path / "run") == [0, 1, 2, 3, 4]


# The date


def on(day: datetime.date, monkeypatch: pytest.MonkeyPatch) -> None:
    class Date(datetime.date):
        @classmethod
        def today(cls) -> Any:
            return day

    monkeypatch.setattr(datetime, "date", Date)


@pytest.fixture(scope="module")
def dated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe on a model whose template writes the date."""
    place = tmp_path_factory.mktemp("dated")
    base = tiny_folder(place / "base")
    (base / "chat_template.jinja").write_text(DATED)
    return write_recipe(place / "r.yaml", base, rows=ROWS)


@pytest.fixture(scope="module")
def dated_run(dated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its four steps, all on the first day."""
    run = tmp_path_factory.mktemp("dated-run") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        on(FIRST, monkeypatch)
        assert dpo("train", dated, "--set", f"run.folder={run}").code == 0
    return run


def weights(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def test_a_run_continued_on_another_day_keeps_its_date(
    dated: Path, dated_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes as if all its steps were taken on the first day."""
    on(FIRST, monkeypatch)
    changes = ["--set", f"run.folder={tmp_path / 'run'}"]
    assert dpo("train", dated, *changes, "--set", "training.max_steps=2").code == 0
    on(LATER, monkeypatch)
    said = longer(dated, tmp_path / "run")
    assert said.code == 0, said.err
    assert weights(tmp_path / "run") == weights(dated_run)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (dated_run / "metrics.jsonl").read_bytes()


def test_a_run_is_scored_on_its_date_and_a_model_on_todays(
    dated: Path, dated_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = dated.parent / "pairs.jsonl"

    def scored(name: Path) -> list[dict[str, Any]]:
        said = dpo("score", name, pairs, "--dtype", "float32")
        assert said.code == 0, said.err
        return said.lines

    on(FIRST, monkeypatch)
    run, base = scored(dated_run), scored(dated.parent / "base")
    on(LATER, monkeypatch)
    assert scored(dated_run) == run
    assert scored(dated.parent / "base") != base


VERBS = {
    "generate": ["generate", "RUN", "--prompt", "How far is the moon?", "--max-new-tokens", "2"],
    "generate, its adapter": ["generate", "RUN/adapter", "--prompt", "How far is the moon?", "--max-new-tokens", "2"],
    "chat": ["chat", "RUN", "--max-new-tokens", "2"],
    "eval": ["eval", "RUN", "--judge", "length", "--prompts", "2", "--max-new-tokens", "2"],
    "export": ["export", "RUN", "OUT", "--to", "merged", "--force"],
}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_writes_the_run_s_date(
    verb: str, dated_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(dated_run, tmp_path / "run")
    given: list[object] = []

    def watched(place: Path, section: Any, *, today: datetime.date | None = None) -> Any:
        given.append(today)
        return load_encoder(place, section, today=today)

    monkeypatch.setattr("dpo_studio.models.folder.load_encoder", watched)
    on(LATER, monkeypatch)
    names = {"RUN": tmp_path / "run", "RUN/adapter": tmp_path / "run" / "adapter", "OUT": tmp_path / "out"}
    said = dpo(*(names.get(part, part) for part in VERBS[verb]), stdin="How far is the moon?\n")
    assert said.code == 0, said.err
    assert given
    assert {str(date) for date in given} == {str(FIRST)}


def test_all_runs_of_a_sweep_have_one_date(
    dated: Path, dated_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second run begins on a later day than the first: a sweep that was stopped between them."""
    out = tmp_path / "sweep"
    shutil.copytree(dated_run, out / "objective.beta=0.1")
    on(LATER, monkeypatch)
    said = dpo("sweep", dated, "--set", "objective.beta=0.1,0.5", "--out", out)
    assert said.code == 0, said.err
    assert "objective.beta=0.1 is finished" in said.err
    dates = {json.loads((run / "data.json").read_text())["date"] for run in out.glob("objective*")}
    assert dates == {str(FIRST)}
