"""`dpo chat` and `dpo generate --prompts`: what is typed and printed around the answers."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # they import torch
    from dpo_studio.workflows.loading import Loaded
    from dpo_studio.workflows.talking import Chat, Sampling

__all__ = ["answer_all", "converse", "cut_note", "write_lines"]

HELP = """/base   let the model before training answer
/tuned  let the tuned model answer
/new    forget what was said
/help   this list
/quit   end (so does Ctrl-D)
Ctrl-C stops an answer; where none is being written, it ends too."""


def converse(talk: Chat, name: str, show: Callable[[Iterable[str]], None]) -> None:
    """Ask and answer until the input ends. `show` prints the pieces of an answer."""
    if sys.stdin.isatty():
        import readline  # noqa: F401 - `input` then has line editing, and arrows bring back what was typed

    _tell(_what_is_loaded(talk.loaded, name))
    _tell("/base  /tuned  /new  /help  /quit")
    while True:
        try:
            text = input(f"{'tuned' if talk.tuned else 'base'}> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if text == "/quit":
            return
        if text == "/help":
            _tell(HELP)
        elif text == "/base" and talk.loaded.other_reference is not None:
            _tell(f"this run's reference is not its base: it is {talk.loaded.other_reference}")
        elif text in ("/base", "/tuned"):
            talk.tuned = text == "/tuned"
        elif text == "/new":
            talk.turns.clear()
        elif text.startswith("/"):
            _tell(f"no such command: {text} (/help lists them)")
        elif text:
            _answer(talk, text, show)


def _answer(talk: Chat, text: str, show: Callable[[Iterable[str]], None]) -> None:
    """Print the answer; Ctrl-C ends it alone, and then neither it nor its question is remembered."""
    pieces: Generator[str, None, None] = talk.say(text)
    try:
        with closing(pieces):
            show(pieces)
    except KeyboardInterrupt:
        print(flush=True)
        _tell("(stopped; neither question nor answer is remembered)")
    else:
        if talk.cut:
            _tell(cut_note(talk.sampling.max_new_tokens))


def cut_note(limit: int) -> str:
    """What is said of an answer that its limit ended."""
    return f"(cut at {limit} tokens; --max-new-tokens sets the limit)"


def answer_all(
    loaded: Loaded, prompts: list[str], sampling: Sampling, system: str | None, *, tuned: bool
) -> tuple[list[dict[str, Any]], int]:
    """(a line a prompt in their order, how many answers were cut); in batches, not streamed."""
    from dpo_studio.preferences.pair import Message
    from dpo_studio.reports.progress import Progress
    from dpo_studio.workflows.talking import answers

    first = [Message("system", system)] if system else []
    chats = [[*first, Message("user", prompt)] for prompt in prompts]
    with Progress() as progress:
        written = answers(loaded, chats, sampling, tuned=tuned, progress=progress)
    lines = [
        {"prompt": prompt, "answer": answer.text, "tokens": answer.tokens, "cut": not answer.ended}
        for prompt, answer in zip(prompts, written, strict=True)
    ]
    return lines, sum(not answer.ended for answer in written)


def write_lines(lines: list[dict[str, Any]], out: Path | None, *, overwrite: bool = False) -> None:
    """JSON Lines to a file, which appears whole, or to stdout."""
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    if out is None:
        sys.stdout.write(text)
        return
    from dpo_studio.writing import write_output

    write_output(out, text, overwrite=overwrite, spill=True)


def _what_is_loaded(loaded: Loaded, name: str) -> str:
    from dpo_studio.reports.text import printable

    dtype = str(loaded.base.model.dtype).removeprefix("torch.")
    adapter = f", adapter {loaded.adapter}" if loaded.adapter is not None else ", no adapter: both sides are the same"
    return printable(f"{name}: {loaded.base.typed}{adapter}, {dtype} on {loaded.base.device}")


def _tell(text: str) -> None:
    print(text, file=sys.stderr)
