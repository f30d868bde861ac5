"""Bases and tokenizers: found, looked over before anything is loaded, and loaded whole or not at all."""

from __future__ import annotations

import datetime
import errno
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    dynamic_module_utils,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging as transformers_logging

from dpo_studio.config import BUNDLED, ModelSection, cache_folder
from dpo_studio.errors import ModelError, reason_of
from dpo_studio.models.attention import check_architecture, choose_attention
from dpo_studio.models.bundled import bundled_folder
from dpo_studio.models.gptq_checkpoint import load_gptq, read_quantization
from dpo_studio.models.refusals import refuse_unfit
from dpo_studio.models.scan import INDEX, NO_CODE, PICKLES, read_json, scan_folder, template_text, weights_of
from dpo_studio.models.sizes import Shapes, check_model_size, check_numbers, tensor_shapes
from dpo_studio.models.tokenizer_settings import read_tokenizer
from dpo_studio.models.vocabulary import check_vocabulary
from dpo_studio.paths import user_path
from dpo_studio.reading import open_regular, sha256_of
from dpo_studio.runs.folder import is_run
from dpo_studio.tokens.chat import ChatEncoder

__all__ = [
    "ChatModel",
    "check_files",
    "choose_dtype",
    "load_chat_model",
    "load_encoder",
    "load_weights",
    "locate",
    "put_on_gpu",
    "weights_fingerprint",
]

# transformers refuses code from a folder; by itself it asks on stdin first
dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0

_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "README.md"]
"""The last names the license, which an export's card repeats."""
_AS_GPTQ = "a GPTQ base takes a quarter (`dpo quantize` makes one)"
_MORE_ROOM = "choose a smaller model, or a GPU with more free memory: `nvidia-smi` shows what else is on this one"
_NO_HUB = "check the network, or download the model elsewhere and give its folder"


@dataclass(frozen=True, eq=False)
class ChatModel:
    """A base model with its tokenizer, ready to compute."""

    model: PreTrainedModel
    encoder: ChatEncoder
    folder: Path
    """Where its files are on this machine."""
    typed: str
    """What its user called it."""
    dtype_reason: str
    """Why it computes in this precision."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return torch.device(self.model.device)


def load_chat_model(
    section: ModelSection,
    *,
    typed: str | None = None,
    say: Callable[[str], None] = lambda _: None,
    encoder: ChatEncoder | None = None,
    today: datetime.date | None = None,
) -> ChatModel:
    """Load a base and its tokenizer, unless its `encoder` is at hand, onto the best device there is.

    `today` is the date its chat template may write, None today's.

    Raises:
        ModelError: not found, unsafe, unsupported, or with tensors missing or left over.
    """
    folder = locate(section.path, section.revision, say)
    config = check_folder(folder, section)
    encoder = encoder or load_encoder(folder, section, today=today)
    check_vocabulary(folder, config, encoder, section.path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "compiled"))  # its own is emptied on a reboot
    dtype, reason = choose_dtype(section.dtype, device)
    attention = choose_attention(section.attention, config, device)
    quantization = read_quantization(folder)
    if quantization is None:
        model = load_weights(AutoModelForCausalLM, folder, dtype, attention, section.path)
        with put_on_gpu(model.get_memory_footprint(), section.path, hint=f"{_AS_GPTQ}, or {_MORE_ROOM}"):
            model = model.to(device)
    else:
        packed = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        hint = (
            _MORE_ROOM if section.residency == "packed" else f"model.residency: packed takes that much; or {_MORE_ROOM}"
        )
        with put_on_gpu(packed, section.path, hint=hint):
            model = load_gptq(
                folder,
                config,
                quantization,
                name=section.path,
                dtype=dtype,
                attention=attention,
                device=device,
                residency=section.residency,
                compute=section.compute,
                say=say,
            )
    model.requires_grad_(False)
    model.eval()
    return ChatModel(model, encoder, folder, typed or section.path, reason)


@contextmanager
def put_on_gpu(size: int, name: str, *, hint: str | None = None) -> Iterator[None]:
    """Inside, a model of `size` bytes goes to the GPU.

    Raises:
        ModelError: the GPU has no room for it.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise ModelError(
            f"{name} does not fit in the GPU's memory: its weights take {size / 2**30:.1f} GiB",
            hint=hint or _MORE_ROOM,
        ) from None


def locate(path: str, revision: str | None = None, say: Callable[[str], None] = lambda _: None) -> Path:
    """The local folder of a model, scanned: bundled, on disk, or from the Hub (safetensors and text files only).

    Raises:
        ModelError: no such folder, no such repository, no network, or what no model folder needs in it.
    """
    folder = _found(path, revision, say)
    scan_folder(folder, path)
    check_numbers(read_json(folder / "config.json"), _shapes(folder, path), path)
    return folder


