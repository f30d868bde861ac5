"""A forecast of a training before weights are loaded: its tokens, and the time of their matrix products here.

A training takes longer than its products; on a machine that is busy now, the forecast is too high.
"""

from __future__ import annotations

import time

import torch

from dpo_studio.config import Recipe
from dpo_studio.console.text import duration
from dpo_studio.models.folder import ModelFolder
from dpo_studio.models.load import choose_dtype
from dpo_studio.sizes import Shapes
from dpo_studio.tokens.pack import Steps, tokens_in

__all__ = ["forecast"]

_FORWARD, _BACKWARD = 2, 2
"""Operations a weight and a token take: forward, and backward for the activations alone, as the base is frozen."""
_LOOKED_UP = ("embed", "wte", "wpe", "lm_head")
"""Weights that are looked up, not multiplied; the head only at answers: a lower bound leaves it out."""
_SIZE = 1024


def forecast(recipe: Recipe, folder: ModelFolder, steps: Steps, taken: int) -> str:
    """`123,456 tokens an epoch, 370,368 in all; ... 12 min`; all `steps` together train on `taken` pairs.

    `folder` is the base's.
    """
    epoch = sum(tokens_in(steps.layout, pair) for pair in steps.pairs)
    total = round(epoch * taken / len(steps.pairs))
    counted = "a prompt counted once a pair" if steps.layout == "packed" else "a prompt counted once an answer, padded"
    said = f"{epoch:,} tokens an epoch ({counted}), {total:,} in all"
    if folder.quantization is not None:  # its tensors do not have the layers' shapes
        return said
    weights = _multiplied(folder.shapes)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype, _ = choose_dtype(recipe.model.dtype, device)
    operations = weights * ((_FORWARD + _BACKWARD) * total + _FORWARD * epoch * recipe.objective.needs_reference)
    seconds = operations / _speed(dtype, device)
    precision = str(dtype).removeprefix("torch.")
    return f"{said}; their matrix products alone take {duration(seconds)} at the speed here and now ({precision})"


def _multiplied(shapes: Shapes) -> int:
    """How many weights every token is multiplied by.

    A token uses only some of the experts: none is counted.
    """
    multiplied = (
        shape for name, (_, shape) in shapes.items() if not any(word in name for word in (*_LOOKED_UP, "experts"))
    )
    return sum(shape[0] * shape[1] for shape in multiplied if len(shape) == 2)


def _speed(dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second in the best of ten products of two matrices; a multiplication and an addition are two."""
    size = _SIZE if device.type == "cpu" else 8 * _SIZE
    left, right = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        started = time.perf_counter()
        product = left @ right
        product[0, 0].item()  # waits for a GPU
        best = min(best, time.perf_counter() - started)
    return float(2 * size**3 / best)
