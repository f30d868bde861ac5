"""Model cards: metadata that YAML reads back, and text that cannot become anything else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo_studio.export.card import Card, hub_id, license_of, public_name, quoted
from dpo_studio.models.bundled import BUNDLED_ID


def card(**changes: Any) -> Card:
    plain: dict[str, Any] = {
        "title": "mine",
        "base_id": "org/base",
        "datasets": ["org/pairs"],
        "library": "peft",
        "tags": ["dpo", "lora"],
        "license": "mit",
        "facts": ["a fact"],
    }
    return Card(**(plain | changes))


def metadata(text: str) -> dict[str, Any]:
    _, head, _ = text.split("---\n", 2)
    read: dict[str, Any] = yaml.safe_load(head)
    return read


def test_the_metadata_is_the_hubs() -> None:
    assert metadata(card().text()) == {
        "base_model": "org/base",
        "datasets": ["org/pairs"],
        "library_name": "peft",
        "license": "mit",
        "pipeline_tag": "text-generation",
        "tags": ["dpo", "lora"],
    }


def test_what_is_not_known_is_not_there() -> None:
    read = metadata(card(base_id=None, datasets=[], license=None).text())
    assert read.keys() == {"library_name", "pipeline_tag", "tags"}


def test_text_from_models_stays_in_its_block() -> None:
    """A fence in the answer, and a heading: the block's own fence is longer than any in it."""
    answer = "```\n# Not a heading\n````\n<script>alert(1)</script>"
    text = card(example=("Why?", answer)).text()
    assert f"`````text\n{answer}\n`````\n" in text


@pytest.mark.parametrize(("name", "written"), [("a/b", "`a/b`"), ("a`b", "`` a`b ``"), ("a\nb", "`a b`")])
def test_a_name_in_a_sentence_cannot_leave_its_backticks(name: str, written: str) -> None:
    assert quoted(name) == written


def test_what_has_a_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "model").mkdir(parents=True)
    assert hub_id("org/model") == "org/model"
    assert hub_id("org/pairs:train") == "org/pairs"
    assert hub_id("bundled:smollm2-135m-instruct") == BUNDLED_ID
    for local in ("here/model", "./x/y", "~/x/y", "/x/y", "bundled:everyday", "model"):
        assert hub_id(local) is None, local


def test_of_a_path_only_the_last_part_is_given_away(tmp_path: Path) -> None:
    assert public_name(str(tmp_path / "pairs.jsonl")) == "pairs.jsonl"
    for name in ("org/model", "bundled:everyday:train"):
        assert public_name(name) == name
    assert public_name("bundled:smollm2-135m-instruct") == BUNDLED_ID


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("---\nlicense: apache-2.0\n---\n# x", "apache-2.0"),
        ("---\nlicense: [a, b]\n---\n", None),
        ("---\nlicense: 'a\\n- b'\n---\n", None),
        ("---\n{:\n---\n", None),
        ("# no metadata", None),
        ("---\nlicense: mit\n---\n" + "x" * 1_000_000, "mit"),
        ("---\n" + "a: b\n" * 100_000 + "license: mit\n---\n", None),
        ("---" + "\n" * 1_000_000, None),
    ],
    ids=range(8),
)
def test_the_license_is_the_bases_own(text: str, found: str | None, tmp_path: Path) -> None:
    assert license_of(tmp_path) is None
    (tmp_path / "README.md").write_text(text)
    assert license_of(tmp_path) == found
