"""The proof, before training, that plain PEFT loads an adapter as it was saved.

PEFT renames tensors while it loads (its own rules, and those of transformers for the family), and it only
warns of tensors without a layer: such layers keep their initial values. So the adapter is loaded as a user loads it,
onto an empty base of the same class and config, and every tensor is compared at the module it was saved from.
"""

from __future__ import annotations

from collections.abc import Collection
from copy import deepcopy
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from dpo_studio.errors import ModelError, reason_of
from dpo_studio.models.adapters import POLICY, quiet_peft, save_adapter, saved_name, saved_tensors

__all__ = ["verify_adapter", "verify_trial_adapter"]


def verify_trial_adapter(policy: PeftModel, scratch: Path, *, base: str, seed: int = 0) -> None:
    """Save the policy's adapter to `scratch` with noise in every tensor, and prove that; the policy is unchanged.

    Without noise a fresh adapter's B is zero, like that of a layer whose tensors were lost.

    Raises:
        ModelError: plain PEFT would not compute with what this training saves.
    """
    draw = torch.Generator().manual_seed(seed)
    noise = {name: torch.randn(tensor.shape, generator=draw) for name, tensor in saved_tensors(policy).items()}
    save_adapter(policy, scratch, base=base, tensors=noise)
    verify_adapter(policy, scratch, noise)


def verify_adapter(policy: PeftModel, folder: Path, meant: dict[str, Tensor] | None = None) -> None:
    """Check that plain PEFT loads `folder` as the tensors `meant`, by default the policy's own adapter.

    Raises:
        ModelError: a tensor is missing, differs, or is on another layer; or other layers would be adapted, or with
            another scale.
    """
    meant = saved_tensors(policy) if meant is None else meant
    _check_file(folder, meant)
    _check_loaded(_loaded(policy, folder), policy, meant)


def _check_file(folder: Path, meant: dict[str, Tensor]) -> None:
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        names = set(file.keys())
        for name in sorted(names ^ meant.keys()):
            raise _broken(f"its file {'lacks' if name in meant else 'also has'} the tensor {name}")
        for name in sorted(names):
            if not _same(file.get_tensor(name), meant[name]):
                raise _broken(f"in its file the tensor {name} differs from the trained one")


def _loaded(policy: PeftModel, folder: Path) -> PeftModel:
    """What `PeftModel.from_pretrained` makes of the folder."""
    with torch.random.fork_rng(devices=[]), quiet_peft():  # its layers are made with random numbers
        base = _empty_like(policy.get_base_model(), policy.peft_config[POLICY].modules_to_save or ())
        try:
            return PeftModel.from_pretrained(base, folder, torch_device="cpu")
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise _broken(f"it refuses the adapter: {reason_of(error)}") from None


def _check_loaded(loaded: PeftModel, policy: PeftModel, meant: dict[str, Tensor]) -> None:
    found = {saved_name(name): p for name, p in loaded.named_parameters()}
    for name in sorted(meant):
        if name not in found:
            raise _broken(f"it has no place for the tensor {name}")
        loaded_as = torch.float32 if ".lora_" in name else found[name].dtype  # a whole module as the base's own is
        if not _same(found[name], meant[name].to(loaded_as)):
            raise _broken(f"it loads another tensor than was saved as {name}, or none")
    theirs, ours = _adapted(loaded), _adapted(policy)
    for name in sorted(theirs.keys() ^ ours.keys()):
        raise _broken(f"it adapts {'too few' if name in ours else 'too many'} layers, the first is {name}")
    for name, scale in ours.items():
        if theirs[name] != scale:
            raise _broken(f"it scales {name} by {theirs[name]}, where this training has {scale}")


def _adapted(model: PeftModel) -> dict[str, float]:
    """The adapted layers and their scales."""
    layers = model.get_base_model().named_modules()
    adapted = {name: layer.scaling for name, layer in layers if isinstance(layer, BaseTunerLayer)}
    return {name: scaling[POLICY] for name, scaling in adapted.items() if POLICY in scaling}


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.detach().cpu().float(), other.detach().cpu().float())


def _empty_like(model: PreTrainedModel, whole: Collection[str]) -> nn.Module:
    """A model of the same class and config, on the CPU, whose weights take no memory and have no values; except in the
    modules named `whole`, which PEFT copies to load what was saved.

    On `meta`, where weights take no memory either, PEFT 0.21 loads nothing. A quantised base's layers are plain ones
    here: PEFT names tensors by the module's path.
    """
    config = deepcopy(model.config)
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with torch.device("meta"):
            empty: nn.Module = type(model)._from_config(config, attn_implementation="eager")
    finally:
        transformers_logging.set_verbosity(verbosity)
    for place, module in empty.named_modules():
        for name, p in list(module._parameters.items()):
            if p is not None:
                real = torch.zeros(p.shape, dtype=p.dtype) if place in whole else _empty(p)
                module._parameters[name] = nn.Parameter(real, requires_grad=False)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = _empty(buffer)
    return empty.eval()


def _empty(tensor: Tensor) -> Tensor:
    """A tensor of this shape with one element of memory."""
    return torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)


def _broken(what: str) -> ModelError:
    return ModelError(
        f"plain PEFT would not load what this training saves: {what}",
        hint="train without that layer (adapter.targets), and please report the model",
    )
