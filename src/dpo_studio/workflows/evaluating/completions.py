"""Stored answers: generated once, written to disk before they are judged, and reused after an interruption."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dpo_studio.console.progress import Progress
from dpo_studio.disk import write_atomically
from dpo_studio.errors import RunError
from dpo_studio.frozen.linear import computes_in_fp8
from dpo_studio.models.fingerprint import weights_fingerprint
from dpo_studio.preferences.pair import Message
from dpo_studio.reading import parse_json, read_text
from dpo_studio.sampling.completion import Completion
from dpo_studio.sampling.generation import generate
from dpo_studio.workflows.loading import LoadedModel

__all__ = ["Speaker"]

_LARGEST = 1 << 30
"""Bytes: 10,000 prompts with eight answers of 4,096 tokens, text and ids, take half of it."""


class Speaker:
    """One side of a comparison: a loaded model that answers prompts, and the folder of its answers."""

    def __init__(self, loaded: LoadedModel, folder: Path, side: str, *, tuned: bool) -> None:
        self.loaded, self.folder, self.side, self.tuned = loaded, folder, side, tuned
        adapter = loaded.adapter if tuned else None
        self._depends_on = {
            "weights": loaded.base.files.fingerprint,
            "adapter": weights_fingerprint(adapter) if adapter is not None else "",
            "reference_of": "" if tuned or loaded.adapter is None else weights_fingerprint(loaded.adapter),
            "dtype": str(loaded.base.model.dtype),
            "attention": loaded.base.model.config._attn_implementation,
            "device": loaded.base.device.type,
            "torch": torch.__version__,
        }
        if computes_in_fp8(loaded.policy):
            self._depends_on["compute"] = "fp8"

    @property
    def fingerprint(self) -> str:
        """What tells the weights that answer from others: the base's, and the adapter's."""
        return f"{self._depends_on['weights']} {self._depends_on['adapter']}".strip()

    def prompt_ids(self, chats: Sequence[Sequence[Message]]) -> list[list[int]]:
        """The prompts as this model reads them."""
        return [self.loaded.base.encoder.prompt_ids(chat) for chat in chats]

    def answers(
        self,
        chats: Sequence[Sequence[Message]],
        *,
        temperature: float,
        sample: int,
        max_new_tokens: int,
        seed: int,
        progress: Progress,
    ) -> list[Completion]:
        """One answer to each chat, from the file of an earlier start if that is complete.

        A file's name has a digest of everything that its answers depend on, so another model, prompt, length or
        precision makes another file.
        """
        prompts = self.prompt_ids(chats)
        asked = {"temperature": temperature, "sample": sample, "max_new_tokens": max_new_tokens, "seed": seed}
        key = json.dumps(self._depends_on | asked | {"prompts": prompts}, sort_keys=True)
        digest = hashlib.sha256(key.encode()).hexdigest()
        file = self.folder / f"{self.side}-t{temperature:g}-s{sample}-{digest[:12]}.jsonl"
        known = _read(file, len(chats))
        encoder = self.loaded.base.encoder
        if known is not None:
            return _of(encoder.vocabulary_digest, known)
        title = f"{self.side}, temperature {temperature:g}" + (f", sample {sample}" if sample else "")
        with progress.task(title, None, "tokens") as advance, self.loaded.tuned(self.tuned):
            found = generate(
                self.loaded.policy,
                prompts,
                encoder.decode,
                eos_ids=encoder.eos_ids,
                pad_id=encoder.pad_id,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                seed=seed,
                sample=sample,
                progress=advance,
            )
        write_atomically(file, "".join(json.dumps(_line(answer)) + "\n" for answer in found))
        return _of(encoder.vocabulary_digest, found)


def _of(vocabulary: str, answers: Sequence[Completion]) -> list[Completion]:
    return [replace(answer, vocabulary=vocabulary) for answer in answers]


def _line(answer: Completion) -> dict[str, Any]:
    """An answer as a file has it: the prompts' ids are in the file's name, so the vocabulary is not in the lines."""
    return answer.shown() | {"ids": answer.ids}


def _read(file: Path, count: int) -> list[Completion] | None:
    """The answers of a file, None if it is missing or damaged."""
    try:
        lines = read_text(file, what="kept answers", limit=_LARGEST, error=RunError).splitlines()
        rows: list[dict[str, Any]] = [parse_json(line, what=file.name, error=RunError) for line in lines]
        found = [Completion(**(row | {"ids": tuple(row["ids"])})) for row in rows]
    except (RunError, TypeError, KeyError):
        return None
    return found if len(found) == count and all(map(_is_whole, found)) else None


def _is_whole(answer: Completion) -> bool:
    """Whether a line of a file, which may have been edited, has all fields of an answer."""
    kinds = isinstance(answer.text, str) and isinstance(answer.ended, bool) and type(answer.tokens) is int
    return kinds and all(type(token) is int for token in answer.ids)
