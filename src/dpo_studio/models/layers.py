"""The decoder's layers while they are trained: compiled once for all of them, with activation checkpointing where
memory is short.

Shapes: none of its own; a layer takes hidden states (1, T, H) and returns the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint

from dpo_studio.models.families import is_gated

__all__ = [
    "RUNGS",
    "Recompute",
    "as_compiled_for_training",
    "causal_lm",
    "compiled_layers",
    "decoder_layers",
    "is_compiled",
    "plain_layers",
    "set_recompute",
]

Recompute = Literal["nothing", "mlp", "layer"]
RUNGS: tuple[Recompute, ...] = ("nothing", "mlp", "layer")
"""What the backward pass recomputes instead of keeping it, the cheapest first."""
_LIST_NAMES = ("layers", "h", "blocks")
"""What models call the list of their layers."""
_ALLOW_MATES = "skip_fwd_side_effects_in_bwd_under_checkpoint"
"""torch's name for the setting that compiles a checkpointed part in which q passes outputs to k and v."""


@contextmanager
def compiled_layers(model: nn.Module) -> Iterator[None]:
    """Inside, every layer runs compiled: one compilation serves them all, whatever the row's length.

    Layers rather than the whole model: a 7B's forward and backward take 8 s instead of minutes, and run as fast. The
    first layer's input is made to require an unused gradient; otherwise that layer would be compiled separately.
    """
    layers = decoder_layers(model)
    for layer in layers:
        if isinstance(
            layer, FSDPModule
        ):  # compiled with its hooks, torch 2.11 fails at flex attention (a ratio of heads)
            layer.forward = torch.compile(layer.forward, dynamic=None)
        else:
            layer.compile(dynamic=True)
    hook = causal_lm(model).get_input_embeddings().register_forward_hook(_needing_gradient)
    # policy, reference and evaluation, two kinds of layer, some lengths of the attention's kernel; a config's floats
    # are constants: as symbols they reach FlexAttention's score_mod, which takes none (Gemma 2's soft-cap, torch 2.13)
    settings: dict[str, Any] = {"recompile_limit": 64, "specialize_float": True}
    if hasattr(torch._dynamo.config, _ALLOW_MATES):
        settings[_ALLOW_MATES] = True
    try:
        with torch._dynamo.config.patch(settings):
            yield
    finally:
        hook.remove()
        for layer in layers:
            layer._compiled_call_impl = None
            vars(layer).pop("forward", None)


def is_compiled(model: nn.Module) -> bool:
    """Whether the model's layers run compiled now."""
    return any(layer._compiled_call_impl is not None or "forward" in vars(layer) for layer in decoder_layers(model))


@contextmanager
def as_compiled_for_training(model: nn.Module) -> Iterator[None]:
    """Inside, compiled layers run the code compiled for training, whether or not a gradient is needed.

    A pass without a backward pass is compiled separately, and rounds differently: a policy that had not moved
    was 0.25 nats a pair off its reference (bf16, four small layers), and the loss of a 7B in FP8 began at 0.82 instead
    of ln 2. The activations it keeps are freed with its result. Eager layers round alike anyway.
    """
    if torch.is_grad_enabled() or not is_compiled(model):
        yield
        return
    with torch.enable_grad():
        yield


@contextmanager
def plain_layers(model: nn.Module) -> Iterator[None]:
    """Inside, layers run as they are: nothing is compiled for a sequence that comes once."""
    layers = decoder_layers(model)
    compiled = [(layer._compiled_call_impl, vars(layer).pop("forward", None)) for layer in layers]
    for layer in layers:
        layer._compiled_call_impl = None
    try:
        yield
    finally:
        for layer, (call, forward) in zip(layers, compiled, strict=True):
            layer._compiled_call_impl = call
            if forward is not None:
                layer.forward = forward


def set_recompute(model: nn.Module, what: Recompute) -> None:
    """Choose what the backward pass of `model` recomputes: activation checkpointing (Chen et al. 2016, arXiv
    1604.06174).

    Even with "nothing", compiled layers recompute act(gate) * up: that takes 3 % of a layer's time in one memory-bound
    pass, and keeping it a fifth of its memory.

    Not transformers' own switch: it works in training mode alone, in which BioGPT's layers drop activations of the
    frozen base, and JetMoe has none.
    """
    for layer in decoder_layers(model):
        layer.__class__ = _checkpointed(_plain(type(layer))) if what == "layer" else _plain(type(layer))
        mlp: Any = getattr(layer, "mlp", None)
        if mlp is not None:
            plain = _plain(type(mlp))
            mlp.__class__ = _recomputing(plain, whole=what == "mlp") if what == "mlp" or is_gated(plain) else plain


@cache
def _checkpointed(plain: Any) -> Any:
    """The class of a layer that keeps only its inputs, and recomputes the rest, in eval mode, in the backward pass."""

    class Recomputing(plain):  # type: ignore[misc]
        def __call__(self, *inputs: Any, **named: Any) -> Any:
            if not torch.is_grad_enabled():
                return super().__call__(*inputs, **named)
            return checkpoint(super().__call__, *inputs, use_reentrant=False, **named)

    return Recomputing


@cache
def _recomputing(plain: Any, *, whole: bool) -> Any:
    """The class of an MLP that recomputes its activations, or all that it keeps if `whole`.

    A class, not a function put on each module: all layers must look alike to torch.compile, or each is compiled.
    """

    class Recomputing(plain):  # type: ignore[misc]
        def forward(self, x: Tensor, *inputs: Any, **named: Any) -> Any:
            if whole:
                return checkpoint(super().forward, x, *inputs, use_reentrant=False, **named)
            gate, up = self.gate_proj(x), self.up_proj(x)
            if not torch.compiler.is_compiling():  # eager autograd would recompute the down projection as well
                return self.down_proj(self._activate(gate, up))
            return self.down_proj(checkpoint(self._activate, gate, up, use_reentrant=False))

        def _activate(self, gate: Tensor, up: Tensor) -> Tensor:
            return self.act_fn(gate) * up  # type: ignore[no-any-return]

    return Recomputing


def _plain(kind: type) -> type:
    """The class as transformers has it."""
    return kind if kind.__name__ != "Recomputing" else kind.__bases__[0]


def _needing_gradient(_module: nn.Module, _inputs: Any, hidden: Tensor) -> Tensor:
    return hidden.requires_grad_(torch.is_grad_enabled())


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The layers of the text model; empty where there are none by that name."""
    base = causal_lm(model).base_model
    inner = getattr(base, "language_model", None) or getattr(base, "decoder", None)  # a wrapper's text model; OPT's
    for part in (inner, base):
        for name in _LIST_NAMES:
            if isinstance(layers := getattr(part, name, None), nn.ModuleList):
                return layers
    return nn.ModuleList()


def causal_lm(model: nn.Module) -> Any:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") else model  # type: ignore[operator]
