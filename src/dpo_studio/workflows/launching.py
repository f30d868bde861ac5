"""`dpo train --gpus N`: N processes under torch's own launcher, and one exit code for all of them."""

from __future__ import annotations

import os
import signal
import sys
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from dpo_studio.errors import RankLostError, UsageError
from dpo_studio.runs.folder import RunFolder
from dpo_studio.runs.status import read_status, write_status

__all__ = ["check_gpus", "launch"]

_LOST = RankLostError.exit_code


def check_gpus(count: int, say: Callable[[str], None]) -> None:
    """Check that this machine has so many GPUs; one without any uses processes on its CPU, and says so.

    Raises:
        UsageError: it has fewer.
    """
    import torch

    there = torch.cuda.device_count()
    if count < 1 or 0 < there < count:
        raise UsageError(f"--gpus {count}: this machine has {there}", hint="as many as there are, or fewer")
    if not there:
        say(f"this machine has no GPU: {count} processes share its CPU (gloo), which is of use to try things out")


def launch(count: int, arguments: Sequence[str], run: RunFolder, say: Callable[[str], None]) -> int:
    """Run `dpo ARGUMENTS` in `count` processes that train together; the exit code of all."""
    before = os.environ.get("LOGLEVEL")
    os.environ["LOGLEVEL"] = "CRITICAL"  # torch's launcher takes it for its own words as it is imported
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.pop("LOGLEVEL") if before is None else os.environ.update(LOGLEVEL=before)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    more: dict[str, Any] = {}
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # nohup
        more["signals_to_handle"] = "SIGTERM,SIGINT,SIGQUIT"
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        monitor_interval=0.2,
        **more,
    )
    (run.path / RunFolder.STATUS).unlink(missing_ok=True)
    try:
        elastic_launch(config, sys.executable)("-m", "dpo_studio", *arguments)
    except ChildFailedError as failed:
        return _code(failed.failures, run, say)
    except SignalException as stopped:
        return read_status(run) or 128 + int(stopped.sigval)
    return 0


def _code(failures: dict[int, Any], run: RunFolder, say: Callable[[str], None]) -> int:
    """The exit code that the run itself has left, or that of what the launcher saw."""
    killed = {rank: signal.Signals(-each.exitcode).name for rank, each in failures.items() if each.exitcode < 0}
    for rank, name in killed.items():
        say(f"rank {rank} was ended by {name}")
    if (code := read_status(run)) is not None:
        return code
    codes = [each.exitcode for each in failures.values() if each.exitcode > 0]
    code = codes[0] if codes and not killed else _LOST
    if code == _LOST:
        say("the same command continues from the last checkpoint")
    write_status(run, code, "a process of this run died")
    return code
