"""What a row or a message contains besides its text: empty, harmless, used, or refused with its name, never dropped.

A server renders an answer's thoughts, a row's tools and a template's settings; trained without them, a model learns
another prompt than the one it will be asked, unnoticed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from functools import lru_cache

__all__ = ["chat_written_as_text", "is_empty", "strange_in_message", "strange_in_row", "weight_of"]

_THOUGHTS = (
    *("reasoning_content", "reasoning", "reasoning_details", "reasoning_text", "reasoning_summary"),
    *("thinking", "thinking_blocks", "thinking_content", "think", "thought", "thoughts", "chain_of_thought", "cot"),
)
_CALLS = ("tool_calls", "function_call", "tools", "functions")
_MORE_CALLS = ("tool_call", "function_calls", "tool_plan", "tool_responses", "tool_results")
_MEDIA = (
    *("image", "images", "video", "videos", "audio", "audios"),
    *("image_url", "image_urls", "image_path", "image_paths", "pixel_values", "input_audio"),
)
_TOOL_TURN = ("name", "tool_call_id")
"""What templates write around the result of a call."""
_SETTINGS = ("chat_template_kwargs", "template_kwargs", "chat_template")
_IN_A_ROW = (*_CALLS, *_MEDIA, "documents")
_IN_A_MESSAGE = (*_THOUGHTS, *_CALLS, *_MORE_CALLS, *_MEDIA, "documents", "files", "attachments", "refusal")
_TRAINED = ("train", "training", "trainable", "loss")
"""How others than OpenAI say `weight: 0`."""
_EMPTY_TEXTS = frozenset({"", "[]", "{}", "null", "none", "nan"})
_ROLES = frozenset(
    {
        *("system", "developer", "user", "assistant", "tool", "function", "human", "gpt", "observation"),
        *("model", "bot", "ai", "chatbot"),
    }
)
_MESSAGE_LISTS = ("messages", "conversations", "conversation")
_LONGEST_JSON = 1_000_000
"""Characters that are searched: a longer text is an ordinary answer."""
_AS_PYTHON = re.compile(
    r"(?:array\()?[\[(]?\s*\{\s*(?:"
    r"'(?:role|content|from|value|messages|conversations)'"
    r"|(?:'\w+'\s*:\s*(?:\d+|None|True|False|'[^'\\]{0,200}')\s*,\s*){1,8}'(?:role|messages|conversations)'"
    r")\s*:"
)
"""A message list as `str()` writes it: what a data frame of them becomes in a CSV file; short values may come first."""


def is_empty(value: object) -> bool:
    """Nothing, however it is written: null, NaN, "", [], {}, a list of nothings, or the text of one of these."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return True
    if isinstance(value, str):
        text = value.strip()
        return len(text) <= 4 and text.lower() in _EMPTY_TEXTS
    if isinstance(value, dict):  # Arrow gives every row the columns of all: {"enable_thinking": None}
        return all(map(is_empty, value.values()))
    return isinstance(value, list) and all(map(is_empty, value))


def strange_in_row(row: Mapping[str, object]) -> str | None:
    """The first column that a server would render and we do not, in words; None where there is none."""
    for name in row:
        if (plain := _plain(name)) in _PLAIN_ROW and _is_set(row[name]):
            return f"row has {name}, which are not supported"
        if plain in _PLAIN_SETTINGS and not is_empty(row[name]):  # `false` is a setting like others
            return f"row has {name}, which are not supported"
    if weight_of(row.get("weight")) != 1:
        return "row has a weight other than 1, which is not supported"
    return None


def _is_set(value: object) -> bool:
    return value is not False and not is_empty(value)


def strange_in_message(message: Mapping[str, object], role: str) -> str | None:
    """The first field of a message that a server would render and we do not, in words; None where there is none."""
    for name, value in message.items():
        if name in ("role", "content"):
            continue
        plain = _plain(name)
        if (plain in _PLAIN_MESSAGE or (role == "tool" and name in _TOOL_TURN)) and _is_set(value):
            what = "tool calls" if name in ("tool_calls", "function_call") else name
            return f"has a message with {what}, which are not supported"
        if plain in _TRAINED and weight_of(value) == 0:
            return f"has a message with {name}: {str(value).lower()}, which is not supported; weight: 0 is"
    return None


def _plain(name: object) -> str:
    """A field's name however it is written: `reasoningContent`, `Reasoning-Content`; none is over 64 characters."""
    return _letters(name) if isinstance(name, str) and len(name) <= 64 else ""


@lru_cache(4096)
def _letters(name: str) -> str:
    return re.sub(r"[^a-z]", "", name.lower())


_PLAIN_ROW, _PLAIN_MESSAGE, _PLAIN_SETTINGS = (
    frozenset(map(_plain, names)) for names in (_IN_A_ROW, _IN_A_MESSAGE, _SETTINGS)
)


def weight_of(value: object) -> float | None:
    """0 or 1, however it is written; None for anything else. Absent is 1."""
    if is_empty(value):
        return 1.0
    if isinstance(value, bool | int | float) and value in (0, 1):
        return float(value)
    return {"0": 0.0, "0.0": 0.0, "1": 1.0, "1.0": 1.0}.get(value.strip()) if isinstance(value, str) else None


def chat_written_as_text(text: str) -> bool:
    """Whether the whole text is a chat or one message written out as JSON, or as Python writes it.

    An answer that is JSON of another kind is an answer.
    """
    text = text.lstrip("\ufeff \t\r\n")
    if not text.startswith(("[", "{", "(", "array(", '"[', '"{', '"\\"')) or len(text) > _LONGEST_JSON:
        return False
    if _AS_PYTHON.match(text):
        return True
    try:
        value = json.loads(text)
        return chat_written_as_text(value) if isinstance(value, str) else _is_chat(value)
    except (ValueError, RecursionError):
        return _is_chat_by_lines(text)


def _is_chat_by_lines(text: str) -> bool:
    """Whether it is one message a line."""
    lines = text.split("\n")
    if len(lines) < 2 or not all(line.startswith("{") for line in lines if line.strip()):
        return False
    try:
        return all(_is_message(json.loads(line)) for line in lines if line.strip())
    except (ValueError, RecursionError):
        return False


def _is_chat(value: object) -> bool:
    if isinstance(value, dict):
        return _is_message(value) or any(_is_chat_list(value.get(name)) for name in _MESSAGE_LISTS)
    return _is_chat_list(value)


def _is_chat_list(value: object) -> bool:
    return isinstance(value, list) and bool(value) and (all(map(_is_message, value)) or all(map(_is_part, value)))


def _is_part(value: object) -> bool:
    """A piece of a message's content, as `{"type": "text", "text": "..."}`."""
    return isinstance(value, dict) and value.get("type") == "text" and value.keys() == {"type", "text"}


def _is_message(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    role = value.get("role", value.get("from"))
    said = value.keys() & {"content", "value", "parts", "tool_calls", "function_call"}
    return isinstance(role, str) and role.lower() in _ROLES and bool(said)
