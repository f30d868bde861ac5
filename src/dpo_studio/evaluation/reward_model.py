"""A reward model as the judge: any sequence classifier of transformers; its number for a chat is the answer's reward.

The chat is written by the model's own template, to its last token, for that is what such models are trained on; a
tokenizer without a template (most encoders) gets question and answer as its two texts. Each answer is read once, so
there is no order to be biased by.

Shapes: B = answers read at once, W = tokens of the longest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from dpo_studio.config import ModelSection
from dpo_studio.errors import ModelError
from dpo_studio.evaluation.judges import (
    Comparison,
    Progress,
    Verdict,
    as_text,
    check_some_finite,
    higher_wins,
    not_judged,
)
from dpo_studio.models.folder import open_model
from dpo_studio.models.load import choose_dtype, load_weights, put_on_gpu
from dpo_studio.models.tokenizer_settings import read_tokenizer
from dpo_studio.preferences.pair import Message
from dpo_studio.sampling.completion import Completion
from dpo_studio.tokens.chat import ChatEncoder, PairError

__all__ = ["RewardModel", "load_reward_model"]

_TOKENS_AT_ONCE = {"cpu": 4096, "cuda": 32768}
"""Padding included; a longer answer goes alone."""

Chats = Sequence[tuple[Message, ...]]


@dataclass(frozen=True)
class Encoded:
    """A chat as the model reads it."""

    ids: list[int]
    types: list[int] | None = None
    """Which of an encoder's two texts each token belongs to."""


@dataclass(frozen=True)
class RewardModel:
    """A loaded sequence classifier. With two labels the reward is the log-odds of the second."""

    typed: str
    """What its user called it."""
    model: PreTrainedModel
    encode: Callable[[Chats], list[Encoded | PairError]] = field(repr=False)
    """Whole chats, the answer their last turn, to ids; or why not."""
    longest: int
    """Tokens it can read."""
    fingerprint: str = ""
    """What tells its weights from others."""

    @property
    def name(self) -> str:
        """For tables."""
        return f"reward:{self.typed}"

    @property
    def description(self) -> str:
        """For the report."""
        second = self.model.config.id2label[1] if self.model.config.num_labels == 2 else None
        number = "its number for the whole chat" if second is None else f"the log-odds it gives {second}"
        return f"The reward model {self.typed}: the answer with the higher reward wins, {number}; equal rewards tie."

    def judge_all(self, comparisons: Sequence[Comparison], progress: Progress | None = None) -> list[Verdict]:
        """A verdict on each comparison, in order; where an answer is too long for the model it is a tie.

        `progress` hears of comparisons as their answers are read, each of which counts one half.
        """
        if not comparisons:
            return []
        chats = list(
            dict.fromkeys(
                (*pair.prompt, Message("assistant", answer.text)) for pair in comparisons for answer in (pair.a, pair.b)
            )
        )
        rewards = dict(zip(chats, self._rewards(chats, len(comparisons), progress), strict=True))
        return [
            _verdict(*(rewards[*pair.prompt, Message("assistant", answer.text)] for answer in (pair.a, pair.b)))
            for pair in comparisons
        ]

    def score_all(
        self, answers: Sequence[tuple[Sequence[Message], Completion]], progress: Progress | None = None
    ) -> list[float | None]:
        """The reward of each (prompt, answer); None where it is too long, cannot be rendered, or is not finite."""
        if not answers:
            return []
        chats = [(*prompt, Message("assistant", answer.text)) for prompt, answer in answers]
        rewards = self._rewards(chats, len(chats), progress)
        return [reward if isinstance(reward, float) and math.isfinite(reward) else None for reward in rewards]

    def _rewards(self, chats: Chats, total: int, progress: Progress | None) -> list[float | str]:
        """The reward of each chat, or why it has none. `progress` receives shares of `total` as chats are read."""
        encoded = self.encode(chats)
        rewards: list[float | str] = ["" for _ in chats]
        readable = []
        for place, its in enumerate(encoded):
            if isinstance(its, PairError):
                rewards[place] = f"the reward model cannot read an answer ({its.message})"
            elif len(its.ids) > self.longest:
                rewards[place] = f"an answer is too long for the reward model, which reads {self.longest} tokens"
            else:
                readable.append((place, its))
        read, reported = len(chats) - len(readable), 0
        for batch in _batches(readable, _TOKENS_AT_ONCE[self.model.device.type]):
            for (place, _), reward in zip(batch, self._read([its for _, its in batch]).tolist(), strict=True):
                rewards[place] = reward
            read += len(batch)
            if progress is not None:
                progress(total * read // len(chats) - reported)
                reported = total * read // len(chats)
        if progress is not None:
            progress(total - reported)
        check_some_finite([reward for reward in rewards if isinstance(reward, float)], self.name)
        return rewards

    @torch.no_grad()
    def _read(self, chats: Sequence[Encoded]) -> Tensor:
        """Rewards of chats padded on the right, fp32, (B,).

        A decoder is read at its last token that is not its padding token. One without a padding token is lent a token
        that none of the chats holds, so that it is read where it would be on its own.
        """
        config = self.model.config.get_text_config()
        own = config.pad_token_id
        pad = own if own is not None else _absent([chat.ids for chat in chats], config.vocab_size)
        inputs = {
            "input_ids": self._padded([chat.ids for chat in chats], pad),
            "attention_mask": self._padded([[1] * len(chat.ids) for chat in chats], 0),
        }
        if types := [chat.types for chat in chats if chat.types is not None]:
            inputs["token_type_ids"] = self._padded(types, 0)
        config.pad_token_id = pad
        try:
            logits_BL: Tensor = self.model(**inputs).logits.float()
        finally:
            config.pad_token_id = own
        return logits_BL[:, 0] if logits_BL.shape[1] == 1 else logits_BL[:, 1] - logits_BL[:, 0]

    def _padded(self, rows: Sequence[list[int]], fill: int) -> Tensor:
        """Rows of one length, (B, W)."""
        width = max(map(len, rows))
        return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], device=self.model.device)


