"""One system in a process of its own, with a time limit: a crash, a full GPU or an endless compile costs only that one.

`measure` is the side that waits, `worker.py` the one that works. Light to import: neither torch nor TRL.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = [
    "OURS",
    "OURS_ON_GPTQ",
    "Job",
    "Rival",
    "check_system",
    "end_on_request",
    "measure",
    "measure_each",
    "on_gptq",
    "systems_by_name",
    "versions",
]

_KEPT_OUTPUT = 2000
_LEAST_SECONDS = 20
"""A process that has less than this left does not get to measure anything."""

OURS = {
    "ours-live": "reference in the step",
    "ours-cached": "reference computed once (not counted)",
    "ours-unshared": "reference in the step, prompts not shared",
    "rows8-live": "base in FP8, a scale a row, reference in the step",
    "rows8-cached": "base in FP8, a scale a row, reference computed once (not counted)",
}
OURS_ON_GPTQ = {
    "packed-live": "GPTQ base, reference in the step",
    "packed-cached": "GPTQ base, reference computed once (not counted)",
    "fp8-live": "GPTQ base, FP8, reference in the step",
    "fp8-cached": "GPTQ base, FP8, reference computed once (not counted)",
    "resident-live": "GPTQ base dequantised once to bf16, reference in the step",
}
"""Four bits in groups of 128 inputs."""


@dataclass(frozen=True)
class Job:
    """What to measure."""

    system: str
    """`card`, one of `OURS` or `OURS_ON_GPTQ`, or a `Rival` by name."""
    device: str
    shape: str
    mix: str
    pairs: int
    """How many different pairs there are; they come round again."""
    pairs_per_step: int
    """Of ours; a rival's is its batch."""
    tokens_per_micro_batch: int
    seconds: float = 15
    """How long to measure after the warm-up."""
    limit: float = 75
    """How long the process may take in all."""
    window: int | None = None
    """Sliding window of the shape."""
    vocabulary: int | None = None
    """Instead of the shape's own."""
    scale: int = 1
    """All lengths times this."""
    steps: int | None = None
    """Measure so many steps instead of `seconds`."""


@dataclass(frozen=True)
class Rival:
    """What can be chosen about TRL, by its name here: `trl-b4-ckpt-pre-group-compile`, `trl-gptq-b4`."""

    batch: int
    checkpointing: bool
    precomputed: bool
    grouped: bool
    compiled: bool
    gptq: bool = False
    """On gptqmodel's linear layers instead of a bf16 base."""

    @classmethod
    def named(cls, name: str) -> Rival:
        """The setting a name stands for.

        Raises:
            ValueError: none.
        """
        found = re.fullmatch(rf"trl-(gptq-)?b(\d+)((?:-(?:{'|'.join(_WORDS)}))*)", name)
        if not found:
            ours = ", ".join([*OURS, *OURS_ON_GPTQ])
            raise ValueError(f"{name}: no such system; there are {ours} and trl-[gptq-]b4[-{'][-'.join(_WORDS)}]")
        words = found[3].split("-")
        return replace(cls(int(found[2]), *(word in words for word in _WORDS)), gptq=bool(found[1]))

    def __str__(self) -> str:
        chosen = (self.checkpointing, self.precomputed, self.grouped, self.compiled)
        words = [text for text, on in zip(_WORDS.values(), chosen, strict=True) if on]
        return ", ".join([*(["gptqmodel's GPTQ base"] if self.gptq else []), f"batch {self.batch}", *words])


_WORDS = {
    "ckpt": "checkpointing",
    "pre": "reference precomputed (not counted)",
    "group": "grouped by length",
    "compile": "torch.compile",
}


def check_system(name: str) -> str:
    """The setting of a system, in words.

    Raises:
        ValueError: there is no such system.
    """
    return OURS.get(name) or OURS_ON_GPTQ.get(name) or str(Rival.named(name))


def on_gptq(name: str) -> bool:
    """Whether a system trains on a GPTQ base; the others have one in bf16."""
    return name in OURS_ON_GPTQ or (name not in OURS and Rival.named(name).gptq)


def systems_by_name(text: str) -> list[str]:
    """Systems with commas between them, for argparse."""
    names = text.split(",")
    for name in names:
        try:
            check_system(name)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return names


def end_on_request() -> None:
    """Let SIGTERM end a benchmark as Ctrl-C does: with its processes."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def measure_each(job: Job, systems: Sequence[str], until: float) -> Iterator[dict[str, Any]]:
    """One system after another, each with its setting in words; none is begun that cannot end by `time.monotonic()`."""
    for name in systems:
        left = until - time.monotonic()
        if left < _LEAST_SECONDS:
            result = {"system": name, "status": "failed", "reason": "not begun: the time for the whole run is over"}
        else:
            result = measure(replace(job, system=name, limit=min(job.limit, left)))
        yield result | {"setting": check_system(name)}


def measure(job: Job) -> dict[str, Any]:
    """Run a system elsewhere; say what it did, or why it did not."""
    with tempfile.TemporaryDirectory() as folder:
        notes, output = Path(folder, "notes.json"), Path(folder, "output.txt")
        worker = Path(__file__).with_name("worker.py")
        command = [sys.executable, str(worker), json.dumps(asdict(job)), str(notes), str(time.time())]
        # one GPU, for TRL's trainer refuses to run on two without a launcher; nothing is looked up on the Hub
        environment = {"CUDA_VISIBLE_DEVICES": "0", "HF_HUB_OFFLINE": "1", **os.environ}
        with output.open("w") as sink:
            process = subprocess.Popen(
                command, stdout=sink, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        try:
            code = process.wait(job.limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with suppress(ProcessLookupError):  # and whatever it started, compilers among them
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return {"system": job.system, **_outcome(job, code, notes, output)}


def _outcome(job: Job, code: int | None, notes: Path, output: Path) -> dict[str, Any]:
    try:
        said: dict[str, Any] = json.loads(notes.read_text())
    except (OSError, ValueError):
        said = {}
    if said.pop("done", False):
        return {"status": "ok", **said}
    stage = said.get("stage", "starting")
    if code is None:
        reason = f"stopped after {job.limit:.0f} s, at: {stage}"
    else:
        reason = said.get("reason") or f"ended with code {code}, at: {stage}"
    return {"status": "failed", "reason": reason, "output": output.read_text(errors="replace")[-_KEPT_OUTPUT:]}


def versions() -> dict[str, str]:
    """Of what was measured, as installed; carried source folders have none."""
    found = {}
    for name in ("dpo-studio", "trl", "torch", "transformers", "peft", "accelerate", "triton", "gptqmodel"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
