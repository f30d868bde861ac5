"""LoRA's products without waste: one pass for the adapters that read the same input, none over wide outputs twice.

Adding B A x to W x afterwards reads and writes the widest tensors of a model once more, and PEFT's fp32 adapter under
autocast copies every input to fp32 first. Here the narrow product is written first and the base's product accumulates
onto it inside the matrix product, in the base's precision, with fp32 master weights. q, k and v (gate and up) read the
same input: their A's are one product, and their gradients of that input accumulate in place.

Shapes: T = tokens, K = inputs, N = outputs (a layer's own), R = ranks of the layers that read one input, in a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn

from dpo_studio.errors import ModelError
from dpo_studio.frozen.linear import FrozenLinear, frozen_weight
from dpo_studio.frozen.products import products
from dpo_studio.models.dora import Dora, is_dora, scaled_outputs

__all__ = ["LoraLinear", "free_shared_outputs", "link_mates"]

READ_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of layers that are in one module and read the same tensor, in the order they are called."""


class LoraLinear(lora.Linear):  # type: ignore[misc]
    """y = W x + scale * B A dropout(x) (arXiv 2106.09685, Eq. 3), master weights in fp32, computed as the base is."""

    mates: Sequence[LoraLinear] = ()
    """The layers computed in this one's call, itself the first; nothing for the others."""
    _ready: tuple[Tensor, Tensor] | None = None
    """(input, output) of this layer, computed in its leader's call and not asked for yet."""

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        """PEFT's table of the kinds of LoRA, with our DoRA in the place of its own."""
        return {**super().lora_variants, ("use_dora",): Dora}

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The adapted output for the one active adapter; everything else is computed by PEFT."""
        if self.disable_adapters and not self.merged:
            return self.base_layer(x, *args, **kwargs)  # type: ignore[no-any-return]
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.merged or len(active) != 1 or (active[0] in self.lora_variant and not is_dora(self, active[0])):
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        ready, self._ready = self._ready, None
        if ready is not None and ready[0] is x:
            return ready[1]
        (name,) = active
        dropout = self.lora_dropout[name]
        if (
            isinstance(dropout, nn.Dropout) and dropout.training
        ):  # each layer has its own dropout mask: nothing is shared
            return self._with_dropout(x, name)
        layers = [layer for layer in self.mates if name in layer.lora_A] or [self]
        mine, *others = lora_outputs(x, layers, name)
        for layer, y in zip(layers[1:], others, strict=True):
            layer._ready = (x, y)
        return mine

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """PEFT's merge, where the base's weight is there to be added to.

        Raises:
            ModelError: it is packed.
        """
        if isinstance(self.base_layer, FrozenLinear):
            raise ModelError(
                "an adapter cannot be merged into quantised weights",
                hint="`dpo export RUN OUT --to merged` (or gptq) forms the weights, adds the adapter, checks it",
            )
        super().merge(*args, **kwargs)

    def _with_dropout(self, x: Tensor, name: str) -> Tensor:
        if is_dora(self, name):  # g (W d + s B A d) + W (x - d) + b, d = dropout(x), as PEFT has it
            dropped = self.lora_dropout[name](x)
            (y,) = lora_outputs(dropped, [self], name)
            return y + products(x - dropped, [frozen_weight(self.base_layer)], *_no_adapter(x, self))[0]
        y = self.base_layer(x)
        low = nn.functional.linear(self.lora_dropout[name](x), self.lora_A[name].weight.to(x.dtype))
        up = self.lora_B[name].weight.to(x.dtype)
        flat = torch.addmm(y.flatten(0, -2), low.flatten(0, -2), up.t(), alpha=self.scaling[name])
        return flat.view(y.shape)


def lora_outputs(x: Tensor, layers: Sequence[LoraLinear], name: str) -> list[Tensor]:
    """Outputs of `layers`, which all read `x`, with the adapter `name`."""
    bases = [layer.base_layer for layer in layers]
    down_RK = torch.cat([layer.lora_A[name].weight for layer in layers]).to(x.dtype)
    # alpha / r goes into B before it is rounded: for scales that are powers of two this is exact
    ups_Nr = [(layer.scaling[name] * layer.lora_B[name].weight).to(x.dtype) for layer in layers]
    outputs = products(x, [frozen_weight(base) for base in bases], down_RK, ups_Nr)
    for place, layer in enumerate(layers):
        if is_dora(layer, name):
            outputs[place] = scaled_outputs(layer, name, outputs[place])
    return [y if base.bias is None else y + base.bias for base, y in zip(bases, outputs, strict=True)]


def _no_adapter(x: Tensor, layer: LoraLinear) -> tuple[Tensor, list[Tensor]]:
    """A and B of rank 0."""
    return x.new_empty(0, layer.in_features), [x.new_empty(layer.out_features, 0)]


def link_mates(model: nn.Module) -> None:
    """Let the first of the adapted layers that read one input compute them all."""
    for module in model.modules():
        for names in READ_TOGETHER:
            layers = [getattr(module, name, None) for name in names]
            mates = [layer for layer in layers if isinstance(layer, LoraLinear)]
            if len(mates) > 1:
                mates[0].mates = mates


def free_shared_outputs(model: nn.Module) -> None:
    """Free outputs that no layer will read: a forward pass stopped between a layer and its mates."""
    for module in model.modules():
        if isinstance(module, LoraLinear):
            module._ready = None
