"""Several training sources: all their pairs, or shares by weight, counted out by hand; and a run on two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dpo_studio.config import load_recipe, recipe_schema
from dpo_studio.errors import RecipeError
from dpo_studio.preferences.mixing import Part, read_training, shares
from dpo_studio.preferences.pair import Message, Pair
from tests.tiny_runs import dpo, tiny_rows, write_recipe, write_rows


def pairs(first: int, count: int) -> list[Pair]:
    def answer(text: str) -> tuple[Message, ...]:
        return (Message("assistant", text),)

    return [Pair((Message("user", str(row)),), answer("a"), answer("b"), row) for row in range(first, first + count)]


@pytest.mark.parametrize(
    ("weights", "counts"),
    [
        ((None, None), [100, 20]),
        ((0.5, 0.5), [20, 20]),  # the scarcer one gives all its 20, the other as many
        ((0.75, 0.25), [60, 20]),  # 20 are a quarter of 80
        ((0.9, 0.1), [100, 11]),  # 100 are nine tenths of 111
    ],
)
def test_shares(weights: tuple[float | None, ...], counts: list[int]) -> None:
    parts = [Part("a", 0, weights[0]), Part("b", 100, weights[1])]
    kept, counted = shares(pairs(0, 120), parts, seed=0)
    assert list(counted.values()) == counts
    assert [sum(pair.row < 100 for pair in kept), sum(pair.row >= 100 for pair in kept)] == counts
    assert len({pair.row for pair in kept}) == len(kept)
    again, _ = shares(pairs(0, 120), parts, seed=0)
    assert again == kept
    other, _ = shares(pairs(0, 120), parts, seed=1)
    assert (other == kept) == (weights[0] is None)


def recipe(folder: Path, base: Path, *weights: Any) -> Path:
    """Two sources of 24 and 12 pairs, beside the recipe."""
    file = write_recipe(folder / "r.yaml", base)
    write_rows(folder / "a.jsonl", tiny_rows(24))
    write_rows(folder / "b.jsonl", [row | {"prompt": f"Other: {row['prompt']}"} for row in tiny_rows(12, seed=1)])
    text = json.dumps(
        [{"source": name} | ({} if not weights else {"weight": weight}) for name, weight in
         zip(("a.jsonl", "b.jsonl"), weights or (None, None), strict=True)]
    )  # fmt: skip
    file.write_text(file.read_text().replace("  train:\n    source: pairs.jsonl\n", f"  train: {text}\n"))
    return file


def test_a_run_on_two_sources_says_what_each_gives(tiny_base: Path, tmp_path: Path) -> None:
    file = recipe(tmp_path, tiny_base, 2, 2)
    loaded = load_recipe(file).recipe
    assert [one.source for one in loaded.data.sources] == [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl")]
    source, parts = read_training(loaded.data)
    assert [part.first_row for part in parts] == [0, 24]
    assert [pair.row for pair in source.pairs] == list(range(36))
    said = dpo("train", file)
    assert said.code == 0, said.err
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    counts = [
        line.split(": ")[1].split()[0] for line in said.err.splitlines() if "pairs to train on, weight 0.5" in line
    ]
    assert len(counts) == 2 and counts[0] == counts[1]
    assert result["pairs"] == int(counts[0]) + int(counts[1])
    assert "a.jsonl 2" in (tmp_path / "run" / "report.html").read_text()
    assert load_recipe(tmp_path / "run" / "recipe.yaml").recipe.data == loaded.data
    scored = dpo("eval", tmp_path / "run", "--judge", "length", "--temperatures", "0", "--max-new-tokens", "4")
    assert scored.code == 0, scored.err


def test_weights_stand_at_all_sources_or_at_none(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="with a weight and others without"):
        load_recipe(recipe(tmp_path, tiny_base, 1, None))
    with pytest.raises(RecipeError, match=r"data\.train\.1\.weight: input should be greater than 0"):
        load_recipe(recipe(tmp_path, tiny_base, 1, -1))
    with pytest.raises(RecipeError, match="names a source twice"):
        load_recipe({"model": {"path": "m"}, "data": {"train": [{"source": "a.jsonl"}, {"source": "a.jsonl"}]}})
    with pytest.raises(RecipeError, match=r"unknown key data\.train\.0\.wieght"):
        load_recipe({"model": {"path": "m"}, "data": {"train": [{"source": "a", "wieght": 1}, {"source": "b"}]}})


def test_forms_show_one_source() -> None:
    """The schema's `data.train` is the section of one source, whose fields the studio's form shows."""
    schema: Any = recipe_schema()
    (only,) = schema["$defs"]["DataSection"]["properties"]["train"]["anyOf"]
    assert only["$ref"].endswith("/SourceSection")
