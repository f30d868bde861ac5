"""Chat templates are untrusted programs: they run in jinja's sandbox with a budget, so that they end.

jinja's sandbox keeps a template away from the machine, not from its time and memory: ten nested loops, `2 ** 10 ** 9`
or a list that holds itself twice, forty times over, take for ever inside a single call, where no signal and no other
thread can stop them. So nothing large is made in the first place. Before a template is compiled, its loops, literals,
slices and concatenations are wrapped; operators, calls, filters and output go through the environment; each pays for
what it makes. Filters and methods are those on the lists below, which make nothing larger than their input or are
asked beforehand how large. What an allowed template writes is what `apply_chat_template` writes.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Collection, Mapping, Sequence
from types import BuiltinMethodType, MethodType
from typing import Any

from jinja2 import TemplateError, Undefined, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from jinja2.runtime import BlockReference, Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Joiner
from jinja2.visitor import NodeTransformer

from dpo_studio.config import TemplateValue
from dpo_studio.errors import ModelError, reason_of
from dpo_studio.tokens.metering import (
    ITEM,
    LARGEST_BITS,
    METER,
    Meter,
    TemplateLimit,
    functions,
    length_replaced,
    metered,
    turns,
    weight,
)

__all__ = ["LONGEST_CHAT", "ChatTemplate", "TemplateLimit"]

LONGEST_CHAT = 4_000_000
"""Characters of a chat: a million tokens. What fits needs a hundredth of the limits below in an honest template."""
LONGEST_TEMPLATE = 256_000
"""Characters of a template; the longest of known models have 30,000."""
_TEXT_METHODS = (
    *("capitalize", "casefold", "count", "endswith", "find", "index", "isalnum", "isalpha", "isascii", "isdecimal"),
    *("isdigit", "islower", "isnumeric", "isspace", "istitle", "isupper", "join", "lower", "lstrip", "partition"),
    *("removeprefix", "removesuffix", "replace", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "split"),
    *("isidentifier", "isprintable", "splitlines", "startswith", "strip", "swapcase", "title", "upper"),
)
_OTHER_METHODS = ("copy", "count", "get", "index", "items", "keys", "values")
_OURS = ("messages", "tools", "documents", "add_generation_prompt", "strftime_now", "raise_exception", "namespace")
"""What every template is handed."""
_JINJAS_OWN = ("_loop_vars", "_block_vars")
"""What jinja passes along with every call in a loop or block, and takes away again before the macro sees it."""
_WIDE = re.compile(r"%[^%a-zA-Z]*(\*|\d{4})")
"""A printf format whose width is given elsewhere, or has four digits."""


class ChatTemplate:
    """A template with limits on time and memory."""

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, object],
        *,
        today: datetime.date | None = None,
        given: Mapping[str, TemplateValue] | None = None,
    ) -> None:
        """`special_tokens`: what the template may call `bos_token` and the like; `today`: the date it may write.

        `given`: values by the names that the template reads them by, as a server's `chat_template_kwargs`.

        Raises:
            ModelError: too long, no Jinja, or made of what no chat template needs; or it does not read what is given.
        """
        if len(source) > LONGEST_TEMPLATE:
            raise ModelError(f"the chat template has {len(source):,} characters, over {LONGEST_TEMPLATE:,}")
        self._special_tokens = {
            name: [str(token) for token in value] if isinstance(value, list | tuple) else str(value)
            for name, value in special_tokens.items()
        }
        self.source = source
        environment = _Environment(len(source), today or datetime.date.today())
        try:
            tree = environment.parse(source)
            read = find_undeclared_variables(tree) if given else set()
            code = environment.compile(_Metered().visit(tree))
        except (TemplateError, SyntaxError, ValueError, RecursionError, MemoryError, OverflowError) as error:
            raise ModelError(f"the chat template cannot be used: {_reason(error)}") from None
        self.given = _check_given(given or {}, read - {*_OURS, *self._special_tokens})
        self._template = environment.template_class.from_code(environment, code, environment.make_globals(None))

    def render(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool) -> str:
        """The chat rendered by the template.

        Raises:
            TemplateLimit: it takes too long or makes too much.
            jinja2.TemplateError, and what else a template's code can raise.
        """
        token = METER.set(Meter())
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
                **self.given,
            )
        except (RecursionError, MemoryError) as error:
            raise TemplateLimit(_reason(error)) from None
        finally:
            METER.reset(token)


def _check_given(given: Mapping[str, TemplateValue], read: Collection[str]) -> dict[str, TemplateValue]:
    """What a template does not read changes nothing, and its user believes that it does.

    Raises:
        ModelError: it does not read one of them.
    """
    if unread := sorted(set(given) - set(read)):
        known = f"it reads {', '.join(sorted(read))}" if read else "it reads none"
        raise ModelError(f"model.template: the chat template does not read {unread[0]}", hint=known)
    return dict(given)


class _Metered(NodeTransformer):
    """Wraps what jinja compiles to plain Python: loops, literals that hold values, slices, and `~`."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        written = sum(len(text.data) for text in node.find_all(nodes.TemplateData))
        node.iter = _through("(turns)", node.iter, nodes.Const(written))
        return node

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return node if all(isinstance(item, nodes.Const) for item in node.items) else _through("(bounded)", node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _through("(bounded)", node) if node.ctx == "load" else node

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return _through("(bounded)", node)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _through("(bounded)", node) if isinstance(node.arg, nodes.Slice) else node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _through("(written)", nodes.List(node.nodes, lineno=node.lineno))


def _through(name: str, node: Any, *arguments: nodes.Expr) -> nodes.Filter:
    """The value of `node`, gone through one of the filters that no template can spell."""
    return nodes.Filter(node, name, list(arguments), [], None, None, lineno=node.lineno)


@pass_context
def _output(_: Context, value: Any) -> Any:
    """What `{{ }}` writes; asking for the context keeps jinja from writing constants while it compiles."""
    return METER.get().bounded(value)


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words; nothing here needs the mark."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own way

    def parse(self, parser: Parser) -> nodes.Node:
        """A scope of its own, as transformers has it: what is set inside ends with it."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Environment(ImmutableSandboxedEnvironment):
    """jinja as chat templates need it, with every operation that makes a value charged."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, template_length: int, today: datetime.date) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, loopcontrols],
            finalize=_output,
            optimized=False,  # constants would be computed while compiling, uncharged
        )
        self._template_length = template_length
        self.filters = metered(self.filters)
        self.globals = {**functions(today)}

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """An operator whose result can be larger than what it is made of."""
        meter = METER.get()
        if operator == "+":
            meter.make(_length(left) + _length(right))
        elif operator == "*":
            _check_product(meter, left, right)
        elif operator == "**":
            if isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > LARGEST_BITS:
                raise TemplateLimit("it raises a number to a power of thousands of digits")
        elif isinstance(left, str):
            if _WIDE.search(left):
                raise TemplateLimit("it pads a text to thousands of characters")
            meter.make(len(left) + 1000 * left.count("%") + weight(right))
        result = super().call_binop(context, operator, left, right)
        return meter.bounded(result) if isinstance(result, list | tuple) else result

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 - as jinja has it
        """A call of a macro, a function or a method; of the latter two, only of those listed."""
        meter = METER.get()
        if isinstance(__obj, Macro | BlockReference | LoopContext):
            given = [value for name, value in kwargs.items() if name not in _JINJAS_OWN]
            values = (*args, *given)  # it may keep them together, as `varargs`
            meter.bounded([value for value in values if isinstance(value, str | list | tuple | dict)])
            meter.spend(__self._template_length)
            if isinstance(__obj, LoopContext) and args:  # a recursive loop goes over them as they are
                args = (turns(args[0], __self._template_length), *args[1:])
        elif isinstance(__obj, BuiltinMethodType | MethodType):
            _check_method(meter, __obj, args)
        elif not isinstance(__obj, Joiner | Undefined) and __obj not in __self.globals.values():
            raise SecurityError(f"it calls {getattr(__obj, '__name__', type(__obj).__name__)!r}")
        result = super().call(__context, __obj, *args, **kwargs)
        return meter.bounded(result) if isinstance(result, str | list | tuple | dict) else result


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple) else ITEM


