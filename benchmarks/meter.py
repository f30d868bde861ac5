"""How a system is timed: steady steps, memory, and what the card itself can do.

Shapes: M, K, N = rows, inputs and outputs of a product.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from jobs import Job
from shapes import Shape, shaped

__all__ = ["Meter", "card_rate", "device_name", "measure_card", "resident_gib", "synchronise"]

WARM_UP = 2
"""Steps left out: the first compiles and fills the allocator, the second meets shapes the first did not have."""
_CARD_SECONDS = 4.0
"""Half a second and more a product: the card's clock settles under load within a tenth of one."""


@dataclass
class Meter:
    """Notes every optimizer step; the steps after the warm-up are the measurement."""

    device: torch.device
    seconds: float
    deadline: float
    """`time.time()` by which to have ended: a short measurement is worth more than a killed process."""
    steps: int | None = None
    say: Callable[[str], None] = lambda _: None
    """Told what is going on, for when the process is killed."""
    marks: list[float] = field(default_factory=list)
    """When training began and when each step ended, `time.time()`."""
    counts: list[tuple[int, int, int]] = field(default_factory=list)
    """(pairs, unique tokens, processed tokens) of each step."""

    def begin(self) -> None:
        """Training begins now."""
        synchronise(self.device)
        self.marks = [time.time()]
        self.say("step 1")

    def note(self, pairs: int, unique: int, processed: int) -> bool:
        """A step has ended. Whether enough has been seen."""
        synchronise(self.device)
        self.marks.append(time.time())
        self.counts.append((pairs, unique, processed))
        measured = len(self.counts) - WARM_UP
        self.say(f"step {len(self.counts) + 1}")
        if measured < 1:
            return False
        if self.steps is not None and measured >= self.steps:
            return True
        late = self.marks[-1] + (self.marks[-1] - self.marks[-2]) > self.deadline
        return late or (self.steps is None and self.marks[-1] - self.marks[WARM_UP] >= self.seconds)

    def result(self, mean_unique: float, flops_a_token: float) -> dict[str, Any]:
        """What was measured.

        pairs/s is unique tokens/s over the mean pair's unique tokens: in the same time a slow system gets through the
        first sixty pairs and a fast one through two hundred, whose mean length differs by some per cent.
        """
        seconds = self.marks[-1] - self.marks[WARM_UP]
        pairs, unique, processed = (sum(column) for column in zip(*self.counts[WARM_UP:], strict=True))
        return {
            "pairs_per_second": unique / seconds / mean_unique,
            "raw_pairs_per_second": pairs / seconds,
            "unique_tokens_per_second": unique / seconds,
            "processed_tokens_per_second": processed / seconds,
            "tflops": flops_a_token * processed / seconds / 1e12,
            "steps": len(self.counts) - WARM_UP,
            "seconds": seconds,
            "pairs": pairs,
            "step_seconds": [round(end - start, 4) for start, end in zip(self.marks, self.marks[1:], strict=False)],
            **memory(self.device),
        }


def memory(device: torch.device) -> dict[str, float]:
    """The process's peak, GiB: allocated and reserved on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return {
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
            "reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
        }
    return {"peak_gib": resident_gib()}


def resident_gib() -> float:
    """The most this process has held in RAM so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def synchronise(device: torch.device) -> None:
    """Wait for the GPU; a CPU is never behind."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def device_name(device: torch.device) -> str:
    """What the figures were measured on."""
    return torch.cuda.get_device_name() if device.type == "cuda" else "CPU"


def measure_card(job: Job, meter: Meter) -> dict[str, Any]:
    """`card_rate` as a job: rows as many as ours has tokens in a micro-batch."""
    meter.say("products")
    return card_rate(shaped(job.shape), job.tokens_per_micro_batch, meter.device, min(job.seconds, _CARD_SECONDS))


def card_rate(shape: Shape, rows: int, device: torch.device, seconds: float) -> dict[str, Any]:
    """TFLOP/s of a layer's products alone, bf16, random data: each on its own, and together as a layer needs them.

    Random data, because zeros draw less power and clock higher.
    """
    products, work, spent = {}, 0.0, 0.0
    for inputs, outputs in shape.products:
        left_MK = torch.randn(rows, inputs, device=device, dtype=torch.bfloat16)
        right_KN = torch.randn(inputs, outputs, device=device, dtype=torch.bfloat16)
        each = _seconds_a_product(left_MK, right_KN, seconds / len(shape.products))
        flops = 2.0 * rows * inputs * outputs
        products[f"{rows}x{inputs}x{outputs}"] = flops / each / 1e12
        work, spent = work + flops, spent + each
    return {"tflops": work / spent / 1e12, "products": products}


def _seconds_a_product(left_MK: torch.Tensor, right_KN: torch.Tensor, seconds: float) -> float:
    """Mean of as many as fit; only the last is waited for, as in a step."""
    out_MN = left_MK @ right_KN
    synchronise(left_MK.device)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        for _ in range(10):
            torch.mm(left_MK, right_KN, out=out_MN)
        synchronise(left_MK.device)
        count += 10
    return (time.perf_counter() - start) / count
