"""Ours against TRL's DPOTrainer. The last line is `ratio=`: our pairs/s over those of TRL's best setting tried.

    python benchmarks/vs_trl.py --device cpu
    python benchmarks/vs_trl.py --device cuda --shape mistral-7b --mix ultrafeedback --json gpu.json

Without a shape: a real model, whole epochs, alternating, median of three (`epochs.py`). With one: random weights in the
true shape and random ids of true lengths, steady state, every system in a process of its own (`jobs.py`).
docs/performance.md says what is counted and why.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jobs import Job, Rival, end_on_request, measure, measure_each, on_gptq, systems_by_name, versions
from shapes import MIXES, SHAPES

__all__ = ["ratios"]

DEFAULT_SYSTEMS = [
    *("ours-live", "ours-cached", "trl-b4", "trl-b4-group", "trl-b8-group", "trl-b8"),
    *("trl-b4-ckpt", "trl-b8-ckpt", "trl-b4-pre-group", "trl-b4-compile"),
]
"""Ours first, then TRL's likely best ones: a run that is cut short has them. Compiling is last: it may not end."""


def main() -> None:
    """Parse, measure, print, write."""
    options = _options()
    end_on_request()
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks: the product takes a GPU where there is one
    if options.shape is None:
        from epochs import alternate

        ratio, record = alternate(options)
        _write(options, record)
        print(f"ratio={ratio:.2f}")
        return
    record = steady(options)
    for name, value in record["ratios"].items():
        print(f"{name}: {value:.2f}")
    print(f"ratio={record['ratio']:.2f}" if record["ratio"] else "ratio=nan")
    if not record["ratio"]:
        sys.exit(1)


def steady(options: argparse.Namespace) -> dict[str, Any]:
    """Measure one system after another; what is known is printed and written each time."""
    until = time.monotonic() + options.within
    job = Job(
        system="card",
        device=options.device,
        shape=options.shape,
        mix=options.mix,
        pairs=options.pairs or 256,
        pairs_per_step=options.pairs_per_step,
        tokens_per_micro_batch=options.tokens_per_micro_batch,
        seconds=options.seconds,
        limit=options.limit,
        window=options.window,
    )
    record: dict[str, Any] = {"kind": "steady", **_settings(options, job), "card": measure(job), "systems": []}
    card = record["card"].get("tflops")
    print(f"the card: {card:.0f} TFLOP/s" if card else f"the card: {record['card']['reason']}", flush=True)
    for result in measure_each(job, options.systems, until):
        if card and result["status"] == "ok":
            result["share_of_card"] = result["tflops"] / card
        record["systems"].append(result)
        record["ratios"] = ratios(record["systems"])
        record["ratio"] = headline(
            record["ratios"], against_trl=any(name.startswith("trl") for name in options.systems)
        )
        print(line(result), flush=True)
        _write(options, record)
    return record


def headline(found: dict[str, float], *, against_trl: bool) -> float | None:
    """The ratio of the last line: over TRL if TRL was asked for, whatever became of it."""
    names = ("reference counted", "reference left out") if against_trl else ("prompt shared, over unshared",)
    return next((found[name] for name in names if name in found), None)


def ratios(results: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Ours over TRL's best: with the reference's cost in both, without it in either; and what prompt sharing gives.

    Like with like: our cached reference counts its pass over one epoch against settings that ask it in the step, and
    leaves it out against settings whose pass is left out.
    """
    rates: dict[tuple[str, bool], float] = {}
    done = {result["system"]: result for result in results if result["status"] == "ok"}
    for name, result in done.items():
        if name == "ours-unshared" or on_gptq(name):
            continue
        side = "ours" if name.startswith("ours-") else "trl"
        free = name == "ours-cached" or (side == "trl" and Rival.named(name).precomputed)
        if name == "ours-cached":
            _keep_best(rates, (side, False), result["pairs_per_second_with_reference"])
        _keep_best(rates, (side, free), result["pairs_per_second"])
    found = {}
    for free, name in ((False, "reference counted"), (True, "reference left out")):
        if ("ours", free) in rates and ("trl", free) in rates:
            found[name] = rates["ours", free] / rates["trl", free]
    if {"ours-live", "ours-unshared"} <= done.keys():
        found["prompt shared, over unshared"] = (
            done["ours-live"]["pairs_per_second"] / done["ours-unshared"]["pairs_per_second"]
        )
    return found


def _keep_best(rates: dict[tuple[str, bool], float], kind: tuple[str, bool], rate: float) -> None:
    rates[kind] = max(rate, rates.get(kind, 0.0))


def line(result: dict[str, Any]) -> str:
    """A finished system, for the terminal."""
    if result["status"] != "ok":
        return f"{result['system']:18} {result['reason']}"
    share = f"{result['share_of_card']:5.0%} of the card" if "share_of_card" in result else ""
    return (
        f"{result['system']:18}{result['pairs_per_second']:8.2f} pairs/s"
        f"{result['unique_tokens_per_second']:9.0f} unique tokens/s{result['tflops']:8.1f} TFLOP/s {share}"
        f"{result['peak_gib']:8.1f} GiB   first step {result['first_step_seconds']:.1f} s"
        f" + {result['import_seconds']:.1f} s imports"
    )


def _settings(options: argparse.Namespace, job: Job) -> dict[str, Any]:
    names = (
        "device",
        "shape",
        "mix",
        "window",
        "pairs",
        "pairs_per_step",
        "tokens_per_micro_batch",
        "seconds",
        "limit",
    )
    return {name: getattr(job, name) for name in names} | {"command": " ".join(sys.argv[1:])}


def _write(options: argparse.Namespace, record: dict[str, Any]) -> None:
    if options.json:
        stamp = {"date": datetime.datetime.now(datetime.UTC).date().isoformat(), "versions": versions()}
        options.json.write_text(json.dumps(record | stamp, indent=2) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--pairs", type=int, help="default: 24 of a real model, 256 of a shape")
    parser.add_argument("--json", type=Path, help="write every number here")
    real = parser.add_argument_group("a real model, whole epochs")
    real.add_argument("--model", default="bundled:smollm2-135m-instruct")
    real.add_argument("--source", default="bundled:everyday", help="any SOURCE that `dpo train` reads")
    real.add_argument("--rounds", type=int, default=3)
    real.add_argument("--max-length", type=int, default=512)
    steady = parser.add_argument_group("a shape, steady state")
    steady.add_argument("--shape", choices=SHAPES, help="default on a GPU: mistral-7b")
    steady.add_argument("--mix", choices=MIXES, default="ultrafeedback")
    steady.add_argument("--systems", type=systems_by_name, default=DEFAULT_SYSTEMS, help="by name, with commas")
    steady.add_argument("--seconds", type=float, default=15, help="measured a system, after two steps of warm-up")
    steady.add_argument("--limit", type=float, default=150, help="seconds a system may take in all")
    steady.add_argument("--within", type=float, default=540, help="seconds the whole run may take")
    steady.add_argument("--pairs-per-step", type=int, default=64, help="of ours")
    steady.add_argument("--tokens-per-micro-batch", type=int, default=8192, help="of ours, and rows of the card's test")
    steady.add_argument("--window", type=int, help="sliding window of the model")
    options = parser.parse_args()
    if options.shape is None and options.device == "cuda":
        options.shape = "mistral-7b"
    return options


if __name__ == "__main__":
    main()
