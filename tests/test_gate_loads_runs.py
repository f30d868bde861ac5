"""A stranger's run is a stranger's model: none of its files stands for one of this machine, no number in them is
believed unseen, and an export holds only what was read as tensors and settings."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from dpo_studio.errors import DPOStudioError, RunError
from dpo_studio.learning.checkpoints import newest_checkpoint
from dpo_studio.reports.html import write_report
from dpo_studio.runs.data_digests import date_of, recipe_of
from dpo_studio.runs.folder import RunFolder
from dpo_studio.workflows.exporting.cards import adapter_card
from tests.guard_words import words_of
from tests.tiny_runs import dpo, tiny_rows, write_recipe, write_rows

SECRET = "a private key that no export may hold"  # noqa: S105 - a text to look for


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_run, tmp_path / "run")


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    file = tmp_path / "elsewhere" / "id_rsa"
    file.parent.mkdir()
    file.write_text(SECRET)
    return file


def set_in_recipe(run: Path, section: str, **changes: Any) -> None:
    file = run / "recipe.yaml"
    raw = yaml.safe_load(file.read_text())
    raw[section] |= changes
    file.write_text(yaml.safe_dump(raw))


def refusal(act: Callable[[], object]) -> DPOStudioError:
    with pytest.raises(DPOStudioError) as refused:
        act()
    assert "\n" not in refused.value.message and SECRET not in str(refused.value)
    return refused.value


def all_text(folder: Path) -> str:
    return "".join(file.read_bytes().decode("latin-1") for file in folder.rglob("*") if file.is_file())


# Templates


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        *(("secret", "adapter"), ("link", "merged"), ("folder", "adapter"), ("pipe", "adapter"), ("none", "gptq")),
        *(("large", "merged"), ("secret", "merged")),
    ],
)
def test_a_template_that_a_run_names_does_not_leave_with_an_export(
    run: Path, secret: Path, tmp_path: Path, kind: str, form: str
) -> None:
    """Whatever file of this machine stands there: by its own name, through a link in the run, or none to read."""
    named = secret
    if kind == "link":
        named = run / "chat_template.jinja"
        named.symlink_to(secret)
    elif kind == "folder":
        named = tmp_path
    elif kind == "pipe":
        named = tmp_path / "pipe"
        os.mkfifo(named)
    elif kind == "none":
        named = tmp_path / "gone"
    elif kind == "large":
        named = Path("/dev/zero")
    set_in_recipe(run, "model", chat_template=str(named))
    before = time.monotonic()
    said = dpo("export", run, tmp_path / "out", "--to", form)
    assert said.code == 1 and "chat template" in said.err and SECRET not in said.err, said.err
    assert not (tmp_path / "out").exists()
    assert time.monotonic() - before < 60


def test_nor_is_it_put_into_any_prompt(run: Path, secret: Path, tmp_path: Path) -> None:
    set_in_recipe(run, "model", chat_template=str(secret))
    rows = write_rows(tmp_path / "two.jsonl", tiny_rows(2))
    for verb in (("score", run, rows), ("generate", run, "--prompt", "a"), ("chat", run), ("eval", run)):
        said = dpo(*verb)
        assert said.code == 1 and "which is not the one it was made with" in said.err, said.err
    (run / "data.json").unlink()  # then nobody can say
    assert "and no digest of the one it was made with" in refusal(lambda: recipe_of(RunFolder(run))).message


def test_a_run_s_own_template_goes_with_it(tiny_base: Path, tmp_path: Path) -> None:
    """As long as it is the one that the run was made with."""
    own = tmp_path / "own.jinja"
    own.write_text("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
                   "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")  # fmt: skip
    recipe = write_recipe(
        tmp_path / "r.yaml", tiny_base, model={"chat_template": str(own)}, training={"max_steps": 1, "save_every": 1}
    )
    assert (said := dpo("train", recipe)).code == 0, said.err
    assert (said := dpo("export", tmp_path / "run", tmp_path / "out", "--to", "adapter")).code == 0, said.err
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == own.read_text()
    own.write_text(own.read_text() + SECRET)
    said = dpo("export", tmp_path / "run", tmp_path / "again", "--to", "adapter")
    assert said.code == 1 and not (tmp_path / "again").exists()


# Links


PARTS = (
    *("adapter/adapter_model.safetensors", "adapter/adapter_config.json", "recipe.yaml", "recipe.typed.yaml"),
    *("data.json", "result.json", "metrics.jsonl", "environment.json", "adapter", "checkpoints", "evaluation"),
    "checkpoints/step-4/adapter/adapter_model.safetensors",
)


@pytest.mark.parametrize("part", PARTS)
def test_no_part_of_a_run_is_a_link_that_leads_out(run: Path, tmp_path: Path, part: str) -> None:
    """A sound file elsewhere would be taken for the run's own, and go into its export or report."""
    (run / "evaluation").mkdir(exist_ok=True)
    (run / part).rename(tmp_path / "moved")
    (run / part).symlink_to(tmp_path / "moved")
    said = dpo("export", run, tmp_path / "out", "--to", "adapter")
    assert said.code == 1 and "is a link that points out of the run" in said.err, said.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["result.json", "data.json", "metrics.jsonl", "adapter/x", "checkpoints/step-4/x"])