def _shapes(folder: Path, name: str) -> Shapes | None:
    """None where there are no weights, or not all of them: whoever loads them is told."""
    with suppress(ModelError):
        return tensor_shapes(weights_of(folder, name), name) or None
    return None


def _found(path: str, revision: str | None, say: Callable[[str], None]) -> Path:
    if path.startswith(BUNDLED):
        return bundled_folder(path, say)
    folder = user_path(path)
    if folder.is_dir():
        return folder
    if folder.exists() or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise ModelError(
            f"no such model folder: {path}", hint="give a folder, a Hub id, or bundled:smollm2-135m-instruct"
        )
    return _from_hub(path, revision, say)


def _from_hub(name: str, revision: str | None, say: Callable[[str], None]) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
    from huggingface_hub.errors import RevisionNotFoundError as NoRevision

    try:
        with suppress(LocalEntryNotFoundError):
            cached = snapshot_download(name, revision=revision, allow_patterns=_HUB_FILES, local_files_only=True)
            if _is_whole(Path(cached)):
                return Path(cached)
        if not constants.HF_HUB_OFFLINE:
            say(f"fetching {name} from the Hub")
        return Path(snapshot_download(name, revision=revision, allow_patterns=_HUB_FILES))
    except HFValidationError as error:
        raise ModelError(f"{name!r} is neither a folder nor a Hub id: {error}") from None
    except NoRevision:
        raise ModelError(f"{name} has no revision {revision!r} on the Hub") from None
    except RepositoryNotFoundError:
        raise ModelError(
            f"no folder {name} here, and no such model on the Hub", hint="private or gated? run `hf auth login`"
        ) from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            hint = "free some space, or point HF_HOME elsewhere"
            raise ModelError(f"{name} cannot be fetched: {error.strerror}", hint=hint) from None
        why = "HF_HUB_OFFLINE keeps the Hub away" if constants.HF_HUB_OFFLINE else "the Hub cannot be reached"
        raise ModelError(f"{name} is not on this machine, and {why} ({type(error).__name__})", hint=_NO_HUB) from None


def _is_whole(folder: Path) -> bool:
    """Whether every weight file is there: a cache may hold a part of a model, left by a broken download."""
    wanted = weights_of(folder, folder.name)
    return bool(wanted) and all(file.is_file() for file in wanted)


def check_folder(folder: Path, section: ModelSection) -> Any:
    """Look a model folder over before anything in it is loaded; return the config of its text model.

    Raises:
        ModelError: no config, an adapter beside it, pickle-only weights, or a kind of model that we cannot train.
    """
    name = section.path
    check_files(folder, name)
    if read_quantization(folder) is not None:
        pass  # what `residency` and `compute` are for
    elif section.residency != "packed" or section.compute != "auto":
        raise ModelError("model.residency and model.compute are for GPTQ bases", hint=f"{name} is not one: remove them")
    config = _read_config(folder, name)
    try:
        refuse_unfit(config, name)
        text = config.get_text_config()
        check_architecture(text, name)
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, LookupError) as error:
        raise ModelError(
            f"{name}: config.json has a value of the wrong kind: {reason_of(error)}",
            hint="is it as its author saved it? compare it with the original",
        ) from None
    return text


def _read_config(folder: Path, name: str) -> Any:
    """What transformers makes of config.json; it checks the values of most keys, and raises whatever comes.

    Raises:
        ModelError: it is of no model that transformers has, or has a value that cannot be.
    """
    raw = read_json(folder / "config.json")
    kind = raw.get("model_type")
    if raw.get("auto_map") and not (isinstance(kind, str) and kind in CONFIG_MAPPING):
        raise ModelError(f"{name}: config.json asks to run code from the model's folder (auto_map)", hint=NO_CODE)
    try:
        return AutoConfig.from_pretrained(folder)
    except Exception as error:
        raise ModelError(f"{name}: transformers does not know this model: {reason_of(error)}") from None


def check_files(folder: Path, name: str) -> None:
    """Look at a model folder's files before anything in it is loaded.

    Raises:
        ModelError: no config, remote code, or pickle-only weights.
    """
    _check_config(folder, name)
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{name} is a model and an adapter in one folder, and transformers would put the two together unasked",
            hint="move adapter_config.json and its weights to a folder of their own, and name that as model.adapter",
        )
    if not list(folder.glob("*.safetensors")):
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
        if pickles:
            raise ModelError(
                f"{name} has its weights as pickle only ({pickles[0]}), which can run code when loaded",
                hint="convert it to safetensors with a tool you trust, or use a repository that has them",
            )
        raise ModelError(f"{name} has no .safetensors weights in {folder}")


