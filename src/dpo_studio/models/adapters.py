"""LoRA adapters: attached through PEFT, computed in the base's precision, saved so that plain PEFT loads them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora, tuners_utils
from peft.tuners.lora import awq, gptq
from peft.utils import other as peft_utils
from peft.utils import quantization_utils
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dpo_studio.config import AdapterSection
from dpo_studio.errors import ModelError, reason_of
from dpo_studio.frozen.products import adapter_disabled
from dpo_studio.models.adapted_layers import adapted_names, check_layers, check_parameters, check_patterns
from dpo_studio.models.adapter_settings import lora_settings, refuse_strange_lora
from dpo_studio.models.conv1d import has_conv1d
from dpo_studio.models.dora import keep_norms, start_magnitudes
from dpo_studio.models.experts import plain_name, take_over_experts
from dpo_studio.models.head import body_of
from dpo_studio.models.lora import LoraLinear, link_mates
from dpo_studio.models.targets import all_linear, named_targets, not_adaptable, short_names, short_parameters
from dpo_studio.models.trained_modules import modules_named, take_over
from dpo_studio.scan import read_json, scan_folder
from dpo_studio.sizes import tensor_shapes

__all__ = [
    "POLICY",
    "REFERENCE",
    "adapter_names",
    "adapter_state",
    "as_reference",
    "attach",
    "attach_existing",
    "in_eval",
    "quiet_peft",
    "save_adapter",
    "saved_name",
    "saved_tensors",
    "train_mode",
]

POLICY, REFERENCE = "default", "reference"
_LOOKS_AT_SLICES = "_torch_supports_distributed"
"""PEFT's name for whether it asks a weight for its slice."""


def attach(
    base: nn.Module, section: AdapterSection, *, seed: int, say: Callable[[str], None] = lambda _: None
) -> PeftModel:
    """A fresh adapter on `base`: A random from `seed`, B zero, so the policy starts as the base.

    Raises:
        ModelError: a target names no linear layer, or one that is never adapted: experts, routers, the head; or a
            pattern fits no layer, or a module to save is not the embedding or the head.
    """
    meant = all_linear(base) if section.targets == "all-linear" else named_targets(base, section.targets)
    if section.targets == "all-linear" and (words := meant.words()):
        say(words)
    if meant.parameters and (section.kind == "dora" or section.dropout):
        what = "adapter.kind: dora" if section.kind == "dora" else "adapter.dropout"
        raise ModelError(
            f"{what} cannot be on the experts of a mixture: PEFT has no such adapter on {meant.parameters[0]}",
            hint="without it experts can be adapted; or name layers of attention as adapter.targets",
        )
    config = LoraConfig(
        r=section.rank,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        target_modules=meant.names,
        target_parameters=list(meant.parameters) or None,
        task_type="CAUSAL_LM",
        use_rslora=section.kind == "rslora",
        use_dora=section.kind == "dora",
        rank_pattern=dict(section.rank_pattern),
        alpha_pattern=dict(section.alpha_pattern),
        modules_to_save=modules_named(base, section.modules_to_save, "adapter.modules_to_save") or None,
    )
    config._register_custom_module({nn.Linear: LoraLinear})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            with quiet_peft():
                policy = get_peft_model(base, config)
        except ValueError as error:
            linear = sorted({name.rpartition(".")[2] for name, m in base.named_modules() if isinstance(m, nn.Linear)})
            raise ModelError(
                f"adapter.targets {section.targets}: {error}", hint=f"this model's linear layers: {', '.join(linear)}"
            ) from None
    take_over(policy)
    take_over_experts(policy)
    check_layers(policy, f"adapter.targets {section.targets}")
    check_patterns(policy, section)
    if config.use_dora:
        start_magnitudes(policy, POLICY, next(base.parameters()).dtype)
    return _ready_to_train(policy)


