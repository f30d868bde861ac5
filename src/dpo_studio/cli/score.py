"""`dpo score`: its command line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from dpo_studio.cli.options import (
    Compute,
    Dtype,
    Format,
    Labels,
    Map,
    ModelOrRun,
    Overwrite,
    Revision,
    Rows,
    Source,
    Split,
    TooLong,
    source_section,
    talks,
)

__all__ = ["score"]


def score(
    model: ModelOrRun,
    source: Source,
    out: Annotated[Optional[Path], typer.Option(help="Write the lines here instead of stdout.")] = None,  # noqa: UP045
    overwrite: Overwrite = False,
    beta: Annotated[Optional[float], typer.Option(help="Reward per nat; default: the run's, else 0.1.")] = None,  # noqa: UP045
    dtype: Dtype = None,
    compute: Compute = None,
    max_length: Annotated[Optional[int], typer.Option(min=8, help="Longest prompt and answer, in tokens.")] = None,  # noqa: UP045
    too_long: TooLong = "drop",
    format_: Format = "auto",
    map_: Map = None,
    label: Labels = None,
    split: Split = None,
    rows: Rows = None,
    revision: Revision = None,
    as_json: Annotated[bool, typer.Option("--json", help="The summary on stderr as JSON.")] = False,
) -> None:
    """Log-probs of both answers under policy and reference, margins and accuracy, one JSON line a pair."""
    section = source_section(source, format_, map_, label, split, rows, revision)
    from dpo_studio.workflows.scoring import score_pairs, score_to_file

    settings: dict[str, Any] = {
        "beta": beta,
        "dtype": dtype,
        "compute": compute,
        "max_length": max_length,
        "too_long": too_long,
    }
    if out is not None:
        summary = score_to_file(model, section, out, overwrite=overwrite, **settings)
    else:
        summary = score_pairs(model, section, sys.stdout, **settings)
    if talks():
        _summary(summary, as_json)


def _summary(summary: dict[str, Any], as_json: bool) -> None:
    import json

    if as_json:
        print(json.dumps(summary), file=sys.stderr)
        return
    from dpo_studio.console.text import percent

    for name, value in summary.items():
        shown = value
        if name.startswith(("accuracy", "longer_wins")):  # shares: percent where people read, fractions in JSON
            shown = " to ".join(map(percent, value)) if isinstance(value, list) else percent(value)
        print(f"{name}: {shown}", file=sys.stderr)
