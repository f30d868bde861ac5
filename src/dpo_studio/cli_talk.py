"""`dpo chat` and `dpo generate --prompts`: what is typed and printed around the answers."""

from __future__ import annotations

import json
import sys
import unicodedata
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # they import torch
    from dpo_studio.workflows.loading import LoadedModel
    from dpo_studio.workflows.talking import Chat, Sampling

__all__ = ["answer_all", "converse", "cut_note", "wrapped", "write_lines"]

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
    loaded: LoadedModel,
    prompts: list[str],
    sampling: Sampling,
    system: str | None,
    *,
    sides: tuple[str, ...],
    samples: int | None = None,
) -> tuple[list[dict[str, Any]], int]:
    """(a line an answer in the prompts' order, how many answers were cut); in batches, not streamed.

    A line names its `sample` where a number of them is asked for, and its `model`, base or tuned, where both are.
    """
    from dpo_studio.preferences.pair import Message
    from dpo_studio.reports.progress import Progress
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


def wrapped(pieces: Iterable[str], width: int) -> Iterator[str]:
    """The same text with lines that end between words; a word is held back until it is whole.

    A word wider than a line stays as it is: the terminal breaks it.
    """
    at, gap, word = 0, "", ""
    for piece in pieces:
        for character in piece:
            if not character.isspace():
                word += character
                continue
            if word:
                breaks = at and gap and at + _columns(gap + word) > width
                yield f"\n{word}" if breaks else gap + word
                at = _columns(word) if breaks else at + _columns(gap + word)
                gap = word = ""
            if character == "\n":
                yield f"{gap}\n"
                at, gap = 0, ""
            else:
                gap += character
    if gap or word:
        yield f"\n{word}" if at and word and at + _columns(gap + word) > width else gap + word


def _columns(text: str) -> int:
    """How wide a terminal shows it: characters of East Asian scripts take two columns, combining ones none."""
    return sum(
        0 if unicodedata.combining(one) else 2 if unicodedata.east_asian_width(one) in "WF" else 1 for one in text
    )


def write_lines(lines: list[dict[str, Any]], out: Path | None, *, overwrite: bool = False) -> None:
    """JSON Lines to a file, which appears whole, or to stdout."""
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    if out is None:
        sys.stdout.write(text)
        return
    from dpo_studio.writing import write_output

    write_output(out, text, overwrite=overwrite, spill=True)


def _what_is_loaded(loaded: LoadedModel, name: str) -> str:
    from dpo_studio.reports.text import printable

    dtype = str(loaded.base.model.dtype).removeprefix("torch.")
    adapter = f", adapter {loaded.adapter}" if loaded.adapter is not None else ", no adapter: both sides are the same"
    return printable(f"{name}: {loaded.base.typed}{adapter}, {dtype} on {loaded.base.device}")


def _tell(text: str) -> None:
    print(text, file=sys.stderr)
