"""Options that take one of a few words: `--help` lists them, and a wrong one is answered with them."""

from __future__ import annotations

from typing import Annotated, Literal, Optional

import typer

__all__ = ["Bits", "Dtype", "Form", "TooLong", "Tracker"]

Dtype = Annotated[
    Optional[Literal["float32", "bfloat16", "float16"]],  # noqa: UP045 - typer reads it at run time
    typer.Option(help="Default: what is fast here."),
]
TooLong = Annotated[
    Literal["drop", "cut_prompt_start", "cut_answer_end"], typer.Option(help="What becomes of a pair that is longer.")
]
Tracker = Annotated[Optional[Literal["tensorboard", "wandb", "trackio"]], typer.Option(help="Log to it as well.")]  # noqa: UP045
Form = Annotated[Literal["adapter", "merged", "gptq"], typer.Option("--to", help="What to write.")]
Bits = Annotated[Literal[2, 3, 4, 8], typer.Option(help="Bits of a weight.")]
