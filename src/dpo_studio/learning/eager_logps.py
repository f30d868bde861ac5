"""The plain side of the check at the start: transformers' own forward, eager attention, PEFT's own LoRA layers, one
sequence at a time; in the model's precision, or in fp32 a layer at a time where the model as a whole would not fit.

No code of this package computes here, except that packed weights are dequantised (exactly, by plain torch) before they
are multiplied: no other code knows their layout.

Shapes: T = tokens of a sequence, A = answer tokens, N = scored ones, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from inspect import signature
from types import MethodType

import torch
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedConfig

from dpo_studio.frozen.linear import FrozenLinear, computes_in_fp8
from dpo_studio.models.experts import LoraExperts
from dpo_studio.models.layers import causal_lm, plain_layers
from dpo_studio.models.lora import LoraLinear
from dpo_studio.models.trained_modules import TrainedModule
from dpo_studio.tokens.encode import EncodedAnswer

__all__ = ["computes_in_fp32", "in_fp32", "plain_model", "plain_token_logps"]

_CHOICES = ("_attn_implementation", "_experts_implementation")
"""How transformers' configs name what computes attention and experts."""
_COARSE = (torch.bfloat16, torch.float16)


@torch.no_grad()
def plain_token_logps(model: nn.Module, prompt: Sequence[int], answer: EncodedAnswer) -> Tensor:
    """Log-prob of every scored token of an answer, the textbook's way: one sequence, its own logits; fp32, (N,)."""
    base = causal_lm(model)
    ids_1T = torch.tensor([[*prompt, *answer.ids.tolist()]], device=base.device)
    kept = len(answer.ids) + 1
    last_only = {"logits_to_keep": kept} if "logits_to_keep" in signature(base.forward).parameters else {}
    with plain_layers(model):
        logits_TV = base(input_ids=ids_1T, use_cache=False, **last_only).logits[0, -kept:-1]
    logps_AV = logits_TV.float().log_softmax(-1)
    scored_A = torch.from_numpy(answer.scored).to(logps_AV.device)
    logps_A: Tensor = logps_AV.gather(1, ids_1T[0, len(prompt) :, None])[:, 0]
    return logps_A[scored_A]


@contextmanager
def plain_model(model: nn.Module, adapter: str | None) -> Iterator[None]:
    """Inside, `model` computes as transformers and PEFT do by themselves, with the adapter of this name, or with none.

    Adapters are chosen layer by layer, not through the switches that training uses: those are what is checked.
    """
    with ExitStack() as restored:
        for config in _configs(model):
            for choice in _CHOICES:
                if getattr(config, choice, None) is not None:
                    restored.callback(setattr, config, f"{choice}_internal", getattr(config, choice))
                    setattr(config, f"{choice}_internal", "eager")
        for module in model.modules():
            if isinstance(module, BaseTunerLayer | TrainedModule):
                for name, value in (("_disable_adapters", adapter is None), ("_active_adapter", adapter or [])):
                    restored.callback(setattr, module, name, getattr(module, name))
                    setattr(module, name, [value] if isinstance(value, str) else value)
            if isinstance(module, LoraLinear):
                _put_forward(restored, module, MethodType(lora.Linear.forward, module))
            if isinstance(module, LoraExperts):
                _put_forward(restored, module, MethodType(lora.ParamWrapper.forward, module))
        yield


def computes_in_fp32(model: nn.Module) -> bool:
    """Whether there is nothing of a coarser precision in the model: then its own numbers are exact."""
    coarse = any(x.dtype in _COARSE for module in model.modules() for x in _own_tensors(module))
    return not coarse and not computes_in_fp8(model)


@contextmanager
def in_fp32(model: nn.Module) -> Iterator[None]:
    """Inside, `model` computes in fp32 with its own weights: each layer's are widened when it is called and restored
    after it, the same tensors, so at most one layer is in memory twice."""
    dtype = causal_lm(model).dtype
    with ExitStack() as restored:
        for module in model.modules():
            if isinstance(module, FrozenLinear):
                _put_forward(restored, module, MethodType(partial(_packed_in_fp32, dtype=dtype), module))
            if isinstance(module, TrainedModule):
                _put_forward(restored, module, MethodType(partial(TrainedModule.forward, exact=dtype), module))
        for unit, whole in _units(model):
            widened: list[tuple[Tensor, Tensor]] = []
            gathered = isinstance(unit, FSDPModule)  # a sharded layer is widened once its weights are there
            widen = partial(_widen, widened=widened, whole=whole)
            before = unit.register_forward_pre_hook(widen, prepend=not gathered)
            after = unit.register_forward_hook(partial(_narrow, widened=widened), always_call=True)
            restored.callback(before.remove)
            restored.callback(after.remove)
        yield


def _packed_in_fp32(linear: FrozenLinear, x: Tensor, *, dtype: torch.dtype) -> Tensor:
    """The product with the weight that this run dequantises, as it is rounded for products in `dtype`."""
    weight_NK = linear.plain_weight(dtype)
    return nn.functional.linear(x.float(), weight_NK.float(), None if linear.bias is None else linear.bias.float())


def _units(module: nn.Module) -> Iterator[tuple[nn.Module, bool]]:
    """What is widened at a time, and whether with all that is in it: decoder layers whole, for they may read each
    other's weights inside; of the rest each module's own tensors."""
    if isinstance(module, nn.ModuleList):
        yield from ((layer, True) for layer in module)
        return
    if any(True for _ in _own_tensors(module)):
        yield module, False
    for child in module.children():
        yield from _units(child)


def _own_tensors(module: nn.Module) -> Iterator[Tensor]:
    if isinstance(module, FrozenLinear):  # scales are read as they are
        return
    yield from (x for x in (*module._parameters.values(), *module._buffers.values()) if x is not None)


def _widen(unit: nn.Module, _inputs: object, *, widened: list[tuple[Tensor, Tensor]], whole: bool) -> None:
    for module in unit.modules() if whole else [unit]:
        for tensor in _own_tensors(module):
            if tensor.dtype in _COARSE:
                widened.append((tensor, tensor.data))
                tensor.data = tensor.data.float()


def _narrow(_unit: nn.Module, _inputs: object, _output: object, *, widened: list[tuple[Tensor, Tensor]]) -> None:
    while widened:
        tensor, own = widened.pop()
        tensor.data = own


def _configs(model: nn.Module) -> list[PreTrainedConfig]:
    """Every config that a module of the model looks at, once, and those inside them."""
    found: dict[int, PreTrainedConfig] = {}
    waiting = [config for m in model.modules() if (config := getattr(m, "config", None)) is not None]
    while waiting:
        config = waiting.pop()
        if id(config) not in found and hasattr(config, "_attn_implementation_internal"):
            found[id(config)] = config
            waiting += [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
    return list(found.values())


def _put_forward(restored: ExitStack, module: nn.Module, forward: MethodType) -> None:
    if "forward" in module.__dict__:  # another library's patch, which is restored
        restored.callback(setattr, module, "forward", module.__dict__["forward"])
    else:
        restored.callback(module.__dict__.pop, "forward")
    module.forward = forward
