"""The linear layer of a GPTQ base: it keeps packed integers and computes as a dense one that holds their weights.

To PEFT it is an `nn.Linear` without a weight: `all-linear` finds it, LoRA attaches to it, nothing can merge into it.

Shapes: N = outputs, K = inputs, W = words of a row, G = groups of inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dpo_studio.models.fp8 import fp8_weight
from dpo_studio.models.packed import Block8, Dense, Frozen, Packed
from dpo_studio.models.products import products

__all__ = [
    "FP8Linear",
    "GPTQLinear",
    "QuantisedLinear",
    "computes_in_fp8",
    "frozen_weight",
    "held_dense",
    "weight_count",
]

_SPARE = 0.8
"""Share of the free memory that weights formed for a while may take."""


class GPTQLinear(nn.Linear):
    """y = W x + b with W = scale x (integer - zero point), formed whenever it is needed (Frantar et al. 2022,
    arXiv 2210.17323)."""

    words_NW: Tensor
    scales_NG: Tensor
    zeros_NG: Tensor
    group_K: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int = 4,
        group_size: int = 128,
        *,
        bias: bool = False,
        act_order: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        """Empty; `dtype` is the bias's. `group_size` divides the inputs unless `act_order` names the groups."""
        nn.Module.__init__(self)  # nn.Linear's own would make a weight
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.group_size = bits, group_size
        groups = -(-in_features // group_size)

        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device=device)

        self.register_parameter("weight", None)
        self.register_buffer("words_NW", empty(out_features, in_features * bits // 32, dtype=torch.int32))
        self.register_buffer("scales_NG", empty(out_features, groups, dtype=torch.float16))
        self.register_buffer("zeros_NG", empty(out_features, groups, dtype=torch.uint8))
        self.register_buffer("group_K", empty(in_features, dtype=torch.int32) if act_order else None)
        self.bias: Any = nn.Parameter(empty(out_features, dtype=dtype), requires_grad=False) if bias else None
        self.held: Tensor | None = None
        """The weight while `held_dense` keeps it, (N, K)."""

    @property
    def packed(self) -> Packed:
        """The weight as it is kept."""
        return Packed(self.words_NW, self.scales_NG, self.zeros_NG, self.group_K, self.bits, self.group_size)

    @property
    def qweight(self) -> Tensor:
        """PEFT asks by this name where a layer without a weight is."""
        return self.words_NW

    @property
    def frozen(self) -> Frozen:
        """What a product needs."""
        return self.packed if self.held is None else Dense(self.held)

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """(N, K): scale x (integer - zero point), exact in fp32, rounded once to `dtype` (float32: not at all)."""
        return self.packed.exact(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x W^T + b, (..., N), in the precision of `x`; its gradient goes on to `x`."""
        return _forward(self, x)

    def extra_repr(self) -> str:
        """As it is printed."""
        return f"{super().extra_repr()}, bits={self.bits}, group_size={self.group_size}"


class FP8Linear(nn.Linear):
    """The same layer with its forward products in FP8: it keeps a byte for each integer (`models/fp8.py`)."""

    integers_NK: Tensor
    scales_NG: Tensor

    def __init__(self, packed: GPTQLinear) -> None:
        """In place of `packed`, whose words are not kept."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = packed.in_features, packed.out_features
        weight = fp8_weight(packed.packed)
        self.register_parameter("weight", None)
        self.register_buffer("integers_NK", weight.integers_NK)
        self.register_buffer("scales_NG", weight.scales_NG)
        self.bias: Any = packed.bias

    @property
    def qweight(self) -> Tensor:
        """PEFT asks by this name where a layer without a weight is."""
        return self.integers_NK

    @property
    def frozen(self) -> Frozen:
        """What a product needs."""
        return Block8(self.integers_NK, self.scales_NG)

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """(N, K), rounded once to `dtype`."""
        return self.frozen.formed(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x W^T + b, (..., N)."""
        return _forward(self, x)


QuantisedLinear = GPTQLinear | FP8Linear
"""Layers without a weight."""


def computes_in_fp8(model: nn.Module) -> bool:
    """Whether products of this model round their inputs to FP8."""
    return any(isinstance(module, FP8Linear) for module in model.modules())


def frozen_weight(linear: Any) -> Frozen:
    """What a product with this base layer needs."""
    return linear.frozen if isinstance(linear, (GPTQLinear, FP8Linear)) else Dense(linear.weight)


def _forward(linear: QuantisedLinear, x: Tensor) -> Tensor:
    (y,) = products(x, [linear.frozen], x.new_empty(0, linear.in_features), [x.new_empty(linear.out_features, 0)])
    return y if linear.bias is None else y + linear.bias


@contextmanager
def held_dense(model: nn.Module) -> Iterator[None]:
    """Inside, packed weights are formed once and kept if there is room: sampling reads each for every token."""
    layers = [module for module in model.modules() if isinstance(module, GPTQLinear)]
    dtype: torch.dtype = getattr(model, "dtype", torch.bfloat16)
    size = sum(layer.in_features * layer.out_features for layer in layers) * dtype.itemsize
    if layers and size > _SPARE * _free_bytes(layers[0].words_NW.device):
        layers = []
    for layer in layers:
        layer.held = layer.packed.formed(dtype)
    try:
        yield
    finally:
        for layer in layers:
            layer.held = None


def weight_count(model: nn.Module) -> int:
    """Weights of a model, packed ones counted as what they stand for."""
    packed = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, QuantisedLinear))
    return packed + sum(p.numel() for p in model.parameters())


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    with open("/proc/meminfo") as lines:  # noqa: PTH123 - no path of ours
        facts = dict(line.split(":", 1) for line in lines)
    return int(facts["MemAvailable"].split()[0]) * 1024
