"""The one gate for what is written: no file is replaced unasked, mixed with others or left half written."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dpo_studio import disk
from dpo_studio.disk import append_line, write_atomically
from dpo_studio.errors import DataError, DPOStudioError, RunError, UsageError
from dpo_studio.evaluation.llm_judge import check_replies
from dpo_studio.paths import user_path
from dpo_studio.writing import (
    appearing,
    check_outputs,
    check_run_place,
    stream_of,
    write_output,
)
from tests.stub_server import better_says_good, stub_server
from tests.tiny_runs import dpo, tiny_rows, write_rows


def furnished(folder: Path) -> Path:
    """A model, an adapter, a run, a recipe that is no run, a source folder and a source file, as users have them."""
    for name in ("model", "adapter", "weights", "run/adapter", "project", "source/deep", "app", "ours"):
        (folder / name).mkdir(parents=True)
    for name in (
        *("model/config.json", "model/tokenizer_config.json", "model/notes.txt", "adapter/adapter_config.json"),
        *("weights/model.safetensors", "run/recipe.yaml", "run/recipe.typed.yaml", "run/result.json"),
        *("project/recipe.yaml", "app/config.json", "source/pairs.jsonl", "pairs.jsonl", "mine", "a:file"),
    ):
        (folder / name).write_text("mine\n")
    (folder / "link").symlink_to("mine")
    (folder / "dangling").symlink_to("ours/new")
    (folder / "into_model").symlink_to("model/new")
    (folder / "model_link").symlink_to("model")
    (folder / "circle").symlink_to("circle")
    (folder / "null").symlink_to("/dev/null")
    (folder / "hard").hardlink_to(folder / "pairs.jsonl")
    os.mkfifo(folder / "pipe")
    return folder


def state(folder: Path) -> dict[str, bytes]:
    """Every file below and what is in it."""
    found = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def names(folder: Path) -> list[str]:
    """Of everything in it, in order."""
    return sorted(path.name for path in folder.iterdir())


# Where an output may be


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("mine", "exists"),
        ("link", "exists"),
        ("ours/../mine", "exists"),
        ("", "is not a file"),
        ("ours", "is not a file"),
        ("model_link", "is not a file"),
        ("pipe", "is not a file"),
        ("/dev/zero", "is not a file"),
        ("/dev/new", "in /dev, which is the system's"),
        ("/proc/self/new", "the system's|nothing can be written"),
        ("none/x", "no such folder"),
        ("mine/x", "no such folder"),
        ("circle", "leads nowhere"),
        ("circle/x", "leads nowhere|no such folder"),
        ("x" * 300, "not the name of a file"),
        ("a\0b", "not the name of a file"),
        ("model/new", "which is a model"),
        ("model/deep/../new", "which is a model"),
        ("model_link/new", "which is a model"),
        ("into_model", "which is a model"),
        ("adapter/new", "which is a model"),
        ("weights/new", "which is a model"),
        ("run/new", "which is a run"),
        ("run/adapter/new", "which is a run"),
        ("source/new", "which is read"),
        ("source/deep/new", "which is read"),
    ],
)
def test_an_output_is_refused_by_name_and_nothing_is_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str, words: str
) -> None:
    monkeypatch.chdir(furnished(tmp_path))
    before = state(tmp_path)
    with pytest.raises(DPOStudioError, match=words) as told:
        check_outputs({"--to": Path(out)}, reads=["source"])
    assert told.value.message.startswith(f"--to {Path(out)}")
    assert state(tmp_path) == before
    if words != "exists":  # saying so changes nothing about any other reason
        with pytest.raises(UsageError, match=words):
            check_outputs({"--to": Path(out)}, reads=["source"], overwrite=True)


@pytest.mark.parametrize(
    "read",
    [
        "pairs.jsonl",
        "pairs.jsonl:train",
        "./ours/../pairs.jsonl",
        "hard",
        "pairs_link",
        "{}/pairs.jsonl",
        "~/pairs.jsonl",
    ],
)
@pytest.mark.parametrize("out", ["pairs.jsonl", "hard", "pairs_link"])
def test_an_output_is_never_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str, read: str) -> None:
    monkeypatch.chdir(furnished(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "pairs_link").symlink_to("pairs.jsonl")
    with pytest.raises(UsageError, match="is what is read"):
        check_outputs({"--to": Path(out)}, reads=[read.format(tmp_path)], overwrite=True)


@pytest.mark.parametrize(
    "out", ["new", "dangling", "project/new", "app/new", "ours/new", "-", "/dev/stdout", "/dev/null", "null"]
)
def test_other_places_are_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str) -> None:
    """Beside a source file, a recipe or any program's config.json; and into streams, which are there already."""
    monkeypatch.chdir(furnished(tmp_path))
    check_outputs({"--to": Path(out)}, reads=["pairs.jsonl", "someone/dataset:train", "bundled:ours", None])
    assert "new" not in names(tmp_path)


