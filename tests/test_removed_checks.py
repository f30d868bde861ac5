"""The tool that removes checks: what it finds, what removing does, and that what it is told of exists."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests import removed_checks
from tests.removed_checks import EQUIVALENT, MODULES, checks_of

SOURCE = """
import os

def look(path, size):
    if size < 0 or size > 9:
        raise ValueError(size)
    try:
        check_name(path)
        return os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except (FileNotFoundError, TypeError):
        raise RuntimeError(path) from None

def check_name(path):
    if not 0 < len(path) < 5:
        raise KeyError(path)
"""


def given(path: Any, size: int, raised: type[Exception]) -> Callable[[Callable[..., Any]], bool]:
    """Whether a call is refused as it should be."""

    def refused(look: Callable[..., Any]) -> bool:
        try:
            look(path, size)
        except raised as error:
            return type(error) is raised
        except Exception:
            return False
        return False

    return refused


LONG, NONE, LOW, HIGH, MISSING, ODD = (
    given("/dev/null", 1, KeyError),
    given("", 1, KeyError),
    given("x", -1, ValueError),
    given("x", 10, ValueError),
    given("/x-x", 1, RuntimeError),
    given(5, 1, RuntimeError),
)


@pytest.mark.parametrize(
    ("what", "passes"),
    [
        ("size < 0 in size < 0 or size > 9", {LOW}),
        ("size > 9 in size < 0 or size > 9", {HIGH}),
        ("if size < 0 or size > 9", {LOW, HIGH}),
        ("check_name(path)", {LONG, NONE}),
        ("os.O_NONBLOCK", set()),
        ("except (FileNotFoundError, TypeError)", {MISSING, ODD}),
        ("FileNotFoundError in except (FileNotFoundError, TypeError)", {MISSING}),
        ("TypeError in except (FileNotFoundError, TypeError)", {ODD}),
        ("0 < len(path) in 0 < len(path) and len(path) < 5", {NONE}),
        ("len(path) < 5 in 0 < len(path) and len(path) < 5", {LONG}),
        ("if not 0 < len(path) < 5", {LONG, NONE}),
    ],
)
def test_a_check_that_is_removed_lets_through_what_it_refused_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, what: str, passes: set[Any]
) -> None:
    """The path 5 is a TypeError of check_name's as of os.open's, so its translation alone is missed."""
    switched = removed_checks._Switched("toy.py", SOURCE)
    (check,) = [check for check in switched.found if check.what == what]
    made: dict[str, Any] = dict(removed_checks._SWITCHES)
    exec(compile(switched.tree, "toy.py", "exec"), made)  # noqa: S102 - the text above
    assert all(refused(made["look"]) for refused in (LONG, NONE, LOW, HIGH, MISSING, ODD))
    monkeypatch.setenv(removed_checks._GONE, check.key)
    assert {refused for refused in (LONG, NONE, LOW, HIGH, MISSING, ODD) if not refused(made["look"])} == passes


def test_it_finds_all_of_the_toy_s_checks() -> None:
    assert len(removed_checks._Switched("toy.py", SOURCE).found) == 11


@pytest.mark.parametrize("module", MODULES)
def test_whatever_it_is_told_of_exists(module: str) -> None:
    """So that a renamed test file or a changed line does not make it look at less."""
    found = {check.what for check in checks_of(module)}
    assert {what for its, what in EQUIVALENT if its == module} <= found
    for name in MODULES[module]:
        assert (removed_checks.ROOT / "tests" / name.partition("::")[0]).is_file()
