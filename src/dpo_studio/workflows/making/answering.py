"""The answers of a model of this machine to many prompts, a part at a time, each kept before the next is begun."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from dpo_studio.console.progress import Progress
from dpo_studio.preferences.turns import Turns
from dpo_studio.sampling.completion import Completion
from dpo_studio.tokens.chat import ChatEncoder, PairError
from dpo_studio.workflows.evaluating.completions import Speaker
from dpo_studio.workflows.loading import LoadedModel, load_any
from dpo_studio.workflows.making.work import Work
from dpo_studio.workflows.talking import Sampling

__all__ = ["local_answers"]

PROMPTS_AT_ONCE = 128
"""Prompts whose answers are drawn and kept together: a batch of `sampling.generation`. Part of what answers depend on
in bf16, so the same on every machine."""
_QUIET = Progress(quiet=True)


@dataclass(frozen=True)
class Written:
    """What one model wrote."""

    answers: dict[str, list[Completion | str]]
    """By prompt key: its samples, each an answer or why there is none."""
    fingerprint: str
    """What tells its weights from others."""
    encoder: ChatEncoder


def local_answers(
    name: str,
    prompts: Mapping[str, Turns],
    samples: int,
    sampling: Sampling,
    work: Work,
    progress: Progress,
) -> Written:
    """`samples` answers to each prompt, by its key, from a model, a run or an adapter folder; the run's policy answers.

    Prompts of like length are answered together. What is kept in `work` is not drawn again.

    Raises:
        ModelError, RunError: the model cannot be used.
    """
    loaded = load_any(name, dtype=work.dtype_of(name), today=work.today, say=progress.say)
    work.keep_dtype(name, str(loaded.base.model.dtype).removeprefix("torch."))
    try:
        return _answers(loaded, name, prompts, samples, sampling, work.folder, progress)
    finally:
        del loaded
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _answers(
    loaded: LoadedModel,
    name: str,
    prompts: Mapping[str, Turns],
    samples: int,
    sampling: Sampling,
    work: Path,
    progress: Progress,
) -> Written:
    encoder = loaded.base.encoder
    speaker = Speaker(loaded, work, "answers", tuned=True)
    found: dict[str, list[Completion | str]] = {key: [] for key in prompts}
    lengths: dict[str, int] = {}
    for key, turns in prompts.items():
        length = _length(encoder, turns, sampling.max_new_tokens, _longest(loaded))
        if isinstance(length, str):
            found[key] = [length] * samples
        else:
            lengths[key] = length
    order = sorted(lengths, key=lambda key: (lengths[key], key))
    parts = [order[start : start + PROMPTS_AT_ONCE] for start in range(0, len(order), PROMPTS_AT_ONCE)]
    with progress.task(f"answers of {name}", samples * len(order), "answers") as advance:
        for part in parts:
            for sample in range(samples):
                drawn = speaker.answers(
                    [prompts[key] for key in part],
                    temperature=sampling.temperature,
                    sample=sample,
                    max_new_tokens=sampling.max_new_tokens,
                    seed=sampling.seed,
                    progress=_QUIET,
                )
                for key, answer in zip(part, drawn, strict=True):
                    found[key].append(answer)
                advance(len(part))
    return Written(found, speaker.fingerprint, encoder)


def _length(encoder: ChatEncoder, turns: Turns, new_tokens: int, longest: int | None) -> int | str:
    """The prompt's tokens, or why the model cannot answer it."""
    try:
        length = len(encoder.prompt_ids(turns))
    except PairError as refused:
        return f"a prompt that its template refuses: {refused.kind}"
    if longest is not None and length + new_tokens > longest:
        return f"a prompt too long for its {longest} positions"
    return length


def _longest(loaded: LoadedModel) -> int | None:
    """The positions that the model has, where its config says so."""
    config = loaded.base.model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None)
    return longest if isinstance(longest, int) and longest > 0 else None
