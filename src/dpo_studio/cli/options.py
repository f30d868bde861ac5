"""Every option that several verbs have, or that takes one of a few words; and the values that some make together.

`--help` lists the words of an option, and a wrong one is answered with them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal, Optional

import typer

__all__ = [
    "JUDGE_HELP",
    "Anyway",
    "Bits",
    "CalibrationRows",
    "Compute",
    "Concurrency",
    "DescAct",
    "Dtype",
    "Form",
    "Format",
    "GgufKind",
    "GroupSize",
    "JudgeSpec",
    "KeyEnv",
    "Labels",
    "Map",
    "MaxNewTokens",
    "ModelOrRun",
    "Overrides",
    "Overwrite",
    "Param",
    "Price",
    "RecipeFile",
    "Replies",
    "Revision",
    "Rows",
    "Seed",
    "Source",
    "Split",
    "Temperature",
    "Template",
    "Timeout",
    "TooLong",
    "TopP",
    "Tracker",
    "group_of",
    "llm_options",
    "parameters_of",
    "prices_of",
    "source_section",
    "source_section_of",
    "talks",
]

RecipeFile = Annotated[Path, typer.Argument(help="A recipe, such as recipes/demo.yaml.")]
ModelOrRun = Annotated[str, typer.Argument(metavar="MODEL_OR_RUN")]
Source = Annotated[str, typer.Argument(help="A file, a folder, bundled:everyday or a Hub dataset id.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
Format = Annotated[str, typer.Option("--format", help="The shape of a row, auto looks at the first rows: {formats}.")]
Map = Annotated[
    Optional[list[str]],  # noqa: UP045 - typer reads it at run time
    typer.Option("--map", metavar="NAME=COLUMN", help="Which column contains prompt, first, second, label, ..."),
]
Labels = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--label", metavar="MEANING=VALUE", help="What the label's values mean: first=1, second=2, tie=0."),
]
Split = Annotated[Optional[str], typer.Option("--split", help="Which split of a folder or Hub dataset.")]  # noqa: UP045
Rows = Annotated[Optional[int], typer.Option("--rows", min=1, help="A seeded sample of this many rows.")]  # noqa: UP045
Revision = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--revision", help="Branch, tag or commit of a Hub dataset."),
]
Compute = Annotated[
    Optional[Literal["bf16", "fp8"]],  # noqa: UP045
    typer.Option(help="Products with frozen weights. Default: as the run's recipe says."),
]
Dtype = Annotated[
    Optional[Literal["float32", "bfloat16", "float16"]],  # noqa: UP045
    typer.Option(help="Default: what is fast here."),
]
TooLong = Annotated[
    Literal["drop", "cut_prompt_start", "cut_answer_end"], typer.Option(help="What to do with a longer pair.")
]
Tracker = Annotated[Optional[Literal["tensorboard", "wandb", "trackio"]], typer.Option(help="Log to it as well.")]  # noqa: UP045
GgufKind = Annotated[
    Literal["f16", "bf16", "q8_0", "q4_k_m"], typer.Option("--type", help="Of the matrices of a GGUF file.")
]
Form = Annotated[Literal["adapter", "merged", "gptq", "gguf"], typer.Option("--to", help="What to write.")]
Bits = Annotated[Literal[2, 3, 4, 8], typer.Option(help="Bits of a weight.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=C", help="Override a recipe key; objective.kind is one of {objectives}."),
]
Anyway = Annotated[bool, typer.Option("--anyway", help="Train on pairs that make the run worthless, too.")]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token every time.")]
MaxNewTokens = Annotated[int, typer.Option(help="Longest answer, in tokens.")]
TopP = Annotated[float, typer.Option(help="Sample from the likeliest tokens with this share of probability.")]
Seed = Annotated[int, typer.Option(help="The same seed gives the same answers.")]
GroupSize = Annotated[str, typer.Option(help="Inputs that share a scale; auto: the largest of 128, 64, 32 that fits.")]
CalibrationRows = Annotated[int, typer.Option("--rows", min=1, help="Prompts with chosen answers to calibrate on.")]
DescAct = Annotated[bool, typer.Option("--desc-act", help="Quantise the inputs that matter most first (act-order).")]
JUDGE_HELP = "{judges}."
"""Names in braces are filled in when help is shown (`cli.app`): judges, formats and losses can be added."""
JudgeSpec = Annotated[str, typer.Option("--judge", metavar="JUDGE", help=JUDGE_HELP)]
Template = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--judge-template", metavar="FILE", help="The prompt of an LLM judge, instead of the built-in one."),
]
KeyEnv = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--judge-key-env", metavar="NAME", help="Environment variable with the key; default OPENAI_API_KEY."),
]
Param = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--judge-param", metavar="NAME=VALUE", help="Sent with every request; null removes one."),
]
Price = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--judge-price", metavar="IN,OUT", help="Dollars a million tokens, read and written."),
]
Replies = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--judge-replies", metavar="FILE", help="Where every reply is saved, and looked up first."),
]
Concurrency = Annotated[int, typer.Option("--judge-concurrency", min=1, help="Requests at a time.")]
Timeout = Annotated[float, typer.Option("--judge-timeout", help="Longest wait for one reply, in seconds.")]


def source_section(
    source: str,
    format_: str = "auto",
    map_: list[str] | None = None,
    label: list[str] | None = None,
    split: str | None = None,
    rows: int | None = None,
    revision: str | None = None,
) -> Any:
    """The source that these arguments describe, a `SourceSection`, as `data.train` of a recipe would."""
    from dpo_studio.config import SourceSection

    if not source:
        raise typer.BadParameter("the source is empty", param_hint="SOURCE")
    columns = {name: values[-1] for name, values in _assignments("--map", map_).items()}
    return SourceSection(
        source=source,
        format=format_,
        map=columns,
        label=_assignments("--label", label),
        split=split,
        rows=rows,
        revision=revision,
    )


def source_section_of(option: str, source: str | None, *how: Any) -> Any:
    """The same for a source that is an option; None where it is not given, and then nothing may say how to read it.

    `how`: the arguments of `source_section` that follow the source.
    """
    if source:
        return source_section(source, *how)
    if any(value not in (None, "auto", []) for value in how):
        raise typer.BadParameter(
            "they say how a source is read",
            param_hint=f"--map, --label, --format, --split, --rows or --revision without {option}",
        )
    return None


def _assignments(option: str, given: list[str] | None) -> dict[str, list[str]]:
    """`a=b a=c` -> {a: [b, c]}."""
    found: dict[str, list[str]] = {}
    for text in given or []:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise typer.BadParameter(f"{text!r} is not of the form name=value", param_hint=option)
        found.setdefault(name.strip(), []).append(value)
    return found


def group_of(group_size: str) -> int | None:
    """`--group-size` as a number; None is auto."""
    if group_size == "auto":
        return None
    if not group_size.isdecimal() or int(group_size) < 1:
        raise typer.BadParameter(f"{group_size!r} is neither auto nor a number", param_hint="--group-size")
    return int(group_size)


def llm_options(
    template: Path | None,
    key_env: str | None,
    param: list[str] | None,
    price: str | None,
    replies: Path | None,
    concurrency: int,
    timeout: float,
) -> Any:
    """The options above as `workflows.judging.LLMOptions`."""
    from dpo_studio.evaluation.endpoint import Asking
    from dpo_studio.workflows.judging import LLMOptions

    asking = Asking(key_variable=key_env, concurrency=concurrency, timeout_s=timeout)
    return LLMOptions(
        template, parameters_of("--judge-param", param), prices_of("--judge-price", price), replies, asking
    )


def parameters_of(option: str, given: list[str] | None) -> dict[str, Any]:
    """`temperature=0 seed=null` -> {temperature: 0, seed: None}: values are JSON if they are valid, else text."""
    return {name: _value(option, value) for name, value in _named(option, given).items()}


def _named(option: str, given: list[str] | None) -> dict[str, str]:
    pairs = [text.partition("=") for text in given or []]
    if wrong := next(("".join(parts) for parts in pairs if not parts[0] or not parts[1]), None):
        raise typer.BadParameter(f"{wrong!r} is not of the form NAME=VALUE", param_hint=option)
    return {name: value for name, _, value in pairs}


def _value(option: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
    except RecursionError:
        raise typer.BadParameter(f"{text[:20]!r}... is nested too deep", param_hint=option) from None


def prices_of(option: str, text: str | None) -> tuple[float, float] | None:
    """`0.15,0.60` -> the dollars a million tokens read and written."""
    if text is None:
        return None
    try:
        read, written = map(float, text.split(","))
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not of the form IN,OUT, two prices in dollars", param_hint=option
        ) from None
    return read, written


def talks() -> bool:
    """Whether this process prints results: of several that a launcher started, the first."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK") == "0"
