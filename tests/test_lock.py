"""One process a run folder, whatever becomes of the process and of the folder."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dpo_studio.errors import RunError
from dpo_studio.runs.lock import held

_HOLD = "import sys\nfrom pathlib import Path\nfrom dpo_studio.runs.lock import held\n"


@contextmanager
def another_holds(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Inside, a process of its own has the folder."""
    code = _HOLD + "with held(Path(sys.argv[1])):\n print('mine', flush=True)\n sys.stdin.read()"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code, str(folder)], stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "mine\n"
        yield process
        process.kill()


def test_a_second_process_is_refused_with_the_first_one_s_number(tmp_path: Path) -> None:
    with another_holds(tmp_path / "run") as other:
        with (
            pytest.raises(RunError, match=f"run is being trained in by process {other.pid} on ") as refused,
            held(tmp_path / "run"),
        ):
            pass
        assert "--set run.folder=" in str(refused.value.hint)


def test_a_dead_process_holds_nothing(tmp_path: Path) -> None:
    """Killed outright: its lock file stays, its lock does not."""
    with another_holds(tmp_path / "run") as other:
        other.send_signal(signal.SIGKILL)
        other.wait()
    assert (tmp_path / "run/.lock").read_text().startswith(f"process {other.pid} ")
    with held(tmp_path / "run"):
        assert (tmp_path / "run/.lock").read_text().startswith(f"process {os.getpid()} ")


def test_a_folder_in_which_nothing_came_to_be_goes_again_with_those_made_for_it(tmp_path: Path) -> None:
    with held(tmp_path / "a/b/run"):
        pass
    assert not (tmp_path / "a").exists()
    with held(tmp_path / "a/b/run"):
        (tmp_path / "a/b/run/recipe.yaml").touch()
    assert [path.name for path in (tmp_path / "a/b/run").iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize("how", ["removed", "moved", "replaced"])
def test_a_folder_that_is_no_longer_the_one_is_noticed(tmp_path: Path, how: str) -> None:
    """Replaced: by another process's, whose lock must stay where it is."""
    run = tmp_path / "run"
    with held(run) as hold:
        hold.check()
        (run / ".lock").unlink() if how == "removed" else run.rename(tmp_path / "moved")
        if how == "replaced":
            run.mkdir()
            (run / ".lock").write_text("process 1 on earth\n")
        with pytest.raises(RunError, match="removed, moved or replaced"):
            hold.check()
    assert (run / ".lock").exists() == (how == "replaced")


def test_a_link_in_the_lock_s_place_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "run/.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(RunError, match="cannot be written"), held(tmp_path / "run"):
        pass
    assert (tmp_path / "precious").read_text() == "mine"


def test_a_file_system_without_locks_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    said: list[str] = []
    with held(tmp_path / "run", said.append) as hold:
        hold.check()
    assert said == [
        f"{tmp_path}/run is on a file system without locks (No locks available): see that one process uses it"
    ]


def test_of_many_at_once_one_is_in_at_a_time(tmp_path: Path) -> None:
    """Six processes come and go 60 times each, each time removing the lock file: the moment in which two could hold
    two files of that name. Inside, a folder is made that must not be there, and removed again."""
    code = (
        _HOLD
        + "from dpo_studio.errors import RunError\nrun, there = Path(sys.argv[1]), Path(sys.argv[2])\nin_ = 0\n"
        + "while in_ < 60:\n try:\n  with held(run):\n   there.mkdir(); there.rmdir(); in_ += 1\n"
        + " except RunError: pass\nprint(in_)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run"), str(tmp_path / "there")]
    (tmp_path / "run").mkdir()
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(6)]
    counts = [int(process.communicate(timeout=60)[0]) for process in processes]
    assert [process.returncode for process in processes] == [0] * 6
    assert counts == [60] * 6
