"""DoRA: a layer's magnitude trained apart from its direction (Liu et al. 2024, arXiv 2402.09353, Eq. 5 and 11).

y = m / |W + s B A| * (W x + s B A x) + b, with a magnitude m and a norm for each output. As in PEFT the norm is taken
as a constant by the backward pass (section 4.3 of the paper). It is that of the formed weight, in fp32, and is computed
again only after A or B has changed: once a step. With the adapter disabled y = W x + b, whatever m is.

Shapes: T = tokens, K = inputs, N = outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn

from dpo_studio.frozen.linear import FrozenLinear, frozen_weight
from dpo_studio.frozen.products import is_adapter_disabled

__all__ = ["Dora", "is_dora", "keep_norms", "scaled_outputs", "start_magnitudes"]

_WEIGHTS_AT_ONCE = 2**24
"""Of a formed weight, in fp32: 64 MiB."""


class Magnitude(DoraLinearLayer):  # type: ignore[misc]
    """A layer's magnitudes, (N,), with the norm that they are relative to. Its `forward` is PEFT's own."""

    norm: Tensor
    """|W + s B A| of each output, fp32; not saved."""
    _norm_of: tuple[int, ...] = ()
    """The A and B that `norm` was computed with: where they are and how often they were changed."""
    _dtype: torch.dtype = torch.float32
    """What the layer computes in."""

    def __init__(self, outputs: int, device: torch.device) -> None:
        super().__init__(fan_in_fan_out=False)
        self.weight = nn.Parameter(torch.ones(outputs, device=device))
        self.register_buffer("norm", torch.ones(outputs, device=device), persistent=False)

    def forward(self, x: Tensor, *, base_layer: nn.Module, **rest: Any) -> Tensor:
        """What PEFT adds to W x; of a packed weight it is given the dense one."""
        if isinstance(base_layer, FrozenLinear):
            weight_NK = base_layer.frozen.dequantised(self._dtype)
            dense = nn.Linear(base_layer.in_features, base_layer.out_features, bias=False, device="meta")
            dense.weight, dense.bias = nn.Parameter(weight_NK, requires_grad=False), base_layer.bias
            base_layer = dense
        return super().forward(x, base_layer=base_layer, **rest)  # type: ignore[no-any-return]

    def gain(self) -> Tensor:
        """m / norm, (N,), fp32; differentiable in m."""
        return self.weight / self.norm

    @torch.no_grad()
    def refresh(self, layer: Any, name: str, dtype: torch.dtype) -> None:
        """Compute `norm` again if A or B has changed; `dtype` is what the layer computes in."""
        down_rK, up_Nr = layer.lora_A[name].weight, layer.lora_B[name].weight
        now = (down_rK.data_ptr(), down_rK._version, up_Nr.data_ptr(), up_Nr._version)
        if now == self._norm_of:
            return
        self._dtype, self._norm_of = dtype, now
        weight_NK = frozen_weight(layer.get_base_layer()).dequantised(dtype)
        rows = max(1, _WEIGHTS_AT_ONCE // weight_NK.shape[1])
        for start in range(0, len(weight_NK), rows):
            at = slice(start, start + rows)
            formed_nK = torch.addmm(weight_NK[at].float(), up_Nr[at], down_rK, alpha=layer.scaling[name])
            self.norm[at] = torch.linalg.vector_norm(formed_nK, dim=1)


class Dora(DoraLinearVariant):  # type: ignore[misc]
    """What PEFT asks of a kind of LoRA; its merging and its own forward are PEFT's."""

    @staticmethod
    def init(module: Any, adapter_name: str, **_: Any) -> None:
        """Make room for the magnitudes. PEFT would form every weight here, and a packed one it could not."""
        if not module.lora_magnitude_vector:
            module.adapter_layer_names = (*module.adapter_layer_names, "lora_magnitude_vector")
        device = module.lora_A[adapter_name].weight.device
        module.lora_magnitude_vector[adapter_name] = Magnitude(module.out_features, device)


def is_dora(layer: Any, name: str) -> bool:
    """Whether a layer's adapter of this name has magnitudes."""
    return isinstance(layer.lora_variant.get(name), Dora)


def scaled_outputs(layer: Any, name: str, z: Tensor) -> Tensor:
    """m / norm * z, z of any shape (..., N), without a bias; z itself in value where the adapter is disabled."""
    scaled: Tensor = torch.ops.dpo_studio.dora(z, layer.lora_magnitude_vector[name].gain())
    return scaled


def start_magnitudes(model: nn.Module, name: str, dtype: torch.dtype) -> None:
    """Set a fresh adapter's magnitudes to its norms, so that it computes what the base does, to the bit."""
    for layer, adapter, magnitude in _magnitudes(model):
        if adapter == name:
            magnitude.refresh(layer, name, dtype)
            magnitude.weight.data.copy_(magnitude.norm)


def keep_norms(body: nn.Module, dtype: torch.dtype) -> None:
    """Compute norms, now and, where A or B has changed, when a forward pass of `body` begins."""
    _refresh_all(body, (), dtype=dtype)
    if any(True for _ in _magnitudes(body)) and not any(
        isinstance(hook, partial) and hook.func is _refresh_all for hook in body._forward_pre_hooks.values()
    ):
        body.register_forward_pre_hook(partial(_refresh_all, dtype=dtype))


def _refresh_all(body: nn.Module, _inputs: object, *, dtype: torch.dtype) -> None:
    for layer, name, magnitude in _magnitudes(body):
        magnitude.refresh(layer, name, dtype)


def _magnitudes(model: nn.Module) -> Iterator[tuple[Any, str, Magnitude]]:
    """(layer, adapter's name, magnitudes) of every layer that has some."""
    for layer in model.modules():
        for name, magnitude in getattr(layer, "lora_magnitude_vector", {}).items():
            if isinstance(magnitude, Magnitude):
                yield layer, name, magnitude


@torch.library.custom_op("dpo_studio::dora", mutates_args=())
def _scaled(z: Tensor, gain_N: Tensor) -> Tensor:
    """gain * z in the precision of z, or z if the adapter is disabled: read when it runs, as in `frozen.products`."""
    if is_adapter_disabled():
        return z.clone()
    return torch.mul(z, gain_N, out=torch.empty_like(z))


@_scaled.register_fake
def _(z: Tensor, gain_N: Tensor) -> Tensor:
    return torch.empty_like(z)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _slopes(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
    z, gain_N = ctx.saved_tensors
    gain_slope_N = (gradient.float() * z.float()).flatten(0, -2).sum(0)
    return (gradient * gain_N).to(z.dtype), gain_slope_N


torch.library.register_autograd("dpo_studio::dora", _slopes, setup_context=_keep)
