"""Untrusted folders: checked before any library opens a file in them.

Which files a library opens is decided here and not by a setting in one of them: what would send it elsewhere, run or
unpickle is refused by name. Files that nothing here opens (`.py` and pickles beside safetensors weights) may lie there,
and so may an `auto_map` that names them: it is read only where code from a folder may run, which is nowhere.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpo_studio import reading
from dpo_studio.errors import DPOStudioError, ModelError

__all__ = [
    "INDEX",
    "NO_CODE",
    "PICKLES",
    "read_json",
    "scan_folder",
    "template_text",
    "weight_files",
    "weights_of",
    "where_files_may_be",
]

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npy", ".npz", ".joblib")
"""Endings of files that can run code when loaded."""
_CONFIGS = (
    *("config.json", "tokenizer_config.json", "generation_config.json", "adapter_config.json"),
    *("processor_config.json", "preprocessor_config.json", "special_tokens_map.json", "quantize_config.json"),
)
"""What transformers, PEFT and their tokenizers read settings from."""
INDEX = "model.safetensors.index.json"
_LARGEST_CONFIG = 20_000_000
"""Bytes. The largest tokenizer_config.json of a known model has one million."""
_LARGEST_TEMPLATE = 4_000_000
"""Bytes; `tokens.template` allows 256,000 characters, and says so by itself."""
_LONGEST_NAME = 255
"""Bytes of a file's name: what a file system takes."""
_LARGEST_TOKENIZER = 400_000_000
"""Bytes; Gemma 3's tokenizer.json has 33 million."""
_TOKENIZER = re.compile(r"(added_tokens|vocab|merges|tokenizer|special_tokens).*\.(json|txt)$|.*\.(model|tiktoken)$")
"""Files that a tokenizer is made of."""
TEMPLATES = "additional_chat_templates"
"""The one folder inside a model's that transformers reads from."""
_CODE_KEYS = ("trust_remote_code", "custom_generate")
NO_CODE = "DPO Studio never runs code that comes with a model; use one that transformers supports itself"
_ELSEWHERE = {
    "transformers_weights": "other weights than model.safetensors",  # an index of any name, with anything in it
    "configuration_files": "another config",  # config.4.0.0.json in the place of config.json
    "fast_tokenizer_files": "another tokenizer",
    "gguf_file": "a GGUF file",
    "tokenizer_object": "another tokenizer",
    "init_inputs": "what a tokenizer is made of",  # positional arguments, the first of them a file
    "model_file": "another tokenizer",  # in sp_model_kwargs, which sentencepiece gets as they are
    "mecab_kwargs": "a dictionary of a tokenizer's",
    "sudachi_kwargs": "a dictionary of a tokenizer's",
    "jumanpp_kwargs": "a program",
    "fusion_config": "classes to put in the place of a model's own",
    "kernel_config": "kernels to put in the place of a model's own",
    "distributed_config": "how a model is spread over processes",
}
"""Keys that decide which files transformers 5.24 opens or which classes it builds, and what they name. Empty ones do
nothing."""
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
"""If a file of this name exists, transformers reads all of its kind and not model.safetensors."""


def scan_folder(folder: Path, name: str) -> None:
    """Check a model, tokenizer or adapter folder.

    Raises:
        ModelError: it contains something that is not a file, a link that points out of it, or settings that run code.
    """
    inside = where_files_may_be(folder)
    templates = folder / TEMPLATES
    for file in sorted([*folder.iterdir(), *(templates.iterdir() if templates.is_dir() else ())]):
        _check_file(file, inside, name)
        if _DISTRIBUTED.match(file.name):
            raise ModelError(
                f"{name}: {file.name} is a part of a distributed checkpoint, which would be read in the place of "
                "model.safetensors",
                hint="save the model whole, with save_pretrained",
            )
    for config in _CONFIGS:
        settings = read_json(folder / config)
        for key, value in _settings(settings):
            _check_setting(config, key, value, name)
        for part, value in settings.items():
            for key, inner in _settings(value) if part != "quantization_config" else ():
                if key in ("quantization_config", "compression_config") and inner:
                    raise ModelError(f"{name}: {config} has a {key} inside {part}: only one of its own is read")
    weight_files(folder, name)