def test_a_name_with_a_colon_may_be_written_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(furnished(tmp_path))
    check_outputs({"--to": Path("new")}, reads=["a:file:test"])
    with pytest.raises(UsageError, match="is what is read"):
        check_outputs({"--to": Path("a:file")}, reads=["a:file:test"], overwrite=True)


def test_two_outputs_are_two_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(furnished(tmp_path))
    (tmp_path / "twin").symlink_to("new")
    for one, other in (("new", "new"), ("new", "ours/../new"), ("new", "twin"), ("pairs.jsonl", "hard")):
        with pytest.raises(UsageError, match=r"--b .* and --a are one file"):
            check_outputs({"--a": Path(one), "--b": Path(other)}, overwrite=True)
    check_outputs({"--a": Path("/dev/null"), "--b": Path("/dev/null")})


def test_a_folder_that_cannot_be_written_is_told_of_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(UsageError, match="nothing can be written into its folder"):
        check_outputs({"--to": tmp_path / "new"})


def test_replies_that_cannot_be_written_are_told_of_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").write_text("")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    for name in ("there", "new", "deep/new"):
        with pytest.raises(UsageError, match="cannot be written"):
            check_replies(tmp_path / name, [])


def test_a_disk_that_is_memory_is_a_disk_like_any_other() -> None:
    check_outputs({"--to": Path("/dev/shm/an-output-of-the-tests")})  # noqa: S108
    with pytest.raises(UsageError, match="which is the system's"):
        check_outputs({"--to": Path("/dev/an-output-of-the-tests")})


@pytest.mark.parametrize(
    ("name", "kind"),
    [("-", "stdout"), ("/dev/stdout", "stdout"), ("/dev/fd/1", "stdout"), ("//dev/../dev/null", "null"), ("x", None)],
)
def test_streams_are_known_by_name(name: str, kind: str | None) -> None:
    assert stream_of(Path(name)) == kind


# How it is written


def test_a_new_file_is_whole_and_readable_as_any_other(tmp_path: Path) -> None:
    write_output(tmp_path / "new", "text\n", overwrite=False)
    (tmp_path / "plain").write_text("")
    assert state(tmp_path) == {"new": b"text\n", "plain": b""}
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_what_is_replaced_keeps_its_rights_and_links_lead_where_they_led(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("old")
    (tmp_path / "old").chmod(0o640)
    (tmp_path / "link").symlink_to("old")
    write_output(tmp_path / "link", b"new", overwrite=True)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "old").read_text() == "new"
    assert (tmp_path / "old").stat().st_mode & 0o777 == 0o640


def test_what_came_meanwhile_stands_and_what_was_made_is_kept(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("theirs")
    with pytest.raises(DataError, match="has come to exist meanwhile; what was made is in ") as told:
        write_output(tmp_path / "out", "ours", overwrite=False)
    assert (tmp_path / "out").read_text() == "theirs"
    assert Path(told.value.message.rpartition(" in ")[2]).read_text() == "ours"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "out").write_text("old")
    monkeypatch.setattr(os if call == "fsync" else Path, call, fails)
    for write in (_whole, _rows):
        with pytest.raises(RunError, match="out cannot be written: No space left") as told:
            write(tmp_path / "out")
        assert "free some space" in (told.value.hint or "")
        assert state(tmp_path) == {"out": b"old"}


