"""Sampling from models with a cache of their own: layers with a state, chunks, indexed tokens.

Their caches cannot be cut and closed up as keys and values are, so a sequence is written by itself: nothing is filled
up, and nothing has a neighbour. Some ignore the cache that they are given (MiniMax wants one of its own kind) or fail
with it, so the first two tokens from it are compared with those from the whole sequence; where they differ, every
token is computed from the whole sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from dpo_studio.models.layers import causal_lm
from dpo_studio.models.layouts import layout_of

__all__ = ["keeps_own_cache", "steps_of_one"]

_PLAIN = frozenset({"full_attention", "sliding_attention"})
_NAMES = ("cache", "past_key_values", "cache_params")
"""What forward calls its cache: transformers 5.24 all of them by the first name, 5.17 by the others."""
_ALIKE = {torch.float32: 0.01}
_ALIKE_IN_16_BITS = 0.1
"""Total variation of the next token's distribution, with the cache and without: a state that is ignored moves all."""


def keeps_own_cache(model: nn.Module) -> bool:
    """Whether the model's cache is more than keys and values of every token."""
    config: Any = getattr(causal_lm(model), "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return layout_of(model) != "packed" or bool(set(getattr(text, "layer_types", None) or ()) - _PLAIN)


def steps_of_one(
    model: nn.Module,
    prompt: Sequence[int],
    uniforms: Sequence[float],
    choose: Callable[[Tensor, Tensor], Tensor],
    eos_ids: Collection[int],
) -> Iterator[tuple[list[int], list[int]]]:
    """A token a step, as `([0], [token])`, to the end of turn or of `uniforms`. The model must be in eval."""
    device = next(model.parameters()).device
    whole_1W = torch.tensor([list(prompt)], device=device)
    cache = DynamicCache(config=causal_lm(model).config.get_text_config())
    works = True
    for step, uniform in enumerate(uniforms):
        with torch.inference_mode():
            new_1W = whole_1W if step == 0 else whole_1W[:, -1:]
            cached_1V = _from_cache(model, new_1W, whole_1W.shape[1], cache) if works else None
            if step in (1, 2) or cached_1V is None:
                exact_1V = _logits(model, whole_1W, use_cache=False)
                works = cached_1V is not None and _are_alike(cached_1V, exact_1V)
            logits_1V = cached_1V if works and cached_1V is not None else exact_1V
            chosen_1 = choose(logits_1V, torch.tensor([uniform], device=device, dtype=torch.float64))
        token = int(chosen_1.item())
        yield [0], [token]
        if token in eos_ids:
            return
        whole_1W = torch.cat([whole_1W, chosen_1[:, None]], 1)


def _from_cache(model: nn.Module, ids_1W: Tensor, length: int, cache: DynamicCache) -> Tensor | None:
    """The next token's logits, (1, V), from the cache and the tokens that are not in it; None where it fails."""
    takes = signature(causal_lm(model).forward).parameters
    position_1W = torch.arange(length, device=ids_1W.device)[None, -ids_1W.shape[1] :]
    given = {"position_ids": position_1W} if "position_ids" in takes else {}  # no mask: Mamba's state takes it amiss
    name = next(name for name in _NAMES if name in takes)
    try:
        return _logits(model, ids_1W, use_cache=True, **given, **{name: cache})
    except ValueError:  # transformers 5.24: no length can be told of a cache without attention layers
        return None


def _logits(model: nn.Module, ids_1W: Tensor, **given: Any) -> Tensor:
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in signature(causal_lm(model).forward).parameters else {}
    logits_1V: Tensor = model(input_ids=ids_1W, **last_only, **given).logits[:, -1]
    return logits_1V


def _are_alike(one_1V: Tensor, other_1V: Tensor) -> bool:
    apart = (one_1V.float().softmax(-1) - other_1V.float().softmax(-1)).abs().sum() / 2
    return bool(apart < _ALIKE.get(one_1V.dtype, _ALIKE_IN_16_BITS))