def attach_existing(base: nn.Module, folder: Path, *, trainable: bool, name: str = POLICY) -> PeftModel:
    """The adapter saved in `folder` on `base`, in addition to the adapters `base` already has.

    Raises:
        ModelError: the folder contains no LoRA adapter in safetensors, or one made for other layers.
    """
    config = read_adapter_config(folder)
    under = base.get_base_model() if isinstance(base, PeftModel) else base
    ranks = _ranks(folder, config.modules_to_save or ())
    layers = sorted(ranks)
    if strange := not_adaptable(under, layers):
        raise _adapts(folder, *strange)
    _check_layers_are_there(under, layers, folder)
    check_parameters(under, config, ranks, str(folder))
    if config.modules_to_save:
        config.modules_to_save = modules_named(under, config.modules_to_save, f"{folder}: modules_to_save")
        _check_whole_are_there(folder, config.modules_to_save)
    config.inference_mode = not trainable
    config._register_custom_module({nn.Linear: LoraLinear})
    try:
        with quiet_peft():
            if isinstance(base, PeftModel):
                base.add_adapter(
                    name, config
                )  # `load_adapter` alone reads the folder's own, and adapts by PEFT's layers
                base.load_adapter(folder, adapter_name=name, is_trainable=trainable)
                policy = base
            else:
                policy = PeftModel.from_pretrained(
                    base, folder, adapter_name=name, is_trainable=trainable, config=config
                )
    except torch.OutOfMemoryError:  # a RuntimeError, and no word on whether the adapter fits the model
        raise
    except (RuntimeError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ModelError(
            f"{folder}: this adapter does not fit the model: {reason_of(error)}",
            hint="was it trained on another base? adapter_config.json names it",
        ) from None
    take_over(policy)
    take_over_experts(policy)
    _check_every_tensor_was_used(policy, folder, name)
    check_layers(policy, str(folder))
    return _ready_to_train(policy)


def read_adapter_config(folder: Path) -> LoraConfig:
    """The LoRA settings of an adapter folder.

    Raises:
        ModelError: not a folder with a LoRA adapter in safetensors, or a kind of LoRA we do not compute.
    """
    if not (folder / "adapter_config.json").is_file():
        inside = (folder / "adapter" / "adapter_config.json").is_file()
        hint = f"{folder / 'adapter'} does" if inside else "an adapter folder has adapter_config.json in it"
        raise ModelError(f"{folder} contains no adapter", hint=hint)
    scan_folder(folder, str(folder))
    if not (folder / "adapter_model.safetensors").is_file():
        raise ModelError(
            f"{folder}: no adapter_model.safetensors",
            hint="pickle files (adapter_model.bin) are never loaded; save the adapter again as safetensors",
        )
    raw = read_json(folder / "adapter_config.json")
    refuse_strange_lora(raw, LoraConfig().to_dict(), str(folder))
    settings = lora_settings(raw, _ranks(folder, raw.get("modules_to_save") or ()), str(folder))
    try:
        return LoraConfig(**settings)
    except (ValueError, TypeError, AttributeError) as error:
        raise ModelError(f"{folder}/adapter_config.json cannot be used: {error}") from None


def _ranks(folder: Path, whole: Collection[str]) -> dict[str, int]:
    """The layers that an adapter has tensors for, by their names in the base, and the rank of each one's A, if any; not
    those of modules that are saved `whole`.

    Raises:
        ModelError: the file is damaged.
    """
    ranks: dict[str, int] = {}
    for key, (_, shape) in tensor_shapes([folder / "adapter_model.safetensors"], str(folder)).items():
        layer, _, side = key.removeprefix("base_model.model.").partition(".lora_")
        module = layer.rpartition(".")[0]
        if not side and any(module == name or module.endswith(f".{name}") for name in whole):
            continue
        rank = shape[0] if side == "A.weight" and shape else 0
        ranks[layer] = max(rank, ranks.get(layer, 0))
    return ranks


def _check_layers_are_there(base: nn.Module, layers: Sequence[str], folder: Path) -> None:
    """Told before PEFT looks for them: of a hundred thousand names it compares each with each of the base's modules."""
    known = {name for name, _ in base.named_modules()}
    if odd := [layer for layer in layers if plain_name(layer) not in known]:
        raise _unmatched(folder, len(odd), f"base_model.model.{odd[0]}")


def _check_whole_are_there(folder: Path, modules: Sequence[str]) -> None:
    """Told before PEFT, which asks for each tensor by its name and fails by an exception that says nothing more."""
    saved = tensor_shapes([folder / "adapter_model.safetensors"], str(folder))
    for module in modules:
        if f"base_model.model.{module}.weight" not in saved:
            raise ModelError(
                f"{folder}: adapter_config.json has {module} in modules_to_save, and there is no tensor of it",
                hint="is the file whole? an adapter that has none should not name the module",
            )


def _adapts(folder: Path, name: str, what: str) -> ModelError:
    return ModelError(
        f"{folder}: this adapter adapts {what} ({name}); not supported",
        hint="an adapter of attention and dense MLPs can be used; or merge this one into its base first",
    )


def adapter_names(model: nn.Module) -> tuple[str, ...]:
    """The names of the adapters in memory: `POLICY`, `REFERENCE`, both, or none."""
    return tuple(model.peft_config) if isinstance(model, PeftModel) else ()


def adapter_state(policy: PeftModel) -> dict[str, nn.Parameter]:
    """The trained tensors of the policy's adapter, by name, in the order of the model's modules."""
    return {name: p for name, p in policy.named_parameters() if p.requires_grad}


def saved_tensors(policy: PeftModel) -> dict[str, Tensor]:
    """The policy's adapter by the names that PEFT's files have, in a fixed order."""
    named = ((saved_name(name), p) for name, p in policy.named_parameters())
    return {name: p.detach() for name, p in sorted(named, key=lambda one: one[0] or "") if name is not None}


def saved_name(parameter: str, adapter: str = POLICY) -> str | None:
    """What PEFT's files call a parameter of the model's adapter of this name; None for any other parameter."""
    module, found, tensor = parameter.rpartition(f".{adapter}.")
    if not found:
        return None
    if module.endswith(".modules_to_save"):
        return f"{module.removesuffix('.modules_to_save')}.{tensor}"
    if ".lora_" not in module:
        return None
    return module if module.endswith(".lora_magnitude_vector") else f"{module}.{tensor}"


def save_adapter(policy: PeftModel, folder: Path, *, base: str, tensors: Mapping[str, Tensor] | None = None) -> None:
    """Write the policy's adapter in PEFT's format, or other `tensors` in its place; the same give the same bytes.

    `base` is the model as its user named it: a Hub id or path, never a cache folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = saved_tensors(policy) if tensors is None else tensors
    written = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    save_file(written, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = policy.peft_config[POLICY].to_dict()
    layers, parameters = adapted_names(policy.get_base_model())
    config["target_modules"] = short_names(policy.get_base_model(), layers)
    config["target_parameters"] = short_parameters(policy.get_base_model(), parameters) or None
    if config["modules_to_save"]:
        config["modules_to_save"] = short_names(policy.get_base_model(), config["modules_to_save"])
    config["base_model_name_or_path"] = base
    config["inference_mode"] = True
    config["fan_in_fan_out"] = has_conv1d(policy)
    plain = json.loads(
        json.dumps(config, default=lambda value: sorted(value) if isinstance(value, set) else str(value))
    )
    plain = dict(sorted(plain.items()))  # but patterns in their order: the first that fits a layer counts
    (folder / "adapter_config.json").write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")


@contextmanager
def as_reference(policy: nn.Module) -> Iterator[None]:
    """Inside, the policy computes as its reference does: adapter off, or the frozen reference adapter on; no
    dropout."""
    with in_eval(policy):
        if not isinstance(policy, PeftModel):
            yield
        elif REFERENCE in policy.peft_config:
            policy.base_model.set_adapter(REFERENCE, inference_mode=True)
            try:
                yield
            finally:
                policy.base_model.set_adapter(POLICY)
        else:
            with adapter_disabled():  # PEFT's own switch turns every parameter's gradient off and on: 25 ms on a 7B
                yield


@contextmanager
def in_eval(model: nn.Module) -> Iterator[None]:
    """Inside, dropout is off; afterwards every module's mode is restored."""
    before = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in before:
            module.training = True


def train_mode(policy: PeftModel) -> None:
    """Dropout in the adapter alone: the frozen base's own would make the policy differ from its reference by chance."""
    policy.eval()
    for module in policy.modules():
        if isinstance(module, lora.LoraLayer):
            module.lora_dropout[POLICY].train()


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Inside, PEFT gives no warnings that the user cannot act on, and does not use gptqmodel.

    PEFT 0.21 reads a property that transformers 5.23 has renamed, and of missing tensors it only warns: that we refuse.
    Where gptqmodel is installed PEFT imports it to ask whether a layer is one of its own (never, here): 5 s, 500 MB
    and a banner on stdout. And of a sharded weight on a mesh of two dimensions it would take the slice's shape for the
    layer's, as under tensor parallelism, which is not ours.
    """
    before_sharded = getattr(tuners_utils, _LOOKS_AT_SLICES, None)
    askers: list[Any] = [peft_utils, quantization_utils, awq, gptq]
    before = [asker.is_gptqmodel_available for asker in askers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        warnings.filterwarnings("ignore", message="Found missing adapter keys", category=UserWarning)
        # of a recipe's patterns we refuse such ones, of another trainer's adapter they change nothing
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys", category=RuntimeWarning)
        # that the embedding is trained and the head, tied to it, is not: what modules_to_save means
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`", category=UserWarning)
        for asker in askers:
            asker.is_gptqmodel_available = lambda: False
        setattr(tuners_utils, _LOOKS_AT_SLICES, False)
        try:
            yield
        finally:
            setattr(tuners_utils, _LOOKS_AT_SLICES, before_sharded)
            for asker, ask in zip(askers, before, strict=True):
                asker.is_gptqmodel_available = ask


def _ready_to_train(policy: PeftModel) -> PeftModel:
    """Master weights in fp32 (an update of 1e-5 is lost in bf16); layers that read one input computed together."""
    for name, p in policy.named_parameters():
        if ".lora_" in name:
            p.data = p.data.float()
    base = policy.get_base_model()
    keep_norms(body_of(base), base.dtype)
    link_mates(policy)
    return policy


def _check_every_tensor_was_used(policy: PeftModel, folder: Path, name: str) -> None:
    """PEFT only warns when a saved tensor finds no layer, or a layer no tensor."""
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        saved = set(file.keys())
    wanted = {key for parameter, _ in policy.named_parameters() if (key := saved_name(parameter, name)) is not None}
    if saved != wanted:
        odd = sorted(saved ^ wanted)
        raise _unmatched(folder, len(odd), odd[0])


def _unmatched(folder: Path, count: int, first: str) -> ModelError:
    return ModelError(
        f"{folder}: {count} tensors do not match the model's layers, the first is {first}",
        hint="was this adapter trained on another base?",
    )
