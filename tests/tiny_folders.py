"""Model folders for tests that need more than random words: one whose answers end soon, and a reward model."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForSequenceClassification

from tests.tiny_models import tiny_folder, tiny_model
from tests.tiny_tokenizers import tiny_tokenizer

__all__ = ["ending_folder", "reward_folder"]

_ENDS = 24
"""Tokens of some 400 that end an answer: one in twenty does."""


def ending_folder(folder: Path, *, seed: int = 0) -> Path:
    """A tiny Llama of which many tokens are an end of turn, so that most of its answers end within some twenty."""
    tiny_folder(folder, seed=seed)
    settings = GenerationConfig.from_pretrained(folder)
    settings.eos_token_id = [*settings.eos_token_id, *range(100, 100 + _ENDS)]
    settings.save_pretrained(folder)
    return folder


def reward_folder(folder: Path) -> Path:
    """A tiny classifier with one label."""
    torch.manual_seed(1)
    config = LlamaConfig(**(tiny_model().config.to_dict() | {"num_labels": 1}))
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tiny_tokenizer("chatml").save_pretrained(folder)
    return folder
