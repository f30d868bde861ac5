"""What every test runs under, and the tiny model and the finished run that many of them share."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.tiny_models import tiny_folder
from tests.tiny_runs import dpo, write_recipe


def pytest_collection_finish() -> None:
    """What the imports of torch and transformers made stays for good: the collector, which went through a million of
    their objects again and again, leaves them out. A tenth of the time of a file that trains."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Here and in the processes that tests start: the models are tiny, and on busy cores OpenMP's threads wait for each
    other (a step took 40 times as long). Bits hang on the number of threads, too."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(autouse=True, scope="session")
def _cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the caches of whoever runs it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DPO_STUDIO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 50,000 random parameters with a ChatML tokenizer, as a model folder."""
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_run(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of four steps on `tiny_base`, with beta 0.5 and 18 pairs. Not to be written to."""
    recipe = write_recipe(tmp_path_factory.mktemp("run") / "r.yaml", tiny_base, objective={"beta": 0.5})
    said = dpo("train", recipe)
    assert said.code == 0, said.err
    return recipe.parent / "run"
