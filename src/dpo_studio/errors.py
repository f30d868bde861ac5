"""What can go wrong, as one tree. Every message speaks to the person at the keyboard.

DPOStudioError            refused with a reason            exit 1
├── RecipeError           the recipe says something impossible
├── DataError             a source of pairs cannot be used
├── ModelError            a model, tokenizer or adapter cannot be used
├── RunError              a run folder is not what the command needs
├── JudgeError            a judge, or a server that answers, cannot be asked, or stopped answering
├── UsageError            the command itself is wrong      exit 2
├── NonFiniteError        a run stopped itself             exit 3
├── RankLostError         another process of a run died    exit 4
└── Interrupted           stopped by a signal              exit 130 (SIGINT), 143 (SIGTERM), 129 (SIGHUP), 141 (SIGPIPE)
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

__all__ = [
    "DPOStudioError",
    "DataError",
    "Interrupted",
    "JudgeError",
    "ModelError",
    "NonFiniteError",
    "RankLostError",
    "RecipeError",
    "RunError",
    "UsageError",
    "install_hint",
    "reason_of",
]

_LONGEST_REASON = 400
"""Characters: five lines of a terminal."""


class DPOStudioError(Exception):
    """An expected error: `message` names what and where, `hint` what to do about it."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n  hint: {self.hint}"


class RecipeError(DPOStudioError):
    """The recipe cannot be read, or asks for something that is not available."""


class DataError(DPOStudioError):
    """A source of pairs is missing, unreadable, or contains nothing usable."""


class ModelError(DPOStudioError):
    """A model, tokenizer or adapter is missing, unsafe or unsupported."""


class RunError(DPOStudioError):
    """A run folder belongs to something else, or lacks what is needed."""


class JudgeError(DPOStudioError):
    """A judge or a server cannot be reached, or stopped answering; its replies so far are kept."""


class UsageError(DPOStudioError):
    """The command line is wrong."""

    exit_code = 2


class NonFiniteError(DPOStudioError):
    """A run stopped itself rather than learn from numbers that are not finite."""

    exit_code = 3


class RankLostError(DPOStudioError):
    """Another process of this run died or no longer answers; the last checkpoint is whole."""

    exit_code = 4


class Interrupted(DPOStudioError):
    """A signal stopped the run; what was learned is in its checkpoint."""

    def __init__(self, message: str, *, exit_code: int, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.exit_code = exit_code


def reason_of(error: BaseException) -> str:
    """Another library's error message, shortened to one line."""
    return " ".join(str(error).split())[:_LONGEST_REASON] or type(error).__name__


def install_hint(extra: str) -> str:
    """The command that adds the packages of an extra: into this Python, from the clone that this code is in.

    No package index has this project, so its name alone installs nothing.
    """
    clone = Path(__file__).parents[2]
    if (clone / "pyproject.toml").is_file():
        return f"{shlex.quote(sys.executable)} -m pip install -e {shlex.quote(f'{clone}[{extra}]')}"
    return f"in a clone of DPO Studio: {shlex.quote(sys.executable)} -m pip install '.[{extra}]'"
