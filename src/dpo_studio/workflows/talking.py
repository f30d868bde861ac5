"""`dpo generate` and `dpo chat`: sample from a base, a run or an adapter, with the model's own chat template."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from dpo_studio.console.progress import Progress
from dpo_studio.errors import DataError, UsageError
from dpo_studio.frozen.linear import held_dense
from dpo_studio.preferences.pair import Message
from dpo_studio.reading import input_text, parse_json
from dpo_studio.sampling.completion import Completion
from dpo_studio.sampling.generation import generate, stream
from dpo_studio.workflows.loading import LoadedModel, load_any

__all__ = [
    "SHOWN_SAMPLING",
    "Chat",
    "Sampling",
    "answers",
    "check_batched",
    "generate_answers",
    "read_prompts",
]

_LARGEST_PROMPTS = 64 * 2**20
"""Bytes of a file of prompts: a hundred thousand of them, each of a page, take half."""


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled."""

    temperature: float = 0.7
    """0 takes the likeliest token every time."""
    max_new_tokens: int = 256
    top_p: float = 1.0
    """Sample from the likeliest tokens with this share of probability (nucleus); 1 samples from all."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UsageError(f"temperature {self.temperature} is not 0 or more")
        if self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens {self.max_new_tokens} is less than 1")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p {self.top_p} is not above 0 and at most 1")


SHOWN_SAMPLING = Sampling(temperature=0.7, max_new_tokens=160, seed=0)
"""Of the answers of a demo, and of an export's check, so that they can be compared."""


def generate_answers(
    name: str, prompts: Sequence[str], *, sampling: Sampling | None = None, progress: Progress | None = None
) -> list[Completion]:
    """One answer to each prompt from a model, run or adapter folder.

    Raises:
        DPOStudioError: the model cannot be used.
    """
    with progress or Progress(quiet=True) as shown:
        loaded = load_any(name, say=shown.say)
        chats = [[Message("user", prompt)] for prompt in prompts]
        return answers(loaded, chats, sampling or Sampling(), tuned=True, progress=shown)


def answers(
    loaded: LoadedModel,
    chats: Sequence[Sequence[Message]],
    sampling: Sampling,
    *,
    tuned: bool,
    progress: Progress,
    sample: int = 0,
) -> list[Completion]:
    """One answer to each chat from the policy (tuned) or its reference; a function of its arguments alone.

    Another `sample` draws other answers.

    Raises:
        UsageError: `sampling.top_p` is not 1, which only a stream draws by.
    """
    check_batched(sampling)
    encoder = loaded.base.encoder
    prompts = [encoder.prompt_ids(chat) for chat in chats]
    title = "tuned answers" if tuned else "base answers"
    with progress.task(title, None, "tokens") as advance, loaded.tuned(tuned):
        return generate(
            loaded.policy,
            prompts,
            encoder.decode,
            eos_ids=encoder.eos_ids,
            pad_id=encoder.pad_id,
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            seed=sampling.seed,
            sample=sample,
            progress=advance,
        )


def check_batched(sampling: Sampling, samples: int = 1) -> None:
    """Check the options before a model is loaded.

    Raises:
        UsageError: `sampling.top_p` is not 1, which only a stream draws by; or several samples of one answer.
    """
    if samples > 1 and sampling.temperature == 0:
        raise UsageError(
            f"{samples} samples at temperature 0 are {samples} times the same answer", hint="--temperature 1"
        )
    if sampling.top_p != 1:
        raise UsageError(f"top_p {sampling.top_p}: many answers at once are drawn from all tokens", hint="top_p=1")


def read_prompts(file: Path) -> list[str]:
    """Prompts of a file or of stdin (`-`): of a .jsonl each line's text `prompt`, of any other each line not empty.

    Raises:
        DataError: it cannot be read, has no prompt, or a line is not a JSON object with one.
    """
    lines = input_text(file, what="prompts", limit=_LARGEST_PROMPTS).splitlines()
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise DataError(f"{file} has no prompt", hint="one a line, or .jsonl with a text `prompt` in each line")
    if file.suffix != ".jsonl":
        return [line.strip() for _, line in numbered]
    return [_prompt_in(line, f"{file}, line {number}") for number, line in numbered]


def _prompt_in(line: str, where: str) -> str:
    try:
        row: Any = parse_json(line, what=where)
    except DataError:
        row = None
    prompt = row.get("prompt") if isinstance(row, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise DataError(f"{where}: no JSON object with a text `prompt`", hint="a dialogue is asked in `dpo chat`")
    return prompt


def stream_answer(
    loaded: LoadedModel, chat: Sequence[Message], sampling: Sampling, *, tuned: bool = True
) -> Generator[str, None, bool]:
    """The answer to a chat, piece by piece as it is sampled; returns whether the model ended its turn itself."""
    encoder = loaded.base.encoder
    with loaded.tuned(tuned), held_dense(loaded.policy):
        return (
            yield from stream(
                loaded.policy,
                encoder.prompt_ids(chat),
                encoder.decode,
                eos_ids=encoder.eos_ids,
                max_new_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                seed=sampling.seed,
            )
        )


@dataclass
class Chat:
    """A conversation of several turns with one loaded model; `tuned` switches between policy and reference."""

    loaded: LoadedModel
    sampling: Sampling = field(default_factory=Sampling)
    system: str | None = None
    tuned: bool = True
    cut: bool = False
    """Whether the last complete answer stopped at `max_new_tokens` instead of an end of turn."""
    turns: list[Message] = field(default_factory=list)
    _turn: count[int] = field(default_factory=count)

    def say(self, text: str) -> Generator[str, None, None]:
        """Answer one more user turn; the turn is remembered once its answer is complete."""
        system = [Message("system", self.system)] if self.system else []
        asked = Message("user", text)
        seed = self.sampling.seed + next(self._turn)
        sampling = Sampling(self.sampling.temperature, self.sampling.max_new_tokens, self.sampling.top_p, seed)
        pieces: list[str] = []
        self.cut = not (
            yield from _noting(
                stream_answer(self.loaded, [*system, *self.turns, asked], sampling, tuned=self.tuned), pieces
            )
        )
        self.turns += [asked, Message("assistant", "".join(pieces))]


def _noting(pieces: Generator[str, None, bool], noted: list[str]) -> Generator[str, None, bool]:
    while True:
        try:
            piece = next(pieces)
        except StopIteration as end:
            return bool(end.value)
        noted.append(piece)
        yield piece
