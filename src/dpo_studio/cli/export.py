"""`dpo export`: its command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dpo_studio.cli.options import Bits, CalibrationRows, DescAct, Dtype, Form, GgufKind, GroupSize, Overwrite, group_of

__all__ = ["export"]


def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder.")],
    out: Annotated[Path, typer.Argument(help="The folder to make.")],
    to: Form,
    type_: GgufKind = "f16",
    bits: Bits = 4,
    group_size: GroupSize = "auto",
    rows: CalibrationRows = 128,
    desc_act: DescAct = False,
    force: Annotated[
        bool, typer.Option("--force", help="Keep it even if it differs too much from the run's model.")
    ] = False,
    overwrite: Overwrite = False,
    dtype: Dtype = None,
) -> None:
    """Write the adapter, a merged model, a GPTQ folder or a GGUF; it is compared with the run's model first."""
    size = group_of(group_size)
    from dpo_studio.workflows.exporting.run import Quantising, export_run

    settings = Quantising(bits, size, desc_act)
    export_run(
        run,
        out,
        to,
        settings=settings,
        gguf_type=type_,
        rows=rows,
        force=force,
        overwrite=overwrite,
        dtype=dtype,
    )
    print(out)
