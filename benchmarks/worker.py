"""The process that measures one system: `worker.py JOB NOTES SPAWNED`, started by `jobs.measure`.

It keeps a note of what it is doing, so that a killed process can still say where it was.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs import OURS, OURS_ON_GPTQ, Job, Rival

_TO_FINISH = 4.0
"""Seconds before the limit at which a measurement ends by itself with what it has."""


@dataclass
class Notes:
    """A file that always holds the latest news."""

    file: Path
    stage: str = "importing"

    def say(self, stage: str) -> None:
        """What is going on."""
        self.stage = stage
        self.write(stage=stage)

    def write(self, **news: Any) -> None:
        """Replace what was there, whole or not at all."""
        new = self.file.with_suffix(".new")
        new.write_text(json.dumps(news))
        new.replace(self.file)


def main() -> None:
    """Measure, and leave the result or the reason why there is none."""
    job, notes, spawned = Job(**json.loads(sys.argv[1])), Notes(Path(sys.argv[2])), float(sys.argv[3])
    notes.say("importing")
    try:
        result = measured(job, notes, spawned)
    except BaseException as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        notes.write(reason=f"{reason[:300]} (at: {notes.stage})")
        raise
    notes.write(done=True, **result)
    os._exit(0)  # tearing down CUDA and compilers takes seconds, and has nothing left to say


def measured(job: Job, notes: Notes, spawned: float) -> dict[str, Any]:
    """What the system did, and how long it took to begin."""
    warnings.simplefilter("ignore")
    import torch

    from meter import Meter, device_name, resident_gib

    run = _runner(job.system)
    device = torch.device(job.device)
    imported, imported_gib = time.time(), resident_gib()
    meter = Meter(device, job.seconds, spawned + job.limit - _TO_FINISH, job.steps, notes.say)
    result = {
        "device_name": device_name(device),
        **run(job, meter),
        "import_seconds": imported - spawned,
        "imported_gib": imported_gib,
    }
    if meter.counts:
        first_step = meter.marks[1]
        result |= {"first_step_seconds": first_step - imported, "first_step_with_imports": first_step - spawned}
    return result


def _runner(system: str) -> Callable[[Job, Any], dict[str, Any]]:
    """What measures a system; only what it needs is imported."""
    if system == "card":
        from meter import measure_card

        return measure_card
    if system in OURS or system in OURS_ON_GPTQ:
        import ours

        return ours.run
    if Rival.named(system).gptq:
        import gptqmodel  # noqa: F401 - it chooses torch's allocator as it is imported: later is too late
    import rivals

    return rivals.run


if __name__ == "__main__":
    main()
