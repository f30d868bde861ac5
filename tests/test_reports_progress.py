"""Progress: plain lines in a pipe, a bar on a terminal, never a word on stdout."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from dpo_studio.console import progress as module
from dpo_studio.console.progress import Progress, Terminal


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_plain_lines_are_the_first_the_last_and_one_every_five_seconds(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    """12 steps of 2 s: lines at 2 s, then at the first step 5 s later (8 s), 14 s, 20 s, and the end."""
    with Progress() as progress, progress.task("train", 12) as advance:
        for step in range(12):
            clock.now += 2
            advance(figures=f"loss 0.{60 - step}  3.1 pairs/s")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "train 1/12  loss 0.60  3.1 pairs/s  00:22 left",
        "train 4/12  loss 0.57  3.1 pairs/s  00:16 left",
        "train 7/12  loss 0.54  3.1 pairs/s  00:10 left",
        "train 10/12  loss 0.51  3.1 pairs/s  00:04 left",
        "train 12/12  loss 0.49  3.1 pairs/s  00:24 elapsed",
    ]


def test_a_task_that_stops_early_says_how_far_it_came(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt), Progress() as progress, progress.task("train", 40, "steps") as advance:
        advance(figures="loss 0.69")
        advance(figures="loss 0.68")
        raise KeyboardInterrupt
    assert [line.split("  ")[:2] for line in capsys.readouterr().err.splitlines()] == [
        ["train 1/40 steps", "loss 0.69"],
        ["train 2/40 steps", "loss 0.68"],
    ]


def test_a_task_without_a_known_length_counts(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress() as progress, progress.task("reading", None, "rows") as advance:
        advance(1500)
    assert capsys.readouterr().err == "reading 1,500 rows  00:00 elapsed\n"


def test_quiet_keeps_warnings_only(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(quiet=True) as progress, progress.task("train", 3) as advance:
        advance(2, figures="loss 0.1")
        progress.say("a line")
        progress.warn("the disk is nearly full")
    out, err = capsys.readouterr()
    assert (out, err) == ("", "warning: the disk is nearly full\n")


def test_text_from_data_is_neither_markup_nor_control(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress() as progress:
        progress.say("[bold]row[/bold] 3: \x1b[2J :smile: [/nothing] \u202e" + "x" * 300)
        with progress.task("[red]a\nb\x1b", 1) as advance:
            advance(figures="[link=x]\x07\ny")
    said, line = capsys.readouterr().err.splitlines()
    assert said == r"[bold]row[/bold] 3: \x1b[2J :smile: [/nothing] \u202e" + "x" * 300
    assert line.startswith(r"[red]a b\x1b 1/1  [link=x]\x07 y  ")


def test_a_pipe_stays_plain_whatever_the_environment_asks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with Progress() as progress, progress.task("train", 1) as advance:
        advance()
    assert capsys.readouterr().err == "train 1/1  00:00 elapsed\n"


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_gets_a_bar(width: int, capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    with Progress(Terminal(terminal)) as progress, progress.task("train", 40) as advance:
        advance(12, figures="loss 0.512  [margin] 0.41\x1b")
        print("data")
        progress.say("a line")
        with progress.task("held-out", 4, "pairs") as inner:
            inner(4)
    screen = terminal.file.getvalue()  # type: ignore[attr-defined]
    last = screen.replace("\r", "\n").split("\n")[-2]
    assert "train" in last
    assert "12/40" in last
    assert r"loss 0.512  [margin] 0.41\x1b" in last
    assert "held-out" not in last
    assert "a line" in screen
    assert capsys.readouterr().out == "data\n", "what goes to stdout stays there"
