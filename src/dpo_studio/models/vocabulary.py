"""Whether a model has an embedding for every token that its tokenizer and chat template can make."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dpo_studio.errors import ModelError
from dpo_studio.models.scan import weights_of
from dpo_studio.tokens.chat import ChatEncoder

__all__ = ["check_vocabulary"]

_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight", "embeddings.weight")
"""How the names of input embeddings end, in the families that transformers has."""


def check_vocabulary(folder: Path, config: Any, encoder: ChatEncoder, name: str) -> None:
    """See that every id has a row in the embedding, which may have more: many are padded.

    `config` is the text model's.

    Raises:
        ModelError: an id has none. A GPU would end the process over it, a CPU with an IndexError.
    """
    rows = min(filter(None, (getattr(config, "vocab_size", None), _rows(folder, name))), default=None)
    largest = encoder.largest_id
    if rows is not None and largest >= rows:
        token = next(text for text, number in encoder.vocabulary().items() if number == largest)
        raise ModelError(
            f"{name}: its tokenizer and chat template make token ids up to {largest} ({token!r}), and its embedding "
            f"has {rows} rows, for ids up to {rows - 1}",
            hint="use the tokenizer that these weights were saved with, or enlarge the embedding first "
            "(resize_token_embeddings in transformers) and train those rows: new ones are random",
        )


def _rows(folder: Path, name: str) -> int | None:
    """Of the input embedding, by the headers of the weights; None where no tensor has a name that is known."""
    found = []
    for file in weights_of(folder, name):
        with suppress(SafetensorError, OSError), safe_open(file, framework="pt") as tensors:  # damaged: told on loading
            keys = [key for key in tensors.keys() if key.endswith(_EMBEDDINGS)]  # noqa: SIM118 - safe_open is no dict
            found += [tensors.get_slice(key).get_shape()[0] for key in keys]
    return max(found, default=None)
