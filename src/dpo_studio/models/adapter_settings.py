"""An adapter's settings: the kinds of LoRA that are computed here, of the types and sizes that its tensors bear out.

PEFT imports, unpickles, rebuilds the base or matches expressions by what adapter_config.json says. So the file is read
here, and PEFT gets settings that were checked one by one; it never opens the file itself.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dpo_studio.errors import ModelError

__all__ = ["base_named_by", "lora_settings", "rank_of", "refuse_strange_lora"]

_LORA_KEYS = frozenset(
    (
        *("peft_type", "task_type", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
        "auto_mapping",  # names a library to import, and only AutoPeftModel does
        *("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "modules_to_save"),
        *("fan_in_fan_out", "bias", "rank_pattern", "alpha_pattern", "target_parameters"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights"),
    )
)
"""Settings of LoRA, rsLoRA and DoRA: scale, rank and where. All others of PEFT's must be as they are by default."""
_HANDED_ON = frozenset(
    (
        *("task_type", "base_model_name_or_path", "revision", "r", "lora_alpha", "lora_dropout", "use_rslora"),
        *("fan_in_fan_out", "rank_pattern", "alpha_pattern", "target_modules", "init_lora_weights"),
        *("use_dora", "modules_to_save", "target_parameters"),
    )
)
"""What PEFT is given of them. The rest says the same as its defaults, or names layers that the tensors name too."""
_HARMLESS_STARTS = (True, False, None, "gaussian", "orthogonal")
"""Values of init_lora_weights that the saved tensors replace; pissa changes the base, corda reads a pickle."""
_PLAIN_PATTERN = re.compile(r"(\.\*\\\.|\^)?(\w|\\?\.)+\$?")
"""A layer's name, or the end of one: an expression that takes no time to match. PEFT itself writes `.*\\.NAME`."""
_OF_EXPERTS = re.compile(r"(.*\.)?((\w+_)?experts|base_layer)")
"""A layer whose tensors are those of all experts, in a row: a file does not say how many there are."""
_NAME = re.compile(r"(/|\./)?[^\\:%~\x00-\x1f\x7f]+")
_MOST_TARGETS = 1000
"""Names of layers that a list may have beyond those it has tensors for: some lists are made for every family."""


def refuse_strange_lora(raw: Any, defaults: Mapping[str, Any], name: str) -> None:
    """Refuse an adapter's settings if they are more than LoRA, rsLoRA or DoRA; `defaults` are PEFT's own.

    Raises:
        ModelError: another kind of adapter, one whose start changes its base, an expression where a name goes, a value
            of the wrong type, or a setting that this PEFT does not know.
    """
    if not isinstance(raw, dict):
        raise ModelError(f"{name}: adapter_config.json is not a JSON object")
    if rows := raw.get("trainable_token_indices"):
        raise ModelError(
            f"{name}: this adapter adapts rows of the embedding (trainable_token_indices: {_value_text(rows)}); "
            "not supported",
            hint="an adapter of attention and dense MLPs can be used; or merge this one into its base first",
        )
    strange = [key for key in defaults if key not in _LORA_KEYS and raw.get(key) and raw[key] != defaults[key]]
    if raw.get("bias", "none") != "none":
        strange.append("bias")
    if raw.get("peft_type") != "LORA" or strange:
        raise ModelError(
            f"{name}: only LoRA, rsLoRA and DoRA adapters can be used; this is "
            f"{', '.join([_value_text(raw.get('peft_type')), *strange])}",
            hint="merge it into its base first, or train a LoRA adapter",
        )
    for key, value in raw.items():
        if key not in defaults and key not in _LORA_KEYS and not _is_empty(value):
            raise ModelError(
                f"{name}: adapter_config.json has {_value_text(key)}: {_value_text(value)}, which PEFT "
                f"{version('peft')} does not know, so its effect is unknown",
                hint="remove the key if you know that the adapter is plain LoRA without it",
            )
    start = raw.get("init_lora_weights")
    if start is not None and not isinstance(start, bool | str):
        raise _wrong(name, "init_lora_weights", start, "true, false or a name")
    if start not in _HARMLESS_STARTS:
        raise ModelError(
            f"{name}: init_lora_weights: {_value_text(start)} changes the base when it is loaded",
            hint="PEFT makes plain LoRA of it: save_pretrained(path_initial_model_for_weight_conversion=...)",
        )
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in _members(raw.get(key)):
            if not _PLAIN_PATTERN.fullmatch(str(pattern)):
                raise ModelError(
                    f"{name}: {key} names layers by an expression ({_value_text(pattern)}): write their names out"
                )
    for key, (fits, words) in _TYPES.items():
        if key in raw and not fits(raw[key]):
            raise _wrong(name, key, raw[key], words)


