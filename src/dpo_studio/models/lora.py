"""LoRA's products without waste: one pass for the adapters that read the same input, none over wide outputs twice.

Adding B A x to W x afterwards reads and writes the widest tensors of a model once more, and PEFT's fp32 adapter under
autocast copies every input to fp32 first. Here the narrow product is written first and the base's product accumulates
onto it inside the matrix product, in the base's precision, with fp32 master weights. q, k and v (gate and up) read the
same input: their A's are one product, and their gradients of that input accumulate in place.

The operator is opaque to torch.compile, which would otherwise turn each accumulation into a copy and an addition.

Shapes: T = tokens, K = inputs, N = outputs (a layer's own), R = ranks of the layers that read one input, in a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn

__all__ = ["READ_TOGETHER", "LoraLinear", "forget_what_is_ready", "link_mates"]

READ_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of layers that stand in one module and read the same tensor, in the order they are called."""


class LoraLinear(lora.Linear):  # type: ignore[misc]
    """y = W x + scale * B A dropout(x) (arXiv 2106.09685, Eq. 3), master weights in fp32, computed as the base is."""

    mates: Sequence[LoraLinear] = ()
    """The layers computed in this one's call, itself the first; nothing for the others."""
    silent: bool = False
    """Compute the base alone. PEFT's own switch also turns every parameter's gradient off and on: 25 ms on a 7B."""
    _ready: tuple[Tensor, Tensor] | None = None
    """(input, output) of this layer, computed in its leader's call and not asked for yet."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The adapted output for the one active adapter; whatever else PEFT can do is PEFT's."""
        if self.disable_adapters and not self.merged:
            return self.base_layer(x, *args, **kwargs)  # type: ignore[no-any-return]
        if self.silent:
            return self._base_alone(x)
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.merged or len(active) != 1 or active[0] in self.lora_variant:
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        ready, self._ready = self._ready, None
        if ready is not None and ready[0] is x:
            return ready[1]
        (name,) = active
        dropout = self.lora_dropout[name]
        if isinstance(dropout, nn.Dropout) and dropout.training:  # each layer drops its own: nothing is shared
            return self._with_dropout(x, name)
        layers = [layer for layer in self.mates if name in layer.lora_A] or [self]
        mine, *others = lora_outputs(x, layers, name)
        for layer, y in zip(layers[1:], others, strict=True):
            layer._ready = (x, y)
        return mine

    def _base_alone(self, x: Tensor) -> Tensor:
        """An adapter of rank 0: the products, kernels and rounding of a policy that has not moved, so ln 2 is ln 2.

        The plain product would be 1.6 % of a step cheaper, and in bf16 some nats a pair off.
        """
        base = self.base_layer
        (y,) = _computed(x, [base], x.new_empty(0, base.in_features), [x.new_empty(base.out_features, 0)])
        return y

    def _with_dropout(self, x: Tensor, name: str) -> Tensor:
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
    return _computed(x, bases, down_RK, ups_Nr)


def _computed(x: Tensor, bases: Sequence[Any], down_RK: Tensor, ups_Nr: list[Tensor]) -> list[Tensor]:
    """The operator on an input of any shape, and the bases' biases."""
    *outputs, _ = torch.ops.dpo_studio.lora(x.flatten(0, -2), [base.weight for base in bases], down_RK, ups_Nr)
    outputs = [y_TN if base.bias is None else y_TN + base.bias for base, y_TN in zip(bases, outputs, strict=True)]
    return [y_TN.view(*x.shape[:-1], -1) for y_TN in outputs]


def link_mates(model: nn.Module) -> None:
    """Let the first of the adapted layers that read one input compute them all."""
    for module in model.modules():
        for names in READ_TOGETHER:
            layers = [getattr(module, name, None) for name in names]
            mates = [layer for layer in layers if isinstance(layer, LoraLinear)]
            if len(mates) > 1:
                mates[0].mates = mates


def forget_what_is_ready(model: nn.Module) -> None:
    """Let go of outputs nobody will ask for: a forward pass broke off between a layer and its mates."""
    for module in model.modules():
        if isinstance(module, LoraLinear):
            module._ready = None


