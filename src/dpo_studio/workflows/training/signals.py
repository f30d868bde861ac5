"""How a training handles SIGINT, SIGTERM, SIGHUP and a closed pipe: at the end of a step."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from dpo_studio.console.progress import Progress
from dpo_studio.errors import Interrupted
from dpo_studio.runs.folder import RunFolder

__all__ = ["interrupted", "stopping_signals"]


@dataclass
class Asked:
    """The signal that asked the run to stop, if one did."""

    progress: Progress
    received: int = 0

    @property
    def signal(self) -> int:
        """The signal received; SIGPIPE where the reader of the progress is gone (`dpo train R 2>&1 | head`); else 0."""
        return self.received or (signal.SIGPIPE if self.progress.unread else 0)


@contextmanager
def stopping_signals(progress: Progress) -> Iterator[Asked]:
    """SIGINT, SIGTERM and SIGHUP wait for the step's end and its checkpoint; a second one does not.

    A SIGHUP that was ignored at the start (nohup) stays ignored.
    """
    asked = Asked(progress)

    def handle(number: int, frame: FrameType | None) -> None:
        if asked.received:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        asked.received = number
        progress.say("stopping after this step, with a checkpoint; a second signal stops at once")

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    try:
        before = {number: signal.signal(number, handle) for number in numbers}
    except ValueError:  # not the main thread: the main thread keeps the signals
        yield asked
        return
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def interrupted(number: int, step: int, run: RunFolder) -> Interrupted:
    """The exception of a stopped run: where it stopped and how to continue."""
    return Interrupted(
        f"stopped by {signal.Signals(number).name} after step {step}; the checkpoint is in {run.checkpoints}",
        exit_code=128 + number,
        hint="the same command continues from there",
    )
