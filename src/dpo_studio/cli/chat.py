"""`dpo chat`: its command line, and what is typed and printed around the answers."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import closing
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from dpo_studio.cli.answer_stream import cut_note, load, print_stream
from dpo_studio.cli.options import Compute, Dtype, MaxNewTokens, ModelOrRun, Seed, Temperature, TopP

if TYPE_CHECKING:  # they import torch
    from dpo_studio.workflows.loading import LoadedModel
    from dpo_studio.workflows.talking import Chat

__all__ = ["chat"]

_HELP = """/base   answer with the model before training
/tuned  let the tuned model answer
/new    forget what was said
/help   this list
/quit   end (so does Ctrl-D)
Ctrl-C stops an answer; where none is being written, it ends too."""


def chat(
    model: ModelOrRun,
    temperature: Temperature = 0.7,
    max_new_tokens: MaxNewTokens = 256,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    system: Annotated[Optional[str], typer.Option(help="A system turn before the conversation.")] = None,  # noqa: UP045
    dtype: Dtype = None,
    compute: Compute = None,
) -> None:
    """Chat with a model. /base and /tuned switch between them, /new starts over, /help lists more, /quit ends."""
    from dpo_studio.workflows.talking import Chat, Sampling

    talk = Chat(load(model, dtype, compute), Sampling(temperature, max_new_tokens, top_p, seed), system)
    _converse(talk, model)


def _converse(talk: Chat, name: str) -> None:
    """Ask and answer until the input ends."""
    if sys.stdin.isatty():
        import readline  # noqa: F401 - `input` then has line editing, and arrows bring back what was typed

    _print_note(_what_is_loaded(talk.loaded, name))
    _print_note("/base  /tuned  /new  /help  /quit")
    while True:
        try:
            text = input(f"{'tuned' if talk.tuned else 'base'}> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if text == "/quit":
            return
        if text == "/help":
            _print_note(_HELP)
        elif text == "/base" and talk.loaded.other_reference is not None:
            _print_note(f"this run's reference is not its base: it is {talk.loaded.other_reference}")
        elif text in ("/base", "/tuned"):
            talk.tuned = text == "/tuned"
        elif text == "/new":
            talk.turns.clear()
        elif text.startswith("/"):
            _print_note(f"no such command: {text} (/help lists them)")
        elif text:
            _answer(talk, text)


def _answer(talk: Chat, text: str) -> None:
    """Print the answer; Ctrl-C ends only the answer; then neither it nor its question is remembered."""
    pieces: Generator[str, None, None] = talk.say(text)
    try:
        with closing(pieces):
            print_stream(pieces)
    except KeyboardInterrupt:
        print(flush=True)
        _print_note("(stopped; neither question nor answer is remembered)")
    else:
        if talk.cut:
            _print_note(cut_note(talk.sampling.max_new_tokens))


def _what_is_loaded(loaded: LoadedModel, name: str) -> str:
    from dpo_studio.console.text import printable

    dtype = str(loaded.base.model.dtype).removeprefix("torch.")
    adapter = f", adapter {loaded.adapter}" if loaded.adapter is not None else ", no adapter: both sides are the same"
    return printable(f"{name}: {loaded.base.typed}{adapter}, {dtype} on {loaded.base.device}")


def _print_note(text: str) -> None:
    print(text, file=sys.stderr)