@torch.library.custom_op("dpo_studio::lora", mutates_args=())
def _lora(x_TK: Tensor, weights: list[Tensor], down_RK: Tensor, ups_Nr: list[Tensor]) -> list[Tensor]:
    """[y of each layer (T, N)], and x A^T (T, R) for the backward pass."""
    low_TR = x_TK @ down_RK.t()
    outputs = []
    for weight_NK, up_Nr, low_Tr in zip(weights, ups_Nr, _by_layer(low_TR, ups_Nr), strict=True):
        outputs.append((low_Tr @ up_Nr.t()).addmm_(x_TK, weight_NK.t()))
    return [*outputs, low_TR]


@_lora.register_fake
def _(x_TK: Tensor, weights: list[Tensor], down_RK: Tensor, ups_Nr: list[Tensor]) -> list[Tensor]:
    # shape[0], not len(): that would fix the row's length in compiled code
    return [x_TK.new_empty(x_TK.shape[0], matrix.shape[0]) for matrix in (*weights, down_RK)]


@torch.library.custom_op("dpo_studio::lora_backward", mutates_args=())
def _lora_backward(
    gradients_TN: list[Tensor],
    weights: list[Tensor],
    down_RK: Tensor,
    ups_Nr: list[Tensor],
    low_TR: Tensor,
    needs_input: bool,
) -> list[Tensor]:
    """[dL/d(x A^T) (T, R)], dL/dB of each layer, and dL/dx (T, K) if it is wanted."""
    slope_TR = torch.empty_like(low_TR)
    ups_slopes = []
    for gradient_TN, up_Nr, slope_Tr, low_Tr in zip(
        gradients_TN, ups_Nr, _by_layer(slope_TR, ups_Nr), _by_layer(low_TR, ups_Nr), strict=True
    ):
        torch.mm(gradient_TN, up_Nr, out=slope_Tr)
        ups_slopes.append(gradient_TN.t() @ low_Tr)
    if not needs_input:
        return [slope_TR, *ups_slopes]
    x_slope_TK = slope_TR @ down_RK
    for gradient_TN, weight_NK in zip(gradients_TN, weights, strict=True):
        x_slope_TK.addmm_(gradient_TN, weight_NK)
    return [slope_TR, *ups_slopes, x_slope_TK]


@_lora_backward.register_fake
def _(
    gradients_TN: list[Tensor],
    weights: list[Tensor],
    down_RK: Tensor,
    ups_Nr: list[Tensor],
    low_TR: Tensor,
    needs_input: bool,
) -> list[Tensor]:
    slopes = [torch.empty_like(low_TR), *(torch.empty_like(up_Nr) for up_Nr in ups_Nr)]
    return [*slopes, low_TR.new_empty(low_TR.shape[0], down_RK.shape[1])] if needs_input else slopes


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x_TK, weights, down_RK, ups_Nr = inputs
    ctx.save_for_backward(x_TK, down_RK, output[-1], *ups_Nr)
    ctx.weights = weights  # frozen, and part of the model: nothing to save
    ctx.needs_input = x_TK.requires_grad


def _slopes(ctx: Any, gradients: list[Tensor]) -> tuple[Any, ...]:
    x_TK, down_RK, low_TR, *ups_Nr = ctx.saved_tensors
    *outputs, _ = gradients
    count = len(ctx.weights)
    slope_TR, *rest = torch.ops.dpo_studio.lora_backward(
        [gradient_TN.contiguous() for gradient_TN in outputs], ctx.weights, down_RK, ups_Nr, low_TR, ctx.needs_input
    )
    # outside the operator, where torch.compile may form x anew instead of keeping it
    down_slope_RK = slope_TR.t() @ x_TK
    return rest[count] if ctx.needs_input else None, [None] * count, down_slope_RK, rest[:count]


torch.library.register_autograd("dpo_studio::lora", _slopes, setup_context=_keep)


def _by_layer(stacked_TR: Tensor, ups_Nr: list[Tensor]) -> list[Tensor]:
    """The columns of each layer's own rank."""
    return list(torch.split(stacked_TR, [up_Nr.shape[1] for up_Nr in ups_Nr], dim=1))
