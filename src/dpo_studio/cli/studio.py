"""`dpo studio`: its command line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

__all__ = ["studio"]


def studio(
    folder: Annotated[Path, typer.Option(help="The folder to work in: its runs, pairs and models.")] = Path(),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes one that is free.")] = 8765,
    host: Annotated[str, typer.Option(help="0.0.0.0 lets other machines ask; it needs a password.")] = "127.0.0.1",
    allow: Annotated[
        Optional[list[Path]],  # noqa: UP045 - typer reads it at run time
        typer.Option("--allow", metavar="DIR", help="Another folder whose files may be used."),
    ] = None,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Print the link and open no browser.")] = False,
    link: Annotated[bool, typer.Option("--link", help="Print another link for a studio that runs.")] = False,
) -> None:
    """Open the browser studio: see your data, train, compare blind, vote, train on the votes."""
    try:
        from dpo_studio.studio.server import another_link, serve
    except ModuleNotFoundError as error:
        from dpo_studio.errors import UsageError, install_hint

        raise UsageError(f"the studio needs the package {error.name}", hint=install_hint("studio")) from None
    from dpo_studio.studio.guard import is_loopback

    if link:
        print(another_link(folder, port))
        return
    if not is_loopback(host):
        print(
            "warning: other machines can ask this studio, and what they send is not encrypted; "
            "`ssh -L` to a studio on 127.0.0.1 is safer",
            file=sys.stderr,
        )

    def tell(url: str) -> None:
        print(url, flush=True)
        if not no_browser:
            import webbrowser

            webbrowser.open(url)

    serve(folder, host=host, port=port, allow=tuple(allow or ()), tell=tell)
