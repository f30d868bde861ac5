"""A folder's tokenizer and chat template: settings of the kinds they are used as, and no file but the folder's own."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase, dynamic_module_utils

from dpo_studio.config import ModelSection
from dpo_studio.errors import ModelError, reason_of
from dpo_studio.scan import NO_CODE, read_json, template_text
from dpo_studio.tokens.chat import ChatEncoder

__all__ = ["load_encoder", "read_tokenizer"]

# transformers refuses code from a folder; by itself it asks on stdin first
dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0

_LARGEST_ID = 10_000_000
"""The largest vocabulary of a known model has 262,144 tokens."""
_VOCABULARY = ("vocab", "merges")
"""What a tokenizer is made of, or the name of a file with it."""


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_side(value: Any) -> bool:
    return value in ("left", "right")


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_template(value: Any) -> bool:
    """One, or several by name: in an object, or as older files have them in a list."""
    if isinstance(value, dict):
        return all(map(_is_text, value.values()))
    if isinstance(value, list):
        return all(
            isinstance(one, dict) and _is_text(one.get("name")) and _is_text(one.get("template")) for one in value
        )
    return _is_text(value)


def _is_token(value: Any) -> bool:
    return _is_text(value) or (isinstance(value, dict) and _is_text(value.get("content")))


_TYPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "model_max_length": (_is_number, "a number"),
    "padding_side": (_is_side, "left or right"),
    "truncation_side": (_is_side, "left or right"),
    "model_input_names": (_are_names, "a list of names"),
    "chat_template": (_is_template, "a template"),
    "tokenizer_class": (_is_text, "a name"),
}
_TOKENS = tuple(f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
"""Settings whose value is a token."""


def _check_value(key: str, value: Any, name: str) -> None:
    """transformers takes any value, and fails with it when the first text is encoded."""
    fits, words = _TYPES.get(key, (_is_token, "a token") if key in _TOKENS else (None, ""))
    if fits is not None and value is not None and not fits(value):
        raise ModelError(f"{name}: tokenizer_config.json has {key}: {str(value)[:60]!r}, which is not {words}")


def load_encoder(folder: Path, section: ModelSection, *, today: datetime.date | None = None) -> ChatEncoder:
    """The tokenizer of a model folder and its chat template, which may write a date: `today`, or today's.

    Raises:
        ModelError: no tokenizer, no chat template, or one that cannot be used safely.
    """
    tokenizer: PreTrainedTokenizerBase = read_tokenizer(folder, section.path)
    if section.chat_template is not None:
        tokenizer.chat_template = _read_template(section.chat_template)
    return ChatEncoder(tokenizer, eos_ids=_end_ids(folder), today=today, template=section.template)


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


def read_tokenizer(folder: Path, name: str) -> Any:
    """The tokenizer of a folder that was scanned, made of the files of that folder alone.

    Its config may remember files of the machine that it was saved on, as old ones do (`vocab_file`), or name any: none
    is followed, for None in their place means the folder's own.

    Raises:
        ModelError: it cannot be loaded.
    """
    raw = read_json(folder / "tokenizer_config.json")
    for key, value in raw.items():
        _check_value(key, value, name)
    _check_added_tokens(raw.get("added_tokens_decoder"), f"{name}: tokenizer_config.json")
    added = {str(number): token for token, number in read_json(folder / "added_tokens.json").items()}
    _check_added_tokens(added, f"{name}: added_tokens.json")
    files: dict[str, Any] = {
        key: None
        for key, value in raw.items()
        if key.endswith("_file") or (key in _VOCABULARY and isinstance(value, str))
    }
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **files)
        tokenizer.unk_token_id  # noqa: B018 - one that is unknown itself is looked up as itself, without end
        return tokenizer
    except RecursionError:
        raise ModelError(f"{name}: tokenizer_config.json: its unk_token is not in its vocabulary") from None
    except Exception as error:
        if "custom code" in str(error):  # what transformers says of an auto_map
            message = f"{name}: tokenizer_config.json asks to run code from the model's folder (auto_map)"
            raise ModelError(message, hint=NO_CODE) from None
        raise ModelError(f"{name}: its tokenizer cannot be loaded: {reason_of(error)}") from None


def _check_added_tokens(decoder: Any, where: str) -> None:
    """Some tokenizers make a token for every id below the largest that is named.

    Raises:
        ModelError: not ids and tokens, or an id that no vocabulary has.
    """
    if decoder is not None and not isinstance(decoder, dict):
        raise ModelError(f"{where}: its added tokens are not an object of ids and tokens")
    for number in decoder or ():
        if not (number.isascii() and number.isdecimal() and len(number) < 9 and int(number) <= _LARGEST_ID):
            raise ModelError(f"{where}: {number[:40]!r} is not a token id")
