"""The check of `rows` and `apart` before the first step: a sequence's log-probs depend on nothing beside it.

In those layouts the model's own forward reads sequences side by side, filled up at their ends. That is right if it is
causal and each sequence by itself: no later token, no other sequence, no padding and no order may move a number. A
mixture that drops tokens by capacity, or a layer that normalises over the batch, would. What the plain model computes
(`learning.packing_check`) cannot show it: there every sequence is alone.

Shapes: N = scored tokens of a pair, both answers', the chosen one's first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dpo_studio.errors import ModelError
from dpo_studio.learning.logprobs import token_logps
from dpo_studio.models.adapters import in_eval
from dpo_studio.models.layers import causal_lm
from dpo_studio.models.layouts import layout_of
from dpo_studio.tokens.encode import EncodedAnswer, EncodedPair
from dpo_studio.tokens.pack import lay_out

__all__ = ["check_neighbours"]

_LAST = 8
"""Tokens at a neighbour's end that are changed."""
_MOST_TOKENS = 2048
"""Of a pair that is looked at: longer ones are cut."""


def check_neighbours(model: nn.Module, pairs: Sequence[EncodedPair], explained: float) -> float:
    """Compute the shortest pair with different neighbours, twice and with a later token changed; return the largest
    mean difference a token, in nats. A pack's mask is checked otherwise, and nothing is computed for it.

    `explained`: the difference in nats a token that the model's precision explains.

    Raises:
        ModelError: the pair's log-probs depend on something that they must not see.
    """
    layout = layout_of(model)
    if layout == "packed":
        return 0.0
    looked_at = _cut(min(pairs, key=lambda pair: len(pair.prompt) + len(pair.chosen.ids) + len(pair.rejected.ids)))
    # of the same lengths, and a tenth longer: so that they are in one table
    neighbour = _map(looked_at, _others)
    longer = _map(neighbour, lambda ids: np.concatenate([ids, np.resize(ids, 1 + len(ids) // 10)]))
    cases = {
        "the same batch is computed twice": [looked_at, neighbour],
        f"the last {_LAST} tokens of another answer in the batch are others": [looked_at, _map(neighbour, _other_end)],
        "the batch's other sequences are longer, and it has more padding": [looked_at, longer],
        "the batch has more sequences": [looked_at, neighbour, longer, neighbour.swap()],
        "the batch is in another order": [neighbour, looked_at],
    }
    with torch.no_grad(), in_eval(model):
        right_N = _logps(model, [looked_at, neighbour], 0)
        found = {
            case: (_logps(model, batch, batch.index(looked_at)) - right_N).abs().mean().item()
            for case, batch in cases.items()
        }
        found["a later token is another"] = _seen_ahead(model, looked_at, right_N)
    for case, difference in found.items():
        if not difference <= explained:
            raise ModelError(
                f"log-probs of {causal_lm(model).config.model_type} change by {difference:.3g} nats a token where "
                f"{case} (layout {layout}, row {looked_at.row}), where this precision explains {explained:.2g}: "
                "no layout makes it right",
                hint="please report the model",
            )
    return max(found.values())


def _logps(model: nn.Module, pairs: Sequence[EncodedPair], place: int) -> Tensor:
    """(N,) of the pair at `place`."""
    batch = lay_out(layout_of(model), pairs)
    by_answer = torch.split(token_logps(model, batch.to(causal_lm(model).device)).cpu(), batch.tokens_A.tolist())
    return torch.cat(by_answer[2 * place : 2 * place + 2])


def _seen_ahead(model: nn.Module, pair: EncodedPair, right_N: Tensor) -> float:
    """How far the log-probs before a chosen answer's middle move when all from there on is changed."""
    ids, scored = pair.chosen.ids.copy(), pair.chosen.scored
    middle = (len(ids) - 1) // 2
    ids[middle:-1] = _others(ids[middle:-1])
    before = int(scored[:middle].sum())
    changed_N = _logps(model, [replace(pair, chosen=EncodedAnswer(ids, scored))], 0)
    return (changed_N - right_N)[:before].abs().mean().item() if before else 0.0


def _map(pair: EncodedPair, change: Callable[[NDArray[np.int32]], NDArray[np.int32]]) -> EncodedPair:
    """The pair with changed answers, whose tokens are all scored, and prompt."""

    def changed(answer: EncodedAnswer) -> EncodedAnswer:
        ids = change(answer.ids)
        return EncodedAnswer(ids, np.ones(len(ids), bool))

    return replace(pair, prompt=change(pair.prompt), chosen=changed(pair.chosen), rejected=changed(pair.rejected))


def _others(ids: NDArray[np.int32]) -> NDArray[np.int32]:
    """Ids that differ everywhere, of those that the model knows."""
    return np.where(ids > 0, ids - 1, ids + 1).astype(np.int32)


def _other_end(ids: NDArray[np.int32]) -> NDArray[np.int32]:
    return np.concatenate([ids[:-_LAST], _others(ids[-_LAST:])])


def _cut(pair: EncodedPair) -> EncodedPair:
    """The end of its prompt and the starts of its answers."""

    def start(answer: EncodedAnswer) -> EncodedAnswer:
        return EncodedAnswer(answer.ids[: _MOST_TOKENS // 2], answer.scored[: _MOST_TOKENS // 2])

    prompt = pair.prompt[-_MOST_TOKENS // 2 :]
    return replace(pair, prompt=prompt, chosen=start(pair.chosen), rejected=start(pair.rejected))
