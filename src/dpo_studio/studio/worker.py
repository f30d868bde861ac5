"""The process that has the models: it loads what is asked for, answers, and ends when nobody speaks to it any more.

Requests are lines of JSON on stdin, `{models, messages, sampling}`; answers are lines on stdout: `{say}` while loading,
`{index, piece}`, `{index, end, cut}`, `{error, hint}`, and `{done}` at the end of each request. SIGINT ends an answer.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, TextIO

from dpo_studio.errors import DPOStudioError
from dpo_studio.preferences.pair import Message
from dpo_studio.workflows.loading import LoadedModel, load_any
from dpo_studio.workflows.talking import Sampling, stream_answer

__all__ = ["Answering"]

Tell = Callable[[dict[str, Any]], None]
_KEPT = 2
"""Models in memory: a comparison needs two."""


@dataclass
class Answering:
    """The models in memory, and how they are asked."""

    tell: Tell
    stopped: bool = False
    _loaded: dict[str, LoadedModel] = field(default_factory=dict)

    def answer(self, request: dict[str, Any]) -> None:
        """All answers to one request: in turns, a piece of each, where they are of two models in memory."""
        self.stopped = False
        try:
            self._load(request["models"])
            chat = [Message(turn["role"], turn["content"]) for turn in request["messages"]]
            sampling = Sampling(**request["sampling"])
            found = [self._found(name) for name in request["models"]]
            models = {id(each[0]) for each in found if each is not None}
            some = [self._stream(index, name, chat, sampling) for index, name in enumerate(request["models"])]
            if len(models) < len(some):  # one model with its adapter on and off: one after the other
                some = [itertools.chain(*some)]
            while some:
                some = [stream for stream in some if next(stream, None) is not None]
        except DPOStudioError as error:
            self.tell({"error": error.message, "hint": error.hint})
        except Exception as error:  # a GPU without memory, say: the next request may be smaller
            self._loaded.clear()
            self.tell({"error": f"{type(error).__name__}: {error}"[:400], "hint": None})
        self.tell({"done": True})

    def _load(self, names: list[str]) -> None:
        """What is not in memory yet, runs and adapters first: their base may be asked for beside them."""
        for name in sorted(dict.fromkeys(names), key=self._is_base):
            if self._found(name) is None:
                for other in [each for each in self._loaded if each not in names]:
                    if len(self._loaded) >= _KEPT:
                        del self._loaded[other]
                self.tell({"say": f"loading {name}"})
                self._loaded[name] = load_any(name, say=lambda text: self.tell({"say": text}))

    def _is_base(self, name: str) -> bool:
        return not any(os.path.exists(os.path.join(name, mark)) for mark in ("recipe.yaml", "adapter_config.json"))  # noqa: PTH110, PTH118

    def _found(self, name: str) -> tuple[LoadedModel, bool] | None:
        """(what is in memory, with its adapter on or off): a base is a run's own model without its adapter."""
        if (own := self._loaded.get(name)) is not None:
            return own, True
        for each in self._loaded.values():
            plain = each.adapter is not None and each.other_reference is None and each.reference_adapter is None
            if plain and _is_same(str(each.base.typed), name):
                return each, False
        return None

    def _stream(self, index: int, name: str, chat: list[Message], sampling: Sampling) -> Iterator[bool]:
        """Tell the pieces of an answer, one at each `next`."""
        found = self._found(name)
        assert found is not None, "it was loaded a moment ago"
        ended = False
        with closing(stream_answer(found[0], chat, sampling, tuned=found[1])) as pieces:
            while not self.stopped:
                try:
                    self.tell({"index": index, "piece": next(pieces)})
                    yield True
                except StopIteration as end:
                    ended = bool(end.value)
                    break
        self.tell({"index": index, "end": True, "cut": not ended})


def _is_same(model: str, other: str) -> bool:
    """Whether two names are of one model; a folder may be named from the studio's folder, or from the root."""
    return model == other or (os.path.exists(other) and os.path.realpath(model) == os.path.realpath(other))  # noqa: PTH110


def main(asked: TextIO, answers: TextIO) -> None:
    def tell(line: dict[str, Any]) -> None:
        print(json.dumps(line), file=answers, flush=True)

    answering = Answering(tell)

    def stop(*_: object) -> None:
        answering.stopped = True

    signal.signal(signal.SIGINT, stop)
    for line in asked:
        answering.answer(json.loads(line))


if __name__ == "__main__":
    private = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer of ours
    main(sys.stdin, private)
