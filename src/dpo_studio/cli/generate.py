"""`dpo generate`: its command line; one prompt, streamed, or a file of them as JSON Lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from dpo_studio.cli.answer_stream import cut_note, load, print_stream
from dpo_studio.cli.options import Compute, Dtype, MaxNewTokens, ModelOrRun, Overwrite, Seed, Temperature, TopP

if TYPE_CHECKING:  # they import torch
    from dpo_studio.workflows.loading import LoadedModel
    from dpo_studio.workflows.talking import Sampling

__all__ = ["generate"]

_LARGEST_PROMPT = 16 * 2**20
"""Bytes of a prompt from stdin: a row of data has no more."""


def generate(
    model: ModelOrRun,
    prompt: Annotated[Optional[str], typer.Option(help="What to answer; - reads it from stdin.")] = None,  # noqa: UP045
    prompts: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            metavar="FILE", help="Many: one a line, or .jsonl with `prompt`. Answered in batches, as JSON Lines."
        ),
    ] = None,
    out: Annotated[Optional[Path], typer.Option(help="With --prompts: write the lines here, not to stdout.")] = None,  # noqa: UP045
    overwrite: Overwrite = False,
    temperature: Temperature = 0.7,
    max_new_tokens: MaxNewTokens = 256,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    system: Annotated[Optional[str], typer.Option(help="A system turn before the prompt.")] = None,  # noqa: UP045
    base: Annotated[bool, typer.Option("--base", help="Answer with the reference instead of the tuned model.")] = False,
    both: Annotated[bool, typer.Option("--both", help="With --prompts: answers of both, a line each.")] = False,
    samples: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="With --prompts: answers to each prompt, a line each."),
    ] = None,
    dtype: Dtype = None,
    compute: Compute = None,
) -> None:
    """Answer one prompt, streamed, or a file of them, with the model's chat template."""
    if (prompt is None) == (prompts is None):
        raise typer.BadParameter("one of the two is wanted", param_hint="--prompt or --prompts")
    for option, given in (("--out", out is not None), ("--both", both), ("--samples", samples is not None)):
        if given and prompts is None:
            raise typer.BadParameter("goes with --prompts", param_hint=option)
    if base and both:
        raise typer.BadParameter("one of the two", param_hint="--base or --both")
    from dpo_studio.reading import input_text
    from dpo_studio.workflows.talking import Chat, Sampling

    sampling = Sampling(temperature, max_new_tokens, top_p, seed)
    if prompts is not None:
        sides = ("base", "tuned") if both else ("base",) if base else ("tuned",)
        loading = {"dtype": dtype, "compute": compute}
        _answer_file(model, prompts, out, sampling, system, sides, samples, loading, overwrite=overwrite)
        return
    text = input_text("-", what="prompt", limit=_LARGEST_PROMPT) if prompt == "-" else prompt or ""
    if not text.strip():
        raise typer.BadParameter("the prompt is empty", param_hint="--prompt")
    chat = Chat(load(model, dtype, compute, with_reference=base), sampling, system, tuned=not base)
    print_stream(chat.say(text))
    if chat.cut:
        print(cut_note(max_new_tokens), file=sys.stderr)


def _answer_file(
    model: str,
    prompts: Path,
    out: Path | None,
    sampling: Sampling,
    system: str | None,
    sides: tuple[str, ...],
    samples: int | None,
    loading: Mapping[str, str | None],
    *,
    overwrite: bool,
) -> None:
    """Every prompt of a file, in batches; errors are reported before the model is loaded."""
    from dpo_studio.workflows.talking import check_batched, read_prompts
    from dpo_studio.writing import check_outputs

    if out is not None:
        check_outputs({"--out": out}, reads=[prompts, model], overwrite=overwrite)
    check_batched(sampling, samples or 1)
    asked = read_prompts(prompts)
    loaded = load(model, **loading, with_reference="base" in sides)
    lines, cut = _answer_all(loaded, asked, sampling, system, sides=sides, samples=samples)
    _write_lines(lines, out, overwrite=overwrite)
    if cut:
        print(f"{cut} of {len(lines)} answers {cut_note(sampling.max_new_tokens)}", file=sys.stderr)


def _answer_all(
    loaded: LoadedModel,
    prompts: list[str],
    sampling: Sampling,
    system: str | None,
    *,
    sides: tuple[str, ...],
    samples: int | None,
) -> tuple[list[dict[str, Any]], int]:
    """(a line an answer in the prompts' order, how many answers were cut); in batches, not streamed.

    A line names its `sample` where a number of them is asked for, and its `model`, base or tuned, where both are.
    """
    from dpo_studio.console.progress import Progress
    from dpo_studio.preferences.pair import Message
    from dpo_studio.workflows.talking import answers

    first = [Message("system", system)] if system else []
    chats = [[*first, Message("user", prompt)] for prompt in prompts]
    rounds = [(sample, side) for sample in range(samples or 1) for side in sides]
    with Progress() as progress:
        written = [
            answers(loaded, chats, sampling, tuned=side == "tuned", progress=progress, sample=sample)
            for sample, side in rounds
        ]
    lines = []
    for place, prompt in enumerate(prompts):
        for (sample, side), found in zip(rounds, written, strict=True):
            which: dict[str, Any] = {} if samples is None else {"sample": sample}
            which |= {"model": side} if len(sides) > 1 else {}
            answer = found[place]
            said = {"answer": answer.text, "tokens": answer.tokens, "cut": not answer.ended}
            lines.append({"prompt": prompt} | which | said)
    return lines, sum(line["cut"] for line in lines)


def _write_lines(lines: list[dict[str, Any]], out: Path | None, *, overwrite: bool) -> None:
    """JSON Lines to a file, which appears whole, or to stdout."""
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    if out is None:
        sys.stdout.write(text)
        return
    from dpo_studio.writing import write_output

    write_output(out, text, overwrite=overwrite, spill=True)
