"""`dpo quantize`: its command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from dpo_studio.cli.options import (
    Bits,
    CalibrationRows,
    DescAct,
    Format,
    GroupSize,
    Labels,
    Map,
    Overwrite,
    Revision,
    Split,
    group_of,
    source_section_of,
)

__all__ = ["quantize"]


def quantize(
    model: Annotated[str, typer.Argument(help="A dense model: a folder, a Hub id or the bundled one.")],
    out: Annotated[Path, typer.Argument(help="The folder to make.")],
    calibration: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Pairs whose prompts and chosen answers the integers are fitted to: your own."),
    ] = None,
    bits: Bits = 4,
    group_size: GroupSize = "auto",
    rows: CalibrationRows = 128,
    desc_act: DescAct = False,
    max_length: Annotated[int, typer.Option(min=8, help="Longest prompt and answer, in tokens.")] = 1024,
    format_: Format = "auto",
    map_: Map = None,
    label: Labels = None,
    split: Split = None,
    revision: Revision = None,
    overwrite: Overwrite = False,
) -> None:
    """Make a GPTQ model, calibrated on your own prompts and chosen answers."""
    size = group_of(group_size)
    section = source_section_of("--calibration", calibration, format_, map_, label, split, None, revision)
    from dpo_studio.workflows.exporting.cards import perplexity_line
    from dpo_studio.workflows.exporting.quantizing import Calibration, Quantising, quantize_model

    chosen = Calibration(section, rows, max_length)
    result = quantize_model(
        model, out, calibration=chosen, settings=Quantising(bits, size, desc_act), overwrite=overwrite
    )
    if result["perplexity"] is not None:
        print(perplexity_line(result))
    print(out)
