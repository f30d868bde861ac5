"""`import dpo_studio` as a library: what is typed is there, what is there is typed, and it runs."""

from __future__ import annotations

import ast
import io
from pathlib import Path

import pytest

import dpo_studio
from dpo_studio import DPOStudioError, load_recipe, score_pairs
from dpo_studio.config import as_source
from tests.consumer import use
from tests.tiny_runs import tiny_rows, write_recipe, write_rows


def test_the_names_that_a_type_checker_sees_are_those_that_are_there() -> None:
    tree = ast.parse(Path(dpo_studio.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.name: node.module.removeprefix("dpo_studio.")
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    assert seen == dpo_studio._HOMES
    assert {*dpo_studio.__all__} == {*seen, "__version__"}
    assert all(getattr(dpo_studio, name) is not None for name in dpo_studio.__all__)
    with pytest.raises(AttributeError):
        getattr(dpo_studio, "trian_recipe")  # noqa: B009 - mypy would refuse the plain spelling


def test_a_program_that_uses_all_of_it(tiny_base: Path, tmp_path: Path) -> None:
    """tests/consumer.py, whose types `make check` holds to."""
    pairs = write_rows(tmp_path / "pairs.jsonl", tiny_rows(16, seed=2))
    done = use(tiny_base, pairs, tmp_path)
    assert done["trained"]["steps"] == 1
    assert done["again"] == done["trained"]
    assert done["scored"]["pairs"] == len(done["lines"].splitlines()) == 16
    assert len(done["answers"]) == 1 and done["answers"][0].tokens <= 4
    assert done["rates"]["judge"] == done["judged"]["judge"]
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert done["usable"]
    assert sorted(path.name for path in done["swept"].glob("objective*")) == [
        "objective.beta=0.1",
        "objective.beta=0.2",
    ]


def test_a_recipe_is_the_same_from_a_file_a_dict_and_itself(tmp_path: Path) -> None:
    import yaml

    file = write_recipe(tmp_path / "recipe.yaml", tmp_path / "base")
    typed = yaml.safe_load(file.read_text())
    typed["data"]["train"]["source"] = str(tmp_path / "pairs.jsonl")
    before = yaml.safe_dump(typed)
    from_file, from_dict = load_recipe(file).recipe, load_recipe(typed, ["training.seed=0"]).recipe
    assert from_dict == from_file == load_recipe(from_file).recipe
    assert yaml.safe_dump(typed) == before  # an override does not change what the caller holds


def test_a_wrong_dict_and_an_empty_source_are_refused_with_a_reason(tmp_path: Path) -> None:
    with pytest.raises(DPOStudioError, match="unknown key"):
        load_recipe({"modle": {"path": "x"}})
    with pytest.raises(DPOStudioError, match="source is empty"):
        as_source("")
    with pytest.raises(DPOStudioError, match="nowhere"):
        score_pairs(str(tmp_path), str(tmp_path / "nowhere.jsonl"), io.StringIO())
