"""`dpo cache`: the files kept between commands, and `dpo cache clear`."""

from __future__ import annotations

import re
from typing import Annotated, Optional

import typer

__all__ = ["app"]

app = typer.Typer(
    name="cache",
    help="The files kept between commands: sizes, and `clear`.",
    invoke_without_command=True,
    rich_markup_mode=None,
)

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


@app.callback()
def show(context: typer.Context) -> None:
    """Print sizes and folders of the cache."""
    if context.invoked_subcommand is not None:
        return
    from dpo_studio.cache import LIMIT_VARIABLE, PARTS, limit_bytes, sizes
    from dpo_studio.config import cache_folder
    from dpo_studio.console.text import printable

    folder, limit = cache_folder(), limit_bytes()
    found = sizes(folder)
    for part, (files, size) in found.items():
        print(f"{PARTS[part]:24}{files:>8,} files {_size(size):>12}")
    print(f"{'in all':24}{sum(n for n, _ in found.values()):>8,} files {_size(sum(n for _, n in found.values())):>12}")
    print(printable(f"in {folder}; at most {limit / 2**30:g} GiB of reference log-probs ({LIMIT_VARIABLE})"))


@app.command()
def clear(
    older_than: Annotated[
        Optional[str],  # noqa: UP045 - typer reads it at run time
        typer.Option(metavar="AGE", help="Only entries not used for this long: 30d, 12h, 2w."),
    ] = None,
) -> None:
    """Remove reference log-probs, which training computes again; entries in use by a running process stay.

    Converted models, compiled kernels and the replies of judges, which were paid for, are kept.
    """
    age = _age(older_than)
    from dpo_studio.cache import clear as clear_cache
    from dpo_studio.config import cache_folder

    done = clear_cache(cache_folder() / "reference", age)
    print(f"removed {done.removed:,} entries, {_size(done.bytes)}")
    if done.newer:
        print(f"kept {done.newer:,} used within {older_than}")
    if done.held:
        print(f"kept {done.held:,} that a running process uses")


def _age(text: str | None) -> float:
    if text is None:
        return 0
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([smhdw])", text.strip(), re.ASCII)
    if found is None:
        raise typer.BadParameter(f"{text!r} is not an age such as 30d, 12h or 2w", param_hint="--older-than")
    return float(found[1]) * _SECONDS[found[2]]


def _size(count: int) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} B"