def test_an_error_that_is_no_full_disk_s_stays_what_it_is(tmp_path: Path) -> None:
    """Whoever writes the rows may fail in ways of their own; and a full disk where nothing of ours is written."""
    with pytest.raises(PermissionError, match="theirs"), appearing([tmp_path / "out"], overwrite=True):
        raise PermissionError(errno.EACCES, "theirs")
    with pytest.raises(OSError, match="No space") as told, appearing([Path("-")], overwrite=True):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert told.value.errno == errno.ENOSPC
    assert state(tmp_path) == {}


def test_a_file_system_without_links_has_the_file_and_keeps_another_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", link)
    write_output(tmp_path / "out", "first", overwrite=False)
    assert state(tmp_path) == {"out": b"first"}
    with pytest.raises(DataError, match="out has come to exist meanwhile"):
        write_output(tmp_path / "out", "second", overwrite=False)
    assert state(tmp_path) == {"out": b"first"}


def _whole(file: Path) -> None:
    write_output(file, "new", overwrite=True)


def _rows(file: Path) -> None:
    with appearing([file], overwrite=True) as (stream,):
        stream.write("row\n")


def test_a_disk_that_is_full_from_the_first_byte_leaves_the_old_file(tmp_path: Path) -> None:
    """A limit on the size of files, which the kernel enforces, in a process of its own."""
    (tmp_path / "out").write_text("old")
    code = (
        "import resource, signal, sys; from pathlib import Path; from dpo_studio.writing import write_output\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: write_output(Path('out'), 'x' * 5000, overwrite=True)\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("RunError") and "File too large" in done.stdout
    assert state(tmp_path) == {"out": b"old"}


def test_lines_that_no_file_can_hold_are_not_lost(tmp_path: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(disk, "finish", full)
    said = dpo("judge", "check", pairs, "--judge", "length", "--out", tmp_path / "out")
    assert said.code == 1 and "No space left on device; its lines are on stdout" in said.err
    assert len(said.lines) == 6 and names(tmp_path) == ["pairs.jsonl"]


@pytest.mark.parametrize("mark", ["recipe.typed.yaml", "metrics.jsonl", "result.json", "environment.json"])
def test_a_run_is_known_by_what_lies_beside_its_recipe(tmp_path: Path, mark: str) -> None:
    (tmp_path / mark).write_text("")
    check_outputs({"--to": tmp_path / "new"})
    (tmp_path / "recipe.yaml").write_text("")
    with pytest.raises(UsageError, match="which is a run"):
        check_outputs({"--to": tmp_path / "new"})


@pytest.mark.parametrize("mark", ["tokenizer_config.json", "tokenizer.json", "generation_config.json"])
def test_a_model_is_known_by_what_lies_beside_its_config(tmp_path: Path, mark: str) -> None:
    (tmp_path / mark).write_text("")
    check_outputs({"--to": tmp_path / "new"})
    (tmp_path / "config.json").write_text("")
    with pytest.raises(UsageError, match="which is a model"):
        check_outputs({"--to": tmp_path / "new"})


@pytest.mark.parametrize("mark", ["adapter_config.json", "model.safetensors.index.json", "pytorch_model.bin"])
def test_a_model_is_known_by_its_weights(tmp_path: Path, mark: str) -> None:
    (tmp_path / mark).write_text("")
    with pytest.raises(UsageError, match="which is a model"):
        check_outputs({"--to": tmp_path / "deep" / ".." / "new"})


def test_writing_goes_to_the_disk_before_the_name_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    real, moved = os.fsync, Path.replace

    def fsync(number: int) -> None:
        seen.append("fsync")
        real(number)

    def replace(path: Path, to: Path) -> Path:
        seen.append("move")
        return moved(path, to)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    write_atomically(tmp_path / "out", "text")
    assert seen == ["fsync", "move", "fsync"]  # the folder's list of names, too


def test_two_processes_never_share_an_unfinished_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also not two threads, nor one process and another on a second machine with the same number."""
    names = set()
    real = os.open

    def opened(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if disk.UNFINISHED in str(path):
            names.add(str(path))
            assert flags & os.O_EXCL and flags & os.O_NOFOLLOW
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", opened)
    for _ in range(5):
        write_atomically(tmp_path / "out", "text")
    assert len(names) == 5


def test_a_name_as_long_as_any_can_be_written(tmp_path: Path) -> None:
    for name in ("x" * 255, "é" * 127):
        check_outputs({"--to": tmp_path / name})
        write_output(tmp_path / name, "text", overwrite=False)
        assert (tmp_path / name).read_text() == "text"


def test_rows_appear_together_or_not_at_all(tmp_path: Path) -> None:
    files = [tmp_path / "a", tmp_path / "b"]
    with pytest.raises(ValueError, match="broken"), appearing(files, overwrite=False) as (one, _):
        one.write("row\n")
        raise ValueError("broken")
    assert state(tmp_path) == {}
    with appearing([*files, Path("/dev/null")], overwrite=False) as (one, other, null):
        for stream in (one, other, null):
            stream.write("é\n")
        assert not files[0].exists()
    assert state(tmp_path) == {"a": "é\n".encode(), "b": "é\n".encode()}


# What is continued


OLD_REPLY = {"key": "0" * 64, "model": "m", "base_url": "http://x", "order": "ab", "prompt": "p", "reply": {}}


@pytest.mark.parametrize("first", [{"dpo_studio": "judge reply"} | OLD_REPLY, OLD_REPLY])
def test_replies_of_ours_are_continued(tmp_path: Path, first: dict[str, Any]) -> None:
    """Those that say so, and those of before they did."""
    file = tmp_path / "deep" / "replies.jsonl"
    check_replies(file)
    assert not file.exists()
    append_line(file, json.dumps(first).encode())
    check_replies(file)
    append_line(file, b"{}")
    assert file.read_bytes() == json.dumps(first).encode() + b"\n{}\n"


def test_a_file_that_a_judge_made_is_continued_though_a_full_disk_cut_its_first_line(tmp_path: Path) -> None:
    pairs = write_rows(tmp_path / "pairs.jsonl", tiny_rows(1, seed=1))
    file = tmp_path / "replies"
    with stub_server(better_says_good) as stub:
        command = ["judge", "check", pairs, "--judge", f"llm:m@{stub.url}", "--judge-replies", file]
        assert dpo(*command).code == 0
        file.write_bytes(file.read_bytes()[:100])
        assert dpo(*command).code == 0
    assert len(stub.requests) == 4


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"mine\n",
        b'{"key": 1}\n',
        b'{"dpo_studio": 1}\n',
        b"[]\n",
        b'"dpo_studio"\n',
        b'{"prompt": "a"}\n',
        b"\xff\xfe",
        b"{" * 5000,
    ],
)
def test_a_file_of_somebody_else_s_is_not_continued(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "mine"
    file.write_bytes(content)
    with pytest.raises(DataError, match="not a file of judge replies: its first line is not one that DPO Studio wrote"):
        check_replies(file)
    assert file.read_bytes() == content


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("/dev/null", "not a file"),
        ("-", "not a file"),
        ("ours", "not a file"),
        ("pipe", "not a file"),
        ("model/new", "which is a model"),
        ("into_model", "which is a model"),
        ("run/deep/new", "which is a run"),
        ("source/new", "which is read"),
        ("pairs.jsonl", "is what is read"),
        ("mine/new", "cannot be written"),
    ],
)
def test_replies_have_a_place_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, words: str
) -> None:
    monkeypatch.chdir(furnished(tmp_path))
    with pytest.raises(UsageError, match=words):
        check_replies(Path(file), ["source", "pairs.jsonl"])


def test_a_line_that_a_full_disk_cut_off_is_ended(tmp_path: Path) -> None:
    file = tmp_path / "replies"
    append_line(file, b"1")
    file.write_bytes(b'1\n{"ha')
    append_line(file, b"2")
    assert file.read_bytes() == b'1\n{"ha\n2\n'


# Where a run may be


@pytest.mark.parametrize(
    "folder",
    ["model/run", "model_link/run", "model/a/b/run", "source/run", "source", "run/inner", "adapter/run", "pairs.jsonl"],
)
def test_a_run_lies_in_nothing_that_is_read_and_in_no_other_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    monkeypatch.chdir(furnished(tmp_path))
    with pytest.raises(RunError, match=f"^run.folder {folder} is"):
        check_run_place(Path(folder), ["model", "source", "pairs.jsonl"])


def test_a_run_in_a_folder_that_is_read_and_one_in_the_place_of_a_file_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "pairs").write_text("{}")
    for folder in ("source", "source/run"):
        with pytest.raises(RunError) as told:
            check_run_place(tmp_path / folder, [tmp_path / "source"])
        assert told.value.message == f"run.folder {tmp_path / folder} is in {tmp_path / 'source'}, which is read"
    with pytest.raises(RunError) as told:
        check_run_place(tmp_path / "pairs", [tmp_path / "pairs"])
    assert told.value.message == f"run.folder {tmp_path / 'pairs'} is a file that is read"


def test_a_run_beside_its_source_or_in_a_project_is_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(furnished(tmp_path))
    for folder in ("runs/a", "project/runs/a", "run", "dangling"):
        check_run_place(Path(folder), ["model", "source", "pairs.jsonl", "someone/model"])


# A home that nobody has


@pytest.mark.parametrize("home", [None, "", "relative", "~"])
def test_without_a_home_there_is_no_folder_named_tilde(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HOME")
    if home is not None:
        monkeypatch.setenv("HOME", home)
    monkeypatch.setattr("pwd.getpwuid", _nobody)
    for path in ("~", "~/.cache/dpo-studio", Path("~/x")):
        with pytest.raises(UsageError, match="this user has no home folder"):
            user_path(path)
    assert user_path("x~") == Path("x~") and user_path("~nosuchuser/x") == Path("~nosuchuser/x")
    assert names(tmp_path) == []


def _nobody(number: int) -> None:
    raise KeyError(number)


# The verbs


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "pairs.jsonl", tiny_rows(6, seed=1))


def commands(folder: Path, out: Path) -> dict[str, list[object]]:
    """Each verb that writes a file it is told, with a model that is not there: it is refused before that is seen."""
    source = folder / "pairs.jsonl"
    return {
        "score": ["score", folder / "no_model", source, "--out", out],
        "generate": ["generate", folder / "no_model", "--prompts", source, "--out", out],
        "judge": ["judge", "check", source, "--judge", "length", "--out", out],
        "check": ["data", "check", source, "--html", out],
        "convert": ["data", "convert", source, out],
        "split": ["data", "split", source, "--train", out, "--held-out", folder / "other.jsonl"],
        "eval": ["eval", folder / "no_run", folder / "no_other", "--judge", "length", "--figure", out.with_suffix("")],
    }


@pytest.mark.parametrize("verb", ["score", "generate", "judge", "check", "convert", "split", "eval"])
def test_no_verb_replaces_a_file_unasked(tmp_path: Path, pairs: Path, verb: str) -> None:
    out = tmp_path / ("page.html" if verb == "check" else "winrates.png" if verb == "eval" else "out.jsonl")
    out.write_text("mine")
    said = dpo(*commands(tmp_path, out)[verb])
    assert said.code == 1 and f"{out} exists\n  hint: --overwrite replaces it" in said.err
    assert out.read_text() == "mine"
    inside = tmp_path / "model"
    inside.mkdir()
    (inside / "model.safetensors").write_bytes(b"weights")
    said = dpo(*commands(tmp_path, inside / out.name)[verb], "--overwrite")
    assert said.code == 2 and "which is a model" in said.err
    assert names(inside) == ["model.safetensors"]


@pytest.mark.parametrize("verb", ["judge", "check", "convert", "split"])
def test_overwrite_replaces_it(tmp_path: Path, pairs: Path, verb: str) -> None:
    out = tmp_path / ("page.html" if verb == "check" else "out.jsonl")
    if verb == "split":
        write_rows(pairs, tiny_rows(60, seed=1))
    out.write_text("mine")
    said = dpo(*commands(tmp_path, out)[verb], "--overwrite")
    assert said.code == 0, said.err
    assert out.read_text() != "mine" and not [name for name in names(tmp_path) if name.startswith(".")]


def test_data_goes_to_a_stream_where_that_is_asked(tmp_path: Path, pairs: Path) -> None:
    for out in ("-", "/dev/stdout"):
        said = dpo("data", "convert", pairs, out)
        assert (said.code, len(said.lines)) == (0, 6), said.err
        assert len(dpo("judge", "check", pairs, "--judge", "length", "--json", "--out", out).lines) == 7
    assert dpo("data", "convert", pairs, "/dev/null").code == 0
    assert dpo("data", "check", pairs, "--html", "-").code == 2
    assert dpo("data", "check", pairs, "--html", "/dev/null").code == 0
    assert names(tmp_path) == ["pairs.jsonl"]


def test_replies_do_not_go_into_somebody_s_file(tmp_path: Path, pairs: Path) -> None:
    """Refused before the server is asked: there is none."""
    diary = tmp_path / "diary.txt"
    diary.write_text("mine\n")
    judge = ["--judge", "llm:m@http://127.0.0.1:9/v1", "--judge-replies", diary]
    for command in (["judge", "check", pairs], ["eval", tmp_path / "no_run"]):
        said = dpo(*command, *judge)
        assert said.code == 1 and "is not a file of judge replies" in said.err
    new = tmp_path / "new"
    said = dpo("judge", "check", pairs, *judge[:3], new, "--out", new)
    assert said.code == 2 and "and --judge-replies are one file" in said.err
    assert diary.read_text() == "mine\n" and names(tmp_path) == ["diary.txt", "pairs.jsonl"]


def test_a_sweep_takes_no_folder_of_somebody_else_s(tmp_path: Path, pairs: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {{path: {tmp_path / 'no_model'}}}\ndata: {{train: {{source: {pairs}}}}}\n")
    for name in ("sweep.md", "sweep.json", "frontier.png", "notes"):
        out = tmp_path / f"of_{name}"
        out.mkdir()
        (out / name).write_text("mine")
        said = dpo("sweep", recipe, "--set", "objective.beta=0.1,0.2", "--out", out)
        assert said.code == 1 and "exists and is not a sweep" in said.err, said.err
        assert state(out) == {name: b"mine"}


@pytest.mark.parametrize("verb", ["train", "dry-run"])
def test_a_run_does_not_begin_inside_its_own_source(tmp_path: Path, verb: str) -> None:
    source = tmp_path / "data"
    source.mkdir()
    write_rows(source / "pairs.jsonl", tiny_rows(6, seed=1))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{path: {tmp_path / 'no_model'}}}\ndata: {{train: {{source: {source}}}}}\n"
        f"run: {{folder: {source / 'run'}}}\n"
    )
    said = dpo("train", recipe, *(["--dry-run"] if verb == "dry-run" else []))
    assert said.code == 1 and "run.folder" in said.err and "which is read" in said.err
    assert names(source) == ["pairs.jsonl"]


@pytest.mark.parametrize("verb", ["score", "generate"])
def test_a_model_s_answer_replaces_a_file_when_asked(tmp_path: Path, tiny_base: Path, pairs: Path, verb: str) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("mine")
    command = ["score", tiny_base, pairs] if verb == "score" else ["generate", tiny_base, "--prompts", pairs]
    more = ["--max-new-tokens", 2] if verb == "generate" else []
    said = dpo(*command, "--out", out, "--overwrite", *more)
    assert said.code == 0, said.err
    assert len([json.loads(line) for line in out.read_text().splitlines()]) == 6
    assert dpo(*command, "--out", out, *more).code == 1
