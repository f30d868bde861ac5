"""The one gate for what is read: only regular files, nothing waited for, and no more than a limit of them."""

from __future__ import annotations

import errno
import io
import json
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpo_studio import reading
from dpo_studio.errors import DataError, ModelError, RunError
from dpo_studio.reading import input_text, open_input, open_regular, parse_json, read_bytes, read_json, read_text
from dpo_studio.runs.facts import read_run
from dpo_studio.workflows.talking import read_prompts

from .gate_reads import GOOD, dpo

Streams = dict[tuple[int, int, int], tuple[int, int]]


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Iterator[Streams]:
    """No stream was opened yet."""
    opened: Streams = {}
    monkeypatch.setattr(reading, "_STREAMS", opened)
    yield opened
    for descriptor, _ in opened.values():
        os.close(descriptor)


def odd_files(folder: Path) -> dict[str, str]:
    """Names that are no regular files, each with what its refusal says."""
    os.mkfifo(folder / "fifo")
    (folder / "to-fifo").symlink_to(folder / "fifo")
    (folder / "to-zero").symlink_to("/dev/zero")
    (folder / "twice").symlink_to(folder / "to-zero")
    (folder / "to-tty").symlink_to("/dev/ptmx")
    (folder / "folder").mkdir()
    (folder / "plain").write_text("{}")
    (folder / "to-nothing").symlink_to(folder / "nothing")
    (folder / "loop").symlink_to(folder / "loop")
    bound = socket.socket(socket.AF_UNIX)
    bound.bind(str(folder / "socket"))
    bound.close()
    return {
        **dict.fromkeys(("fifo", "to-fifo"), "is a named pipe"),
        **dict.fromkeys(("to-zero", "twice", "to-tty", "/dev/full", "/dev/random"), "is a device"),
        "folder": "is a folder",
        "socket": "is a socket",
        "to-nothing": "no such file",
        "nothing/below": "no such file",
        "plain/below": "no such file",
        "loop": "symbolic links",
        "a\0b": "cannot be read",
        "x" * 300: "cannot be read",
    }


def test_what_is_no_regular_file_is_refused_by_name_at_once(tmp_path: Path) -> None:
    """A pipe without a writer would be waited for, a device has no end: each has five seconds."""
    for name, says in odd_files(tmp_path).items():
        told: list[str] = []

        def attempt(path: str = os.path.join(tmp_path, name), told: list[str] = told) -> None:  # noqa: PTH118
            try:
                open_regular(path, what="thing", error=ModelError).close()
            except ModelError as error:
                told.append(error.message)

        thread = threading.Thread(target=attempt, daemon=True)
        thread.start()
        thread.join(5)
        assert told, f"{name} hangs or is opened"
        assert told[0].startswith("thing: ")
        assert says in told[0]


