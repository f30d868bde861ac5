"""`dpo demo`: its command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["demo"]


def demo(out: Annotated[Path, typer.Option(help="The run folder to make.")] = Path("runs/demo")) -> None:
    """Train, answer, judge and report on the bundled model and pairs, on a CPU, in minutes."""
    from dpo_studio.console.text import percent
    from dpo_studio.runs.folder import RunFolder
    from dpo_studio.workflows.demo import run_demo

    result = run_demo(out)
    if "win_rate" in result:
        low, high = result["win_rate_ci95"]
        interval = f"95 % interval {percent(low)} to {percent(high)}"
        print(f"win rate {percent(result['win_rate'])} ({interval}), {result['n']} comparisons")
    print(out / RunFolder.REPORT)
