"""A 4-bit GPTQ base against the bf16 one, and against TRL on gptqmodel's layers: whole DPO steps, one machine, one run.

    python benchmarks/gptq.py --json gptq.json
    python benchmarks/gptq.py --systems ours-cached,packed-cached,fp8-cached --json gptq-cached.json

Random weights in the true shape, four bits in groups of 128; all else as in `vs_trl.py --shape`: the same pairs,
adapter, optimizer, warm-up and measurement, every system in a process of its own. It ends with a table, the memory
saved, and a line `ratio=` for each two systems that are to be compared: pairs/s over pairs/s, the reference in both
steps (live) or in neither (cached).
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jobs import Job, end_on_request, measure, measure_each, on_gptq, systems_by_name, versions
from plots import table
from shapes import MIXES, SHAPES
from vs_trl import line

__all__ = ["measured", "ratios", "saved"]

DEFAULT_SYSTEMS = [
    *("ours-live", "packed-live", "fp8-live", "trl-gptq-b4-group", "trl-gptq-b4-ckpt-group"),
    *("ours-cached", "packed-cached", "fp8-cached", "resident-live"),
]
"""What a run that is cut short should have comes first."""
_COMPARED = (("packed", "ours"), ("fp8", "ours"), ("resident", "ours"), ("fp8", "packed"), ("rows8", "ours"))
"""Kinds of base; `ours` has the bf16 one."""


def main() -> None:
    """Parse, measure, print, write."""
    options = _options()
    end_on_request()
    record = measured(options)
    print(f"\n{table(record)}\n")
    for name, gib in record["saved_gib"].items():
        print(f"gib={gib:.2f} saved by {name}")
    for name, value in record["ratios"].items():
        print(f"ratio={value:.3f} {name}")
    if not record["ratios"]:
        print("ratio=nan")
        sys.exit(1)


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """One system after another; what is known is printed and written each time."""
    until = time.monotonic() + options.within
    names = ("device", "shape", "mix", "pairs", "pairs_per_step", "tokens_per_micro_batch", "seconds", "limit")
    settings = {name: getattr(options, name) for name in names}
    job = Job(system="card", **settings)
    record: dict[str, Any] = {"kind": "gptq", **settings, "command": " ".join(sys.argv[1:]), "systems": []}
    record["card"] = measure(job)
    card = record["card"].get("tflops")
    print(f"the card: {card:.0f} TFLOP/s" if card else f"the card: {record['card']['reason']}", flush=True)
    for result in measure_each(job, options.systems, until):
        if card and result["status"] == "ok":
            result["share_of_card"] = result["tflops"] / card
        record["systems"].append(result)
        record |= {"ratios": ratios(record["systems"]), "saved_gib": saved(record["systems"])}
        print(line(result), flush=True)
        if options.json:
            stamp = {"date": datetime.datetime.now(datetime.UTC).date().isoformat(), "versions": versions()}
            options.json.write_text(json.dumps(record | stamp, indent=2) + "\n")
    return record


def ratios(results: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Pairs/s of one base over another's, like with like, and over those of gptqmodel's best setting."""
    rates = {result["system"]: result["pairs_per_second"] for result in results if result["status"] == "ok"}
    found = {}
    for reference in ("live", "cached"):
        for base, other in _COMPARED:
            ours, theirs = (rates.get(f"{kind}-{reference}") for kind in (base, other))
            if ours and theirs:
                found[f"{base} over {'bf16' if other == 'ours' else other}, {reference}"] = ours / theirs
    rivals = [rate for name, rate in rates.items() if name.startswith("trl") and on_gptq(name)]
    for base in ("packed", "fp8"):
        if rivals and f"{base}-live" in rates:
            found[f"{base} over gptqmodel, PEFT and TRL, live"] = rates[f"{base}-live"] / max(rivals)
    return found


def saved(results: Iterable[dict[str, Any]]) -> dict[str, float]:
    """GiB of the bf16 base's peak that others do without."""
    peaks = {result["system"]: result["peak_gib"] for result in results if result["status"] == "ok"}
    return {
        f"{base}, {reference}": peaks[f"ours-{reference}"] - peaks[f"{base}-{reference}"]
        for reference in ("live", "cached")
        for base in ("packed", "fp8")
        if {f"ours-{reference}", f"{base}-{reference}"} <= peaks.keys()
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--shape", choices=SHAPES, default="mistral-7b")
    parser.add_argument("--mix", choices=MIXES, default="ultrafeedback")
    parser.add_argument("--systems", type=systems_by_name, default=DEFAULT_SYSTEMS, help="by name, with commas")
    parser.add_argument("--pairs", type=int, default=256)
    parser.add_argument("--pairs-per-step", type=int, default=64, help="of ours")
    parser.add_argument("--tokens-per-micro-batch", type=int, default=8192, help="of ours, and rows of the card's test")
    parser.add_argument("--seconds", type=float, default=12, help="measured a system, after two steps of warm-up")
    parser.add_argument("--limit", type=float, default=150, help="seconds a system may take in all")
    parser.add_argument("--within", type=float, default=560, help="seconds the whole run may take")
    parser.add_argument("--json", type=Path, help="write every number here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
