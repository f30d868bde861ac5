"""Files and folders that appear whole: what is there before, between and after, seen from outside."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpo_studio import disk


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_two_scratch_folders_of_one_name_are_two(tmp_path: Path) -> None:
    """Hidden, beside what they will be, and gone afterwards, also after an error."""
    with disk.scratch_folder(tmp_path / "out") as one, disk.scratch_folder(tmp_path / "out") as other:
        assert one != other and one.parent == other.parent == tmp_path
        assert all(name.startswith(".out.writing-") for name in names(tmp_path)) and len(names(tmp_path)) == 2
    with pytest.raises(KeyboardInterrupt), disk.scratch_folder(tmp_path / "out") as one:
        (one / "half").write_text("")
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_a_folder_takes_the_place_of_another_whole(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("")
    with disk.scratch_folder(tmp_path / "out") as made:
        (made / "new").write_text("")
        disk.put_folder(made, tmp_path / "out")
        assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["new"]


def test_what_was_there_comes_back_if_the_new_one_cannot_take_its_place(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("")
    with pytest.raises(FileNotFoundError):
        disk.put_folder(tmp_path / "never made", tmp_path / "out")
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["old"]


def test_a_folder_that_is_dropped_has_lost_its_name_before_its_first_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "step-2").mkdir()
    (tmp_path / "step-2" / "state").write_text("")
    with monkeypatch.context() as killed:
        killed.setattr(disk, "remove_folder", lambda folder: None)
        disk.delete_folder(tmp_path / "step-2")
    (left,) = names(tmp_path)
    assert left.startswith(".step-2.writing-")
    disk.remove_leftovers(tmp_path)
    assert names(tmp_path) == []


def test_a_sweep_takes_only_what_this_project_left_unfinished(tmp_path: Path) -> None:
    """And of a link its name, not what it leads to."""
    mine = ["notes", ".mywriting-1", ".writing-1", ".out.writing-notes", "out.writing-12"]
    for name in mine:
        (tmp_path / name).write_text("mine")
    (tmp_path / ".step-1.writing-12-ab").symlink_to(tmp_path / "notes")
    (tmp_path / ".result.json.writing-12-ab").write_text("{")
    disk.remove_leftovers(tmp_path)
    assert names(tmp_path) == sorted(mine)
