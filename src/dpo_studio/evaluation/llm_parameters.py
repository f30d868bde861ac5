"""What may be sent with every request to a server, and what would change what a reply is.

Servers have parameters of their own (`top_k`, `guided_choice`, `reasoning_effort`), so what is not known is sent as it
is. What is refused would be no request any more, or would be answered with something that is not one text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dpo_studio.errors import UsageError

__all__ = ["check_parameters"]

_OURS = {
    "model": "the model is named before the server's address",
    "messages": "the messages are what is asked",
    "extra_headers": "the key is the only header that is sent",
    "extra_query": "a query is not part of a request's parameters",
    "extra_body": "name what is in it: NAME=VALUE is sent as it is",
    "timeout": "the longest wait for a reply has an option of its own",
}
"""Said elsewhere, and why."""
_OTHER_REPLIES = {
    "stream_options": "replies are read whole",
    "tools": "a tool call is not a text",
    "tool_choice": "a tool call is not a text",
    "functions": "a function call is not a text",
    "function_call": "a function call is not a text",
    "audio": "a reply is read, not heard",
    "background": "a reply that comes later never comes",
}
_ONLY: dict[str, tuple[Any, ...]] = {
    "stream": (False,),
    "n": (1,),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
}
"""Parameters with one value that leaves a reply what it is: one text, whole."""
_DEPTH = 20


def check_parameters(parameters: Mapping[str, Any], option: str = "--judge-param") -> None:
    """See that replies to requests with these parameters, given by `option`, can be read.

    Raises:
        UsageError: a parameter is ours, asks for another kind of reply, or has a value that no JSON has.
    """
    for name, value in parameters.items():
        if name in _OURS or name in _OTHER_REPLIES:
            raise UsageError(f"{option} {name} cannot be set", hint=(_OURS | _OTHER_REPLIES)[name])
        if name in _ONLY and not any(type(value) is type(one) and value == one for one in _ONLY[name]):
            raise UsageError(
                f"{option} {name}={value!r:.40} asks for replies that cannot be read",
                hint="one reply is read, whole, as text",
            )
        _check_value(f"{option} {name}", value, _DEPTH)
        _check_text(f"{option} {name!a}", name)
    for name in ("max_tokens", "max_completion_tokens"):
        limit = parameters.get(name)
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or not 0 < limit < 2**31):
            raise UsageError(f"{option} {name}={limit!r:.40} is not a number of tokens")


def _check_value(name: str, value: Any, depth: int) -> None:
    if depth == 0:
        raise UsageError(f"{name} is nested deeper than {_DEPTH} levels")
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{name} contains {value}, which cannot be encoded as JSON")
    if isinstance(value, int) and abs(value) >= 2**64:
        raise UsageError(f"{name} contains a number that is too large to be sent")
    if isinstance(value, str):
        _check_text(name, value)
    if isinstance(value, dict | list):
        for member in (*value, *value.values()) if isinstance(value, dict) else value:
            _check_value(name, member, depth - 1)


def _check_text(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{name} contains a lone surrogate, which cannot be encoded as JSON") from None
