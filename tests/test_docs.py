"""Every command and every recipe that the documents show is one that exists."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from dpo_studio.cli.app import app
from dpo_studio.config import load_recipe, parse_override, validate_recipe
from dpo_studio.errors import install_hint
from dpo_studio.objectives import OBJECTIVES, Mixture

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
_FENCE = re.compile(r"^ *```(\w*)[^\n]*\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
_INLINE = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"")


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """Language and content of every fenced block."""
    for match in _FENCE.finditer(text):
        yield match[1], match[2]


def commands(text: str) -> Iterator[str]:
    """Every `dpo ...` that a reader could type: in a shell block, or between backticks on a line not `(planned)`."""
    for language, content in blocks(text):
        if language in ("", "bash", "sh", "shell", "console"):
            joined = content.replace("\\\n", " ")
            yield from (line.strip().removeprefix("$ ") for line in joined.splitlines() if _is_command(line))
    plain = "\n".join(line for line in _FENCE.sub("", text).splitlines() if "(planned)" not in line)
    yield from (code for code in _INLINE.findall(plain) if code.startswith("dpo "))


def _is_command(line: str) -> bool:
    return line.strip().removeprefix("$ ").startswith(("dpo ", ".venv/bin/dpo "))


def problems(command: str) -> Iterator[str]:
    """What the command line would refuse, values apart: NAMES IN CAPITALS and ... stand for something."""
    words = shlex.split(command, comments=True)
    words = words[
        : next((at for at, word in enumerate(words) if word in ("|", ">", ">>", "&&", ";", "2>")), len(words))
    ]
    tree: Any = typer.main.get_command(app)
    context = tree.make_context("dpo", ["schema"])
    verbs = [word for word in words[1:] if not word.startswith("-")]
    if not verbs:
        known = {option for parameter in tree.params for option in parameter.opts} | {"--help"}
    elif (verb := _verb(tree, context, verbs)) is None:
        known_first = tree.get_command(context, verbs[0]) is not None
        yield f"no such verb: {' '.join(verbs[:2]) if known_first else verbs[0]}"
        return
    else:
        known = {option for parameter in verb.params for option in parameter.opts} | {"--help"}
    yield from (f"no such option: {word}" for word in words if _option(word) and _option(word) not in known)
    for flag, value in pairwise(words):
        if flag == "--set" and "..." not in value and value != "a.b=c":
            keys, _ = parse_override(value)
            if not _is_key(keys):
                yield f"no such key: {value}"


def _verb(tree: Any, context: Any, verbs: list[str]) -> Any:
    """The command that the first word names, or the first two, as in `dpo data convert`."""
    verb = tree.get_command(context, verbs[0])
    return verb.get_command(context, verbs[1]) if hasattr(verb, "get_command") and len(verbs) > 1 else verb


def _option(word: str) -> str:
    found = re.match(r"\[?(--[a-z][\w-]*)", word)
    return found[1] if found else ""


def _is_key(keys: list[str]) -> bool:
    """Whether the recipe knows the key: any problem but the unknown name is about the value."""
    raw: dict[str, Any] = {}
    inner = raw
    for key in keys[:-1]:
        inner = inner.setdefault(key, {})
    inner[keys[-1]] = None
    try:
        validate_recipe(raw, where="")
    except Exception as error:
        return "unknown key" not in str(error)
    return True


def test_there_is_something_to_read() -> None:
    assert DOCUMENTS


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_in_a_document_exists(document: Path) -> None:
    found = {command: list(problems(command)) for command in commands(document.read_text(encoding="utf-8"))}
    assert {command: wrong for command, wrong in found.items() if wrong} == {}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_recipe_in_a_document_is_one(document: Path, tmp_path: Path) -> None:
    """A snippet with only some sections is read together with the two keys a recipe cannot be without."""
    for language, content in blocks(document.read_text(encoding="utf-8")):
        if language not in ("yaml", "yml"):
            continue
        snippet = yaml.safe_load(content)
        if not isinstance(snippet, dict) or not snippet.keys() & {"model", "data", "adapter", "objective", "training"}:
            continue
        file = tmp_path / "recipe.yaml"
        file.write_text(content)
        missing = [change for key, change in _REQUIRED.items() if not _has(snippet, key.split("."))]
        load_recipe(file, missing)


_REQUIRED = {"model.path": "model.path=some/model", "data.train.source": "data.train.source=some/pairs"}


def _has(raw: Any, keys: list[str]) -> bool:
    for key in keys:
        if isinstance(raw, list):  # several sources
            return True
        if not isinstance(raw, dict) or key not in raw:
            return False
        raw = raw[key]
    return True


def test_the_table_of_objectives_has_every_kind_with_its_parameters_and_their_defaults() -> None:
    rows = {
        name: row
        for row in (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8").splitlines()
        for name in re.findall(r"^\| `(\w+)` \|", row)
    }
    assert rows.keys() == {kind.kind for kind in OBJECTIVES}
    for kind in OBJECTIVES:
        for field in fields(kind):
            default = f"{field.default:g}" if isinstance(field.default, float) else field.default
            if field.name != "kind":
                assert f"`{field.name}`{'' if kind is Mixture else f' {default}'}" in rows[kind.kind]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_relative_link_leads_somewhere(document: Path) -> None:
    text = _INLINE.sub("", _FENCE.sub("", document.read_text(encoding="utf-8")))
    targets = ["".join(groups).partition("#")[0] for groups in _LINK.findall(text)]
    local = [target for target in targets if target and "://" not in target and not target.startswith("mailto:")]
    assert [target for target in local if not (document.parent / target).exists()] == []


RESULTS = [json.loads(file.read_text()) for file in (ROOT / "benchmarks" / "results").glob("h*.json")]


@pytest.mark.parametrize(
    ("row", "mix", "precomputed", "gptq"),
    [
        ("sequence lengths of UltraFeedback", "ultrafeedback", False, False),
        ("reference log-probs cached", "ultrafeedback", True, False),
        ("long chats", "long-chats", False, False),
        ("long prompts and short answers", "summarisation", False, False),
        ("`residency: packed`", "ultrafeedback", False, True),
    ],
)
def test_a_ratio_over_trl_says_over_how_many_of_its_settings(row: str, mix: str, precomputed: bool, gptq: bool) -> None:
    """The number in README's table is that of the settings whose raw results are here."""
    tried = {
        system["system"]
        for result in RESULTS
        for system in result.get("results") or result.get("systems") or []
        if result.get("mix") == mix and system["system"].startswith("trl")
    }
    alike = [name for name in tried if ("-pre" in name) is precomputed and ("-gptq" in name) is gptq]
    table = (ROOT / "README.md").read_text(encoding="utf-8").split("## Speed")[1].splitlines()
    (line,) = (line for line in table if line.startswith("|") and row in line)
    assert int(line.split("|")[3]) == len(alike)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_no_document_says_best_setting_without_saying_of_those_tried(document: Path) -> None:
    assert not re.search(r"TRL's best setting|best setting (?!tried)", document.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("command", "wrong"),
    [
        ("dpo train recipes/demo.yaml --set training.epochs=2", []),
        ("dpo score MODEL_OR_RUN SOURCE [--out FILE] | head -1", []),
        ("dpo --help", []),
        ("dpo tarin r.yaml", ["no such verb: tarin"]),
        ("dpo judge chekc SOURCE", ["no such verb: judge chekc"]),
        ("dpo judge check SOURCE --judge length", []),
        ("dpo data convert a b --label first=1", []),
        ("dpo data convert a b --fraction 0.1", ["no such option: --fraction"]),
        ("dpo data convrt a b", ["no such verb: data convrt"]),
        ("dpo train r.yaml --resume", ["no such option: --resume"]),
        ("dpo train r.yaml --set training.epoch=2", ["no such key: training.epoch=2"]),
    ],
)
def test_the_reader_of_commands_sees_a_wrong_one(command: str, wrong: list[str]) -> None:
    assert list(problems(command)) == wrong


