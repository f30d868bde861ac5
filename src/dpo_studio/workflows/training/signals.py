"""SIGINT, SIGTERM, SIGHUP and a reader that went away, as a training hears them: at a step's end."""

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
    """What asked the run to stop, if anything did."""

    progress: Progress
    received: int = 0

    @property
    def signal(self) -> int:
        """The signal received; SIGPIPE where nobody reads the progress any more (`dpo train R 2>&1 | head`); else 0."""
        return self.received or (signal.SIGPIPE if self.progress.unread else 0)


@contextmanager
def stopping_signals(progress: Progress) -> Iterator[Asked]:
    """SIGINT, SIGTERM and SIGHUP wait for the step's end and its checkpoint; a second one does not.

    A SIGHUP that was ignored when we started (nohup) stays ignored.
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
    except ValueError:  # not the main thread: whoever started it keeps the signals
        yield asked
        return
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def interrupted(number: int, step: int, run: RunFolder) -> Interrupted:
    """What a stopped run raises: where it is and how it goes on."""
    return Interrupted(
        f"stopped by {signal.Signals(number).name} after step {step}; the checkpoint is in {run.checkpoints}",
        exit_code=128 + number,
        hint="the same command continues from there",
    )