def test_a_refused_file_is_not_left_open(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for _ in range(20):
        with pytest.raises(DataError):
            open_regular(tmp_path / "fifo", what="thing")
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_a_file_is_opened_once_and_not_inherited(tmp_path: Path) -> None:
    """What was looked at is what is read: another file under the name changes nothing."""
    file = tmp_path / "x"
    file.write_bytes(b"first")
    with open_regular(file, what="thing") as opened:
        assert not os.get_inheritable(opened.fileno())
        file.unlink()
        os.mkfifo(file)
        assert opened.read() == b"first"


def test_a_terminal_that_is_looked_at_does_not_become_ours(tmp_path: Path) -> None:
    """A process without one, as daemons are: /dev/tty is there only for a process that has one."""
    code = (
        "import os; from dpo_studio.reading import open_regular\n"
        "_, terminal = os.openpty()\n"
        "try: open_regular(os.ttyname(terminal), what='thing')\n"
        "except Exception as error: print(error.message)\n"
        "try: os.open('/dev/tty', os.O_RDWR)\n"
        "except OSError as error: print(error.strerror)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, start_new_session=True
    )
    refused, looked = done.stdout.splitlines()
    assert "is a device, not a file" in refused
    assert looked == os.strerror(errno.ENXIO)


def test_a_file_that_has_nothing_to_say_yet_is_not_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """/proc/kmsg is one, and for root alone: of a file that is not waited for, Python then reads None."""

    class Silent(io.FileIO):
        def readinto(self, buffer: object) -> None:
            return None

        readall = read = readinto  # type: ignore[assignment]

    (tmp_path / "x").write_bytes(b"")
    monkeypatch.setattr(reading, "open_regular", lambda path, **_: Silent(path))
    with pytest.raises(DataError, match=r"thing: .*x has no content to read now"):
        read_bytes(tmp_path / "x", what="thing", limit=9)


def test_names_of_any_bytes_are_shown_as_text(tmp_path: Path) -> None:
    file = os.path.join(os.fsencode(tmp_path), b"\xff\xc3\xbc")  # noqa: PTH118
    with pytest.raises(DataError, match=r"\\xffü") as caught:
        read_bytes(os.fsdecode(file), what="thing", limit=1)
    caught.value.message.encode("utf-8")
    Path(os.fsdecode(file)).write_bytes(b"1")
    assert read_bytes(os.fsdecode(file), what="thing", limit=1) == b"1"


def test_a_file_has_at_most_the_bytes_that_are_allowed(tmp_path: Path) -> None:
    """Whatever its folder says it has: files of the kernel's say none, and a sparse file takes no place."""
    (tmp_path / "x").write_bytes(b"12345")
    assert read_bytes(tmp_path / "x", what="thing", limit=5) == b"12345"
    with pytest.raises(RunError, match=r"thing: .*x is over 4 bytes"):
        read_bytes(tmp_path / "x", what="thing", limit=4, error=RunError)
    with pytest.raises(DataError, match="over 9 bytes"):
        read_bytes("/proc/self/maps", what="thing", limit=9)
    with (tmp_path / "sparse").open("wb") as sparse:
        sparse.truncate(2**40)
    with pytest.raises(DataError, match="over 1,000 bytes"):
        read_bytes(tmp_path / "sparse", what="thing", limit=1000)
    with pytest.raises(DataError, match="cannot be read"):
        read_bytes("/proc/self/mem", what="thing", limit=1000)


def test_text_is_utf8(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes("ü".encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        read_text(tmp_path / "x", what="thing", limit=10)
    (tmp_path / "x").write_text("ü", encoding="utf-8")
    assert read_text(tmp_path / "x", what="thing", limit=10) == "ü"


# JSON


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[" * 101 + "]" * 101, "deeper than 100"),
        ('{"a":' * 101 + "1" + "}" * 101, "deeper than 100"),
        ("[" * 50_000, "deeper than 100"),
        ('[{"a":' * 60 + "1" + "}]" * 60, "deeper than 100"),
        ('{"a": NaN}', "NaN is not a number"),
        ("[-Infinity]", "-Infinity is not a number"),
        ("1e999", "too large"),
        ("-1.5e400", "too large"),
        ("9" * 101, "101 digits"),
        ('{"a": -' + "9" * 5000 + "}", "5,001 digits"),
        ('{"a": 1, "a": 2}', "'a' occurs twice"),
        ('{"b": {"a": [1], "c": 0, "a": [1, 2]}}', "'a' occurs twice"),
        (b'"\xff"', "not UTF-8"),
        (b"\xff\xfe1\x00", "not UTF-8"),
        ('"\\ud800"', "surrogate"),
        ('{"\\uDFFF": 1}', "surrogate"),
        ('["\\uD83D", "\\uDE00"]', "surrogate"),
        ("", "line 1 column 1"),
        ("\ufeff{}", "BOM"),
        ('{"a": 1,}', "line 1"),
        ("[1] x", "Extra data"),
        ("'a'", "line 1"),
    ],
)
def test_json_that_is_none_or_too_much_is_the_error_that_was_asked_for(text: str | bytes, says: str) -> None:
    with pytest.raises(ModelError, match="thing: not JSON") as caught:
        parse_json(text, what="thing", hint="fetch it again", error=ModelError)
    assert says in caught.value.message
    assert caught.value.hint == "fetch it again"
    assert len(caught.value.message) < 300


def test_honest_json_is_what_the_json_module_makes_of_it() -> None:
    for text in (
        "[" * 100 + "]" * 100,
        '{"model_max_length": 1000000000000000019884624838656, "a": 1.5e-7, "b": null, "c": [true, -0.0, "ü"]}',
        '{"a": {"x": 1}, "a": {"x": 1}}',
        '"\\ud83d\\ude00 \\\\ud800"',
        "9" * 100,
        " 7 ",
    ):
        assert parse_json(text, what="thing") == json.loads(text)
        assert parse_json(text.encode(), what="thing") == json.loads(text)


def test_settings_may_hold_infinity_where_the_caller_says_so() -> None:
    assert parse_json("[Infinity, 1e999]", what="thing", finite=False) == [float("inf")] * 2


def test_a_limit_of_depth_is_the_caller_s(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("[[[1]]]", encoding="utf-8")
    assert read_json(tmp_path / "x", what="thing", limit=7, depth=3) == [[[1]]]
    with pytest.raises(DataError, match=r"x: not JSON.*deeper than 2"):
        read_json(tmp_path / "x", what="thing", limit=7, depth=2)
    with pytest.raises(DataError, match="over 6 bytes"):
        read_json(tmp_path / "x", what="thing", limit=6)


# Streams that this process was started with


def test_a_stream_of_our_own_is_read_and_can_be_read_again(streams: Streams) -> None:
    """By all its names; a pipe is kept in a file without a name, a file is read from where it stood."""
    for content in (b"a line\n" * 3, b"", b"x" * 3_000_000):
        read, write = os.pipe()
        if len(content) > 65536:
            source = f"import os; os.write({write}, b'x' * 1_000_000) ; os.write({write}, b'x' * 2_000_000)"
            with subprocess.Popen([sys.executable, "-c", source], pass_fds=[write]):
                os.close(write)
                with open_input(f"/dev/fd/{read}", what="thing") as opened:
                    assert opened.read() == content
        else:
            os.write(write, content)
            os.close(write)
            with open_input(f"/dev/fd/{read}", what="thing") as opened:
                assert opened.read() == content
        with open_input(f"/proc/self/fd/{read}", what="thing") as again:
            assert again.read(5) == content[:5]
            assert again.seek(0) == 0
            assert again.read() == content
        os.close(read)
    assert len(streams) == 3  # three pipes, though their numbers are the same


def test_a_file_as_stream_begins_where_it_stood(tmp_path: Path, streams: Streams) -> None:
    (tmp_path / "x").write_bytes(b"header\nrest")
    with (tmp_path / "x").open("rb", buffering=0) as file:
        file.readline()
        for _ in range(2):
            with open_input(f"/dev/fd/{file.fileno()}", what="thing") as opened:
                assert opened.read() == b"rest"


def test_a_stream_has_limits(monkeypatch: pytest.MonkeyPatch, streams: Streams) -> None:
    """One that nobody writes to, one that stops in the middle, one that is too long, one that is a device."""
    monkeypatch.setattr(reading, "STREAM_LIMITS", reading.StreamLimits(silence=0.2))
    read, write = os.pipe()
    for sent in (b"", b"half a li"):
        os.write(write, sent)
        started = time.monotonic()
        with pytest.raises(ModelError, match=f"thing: /dev/fd/{read} gave no byte for"):
            open_input(f"/dev/fd/{read}", what="thing", error=ModelError)
        assert time.monotonic() - started < 5
    monkeypatch.setattr(reading, "STREAM_LIMITS", reading.StreamLimits(size=10, silence=0.2))
    os.write(write, b"x" * 11)
    with pytest.raises(DataError, match="gives over 10 bytes"):
        open_input(f"/dev/fd/{read}", what="thing")
    os.close(read)
    os.close(write)
    for device in ("/dev/zero", "/dev/urandom"):
        descriptor = os.open(device, os.O_RDONLY)
        with pytest.raises(DataError, match="is a device"):
            open_input(f"/dev/fd/{descriptor}", what="thing")
        os.close(descriptor)
    descriptor = os.open("/dev/null", os.O_RDONLY)
    with open_input(f"/dev/fd/{descriptor}", what="thing") as opened:
        assert opened.read() == b""
    os.close(descriptor)
    with pytest.raises(DataError, match="cannot be read: Bad file descriptor"):
        open_input("/dev/fd/987", what="thing")
    descriptor = os.open("/", os.O_RDONLY)
    with pytest.raises(DataError, match="is a folder"):
        open_input(f"/dev/fd/{descriptor}", what="thing")
    os.close(descriptor)


def test_sockets_and_terminals_that_we_were_given_are_read_to_their_end(streams: Streams) -> None:
    """A terminal ends by Ctrl-D."""
    ours, theirs = socket.socketpair()
    theirs.sendall(b"over a socket")
    theirs.close()
    master, terminal = os.openpty()
    os.write(master, b"typed\n\x04")
    for descriptor, content in ((ours.fileno(), b"over a socket"), (terminal, b"typed\n")):
        with open_input(f"/dev/fd/{descriptor}", what="thing") as opened:
            assert opened.read() == content
    ours.close()
    os.close(master)
    os.close(terminal)


def test_a_disk_is_no_device_that_ends() -> None:
    """A block device (a RAM disk) may have the number that /dev/null has among character devices."""
    null = os.stat("/dev/null")  # noqa: PTH116
    assert reading._ends(0, null)
    disk = os.stat_result((null.st_mode ^ stat.S_IFCHR | stat.S_IFBLK, *null[1:]), {"st_rdev": null.st_rdev})
    assert disk.st_rdev == null.st_rdev and not reading._ends(0, disk)


def test_only_our_own_streams_are_streams(tmp_path: Path) -> None:
    """A link to a stream, and another process's, are names like any other."""
    parent = os.getppid()
    (tmp_path / "link").symlink_to("/dev/stdin")
    for name in (f"/proc/{parent}/fd/0", "/dev/fd/0x", "/dev/fd/-1", "--", "/dev/stdout", "/dev/fd/0/../0"):
        assert not reading.is_own_stream(name)
    for name in ("-", "/dev/stdin", "/dev/fd/0", "/proc/self/fd/12"):
        assert reading.is_own_stream(name)
    read, write = os.pipe()
    (tmp_path / "link").unlink()
    (tmp_path / "link").symlink_to(f"/proc/self/fd/{read}")
    with pytest.raises(DataError, match="is a named pipe"):
        open_input(tmp_path / "link", what="thing")
    os.close(read)
    os.close(write)


def test_text_from_a_stream_is_bounded_too(streams: Streams) -> None:
    read, write = os.pipe()
    os.write(write, b"12345")
    os.close(write)
    assert input_text(f"/dev/fd/{read}", what="prompt", limit=5) == "12345"
    with pytest.raises(DataError, match=r"prompt: .* is over 4 bytes"):
        input_text(f"/dev/fd/{read}", what="prompt", limit=4)
    os.close(read)


# The command


def test_pairs_and_recipes_come_from_pipes_that_the_command_was_given(tmp_path: Path) -> None:
    done = dpo("data", "check", "-", cwd=tmp_path, feed=GOOD * 3)
    assert done.code == 0
    assert "3 pairs of 3 rows" in done.out
    done = dpo("data", "check", "/dev/stdin", cwd=tmp_path, feed=b"[" + GOOD.strip() + b"]")
    assert "1 pair of 1 row" in done.out
    done = dpo("train", "-", cwd=tmp_path, feed=b"model: {path: x}\nnonsense: 1\n")
    assert done.code == 1
    assert "unknown key nonsense" in done.error


def test_a_pipe_without_a_writer_never_hangs_a_verb(tmp_path: Path) -> None:
    """As a file of a source's folder, as a recipe; and a device behind a link."""
    os.mkfifo(tmp_path / "r.yaml")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "folder" / "x.parquet")
    (tmp_path / "z.csv").symlink_to("/dev/zero")
    for arguments, name in (
        (("data", "check", "folder"), "x.parquet is a named pipe"),
        (("data", "convert", "z.csv", "out.jsonl"), "z.csv is a device"),
        (("train", "r.yaml"), "r.yaml is a named pipe"),
    ):
        done = dpo(*arguments, cwd=tmp_path)
        assert done.code == 1, done.error
        assert name in done.error


def test_prompts_and_a_run_s_files_pass_the_gate(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "prompts.txt")
    os.mkfifo(tmp_path / "metrics.jsonl")
    (tmp_path / "p.jsonl").symlink_to("/dev/zero")
    for name, says in (("prompts.txt", "is a named pipe"), ("p.jsonl", "is a device")):
        with pytest.raises(DataError, match=says):
            read_prompts(tmp_path / name)
    with pytest.raises(RunError, match=r"metrics\.jsonl is a named pipe"):
        read_run(tmp_path)
    (tmp_path / "p.jsonl").unlink()
    (tmp_path / "p.jsonl").write_text('{"prompt": "q"}\n' + '{"prompt": ' + "[" * 9999 + "\n", encoding="utf-8")
    with pytest.raises(DataError, match="line 2: no JSON object"):
        read_prompts(tmp_path / "p.jsonl")
