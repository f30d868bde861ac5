"""The end of one rank is the end of all: a heartbeat between a run's processes, and the words of the first to fail.

A process that was killed or stopped (SIGSTOP), or whose machine is gone, cannot say so, and the others would wait for
it in their next sum for ever. So every rank has a thread that counts up in the launcher's store once a second, and
looks whether its neighbour does: a ring, so that 1,024 ranks ask some 4,000 questions a second, not a million. The
thread beats while its process loads, compiles or evaluates, however long that takes. Seconds are counted in its own
turns: a machine that was suspended finds nobody late.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from dpo_studio.errors import DPOStudioError, RankLostError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

__all__ = ["Failure", "Watch"]

_PATIENCE = 15
"""Turns of a second without a heartbeat until a rank counts as dead. Torch's launcher then waits 30 s more before it
kills a process that does not end: a minute at most in all."""
_GRACE = 3
"""Seconds that this process has to end by itself, with its own message, after another rank has failed."""


@dataclass(frozen=True)
class Failure:
    """Why a run of several processes ended."""

    rank: int
    """Whose failure it was."""
    code: int
    """The exit code of all ranks."""
    message: str
    lost: bool = False
    """Whether another rank was lost, rather than that this one refused: the other's own words come first."""

    def as_error(self) -> DPOStudioError:
        """The exception that the ranks leave by."""
        if self.lost:
            return RankLostError(self.message)
        error = DPOStudioError(self.message)
        error.exit_code = self.code
        return error


class Watch:
    """Notices that another rank has failed, ended or stopped, and ends this process."""

    def __init__(self, rank: int, size: int, store: TCPStore) -> None:
        self._rank, self._size, self._store = rank, size, store
        begun = f"dpo/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"  # a launcher that starts again keeps its store
        self._failed, self._beat = f"{begun}/failed", f"{begun}/beat"
        self._patience = int(os.environ.get("DPO_STUDIO_PATIENCE", _PATIENCE))
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._found: Failure | None = None
        self._turns = 0
        """Seconds since the store has answered."""
        self._ended: Callable[[int, str], None] = lambda code, message: None

    def start(self, ended: Callable[[int, str], None]) -> None:
        """Begin to beat and to look; `ended` is told why, where this thread ends the process."""
        self._ended = ended
        self._stopped.clear()
        self._turns = 0
        for work in (self._look, self._guard):
            threading.Thread(target=work, daemon=True, name="dpo-watch").start()

    def stop(self) -> None:
        """The run has ended well, on every rank."""
        self._stopped.set()

    def tell(self, failure: Failure) -> Failure:
        """Tell the others of a failure here; returns the one that came first. This process has to end now."""
        try:
            if failure.lost:  # whoever has gone may have said why
                for _ in range(10):
                    if self._found is not None:
                        return self._found
                    time.sleep(0.1)
                if (first := self._failure()) is not None:
                    return first
            with self._lock:
                told = self._store.compare_set(self._failed, "", json.dumps(asdict(failure)))
            return Failure(**json.loads(told))
        except (RuntimeError, ValueError):  # the store has gone with its process
            return failure

    def _failure(self) -> Failure | None:
        with self._lock:
            return Failure(**json.loads(self._store.get(self._failed))) if self._store.check([self._failed]) else None

    def _look(self) -> None:
        """Beat, and look at the neighbour and for a failure: each exchange with the store may take for ever."""
        neighbour = (self._rank + 1) % self._size
        beats, seen, late = 0, -1, 0
        while not self._stopped.wait(1.0):
            beats += 1
            try:
                with self._lock:
                    self._store.set(f"{self._beat}/{self._rank}", str(beats))
                    key = f"{self._beat}/{neighbour}"
                    now = int(self._store.get(key)) if self._store.check([key]) else -1
                self._found = self._found or self._failure()
            except (RuntimeError, ValueError):
                continue
            self._turns = 0
            late, seen = late + 1 if now == seen else 0, now
            if late >= self._patience and self._found is None:
                words = f"rank {neighbour} of {self._size} has not answered for {late} s: it or its machine was stopped"
                self._found = self.tell(Failure(self._rank, RankLostError.exit_code, words, lost=True))

    def _guard(self) -> None:
        """End the process once a failure is found, or the store itself has not answered for too long."""
        while not self._stopped.wait(1.0):
            self._turns += 1
            if self._turns > self._patience:
                words = f"the launcher, or the first process, has not answered for {self._turns} s"
                self._found = Failure(self._rank, RankLostError.exit_code, words, lost=True)
            if (failure := self._found) is not None:
                break
        else:
            return
        if self._stopped.wait(_GRACE):  # the main thread may end by itself, with its own message; or wait for ever
            return
        if failure.lost or self._rank == 0:
            self._ended(failure.code, failure.message)
        if self._rank == 0 or failure.rank == self._rank:
            sys.stderr.write(f"error: {failure.message}\n")
            sys.stderr.flush()
        os._exit(failure.code)