def where_files_may_be(folder: Path) -> tuple[Path, ...]:
    """The folder; and the Hub cache's blobs, which every file of a snapshot is a link into."""
    home = folder.resolve()
    return (home, home.parent.parent / "blobs") if home.parent.name == "snapshots" else (home,)


def _check_file(file: Path, inside: tuple[Path, ...], name: str) -> None:
    """Weights alone may be links to another disk: only numbers are read from them, and no export copies them."""
    try:
        status = file.stat()
    except FileNotFoundError:  # a link to nothing: missing, like any other file
        return
    except OSError as error:
        raise ModelError(f"{name}: {file.name} cannot be read: {error.strerror}") from None
    kind = status.st_mode
    if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
        raise ModelError(
            f"{name}: {file.name} is not a regular file",
            hint="a device or a pipe in a model folder is never legitimate",
        )
    limit = (
        _LARGEST_TEMPLATE if file.suffix == ".jinja" else _LARGEST_TOKENIZER if _TOKENIZER.match(file.name) else None
    )
    if limit is not None and status.st_size > limit:  # libraries read it whole
        raise ModelError(f"{name}: {file.name} is over {limit:,} bytes", hint="is this the right file?")
    if file.suffix != ".safetensors":
        target = file.resolve()
        if not any(target.is_relative_to(place) for place in inside):
            raise ModelError(
                f"{name}: {file.name} is a link that points out of the folder", hint="put the file itself there"
            )


def _check_setting(config: str, key: str, value: Any, name: str) -> None:
    if key in _CODE_KEYS and value:
        raise ModelError(f"{name}: {config} asks to run code from the model's folder ({key})", hint=NO_CODE)
    if key.endswith(("implementation", "implementation_internal")) and "/" in str(value):
        raise ModelError(f"{name}: {config} asks to run a kernel from the Hub ({key}: {value})", hint=NO_CODE)
    if key in _ELSEWHERE and value:
        raise ModelError(
            f"{name}: {config} names {_ELSEWHERE[key]} ({key}), and a settings file must not choose what is read",
            hint=f"remove {key} from {config} if you trust the rest of the folder",
        )


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
    """The file of each tensor, by the folder's index; empty without one.

    Raises:
        ModelError: the index is damaged, or names a file that is not a safetensors file of this folder.
    """
    index = folder / INDEX
    if not index.is_file():
        return {}
    try:
        found = read_json(index).get("weight_map")
    except ModelError:
        found = None
    if not isinstance(found, dict):
        raise ModelError(f"{name}: {index.name} is damaged", hint="is the download complete? fetch the model again")
    for file in found.values():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ModelError(f"{name}: {index.name} names an invalid weight file: {file!r:.200}")
        if len(file.encode()) > _LONGEST_NAME:  # to ask whether it is there would be an error of the system's
            raise ModelError(f"{name}: {index.name} names a weight file of {len(file):,} characters")
    return {key: folder / file for key, file in found.items()}


def weights_of(folder: Path, name: str) -> list[Path]:
    """The weight files that are loaded from a model's or an adapter's folder, and no other; they may be missing.

    As transformers chooses: model.safetensors, without one what the index names. Our own GPTQ reader takes all there
    are where there is neither.

    Raises:
        ModelError: the index is damaged, or leads elsewhere.
    """
    for known in ("model.safetensors", *(() if (folder / INDEX).is_file() else ("adapter_model.safetensors",))):
        if (folder / known).is_file():
            return [folder / known]
    return sorted(set(weight_files(folder, name).values())) or sorted(folder.glob("*.safetensors"))


def template_text(path: str, *, what: str, error: type[DPOStudioError]) -> str:
    """A chat template in a file of its own, its line ends as Python reads them: what a run's digest is of.

    Raises:
        DPOStudioError: no regular file, no UTF-8, or longer than any template; how long one may be is checked later.
    """
    text = reading.read_text(path, what=what, limit=_LARGEST_TEMPLATE, error=error)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(file: Path) -> dict[str, Any]:
    """A settings file; empty where there is none.

    Raises:
        ModelError: too large, or no JSON object.
    """
    if not file.is_file():
        return {}
    content = reading.read_bytes(file, what="settings", limit=_LARGEST_CONFIG, error=ModelError)
    raw = reading.parse_json(content, what=f"{file} is not valid JSON", finite=False, error=ModelError)
    if not isinstance(raw, dict):
        raise ModelError(f"{file} is not a JSON object")
    return raw
