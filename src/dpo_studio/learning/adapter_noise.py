"""Noise in the adapter: a fresh one has B = 0, which would hide whatever is wrong with it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from dpo_studio.frozen.linear import FrozenLinear

__all__ = ["noisy_adapters"]

_SIZE = 0.1
"""Of the change B A makes to a weight, relative to the weight (Frobenius norms)."""
_ROWS = 64
"""Rows of a weight from which its size is estimated: packed ones have to be dequantised."""


@contextmanager
def noisy_adapters(model: nn.Module, *, seed: int = 0, only: Collection[str] | None = None) -> Iterator[None]:
    """Inside, seeded noise is added to every B of every adapter, or of those in `only`; afterwards B is restored, to
    the bit.

    The tensors keep their place in memory, and no other random state is touched.
    """
    draw = torch.Generator().manual_seed(seed)
    kept: list[tuple[Tensor, Tensor]] = []
    try:
        for module in model.modules():
            if isinstance(module, LoraLayer):
                for name, up in module.lora_B.items():
                    if only is not None and name not in only:
                        continue
                    weight = up.weight.data
                    noise = torch.randn(weight.shape, generator=draw) * _size_of(module, name)
                    kept.append((weight, weight.clone()))
                    weight.add_(noise.to(weight))
        yield
    finally:
        for weight, before in kept:
            weight.copy_(before)


def _size_of(module: LoraLayer, name: str) -> float:
    """What B's entries must measure for scale x B A to be `_SIZE` of the weight: its entries measure
    scale x sqrt(rank) x rms(A) times B's."""
    down = _rms(module.lora_A[name].weight.data)
    if down == 0:
        return 0.0
    return float(_SIZE * _rms(_some_rows(module)) / (module.scaling[name] * module.r[name] ** 0.5 * down))


def _some_rows(module: LoraLayer) -> Tensor:
    base = module.get_base_layer()
    if isinstance(base, FrozenLinear):
        return base.kept.rows(_ROWS).exact(torch.float32)
    weight: Tensor = module.get_param() if hasattr(module, "get_param") else base.weight
    return weight.detach()[:_ROWS]


def _rms(x: Tensor) -> float:
    return x.float().square().mean().sqrt().item()
