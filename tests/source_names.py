"""Names of what a source text calls, for the censuses."""

from __future__ import annotations

import ast

__all__ = ["name_of"]


def name_of(node: ast.AST) -> str:
    """`a.b.c` of a call's function; the last part alone where it hangs on a value."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = name_of(node.value)
        return f"{before}.{node.attr}" if before else f".{node.attr}"
    return ""
