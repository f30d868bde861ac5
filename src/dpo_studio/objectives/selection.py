"""The known objectives, and how a recipe's section selects one by `kind`."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, fields

from pydantic import GetCoreSchemaHandler, TypeAdapter
from pydantic.errors import PydanticUserError
from pydantic_core import CoreSchema, core_schema

from dpo_studio.errors import UsageError
from dpo_studio.objectives.formula import Formula

__all__ = ["ByKind", "check_objective", "known_objectives", "objectives_help", "register", "to_objective"]

_DEFAULT = "dpo"
_known: dict[str, type[Formula]] = {}


def known_objectives() -> tuple[type[Formula], ...]:
    """Every objective a recipe may name: the package's own, then those that were added."""
    return tuple(_known.values())


def objectives_help() -> str:
    """The kinds in one line, for help texts and hints."""
    return ", ".join(_known)


@dataclass(frozen=True)
class ByKind:
    """In `Annotated[Formula, ByKind()]`: pydantic takes any objective that is known when the schema is built."""

    without: str | None = None
    """A kind that is not allowed here."""

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        kinds = {kind: formula for kind, formula in _known.items() if kind != self.without}
        choices = {kind: handler.generate_schema(formula) for kind, formula in kinds.items()}
        return core_schema.tagged_union_schema(choices, _kind_of)


def to_objective(section: object) -> Formula:
    """The objective that a recipe's plain section describes.

    Raises:
        ValueError: there is no such objective, or its parameters are wrong.
    """
    kind = _kind_of(section)
    if kind not in _known:
        raise ValueError(f"unknown objective {kind!r}")
    return TypeAdapter(_known[kind]).validate_python(section)


def register(formula: type[Formula]) -> None:
    """Register an objective that recipes may name; registering the same class again changes nothing.

    Raises:
        UsageError: its kind is taken.
    """
    if _known.setdefault(formula.kind, formula) is not formula:
        raise UsageError(
            f"the objective {formula.kind!r} is already registered: {_named(_known[formula.kind])}",
            hint=f"give {_named(formula)} a kind of its own",
        )


def _kind_of(section: object) -> str:
    """Which objective a recipe's section means: DPO by default."""
    if isinstance(section, dict):
        return str(section.get("kind", _DEFAULT))
    return str(getattr(section, "kind", type(section).__name__))


def check_objective(formula: object) -> None:
    """Check that a class from outside this package can be a recipe's section.

    Raises:
        UsageError: it is not a concrete `Formula` or a frozen dataclass, or lacks a kind or a default.
    """
    if not (isinstance(formula, type) and issubclass(formula, Formula)):
        raise UsageError(
            f"{formula!r:.80} is not an objective", hint="an objective is a subclass of objectives.Formula"
        )
    name = _named(formula)
    if inspect.isabstract(formula):
        raise UsageError(f"{name} does not define {', '.join(sorted(formula.__abstractmethods__))}")
    if "__dataclass_fields__" not in vars(formula):
        raise UsageError(f"{name} is not a dataclass", hint="write @dataclass(frozen=True) over it")
    if "kind" not in (field.name for field in fields(formula)) or not hasattr(formula, "kind"):
        raise UsageError(f"{name} has no kind", hint='its name in a recipe: kind: Literal["my_loss"] = "my_loss"')
    try:
        made = formula()
        TypeAdapter(formula)
        hash(made)
    except (TypeError, ValueError, NameError, PydanticUserError) as error:
        hint = "it is a frozen dataclass whose fields are typed, at the top of a module, and have defaults"
        raise UsageError(f"{name} cannot be a recipe's section: {error}", hint=hint) from None
    if not (isinstance(made.kind, str) and re.fullmatch(r"[a-z][a-z0-9_]*", made.kind)):
        raise UsageError(f"{name}: kind {made.kind!r} is not a name", hint="small letters, digits and _")
    if isinstance(made.beta, bool) or not isinstance(made.beta, int | float):
        raise UsageError(f"{name}: beta is not a number", hint="beta: Positive = 0.1")


def _named(formula: type[Formula]) -> str:
    return f"{formula.__module__}.{formula.__qualname__}"
