"""What a checkpoint of a 7B LoRA run costs: 0.48 GB written, hashed and synced, against the steps between two of them.

    python benchmarks/checkpoint_cost.py --folder runs --json checkpoint.json

The adapter is the real one (rank 16 on all seven projections of Mistral-7B, fp32, with AdamW's averages), its base a
shape without weights. Only the saving is measured; how fast the steps are is given. Beside it the disk alone: as many
bytes, written and synced by nothing but the operating system. Every other checkpoint also drops an old one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners import lora
from torch import nn
from transformers import AutoModelForCausalLM, MistralConfig

from dpo_studio.config import AdapterSection, TrainingSection
from dpo_studio.learning.checkpoints import checkpoint_bytes, save_checkpoint
from dpo_studio.learning.state import TrainingState
from dpo_studio.models.adapters import POLICY, adapter_state, attach
from dpo_studio.policy.policy import Policy

_FASTEST = 23.2
"""Pairs a second of a 7B on an H200, the fastest in docs/log.md: on anything slower a checkpoint is a smaller share."""


def main() -> None:
    """Save some checkpoints one after another; print what one costs, as a share of the steps between two."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--folder", type=Path, default=Path("runs"), help="on the disk to measure")
    options.add_argument("--saves", type=int, default=6)
    options.add_argument("--pause", type=float, default=3.0, help="seconds before each save")
    options.add_argument("--pairs-per-second", type=float, default=_FASTEST)
    options.add_argument("--json", type=Path)
    given = options.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    section = TrainingSection()
    policy, state = trained_policy(section)
    with tempfile.TemporaryDirectory(dir=given.folder) as scratch:
        folder = Path(scratch) / "run" / "checkpoints"
        folder.parent.mkdir()
        seconds, raw = [], []
        for _ in range(given.saves):
            state.step += 1
            rest(given.pause)
            started = time.perf_counter()
            save_checkpoint(folder, Policy(policy), state, base="mistral", held_out_loss=0.5)
            seconds.append(time.perf_counter() - started)
            rest(given.pause)
            raw.append(disk_alone(Path(scratch) / "raw", checkpoint_bytes(Policy(policy), state.reference)))
    assert isinstance(section.save_every, int)
    between = section.save_every * section.pairs_per_step / given.pairs_per_second
    share = statistics.median(seconds) / between
    result = {
        "gigabytes": checkpoint_bytes(Policy(policy), state.reference) / 1e9,
        "seconds": [round(x, 3) for x in seconds],
        "disk_alone_seconds": [round(x, 3) for x in raw],
        "seconds_between": round(between, 1),
        "pairs_per_second": given.pairs_per_second,
        "share": round(share, 5),
    }
    print(
        f"{result['gigabytes']:.2f} GB: median {statistics.median(seconds):.2f} s (the disk alone "
        f"{statistics.median(raw):.2f} s), every {between:.0f} s of training at {given.pairs_per_second} pairs/s: "
        f"{100 * share:.2f} %"
    )
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.exit(0 if share < 0.01 else 1)


def trained_policy(section: TrainingSection) -> tuple[PeftModel, TrainingState]:
    """LoRA on a 7B without weights, after one step of random gradients."""
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(MistralConfig(), dtype=torch.bfloat16)
    base.requires_grad_(False)
    policy = attach(base, AdapterSection(), seed=0)
    for layer in policy.modules():
        if isinstance(layer, lora.LoraLayer):
            for linear in (layer.lora_A[POLICY], layer.lora_B[POLICY]):
                linear.weight = nn.Parameter(torch.randn(linear.weight.shape))
    for p in adapter_state(policy).values():
        p.grad = torch.randn(p.shape)
    state = TrainingState.fresh(Policy(policy), section, 1000)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    return policy, state


def rest(seconds: float) -> None:
    """Let the disk come to rest, as it has between two checkpoints of a training."""
    os.sync()
    time.sleep(seconds)


def disk_alone(file: Path, size: int) -> float:
    """Seconds to write and sync so many bytes."""
    block = os.urandom(1 << 24)
    started = time.perf_counter()
    with file.open("wb", buffering=0) as out:
        for _ in range(size // len(block)):
            out.write(block)
        os.fsync(out.fileno())
    seconds = time.perf_counter() - started
    file.unlink()
    return seconds


if __name__ == "__main__":
    main()
