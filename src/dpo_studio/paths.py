"""Names that become files and folders, kept where they belong."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

from dpo_studio.errors import UsageError

__all__ = ["inside", "plain_name", "user_path"]

_LONGEST = 255
"""Bytes that file systems allow a name."""
_SEPARATORS = frozenset('/\\:*?"<>|')
"""What parts a path, or cannot be in a name, on one system or another."""
_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
_DEVICES = frozenset({"CON", "PRN", "AUX", "NUL"} | {f"{port}{n}" for port in ("COM", "LPT") for n in range(1, 10)})
"""Names that Windows keeps for itself, with any ending."""


def user_path(path: str | Path) -> Path:
    """The path with ~ as the user's home; where there is no such user (pathlib raises), a file of that name.

    Raises:
        UsageError: `~` itself, and this user's home is unknown: a folder named `~` is never intended.
    """
    first = Path(path).parts[:1]
    if first == ("~",) and not _has_home():
        raise UsageError(
            f"{path}: this user has no home folder",
            hint="set HOME, or DPO_STUDIO_CACHE for what is kept between commands",
        )
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def _has_home() -> bool:
    """Whether HOME is a path or, where it is not set, the system knows this user's."""
    if "HOME" in os.environ:
        return Path(os.environ["HOME"]).is_absolute()
    try:
        return Path.home().is_absolute()
    except RuntimeError:
        return False


def plain_name(name: str, *, hint: str | None = None) -> str:
    """The name, if it is one that a file or folder can have on every system and that leads nowhere else.

    Raises:
        UsageError: empty, `..`, with a separator or a character that is not seen, or too long.
    """
    if name.strip(" .") == "" or name != name.rstrip(" ."):
        reason = "names no file" if name.strip(" .") == "" else "ends in a dot or a space"
    elif any(character in _SEPARATORS or unicodedata.category(character) in _UNSEEN for character in name):
        reason = "has a character that no file name has everywhere"
    elif len(name.encode()) > _LONGEST:
        reason = f"is longer than {_LONGEST} bytes"
    elif name.partition(".")[0].upper() in _DEVICES:
        reason = "is a device on some systems"
    else:
        return name
    raise UsageError(f"{name[:80]!r} {reason}", hint=hint)


def inside(folder: Path, name: str, *, hint: str | None = None) -> Path:
    """The file or folder of that name in `folder`, which it cannot leave, by a link either.

    Raises:
        UsageError: no plain name, or a link that leads out.
    """
    path = folder / plain_name(name, hint=hint)
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UsageError(f"{path} is a link that points out of {folder}", hint=hint)
    return path
