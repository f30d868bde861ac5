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
        self._ended: Callable[[int, str], None] = lambda code, message: None

    def start(self, ended: Callable[[int, str], None]) -> None:
        """Begin to beat and to look; `ended` is told why, where this thread ends the process."""
        self._ended = ended
        self._stopped.clear()
        threading.Thread(target=self._look, daemon=True, name="dpo-watch").start()

    def stop(self) -> None:
        """The run has ended well, on every rank."""
        self._stopped.set()

    def tell(self, failure: Failure) -> Failure:
        """Tell the others of a failure here; returns the one that came first. This process has to end now."""
        try:
            if failure.lost:  # whoever has gone may have said why
                for _ in range(10):
                    if (first := self._failure()) is not None:
                        return first
                    time.sleep(0.1)
            with self._lock:
                told = self._store.compare_set(self._failed, "", json.dumps(asdict(failure)))
            return Failure(**json.loads(told))
        except (RuntimeError, ValueError):  # the store has gone with its process
            return failure

    def _failure(self) -> Failure | None:
        with self._lock:
            return Failure(**json.loads(self._store.get(self._failed))) if self._store.check([self._failed]) else None

    def _look(self) -> None:
        neighbour = (self._rank + 1) % self._size
        beats, seen, late, deaf = 0, -1, 0, 0
        while not self._stopped.wait(1.0):
            beats += 1
            try:
                with self._lock:
                    self._store.set(f"{self._beat}/{self._rank}", str(beats))
                    key = f"{self._beat}/{neighbour}"
                    now = int(self._store.get(key)) if self._store.check([key]) else -1
                failed, deaf = self._failure(), 0
            except (RuntimeError, ValueError):
                failed, now, deaf = None, seen, deaf + 1
            late = late + 1 if now == seen else 0
            seen = now
            if failed is None and deaf >= 3:
                failed = Failure(self._rank, RankLostError.exit_code, "the launcher of this run is gone", lost=True)
            elif failed is None and not deaf and late >= self._patience:
                words = (
                    f"rank {neighbour} of {self._size} has not answered for {late} s: it was stopped, or its machine"
                )
                failed = self.tell(Failure(self._rank, RankLostError.exit_code, words, lost=True))
            if failed is not None:
                self._end(failed)
                return

    def _end(self, failure: Failure) -> None:
        """Give the process some seconds to end by itself, then end it: its main thread may wait for ever."""
        if self._stopped.wait(_GRACE):
            return
        if failure.lost or self._rank == 0:
            self._ended(failure.code, failure.message)
        if self._rank == 0 or failure.rank == self._rank:
            sys.stderr.write(f"error: {failure.message}\n")
            sys.stderr.flush()
        os._exit(failure.code)
