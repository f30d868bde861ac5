"""A folder that is whole or not there."""

from __future__ import annotations

import errno
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from dpo_studio.disk import check_space
from dpo_studio.errors import RunError
from dpo_studio.export.whole import making


def test_the_result_becomes_the_folder_and_the_rest_goes(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with making(out) as place:
        (place.result / "a").write_text("a")
        (place.work / "b").write_text("b")
        (place.result / "a").chmod(0o600)  # as safetensors leaves its files
        assert not out.exists()
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert [path.name for path in out.iterdir()] == ["a"]
    mask = os.umask(0)
    os.umask(mask)
    assert (out / "a").stat().st_mode & 0o777 == 0o666 & ~mask


@pytest.mark.parametrize("error", [RunError("no"), KeyboardInterrupt(), SystemExit(143)])
def test_whatever_breaks_it_off_leaves_nothing(error: BaseException, tmp_path: Path) -> None:
    with pytest.raises(type(error)), making(tmp_path / "out") as place:
        (place.result / "a").write_text("a")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_of_with_the_folder(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="out cannot be written: No space left") as told, making(tmp_path / "out"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert "free some space" in str(told.value)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten_even_if_it_came_meanwhile(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(RunError, match="exists"), making(out):
        out.mkdir()
    with pytest.raises(RunError, match="exists"), making(out):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(RunError, match="not the name of a new folder"), making(Path("/")):
        pass


def test_a_disk_that_is_too_small_is_told_of_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 0, 10**9))
    check_space(tmp_path / "no" / "out", 10**9, "exporting")
    with pytest.raises(RunError, match=r"exporting needs 2.0 GB on the way, .* has 1.0 GB left"):
        check_space(tmp_path / "no" / "out", 2 * 10**9, "exporting")


def test_what_a_killed_attempt_left_goes_with_the_next_one(tmp_path: Path) -> None:
    """No process has the highest number that Linux gives plus one; one that runs keeps its folder."""
    stay = {f".out.writing-{os.getppid()}-0a", ".other.writing-4194305-0a", ".out.writing-x"}
    for name in (".out.writing-4194305-0a", *stay):
        (tmp_path / name / "work").mkdir(parents=True)
    with making(tmp_path / "out"):
        pass
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"out", *stay}
