"""The group of processes that train together: sums, votes, and the end of all where one ends.

torchrun (or `accelerate launch`, or `dpo train --gpus N`) starts them; `torch.distributed` carries what they say: NCCL
between GPUs, gloo for all that is on a CPU. Every method here is called by all ranks, in the same order; with one
process each of them answers at once.

Shapes: C = columns, P = pairs.
"""

from __future__ import annotations

import datetime
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dpo_studio.errors import DPOStudioError, RankLostError, RunError, reason_of
from dpo_studio.ranks.watch import Failure, Watch

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["ALONE", "Ranks"]

_LONGEST_WAIT = datetime.timedelta(hours=12)
"""Of one rank for another that still answers: rank 0 may be writing answers to a thousand prompts. A rank that has
ended or hangs is noticed by `Watch`, in seconds."""
_LONGEST_TEXT = 4096
_BEGUN: list[Ranks] = []
"""The group of this process, once it was made: a process has one."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together."""

    rank: int = 0
    size: int = 1
    watch: Watch | None = field(default=None, compare=False)
    """Notices a rank that has ended; None where there is one process."""

    @classmethod
    def of_environment(cls) -> Ranks:
        """As the launcher has set them (`RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `MASTER_ADDR`, `MASTER_PORT`).

        Raises:
            RunError: this machine has fewer GPUs than processes, or the others cannot be reached.
        """
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return ALONE
        if not _BEGUN:
            _BEGUN.append(_begun(int(os.environ.get("RANK", "0")), size))
        return _BEGUN[0]

    @classmethod
    def of_launcher(cls) -> Ranks:
        """`of_environment` where a launcher started this very process (`LOCAL_RANK`), else one process.

        A container of a cluster may have the other variables for whatever is started in it.
        """
        return cls.of_environment() if "LOCAL_RANK" in os.environ else ALONE

    @classmethod
    def one(cls) -> Ranks:
        """For work that one process does.

        Raises:
            RunError: several were started.
        """
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise RunError(
                "several processes were started, and `dpo train` and `dpo score` alone can use them",
                hint="start it with one process",
            )
        return ALONE

    @property
    def leads(self) -> bool:
        """Whether this process writes and talks: the first."""
        return self.rank == 0

    @contextmanager
    def together(self, ended: Callable[[int, str], None] = lambda code, message: None) -> Iterator[None]:
        """Inside, the end of one rank is the end of all, with one exit code.

        An error here is told to the others before it is raised; theirs is raised here. `ended` is told the exit code
        and the message, on one rank. All leave together: the first may still be writing.

        Raises:
            RankLostError: another process died or no longer answers.
            DPOStudioError: what another rank refused, on the first rank, which prints it.
        """
        if self.watch is None:
            yield
            return
        self.watch.start(ended)
        try:
            yield
            self.wait()
        except BaseException as error:
            told = self.watch.tell(_failure(self.rank, error))
            if self.leads or told.lost:  # the first may be the one that died
                ended(told.code, told.message)
            if not self.leads:  # the first has the words
                raise SystemExit(told.code) from None
            if told.rank == self.rank or not isinstance(error, DPOStudioError):
                raise
            raise told.as_error() from None
        if self.leads:
            ended(0, "")
        self.watch.stop()

    @contextmanager
    def first(self) -> Iterator[None]:
        """The first rank does what is inside before the others do: downloads, files that are made once."""
        if not self.leads:
            self.wait()
        yield
        if self.leads:
            self.wait()

    def wait(self) -> None:
        """Until all ranks are here."""
        self.most(0)

    def any(self, here: bool) -> bool:
        """Whether something happened in any process: out of memory, a number that is not finite, a refusal."""
        return self.most(int(here)) > 0

    def most(self, here: int) -> int:
        """The largest of what the ranks have."""
        return int(max(self.each(here)))

    def least(self, here: int) -> int:
        """The smallest of what the ranks have."""
        return int(min(self.each(here)))

    def each(self, here: float) -> list[float]:
        """What every rank has, by rank."""
        if self.size == 1:
            return [here]
        import torch

        mine = torch.tensor([here], dtype=torch.float64)
        return [found.item() for found in self._gather(mine)]

    def all_columns(self, mine_CP: Tensor) -> Tensor:
        """The columns of all ranks' pairs, (C, P of all), those of rank 0 first, in float64 on the CPU.

        A rank without pairs may give (0, 0).
        """
        if self.size == 1:
            return mine_CP.double().cpu()
        import torch

        shapes = [tuple(map(int, shape.tolist())) for shape in self._gather(torch.tensor(mine_CP.shape))]
        rows, most = max(shape[0] for shape in shapes), max(shape[1] for shape in shapes)
        padded_CP = torch.zeros(rows, most, dtype=torch.float64)
        padded_CP[: mine_CP.shape[0], : mine_CP.shape[1]] = mine_CP.detach().cpu()
        found = self._gather(padded_CP)
        return torch.cat([columns[:, :pairs] for columns, (_, pairs) in zip(found, shapes, strict=True)], 1)

    def sum_gradients(self, trained: Iterable[Tensor]) -> None:
        """Add up, in place, what every process has found for these tensors.

        One all-reduce of one buffer, in the precision of the weights (fp32): its ring adds in an order that the number
        of ranks alone decides. A rank that found none has found zeros.
        """
        if self.size == 1:
            return
        import torch
        import torch.distributed as dist

        tensors = list(trained)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in tensors]
        buffer = torch.cat([gradient.flatten() for gradient in gradients])
        with _others():
            dist.all_reduce(buffer)
        sums = torch.split(buffer, [p.numel() for p in tensors])
        for p, total in zip(tensors, sums, strict=True):
            p.grad = total.view_as(p)

    def as_first(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite these tensors by those of the first rank."""
        if self.size == 1:
            return
        import torch.distributed as dist

        with _others():
            for tensor in tensors:
                dist.broadcast(tensor.detach(), 0)

    def text_of_first(self, text: str) -> str:
        """The first rank's text, of at most 4,096 bytes."""
        if self.size == 1:
            return text
        import torch

        words = text.encode()[:_LONGEST_TEXT] if self.leads else b""
        buffer = torch.zeros(_LONGEST_TEXT, dtype=torch.uint8)
        buffer[: len(words)] = torch.tensor(list(words), dtype=torch.uint8)
        self.as_first([buffer])
        return bytes(buffer.tolist()).rstrip(b"\0").decode()

    def check_same(self, digest: bytes, what: str) -> None:
        """Check that every rank has the same.

        Raises:
            RunError: they differ.
        """
        number = int.from_bytes(digest[:6], "big")  # a float64 holds 53 bits exactly
        if len(set(self.each(number))) > 1:
            raise RunError(f"the {self.size} processes have read different {what}", hint="do they see the same files?")

    def share(self, lengths: Sequence[int]) -> list[int]:
        """Which of the items this rank computes, in order: every size-th, longest first, so that all end together."""
        longest_first = sorted(range(len(lengths)), key=lambda item: -lengths[item])
        return sorted(longest_first[self.rank :: self.size])

    def share_of(self, count: int) -> int:
        """The most of `count` that one rank gets."""
        return math.ceil(count / self.size)

    def _gather(self, mine: Tensor) -> list[Tensor]:
        """What every rank has, of one shape, on the CPU."""
        import torch
        import torch.distributed as dist

        found = [torch.empty_like(mine) for _ in range(self.size)]
        with _others():
            dist.all_gather(found, mine.contiguous())
        return found


ALONE = Ranks()
"""One process of one."""


@contextmanager
def _others() -> Iterator[None]:
    """Inside, the words of gloo and NCCL for a process that has gone become ours.

    Raises:
        RankLostError: another process has ended.
    """
    try:
        yield
    except RuntimeError as error:
        raise RankLostError(
            f"another process of this run has ended ({reason_of(error)})",
            hint="the same command continues from the last checkpoint",
        ) from None


def _begun(rank: int, size: int) -> Ranks:
    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import TCPStore

    local = int(os.environ.get("LOCAL_RANK", rank))
    device: torch.device | None = None
    if torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise RunError(
                f"process {local + 1} of this machine has no GPU: it has {torch.cuda.device_count()}",
                hint="start as many processes as there are GPUs",
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device else "gloo", timeout=_LONGEST_WAIT)
        store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=datetime.timedelta(seconds=10),
        )
    except (RuntimeError, ValueError, KeyError) as error:
        raise RunError(
            f"the {size} processes of this run do not find each other: {reason_of(error)}",
            hint="start them with `dpo train --gpus N` or torchrun; several machines: see docs/scale.md",
        ) from None
    return Ranks(rank, size, Watch(rank, size, store))


def _failure(rank: int, error: BaseException) -> Failure:
    if isinstance(error, DPOStudioError):
        return Failure(rank, error.exit_code, str(error), isinstance(error, RankLostError))
    if isinstance(error, KeyboardInterrupt):
        return Failure(rank, 130, "interrupted")
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return Failure(rank, error.code, "stopped")
    return Failure(rank, 1, f"{type(error).__name__}: {reason_of(error)}")
