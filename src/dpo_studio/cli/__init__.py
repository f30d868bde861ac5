"""The command line, a file a verb: its options and what it prints. Shared options stand in `options`.

Nothing heavy is imported until a verb is used.
"""

from __future__ import annotations

from dpo_studio.cli.app import main

__all__ = ["main"]