def _check_product(meter: Meter, left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        if left.bit_length() + right.bit_length() > LARGEST_BITS:
            raise TemplateLimit("it makes a number of thousands of digits")
        return
    for value, times in ((left, right), (right, left)):
        if isinstance(value, str | list | tuple) and isinstance(times, int):
            meter.make(weight(value) * max(times, 0))


def _check_method(meter: Meter, method: Any, arguments: Sequence[Any]) -> None:
    """A method of a text, list or mapping, before it is called."""
    owner, name = method.__self__, method.__name__
    if isinstance(owner, LoopContext):
        allowed = name in ("cycle", "changed")
    elif isinstance(owner, str):
        allowed = name in _TEXT_METHODS
        meter.make(len(owner))
    else:
        allowed = isinstance(owner, list | tuple | dict) and name in _OTHER_METHODS
    if not allowed:
        raise SecurityError(f"it calls {type(owner).__name__}.{name}")
    if isinstance(owner, str) and name == "replace" and len(arguments) >= 2:
        meter.make(length_replaced(owner, *arguments[:2]))
    elif isinstance(owner, str) and name == "join" and arguments:
        if not isinstance(arguments[0], list | tuple | str | dict):
            raise SecurityError("it joins something that is not a list: put `|list` before")
        meter.make(weight(arguments[0]) + len(arguments[0]) * len(owner))


def _reason(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deep, or calls itself without end"
    if isinstance(error, MemoryError):
        return "it needs too much memory"
    return reason_of(error)
