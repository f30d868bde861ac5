"""Real processes that train together over gloo: forked from one that has imported everything, so they start at once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

__all__ = ["Group", "on_ranks"]

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["dpo_studio.workflows.training", "tests.tiny_runs", "tests.policies"])


class Group:
    """`work(*arguments)` in each of `size` processes, started as torchrun would start them."""

    def __init__(
        self, size: int, work: Callable[..., Any], *arguments: Any, environment: dict[str, str] | None = None
    ) -> None:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        kept = {name: value for name, value in os.environ.items() if name.startswith(("DPO_", "OMP_"))}
        self._ends: list[Connection] = []
        self.processes: list[BaseProcess] = []
        for rank in range(size):
            given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "localhost"}
            variables = {
                **kept,
                **(environment or {}),
                **{k: str(v) for k, v in given.items()},
                "MASTER_PORT": str(port),
            }
            here, there = _CONTEXT.Pipe(duplex=False)
            process = _CONTEXT.Process(target=_one, args=(there, variables, work, arguments), daemon=True)
            process.start()
            there.close()
            self._ends.append(here)
            self.processes.append(process)

    def send(self, rank: int, number: signal.Signals) -> None:
        """A signal for one of them."""
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def results(self, *, within: float = 120) -> list[Any]:
        """What each returned; an error of one is raised here."""
        end = time.monotonic() + within
        found = []
        for end_of_rank in self._ends:
            assert end_of_rank.poll(max(0.1, end - time.monotonic())), "a rank does not answer"
            found.append(end_of_rank.recv())
        self.codes(within=10)
        for result in found:
            if isinstance(result, str) and result.startswith("Traceback"):
                raise AssertionError(result)
        return found

    def codes(self, *, within: float, of: Sequence[int] | None = None) -> list[int | None]:
        """The exit codes of these ranks, by default of all; None of one that has not ended in time."""
        end = time.monotonic() + within
        some = [self.processes[rank] for rank in of] if of is not None else self.processes
        for process in some:
            process.join(max(0.0, end - time.monotonic()))
        return [process.exitcode for process in some]

    def kill(self) -> None:
        """End all that are left."""
        for process in self.processes:
            process.kill()
            process.join()


def on_ranks(size: int, work: Callable[..., Any], *arguments: Any, **environment: str) -> list[Any]:
    """What `work(*arguments)` returns in each of `size` processes."""
    group = Group(size, work, *arguments, environment=environment)
    try:
        return group.results()
    finally:
        group.kill()


def _one(end: Connection, variables: dict[str, str], work: Callable[..., Any], arguments: Sequence[Any]) -> None:
    os.environ.update(variables)
    import torch

    torch.set_num_threads(1)
    try:
        end.send(work(*arguments))
    except SystemExit:
        raise
    except BaseException:
        end.send(traceback.format_exc())
        sys.exit(1)
