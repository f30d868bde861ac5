"""The policy's answers to the same prompts as training goes: what changes, in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dpo_studio.config import Recipe
from dpo_studio.console.progress import Progress
from dpo_studio.errors import UsageError
from dpo_studio.learning.memory import unless_out_of_memory
from dpo_studio.models.layers import plain_layers
from dpo_studio.policy.policy import Policy
from dpo_studio.preferences.pair import Message, Pair
from dpo_studio.runs.folder import RunFolder
from dpo_studio.sampling.completion import Completion
from dpo_studio.sampling.generation import generate
from dpo_studio.tokens.chat import ChatEncoder
from dpo_studio.workflows.talking import read_prompts

__all__ = ["Samples", "sample_chats"]

_MOST = 1000
_NEW_TOKENS = 160


def sample_chats(recipe: Recipe, pairs: Sequence[Pair]) -> list[tuple[Message, ...]]:
    """The chats of `run.sample_prompts`: a file's prompts, or the first different prompts of `pairs`.

    Raises:
        DataError, UsageError: the file has no prompts, or more than a thousand.
    """
    wanted = recipe.run.sample_prompts
    if wanted is None:
        return []
    if isinstance(wanted, int):
        return list(dict.fromkeys(pair.prompt for pair in pairs))[:wanted]
    prompts = read_prompts(Path(wanted))
    if len(prompts) > _MOST:
        raise UsageError(f"run.sample_prompts: {wanted} has {len(prompts):,} prompts", hint=f"{_MOST:,} at most")
    return [(Message("user", prompt),) for prompt in prompts]


@dataclass(frozen=True)
class Samples:
    """Writes greedy answers to samples.jsonl. No random state is touched: the adapter is the same with and without."""

    policy: Policy
    encoder: ChatEncoder
    chats: Sequence[Sequence[Message]]
    every: int
    run: RunFolder
    progress: Progress

    def is_due(self, step: int, *, evaluated: bool) -> bool:
        """Whether to answer after this step: `training.sample_every`, or with every evaluation."""
        return bool(self.chats) and (step % self.every == 0 if self.every else evaluated)

    def write(self, step: int) -> None:
        """Answer all prompts; where memory runs out, say so and go on training."""
        if not self.run.writes:
            return
        prompts = [self.encoder.prompt_ids(chat) for chat in self.chats]
        with self.progress.task("sample answers", None, "tokens") as advance, plain_layers(self.policy.model):
            ask = partial(
                generate,
                self.policy.model,
                prompts,
                self.encoder.decode,
                eos_ids=self.encoder.eos_ids,
                pad_id=self.encoder.pad_id,
                max_new_tokens=_NEW_TOKENS,
                temperature=0.0,
                seed=0,
                progress=advance,
            )
            answers = unless_out_of_memory(self.policy.model, ask)
        if answers is None:
            self.progress.warn(f"step {step}: no memory for the answers to run.sample_prompts; they are left out")
        for chat, answer in zip(self.chats, answers or (), strict=False):
            self.run.append(RunFolder.SAMPLES, _line(step, chat, answer))


def _line(step: int, chat: Sequence[Message], answer: Completion) -> dict[str, Any]:
    turns = [{"role": message.role, "content": message.content} for message in chat]
    return {"step": step, "prompt": turns, "answer": answer.text, "ended": answer.ended}