def test_no_part_of_a_run_is_a_pipe(run: Path, part: str) -> None:
    (run / part).unlink(missing_ok=True)
    os.mkfifo(run / part)
    assert "is a named pipe" in refusal(RunFolder(run).recipe).message


def test_links_within_a_run_and_to_a_whole_run_are_fine(run: Path, tmp_path: Path) -> None:
    """And what lies beside its parts is nobody's concern."""
    (run / "notes").symlink_to(tmp_path)
    (run / "evaluation").mkdir(exist_ok=True)
    (run / "evaluation" / "again.json").symlink_to("../result.json")
    (tmp_path / "named").symlink_to(run)
    assert RunFolder(tmp_path / "named").recipe() is not None


def test_a_run_in_the_hub_s_cache_is_all_links(run: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models--a--run"
    snapshot = cache / "snapshots" / "abc"
    (cache / "blobs").mkdir(parents=True)
    for number, file in enumerate(sorted(file for file in run.rglob("*") if file.is_file())):
        place = snapshot / file.relative_to(run)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, cache / "blobs" / str(number))
        place.symlink_to(cache / "blobs" / str(number))
    assert RunFolder(snapshot).recipe() is not None


def test_an_export_is_written_from_what_was_read(run: Path, tmp_path: Path) -> None:
    """Bytes between and behind tensors, text in the header, keys that are no setting of LoRA's: all stay here."""
    file = run / "adapter" / "adapter_model.safetensors"
    tensors = {key: value.clone() for key, value in load_file(file).items()}
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = {"format": "pt", "note": SECRET}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    file.write_bytes(len(head).to_bytes(8, "little") + head + content[8 + length :])
    settings = run / "adapter" / "adapter_config.json"
    auto = {"parent_library": SECRET, "base_model_class": "Evil"}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"auto_mapping": auto, SECRET: None}))
    assert (said := dpo("export", run, tmp_path / "out", "--to", "adapter")).code == 0, said.err
    assert SECRET not in all_text(tmp_path / "out")
    left = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert left.keys() == tensors.keys() and all((left[key] == tensors[key]).all() for key in left)


# Values


BAD = [
    "",
    "{",
    "[]",
    "7",
    "null",
    '"x"',
    "[" * 100_000,
    '{"steps": ' + "1" * 5000 + "}",
    "\xff\xfe",
    '{"a": NaN}',
    "{}",
]