def load_reward_model(name: str, *, dtype: str = "auto", say: Callable[[str], None] = lambda _: None) -> RewardModel:
    """Load a folder or Hub id: safetensors only, no code of its own, every tensor there.

    Raises:
        ModelError: not found, unsafe, or no classifier with one label or two.
    """
    folder = open_model(name, None, say)
    folder.check_files()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen, _ = choose_dtype(dtype, device)
    model = load_weights(AutoModelForSequenceClassification, folder, chosen, None).eval()
    with put_on_gpu(model.get_memory_footprint(), name):
        model = model.to(device)
    if model.config.num_labels > 2:
        raise ModelError(
            f"{name} has {model.config.num_labels} labels, and none of them is the reward",
            hint="a reward model has one label, or two whose second is the good one",
        )
    tokenizer = read_tokenizer(folder.path, name)
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 10**9
    if tokenizer.chat_template:
        encoder = folder.encoder(ModelSection(path=name))
        return RewardModel(name, model, lambda chats: _one_chat(encoder, chats), longest, folder.fingerprint)
    longest = min(longest, tokenizer.model_max_length)  # RoBERTa counts its positions from 2
    return RewardModel(name, model, lambda chats: _two_texts(tokenizer, chats), longest, folder.fingerprint)


def _one_chat(encoder: ChatEncoder, chats: Chats) -> list[Encoded | PairError]:
    return [ids if isinstance(ids, PairError) else Encoded(ids) for ids in encoder.chat_ids(chats)]


def _two_texts(tokenizer: Any, chats: Chats) -> list[Encoded | PairError]:
    """Question and answer as an encoder's two texts."""
    questions, answers = [as_text(chat[:-1]) for chat in chats], [chat[-1].content for chat in chats]
    encoded = tokenizer(questions, answers, truncation=False, verbose=False)
    types = encoded.get("token_type_ids", [None] * len(chats))
    return [Encoded(ids, its) for ids, its in zip(encoded["input_ids"], types, strict=True)]


def _batches(chats: Sequence[tuple[int, Encoded]], tokens: int) -> list[list[tuple[int, Encoded]]]:
    """Chats of like length together, the longest first."""
    batches: list[list[tuple[int, Encoded]]] = []
    for chat in sorted(chats, key=lambda chat: -len(chat[1].ids)):
        if batches and len(batches[-1][0][1].ids) * (len(batches[-1]) + 1) <= tokens:
            batches[-1].append(chat)
        else:
            batches.append([chat])
    return batches


def _absent(ids: Sequence[list[int]], vocabulary: int) -> int:
    """A token that none of the chats contains; 0 for a single chat that contains all tokens."""
    used = set().union(*ids)
    return next((token for token in range(vocabulary) if token not in used), 0)


def _verdict(a: float | str, b: float | str) -> Verdict:
    if isinstance(a, str) or isinstance(b, str):
        return not_judged(a if isinstance(a, str) else str(b))
    return higher_wins(a, b, f"The reward of A is {a:.3g}, that of B {b:.3g}.")
