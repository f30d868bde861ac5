"""Whole runs in seconds: a tiny model, some pairs, a recipe, and the `dpo` command in this process."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import yaml

from dpo_studio.cli import main
from tests.tiny_tokenizers import TEXT

__all__ = ["Said", "dpo", "tiny_rows", "write_pairs", "write_recipe", "write_rows"]

_WORDS = TEXT.split()


@dataclass(frozen=True)
class Said:
    """What a command answered."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Its data, read as JSON Lines."""
        return [json.loads(line) for line in self.out.splitlines()]


def dpo(*arguments: object, stdin: str = "") -> Said:
    """Run `dpo ...` in this process: a new one takes five seconds to import torch."""
    out, err = io.StringIO(), io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    code: object = 0
    with (
        _given(stdin),
        redirect_stdout(out),
        redirect_stderr(err),
        patch.object(sys, "argv", ["dpo", *map(str, arguments)]),
        patch.object(sys, "stdin", io.StringIO(stdin)),
    ):
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background has it ignored
        try:
            main()
        except SystemExit as done:
            code = done.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return Said(code if isinstance(code, int) else int(code is not None), out.getvalue(), err.getvalue())


@contextmanager
def _given(text: str) -> Iterator[None]:
    """Inside, the process's own stdin has the text, for what reads it by its number."""
    if not text:
        yield
        return
    before = os.dup(0)
    with tempfile.TemporaryFile() as file:
        file.write(text.encode())
        file.seek(0)
        os.dup2(file.fileno(), 0)
    try:
        yield
    finally:
        os.dup2(before, 0)
        os.close(before)


def tiny_rows(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of `prompt`, `chosen` and `rejected`, no prompt twice, answers of 4 to 12 words."""
    draw = random.Random(seed)

    def words(least: int, most: int) -> str:
        return " ".join(draw.choices(_WORDS, k=draw.randint(least, most)))

    return [
        {"prompt": f"{words(3, 8)} {number}?", "chosen": words(4, 12), "rejected": words(4, 12)}
        for number in range(count)
    ]


def write_rows(file: Path, rows: Iterable[object]) -> Path:
    """JSON Lines; a text stands as it is, so that a line may be no JSON."""
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


def write_pairs(file: Path, count: int, *, seed: int = 0) -> Path:
    """`count` pairs of text, prompt, chosen and rejected: every prompt another, answers of one to nine words."""
    words = ["dry", "it", "keep", "off", "and", "wait", "a", "day", "before", "the", "bread", "does", "rise", "warmer"]
    draw = np.random.default_rng(seed)

    def text() -> str:
        return " ".join(draw.choice(words, draw.integers(1, 10)))

    rows = [
        {"prompt": f"{text()} {seed}.{row}?", "chosen": f"{text()} {row}.", "rejected": text()} for row in range(count)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def write_recipe(file: Path, base: Path, *, rows: Sequence[object] | None = None, **sections: Any) -> Path:
    """A recipe of four small steps on `base`, its pairs and its run folder beside it; `sections` are merged into it."""
    write_rows(file.parent / "pairs.jsonl", rows if rows is not None else tiny_rows(24))
    recipe: dict[str, Any] = {
        "model": {"path": str(base), "dtype": "float32"},
        "data": {"train": {"source": "pairs.jsonl"}, "held_out": {"fraction": 0.25}},
        "adapter": {"rank": 2, "alpha": 4},
        "training": {"pairs_per_step": 4, "max_steps": 4, "learning_rate": 1e-2, "evaluate_every": 2, "save_every": 2},
        "run": {"folder": str(file.parent / "run")},
    }
    for name, section in sections.items():
        if section is None:  # its defaults: a section that is null is refused
            recipe.pop(name, None)
        else:
            recipe[name] = recipe.get(name, {}) | section
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return file
