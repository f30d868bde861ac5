"""`dpo cache`: sizes, clearing, and a limit that no running process ever loses an entry to."""

from __future__ import annotations

import errno
import fcntl
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dpo_studio import cache
from dpo_studio.cache import clear, held, limit_bytes, sizes, trim
from dpo_studio.errors import UsageError
from tests.tiny_runs import dpo, write_recipe

DAY = 86_400


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with four entries of a thousand bytes or more, `0...` used today, `1...` ten days ago, and so on."""
    monkeypatch.setenv("DPO_STUDIO_CACHE", str(tmp_path / "cache"))
    reference = tmp_path / "cache" / "reference"
    reference.mkdir(parents=True)
    for place in range(4):
        file = entry(reference, place)
        database = sqlite3.connect(file)
        database.execute("CREATE TABLE logps5 (pair BLOB)")
        database.commit()
        database.close()
        used = time.time() - 10 * DAY * place
        os.utime(file, (used, used))
    return reference


def entry(folder: Path, place: int) -> Path:
    return folder / f"{str(place) * 32}.sqlite"


def left(folder: Path) -> list[str]:
    """The first letters of the entries that are there."""
    return sorted(file.name[0] for file in folder.glob("*.sqlite"))


@contextmanager
def another_process(code: str) -> Iterator[None]:
    """A process that runs `code`, says so, and waits."""
    whole = f"{code}\nprint('ready', flush=True)\ninput()\n"
    with subprocess.Popen(
        [sys.executable, "-c", whole], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        try:
            yield
        finally:
            child.kill()


def holding(file: Path) -> str:
    return (
        "from pathlib import Path; from dpo_studio.cache import held\n"
        f"holding = held(Path({str(file)!r})); holding.__enter__()"
    )


def test_sizes_are_shown_and_nothing_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPO_STUDIO_CACHE", str(tmp_path / "none"))
    said = dpo("cache")
    assert said.code == 0 and "reference log-probs" in said.out and "at most 20 GiB" in said.out
    assert list(tmp_path.iterdir()) == []


def test_sizes_are_those_of_the_files(folder: Path) -> None:
    """2 and 1 MiB, and a link that leads to something large is not what it leads to."""
    models = folder.parent / "models" / "a"
    models.mkdir(parents=True)
    (models / "weights").write_bytes(b"x" * 2**21)
    (models / "more").write_bytes(b"x" * 2**20)
    (folder.parent / "judge-replies").mkdir()
    (folder.parent / "judge-replies" / "link").symlink_to(models / "weights")
    found = sizes(folder.parent)
    assert found["models"] == (2, 3 * 2**20) and found["judge-replies"][1] < 1000 and found["compiled"] == (0, 0)
    assert found["reference"] == (4, sum(file.stat().st_size for file in folder.iterdir()))
    said = dpo("cache")
    assert "3.0 MiB" in said.out and str(folder.parent) in said.out


def test_clear_removes_what_can_be_computed_again_and_nothing_else(folder: Path) -> None:
    """Replies were paid for; a file of another name is not ours; a link is not followed."""
    others = [folder.parent / "judge-replies" / "m.jsonl", folder.parent / "models" / "m" / "x", folder / "mine.sqlite"]
    others += [folder / f"{'a' * 32}.sqlite.txt", folder / f"{'A' * 32}.sqlite"]
    for file in others:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("mine")
    (folder / f"{'e' * 32}.sqlite").symlink_to(others[0])
    entry(folder, 1).with_name(f"{entry(folder, 1).name}-journal").write_text("")
    said = dpo("cache", "clear")
    assert said.code == 0 and "removed 4 entries" in said.out
    assert all(file.read_text() == "mine" for file in others)
    assert sorted(folder.iterdir()) == sorted([*others[2:], folder / f"{'e' * 32}.sqlite"])


@pytest.mark.parametrize(
    ("age", "stay"),
    [("30d", "012"), ("15d", "01"), ("2w", "01"), ("36h", "0"), ("0s", ""), ("1.5w", "01"), ("1m", "0")],
)
def test_only_what_is_older_goes(folder: Path, age: str, stay: str) -> None:
    said = dpo("cache", "clear", "--older-than", age)
    assert said.code == 0 and "".join(left(folder)) == stay
    assert (f"kept {len(stay)} used within {age}" in said.out) == bool(stay)


@pytest.mark.parametrize("age", ["", "30", "d", "-1d", "30x", "1e3d", "nan d", "٣d", "30dd", "9" * 400 + "d"])
def test_an_age_that_is_none_is_refused_and_nothing_removed(folder: Path, age: str) -> None:
    said = dpo("cache", "clear", "--older-than", age)
    assert said.code == 2 and "--older-than" in said.err and "Traceback" not in said.err
    assert left(folder) == ["0", "1", "2", "3"]


def test_what_a_running_process_holds_stays(folder: Path) -> None:
    with another_process(holding(entry(folder, 3))):
        said = dpo("cache", "clear")
        assert "removed 3 entries" in said.out and "kept 1 that a running process uses" in said.out
        assert left(folder) == ["3"]
        trim(folder, 0)
        assert left(folder) == ["3"]
    assert "removed 1 entries" in dpo("cache", "clear").out  # it was killed, and its hold went with it
    assert list(folder.iterdir()) == []


def test_what_this_process_holds_stays_and_two_may_hold_it(folder: Path) -> None:
    with held(entry(folder, 1)), held(entry(folder, 1)):
        clear(folder)
        assert left(folder) == ["1"]
    clear(folder)
    assert list(folder.iterdir()) == []


def test_an_entry_in_the_middle_of_a_transaction_stays(folder: Path) -> None:
    """Of a version that holds nothing, or of another program."""
    with another_process(
        f"import sqlite3; d = sqlite3.connect({str(entry(folder, 2))!r}); d.execute('BEGIN EXCLUSIVE')"
    ):
        clear(folder)
        assert left(folder) == ["2"]


def test_a_damaged_entry_goes_too(folder: Path) -> None:
    entry(folder, 0).write_bytes(b"broken" * 1000)
    clear(folder)
    assert left(folder) == []


def test_a_hold_that_comes_while_an_entry_is_removed_is_a_hold_on_the_next(folder: Path) -> None:
    """The lock that was opened and the one that is there are two files: what is locked is the one that is there."""
    lock = entry(folder, 0).with_suffix(".lock")
    opened = cache._open

    def replaced(path: Path) -> int:
        descriptor = opened(path)
        cache_open.undo()
        path.unlink()
        return descriptor

    cache_open = pytest.MonkeyPatch()
    cache_open.setattr(cache, "_open", replaced)
    with held(entry(folder, 0)):
        assert lock.exists()
        clear(folder)
        assert left(folder) == ["0"]


def test_a_lock_that_is_another_by_now_is_no_leave_to_remove(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening and locking it, the entry was removed and made again, and its new lock is somebody's."""
    opened = cache._open

    def replaced(path: Path) -> int:
        descriptor = opened(path)
        path.unlink()
        path.touch()
        return descriptor

    monkeypatch.setattr(cache, "_open", replaced)
    assert clear(folder) == cache.Cleared(0, 0, held=4, newer=0)
    assert left(folder) == ["0", "1", "2", "3"]