def load_encoder(folder: Path, section: ModelSection, *, today: datetime.date | None = None) -> ChatEncoder:
    """The tokenizer of a model folder and its chat template, which may write a date: `today`, or today's.

    Raises:
        ModelError: no tokenizer, no chat template, or one that cannot be used safely.
    """
    tokenizer: PreTrainedTokenizerBase = read_tokenizer(folder, section.path)
    if section.chat_template is not None:
        tokenizer.chat_template = _read_template(section.chat_template)
    return ChatEncoder(tokenizer, eos_ids=_end_ids(folder), today=today)


def _end_ids(folder: Path) -> set[int]:
    """What ends a turn, as transformers has it: the generation config's word, without one the config's.

    A wrapper's config may have it in its text model's part.
    """
    config = read_json(folder / "config.json")
    text = config.get("text_config")
    for part in (read_json(folder / "generation_config.json"), config, text if isinstance(text, dict) else {}):
        eos = part.get("eos_token_id")
        ids = [number for number in (eos if isinstance(eos, list) else [eos]) if isinstance(number, int)]
        if ids:
            return set(ids)
    return set()


def _read_template(path: str) -> str:
    try:
        return template_text(path, what="a template", error=ModelError)
    except ModelError as error:
        raise ModelError(f"model.chat_template {path} cannot be read: {error.message}", hint=error.hint) from None


def choose_dtype(wanted: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The precision of the frozen base, and why.

    On a CPU a timed product decides: with AMX bfloat16 is four times as fast as float32, without it 30 times slower.
    """
    if wanted != "auto":
        return getattr(torch, wanted), "as the recipe says"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported():
            return torch.bfloat16, "the GPU's own"
        return torch.float16, "this GPU has no bfloat16"
    seconds = {dtype: _time_product(dtype) for dtype in (torch.float32, torch.bfloat16)}
    ratio = seconds[torch.float32] / seconds[torch.bfloat16]
    dtype = torch.bfloat16 if ratio > 1.2 else torch.float32
    times, than = (ratio, "as fast as") if ratio > 1 else (1 / ratio, "slower than")
    return dtype, f"on this CPU a matrix product in bfloat16 is {times:.3g} times {than} one in float32"


def weights_fingerprint(folder: Path) -> str:
    """What tells these weights from others: each loaded file's name, size, safetensors header and 64 sampled blocks.

    And the config, for the same tensors mean something else under another rope base, window or LoRA alpha. Hashing a 7B
    model whole takes a minute; its header and a quarter of a megabyte take milliseconds.
    """
    digest = hashlib.sha256()
    for config in (folder / name for name in ("config.json", "quantize_config.json", "adapter_config.json")):
        if config.is_file():
            digest.update(f"{config.name}:".encode() + sha256_of(config, what="settings", error=ModelError))
    files = weights_of(folder, folder.name)
    if (index := folder / INDEX).is_file() and [file.name for file in files] != ["model.safetensors"]:
        digest.update(f"{index.name}:".encode() + sha256_of(index, what="settings", error=ModelError))
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with open_regular(file, what="weights", error=ModelError) as data:
            digest.update(data.read(8 + min(int.from_bytes(data.read(8), "little"), size)))
            for sample in range(64):
                data.seek(sample * max(0, size - 4096) // 63)
                digest.update(data.read(4096))
    return digest.hexdigest()


def load_weights(kind: Any, folder: Path, dtype: torch.dtype, attention: str | None, name: str) -> PreTrainedModel:
    """All tensors of the model from the folder, each used; transformers only warns and fills in random ones.

    `kind` is one of its auto classes.

    Raises:
        ModelError: tensors are missing or left over, or the files cannot be read.
    """
    config = _read_config(folder, name)
    if type(config) not in kind._model_mapping:
        raise ModelError(f"{name} ({config.model_type}) is no model of this kind ({kind.__name__})")
    if getattr(config, "quantization_config", None):
        raise ModelError(f"{name} is quantised, and is only read so as a base to train")
    check_model_size(kind, config, tensor_shapes(weights_of(folder, name), name), name)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        model, info = kind.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # to be told which; they are refused below like the others
            output_loading_info=True,
        )
    except Exception as error:
        raise ModelError(f"{name} cannot be loaded: {reason_of(error)}", hint="is the download complete?") from None
    finally:
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.enable_progress_bar()
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(str(key) for key in info[kind]):
            raise ModelError(
                f"{name}: {len(keys)} {kind.replace('_keys', '')} tensors, the first is {keys[0]}",
                hint="the weights are not this model's; nothing is ever filled in at random",
            )
    return model


def _time_product(dtype: torch.dtype) -> float:
    left, right = torch.ones(256, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - start)
    return best


def _check_config(folder: Path, name: str) -> None:
    if not (folder / "config.json").is_file():
        hint = None
        if (folder / "adapter_config.json").is_file():
            hint = "this is an adapter folder: give its base as model.path and this as model.adapter"
        elif is_run(folder):
            hint = f"this is a run: give its base as model.path and {folder / 'adapter'} as model.adapter"
        raise ModelError(f"{name} has no config.json: not a model folder", hint=hint)
