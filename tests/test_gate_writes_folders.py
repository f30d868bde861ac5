"""Folders that a verb makes: one that is there is replaced only if it is asked for, is ours, and holds nothing else."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from dpo_studio.errors import RunError
from dpo_studio.export.whole import MARKERS, check_new, making
from tests.tiny_runs import dpo


def export(out: Path, text: str = "weights", *, marker: str = "export.json", overwrite: bool = False) -> None:
    """A folder as an export leaves it."""
    with making(out, overwrite=overwrite) as place:
        (place.result / "deep").mkdir()
        (place.result / "deep" / "weights").write_text(text)
        (place.result / marker).write_text('{"to": "merged"}')


def test_the_marker_names_every_file_and_keeps_what_it_says(tmp_path: Path) -> None:
    export(tmp_path / "out")
    said = json.loads((tmp_path / "out" / "export.json").read_text())
    assert said == {"to": "merged", "files": ["deep/weights", "export.json"]}


@pytest.mark.parametrize("marker", MARKERS)
def test_a_whole_export_of_ours_is_replaced_when_asked(tmp_path: Path, marker: str) -> None:
    out = tmp_path / "out"
    export(out, marker=marker)
    with pytest.raises(RunError, match="exists"):
        export(out, "new")
    export(out, "new", overwrite=True)
    assert (out / "deep" / "weights").read_text() == "new"
    assert os.listdir(tmp_path) == ["out"]  # noqa: PTH208


@pytest.mark.parametrize("strange", ["file", "deep/file", "link", "folder", "lost", "no marker", "no list", "broken"])
def test_a_folder_with_anything_else_in_it_is_not_ours(tmp_path: Path, strange: str) -> None:
    out = tmp_path / "out"
    export(out)
    if "file" in strange:
        (out / strange).write_text("mine")
    elif strange == "link":
        (out / "link").symlink_to(tmp_path)
    elif strange == "folder":
        (out / "folder").mkdir()
    elif strange == "lost":
        (out / "deep" / "weights").rename(out / "deep" / "other")
    elif strange == "no marker":
        (out / "export.json").unlink()
    else:
        (out / "export.json").write_text('{"to": "merged"}' if strange == "no list" else "[[[")
    with pytest.raises(RunError, match="contains something that DPO Studio did not write there"):
        export(out, "new", overwrite=True)
    assert strange == "lost" or (out / "deep" / "weights").read_text() == "weights"


@pytest.mark.parametrize("kind", ["file", "folder", "empty"])
def test_what_was_never_ours_stays(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        if kind == "folder":
            (out / "mine").write_text("mine")
    with pytest.raises(RunError, match="did not write"):
        check_new(out, overwrite=True)
    assert out.exists()


def test_what_came_while_it_was_made_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(out)
    with pytest.raises(RunError, match="did not write"), making(out, overwrite=True) as place:
        (place.result / "export.json").write_text("{}")
        (out / "mine").write_text("mine")
    assert (out / "mine").read_text() == "mine" and (out / "deep" / "weights").read_text() == "weights"


def test_the_old_folder_comes_back_if_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(tmp_path / "out")
    rename = Path.rename

    def fails(path: Path, to: Path) -> Path:
        if path.name == "result":
            raise OSError(5, "Input/output error")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(RunError, match="Input/output error"):
        export(tmp_path / "out", "new", overwrite=True)
    assert (tmp_path / "out" / "deep" / "weights").read_text() == "weights"
    assert os.listdir(tmp_path) == ["out"]  # noqa: PTH208


def test_a_link_to_an_export_is_judged_by_where_it_leads(tmp_path: Path) -> None:
    export(tmp_path / "there" / "out")
    (tmp_path / "link").symlink_to("there/out")
    with pytest.raises(RunError, match="exists"):
        check_new(tmp_path / "link")
    export(tmp_path / "link", "new", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there" / "out" / "deep" / "weights").read_text() == "new"


@pytest.mark.parametrize("place", ["model", "run", "source"])
def test_no_folder_is_made_in_what_is_read(tmp_path: Path, place: str) -> None:
    (tmp_path / place).mkdir()
    files = {"model": ["model.safetensors"], "run": ["recipe.yaml", "result.json"], "source": ["x"]}[place]
    for name in files:
        (tmp_path / place / name).write_text("")
    with pytest.raises(RunError, match=r"OUT .*new is in "):
        check_new(tmp_path / place / "deep" / "new", reads=[tmp_path / "source"])
    assert sorted(path.name for path in (tmp_path / place).iterdir()) == files


@pytest.mark.parametrize("verb", ["export", "quantize"])
def test_the_verbs_say_so_before_anything_is_loaded(tmp_path: Path, verb: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("mine")
    more = ["--to", "merged"] if verb == "export" else []
    for overwrite, words in (([], "exists"), (["--overwrite"], "did not write there")):
        said = dpo(verb, tmp_path / "none", out, *more, *overwrite)
        assert said.code == 1 and words in said.err
    assert (out / "mine").read_text() == "mine"
