"""Folders from strangers, looked over before any library opens a file in them.

What a library would follow out of the folder, run, or unpickle is refused by name. Files that nothing here opens
(`.py` and pickles beside safetensors weights) may lie there, and are left alone.
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpo_studio.errors import ModelError

__all__ = ["PICKLES", "base_named_by", "read_json", "refuse_strange_lora", "scan_folder", "weight_files"]

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npy", ".npz", ".joblib")
"""Endings of files that can run code when loaded."""
_CONFIGS = (
    *("config.json", "tokenizer_config.json", "generation_config.json", "adapter_config.json"),
    *("processor_config.json", "preprocessor_config.json", "special_tokens_map.json", "quantize_config.json"),
)
"""What transformers, PEFT and their tokenizers read settings from."""
_LARGEST_CONFIG = 20_000_000
"""Bytes. The largest tokenizer_config.json of a known model has one million."""
_CODE_KEYS = ("auto_map", "trust_remote_code", "custom_generate")
_NO_CODE = "DPO Studio never runs code that comes with a model; use one that transformers supports itself"

_LORA_KEYS = frozenset(
    (
        *("peft_type", "task_type", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
        "auto_mapping",  # names a library to import, and only AutoPeftModel does
        *("r", "lora_alpha", "lora_dropout", "use_rslora", "fan_in_fan_out", "bias", "rank_pattern", "alpha_pattern"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights"),
    )
)
"""Settings of plain LoRA: scale, rank and where. All others of PEFT's must be as they are by default."""
_NAMES_OF_HEAD_OR_EMBEDDING = (
    ("modules_to_save", "whole modules, as a rule the head or the embedding"),
    ("trainable_token_indices", "rows of the embedding"),
)
_HARMLESS_STARTS = (True, False, None, "gaussian", "orthogonal")
"""Values of init_lora_weights that the saved tensors replace; pissa changes the base, corda reads a pickle."""
_PLAIN_PATTERN = re.compile(r"\^?(\w|\\?\.)+\$?")
"""A layer's name, or the end of one: an expression of PEFT's that takes no time to match."""
_NAME = re.compile(r"(/|\./)?[^\\:%~\x00-\x1f\x7f]+")


def scan_folder(folder: Path, name: str) -> None:
    """Look a model, tokenizer or adapter folder over.

    Raises:
        ModelError: it holds something that is no file, a link that leads out of it, or settings that ask for code.
    """
    inside = _where_files_may_be(folder)
    for file in sorted(folder.iterdir()):
        _check_file(file, inside, name)
    for config in _CONFIGS:
        for key, value in _settings(read_json(folder / config)):
            _check_setting(config, key, value, name)
    weight_files(folder, name)


def _where_files_may_be(folder: Path) -> tuple[Path, ...]:
    """The folder; and the Hub cache's blobs, which every file of a snapshot is a link into."""
    home = folder.resolve()
    return (home, home.parent.parent / "blobs") if home.parent.name == "snapshots" else (home,)


def _check_file(file: Path, inside: tuple[Path, ...], name: str) -> None:
    """Weights alone may be links to another disk: only numbers are read from them, and no export copies them."""
    try:
        kind = file.stat().st_mode
    except FileNotFoundError:  # a link to nothing: missing, like any other file
        return
    if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
        raise ModelError(f"{name}: {file.name} is no file", hint="a device or a pipe in a model folder is no accident")
    if file.is_symlink() and file.suffix != ".safetensors":
        target = file.resolve()
        if not any(target.is_relative_to(place) for place in inside):
            raise ModelError(
                f"{name}: {file.name} is a link that leads out of the folder", hint="put the file itself there"
            )


def _check_setting(config: str, key: str, value: Any, name: str) -> None:
    if key in _CODE_KEYS and value:
        raise ModelError(f"{name}: {config} asks to run code from the model's folder ({key})", hint=_NO_CODE)
    if key.endswith(("implementation", "implementation_internal")) and "/" in str(value):
        raise ModelError(f"{name}: {config} asks to run a kernel from the Hub ({key}: {value})", hint=_NO_CODE)


