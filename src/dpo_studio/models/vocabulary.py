"""Whether a model has an embedding for every token that its tokenizer and chat template can make."""

from __future__ import annotations

from transformers import PreTrainedConfig

from dpo_studio.errors import ModelError
from dpo_studio.sizes import Shapes
from dpo_studio.tokens.chat import ChatEncoder

__all__ = ["check_vocabulary"]

_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight", "embeddings.weight")
"""How the names of input embeddings end, in the families that transformers has."""


def check_vocabulary(config: PreTrainedConfig, shapes: Shapes | None, encoder: ChatEncoder, name: str) -> None:
    """See that every id has a row in the embedding, which may have more: many are padded.

    `config` is the text model's; `shapes` those of its weights, None where they are not there to be looked at.

    Raises:
        ModelError: an id has none. A GPU would end the process over it, a CPU with an IndexError.
    """
    rows = min(filter(None, (getattr(config, "vocab_size", None), _rows(shapes or {}))), default=None)
    largest = encoder.largest_id
    if rows is not None and largest >= rows:
        token = next(text for text, number in encoder.vocabulary().items() if number == largest)
        raise ModelError(
            f"{name}: its tokenizer and chat template make token ids up to {largest} ({token!r}), and its embedding "
            f"has {rows} rows, for ids up to {rows - 1}",
            hint="use the tokenizer that these weights were saved with, or enlarge the embedding first "
            "(resize_token_embeddings in transformers) and train those rows: new ones are random",
        )


def _rows(shapes: Shapes) -> int | None:
    """Of the input embedding; None where no tensor has a name that is known."""
    return max((shape[0] for key, (_, shape) in shapes.items() if shape and key.endswith(_EMBEDDINGS)), default=None)
