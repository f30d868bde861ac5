"""Every family is right in every verb, or refused before training with its own cause (tests/families.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.families import FAMILIES, FAST, examine


def check(name: str, folder: Path, attention: str = "auto") -> None:
    finding = examine(name, folder, attention)
    if FAMILIES[name].refused:
        assert finding.state == "REFUSED", finding.words
        assert FAMILIES[name].refused in finding.words
    else:
        assert finding.state == "RIGHT", finding.words


pytestmark = pytest.mark.filterwarnings("ignore")  # plain transformers and PEFT warn of what they are asked to do


@pytest.mark.parametrize("name", FAST)
def test_ten_families(name: str, tmp_path: Path) -> None:
    check(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in FAST])
def test_the_other_families(name: str, tmp_path: Path) -> None:
    check(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_families_with_dense_masks(name: str, tmp_path: Path) -> None:
    check(name, tmp_path, "sdpa")
