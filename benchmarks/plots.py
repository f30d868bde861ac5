"""The figure and the tables of docs/performance.md, from the JSON of `vs_trl.py --shape`, `gptq.py`, `growth.py`.

python benchmarks/plots.py ultrafeedback.json summarisation.json growth.json --figure docs/images/performance.png
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["draw", "growth_table", "table"]

_OURS, _UNSHARED, _THEIRS, _INK = "#0072b2", "#8dbfdc", "#b4b8bd", "#303438"
"""Okabe and Ito's blue against grey: told apart by eyes without red or green, and in print without colour."""
_COLUMNS = ("system", "setting", "pairs/s", "unique tokens/s", "TFLOP/s", "share of card", "peak GiB", "first step, s")


def main() -> None:
    """Print a table for each file; draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--figure", type=Path, help="draw pairs/s of every mix into this PNG")
    options = parser.parse_args()
    records = [json.loads(file.read_text(encoding="utf-8")) for file in options.files]
    steady = [record for record in records if record["kind"] == "steady"]
    for record in [*steady, *(record for record in records if record["kind"] == "gptq")]:
        print(f"{caption(record)}\n\n{table(record)}\n")
    for record in records:
        if record["kind"] == "growth":
            print(f"{growth_caption(record)}\n\n{growth_table(record)}\n")
    if options.figure and steady:
        draw(steady, options.figure)


def caption(record: dict[str, Any]) -> str:
    """What the table's figures were measured on."""
    devices = {result["device_name"] for result in record["systems"] if "device_name" in result}
    versions = ", ".join(f"{name} {number}" for name, number in sorted(record["versions"].items()))
    card = record["card"].get("tflops")
    rate = f"; its products alone {card:.0f} TFLOP/s" if card else ""
    ratios = "; ".join(f"{name} {value:.2f}" for name, value in record.get("ratios", {}).items())
    return (
        f"{record['shape']}, {record['mix']} lengths, {', '.join(sorted(devices)) or 'no device'}{rate}, "
        f"{record['date']} ({versions}). Ratios: {ratios or 'none'}."
    )


def table(record: dict[str, Any]) -> str:
    """A row for every system, the fastest first, then those that failed."""
    results = sorted(record["systems"], key=lambda result: -result.get("pairs_per_second", 0))
    return _markdown(_COLUMNS, map(_row, results))


def _row(result: dict[str, Any]) -> list[str]:
    who, setting = _who(result), result["setting"]
    if result["status"] != "ok":
        return [who, setting, f"failed: {result['reason'].replace('|', '/')}", *[""] * 5]
    rate = f"{result['pairs_per_second']:.2f}"
    if with_pass := result.get("pairs_per_second_with_reference"):
        rate += f" ({with_pass:.2f} with its pass)"
    share = result.get("share_of_card")
    return [
        who,
        setting,
        rate,
        f"{result['unique_tokens_per_second']:,.0f}",
        f"{result['tflops']:.0f}",
        "" if share is None else f"{share:.0%}",
        f"{result['peak_gib']:.1f}",
        f"{result['first_step_seconds']:.0f} + {result['import_seconds']:.0f} imports",
    ]


def growth_caption(record: dict[str, Any]) -> str:
    """What grew, and where."""
    devices = {row["device_name"] for row in record["rows"] if "device_name" in row}
    return f"{record['shape']}, {record['mix']} lengths, {', '.join(sorted(devices))}: `growth.py {record['command']}`"


def growth_table(record: dict[str, Any]) -> str:
    """A row for every grown setting."""
    rows = []
    for row in record["rows"]:
        if "reason" in row:
            rows.append([row["name"], f"failed: {row['reason']}", "", "", ""])
            continue
        ratios = [f"{row[key]:.2f}" if key in row else "1" for key in ("time_ratio", "memory_ratio")]
        rows.append([row["name"], f"{row['seconds']:.1f}", ratios[0], f"{row['gib']:.2f}", ratios[1]])
    return _markdown(("setting", "seconds an epoch", "of the base", "peak GiB", "of the base"), rows)


def draw(records: Sequence[dict[str, Any]], file: Path) -> None:
    """Bars of pairs/s, a panel a mix, each with its number and its memory; failed systems are in the table only."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = [_bars(record) for record in records]
    figure, panels = pyplot.subplots(
        len(records),
        1,
        figsize=(11, sum(0.36 * len(some) + 0.9 for some in bars)),
        height_ratios=[max(1, len(some)) for some in bars],
        layout="constrained",
        squeeze=False,
    )
    for record, some, panel in zip(records, bars, panels[:, 0], strict=True):
        rates = [result["pairs_per_second"] for result in some]
        places = range(len(some))
        panel.barh(places, rates, height=0.72, color=[_colour(result["system"]) for result in some])
        for place, result in zip(places, some, strict=True):
            text = f" {result['pairs_per_second']:.1f}   {result['peak_gib']:.0f} GiB"
            panel.text(result["pairs_per_second"], place, text, va="center", color=_INK, fontsize=9)
        labels = [f"{_who(result)}: {result['setting']}" for result in some]
        panel.set_yticks(places, labels=labels, fontsize=9, color=_INK)
        panel.set_title(
            f"{record['mix']}: pairs/s, peak memory", loc="left", fontsize=11, color=_INK, fontweight="bold"
        )
        panel.set_xlim(0, 1.18 * max(rates, default=1))
        panel.invert_yaxis()
        panel.xaxis.set_visible(False)
        panel.tick_params(length=0)
        panel.spines[:].set_visible(False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150, facecolor="white")
    pyplot.close(figure)


def _bars(record: dict[str, Any]) -> list[dict[str, Any]]:
    done = [result for result in record["systems"] if result["status"] == "ok"]
    return sorted(done, key=lambda result: -result["pairs_per_second"])


def _colour(system: str) -> str:
    if system == "ours-unshared":
        return _UNSHARED
    return _THEIRS if system.startswith("trl") else _OURS


def _who(result: dict[str, Any]) -> str:
    return "TRL" if result["system"].startswith("trl") else "DPO Studio"


def _markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


if __name__ == "__main__":
    main()