def _settings(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key in it, however deep: models of several parts have configs inside their config."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield from value.items()
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def weight_files(folder: Path, name: str) -> dict[str, Path]:
    """Where each tensor is, by the folder's index; empty where it has none.

    Raises:
        ModelError: the index is damaged, or names a file that is no safetensors file of this folder.
    """
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return {}
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ModelError(f"{name}: {index.name} is damaged", hint="is the download complete? fetch the model again")
    for file in found.values():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ModelError(f"{name}: {index.name} names a weight file that is none: {file!r}")
    return {key: folder / file for key, file in found.items()}


def refuse_strange_lora(raw: Any, defaults: dict[str, Any], name: str) -> None:
    """Refuse an adapter's settings if they are more than plain LoRA; `defaults` are PEFT's own.

    Raises:
        ModelError: another kind of adapter, one whose start changes its base, or an expression where a name goes.
    """
    if not isinstance(raw, dict):
        raise ModelError(f"{name}: adapter_config.json is not a JSON object")
    for key, names in _NAMES_OF_HEAD_OR_EMBEDDING:
        if value := raw.get(key):
            raise ModelError(
                f"{name}: this adapter adapts {names} ({key}: {_shown(value)}); not supported",
                hint="an adapter of attention and dense MLPs can be used; or merge this one into its base first",
            )
    strange = [key for key in defaults if key not in _LORA_KEYS and raw.get(key) and raw[key] != defaults[key]]
    if raw.get("bias", "none") != "none":
        strange.append("bias")
    if raw.get("peft_type") != "LORA" or strange:
        raise ModelError(
            f"{name}: only plain LoRA adapters can be used; this is {', '.join([str(raw.get('peft_type')), *strange])}",
            hint="merge it into its base first, or train a LoRA adapter",
        )
    if (start := raw.get("init_lora_weights")) not in _HARMLESS_STARTS:
        raise ModelError(
            f"{name}: init_lora_weights: {start} changes the base when it is loaded",
            hint="PEFT makes plain LoRA of it: save_pretrained(path_initial_model_for_weight_conversion=...)",
        )
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in raw.get(key) or ():
            if not _PLAIN_PATTERN.fullmatch(str(pattern)):
                raise ModelError(f"{name}: {key} names layers by an expression ({pattern}): write their names out")


def _shown(value: Any) -> str:
    """A stranger's setting in a message: short, whatever it is."""
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) < 80 else f"{text[:77]}..."


def base_named_by(raw: Any, revision: Any, name: str) -> str:
    """The base that an adapter names: a Hub id, or a folder that is reached without climbing out of where it lies.

    Raises:
        ModelError: none, or it leads elsewhere: a URL, `..`, a home folder; or a revision that anybody may have made.
    """
    if not raw:
        raise ModelError(f"{name}: its adapter_config.json names no base model")
    bare = raw.removeprefix("bundled:") if isinstance(raw, str) else ""
    if not isinstance(raw, str) or not _NAME.fullmatch(bare) or ".." in Path(bare).parts:
        raise ModelError(
            f"{name}: the base that its adapter_config.json names leads elsewhere: {raw!r}",
            hint="if you trust it: name the base as model.path and this folder as model.adapter in a recipe",
        )
    if revision is not None and (not isinstance(revision, str) or revision.startswith("refs/")):
        raise ModelError(f"{name}: its adapter_config.json names a revision that is no branch or commit: {revision!r}")
    return raw


def read_json(file: Path) -> dict[str, Any]:
    """A settings file; empty where there is none.

    Raises:
        ModelError: too large, or no JSON object.
    """
    if not file.is_file():
        return {}
    if file.stat().st_size > _LARGEST_CONFIG:
        raise ModelError(f"{file} has {file.stat().st_size:,} bytes: no settings")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ModelError(f"{file} is not a JSON object")
    return raw