@pytest.mark.parametrize("name", ["result.json", "data.json", "metrics.jsonl", "environment.json", "recipe.yaml"])
def test_a_run_s_file_that_is_none_is_told_in_one_line(run: Path, tmp_path: Path, name: str) -> None:
    """Whatever is read of it: as a card, a report, a date. Each file with another third of them."""
    for number, content in enumerate(BAD[len(name) % 3 :: 3]):
        (run / name).write_bytes(content.encode("latin-1"))
        if number % 2:
            with suppress(DPOStudioError):
                write_report(run)
            continue
        said = dpo("export", run, tmp_path / str(number), "--to", "adapter")
        assert said.code in (0, 1) and "Traceback" not in said.err, (content[:20], said.err)
        assert said.code == 0 or len(said.err.splitlines()) < 4, (content[:20], said.err)


@pytest.mark.parametrize("part", ["result.json", "evaluation/winrate.svg", "environment.json"])
def test_a_report_shows_no_file_of_another_place(run: Path, secret: Path, part: str) -> None:
    (run / "evaluation").mkdir(exist_ok=True)
    (run / part).unlink(missing_ok=True)
    (run / part).symlink_to(secret)
    assert "points out of the run" in refusal(lambda: write_report(run)).message


WRONG: list[Any] = [None, True, "x", [], {}, [1, "x"], ["a", "b"], [None, None], 10**30, -1, {"a": [1]}]


@pytest.mark.parametrize("value", WRONG, ids=words_of)
def test_a_card_shows_numbers_that_are_numbers(run: Path, tmp_path: Path, value: Any) -> None:
    recipe = recipe_of(RunFolder(run))
    for finished in ({"accuracy": value, "accuracy_ci95": [0.1, 0.9]}, {"accuracy": 0.5, "accuracy_ci95": value}):
        assert "held-out accuracy" not in adapter_card(tmp_path / "out", "a/b", recipe, 2, finished).text()
    sound = {"accuracy": 0.5, "accuracy_ci95": [0.25, 0.75]}
    card = adapter_card(tmp_path / "out", "a/b", recipe, 2, sound).text()
    assert "held-out accuracy 50 % (95 % interval 25 % to 75 %)" in card


NO_FILES = ["{", "[" * 100_000, '{"steps": ' + "1" * 5000 + "}", "\xff\xfe"]
"""What is neither JSON nor YAML that can be used."""
NO_OBJECTS = ["[]", "7", '"x"', '{"a": NaN}']


def _wrong(run: Path, name: str) -> list[str]:
    """Contents that the verb that reads this file must refuse: broken, of another type, or one field of one."""
    if name == "recipe.typed.yaml":  # what is no mapping there is taken for nothing typed
        return NO_FILES
    if name == "recipe.yaml":
        raw = yaml.safe_load((run / name).read_text())
        fields = [raw | {key: value} for key in raw for value in (7, "x", [1], {"no_key": 1})]
        return [*NO_FILES, *NO_OBJECTS, "{}", *map(json.dumps, fields)]
    raw = json.loads((run / name).read_text())
    keys = ("steps", "accuracy", "accuracy_ci95") if name == "result.json" else ("train", "held_out", "date")
    fields = [raw | {key: value} for key in keys for value in ("x", True, [1], {"a": 1})]
    return [*NO_FILES, *NO_OBJECTS, "", "null", *map(json.dumps, fields)]


@pytest.mark.parametrize("name", ["result.json", "recipe.yaml", "recipe.typed.yaml", "data.json"])
def test_the_verb_that_reads_a_run_s_file_names_what_is_wrong_in_one_line(run: Path, tmp_path: Path, name: str) -> None:
    """Exit code 1 and one `error:` with the file's name; besides it a hint, and nothing else."""
    verb: tuple[object, ...] = ("score", run, write_rows(tmp_path / "two.jsonl", tiny_rows(2)))
    if name != "data.json":
        verb = ("export", run, tmp_path / "out", "--to", "adapter")
    for content in _wrong(run, name):
        (run / name).write_bytes(content.encode("latin-1"))
        said = dpo(*verb)
        first, *others = said.err.splitlines() or [""]
        assert said.code == 1 and first.startswith("error: ") and name in first, (content[-90:], said.err[:600])
        assert all(line.startswith("  hint: ") for line in others), (content[-90:], said.err[:600])


