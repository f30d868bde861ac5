"""A base whose layers are sharded over two processes computes and learns what a whole one does."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dpo_studio.learning.row_gradients import gradients
from dpo_studio.models.adapters import attach
from dpo_studio.models.attention import DENSE
from dpo_studio.models.folder import open_model
from dpo_studio.models.layers import compiled_layers, decoder_layers
from dpo_studio.models.sharding import load_sharded, local
from dpo_studio.policy.policy import Policy
from dpo_studio.ranks import Ranks
from dpo_studio.tokens.pack import pack
from dpo_studio.workflows.training.preparing import attach_policy
from tests.pairs_of_ids import random_pairs
from tests.policies import SECTION, moved
from tests.rank_processes import on_ranks
from tests.test_models_gptq import packed_folder
from tests.test_ranks_together import STEPS, assert_close, recipe_in, trained
from tests.tiny_models import tiny_folder
from tests.tiny_runs import dpo


def sharded(recipe: Path) -> tuple[int, str, int, int]:
    """A run of this process, with how many numbers of the layers it has held and read."""
    held: list[int] = []

    def look(base: Any, *more: Any) -> Any:
        layers = decoder_layers(base.model)
        held.append(sum(local(p).numel() for p in layers.parameters()))
        held.append(sum(p.numel() for p in layers.parameters()))
        return attach_policy(base, *more)

    with patch("dpo_studio.workflows.training.run.attach_policy", look):
        code, said = trained(recipe)
    return code, said, held[0], held[1]


def gradients_of_a_row(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of a sharded base with an adapter, eager and compiled."""
    ranks = Ranks.of_environment()
    with ranks.together():
        model = load_sharded(open_model(str(folder)), torch.float32, DENSE, torch.device("cpu"), ranks)
        policy = Policy(moved(attach(model, SECTION, seed=0)))
        policy.train_mode()
        found = []
        for compiled in (False, True):
            with compiled_layers(policy.model) if compiled else nullcontext():
                for count in (3, 5, 4):  # lengths differ: the second compilation is for any
                    found.append(gradients(policy, pack(random_pairs(count))))
        return tuple({n: g.numpy() for n, g in one.items()} for one in (found[2], found[5]))  # type: ignore[return-value]


@pytest.mark.slow
def test_compiled_layers_of_a_sharded_base_are_the_plain_ones(tmp_path: Path) -> None:
    """A length that was not seen before, too."""
    for eager, compiled in on_ranks(2, gradients_of_a_row, tiny_folder(tmp_path / "base")):
        assert eager.keys() == compiled.keys()
        for name, gradient in eager.items():
            off = np.linalg.norm(compiled[name] - gradient) / np.linalg.norm(gradient)
            assert off < 1e-4, (name, off)


@pytest.mark.parametrize(
    ("architecture", "dtype", "more"),
    [
        pytest.param("llama", "float32", {}, marks=pytest.mark.slow),
        pytest.param("llama-tied", "bfloat16", {}, marks=pytest.mark.slow),
        ("qwen2-mixed", "float32", {"reference": {"mode": "live"}, "objective": {"kind": "aot"}}),
    ],
)
def test_two_processes_with_half_the_layers_each_learn_what_one_does(
    tmp_path: Path, architecture: str, dtype: str, more: dict[str, Any]
) -> None:
    base = tiny_folder(tmp_path / "base", architecture)
    recipe = recipe_in(tmp_path / "run", base, model={"dtype": dtype, "sharding": "full"}, **more)
    for code, said, held, whole in on_ranks(2, sharded, recipe):
        assert code == 0, said
        assert held == pytest.approx(whole / 2, rel=0.05)
    alone = recipe_in(tmp_path / "alone", base, model={"dtype": dtype}, **more)
    assert dpo("train", alone).code == 0
    runs = [recipe.parent / "run", alone.parent / "run"]
    if dtype == "float32":
        assert_close(*runs)
    else:  # rows are dealt otherwise, and bf16 rounds them otherwise
        one, other = (load_file(run / "adapter" / "adapter_model.safetensors") for run in runs)
        norms = [torch.cat([x[n].flatten() for n in sorted(x)]) for x in (one, other)]
        assert (norms[0] - norms[1]).norm() < 0.1 * norms[1].norm()


@pytest.mark.slow
def test_packed_words_are_sharded_too(tmp_path: Path) -> None:
    """Of a GPTQ base the int32 words, as parameters without a gradient."""
    base = packed_folder(tmp_path / "base")
    recipe = recipe_in(tmp_path / "run", base, model={"sharding": "full"})
    for code, said, held, whole in on_ranks(2, sharded, recipe):
        assert code == 0, said
        assert held < 0.6 * whole
    alone = recipe_in(tmp_path / "alone", base)
    assert dpo("train", alone).code == 0
    assert_close(recipe.parent / "run", alone.parent / "run")


def test_more_processes_than_pairs_in_a_step_do_not_wait_for_each_other(tiny_base: Path, tmp_path: Path) -> None:
    """Two pairs a step on three processes: one of them has nothing to compute but what the others need of it."""
    training = STEPS | {"pairs_per_step": 2, "max_steps": 3}
    recipe = recipe_in(tmp_path / "run", tiny_base, model={"sharding": "full"}, training=training)
    for code, said in on_ranks(3, trained, recipe):
        assert code == 0, said
    alone = recipe_in(tmp_path / "alone", tiny_base, training=training)
    assert dpo("train", alone).code == 0
    assert_close(recipe.parent / "run", alone.parent / "run")
    assert dpo("score", recipe.parent / "run", tmp_path / "run" / "pairs.jsonl").code == 0  # by one process


@pytest.mark.slow
def test_of_two_machines_each_has_the_whole_base_in_its_own_slices(tiny_base: Path, tmp_path: Path) -> None:
    """Four processes that believe to be two a machine: half of the layers each, not a quarter."""
    recipe = recipe_in(tmp_path / "run", tiny_base, model={"sharding": "full"})
    for code, said, held, whole in on_ranks(4, sharded, recipe, LOCAL_WORLD_SIZE="2"):
        assert code == 0, said
        assert held == pytest.approx(whole / 2, rel=0.05)
    alone = recipe_in(tmp_path / "alone", tiny_base)
    assert dpo("train", alone).code == 0
    assert_close(recipe.parent / "run", alone.parent / "run")


def test_what_is_not_built_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    said = dpo("train", recipe_in(tmp_path / "one", tiny_base, model={"sharding": "full"}))
    assert said.code == 1 and "needs several processes" in said.err
    recipe = recipe_in(tmp_path / "two", tiny_base, model={"sharding": "full"}, adapter={"kind": "dora"})
    (code, words), other = on_ranks(2, trained, recipe)
    assert code == 1 and "not built for adapter.kind: dora" in words and other == (1, "")