def test_hints_and_docstrings_name_only_verbs_that_exist() -> None:
    """Someone who is told to type a command must be able to."""
    sources = [*(ROOT / "src").rglob("*.py"), *(ROOT / "src").rglob("*.yaml")]
    named = {verb for file in sources for verb in re.findall(r"`dpo ([a-z]+)", file.read_text(encoding="utf-8"))}
    assert {verb for verb in named if list(problems(f"dpo {verb}"))} == set()


def test_what_hints_and_documents_say_to_install_can_be_installed_from_a_clone() -> None:
    """No index has a project of this name; the extras are those that pyproject.toml has."""
    written = [*DOCUMENTS, *(ROOT / "src").rglob("*.py"), ROOT / "Makefile"]
    assert [file.name for file in written if "pip install 'dpo-studio" in file.read_text(encoding="utf-8")] == []
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    named = {extra for file in written for extra in re.findall(r"install_hint\(\"([\w-]+)\"\)", file.read_text())}
    named |= {extra for file in DOCUMENTS for extra in re.findall(r"'\.\[([\w-]+)\]'", file.read_text())}
    assert named == extras.keys() - {"dev"}


def test_the_hint_to_install_an_extra_is_a_command_that_pip_understands() -> None:
    python, *words = shlex.split(install_hint("judge"))
    assert Path(python).samefile(sys.executable)
    assert words[:4] == ["-m", "pip", "install", "-e"]
    folder, _, extra = words[4].rpartition("[")
    assert extra == "judge]" and (Path(folder) / "pyproject.toml").samefile(ROOT / "pyproject.toml")


def test_make_install_says_how_to_find_the_command() -> None:
    said = subprocess.run(["make", "--dry-run", "install"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "pip install --quiet --editable ." in said or (ROOT / ".venv" / "runtime").exists()
    assert ". .venv/bin/activate" in said