def test_a_lock_that_is_a_link_is_not_followed(folder: Path, tmp_path: Path) -> None:
    entry(folder, 0).with_suffix(".lock").symlink_to(tmp_path / "elsewhere")
    with held(entry(folder, 0)):
        done = clear(folder)
    assert (done.removed, done.held) == (3, 1)
    assert left(folder) == ["0"] and not (tmp_path / "elsewhere").exists()


def test_where_files_cannot_be_locked_nothing_is_held_and_nothing_left_open(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    with held(entry(folder, 0)), held(entry(folder, 1)):
        assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
    assert clear(folder).held == 4
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_the_oldest_go_first_until_the_rest_fits(folder: Path) -> None:
    size = entry(folder, 0).stat().st_size
    trim(folder, 4 * size)
    assert left(folder) == ["0", "1", "2", "3"]
    trim(folder, 4 * size - 1)
    assert left(folder) == ["0", "1", "2"]
    with held(entry(folder, 2)):
        trim(folder, 2 * size)
        assert left(folder) == ["0", "2"]
    trim(folder, 0)
    assert left(folder) == []


@pytest.mark.parametrize(
    ("text", "limit"), [(None, 20 * 2**30), ("", 20 * 2**30), ("1.5", 3 * 2**29), ("0", 0), (" 2 ", 2**31)]
)
def test_the_limit_is_a_number_of_gib(monkeypatch: pytest.MonkeyPatch, text: str | None, limit: int) -> None:
    monkeypatch.delenv("DPO_STUDIO_CACHE_GIB", raising=False)
    if text is not None:
        monkeypatch.setenv("DPO_STUDIO_CACHE_GIB", text)
    assert limit_bytes() == limit


@pytest.mark.parametrize("text", ["-1", "nan", "inf", "20GB", "1,5"])
def test_a_limit_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("DPO_STUDIO_CACHE_GIB", text)
    with pytest.raises(UsageError, match=r"DPO_STUDIO_CACHE_GIB=.* is not a number of GiB"):
        limit_bytes()
    assert dpo("cache").code == 2


def test_a_limit_that_is_none_is_told_before_a_training_looks_for_its_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DPO_STUDIO_CACHE_GIB", "plenty")
    said = dpo("train", write_recipe(tmp_path / "r.yaml", tmp_path / "no_model"))
    assert said.code == 2 and "DPO_STUDIO_CACHE_GIB=plenty" in said.err
    assert not (tmp_path / "run").exists()


def test_a_link_counts_as_itself(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "large").write_bytes(b"x" * 100_000)
    models = folder.parent / "models"
    models.mkdir()
    for name, target in (("folder", "elsewhere"), ("file", "elsewhere/large"), ("nothing", "nothing")):
        (models / name).symlink_to(tmp_path / target)
    taken = sum(path.lstat().st_size for path in models.iterdir())
    assert sizes(folder.parent)["models"] == (3, taken) and taken < 1000


def test_a_cache_that_is_a_link_or_read_only_is_no_traceback(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with held(tmp_path / "no" / "folder" / "x.sqlite"):
        pass
    (tmp_path / "link").symlink_to(folder.parent)
    monkeypatch.setenv("DPO_STUDIO_CACHE", str(tmp_path / "link"))
    assert "removed 4 entries" in dpo("cache", "clear").out


def test_without_a_home_the_cache_says_so_and_makes_no_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DPO_STUDIO_CACHE", raising=False)
    monkeypatch.setenv("HOME", "")
    said = dpo("cache")
    assert said.code == 2 and "no home folder" in said.err and "DPO_STUDIO_CACHE" in said.err
    assert list(tmp_path.iterdir()) == []
