"""Progress of a command: a bar on a terminal, plain lines elsewhere, always on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from dpo_studio.console.text import clock, one_line, printable

if TYPE_CHECKING:  # rich costs 50 ms, and `dpo --help` needs none of it
    from rich.console import Console
    from rich.progress import Progress as Bars

__all__ = ["Plain", "Progress", "Silent", "Terminal"]

_EVERY = 5.0
"""Seconds between two plain lines: a log of a night's run stays readable."""

Advance = Callable[..., None]
"""`advance(n=1, figures="")`: adds n to what is done, and shows the figures."""


class Display(Protocol):
    """A display of progress. Its text is printable already."""

    @property
    def unread(self) -> bool:
        """Whether its reader is gone (`2>&1 | head`)."""

    def line(self, text: str, style: str = "") -> None:
        """Print a line, also during a task."""

    def task(self, title: str, total: int | None, unit: str) -> AbstractContextManager[Advance]:
        """A task with a length, which `advance` counts."""

    def stop(self) -> None:
        """End all tasks."""


class Progress:
    """One a command, as a context manager; text from data or models may be given to it as it is."""

    def __init__(self, display: Display | None = None, *, quiet: bool = False) -> None:
        """`display`: by default a bar if stderr is a terminal, else lines."""
        self._quiet = quiet
        self._given = display

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._given is not None:
            self._given.stop()

    @property
    def unread(self) -> bool:
        """The reader of stderr is gone: nothing more is written, and a training stops."""
        return self._given is not None and self._given.unread

    def say(self, text: str) -> None:
        """Print a line of news, also during a task."""
        if not self._quiet:
            self._display().line(printable(text))

    def warn(self, text: str) -> None:
        """Print a warning, even where news is off."""
        self._display().line(f"warning: {printable(text)}", style="yellow")

    @contextmanager
    def task(self, title: str, total: int | None, unit: str = "") -> Iterator[Advance]:
        """A task with a length; `advance(n, figures)` counts."""
        if self._quiet:
            yield _nothing
            return
        with self._display().task(one_line(title), total, one_line(unit)) as advance:
            yield lambda n=1, figures="": advance(n, one_line(figures))

    def _display(self) -> Display:
        if self._given is None:
            self._given = _on_stderr()
        return self._given


def _nothing(n: int = 1, figures: str = "") -> None:
    """An `advance` that shows nothing."""


def _on_stderr() -> Display:
    """FORCE_COLOR in the log of a machine does not make it a terminal."""
    from rich.console import Console

    class Telling(Console):
        """Rich would exit at once when the reader is gone, whatever is being computed."""

        unread = False

        def on_broken_pipe(self) -> None:
            self.quiet = True
            self.unread = True

    seen = sys.stderr is not None and sys.stderr.isatty()
    console = Telling(stderr=True, force_interactive=None if seen else False)
    return Terminal(console) if console.is_interactive else Plain(console)


class Silent:
    """Shows nothing: for a process beside the one that talks."""

    unread = False

    def line(self, text: str, style: str = "") -> None:
        """Nothing."""

    @contextmanager
    def task(self, title: str, total: int | None, unit: str) -> Iterator[Advance]:
        """Counts for nobody."""
        yield _nothing

    def stop(self) -> None:
        """Nothing is to end."""


class _OnConsole:
    """What both displays share: lines on a rich console."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @property
    def unread(self) -> bool:
        return getattr(self._console, "unread", False) is True

    def line(self, text: str, style: str = "") -> None:
        from rich.text import Text

        console = self._console
        console.print(Text(text, style=style), soft_wrap=not console.is_interactive, highlight=False)


class Terminal(_OnConsole):
    """Bars, which are redrawn."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._bars: Bars | None = None
        self._tasks = 0

    @contextmanager
    def task(self, title: str, total: int | None, unit: str) -> Iterator[Advance]:
        bars = self._started()
        task = bars.add_task(title, total=total, done=_done(0, total, unit), left="", figures="")
        self._tasks += 1

        def advance(n: int = 1, figures: str = "") -> None:
            bars.advance(task, n)
            now = next(known for known in bars.tasks if known.id == task)
            fields: dict[str, Any] = {"done": _done(round(now.completed), total, unit)}
            fields["left"] = "" if now.time_remaining is None else f"{clock(now.time_remaining)} left"
            fields |= {"figures": figures} if figures else {}
            bars.update(task, **fields)

        try:
            yield advance
        finally:
            self._tasks -= 1
            bars.update(task, left="")
            bars.stop_task(task)
            if self._tasks:  # a task inside another prints no line at its end
                bars.remove_task(task)
            else:
                self.stop()

    def stop(self) -> None:
        if self._bars is not None:
            bars, self._bars = self._bars, None
            bars.stop()

    def _started(self) -> Bars:
        if self._bars is None:
            self._bars = _bars(self._console)
            self._bars.start()
        return self._bars


class Plain(_OnConsole):
    """Plain lines: for a file, a pipe, a log."""

    @contextmanager
    def task(self, title: str, total: int | None, unit: str) -> Iterator[Advance]:
        lines = _PlainTask(self.line, title, total, unit)
        try:
            yield lines.advance
        finally:
            lines.end()

    def stop(self) -> None:
        """Print a line."""


def _bars(console: Console) -> Bars:
    """Title, bar, done, elapsed, left, figures; on 80 columns a shorter bar and no elapsed time."""
    from rich import progress

    roomy = console.width >= 110
    columns: list[progress.ProgressColumn] = [
        progress.TextColumn("{task.description}", style="bold", markup=False),
        progress.BarColumn(24 if roomy else 8, complete_style="blue", finished_style="blue", pulse_style="blue"),
        progress.TextColumn("{task.fields[done]}", markup=False),
    ]
    if roomy:
        columns.append(progress.TimeElapsedColumn())
    columns.append(progress.TextColumn("{task.fields[left]}", markup=False))
    columns.append(progress.TextColumn("{task.fields[figures]}", markup=False))
    return progress.Progress(*columns, console=console, redirect_stdout=False)  # stdout is for data


def _done(done: int, total: int | None, unit: str) -> str:
    counted = f"{done:,}" if total is None else f"{done:,}/{total:,}"
    return f"{counted} {unit}".rstrip()


class _PlainTask:
    """Plain lines about one task: the first, the last, and one every few seconds between."""

    def __init__(self, write: Callable[[str], None], title: str, total: int | None, unit: str) -> None:
        self._write_to, self._title, self._total, self._unit = write, title, total, unit
        self._started = time.monotonic()
        self._done = 0
        self._figures = ""
        self._written: tuple[float, int] | None = None
        """When the last line was written, and how much was done by then."""

    def advance(self, n: int = 1, figures: str = "") -> None:
        self._done += n
        self._figures = figures or self._figures
        if self._written is None or self._done == self._total or time.monotonic() - self._written[0] >= _EVERY:
            self._line()

    def end(self) -> None:
        """Print the last line, unless it is printed already."""
        if self._written is None or self._written[1] != self._done:
            self._line()

    def _line(self) -> None:
        now = time.monotonic()
        parts = [f"{self._title} {_done(self._done, self._total, self._unit)}", self._figures, self._time(now)]
        self._write_to("  ".join(part for part in parts if part))
        self._written = (now, self._done)

    def _time(self, now: float) -> str:
        elapsed = now - self._started
        if self._total is None or not 0 < self._done < self._total:
            return f"{clock(elapsed)} elapsed"
        return f"{clock(elapsed / self._done * (self._total - self._done))} left"
