"""How our time and memory grow: twice the pairs, twice the length, twice the vocabulary, against a base setting.

    python benchmarks/growth.py --device cpu --json growth.json

Time is that of one epoch, the reference's pass included. Memory on a CPU is what the process holds beyond its imports.
Expected: pairs and length double the time and leave memory alone, which the micro-batch's token budget bounds; the
vocabulary adds the head's share to both.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from jobs import Job, end_on_request, measure, versions
from shapes import MIXES, SHAPES

__all__ = ["GROWN", "compared"]

GROWN = {"base": {}, "2x pairs": {"pairs": 2}, "2x length": {"scale": 2}, "2x vocabulary": {"vocabulary": 2}}
"""What is multiplied in each setting."""


def main() -> None:
    """Measure the base and each grown setting; print and write the ratios."""
    options = _options()
    end_on_request()
    base = Job(
        system="ours-cached",
        device=options.device,
        shape=options.shape,
        mix=options.mix,
        pairs=options.pairs,
        pairs_per_step=options.pairs_per_step,
        tokens_per_micro_batch=options.tokens_per_micro_batch,
        limit=options.limit,
        vocabulary=SHAPES[options.shape].vocabulary,
    )
    rows: list[dict[str, Any]] = []
    for name, factors in GROWN.items():
        job = replace(base, **{key: factor * getattr(base, key) for key, factor in factors.items()})
        job = replace(job, steps=-(-job.pairs // job.pairs_per_step))
        rows.append(compared(name, job.pairs, measure(job), rows[0] if rows else None))
        print(line(rows[-1]), flush=True)
        if options.json:
            record = {"kind": "growth", "shape": options.shape, "mix": options.mix, "rows": rows}
            stamp = {"command": " ".join(sys.argv[1:]), "versions": versions()}
            options.json.write_text(json.dumps(record | stamp, indent=2) + "\n")
    if any("reason" in row for row in rows):
        sys.exit(1)


def compared(name: str, pairs: int, result: dict[str, Any], base: dict[str, Any] | None) -> dict[str, Any]:
    """A setting's seconds and GiB, and both over the base's."""
    if result["status"] != "ok":
        return {"name": name, "reason": result["reason"]}
    seconds = pairs / result["pairs_per_second_with_reference"]
    gib = result["peak_gib"] - (0 if "reserved_gib" in result else result["imported_gib"])
    row = {"name": name, "device_name": result["device_name"], "seconds": seconds, "gib": gib}
    if base is not None and "seconds" in base:
        row |= {"time_ratio": seconds / base["seconds"], "memory_ratio": gib / base["gib"]}
    return row


def line(row: dict[str, Any]) -> str:
    """A finished setting, for the terminal."""
    if "reason" in row:
        return f"{row['name']:15} {row['reason']}"
    ratios = f"   time x{row['time_ratio']:.2f}   memory x{row['memory_ratio']:.2f}" if "time_ratio" in row else ""
    return f"{row['name']:15}{row['seconds']:8.1f} s an epoch{row['gib']:8.2f} GiB{ratios}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--mix", choices=MIXES, default="ultrafeedback")
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--pairs-per-step", type=int, default=8)
    parser.add_argument("--tokens-per-micro-batch", type=int, default=4096, help="room for the longest pair, doubled")
    parser.add_argument("--limit", type=float, default=300, help="seconds a setting may take in all")
    parser.add_argument("--json", type=Path, help="write every number here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
