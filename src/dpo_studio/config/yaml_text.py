"""YAML as people mean it: plain data from untrusted text, with limits."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable
from typing import Protocol

import yaml

__all__ = ["MAX_BYTES", "cut", "one_line", "parse_yaml"]

MAX_BYTES = 200_000
"""A recipe has two thousand; 1 MB of `1:1:1:...`, a number to the base of 60, takes PyYAML half a minute."""
_DEPTH = 50
"""Levels of a recipe's YAML; a recipe has four."""
_LONGEST_NUMBER = 100
"""Characters of a number: 60,000 hexadecimal digits are parsed at once, but Python refuses to print them."""
_TAGS = frozenset(f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "seq", "map"))
"""Plain data. All other tags make objects, merge mappings, or are ways to write a date."""


class _Event(Protocol):
    """The nodes of PyYAML's parser; its own stubs leave them untyped."""

    start_mark: yaml.error.Mark


class _Loader(yaml.SafeLoader):
    """YAML as people mean it, where YAML 1.1 surprises them or a file could do harm.

    5e-5 is a number (1.1: text), 2024-01-31 a text (1.1: a date), 1:30 a text (1.1: 90), a key given twice an error
    (1.1: the last one wins). Aliases are refused: a recipe needs none, and nested ones expand to gigabytes.
    """

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            peek: Callable[[], _Event] = self.peek_event
            mark = peek().start_mark
            raise yaml.composer.ComposerError(None, None, "aliases (*name) are not allowed: write the value out", mark)
        self.depth += 1
        if self.depth > _DEPTH:
            raise yaml.YAMLError(f"nested deeper than {_DEPTH} levels")
        node = super().compose_node(parent, index)
        self.depth -= 1
        if node is not None and node.tag not in _TAGS:
            tag = node.tag.replace("tag:yaml.org,2002:", "!!")
            raise yaml.composer.ComposerError(None, None, f"the tag {tag} is not allowed", node.start_mark)
        return node

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict[Hashable, object]:
        if not isinstance(node, yaml.MappingNode):
            raise yaml.constructor.ConstructorError(None, None, "!!map: not a mapping", node.start_mark)
        made: dict[Hashable, object] = {}
        for key_node, value_node in node.value:
            key = str(self.construct_object(key_node)) if isinstance(key_node, yaml.ScalarNode) else None
            if key is None or key in made:
                wrong = "a key is not text" if key is None else f"the key {cut(key)} occurs twice"
                raise yaml.constructor.ConstructorError(None, None, wrong, key_node.start_mark)
            made[key] = self.construct_object(value_node, deep=deep)
        return made

    def _number(self, node: yaml.ScalarNode) -> object:
        """A number or boolean, or an error: a tag may name any text as one."""
        text, kind = str(self.construct_scalar(node)), node.tag.rpartition(":")[2]
        if ":" in text:  # a time of day, which YAML 1.1 reads to the base of 60
            return text
        try:
            if len(text) > _LONGEST_NUMBER:
                raise ValueError
            return _MAKE[kind](self, node)
        except (ValueError, KeyError, IndexError):
            raise yaml.constructor.ConstructorError(
                None, None, f"{cut(text)} is not a {kind}", node.start_mark
            ) from None


_MAKE: dict[str, Callable[[yaml.SafeLoader, yaml.ScalarNode], object]] = {
    "int": yaml.SafeLoader.construct_yaml_int,
    "float": yaml.SafeLoader.construct_yaml_float,
    "bool": yaml.SafeLoader.construct_yaml_bool,
}
for _kind in _MAKE:
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader._number)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag in _TAGS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d[\d_]*\.?|\d*\.\d+)[eE][-+]?\d{1,3}"), list("+-.0123456789")
)


def parse_yaml(text: str) -> object:
    """Plain data from YAML: no tags that make objects, no aliases, no key twice, whatever the text came from.

    Raises:
        yaml.YAMLError: it is none, too long, or nested too deep.
    """
    if len(text) > MAX_BYTES:
        raise yaml.YAMLError(f"over {MAX_BYTES:,} characters")
    try:
        return _Loader(text).get_single_data()
    except (ValueError, OverflowError) as error:  # an escape that is not a character
        raise yaml.YAMLError(str(error)) from None
    except RecursionError:
        raise yaml.YAMLError("nested too deep") from None


def one_line(error: BaseException) -> str:
    """The YAML reader's message, without line breaks."""
    text = str(error).replace('in "<unicode string>", ', "at ")
    return " ".join(text.split()) or type(error).__name__


def cut(text: str) -> str:
    """The beginning of a text, short enough for a sentence."""
    return text if len(text) <= 80 else f"{text[:77]}..."
