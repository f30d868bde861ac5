"""The meter that chat templates run on, and their filters and functions, each of which is charged for its result."""

from __future__ import annotations

import datetime
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import update_wrapper
from types import NoneType
from typing import Any

from jinja2 import TemplateError, Undefined
from jinja2.exceptions import SecurityError
from jinja2.utils import Joiner, Namespace

__all__ = [
    "ITEM",
    "LARGEST_BITS",
    "METER",
    "Meter",
    "TemplateLimit",
    "functions",
    "length_replaced",
    "metered",
    "turns",
    "weight",
]

_LONGEST_VALUE = 8_000_000
"""Characters that one value may take when written out."""
ITEM = 8
"""What a value counts inside another. A list that holds another twice holds its items twice, for so it is written."""
_DEEPEST = 32
_STEP = 200
"""What a turn of a loop or a call costs at least: a million of them in a rendering."""
LARGEST_BITS = 4096


_FILTERS = (
    *("abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "forceescape", "int"),
    *("items", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "reverse", "safe"),
    *("select", "selectattr", "sort", "string", "title", "trim", "unique", "upper"),
    *("attr", "groupby", "truncate", "wordcount"),
)
"""Filters whose result is no larger than a few times their input."""
_SIZED_FILTERS = ("batch", "center", "round", "slice")
"""Filters that make as much as a number says."""
_LARGEST_SIZE = 1000


@dataclass(frozen=True)
class Budget:
    """What one rendering may take."""

    characters: int = 200_000_000
    """That it may make and look at, all in all."""
    seconds: float = 5.0
    """Of this thread's own time, so that a laptop that sleeps refuses nothing; a rendering takes a ten-thousandth."""


BUDGET = Budget()


class TemplateLimit(SecurityError):
    """A template needs more time or memory than any legitimate one."""


class Meter:
    """The remaining budget of one rendering."""

    def __init__(self) -> None:
        self._budget = BUDGET
        self._left = BUDGET.characters
        self._until = time.thread_time() + BUDGET.seconds

    def spend(self, characters: int) -> None:
        """Charge a step that makes or reads this many characters."""
        self._left -= characters + _STEP
        if self._left < 0:
            most = self._budget.characters
            raise TemplateLimit(f"it makes more than {most:,} characters, or takes {most // _STEP:,} steps")
        if time.thread_time() > self._until:
            raise TemplateLimit(f"it takes more than {self._budget.seconds:g} seconds")

    def make(self, characters: int) -> None:
        """Charge for a value of that size before it is made."""
        if characters > _LONGEST_VALUE:
            raise TemplateLimit(f"it makes a value of {characters:,} characters")
        self.spend(characters)

    def bounded(self, value: Any) -> Any:
        """Charge for the value and return it."""
        self.make(weight(value))
        return value


METER: ContextVar[Meter] = ContextVar("meter")
"""The meter of this thread's rendering."""


def weight(value: Any, depth: int = 0) -> int:
    """About how many characters the value takes when written out.

    Raises:
        TemplateLimit: too many; or it holds something that could hold itself, or write more than it seems to.
    """
    if isinstance(value, str):
        return len(value)
    if not isinstance(value, list | tuple | dict):
        if isinstance(value, Namespace) or (depth and not isinstance(value, int | float | Undefined | NoneType)):
            raise TemplateLimit(f"it puts a {type(value).__name__} where values go")
        return ITEM
    if depth == _DEEPEST:
        raise TemplateLimit(f"it makes a value {_DEEPEST} deep")
    items: Iterable[Any] = (part for pair in value.items() for part in pair) if isinstance(value, dict) else value
    total = ITEM
    for item in items:
        total += ITEM + weight(item, depth + 1)
        if total > _LONGEST_VALUE:
            raise TemplateLimit(f"it makes a value of more than {_LONGEST_VALUE:,} characters")
    return total


def turns(values: Any, body: int) -> Iterator[Any]:
    """The values of a loop, each turn paid for with what its body writes at most."""
    meter = METER.get()
    for value in values:
        meter.spend(body)
        yield value


def _written(values: Sequence[Any]) -> str:
    """`a ~ b`."""
    meter = METER.get()
    meter.make(sum(weight(value) for value in values))
    return "".join(map(str, values))


def metered(filters: Mapping[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """Of jinja's filters those that chat templates need, each on the meter; and three that no template can spell."""
    free = {name: _paying(filters[name]) for name in _FILTERS}
    sized = {name: _paying(_sized(filters[name])) for name in _SIZED_FILTERS}
    return (
        free
        | sized
        | {
            "tojson": _tojson,
            "join": _joining(filters["join"]),
            "replace": _replacing(filters["replace"]),
            "indent": _indenting(filters["indent"]),
            "(turns)": turns,
            "(bounded)": lambda value: METER.get().bounded(value),
            "(written)": _written,
        }
    )


def length_replaced(text: str, old: Any, new: Any) -> int:
    if not isinstance(old, str) or not isinstance(new, str):
        return len(text)
    return len(text) + text.count(old) * max(0, len(new) - len(old))


def _paying(filter_: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose result is no larger than its input, charged for."""

    def paying(*arguments: Any, **named: Any) -> Any:
        meter = METER.get()
        result = filter_(*arguments, **named)
        if isinstance(result, str | list | tuple | dict):
            return meter.bounded(result)
        if isinstance(result, int) and result.bit_length() > LARGEST_BITS:
            raise TemplateLimit("it makes a number of thousands of digits")
        meter.spend(0)
        return result

    return update_wrapper(paying, filter_)


def _sized(filter_: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that makes no more than a thousand of anything."""

    def sized(*arguments: Any, **named: Any) -> Any:
        if any(isinstance(size, int) and abs(size) > _LARGEST_SIZE for size in (*arguments[1:], *named.values())):
            raise TemplateLimit(f"it makes more than {_LARGEST_SIZE:,} of something")
        result = filter_(*arguments, **named)
        return list(turns(result, 0)) if isinstance(result, Iterator) else result

    return update_wrapper(sized, filter_)


def _joining(filter_: Callable[..., Any]) -> Callable[..., Any]:
    def joining(context: Any, value: Any, d: Any = "", attribute: Any = None) -> Any:
        values = list(turns(value, 0))
        METER.get().make(weight(values) + len(values) * len(str(d)))
        return str(filter_(context, values, d, attribute))

    return update_wrapper(joining, filter_)


def _replacing(filter_: Callable[..., Any]) -> Callable[..., Any]:
    def replacing(context: Any, s: Any, old: Any, new: Any, count: Any = None) -> Any:
        METER.get().make(weight(s))
        METER.get().make(length_replaced(str(s), old, new))
        return filter_(context, s, old, new, count)

    return update_wrapper(replacing, filter_)


def _indenting(filter_: Callable[..., Any]) -> Callable[..., Any]:
    def indenting(s: Any, width: Any = 4, first: bool = False, blank: bool = False) -> Any:
        size = len(width) if isinstance(width, str) else int(width)
        METER.get().make(weight(s) + (str(s).count("\n") + 1) * size)
        return filter_(s, width, first, blank)

    return update_wrapper(indenting, filter_)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """As transformers has it: jinja's own would write `<` as `\\u003c`."""
    if weight(indent) > 16 or (isinstance(indent, int) and indent > 16) or weight(separators) > 100:
        raise TemplateLimit("it writes JSON with more than 16 spaces a level")
    METER.get().bounded(value)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _range(*arguments: int) -> range:
    numbers = range(*arguments)
    METER.get().make(ITEM * len(numbers))
    return numbers


def _new_dict(*arguments: Any, **named: Any) -> dict[Any, Any]:
    return dict(*arguments, **named)


def _namespace(*arguments: Any, **named: Any) -> Namespace:
    return Namespace(*arguments, **named)


def _raise_exception(message: Any) -> None:
    raise TemplateError(str(message)[:400])


def _dated(today: datetime.date) -> Callable[[str], str]:
    """`strftime_now` of that day, at its first minute: a prompt must not change from one rendering to the next."""
    now = datetime.datetime.combine(today, datetime.time())

    def strftime_now(format: str) -> str:
        if len(format) > 100 or re.search(r"\d{3}", format):
            raise TemplateLimit("it writes the date in more than 100 characters")
        return now.strftime(format)

    return strftime_now


def functions(today: datetime.date) -> dict[str, Callable[..., Any]]:
    """The functions that a template may call, on that day."""
    return {
        "range": _range,
        "dict": _new_dict,
        "namespace": _namespace,
        "joiner": Joiner,
        "raise_exception": _raise_exception,
        "strftime_now": _dated(today),
    }
