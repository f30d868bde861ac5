"""Noise in the adapter: a fresh one has B = 0, which would hide whatever is wrong with it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from dpo_studio.frozen.linear import FrozenLinear
from dpo_studio.models.sharding import local
from dpo_studio.models.trained_modules import TrainedModule

__all__ = ["noisy_adapters"]

_SIZE = 0.1
"""Of the change B A makes to a weight, relative to the weight (Frobenius norms)."""
_ROWS = 64
"""Rows of a weight from which its size is estimated: packed ones have to be dequantised."""


@contextmanager
def noisy_adapters(model: nn.Module, *, seed: int = 0, only: Collection[str] | None = None) -> Iterator[None]:
    """Inside, seeded noise is added to every B of every adapter, or of those in `only`, to its magnitudes, and to what
    is trained whole; afterwards all is restored, to the bit.

    The tensors keep their place in memory, and no other random state is touched.
    """
    draw = torch.Generator().manual_seed(seed)
    kept: list[tuple[Tensor, Tensor]] = []
    try:
        for module in model.modules():
            for name, tensor, size in _to_be_changed(module):
                if only is None or name in only:
                    noise = torch.randn(tensor.shape, generator=draw) * size
                    kept.append((tensor, tensor.clone()))
                    tensor.add_(noise.to(tensor))
        yield
    finally:
        for tensor, before in kept:
            tensor.copy_(before)


def _to_be_changed(module: nn.Module) -> Iterator[tuple[str, Tensor, float]]:
    """(adapter, tensor, size of its noise); detached, so that a change counts as one of the parameter's own."""
    if isinstance(module, LoraLayer):
        for name, up in module.lora_B.items():
            yield name, up.weight.detach(), _size_of(module, name)
        for name, magnitude in module.lora_magnitude_vector.items():
            yield name, magnitude.weight.detach(), _SIZE * _rms(magnitude.weight.detach())
    elif isinstance(module, TrainedModule):
        for name, whole in module.modules_to_save.items():
            for p in whole.parameters():
                yield name, p.detach(), _SIZE * _rms(p.detach())


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
    return local(weight.detach()).flatten(0, -2)[:_ROWS]  # of a sharded one this process's rows


def _rms(x: Tensor) -> float:
    return x.float().square().mean().sqrt().item()
