"""What `dpo chat` and `dpo generate` share: loading a model and printing its answers as they come."""

from __future__ import annotations

import shutil
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # it imports torch
    from dpo_studio.workflows.loading import LoadedModel

__all__ = ["cut_note", "load", "print_stream", "wrapped"]


def load(model: str, dtype: str | None, compute: str | None, *, with_reference: bool = False) -> LoadedModel:
    from dpo_studio.console.progress import Progress
    from dpo_studio.workflows.loading import load_any

    with Progress() as progress:
        return load_any(model, dtype=dtype, compute=compute, with_reference=with_reference, say=progress.say)


def print_stream(pieces: Iterable[str]) -> None:
    """Model text to a terminal: control characters made visible, so that no answer can rewrite the screen."""
    from dpo_studio.console.text import printable

    if sys.stdout.isatty():
        pieces = wrapped(map(printable, pieces), shutil.get_terminal_size().columns)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def wrapped(pieces: Iterable[str], width: int) -> Iterator[str]:
    """The same text with lines that end between words; a word is printed once it is complete.

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


def cut_note(limit: int) -> str:
    """The note on an answer that stopped at its token limit."""
    return f"(cut at {limit} tokens; --max-new-tokens sets the limit)"
