"""What a training writes while it runs: metrics and timing by step, memory limits, health, a tracker's copy."""

from __future__ import annotations

import resource
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from accelerate import Accelerator

from dpo_studio.console.progress import Progress
from dpo_studio.console.text import percent
from dpo_studio.learning.memory import MemoryLimit
from dpo_studio.learning.train import StepReport
from dpo_studio.ranks import ALONE, Ranks
from dpo_studio.runs.folder import RunFolder
from dpo_studio.runs.health import HealthWatch
from dpo_studio.runs.lock import Held

__all__ = ["RunLog", "figures"]


@dataclass
class RunLog:
    """The metrics, timing and limits of one run, of earlier starts and of this one."""

    run: RunFolder
    held: Held
    device: torch.device
    progress: Progress
    tracker: str | None = None
    """The recipe's `run.tracker`."""
    ranks: Ranks = ALONE
    _health: HealthWatch = field(default_factory=lambda: HealthWatch(0))
    _accelerator: Accelerator | None = None

    def begin(self, total_steps: int, *, saturates: bool) -> None:
        """Read the lines of earlier starts, and start the tracker."""
        if self.tracker is not None and self.run.writes:
            self._accelerator = Accelerator(
                cpu=self.device.type == "cpu", log_with=self.tracker, project_dir=self.run.path
            )
            self._accelerator.init_trackers("dpo-studio", config={})
        self._health = HealthWatch(total_steps, saturates=saturates)
        for line in self.run.lines(RunFolder.METRICS):  # their findings were reported before the run was stopped
            self._health.see(line)

    def write_start(self, held_out: dict[str, float]) -> None:
        """The held-out numbers before the first step."""
        self.run.append(RunFolder.METRICS, {"step": 0} | held_out)

    def write(self, report: StepReport, held_out: dict[str, float]) -> None:
        """A step's metrics and timing, with the held-out numbers after it where they were measured."""
        self.held.check()
        if report.skipped:
            self.progress.warn(f"step {report.step} was skipped: {report.skipped}; the weights are unchanged")
        line = {"step": report.step} | report.metrics | held_out
        self.run.append(RunFolder.METRICS, line)
        for finding in self._health.see(line):
            self.progress.warn(finding.words())
        memory = self.ranks.each(_peak_memory(self.device))
        timing: dict[str, Any] = {
            "step": report.step,
            "seconds": round(report.seconds, 4),
            "pairs": report.pairs,
            "tokens": report.tokens,
            "pairs_per_second": _rate(report.pairs, report.seconds),
            "tokens_per_second": _rate(report.tokens, report.seconds),
            "memory_gib": round(max(memory), 3),
        }
        if self.ranks.size > 1:
            timing |= {
                "ranks": self.ranks.size,
                "imbalance": round(report.imbalance, 4),
                "memory_gib_of_ranks": [round(gib, 3) for gib in memory],
            }
        self.run.append(RunFolder.TIMING, timing)
        if self._accelerator is not None:
            self._accelerator.log(report.metrics | held_out, step=report.step)

    def write_limit(self, limit: MemoryLimit) -> None:
        """Record a memory limit: a continued run reads it back."""
        self.run.append(RunFolder.MEMORY, asdict(limit))

    def limits(self) -> list[MemoryLimit]:
        """The memory limits of this start and of earlier ones."""
        return [MemoryLimit(**line) for line in self.run.lines(RunFolder.MEMORY)]

    def end(self) -> None:
        """Flush the tracker."""
        if self._accelerator is not None:
            for tracker in self._accelerator.trackers:  # `end_training` would also end the group of processes
                tracker.finish()

    def numbers(self) -> dict[str, Any]:
        """The numbers of `result.json` on steps and speed, over all starts of the run."""
        timing = list(self.run.lines(RunFolder.TIMING))
        seconds = sum(line["seconds"] for line in timing)
        return {
            "skipped_steps": sum("skipped" in line for line in self.run.lines(RunFolder.METRICS)),
            "training_seconds": round(seconds, 2),
            "pairs_per_second": _rate(sum(line["pairs"] for line in timing), seconds),
            "tokens_per_second": _rate(sum(line["tokens"] for line in timing), seconds),
            "health": [finding.to_plain() for finding in self._health.findings],
        }


def figures(report: StepReport, held_out: dict[str, float]) -> str:
    """A step in one line, for the progress display."""
    m = report.metrics
    learned = (
        "skipped  "
        if report.skipped
        else f"loss {m['loss']:.3f}  margin {m['rewards/margins']:.2f}  accuracy {percent(m['rewards/accuracies'])}  "
    )
    text = f"{learned}{report.pairs / report.seconds:.1f} pairs/s  {report.tokens / report.seconds:.0f} tokens/s"
    if (ranks := len(report.tokens_of_ranks)) > 1:
        text += f"  ({ranks} x {report.pairs / report.seconds / ranks:.1f} pairs/s, imbalance {report.imbalance:.2f})"
    return text + (f"  held-out accuracy {percent(held_out['eval_rewards/accuracies'])}" if held_out else "")


def _rate(count: float, seconds: float) -> float:
    return round(count / seconds, 3) if seconds > 0 else 0.0


def _peak_memory(device: torch.device) -> float:
    """GiB of the GPU's memory where there is one, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
