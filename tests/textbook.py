"""What a log-prob and a gradient are, written down as plainly as can be: the oracle of the fast ways."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dpo_studio.objectives import PairLogps
from dpo_studio.tokens.encode import EncodedPair

__all__ = ["columns", "gradients", "plain_logps"]


def plain_logps(model: Any, pairs: Sequence[EncodedPair]) -> Tensor:
    """The textbook: every answer behind its prompt, one sequence at a time, through the model's own logits, (P, 2)."""
    sums = []
    for pair in pairs:
        for answer in (pair.chosen, pair.rejected):
            ids = torch.tensor([*pair.prompt.tolist(), *answer.ids.tolist()], device=model.device)
            logps = model(input_ids=ids[None]).logits[0].float().log_softmax(-1)
            places = [len(pair.prompt) + place for place in range(len(answer.ids)) if answer.scored[place]]
            sums.append(sum((logps[place - 1, ids[place]] for place in places), torch.zeros((), device=ids.device)))
    return torch.stack(sums).view(-1, 2)


def columns(logps: PairLogps) -> Tensor:
    """Both answers' log-probs, (P, 2)."""
    return torch.stack([logps.chosen_P, logps.rejected_P], 1)


def gradients(model: Any, value: Tensor) -> dict[str, Tensor]:
    """Of `value` in every trainable tensor; the model is left without any."""
    torch.autograd.backward(value)
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad(set_to_none=True)
    return found