@pytest.mark.parametrize("key", ["date", "template", "tokenizer", "train", "held_out"])
@pytest.mark.parametrize("value", WRONG, ids=words_of)
def test_what_a_run_keeps_of_its_data_is_of_its_kind(run: Path, key: str, value: Any) -> None:
    """Digests are compared, whatever they are; a date and rows that are none are refused, and named."""
    file = run / "data.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    if key in ("template", "tokenizer"):
        assert date_of(RunFolder(run)) is not None
    else:
        assert "data.json cannot be read" in refusal(lambda: date_of(RunFolder(run))).message


@pytest.mark.parametrize(
    "train", [{"rows": ["x"], "digests": "a" * 16}, {"rows": [1e400], "digests": "a" * 16}, {"rows": 7}, {"rows": [0]}]
)
def test_rows_of_a_run_are_numbers(run: Path, train: Any) -> None:
    file = run / "data.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"train": train}))
    assert "data.json" in refusal(lambda: date_of(RunFolder(run))).message


@pytest.mark.parametrize("name", ["manifest.json", "state.json"])
@pytest.mark.parametrize("content", BAD, ids=[text[:12] for text in BAD])
def test_a_checkpoint_with_a_file_that_is_none_is_passed_over(run: Path, name: str, content: str) -> None:
    newest = newest_checkpoint(run / "checkpoints")
    assert newest is not None
    (newest / name).write_bytes(content.encode("latin-1"))
    said: list[str] = []
    assert newest_checkpoint(run / "checkpoints", said.append) != newest
    assert newest.name in said[0]


def test_a_pipe_in_a_checkpoint_is_not_waited_for(run: Path) -> None:
    newest = newest_checkpoint(run / "checkpoints")
    assert newest is not None
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["pipe"] = {"bytes": 0, "sha256": "x"}
    (newest / "manifest.json").write_text(json.dumps(manifest))
    os.mkfifo(newest / "pipe")
    said: list[str] = []
    newest_checkpoint(run / "checkpoints", said.append)
    assert newest.name in said[0]


@pytest.mark.parametrize(
    "line", ['{"step": true}', '{"step": "1"}', "[" * 100_000, '{"step": 1e3}', "7", '{"step": NaN}']
)
def test_a_line_that_is_none_ends_the_lines(run: Path, line: str) -> None:
    (run / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    assert list(RunFolder(run).lines("metrics.jsonl")) == [{"step": 1}]


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("accuracy_ci95", " ", "accuracy_ci95 is not two numbers"),
        ("accuracy_ci95", [0.1], "accuracy_ci95 is not two numbers"),
        ("pairs", "many", "pairs is not a number"),
        ("longer_wins", True, "longer_wins is not a number"),
        ("steps", [4], "steps is not a number"),
    ],
)
def test_a_result_s_numbers_are_numbers_before_they_are_printed(
    key: str, value: object, says: str, tiny_run: Path, tmp_path: Path
) -> None:
    """`dpo train` of a finished run prints them."""
    run = shutil.copytree(tiny_run, tmp_path / "run")
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps(result | {key: value}))
    with pytest.raises(RunError, match=says):
        RunFolder(run).result()


def test_a_run_s_template_has_no_relative_path(run: Path) -> None:
    """It would be another file in every working directory."""
    set_in_recipe(run, "model", chat_template="../own.jinja")
    said = dpo("export", run, run.parent / "out", "--to", "adapter")
    assert said.code == 1
    assert "names ../own.jinja as chat template, which is not an absolute path" in said.err


def test_a_finished_run_whose_result_lost_a_number_is_still_finished(run: Path) -> None:
    """Each number is printed only if it is there."""
    result = json.loads((run / "result.json").read_text())
    for name in ("accuracy", "accuracy_ci95", "accuracy_before", "longer_wins"):
        (run / "result.json").write_text(json.dumps({key: result[key] for key in result if key != name}))
        said = dpo("train", run / "recipe.yaml", "--set", f"run.folder={run}")
        assert said.code == 0, said.err
        assert "is finished" in said.err and "held-out accuracy" not in said.out
