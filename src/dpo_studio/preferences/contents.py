"""What a row or a message holds beside its text: empty, harmless, used, or refused by name, never left out in silence.

A server renders an answer's thoughts, a row's tools and a template's settings; trained without them, a model learns
another prompt than the one it will be asked, and nobody is told.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping

__all__ = ["chat_written_as_text", "is_empty", "strange_in_message", "strange_in_row", "weight_of"]

_THOUGHTS = (
    *("reasoning_content", "reasoning", "reasoning_details"),
    *("thinking", "thinking_blocks", "thought", "thoughts"),
)
_CALLS = ("tool_calls", "function_call", "tools", "functions")
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_TOOL_TURN = ("name", "tool_call_id")
"""What templates write around the result of a call."""
_IN_A_ROW = (*_CALLS, *_MEDIA, "documents")
_IN_A_MESSAGE = (*_THOUGHTS, *_CALLS, *_MEDIA, "documents")
_EMPTY_TEXTS = frozenset({"", "[]", "{}", "null", "none", "nan"})
_ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "human", "gpt", "observation", "function"})
_LONGEST_JSON = 1_000_000
"""Characters that are looked into: a longer text is an answer of its own kind."""
_AS_PYTHON = re.compile(r"\s*\[?\s*\{\s*'(role|content|from|value|messages|conversations)'\s*:")
"""A message list as `str()` writes it: what a data frame of them becomes in a CSV file."""


def is_empty(value: object) -> bool:
    """Nothing, however it is written: null, NaN, "", [], {}, a list of nothings, or the text of one of these."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return True
    if isinstance(value, str):
        return value.strip().lower() in _EMPTY_TEXTS
    if isinstance(value, dict):  # Arrow gives every row the columns of all: {"enable_thinking": None}
        return all(map(is_empty, value.values()))
    return isinstance(value, list) and all(map(is_empty, value))


def strange_in_row(row: Mapping[str, object]) -> str | None:
    """The first column that a server would render and we do not, in words; None where there is none."""
    for name in _IN_A_ROW:
        if _holds(row.get(name)):
            return f"row has {name}, which are not supported"
    if not is_empty(row.get("chat_template_kwargs")):  # `false` is a setting like others
        return "row has chat_template_kwargs, which are not supported"
    if weight_of(row.get("weight")) != 1:
        return "row has a weight other than 1, which is not supported"
    return None


def _holds(value: object) -> bool:
    return value is not False and not is_empty(value)


def strange_in_message(message: Mapping[str, object], role: str) -> str | None:
    """The first field of a message that a server would render and we do not, in words; None where there is none."""
    for name in (*_IN_A_MESSAGE, *(_TOOL_TURN if role == "tool" else ())):
        if _holds(message.get(name)):
            what = "tool calls" if name in ("tool_calls", "function_call") else name
            return f"has a message with {what}, which are not supported"
    return None


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
    start = text.lstrip()[:1]
    if start not in ("[", "{") or len(text) > _LONGEST_JSON:
        return False
    if _AS_PYTHON.match(text):
        return True
    try:
        return _is_chat(json.loads(text))
    except (ValueError, RecursionError):
        return False


def _is_chat(value: object) -> bool:
    if isinstance(value, dict):
        return _is_message(value) or any(_is_chat_list(value.get(name)) for name in ("messages", "conversations"))
    return _is_chat_list(value)


def _is_chat_list(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_message, value))


def _is_message(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    role = value.get("role", value.get("from"))
    said = value.keys() & {"content", "value", "tool_calls", "function_call"}
    return isinstance(role, str) and role.lower() in _ROLES and bool(said)
