"""The linear layer with a frozen weight of any kind: it computes as a dense one of the same values.

To PEFT it is an `nn.Linear` without a weight: `all-linear` finds it, LoRA attaches to it, nothing can merge into it.

Shapes: N = outputs, K = inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dpo_studio.frozen.dense import Dense
from dpo_studio.frozen.products import products
from dpo_studio.frozen.weights import Frozen, InFP8

__all__ = ["FrozenLinear", "computes_in_fp8", "frozen_weight", "held_dense", "weight_count"]

_SPARE = 0.8
"""Share of the free memory that temporarily dequantised weights may take."""


class FrozenLinear(nn.Linear):
    """y = W x + b with a W that is dequantised for each product, or multiplied in its packed form."""

    def __init__(self, weight: Frozen, bias: Tensor | None = None) -> None:
        """Its buffers are the tensors of `weight`, by their names."""
        nn.Module.__init__(self)  # nn.Linear's own would make a weight
        self.out_features, self.in_features = weight.shape
        self.register_parameter("weight", None)
        for name, tensor in weight.tensors().items():
            self.register_buffer(name, tensor)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        self._kind, self._names, self._numbers = type(weight), list(weight.tensors()), weight.numbers()
        self.held: Tensor | None = None
        """The weight while `held_dense` keeps it, (N, K)."""

    @property
    def kept(self) -> Frozen:
        """The weight in its packed form; of a sharded one all processes have to ask, but in a layer's own pass."""
        return self._kind.taken(iter([_whole(getattr(self, name)) for name in self._names]), iter(self._numbers))

    @property
    def frozen(self) -> Frozen:
        """What a product needs."""
        return self.kept if self.held is None else Dense(self.held)

    @property
    def qweight(self) -> Tensor:
        """PEFT asks by this name where a layer without a weight is."""
        tensor: Tensor = getattr(self, self._names[0])
        return tensor

    @property
    def in_fp8(self) -> bool:
        """Whether its products are in FP8."""
        return issubclass(self._kind, InFP8)

    def words_as_parameters(self) -> None:
        """Make its packed words a parameter without a gradient: what can be sharded."""
        for name in self._names:
            tensor = getattr(self, name)
            if tensor.dtype == torch.int32 and tensor.ndim == 2:
                delattr(self, name)
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """(N, K), exact in fp32, rounded once to `dtype` (float32: not at all)."""
        return self.kept.exact(dtype)

    def plain_weight(self, dtype: torch.dtype) -> Tensor:
        """(N, K): the weight of a product in `dtype`, formed by plain torch."""
        return self.kept.plain(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x W^T + b, (..., N), in the precision of `x`; its gradient goes on to `x`."""
        no_adapter = x.new_empty(0, self.in_features), [x.new_empty(self.out_features, 0)]
        (y,) = products(x, [self.frozen], *no_adapter)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """As it is printed."""
        return f"{super().extra_repr()}, kind={self._kind.tag}"


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def computes_in_fp8(model: nn.Module) -> bool:
    """Whether products of this model round their inputs to FP8."""
    return any(isinstance(module, FrozenLinear) and module.in_fp8 for module in model.modules())


def frozen_weight(linear: nn.Linear) -> Frozen:
    """What a product with this base layer needs."""
    return linear.frozen if isinstance(linear, FrozenLinear) else Dense(linear.weight)


@contextmanager
def held_dense(model: nn.Module) -> Iterator[None]:
    """Inside, weights are dequantised once and kept if there is room: sampling reads each weight for every token."""
    layers = [m for m in model.modules() if isinstance(m, FrozenLinear) and not m.in_fp8]
    dtype: torch.dtype = getattr(model, "dtype", torch.bfloat16)
    size = sum(layer.in_features * layer.out_features for layer in layers) * dtype.itemsize
    if layers and size > _SPARE * _free_bytes(layers[0].qweight.device):
        layers = []
    for layer in layers:
        layer.held = layer.kept.dequantised(dtype)
    try:
        yield
    finally:
        for layer in layers:
            layer.held = None


def weight_count(model: nn.Module) -> int:
    """Number of weights of a model; packed ones count by their unpacked shape."""
    packed = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, FrozenLinear))
    return packed + sum(p.numel() for p in model.parameters() if p.is_floating_point())


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    with open("/proc/meminfo") as lines:  # noqa: PTH123 - no path of ours
        facts = dict(line.split(":", 1) for line in lines)
    return int(facts["MemAvailable"].split()[0]) * 1024