def lora_settings(raw: Mapping[str, Any], ranks: Mapping[str, int], name: str) -> dict[str, Any]:
    """What PEFT's LoraConfig is made of, from settings that `refuse_strange_lora` let pass.

    `ranks` are the layers that have tensors, by their names in the base, and each one's rank, 0 unknown. Expressions
    that name layers say the same as the tensors, and can take for ever to match; `all-linear` means something else in
    each version of PEFT. A list of names is kept, so that a layer whose tensors got lost is missed.

    Raises:
        ModelError: more names than there can be layers, or a rank that is not that of the tensors.
    """
    settings = {key: value for key, value in raw.items() if key in _HANDED_ON}
    targets = raw.get("target_modules")
    by_expression = any(raw.get(key) not in (None, [], "") for key in ("exclude_modules", "layers_to_transform"))
    if not isinstance(targets, list) or by_expression:
        settings["target_modules"] = sorted(layer for layer in ranks if not _OF_EXPERTS.fullmatch(layer))
    elif len(targets) > len(ranks) + _MOST_TARGETS:
        raise ModelError(
            f"{name}: adapter_config.json names {len(targets):,} target modules, and has tensors for {len(ranks):,} "
            "layers"
        )
    if len(settings.get("target_parameters") or ()) > _MOST_TARGETS:
        raise ModelError(f"{name}: adapter_config.json names more than {_MOST_TARGETS:,} target parameters")
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = settings.get(key) or {}
        if len(patterns) > len(ranks):
            raise ModelError(f"{name}: {key} has {len(patterns):,} entries for {len(ranks):,} layers with tensors")
        settings[key] = patterns
    expected = {layer: rank_of(layer, settings["rank_pattern"], int(settings.get("r", 8))) for layer in ranks}
    linear = {layer: rank for layer, rank in ranks.items() if not _OF_EXPERTS.fullmatch(layer)}
    if wrong := sorted(layer for layer, rank in linear.items() if rank not in (0, expected[layer])):
        layer = wrong[0]
        raise ModelError(
            f"{name}: adapter_config.json gives {_value_text(layer)} rank {expected[layer]:,}, its tensors have "
            f"{ranks[layer]:,}",
            hint="r and rank_pattern must be those that the adapter was trained with",
        )
    return settings


def rank_of(layer: str, patterns: Mapping[str, int], otherwise: int) -> int:
    """As PEFT finds it: the first pattern that is the layer's name or ends it, else r."""
    for pattern, rank in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return int(rank)
    return otherwise


def base_named_by(raw: Any, revision: Any, name: str) -> str:
    """The base that an adapter names: a Hub id, or a folder that is reached without climbing out of where it lies.

    Raises:
        ModelError: none, or it leads elsewhere: a URL, `..`, a home folder; or a revision of a pull request.
    """
    if not raw:
        raise ModelError(f"{name}: its adapter_config.json names no base model")
    bare = raw.removeprefix("bundled:") if isinstance(raw, str) else ""
    if not _NAME.fullmatch(bare) or ".." in Path(bare).parts:
        raise ModelError(
            f"{name}: the base that its adapter_config.json names leads elsewhere: {_value_text(repr(raw))}",
            hint="if you trust it: name the base as model.path and this folder as model.adapter in a recipe",
        )
    if revision is not None and (not isinstance(revision, str) or revision.startswith("refs/")):
        raise ModelError(
            f"{name}: its adapter_config.json names a revision that is not a branch or commit: "
            f"{_value_text(repr(revision))}"
        )
    return str(raw)


def _wrong(name: str, key: str, value: Any, words: str) -> ModelError:
    return ModelError(f"{name}: adapter_config.json has {key}: {_value_text(value)}, which is not {words}")


def _is_empty(value: Any) -> bool:
    """null, [], {}, false or the empty text; a zero says something."""
    return value is None or value is False or (isinstance(value, str | list | dict) and not value)


def _members(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, dict | list) else ()


def _value_text(value: Any) -> str:
    """An untrusted setting in a message, shortened."""
    text = ", ".join(map(str, value[:20])) if isinstance(value, list) else str(value)
    return text if len(text) < 80 else f"{text[:77]}..."


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _rank_value(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _yes_or_no(value: Any) -> bool:
    return isinstance(value, bool)


def _text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _names(value: Any) -> bool:
    return _text(value) or (isinstance(value, list) and all(isinstance(one, str) for one in value))


def _places(value: Any) -> bool:
    whole = value if isinstance(value, list) else [value]
    return value is None or all(isinstance(one, int) and not isinstance(one, bool) for one in whole)


def _by_name(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    def fit(value: Any) -> bool:
        return _is_empty(value) or (isinstance(value, dict) and all(map(fits, value.values())))

    return fit


_TYPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_rank_value, "a whole number from 1 on"),
    "lora_alpha": (_number, "a number"),
    "lora_dropout": (lambda value: _number(value) and 0 <= value < 1, "a share below 1"),
    "use_rslora": (_yes_or_no, "true or false"),
    "use_dora": (lambda value: value is None or _yes_or_no(value), "true or false"),
    "modules_to_save": (lambda value: _names(value) and not isinstance(value, str), "a list of names"),
    "fan_in_fan_out": (_yes_or_no, "true or false"),
    "rank_pattern": (_by_name(_rank_value), "layers and their ranks"),
    "alpha_pattern": (_by_name(_number), "layers and their alphas"),
    "target_modules": (_names, "a list of layers' names"),
    "target_parameters": (lambda value: _names(value) and not isinstance(value, str), "a list of names"),
    "exclude_modules": (_names, "a list of layers' names"),
    "layers_pattern": (_names, "a list of names"),
    "layers_to_transform": (_places, "a list of layers' numbers"),
    "task_type": (_text, "the name of a task"),
}
"""Of each setting that is used: what it may be, in a test and in words."""
