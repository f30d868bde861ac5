"""Names that become files and folders, kept where they belong."""

from __future__ import annotations

import unicodedata
from pathlib import Path

from dpo_studio.errors import UsageError

__all__ = ["check_out", "inside", "plain_name", "user_path"]

_LONGEST = 255
"""Bytes that file systems allow a name."""
_SEPARATORS = frozenset('/\\:*?"<>|')
"""What parts a path, or cannot be in a name, on one system or another."""
_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
_DEVICES = frozenset({"CON", "PRN", "AUX", "NUL"} | {f"{port}{n}" for port in ("COM", "LPT") for n in range(1, 10)})
"""Names that Windows keeps for itself, with any ending."""


def user_path(path: str | Path) -> Path:
    """The path with ~ as the user's home; where there is no such user (pathlib raises), a file of that name."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


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
        raise UsageError(f"{path} is a link that leads out of {folder}", hint=hint)
    return path


def check_out(file: Path, source: str, *, option: str = "--out") -> None:
    """Told before anything long begins: whether a result can be written there, and is not written over its source.

    Raises:
        UsageError: no file, no such folder, or what was (or lies in) the source that is read.
    """
    if not file.name or (file.exists() and not file.is_file()):  # replacing /dev/null would be no kindness
        raise UsageError(f"{option} {file} is not a file")
    if not file.parent.is_dir():
        raise UsageError(f"{option} {file}: no such folder")
    named = {user_path(name).resolve() for name in (source, source.rpartition(":")[0]) if name}
    if file.exists() and named & {file.resolve(), *file.resolve().parents}:
        raise UsageError(f"{option} {file} is what is read: it would be replaced", hint="choose another name")
